"""GeoTIFF and other TIFF rasters of any number of bands to arrays, every value as it was stored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from segmentation import limits
from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]

SUFFIXES = (".tif", ".tiff")
BANDS = "SQIC"
"""Axes, by tifffile's letters, along which a file may hold its bands: samples of a pixel, or pages."""
TWICE = 2
"""Bytes in memory for one of the raster: as it is decoded and as it is returned."""


def read_raster(path: Path) -> Array:
    """Return the bands (C, H, W) of a TIFF file in its own type and this machine's byte order.

    Bands may be samples of a pixel or pages of one size; smaller copies of the raster (overviews) are left alone.

    Raises:
        DataError: naming the file, if it is missing, unreadable, truncated, swells, holds values that are not finite,
            or pictures of several kinds.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it tells of odd tags, and of what then fails
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            limits.refuse_bomb(path, TWICE * series.nbytes)
            others = [one for one in file.series[1:] if not one.keyframe.is_reduced]
            if others or series.axes.strip(BANDS) != "YX" or series.ndim > 3 or not series.size:
                shapes = ", ".join(str(one.shape) for one in file.series[:3])
                raise DataError(f"{path}: holds {shapes}; expected one raster (H, W), (H, W, bands) or (bands, H, W)")
            array, axes = series.asarray(), series.axes
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    # What comes of a broken file differs from byte to byte.
    except Exception as error:
        problem = " ".join(str(error).replace(str(path), "").split())[:300] or type(error).__name__
        raise DataError(f"{path}: cannot be read as TIFF ({problem}); write it again or remove it") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; replace them")
    return array[None] if array.ndim == 2 else np.moveaxis(array, axes.index("Y") - 1 if axes[0] != "Y" else 2, 0)
