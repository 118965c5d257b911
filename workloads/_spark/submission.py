"""Predictions of SPARK's test set as its scorer wants them: test_00000_layer.npz, checked and zipped.

Each holds `data`, (H, W, 3) at the picture's own size: red is the body, blue the panels, green never on.
"""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from segmentation import limits
from segmentation.epoch import DataError
from segmentation.images import image_size
from workloads._listing import listed
from workloads._spark.classes import paint

Pixels = npt.NDArray[np.uint8]
Layer = npt.NDArray[Any]
Upsample = Literal["logits", "nearest"]
Kind = Literal["bool", "uint8"]

KEY = "data"
ZIP_FILE = "submission.zip"
SUFFIX = "_layer.npz"


def to_classes(logits: Tensor, size: tuple[int, int], upsample: Upsample = "logits") -> Pixels:
    """Return class ids (H, W) at the picture's own size.

    Args:
        logits: (K, h, w).
        size: (H, W).
        upsample: logits: bilinear, then the largest. nearest: the largest first, as in the original; edges get steps.
    """
    if upsample == "logits":
        found = interpolate(logits.float()[None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    else:
        small = logits.argmax(0)[None, None]
        found = interpolate(small.float(), size, mode="nearest-exact")[0, 0]
    return np.asarray(found.to(torch.uint8).cpu().numpy(), np.uint8)


def to_layer(classes: Pixels, kind: Kind = "bool") -> Layer:
    """Return (H, W, 3) of class ids: bool, or uint8 of 0 and 255."""
    colours = paint(classes)
    return np.asarray(colours > 127) if kind == "bool" else colours


def stem(name: str) -> str:
    """Return what the files of a picture begin with: test_00000 of test_00000_img.jpg."""
    return name.rsplit("_", 1)[0] if "_" in name else Path(name).stem


def stems(images: Sequence[Path]) -> dict[str, Path]:
    """Return the pictures by what their files begin with.

    Raises:
        DataError: if two pictures would be written to one file.
    """
    found: dict[str, Path] = {}
    for image in images:
        name = stem(image.name)
        if name in found:
            both = f"{found[name].name} and {image.name}"
            raise DataError(f"{image.parent}: {both} would both become {name}{SUFFIX}; rename or remove one")
        found[name] = image
    return found


def save(out_dir: Path, image: str, classes: Pixels, *, kind: Kind = "bool", picture: bool = False) -> list[Path]:
    """Write the prediction of a picture, given by its file name; with `picture` NAME_pred.png too. Return the paths."""
    from PIL import Image

    out_dir.mkdir(parents=True, exist_ok=True)
    layer, name = to_layer(classes, kind), stem(image)
    paths = [_whole(out_dir / f"{name}{SUFFIX}", lambda path: _compress(path, layer))]
    if picture:
        drawn = Image.fromarray(paint(classes))
        paths.append(_whole(out_dir / f"{name}_pred.png", lambda path: drawn.save(path, format="PNG")))
    return paths


def problems(folder: Path, images: Sequence[Path]) -> list[str]:
    """Return all that is wrong with a folder of predictions for these pictures; none: it can be handed in."""
    wanted = {f"{name}{SUFFIX}": image for name, image in stems(images).items()}
    there = {path.name: path for path in sorted(folder.glob("*.npz"))}
    found = []
    if missing := sorted(wanted.keys() - there):
        found.append(f"{len(missing)} of {len(wanted)} predictions are missing: {listed(missing)}")
    if beyond := sorted(there.keys() - wanted):
        found.append(f"{len(beyond)} files belong to none of the {len(wanted)} pictures: {listed(beyond)}")
    kinds: dict[str, list[str]] = {}
    for name in sorted(wanted.keys() & there):
        layer, problem = _read(there[name])
        if layer is not None:
            kinds.setdefault(layer.dtype.name, []).append(name)
            problem = "; ".join(_wrong(layer, image_size(wanted[name])))
        if problem:
            found.append(f"{name}: {problem}")
    if len(kinds) > 1:
        counted = ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in sorted(kinds.items()))
        found.append(f"files of different types: {counted}; write all as one")
    return found


def write_zip(folder: Path, images: Sequence[Path]) -> Path:
    """Check the predictions, write submission.zip beside them and return its path.

    Raises:
        DataError: if anything is wrong: how much, and the first few.
    """
    if wrong := problems(folder, images):
        raise DataError(f"{folder}: {len(wrong)} problems, no {ZIP_FILE} written: {listed(wrong)}; predict again")
    files = [folder / f"{name}{SUFFIX}" for name in sorted(stems(images))]
    return _whole(folder / ZIP_FILE, lambda path: _pack(path, files))


def load(path: Path) -> Layer:
    """Return the (H, W, 3) of a prediction.

    Raises:
        DataError: if it cannot be read.
    """
    layer, problem = _read(path)
    if layer is None:
        raise DataError(f"{path}: {problem}")
    return layer


def _read(path: Path) -> tuple[Layer | None, str]:
    """Return the layer, or what is wrong with its file."""
    try:
        content = limits.read_npz(path)
    except DataError as error:
        return None, str(error).removeprefix(f"{path}: ")
    if list(content) != [KEY]:
        return None, f"has keys {', '.join(content) or 'none'}; expected {KEY} alone"
    return content[KEY], ""


def _wrong(layer: Layer, size: tuple[int, int]) -> Iterator[str]:
    """Yield what is wrong with a layer whose picture has this size, (H, W)."""
    if layer.shape != (*size, 3):
        yield f"shape {layer.shape}; expected {(*size, 3)}, the size of its picture"
        return
    if layer.dtype.name not in ("bool", "uint8"):
        yield f"type {layer.dtype}; expected bool or uint8"
        return
    if layer.dtype == np.uint8 and (between := np.count_nonzero((layer != 0) & (layer != 255))):
        yield f"{between} values are neither 0 nor 255"
    if green := np.count_nonzero(layer[..., 1]):
        yield f"green is on at {green} pixels; expected nowhere"
    if both := np.count_nonzero(layer[..., 0].astype(bool) & layer[..., 2].astype(bool)):
        yield f"{both} pixels are body and panels at once"


def _compress(path: Path, layer: Layer) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, data=layer)


def _pack(path: Path, files: Sequence[Path]) -> None:
    """Write files into a zip, as they are: they are compressed already. Same files, same bytes: no date goes in."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())


def _whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write under a temporary name, so that a killed writer leaves no half file under the right one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); make room or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
