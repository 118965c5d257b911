"""Images and masks in .npz archives: both in one, or each in its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation import images, limits
from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]
Layout = Literal["auto", "first", "last"]

SUFFIX = ".npz"


def read_image(path: Path, key: str, layout: Layout) -> Array:
    """Return an archive's image, (H, W) or (H, W, C), in a type that `images.read_image` gives.

    key: of its array; empty: the only one.
    layout: whether channels are the first or the last axis; auto: the smaller of both.

    Raises:
        DataError: naming the file, if it cannot be read or the array is no image.
    """
    array = _array(path, key)
    if array.ndim == 3 and layout == "auto" and array.shape[0] == array.shape[2]:
        problem = f"{path}: {key or 'its array'} has shape {array.shape}; channels may be its first axis or its last"
        raise DataError(f"{problem}: set data.npz_channels to first or last")
    first = layout == "first" or (layout == "auto" and array.shape[0] < array.shape[-1])
    return images.as_image(np.moveaxis(array, 0, -1) if array.ndim == 3 and first else array, path)


def read_mask(path: Path, key: str) -> Array:
    """Return an archive's mask, (H, W) of whole numbers, from (H, W), (H, W, 1) or (1, H, W); see `read_image`."""
    array = _array(path, key)
    return images.as_mask(array[0] if array.ndim == 3 and len(array) == 1 else array, path)


def names(path: Path) -> str:
    """Return the names of an archive's arrays, as they are written in a setting."""
    return ", ".join(limits.read_npz(path))


def _array(path: Path, key: str) -> Array:
    arrays = limits.read_npz(path)
    if not key and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        missing = f"no array {key!r}; holds" if key else "holds"
        raise DataError(
            f"{path}: {missing} {', '.join(arrays)}; name those of image and mask in data.npz_keys, such as [img, msk]"
        )
    return arrays[key]
