"""Pictures on disk to arrays, every value as it was stored."""

from __future__ import annotations

import itertools
import struct
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from segmentation import limits, rasters
from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy")
# Pillow's other readers are old, rarely looked at, or start a program, as that of PostScript does.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
ROWS = 128
# Bytes that a pixel takes while it is read: as Pillow holds it and as an array.
PIXEL_BYTES = {"1": 2, "L": 2, "I;16": 4, "I;16B": 4}
MOST_PIXEL_BYTES, DEEP_PIXEL_BYTES = 8, 16
# What Pillow raises for broken files differs from format to format.
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error, MemoryError, RecursionError),
)


def read_image(path: Path) -> Array:
    """Return (H, W) or (H, W, C) as uint8, uint16 or float32, values as stored; a palette becomes RGB.

    A TIFF may hold any number of bands, as samples of a pixel or as pages.

    Raises:
        DataError: naming the file, if it is missing, unreadable, truncated, too large, a stack of pictures that are not
            bands, of a type that none of the three can hold, or has values that are not finite.
    """
    return as_image(_read(path, _image_values), path)


def as_image(array: Array, path: Path) -> Array:
    """Return an array of a file as `read_image` gives it; raises the same."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(f"{path}: has shape {array.shape}; expected (H, W) or (H, W, C)")
    array = _narrowed(array)
    if array.dtype.name not in ("uint8", "uint16", "float32"):
        raise DataError(f"{path}: holds {array.dtype}; expected 8-bit, 16-bit or float values")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise DataError(f"{path}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; replace them")
    return array


def read_rgb(path: Path) -> Array:
    """Return (H, W, 3) uint8, greys repeated and alpha left out.

    Raises:
        DataError: naming the file, if it cannot be read, or holds more than 8 bits a colour or other bands.
    """
    array = read_image(path)
    if array.dtype != np.uint8:
        raise DataError(f"{path}: holds {array.dtype}; expected 8 bits a colour, as JPEG has")
    if array.ndim == 3 and array.shape[2] > 4:
        raise DataError(f"{path}: has {array.shape[2]} bands; expected grey or colours")
    if array.ndim == 2:
        array = array[..., None]
    colours = array[..., :1].repeat(3, axis=2) if array.shape[2] < 3 else array[..., :3]
    return np.ascontiguousarray(colours)


def read_mask(path: Path) -> Array:
    """Return (H, W) whole numbers as stored; a palette's indices, not its colours.

    Raises:
        DataError: naming the file, for what `read_image` refuses, colours, or values that are not whole.
    """
    return as_mask(_read(path, _mask_values), path)


def as_mask(array: Array, path: Path) -> Array:
    """Return an array of a file as `read_mask` gives it; raises the same."""
    if array.ndim == 3 and (array[..., :3] == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{path}: shape {array.shape} is no mask; expected one class id a pixel, not colours")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{path}: holds {array.dtype}; expected whole class ids")
    if array.dtype.kind == "f":
        whole = array.astype(np.int64) if np.isfinite(array).all() else array
        if not np.array_equal(whole, array) or whole is array:
            raise DataError(f"{path}: holds fractions; expected whole class ids")
        return whole
    return array


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from the head of the file, without decoding it; raises like `read_image`."""
    if path.suffix.lower() == ".npy":
        shape = _read(path, np.asarray).shape
        if len(shape) not in (2, 3):
            raise DataError(f"{path}: has shape {shape}; expected (H, W) or (H, W, C)")
        return int(shape[0]), int(shape[1])
    with _explained(path):
        if _is_raster(path):
            return rasters.raster_size(path)
        with Image.open(path, formats=FORMATS) as picture:
            return picture.height, picture.width


def channels_first(image: Array) -> Array:
    """Return (H, W) or (H, W, C) as contiguous (C, H, W)."""
    return np.ascontiguousarray(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))


def list_images(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Return the pictures below a folder in order of name; hidden files are left alone.

    Raises:
        DataError: naming the folder, if it is missing or holds no picture.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold {', '.join(suffixes)} files")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes]
    found = [path for path in found if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise DataError(f"{folder}: holds no picture; expected {', '.join(suffixes)} files")
    return found


def _read(path: Path, values: Callable[[Image.Image], Array]) -> Array:
    """Decode a file whole: arrays by numpy, pictures by Pillow, 16-bit colours by torchvision, rasters by tifffile."""
    with _explained(path):
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                array.close()
                raise DataError(f"{path}: an archive of arrays; expected a single one, written by np.save")
            limits.refuse_bomb(path, array.nbytes)
            return np.asarray(array)
        if _is_raster(path):
            bands = rasters.read_raster(path)
            return bands[0] if len(bands) == 1 else np.moveaxis(bands, 0, -1)
        with Image.open(path, formats=FORMATS) as picture:
            # To count them would read all their heads, of which a small file may hold very many.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise DataError(f"{path}: holds several pictures; expected one file for each")
            deep = picture.format == "PNG" and picture.mode in ("RGB", "RGBA", "LA") and _png_bits(path) == 16
            each = DEEP_PIXEL_BYTES if deep else PIXEL_BYTES.get(picture.mode, MOST_PIXEL_BYTES)
            limits.refuse_bomb(path, picture.width * picture.height * each)
            if deep:
                return _deep_png(path)
            picture.load()
            return values(picture)


def _is_raster(path: Path) -> bool:
    """Say whether a file is a TIFF of which Pillow would drop or change values, or that it does not know."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start not in TIFF_STARTS:
        return False
    try:
        with Image.open(path, formats=("TIFF",)) as opened:
            picture: Any = opened
            samples, bits = picture.tag_v2.get(SAMPLES_PER_PIXEL, 1), picture.tag_v2.get(BITS_PER_SAMPLE, 1)
            deep = samples > 1 and np.max(bits) > 8
            swapped = picture.mode == "F" and start[:2] == b"MM" and picture.info["compression"] != "raw"
            kept = 3 if picture.mode == "RGBX" else len(picture.getbands())
            return bool(picture.is_animated or deep or swapped or samples > kept)
    except UnidentifiedImageError:
        return True


def _image_values(picture: Image.Image) -> Array:
    if picture.mode in ("P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La"):
        picture = picture.convert("RGB")
    return _mask_values(picture)


def _mask_values(picture: Image.Image) -> Array:
    """Return the values, copied by rows: Pillow would hold all of them three times."""
    width, height = picture.size
    tops = range(0, height, ROWS)
    parts = (np.asarray(picture.crop((0, top, width, min(top + ROWS, height)))) for top in tops)
    first = next(parts)
    array = np.empty((height, *first.shape[1:]), first.dtype)
    for top, part in zip(tops, itertools.chain([first], parts), strict=True):
        array[top : top + ROWS] = part
    return _native(array)


def _native(array: Array) -> Array:
    """Return an array in this machine's byte order, which tensors need; 16-bit files may hold the other."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _narrowed(array: Array) -> Array:
    """Return wider types in the narrowest of ours that keeps every value, or as they are if none does."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype in (np.float16, np.float64):
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype not in (np.uint8, np.uint16) and array.size:
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high < 2**16:
            return array.astype(np.uint16)
        if max(-low, high) <= 2**24:
            return array.astype(np.float32)
    return array


def _png_bits(path: Path) -> int:
    """Return the bits of a channel, the ninth byte of the first chunk: Pillow shows 16-bit colours as 8-bit."""
    with path.open("rb") as stream:
        return stream.read(25)[24]


def _deep_png(path: Path) -> Array:
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        tensor = decode_image(read_file(str(path)), ImageReadMode.UNCHANGED)
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again") from error
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into the one error that names the file."""
    try:
        with warnings.catch_warnings():
            # Decoders warn of odd notes about a camera, and of much that they then refuse.
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more pixels than are safe to decode at once ({error}); cut it into parts") from error
    except BROKEN as error:
        problem = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({problem}); write it again or remove it") from error
