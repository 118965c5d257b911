"""GeoTIFF and other TIFF rasters of any number of bands to arrays, every value as it was stored."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segmentation import limits
from segmentation.epoch import DataError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

Array = np.ndarray[Any, Any]

SUFFIXES = (".tif", ".tiff")
BANDS = "SQIC"
"""Axes, by tifffile's letters, along which a file may hold its bands: samples of a pixel, or pages."""
KINDS = {"shaped", "imagej", "uniform"}
"""Of tifffile's readings of a file those that look into no other file, and see no more in it than bands."""
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate", 50000: "ZSTD"}
"""Those whose result cannot be larger than the raster says; pictures in a picture, such as JPEG's, tell their own."""
MOST_PAGES = 1000
MOST_SEGMENTS = 2**17
"""Strips or tiles; each takes its time, however few pixels it holds."""


def read_raster(path: Path) -> Array:
    """Return the bands (C, H, W) of a TIFF file in its own type and this machine's byte order.

    Bands may be samples of a pixel or pages of one size; smaller copies of the raster (overviews) and masks of what is
    valid are left alone.

    Raises:
        DataError: naming the file, if it is missing, unreadable, truncated, swells, holds values that are not finite,
            or pictures of several kinds.
    """
    with _opened(path) as series:
        _refuse_costly(path, series)
        array, axes = series.asarray(maxworkers=1), series.axes
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; replace them")
    return array[None] if array.ndim == 2 else np.moveaxis(array, axes.index("Y") - 1 if axes[0] != "Y" else 2, 0)


def raster_size(path: Path) -> tuple[int, int]:
    """Return (H, W) from the head of the file, without decoding it; raises like `read_raster`."""
    with _opened(path) as series:
        return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]


@contextmanager
def _opened(path: Path) -> Iterator[TiffPageSeries]:
    """Open a file for the one raster that it holds; whatever a reader raises becomes the error that names the file."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it tells of odd tags, and of what then fails
    refused: Any = {f"is_{name}": False for name in tifffile.TIFF.FILE_FLAGS - KINDS}
    try:
        with tifffile.TiffFile(path, **refused) as file:
            _refuse_endless(path, file)
            series = file.series[0]
            others = [one for one in file.series[1:] if not (one.keyframe.is_reduced or one.keyframe.is_mask)]
            if others or series.axes.strip(BANDS) != "YX" or series.ndim > 3 or not series.size:
                shapes = ", ".join(str(one.shape) for one in file.series[:3])
                raise DataError(f"{path}: holds {shapes}; expected one raster (H, W), (H, W, bands) or (bands, H, W)")
            yield series
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    # What comes of a broken file differs from byte to byte.
    except Exception as error:
        problem = " ".join(str(error).replace(str(path), "").split())[:300] or type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({problem}); write it again or remove it") from error


def _refuse_endless(path: Path, file: TiffFile) -> None:
    """Raise DataError where pages are too many, go in a circle, or end before the file says; their heads are unread.

    tifffile takes as many as it can find, so that bands would be missing.
    """
    try:
        file.pages[MOST_PAGES]
    except IndexError:
        pass
    else:
        raise DataError(f"{path}: holds several pictures, more than {MOST_PAGES}; expected at most so many bands")
    place = file.pages.next_page_offset
    file.filehandle.seek(place or 0)
    if place is None or any(file.filehandle.read(file.tiff.offsetsize)):
        raise DataError(f"{path}: unreadable or truncated (its pages have no end); write it again or remove it")
    if sum(len(page.subifds or ()) for page in file.pages) > MOST_PAGES:
        raise DataError(f"{path}: holds several pictures, more than {MOST_PAGES} of them within others; cut it")


def _refuse_costly(path: Path, series: TiffPageSeries) -> None:
    """Raise DataError where decoding would take more memory or time than a raster of this size may."""
    page = series.keyframe
    if page.compression not in COMPRESSIONS:
        known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        name = getattr(page.compression, "name", page.compression)
        raise DataError(f"{path}: compressed by {name}; expected one of {known}: write it again so")
    assert page.dtype is not None
    segment = math.prod(page.chunks) * page.dtype.itemsize
    limits.refuse_bomb(path, series.nbytes + max(series.nbytes, segment))
    count = math.prod(page.chunked) * len(series)
    if count > MOST_SEGMENTS:
        raise DataError(f"{path}: {count:,} strips or tiles; expected at most {MOST_SEGMENTS:,}: write larger ones")
