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

from collections.abc import Callable, Mapping
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

    done = _each(stack, np.dtype(np.float32), darkness)
    for date, band in np.ndindex(done.shape[:2]):
        blurred = gaussian_filter(done[date, band], BLUR)
        done[date, band] = stretch(blurred)
    return done.astype(dtype, copy=False)


def sentinel2(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, band, H, W)."""
    over_dates = stack.swapaxes(0, 1)[:, None]  # (band, 1, date, H, W)
    return _each(over_dates, dtype, _gamma(CLIP[SENTINEL2.name]))[:, 0].swapaxes(0, 1)


def landsat(stack: Array, dtype: np.dtype[Any]) -> Array:
    """Return (date, band, H, W)."""
    return _each(stack, dtype, _gamma(CLIP[LANDSAT.name]))


def maxproj(stack: Array) -> Array:
    """Return the largest value over dates, stretched: (date, band, H, W) to (1, band, H, W)."""
    brightest = stack.max(axis=0, keepdims=True)
    return np.stack([stretch(plane) for plane in brightest[0]])[None].astype(stack.dtype, copy=False)


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


def _each(stack: Array, dtype: np.dtype[Any], steps: Callable[[Array, Array], Array]) -> Array:
    """Apply steps to each [i, j] of a stack by itself; they get its values, rising, and how often each comes."""
    done = np.empty(stack.shape, dtype)
    for place in np.ndindex(stack.shape[:2]):
        plane = stack[place]
        if plane.dtype in (np.uint8, np.uint16):
            count = np.bincount(plane.ravel())
            first = int(np.flatnonzero(count)[0])
            table = np.zeros(len(count), dtype)
            values = np.arange(first, len(count), dtype=np.float64)
            table[first:] = steps(values, count[first:])
            np.take(table, plane, out=done[place], mode="clip")
        else:
            values, back, count = np.unique(plane.astype(np.float64), return_inverse=True, return_counts=True)
            done[place] = steps(values, count)[back].reshape(plane.shape)
    return done


def _quantile(values: Array, upto: Array, fraction: float) -> float:
    """Return a quantile as numpy does by default, from rising values and how many there are up to each."""
    place = fraction * (upto[-1] - 1)
    below = int(place)
    first, second = values[np.searchsorted(upto, [below, min(below + 1, upto[-1] - 1)], side="right")]
    return float(first + (second - first) * (place - below))
