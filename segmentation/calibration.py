"""Whether probabilities mean what they say, and the temperature that makes them, from histograms of logits.

Logits are binned in steps of 1/16 from -32 to 32, and counted at a bin's middle: a histogram takes the same room
however large the image. Channels are binary: a pixel's probability is the sigmoid of its logit over the temperature.
Source: Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from segmentation import figures, histograms
from segmentation.histograms import NEGATIVE, POSITIVE, Histograms

Array = npt.NDArray[np.float64]

PER_UNIT, BOUND = 16, 32
BINS = 2 * BOUND * PER_UNIT
LOGITS: Array = (np.arange(BINS) + 0.5) / PER_UNIT - BOUND
"""(B,), the middle of each bin; the first and last hold all beyond."""
COLDEST, HOTTEST = 0.05, 20.0
RELIABILITY_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """What was learnt on validation, a number for each channel; plain data."""

    temperature: tuple[float, ...]
    """What logits are divided by."""
    nll: tuple[float, ...]
    """Mean negative log likelihood of a validation pixel, in nats, before."""
    nll_scaled: tuple[float, ...]
    """And after."""
    ece: tuple[float, ...]
    ece_scaled: tuple[float, ...]
    images: int
    run: str
    """SHA-256 of the validation images' names and histograms."""

    def __post_init__(self) -> None:
        for name in ("temperature", "nll", "nll_scaled", "ece", "ece_scaled"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if not all(COLDEST <= value <= HOTTEST for value in self.temperature):
            raise ValueError(f"temperature: got {self.temperature}; expected {COLDEST} to {HOTTEST} for each channel")

    def record(self) -> dict[str, Any]:
        """Return the temperatures as plain data; `Temperature(**record)` is the same again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def scale(self, logits: Tensor) -> Tensor:
        """Return logits (N, K, H, W) over the temperature of their channel."""
        if logits.shape[1] != len(self.temperature):
            raise ValueError(f"temperature: got logits of {logits.shape[1]} channels for {len(self.temperature)}")
        return logits / logits.new_tensor(self.temperature).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Reliability:
    """Pixels by their probability in bins of equal width, (R,) each."""

    predicted: Array
    """Mean probability; nan where no pixel is."""
    observed: Array
    """Share of positive pixels; nan where no pixel is."""
    pixels: npt.NDArray[np.int64]

    def ece(self) -> float:
        """Return the expected calibration error: the mean over pixels of what predicted and observed are apart."""
        apart = np.nan_to_num(np.abs(self.predicted - self.observed))
        return float((apart * self.pixels).sum() / max(int(self.pixels.sum()), 1))


def histogram(logits: Tensor, mask: Tensor, index: Tensor, *, ignore_index: int = 255) -> Histograms:
    """Return the histograms of a batch, to be merged and gathered as `segmentation.histograms` does.

    Args:
        logits: (N, K, H, W), before the sigmoid.
        mask: (N, K, H, W), zeros and ones.
        index: (N,), sample numbers.
        ignore_index: pixels of this value in the mask count for nothing.
    Raises:
        NonFiniteError: where a logit is NaN.
    """
    values = np.clip(histograms.finite(logits, index, "logit"), -BOUND, BOUND)
    bins = np.minimum(((values + BOUND) * PER_UNIT).astype(np.int64), BINS - 1)
    return histograms.count(bins, mask, index, BINS, ignore_index=ignore_index)


def empty(channels: int) -> Histograms:
    """Return the histograms of no image at all."""
    return histograms.empty(channels, BINS)


def learn(found: Histograms, names: Sequence[str]) -> Temperature:
    """Return the temperature of the least negative log likelihood over validation pixels.

    A channel whose pixels are all positive or all negative keeps its logits: they do not tell how sure it may be.

    names: of each image, in the order of `found.index`; part of the run's hash.
    """
    pooled = _pooled(found)
    best = [_coolest(pixels) for pixels in pooled]
    pairs = list(zip(pooled, best, strict=True))
    return Temperature(
        temperature=tuple(best),
        nll=tuple(negative_log_likelihood(pixels) for pixels in pooled),
        nll_scaled=tuple(negative_log_likelihood(pixels, temperature) for pixels, temperature in pairs),
        ece=tuple(_reliability(pixels, 1.0, RELIABILITY_BINS).ece() for pixels in pooled),
        ece_scaled=tuple(_reliability(pixels, temperature, RELIABILITY_BINS).ece() for pixels, temperature in pairs),
        images=len(found.index),
        run=histograms.digest(found, names),
    )


def reliability(
    found: Histograms, channel: int = 0, *, temperature: float = 1.0, bins: int = RELIABILITY_BINS
) -> Reliability:
    """Return how often pixels of one channel are positive, by their probability at this temperature."""
    return _reliability(_pooled(found)[channel], temperature, bins)


def negative_log_likelihood(pixels: npt.ArrayLike, temperature: float = 1.0) -> float:
    """Return the mean over pixels (2, B), in nats; 0 without any."""
    counts, scaled = np.asarray(pixels, dtype=np.float64), LOGITS / temperature
    total = (counts[POSITIVE] * np.logaddexp(0, -scaled) + counts[NEGATIVE] * np.logaddexp(0, scaled)).sum()
    return float(total / max(counts.sum(), 1))


def draw(path: Path, curves: Mapping[str, Reliability]) -> Path:
    """Write the reliability of each name beside the diagonal, on which probabilities mean what they say."""
    points = {"calibrated": [(0.0, 0.0), (1.0, 1.0)]}
    for name, curve in curves.items():
        there = curve.pixels > 0
        line = zip(curve.predicted[there].tolist(), curve.observed[there].tolist(), strict=True)
        points[f"{name}, ECE {curve.ece():.3f}"] = list(line)
    return figures.lines(path, points, title="reliability", xlabel="predicted probability", ylabel="share positive")


def _coolest(pixels: Array) -> float:
    """Return the best temperature for pixels (2, B), within its bounds."""
    from scipy.optimize import minimize_scalar

    if not (pixels[POSITIVE].any() and pixels[NEGATIVE].any()):
        return 1.0
    # Convex in 1 / T, so that its only minimum is found.
    bounds = (np.log(1 / HOTTEST), np.log(1 / COLDEST))
    options = {"xatol": 1e-6}
    best = minimize_scalar(
        lambda x: negative_log_likelihood(pixels, float(np.exp(-x))), bounds=bounds, method="bounded", options=options
    )
    return float(np.clip(np.exp(-best.x), COLDEST, HOTTEST))


def _reliability(pixels: Array, temperature: float, bins: int) -> Reliability:
    probability = 1 / (1 + np.exp(-LOGITS / temperature))
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    total, positive, weight = (
        np.bincount(place, weights=weights, minlength=bins)
        for weights in (pixels.sum(0), pixels[POSITIVE], pixels.sum(0) * probability)
    )
    known = np.where(total > 0, total, np.nan)
    return Reliability(weight / known, positive / known, total.astype(np.int64))


def _pooled(found: Histograms) -> Array:
    """Return the pixels of all images, (K, 2, B)."""
    if found.pixels.shape[2:] != (2, BINS):
        raise ValueError(f"got histograms {found.pixels.shape}; expected (N, K, 2, {BINS}) of logits")
    return np.asarray(found.pixels.sum(0, dtype=np.int64), dtype=np.float64)
