"""Learn thresholds and AUPRC from histograms: how far from the truth, and what memory validating 2,000 images takes.

Thresholds are those of quantiles of densities whose best cut is known, 2 p for positive pixels and 2 (1 - p) for
negative ones: as one image, and as two of unlike shares. AUPRC is that of logits from normal distributions, against
sorting all pixels. Memory is that of a process of its own, from its fifth image to its peak, which feeds strips of
1600x256 to thresholds, calibration, FROC and cleaning, and learns from them.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar

from benchmarks import _memory
from segmentation import calibration, components, evaluation, froc, histograms, operating_points
from segmentation.collecting import Collector
from segmentation.evaluation import ImageScores
from segmentation.froc import Detections
from segmentation.histograms import Histograms

Array = npt.NDArray[np.float64]

TINY = {"pixels": 200_000, "images": 12}
SHARES = (0.6, 0.02)
DRAWS = ((1.0, -1.0, 1.5, 0.1), (6.0, -8.0, 5.0, 0.1), (1.0, -6.0, 2.0, 0.005), (-4.6, -5.0, 0.4, 0.1))
"""Mean logit of positive and of negative pixels, the deviation of both, and the share of the positive."""
AREAS = (0, 16, 64, 256, 1024)
STRIPS, WARM_UP = 8, 4


def measure(pixels: int = 10**6, images: int = 2000, height: int = 256, width: int = 1600) -> dict[str, Any]:
    """Return the largest errors, and what memory and time validation takes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        validated = pool.submit(_validate, images, height, width).result()
    errors = {"threshold_error": threshold_error(pixels), "auprc_error": auprc_error(pixels)}
    return {**errors, "pixels": pixels, **validated}


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    each = f"{result['histogram_ms']:.1f} ms an image for thresholds, {result['all_ms']:.0f} ms for all of them"
    return [
        (
            "learnt thresholds against those of a closed form",
            f"{result['threshold_error']:.4f}",
            "largest difference; aim: at most 0.005",
        ),
        (
            f"AUPRC from histograms of {result['pixels']:,} pixels against sorting them",
            f"{result['auprc_error']:.1g}",
            "largest difference; aim: at most 1e-3",
        ),
        (
            f"growth of memory while {result['images']:,} images of {result['size']} are validated: thresholds, "
            "calibration, FROC, cleaning",
            f"{result['memory_growth_mib']:.0f} MiB",
            f"{each}; aim: at most 286 MiB (300 MB)",
        ),
    ]


def threshold_error(pixels: int) -> float:
    """Return how far the learnt thresholds, pooled F1 and mean Dice, are from the best."""
    one = operating_points.learn(_images(0.5, pixels=pixels), ["one"])
    two = operating_points.learn(_images(*SHARES, pixels=pixels), ["one", "two"])
    mean = minimize_scalar(lambda cut: -np.mean([_dice(share, cut) for share in SHARES]), bounds=(0, 1)).x
    pooled = minimize_scalar(lambda cut: -_dice(float(np.mean(SHARES)), cut), bounds=(0, 1)).x
    half = (3 - 5**0.5) / 2
    pairs = [(one.f1, half), (one.dice, half), (two.f1, pooled), (two.dice, mean)]
    return round(float(max(abs(learnt[0] - best) for learnt, best in pairs)), 5)


def auprc_error(pixels: int) -> float:
    """Return how far the histograms' AUPRC is from that of sorted pixels."""
    generator, apart = np.random.default_rng(0), []
    for positive, negative, deviation, share in DRAWS:
        many = round(share * pixels)
        mean = np.repeat([positive, negative], [many, pixels - many])
        logits = generator.normal(mean, deviation)
        scores = torch.from_numpy(logits).float().sigmoid().numpy()
        truth = np.arange(pixels) < many
        exact = operating_points.average_precision(scores, truth)
        apart.append(abs(float(operating_points.auprc(_histogram(scores, truth, 0))[0]) - exact))
    return round(max(apart), 6)


def _images(*shares: float, pixels: int) -> Histograms:
    """Return an image of each share of positive pixels: the quantiles of their densities, 2 p and 2 (1 - p)."""
    parts = []
    for place, share in enumerate(shares):
        many = round(share * pixels)
        found, other = ((np.arange(count) + 0.5) / count for count in (many, pixels - many))
        scores = np.concatenate([np.sqrt(found), 1 - np.sqrt(1 - other)])
        parts.append(_histogram(scores, np.arange(pixels) < many, place))
    return histograms.merge(parts)


def _histogram(scores: npt.NDArray[Any], truth: npt.NDArray[Any], place: int) -> Histograms:
    probability, mask = (torch.from_numpy(each).view(1, 1, 1, -1) for each in (scores, truth))
    return operating_points.histogram(probability, mask, torch.tensor([place]))


def _dice(share: float, cut: float) -> float:
    """Return the Dice of such an image at a cut, in closed form."""
    found, false = share * (1 - cut**2), (1 - share) * (1 - cut) ** 2
    return 2 * found / (found + false + share)


def _validate(images: int, height: int, width: int) -> dict[str, Any]:
    """Validate so many images in this process; return what it grew by and how long an image took."""
    torch.set_num_threads(1)
    strips = [_strip(seed, height, width) for seed in range(STRIPS)]
    kept = _collectors()
    taken: list[tuple[float, float]] = []
    start_kib = 0
    for number in range(images):
        logits, mask = strips[number % STRIPS]
        _add(kept, logits, mask, torch.tensor([number]), taken)
        if number == WARM_UP:
            start_kib = _memory.kib("VmRSS")
    _learn(*(collector.whole() for collector in kept))
    return {
        "memory_growth_mib": round((_memory.kib("VmHWM") - start_kib) / 1024, 1),
        "histogram_ms": round(1000 * statistics.median(first for first, _ in taken), 2),
        "all_ms": round(1000 * statistics.median(last for _, last in taken), 2),
        "images": images,
        "size": f"{width}x{height}",
    }


def _collectors() -> tuple[Collector[Any], ...]:
    return (
        Collector(histograms.merge, operating_points.empty(1)),
        Collector(histograms.merge, calibration.empty(1)),
        Collector(froc.merge, froc.empty()),
        Collector(evaluation.merge, evaluation.empty(len(AREAS))),
    )


def _add(
    kept: tuple[Collector[Any], ...],
    logits: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    taken: list[tuple[float, float]],
) -> None:
    """Keep what is needed of one image; note the seconds until it was in the first histogram, and in all."""
    begun = time.perf_counter()
    probability = logits.sigmoid()
    kept[0].add(operating_points.histogram(probability, mask, index))
    first = time.perf_counter() - begun
    kept[1].add(calibration.histogram(logits, mask, index))
    kept[2].add(froc.detect(probability[:, 0], mask[:, 0], index))
    called = probability[:, 0] > operating_points.FIXED
    kept[3].add(components.count_candidates(called, mask[:, 0], index, AREAS, fill_holes=False))
    taken.append((first, time.perf_counter() - begun))


def _learn(scored: Histograms, sure: Histograms, seen: Detections, counted: ImageScores) -> None:
    names = [f"{number}.jpg" for number in scored.index]
    operating_points.report(scored, operating_points.learn(scored, names, empty="one"), ["defect"])
    calibration.learn(sure, names)
    froc.scores(seen)
    components.choose(counted, AREAS, fill_holes=False, empty="one")


def _strip(seed: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return smooth logits (1, 1, H, W) that follow a mask, every other mask empty."""
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(seed)
    truth, noise = (gaussian_filter(generator.normal(size=(height, width)), reach) for reach in (12, 4))
    mask = (truth > 2.5 * truth.std()) if seed % 2 else np.zeros(truth.shape, bool)
    logits = 8 * (mask - 0.7) + 2 * noise / noise.std()
    return torch.from_numpy(logits).float()[None, None], torch.from_numpy(mask.astype(np.uint8))[None, None]
