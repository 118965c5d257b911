"""A tile's stacks (date, band, H, W) as stored to values from 0 to 1, by the rules of the ESD project.

    viirs           clip 5 % at both ends of each date, stretch
    sentinel1       log10, clip 1 % of each date and band, Gaussian blur of 1 pixel, stretch
    sentinel2       clip 10 % of each band over all dates, exponent 1 / 2.2, stretch over all dates
    landsat         clip 5 % of each date and band, exponent 1 / 2.2, stretch
    viirs_maxproj   the largest of the processed dates of viirs, stretch

To stretch is to move the smallest value to 0 and the largest to 1; what is constant becomes 0. The logarithm of what is
not above 0 is that of the smallest value above 0 beside it. Nothing becomes NaN or infinite, and no input is changed.

All steps but the blur send equal values to equal values. So whole numbers of 16 bits, as these satellites' files hold
them, are counted once, worked on in a table of 65,536 entries, and looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from workloads._esd.satellites import LANDSAT, MAXPROJ, SENTINEL1, SENTINEL2, VIIRS

Array = np.ndarray[Any, Any]
GAMMA = 2.2
BLUR = 1.0
"""Standard deviation, in pixels."""
CLIP = {VIIRS.name: 0.05, SENTINEL1.name: 0.01, SENTINEL2.name: 0.1, LANDSAT.name: 0.05}
"""Part of the values that is clipped at each end."""


def preprocess(stacks: Mapping[str, Array], dtype: str = "float32") -> dict[str, Array]:
    """Return the processed stack of each satellite, and that of VIIRS' projection.

    stacks: by satellite, (date, band, H, W) of any numbers.
    dtype: float32 or float16.
    """
    done = {name: STEPS[name](stack, np.dtype(dtype)) for name, stack in stacks.items()}
    if VIIRS.name in done:
        done[MAXPROJ] = maxproj(done[VIIRS.name])
    return done


def viirs(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, 1, H, W)."""
    return _each(stack, dtype, lambda values, count: stretch(clip(values, count, CLIP[VIIRS.name])))


def sentinel1(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, band, H, W)."""
    from scipy.ndimage import gaussian_filter

    def darkness(values: Array, count: Array) -> Array:
        return clip(logarithm(values, count), count, CLIP[SENTINEL1.name])

    dark = _each(stack, np.dtype(np.float32), darkness)
    done, blurred = np.empty(stack.shape, dtype), np.empty(stack.shape[2:], np.float32)
    for place in np.ndindex(stack.shape[:2]):
        gaussian_filter(dark[place], BLUR, output=blurred)
        done[place] = stretch(blurred)
    return done


def sentinel2(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, band, H, W)."""
    return _each(stack, dtype, _gamma(CLIP[SENTINEL2.name]), over_dates=True)


def landsat(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, band, H, W)."""
    return _each(stack, dtype, _gamma(CLIP[LANDSAT.name]))


def maxproj(stack: Array) -> Array:
    """Return the largest value over dates, stretched: (date, band, H, W) to (1, band, H, W)."""
    brightest = functools.reduce(np.maximum, stack)  # (band, H, W); stack.max is five times as slow for float16
    return np.stack([stretch(plane) for plane in brightest])[None].astype(stack.dtype, copy=False)


STEPS: Mapping[str, Callable[[Array, np.dtype[Any]], Array]] = {
    VIIRS.name: viirs,
    SENTINEL1.name: sentinel1,
    SENTINEL2.name: sentinel2,
    LANDSAT.name: landsat,
}


def clip(values: Array, count: Array, part: float) -> Array:
    """Return the values between two of their quantiles, `part` from each end, with linear interpolation.

    values: (N,), rising.
    count: (N,), how often each comes.
    """
    upto = np.cumsum(count)
    low, high = (_quantile(values, upto, fraction) for fraction in (part, 1 - part))
    return values.clip(low, high)


def stretch(values: Array) -> Array:
    """Return the values moved and scaled to 0 to 1; zeros where all are equal."""
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    if not high > low:
        return np.zeros_like(values)
    return np.asarray((values - low) / (high - low))


def logarithm(values: Array, count: Array) -> Array:
    """Return log10; of what is not above 0, that of the smallest value above 0 that is there."""
    there = values[(count > 0) & (values > 0)]
    return np.log10(np.maximum(values, there.min() if there.size else 1.0))


def _gamma(part: float) -> Callable[[Array, Array], Array]:
    def steps(values: Array, count: Array) -> Array:
        clipped = np.maximum(clip(values, count, part), 0.0)
        return stretch(clipped ** (1 / GAMMA))

    return steps


def _each(
    stack: Array, dtype: np.dtype[Any], steps: Callable[[Array, Array], Array], *, over_dates: bool = False
) -> Array:
    """Apply steps to each plane of a stack by itself; they get its values, rising, and how often each comes.

    over_dates: whether all dates of a band are taken together.
    """
    done = np.empty(stack.shape, dtype)
    lookup = _look_up if stack.dtype in (np.uint8, np.uint16) else _sort
    dates, bands = stack.shape[:2]
    groups = [[place] for place in np.ndindex(dates, bands)]
    if over_dates:
        groups = [[(date, band) for date in range(dates)] for band in range(bands)]
    for group in groups:
        lookup([stack[place] for place in group], [done[place] for place in group], steps)
    return done


def _look_up(planes: Sequence[Array], done: Sequence[Array], steps: Callable[[Array, Array], Array]) -> None:
    """Write to `done` what becomes of planes (H, W) of whole numbers of at most 16 bits."""
    length = 1 + max(int(plane.max()) for plane in planes)
    index = np.empty(planes[0].shape, np.intp)  # for all: to be given such memory anew takes as long as to fill it
    count = np.zeros(length, np.intp)
    for plane in planes:
        np.copyto(index, plane)
        count += np.bincount(index.ravel(), minlength=length)
    first = int(np.flatnonzero(count)[0])
    table = np.zeros(length, done[0].dtype)
    table[first:] = steps(np.arange(first, length, dtype=np.float64), count[first:])
    for plane, target in zip(planes, done, strict=True):
        np.copyto(index, plane)
        np.take(table, index, out=target, mode="wrap")  # none is beyond the table; to look for one takes longer


def _sort(planes: Sequence[Array], done: Sequence[Array], steps: Callable[[Array, Array], Array]) -> None:
    """Write to `done` what becomes of planes (H, W) of any numbers."""
    together = np.stack(planes).astype(np.float64)
    values, back, count = np.unique(together, return_inverse=True, return_counts=True)
    for target, found in zip(done, steps(values, count)[back].reshape(together.shape), strict=True):
        target[...] = found


def _quantile(values: Array, upto: Array, fraction: float) -> float:
    """Return a quantile as numpy does by default, from rising values and how many there are up to each."""
    place = fraction * (upto[-1] - 1)
    below = int(place)
    first, second = values[np.searchsorted(upto, [below, min(below + 1, upto[-1] - 1)], side="right")]
    return float(first + (second - first) * (place - below))
