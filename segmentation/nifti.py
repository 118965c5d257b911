"""Volumes in NIfTI files: read whole, or only their shape; written beside the file that they belong to."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]

MIB = 2**20
SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Head:
    """What a file tells before its values are read."""

    shape: tuple[int, ...]
    """(X, Y) or (X, Y, Z)."""
    spacing: tuple[float, ...]
    """Distance between voxels along each axis, in mm."""


def is_nifti(path: Path) -> bool:
    """Return whether a file's name is that of a NIfTI file."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """Return a file's name without its suffix, of which .nii.gz is one."""
    name = path.name
    return next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), path.stem)


def head(path: Path) -> Head:
    """Return shape and spacing; a last axis of length 1 is left out beyond three.

    Raises:
        DataError: naming the file, if it is missing, unreadable, or has neither two nor three axes.
    """
    with _explained(path):
        return _head(path, _load(path))


def read(path: Path) -> tuple[Array, Head]:
    """Return the values, scaled as the file says, float32 or whole numbers; raises like `head`, or if not finite."""
    with _explained(path):
        _check_sum(path)
        image = _load(path)
        found = _head(path, image)
        values = np.asarray(image.dataobj).reshape(found.shape)
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise DataError(
                f"{path}: {np.count_nonzero(~np.isfinite(values))} values are NaN or infinite; replace them"
            )
    elif values.dtype.kind not in "iu":
        raise DataError(f"{path}: holds {values.dtype}; expected whole or real numbers")
    return values, found


def write(path: Path, values: Array, like: Path) -> Path:
    """Write whole numbers as uint8 where another file's volume lies; they have its shape."""
    with _explained(like):
        image = _load(like)
        shape, affine = image.shape, image.affine
    return save(path, values.astype(np.uint8).reshape(shape), affine)


def save(path: Path, values: Array, affine: Array) -> Path:
    """Write values; `affine` (4, 4) tells where their voxels lie, in mm."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image: Any = nibabel.Nifti1Image(values, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


def _load(path: Path) -> Any:
    import nibabel

    return nibabel.load(path)


def _check_sum(path: Path) -> None:
    """Read a compressed file to its end, where its checksum is; nibabel stops at the last voxel."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as stream:
            while stream.read(MIB):
                pass


def _head(path: Path, image: Any) -> Head:
    shape, zooms = tuple(image.shape), tuple(map(float, image.header.get_zooms()))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"{path}: has shape {shape}; expected (X, Y) or (X, Y, Z), one volume a file")
    return Head(shape, tuple(abs(zoom) or 1.0 for zoom in zooms[: len(shape)]))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever nibabel raises into the one error that names the file."""
    from nibabel.filebasedimages import ImageFileError

    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        problem = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({problem}); copy it again or remove it") from error
