"""Uncertainty by resampling groups: patients, tiles or images, never pixels.

Replicate i draws the same groups whatever is resampled: the draws depend on the seed and the number of groups only. Two
checkpoints evaluated on one split can therefore be compared replicate by replicate.
Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

REPLICATES = 1000


def resample_sums(values: npt.ArrayLike, *, replicates: int = REPLICATES, seed: int = 0) -> Array:
    """Return the sum over resampled groups of additive values (G, ...), once a replicate: (replicates, ...)."""
    values = np.asarray(values, dtype=np.float64)
    groups, generator = len(values), np.random.default_rng((seed, len(values)))
    flat, sums = values.reshape(groups, -1), np.empty((replicates, values[0].size))
    for replicate in range(replicates):
        times_drawn = np.bincount(generator.integers(groups, size=groups), minlength=groups)
        sums[replicate] = times_drawn @ flat
    return sums.reshape(replicates, *values.shape[1:])


def resample_means(values: npt.ArrayLike, *, replicates: int = REPLICATES, seed: int = 0) -> Array:
    """Return the mean over resampled groups of values (G, ...), once a replicate."""
    return resample_sums(values, replicates=replicates, seed=seed) / len(np.asarray(values))


def interval(replicates: npt.ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of replicates (R,); those that are nan are left out."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(np.asarray(replicates, dtype=np.float64), [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """By how much a first checkpoint scores more than a second one on the same groups."""

    mean: float
    low: float
    high: float
    share_better: float
    """Share of replicates in which the first scores more; ties count half."""

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike, level: float = 0.95) -> Difference:
    """Compare two evaluations of one split by their replicates of one metric, (R,) each.

    Raises:
        ValueError: if they have not been resampled equally often.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"got {one.size} and {other.size} replicates; compare evaluations of the same split and size")
    difference = one - other
    low, high = interval(difference, level)
    better = float(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return Difference(float(difference.mean()), low, high, better)
