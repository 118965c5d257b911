"""Large pictures as tiles of one size, every pixel counted once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """A rectangle of an image; rows before `fresh_top` and columns before `fresh_left` are in an earlier tile too."""

    top: int
    left: int
    height: int
    width: int
    fresh_top: int = 0
    fresh_left: int = 0


def tiles(area: Window, tile: int, stride: int) -> list[Window]:
    """Return the tiles of an area in reading order; the last of each axis is moved back to end at the border.

    What such a last tile repeats is marked as not fresh, unless tiles overlap anyway. An area smaller than a tile gives
    one tile that sticks out, to be padded by `cut`.
    """
    rows, columns = _starts(area.height, tile, stride), _starts(area.width, tile, stride)
    return [
        Window(area.top + top, area.left + left, tile, tile, fresh_top, fresh_left)
        for top, fresh_top in rows
        for left, fresh_left in columns
    ]


def regions(height: int, width: int, size: int) -> list[Window]:
    """Return areas of at least size x size (or the whole axis) that cover an image without overlapping."""
    rows, columns = _edges(height, size), _edges(width, size)
    return [
        Window(top, left, bottom - top, right - left)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def cut(image: Array, mask: Array, window: Window, ignore_index: int) -> tuple[Array, Array]:
    """Return the window of image (C, H, W) and mask (H, W); outside and what is not fresh, the mask is ignored.

    Outside the image its border is repeated, so that padding looks like nothing in particular.
    """
    bottom, right = window.top + window.height, window.left + window.width
    picture = image[:, window.top : bottom, window.left : right]
    classes = mask[window.top : bottom, window.left : right].copy()
    classes[: window.fresh_top] = ignore_index
    classes[:, : window.fresh_left] = ignore_index
    margin = ((0, window.height - classes.shape[0]), (0, window.width - classes.shape[1]))
    if margin == ((0, 0), (0, 0)):
        return np.ascontiguousarray(picture), classes
    return np.pad(picture, ((0, 0), *margin), mode="edge"), np.pad(classes, margin, constant_values=ignore_index)


def _starts(length: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Return where tiles start on one axis, and how much of each an earlier one has, unless they overlap by wish."""
    starts = [(start, 0) for start in range(0, max(length - tile, 0) + 1, stride)]
    covered = starts[-1][0] + tile
    if covered < length:
        last = length - tile
        starts.append((last, covered - last if stride == tile else 0))
    return starts


def _edges(length: int, size: int) -> list[int]:
    """Return the borders of regions on one axis; the last region takes what is left over."""
    count = max(length // size, 1)
    return [*range(0, count * size, size), length]
