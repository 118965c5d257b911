"""Telescope pictures on disk, in the two layouts that exist.

`folders` is the original's: `images/` and `masks/`, each with a folder for every class, pictures paired by file name.
`simulated` is the published sample's: `images/img_00000.png` with a coloured `masks/mask_00000.png`, and a manifest.

File names such as `TOD_1567419530.1567428401.ar5:f090_converted_10914-11427.png` hold a colon and several dots, so the
whole file name is the key and nothing is ever split on them blindly.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation.epoch import DataError
from segmentation.images import read_image
from segmentation.samples import Sample

Variant = Literal["noEL", "withEL"]
Layout = Literal["auto", "folders", "simulated"]
Group = Literal["image", "tod"]

THIRD_FOLDER: Mapping[str, str] = {"noEL": "none", "withEL": "electronic_glitch"}
SUFFIXES = (".png", ".tif", ".tiff")
MANIFEST = "manifest.csv"

CR, PS, EL = 0, 1, 2
COLOUR_CHANNELS: Mapping[tuple[int, int, int], tuple[int, ...]] = {
    (30, 100, 180): (),
    (0, 0, 0): (),
    (220, 20, 60): (CR,),
    (255, 105, 180): (PS,),
    (0, 206, 209): (CR, PS),
}
"""What each colour of a simulated mask switches on. Black is the background of the original's composites."""


@dataclass(frozen=True)
class Source:
    """One sample that is still on disk."""

    name: str
    """Unique; the file name, with its class folder only where two folders disagree about the picture."""
    group: str
    """Samples of one group stay in one split."""
    image: Path
    masks: tuple[Path | None, ...]
    """One for each channel, None where there is none; or a single coloured mask."""
    folders: tuple[str, ...] = ()
    """Class folders that list the picture."""


def class_folders(variant: Variant) -> tuple[str, str, str]:
    """Return the class folders in channel order."""
    return ("cosmic_ray", "point_source", THIRD_FOLDER[variant])


def find(root: Path, *, variant: Variant, layout: Layout = "auto", group: Group = "image") -> list[Source]:
    """Return every sample below a data folder, ordered by name.

    Raises:
        DataError: if the folder, its layout or its pictures are not there; the message names the path expected.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected {root / 'images'} and {root / 'masks'}, "
            f"each with the folders {', '.join(class_folders(variant))}"
        )
    chosen = detect(root) if layout == "auto" else layout
    sources = find_simulated(root, group) if chosen == "simulated" else find_folders(root, variant, group)
    return sorted(sources, key=lambda source: source.name)


def detect(root: Path) -> Literal["folders", "simulated"]:
    """Return the layout: simulated where pictures lie directly in `images/`."""
    images = root / "images"
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; data.root must hold images/ and masks/")
    return "simulated" if any(path.is_file() for path in _pictures(images)) else "folders"


def find_folders(root: Path, variant: Variant, group: Group = "image") -> list[Source]:
    """Return the samples of the original's layout; a picture that two class folders list is one sample.

    Where two folders hold different pictures under one name, both stay, in one group: they share their masks.
    """
    folders = class_folders(variant)
    listed: dict[str, list[str]] = {}
    for folder in folders:
        for path in _pictures(_folder(root / "images" / folder, variant)):
            listed.setdefault(path.name, []).append(folder)
    if not listed:
        raise DataError(f"{root / 'images'}: no pictures ({', '.join(SUFFIXES)}) in {', '.join(folders)}")
    for folder in folders:
        if folder != "none":
            _folder(root / "masks" / folder, variant)
    return [
        source for name, found in sorted(listed.items()) for source in _same_name(root, name, found, folders, group)
    ]


def find_simulated(root: Path, group: Group = "image") -> list[Source]:
    """Return the samples of the published simulation's layout.

    Raises:
        DataError: listing images without a mask and masks without an image.
    """
    images = {_number(path, "img_"): path for path in _pictures(root / "images")}
    masks_folder = root / "masks"
    if not masks_folder.is_dir():
        raise DataError(f"{masks_folder}: no such folder; expected mask_#####.png beside images/img_#####.png")
    masks = {_number(path, "mask_"): path for path in _pictures(masks_folder)}
    alone = [images[key].name for key in sorted(images.keys() - masks.keys())]
    orphans = [masks[key].name for key in sorted(masks.keys() - images.keys())]
    if alone or orphans:
        raise DataError(
            f"{root}: {len(alone)} images without a mask {alone[:9]}, {len(orphans)} masks without {orphans[:9]}"
        )
    batches = read_manifest(root / MANIFEST) if (root / MANIFEST).is_file() else []
    return [
        Source(path.name, _batch(batches, number) if group == "tod" else path.name, path, (masks[number],))
        for number, path in sorted(images.items())
    ]


def read_manifest(path: Path) -> list[dict[str, str]]:
    """Return the rows of a simulation's manifest: batch_id, seed, n_srcs, cr_rate, start_idx, end_idx, tod_file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = {"start_idx", "end_idx", "tod_file"}
    if rows and not wanted <= rows[0].keys():
        raise DataError(
            f"{path}: columns {', '.join(rows[0])}; expected also {', '.join(sorted(wanted - rows[0].keys()))}"
        )
    return rows


def read(sources: Iterable[Source]) -> Iterator[Sample]:
    """Decode samples one by one: image (1, H, W) with the values as stored, mask (3, H, W) of zeros and ones.

    Raises:
        DataError: naming the file, if an image is not grey, if a mask is of another size than its image, if sizes
            differ between samples, or if a mask holds a colour that is not known.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    for source in sources:
        image = read_grey(source.image)
        first = first or (source.image.name, image.shape)
        if image.shape != first[1]:
            raise DataError(
                f"{source.image}: {_size(image.shape)} pixels, but {first[0]} has {_size(first[1])}; "
                "a data set must be of one size"
            )
        mask = read_masks(source, image.shape)
        note = {"folders": " ".join(source.folders), "pixels": json.dumps(mask.sum(axis=(1, 2)).tolist())}
        yield Sample(source.name, source.group, image[None], mask, note)


def read_grey(path: Path) -> np.ndarray[Any, Any]:
    """Return a grey picture as (H, W) uint8, uint16 or float32 with the values as stored."""
    image = read_image(path)
    if image.ndim != 2:
        raise DataError(f"{path}: expected one grey channel, got an array of shape {image.shape}; convert it to grey")
    return image


def read_masks(source: Source, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return (3, H, W) uint8: 1 where the class is, 0 elsewhere and for a mask that is not there."""
    if len(source.masks) == 1 and source.masks[0] is not None:
        mask = read_colours(source.masks[0])
        _check_size(source.masks[0], mask.shape[1:], source.image, shape)
        return mask
    channels = np.zeros((len(source.masks), *shape), np.uint8)
    for channel, path in zip(channels, source.masks, strict=True):
        if path is not None:
            found = _luma(read_image(path)) > 0
            _check_size(path, found.shape, source.image, shape)
            channel[:] = found
    return channels


def read_colours(path: Path) -> np.ndarray[Any, Any]:
    """Return a coloured mask as (3, H, W) uint8 channels.

    Raises:
        DataError: listing each colour that stands for no class, with its count: colours are never guessed.
    """
    colours = read_image(path)
    if colours.ndim != 3 or colours.shape[2] < 3:
        raise DataError(f"{path}: expected an RGB mask, got shape {colours.shape}; for grey masks use layout=folders")
    codes = _code(colours[..., :3])
    mask = np.zeros((3, *codes.shape), np.uint8)
    known = np.zeros(codes.shape, bool)
    for colour, channels in COLOUR_CHANNELS.items():
        here = codes == _code(np.array(colour))
        known |= here
        for channel in channels:
            mask[channel][here] = 1
    if not known.all():
        raise DataError(f"{path}: {_unknown(colours[~known][:, :3])}; known are {_known_colours()}")
    return mask


def tod_of(name: str) -> str:
    """Return the id of the time-ordered data that a picture was cut from: all before its band and slice."""
    match = re.match(r"(?P<tod>.+?)(:(?P<band>[^:]*?))?_converted_(?P<start>\d+)-(?P<stop>\d+)\.[A-Za-z]+$", name)
    return match["tod"] if match else name


def missing_masks(sources: Sequence[Source], variant: Variant) -> dict[str, int]:
    """Return for each class folder how many of the pictures it lists have no mask there and so count as empty."""
    counts: Counter[str] = Counter()
    for source in sources:
        if len(source.masks) == len(class_folders(variant)):
            pairs = zip(class_folders(variant), source.masks, strict=True)
            counts.update(folder for folder, mask in pairs if mask is None and folder in source.folders)
    counts.pop("none", None)
    return dict(sorted(counts.items()))


def files(sources: Iterable[Source]) -> list[Path]:
    """Return every file that the samples are made of."""
    return sorted({path for source in sources for path in (source.image, *source.masks) if path is not None})


def _same_name(root: Path, name: str, found: list[str], folders: Sequence[str], group: Group) -> list[Source]:
    candidates = tuple(root / "masks" / folder / name for folder in folders)
    masks = tuple(path if path.is_file() else None for path in candidates)
    key = tod_of(name) if group == "tod" else name
    paths = [root / "images" / folder / name for folder in found]
    if all(path.read_bytes() == paths[0].read_bytes() for path in paths[1:]):
        return [Source(name, key, paths[0], masks, tuple(found))]
    return [Source(f"{folder}/{name}", key, path, masks, (folder,)) for folder, path in zip(found, paths, strict=True)]


def _folder(path: Path, variant: Variant) -> Path:
    if not path.is_dir():
        other = "withEL" if variant == "noEL" else "noEL"
        hint = f" (or set variant={other})" if path.name == THIRD_FOLDER[variant] else ""
        raise DataError(f"{path}: no such folder; expected it for variant {variant}{hint}")
    return path


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _number(path: Path, prefix: str) -> int:
    digits = path.stem.removeprefix(prefix)
    if not (path.stem.startswith(prefix) and digits.isdigit()):
        raise DataError(f"{path}: expected a name such as {prefix}00000.png in the simulated layout")
    return int(digits)


def _batch(batches: Sequence[Mapping[str, str]], number: int) -> str:
    for row in batches:
        if int(row["start_idx"]) <= number <= int(row["end_idx"]):
            return row["tod_file"]
    raise DataError(f"{MANIFEST}: no row covers picture {number}; group=tod needs start_idx <= {number} <= end_idx")


def _luma(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a grey version that is zero exactly where every colour is (alpha left out)."""
    return mask if mask.ndim == 2 else mask[..., :3].max(axis=2)


def _code(colours: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = colours.astype(np.int64)
    return np.asarray(wide[..., 0] * 65536 + wide[..., 1] * 256 + wide[..., 2])


def _unknown(pixels: np.ndarray[Any, Any]) -> str:
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    listed = [f"{tuple(colour.tolist())} x {count}" for colour, count in zip(colours[:5], counts[:5], strict=True)]
    return f"{len(colours)} unknown mask colours: {', '.join(listed)}"


def _known_colours() -> str:
    names = ("cosmic_ray", "point_source", "electronic_glitch")
    return ", ".join(
        f"{colour} {'+'.join(names[c] for c in channels) or 'background'}"
        for colour, channels in COLOUR_CHANNELS.items()
    )


def _check_size(path: Path, size: tuple[int, ...], image: Path, expected: tuple[int, ...]) -> None:
    if tuple(size) != tuple(expected):
        raise DataError(f"{path}: {_size(size)} pixels, but its image {image.name} has {_size(expected)}")


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
