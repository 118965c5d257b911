"""The learning rate that lowers the loss fastest, and bounds to search between.

Some training steps at rates that rise exponentially: at first the loss stays, then it falls, in the end it diverges.
Source: Smith 2015, Cyclical learning rates for training neural networks, arXiv:1506.01186.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segmentation import figures, training
from segmentation.epoch import NoFallError
from segmentation.training import Parts, TrainingConfig

LOWEST, HIGHEST = 1e-7, 1.0
# The sweep ends where the smoothed loss is this many times what it began with.
DIVERGED = 2.0


@dataclass(frozen=True)
class Found:
    """What a sweep shows."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Of the batch at each rate, before its step."""
    smoothed: tuple[float, ...]
    suggested: float
    """Where the smoothed loss falls most steeply."""
    low: float
    """A tenth of that: where to begin a search."""
    high: float
    """The last rate before half of the fall is lost again: where to end it."""

    def search_line(self) -> str:
        """Return the bounds as a parameter of a search space."""
        return f"lr: {{type: float, low: {_yaml(self.low)}, high: {_yaml(self.high)}, log: true}}"

    def summary(self) -> tuple[int, float, float]:
        """Return how many steps were made, up to which rate, and the rate suggested."""
        return len(self.rates), self.rates[-1], self.suggested


def find(
    config: TrainingConfig, parts: Parts, *, low: float = LOWEST, high: float = HIGHEST, steps: int = 100
) -> Found:
    """Train for some steps at rates from low to high, as `config` says otherwise; stop when the loss diverges.

    The network is left with the weights, gradients, statistics, device and modes that it came with, and so are the
    random states of torch, numpy and random. The optimiser is the sweep's own.

    Raises:
        NoFallError: if the loss falls at no rate.
    """
    rates = [float(rate) for rate in np.geomspace(low, high, steps)]
    losses: list[float] = []
    with training.restored(parts.model), contextlib.closing(training.steps_at(config, parts, rates)) as made:
        for loss in made:
            if not math.isfinite(loss):
                break
            losses.append(loss)
            smoothed = smooth(losses, steps)
            if smoothed[-1] > DIVERGED * smoothed[0]:
                break
    return read(rates[: len(losses)], losses, steps)


def read(rates: Sequence[float], losses: Sequence[float], steps: int) -> Found:
    """Return what the losses at these rates say; `steps` are those of a whole sweep.

    Raises:
        NoFallError: if the loss does not fall.
    """
    smoothed = smooth(losses, steps)
    lowest = int(smoothed.argmin()) if len(losses) else 0
    begin = int(smoothed[: lowest + 1].argmax()) if lowest else 0
    if begin == lowest:
        raise NoFallError(
            f"the loss falls at no learning rate, in {len(losses)} steps; make more of them, "
            "or look at the data by `inspect`"
        )
    slope = np.gradient(smoothed[begin : lowest + 1], np.log10(rates[begin : lowest + 1]))
    suggested = rates[begin + int(slope.argmin())]
    lost = smoothed[lowest:] > (smoothed[begin] + smoothed[lowest]) / 2
    last = lowest + int(lost.argmax()) - 1 if lost.any() else len(rates) - 1
    return Found(tuple(rates), tuple(losses), tuple(smoothed.tolist()), suggested, suggested / 10, rates[last])


def smooth(losses: Sequence[float], steps: int) -> npt.NDArray[np.float64]:
    """Return each loss's mean with its neighbours, a twentieth of a sweep's steps on either side."""
    reach = max(1, steps // 20)
    near = (losses[max(0, at - reach) : at + reach + 1] for at in range(len(losses)))
    return np.array([np.mean(each) for each in near])


def draw(found: Found, path: Path) -> Path:
    """Write a picture of the sweep."""
    marks = {"search from": found.low, "steepest fall": found.suggested, "search to": found.high}
    return figures.learning_rates(path, found.rates, found.losses, found.smoothed, marks)


def _yaml(rate: float) -> str:
    """Return a number that YAML 1.1 reads as one: with a dot."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits}e{int(exponent):+d}"
