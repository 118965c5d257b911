"""Volumes in NIfTI files: read whole, or only their shape; written beside the file that they belong to."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from segmentation import limits
from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]

MIB = 2**20
SUFFIXES = (".nii.gz", ".nii")
HEAD_BYTES = 16 * MIB
"""At most before the first value: what others noted there, such as an atlas or a patient's file."""
# What nibabel raises for broken files differs from byte to byte.
BROKEN = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError),
    *(MemoryError, struct.error, zlib.error),
)


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
        image = _load(path)
        found = _head(path, image)
        limits.refuse_bomb(path, math.prod(found.shape) * _voxel_bytes(image))
        _check_sum(path)
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

    with _opened(path) as stream:
        _check_start(path, stream)
    return nibabel.load(path)


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _check_start(path: Path, stream: IO[bytes]) -> None:
    """Refuse a file whose values begin far in, or whose notes before them are longer than told: nibabel would read on.

    Raises:
        DataError: naming the file.
    """
    start = stream.read(544)
    order = next(
        (mark for mark in "<>" if start[:4] in (struct.pack(f"{mark}i", 348), struct.pack(f"{mark}i", 540))), ""
    )
    if not order or len(start) < 352:
        raise DataError(f"{path}: does not begin as NIfTI files do; copy it again or remove it")
    (size,) = struct.unpack_from(f"{order}i", start)
    if start[344:348] != b"n+1\0" if size == 348 else start[4:8] != b"n+2\0":
        raise DataError(f"{path}: is one of two files, or of another format; save it as a single .nii.gz")
    (first,) = (
        struct.unpack_from(f"{order}f", start, 108) if size == 348 else struct.unpack_from(f"{order}q", start, 168)
    )
    # 0 stands for the first byte that may be one, where no notes are before it.
    if not (size + 4 <= first <= HEAD_BYTES or (first == 0 and not start[size])):
        raise DataError(
            f"{path}: its values begin at byte {first:g}; expected {size + 4} to {HEAD_BYTES}; save it again"
        )
    notes = start + stream.read(int(first) - len(start)) if first > len(start) else start
    place = size + 4
    while notes[size] and place + 16 <= first:
        (length,) = struct.unpack_from(f"{order}i", notes, place) if place + 4 <= len(notes) else (0,)
        if length < 16 or length % 16 or place + length > first:
            raise DataError(f"{path}: a note of {length} bytes before its values; expected 16, 32, ...; save it again")
        place += length


def _voxel_bytes(image: Any) -> int:
    """Return what a voxel takes while it is read: as stored, scaled, and as float32."""
    slope, offset = image.dataobj.slope, image.dataobj.inter
    stored: int = image.dataobj.dtype.itemsize
    return stored + (stored if (slope, offset) == (1, 0) else 12)


def _check_sum(path: Path) -> None:
    """Read a compressed file to its end, where its checksum is; nibabel stops at the last voxel."""
    if path.name.lower().endswith(".gz"):
        most, found = limits.allowed(path), 0
        with gzip.open(path) as stream:
            while part := stream.read(MIB):
                found += len(part)
                if found > most:
                    limits.refuse_bomb(path, found)


def _head(path: Path, image: Any) -> Head:
    shape, zooms = tuple(image.shape), tuple(map(float, image.header.get_zooms()))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise DataError(f"{path}: has shape {shape}; expected (X, Y) or (X, Y, Z), one volume a file")
    return Head(shape, tuple(abs(zoom) or 1.0 for zoom in zooms[: len(shape)]))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever nibabel raises into the one error that names the file."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (ImageFileError, HeaderDataError, *BROKEN) as error:
        problem = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({problem}); copy it again or remove it") from error
