"""Which volumes a folder holds, and their pixels, in any of three layouts.

original   root/[training/]patient001/patient001_frame01.nii.gz, ..._frame01_gt.nii.gz, Info.cfg
nnU-Net    root/imagesTr/patient001_frame01_0000.nii.gz, root/labelsTr/patient001_frame01.nii.gz, imagesTs, labelsTs
pairs      root/images/a.png, root/masks/a.png: pictures, arrays or volumes of one name
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation import images, nifti
from segmentation.epoch import DataError
from segmentation.nifti import Head
from workloads._listing import listed

Array = np.ndarray[Any, Any]
Layout = Literal["original", "nnunet", "pairs"]
Phase = Literal["ED", "ES", ""]

FRAME = re.compile(r"^(?P<patient>.+)_frame(?P<frame>\d+)$")
MARK, FIRST_CHANNEL, INFO = "_gt", "_0000", "Info.cfg"
LAYOUTS = "patientXXX/patientXXX_frameNN.nii.gz, imagesTr/ and labelsTr/, or images/ and masks/"


@dataclass(frozen=True)
class Volume:
    """One file with its mask: a volume, or a single picture."""

    name: str
    patient: str
    """What must not be torn apart by a split."""
    image: Path
    mask: Path
    phase: Phase = ""
    """End of diastole or of systole; empty: neither, or not known."""
    test: bool = False
    """Whether the layout says that it is for testing."""


def layout_of(root: Path) -> Layout:
    """Return the layout that a folder has.

    Raises:
        DataError: if it has none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root should hold {LAYOUTS}")
    if (root / "imagesTr").is_dir():
        return "nnunet"
    if (root / "images").is_dir():
        return "pairs"
    if next(root.rglob("*_frame*.nii*"), None) is not None:
        return "original"
    raise DataError(f"{root}: holds none of the known layouts; expected {LAYOUTS}")


def find(root: Path, patient: str) -> list[Volume]:
    """Return the volumes below a folder in order of name; `patient` is a pattern of what names one.

    Raises:
        DataError: for an image without a mask, a mask without an image, or nothing at all.
    """
    layout = layout_of(root)
    if layout == "original":
        volumes = _original(root)
    elif layout == "nnunet":
        volumes = [*_nnunet(root, "Tr"), *_nnunet(root, "Ts")]
    else:
        volumes = _paired(root / "images", root / "masks", _pictures(root / "images"), _pictures(root / "masks"))
    known = [replace(volume, patient=_patient(volume.name, patient)) for volume in volumes]
    return sorted(_with_phases(root, known), key=lambda volume: volume.name)


def read(volume: Volume) -> tuple[Array, Array, Head]:
    """Return image (C, H, W, Z) and mask (H, W, Z) as stored, and shape and spacing; one picture has Z = 1.

    Raises:
        DataError: naming the file that cannot be read, or both where their shapes differ.
    """
    image, head = read_image(volume.image)
    if nifti.is_nifti(volume.mask):
        mask = nifti.read(volume.mask)[0]
        if mask.dtype.kind == "f":
            mask = _whole(mask, volume.mask)
    else:
        mask = images.read_mask(volume.mask)
    mask = mask if mask.ndim == 3 else mask[..., None]
    if image.shape[1:] != mask.shape:
        shapes = f"is {_text(image.shape[1:])}, its mask {volume.mask} is {_text(mask.shape)}"
        raise DataError(f"{volume.image}: {shapes}; they must have one shape: export the mask again")
    return image, mask, head


def read_image(path: Path) -> tuple[Array, Head]:
    """Return an image (C, H, W, Z) as stored, and shape and spacing, in pixels where it is a picture."""
    if nifti.is_nifti(path):
        values, head = nifti.read(path)
        values = values if values.ndim == 3 else values[..., None]
        return values[None], head
    picture = images.channels_first(images.read_image(path))
    return picture[..., None], Head(picture.shape[1:], (1.0, 1.0))


def check_shapes(volumes: Sequence[Volume]) -> None:
    """Raise DataError if frames of one patient differ in their in-plane shape or spacing, which heads alone tell."""
    first: dict[str, tuple[Volume, tuple[Any, ...]]] = {}
    for volume in volumes:
        if not nifti.is_nifti(volume.image) or not FRAME.match(volume.name):
            continue
        head = nifti.head(volume.image)
        plane = (head.shape[:2], tuple(round(step, 3) for step in head.spacing[:2]))
        other, expected = first.setdefault(volume.patient, (volume, plane))
        if plane != expected:
            came = f"{_plane(plane)}, {other.image.name} of the same patient {_plane(expected)}"
            raise DataError(f"{volume.image}: slices are {came}; frames of a patient must share a grid: resample one")


def _original(root: Path) -> list[Volume]:
    """Return the frames of all patients; the whole film, _4d, is left alone."""
    files = [path for path in sorted(root.rglob("*")) if nifti.is_nifti(path) and not path.name.startswith(".")]
    by_stem = {path.with_name(nifti.stem(path)): path for path in files if not nifti.stem(path).endswith("_4d")}
    frames = {at: path for at, path in by_stem.items() if not at.name.endswith(MARK)}
    masks = {at.with_name(at.name.removesuffix(MARK)): path for at, path in by_stem.items() if at.name.endswith(MARK)}
    _refuse_lonely(root, {str(at.relative_to(root)) for at in frames}, {str(at.relative_to(root)) for at in masks})
    testing = {at for at in frames if at.relative_to(root).parts[0] == "testing"}
    return [Volume(at.name, "", frames[at], masks[at], test=at in testing) for at in frames]


def _nnunet(root: Path, part: str) -> list[Volume]:
    pictures, masks = root / f"images{part}", root / f"labels{part}"
    if part == "Ts" and not (pictures.is_dir() and masks.is_dir()):
        return []
    found = [path for path in _volumes(pictures) if not re.search(r"_000[1-9]$", nifti.stem(path))]
    return [replace(one, test=part == "Ts") for one in _paired(pictures, masks, found, _volumes(masks))]


def _paired(pictures: Path, masks: Path, found: Iterable[Path], marked: Iterable[Path]) -> list[Volume]:
    """Return the files of two folders that have one name."""
    by_name, of_mask = _by_name(pictures, found), _by_name(masks, marked)
    _refuse_lonely(pictures.parent, set(by_name), set(of_mask))
    return [Volume(name, "", by_name[name], of_mask[name]) for name in by_name]


def _by_name(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = nifti.stem(path).removesuffix(FIRST_CHANNEL) if nifti.is_nifti(path) else path.stem
        if (other := found.setdefault(name, path)) != path:
            raise DataError(f"{folder}: {other.name} and {path.name} have one name; keep one of them")
    return found


def _volumes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold .nii.gz files")
    return [path for path in sorted(folder.iterdir()) if nifti.is_nifti(path) and not path.name.startswith(".")]


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold pictures, .npy or .nii.gz files")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if nifti.is_nifti(path) or path.suffix.lower() in images.SUFFIXES]


def _refuse_lonely(root: Path, pictures: set[str], masks: set[str]) -> None:
    if not pictures | masks:
        raise DataError(f"{root}: holds no image with a mask; expected {LAYOUTS}")
    lonely = {"image without mask": pictures - masks, "mask without image": masks - pictures}
    problems = [f"{len(names)} {what}: {listed(sorted(names))}" for what, names in lonely.items() if names]
    if problems:
        raise DataError(f"{root}: {'; '.join(problems)}; add the missing files, or move their other halves away")


def _patient(name: str, pattern: str) -> str:
    if pattern and (found := re.search(pattern, name)):
        return found.group()
    frame = FRAME.match(name)
    return frame["patient"] if frame else name


def _with_phases(root: Path, volumes: Sequence[Volume]) -> Iterator[Volume]:
    """Yield the volumes with their phases: from Info.cfg, else the first frame of several is ED, the other ES."""
    frames: dict[str, list[int]] = defaultdict(list)
    for volume in volumes:
        if match := FRAME.match(volume.name):
            frames[volume.patient].append(int(match["frame"]))
    for volume in volumes:
        match = FRAME.match(volume.name)
        told = _told_phases(volume.image.parent / INFO)
        if not told and len(frames[volume.patient]) == 2:
            told = dict(zip(sorted(frames[volume.patient]), ("ED", "ES"), strict=True))
        yield replace(volume, phase=told.get(int(match["frame"]), "")) if match else volume


def _told_phases(path: Path) -> dict[int, Any]:
    """Return the phase of each frame that an Info.cfg names; nothing where there is none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    return {int(frame): phase for phase, frame in re.findall(r"^\s*(ED|ES)\s*:\s*(\d+)", text, re.MULTILINE)}


def _whole(mask: Array, path: Path) -> Array:
    if not np.array_equal(mask, np.rint(mask)):
        raise DataError(f"{path}: holds fractions; expected whole class ids")
    return mask.astype(np.int64)


def _plane(plane: tuple[Any, ...]) -> str:
    return f"{_text(plane[0])} of {_text(plane[1])} mm"


def _text(shape: Sequence[float]) -> str:
    return "x".join(f"{length:g}" for length in shape)
