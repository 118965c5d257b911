"""Thresholds learnt on validation and frozen, and scores of binary channels at any cut, from histograms of scores.

A pixel is called where its probability is more than the cut, as everywhere here; one that equals the cut is not. Cuts
are the multiples of 1/400, among them 0.05, 0.1 ... 0.95: a learnt threshold is within 0.0025 of the best. Towards 0
and 1, where scores crowd, there are 16 more to each doubling of p or 1 - p below 0.06, to the last float32 below 1.
Each pixel is binned as a comparison of float32 would call it, so that counts at a cut are exact.

An image in which a channel is neither there nor predicted scores what `empty` says: see `metrics.Convention`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from segmentation import histograms, metrics
from segmentation.epoch import NonFiniteError
from segmentation.evaluation import defined
from segmentation.histograms import NEGATIVE, POSITIVE, Histograms
from segmentation.metrics import Convention, Counts, Scores

Empty = Literal["nan", "one", "zero"]
Array = npt.NDArray[Any]

FIXED = 0.5
IOU_CUTS = (0.5, 0.75, 0.9)
IOU_SHARES = (0.5, 0.75, 0.9, 0.95)
FAMILIES = ("precision", "recall", "f1", "iou", "dice")

STEPS = 400
TAIL, PER_OCTAVE = 0.06, 16
# Cuts of a tail that nearly are multiples of 1/400 are left out.
CLOSE = 0.005
# A bin of 2^13 neighbouring float32 is narrower than the distance of two cuts, see `_table`.
CELL_BITS = 13
BATCH = 64


def _cuts() -> Array:
    """Return all cuts as decimals; each is another float32."""
    even = np.arange(1, STEPS) / STEPS
    tail = TAIL * 2.0 ** (-np.arange(1, 24 * PER_OCTAVE) / PER_OCTAVE)
    tail = tail[(tail >= 2.0**-24) & (np.abs(tail[:, None] / even - 1).min(1) > CLOSE)]
    found = np.concatenate([tail, even, 1 - tail])
    return found[np.unique(found.astype(np.float32), return_index=True)[1]]


CUTS: Array = _cuts()
"""(C,), rising; bin b of a histogram holds the scores that are more than b of them."""
BINS = len(CUTS) + 1
EDGES: Array = CUTS.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What was learnt on validation, for each channel; plain data that no test record changes."""

    f1: tuple[float, ...]
    """Highest F1 of all images' pixels together."""
    dice: tuple[float, ...]
    """Highest mean over images of each one's Dice."""
    f1_score: tuple[float | None, ...]
    """What the validation images score there; None where undefined."""
    dice_score: tuple[float | None, ...]
    empty: Empty
    images: int
    run: str
    """SHA-256 of the validation images' names and histograms."""

    def __post_init__(self) -> None:
        for name in ("f1", "dice", "f1_score", "dice_score"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)  # JSON has lists
            if len(values) != len(self.f1) or any(value is not None and not 0 <= value <= 1 for value in values):
                raise ValueError(f"thresholds: {name}: got {values}; expected a number from 0 to 1 for each channel")
        if None in (*self.f1, *self.dice):
            raise ValueError(f"thresholds: got f1 {self.f1} and dice {self.dice}; learn them on validation again")

    def record(self) -> dict[str, Any]:
        """Return the thresholds as plain data; `Thresholds(**record)` is the same again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def histogram(probability: Tensor, mask: Tensor, index: Tensor, *, ignore_index: int = 255) -> Histograms:
    """Return the histograms of a batch, to be merged and gathered as `segmentation.histograms` does.

    Args:
        probability: (N, K, H, W), of channels that may overlap.
        mask: (N, K, H, W), zeros and ones.
        index: (N,), sample numbers.
        ignore_index: pixels of this value in the mask count for nothing.
    Raises:
        NonFiniteError: where a probability is NaN.
        ValueError: where one lies outside 0 to 1.
    """
    values = histograms.probabilities(probability, index)
    return histograms.count(_bins(values), mask, index, BINS, ignore_index=ignore_index)


def empty(channels: int) -> Histograms:
    """Return the histograms of no image at all."""
    return histograms.empty(channels, BINS)


def counts_at(found: Histograms, cut: float | Sequence[float]) -> Counts:
    """Return counts (N, K, 4) where a pixel is called above the cut, one for all channels or one a channel.

    They are what `metrics.count` gives, for `metrics` and `evaluation` to go on with.

    Raises:
        ValueError: if the cut lies between two of CUTS; the message names the nearest.
    """
    channels = _checked(found).shape[1]
    chosen = [float(cut)] * channels if isinstance(cut, int | float) else [float(each) for each in cut]
    if len(chosen) != channels:
        raise ValueError(f"cut: got {len(chosen)} for {channels} channels")
    above = np.arange(BINS) > np.array([_place(each) for each in chosen])[:, None]  # (K, B)
    called = np.einsum("nktb,kb->nkt", found.pixels, above, dtype=np.int64)
    return _counts(called, found.pixels.sum(-1, dtype=np.int64))


def pooled_f1(found: Histograms) -> Scores:
    """Return the F1 of all images' pixels together at each cut, (K, C); nan where nothing is there nor called."""
    pixels = _checked(found).sum(0, dtype=np.int64)[None]
    return np.asarray(metrics.dice(_swept(pixels))[0].T)


def mean_dice(found: Histograms, empty: Empty = "nan") -> Scores:
    """Return the mean over images of each one's Dice at each cut, (K, C); nan where no image has one."""
    total, count = (np.zeros((found.pixels.shape[1], len(CUTS))) for _ in range(2))
    for pixels in _batches(_checked(found)):
        each = metrics.fill_empty(metrics.dice(_swept(pixels)), empty)  # (n, C, K)
        total += np.nansum(each, axis=0).T
        count += (~np.isnan(each)).sum(0).T
    return np.asarray(total / np.where(count > 0, count, np.nan))


def best_cut(scores: Scores) -> float:
    """Return the cut with the highest of the scores (C,).

    Of several in a row, the one in their middle: it is the furthest from those that score less. Of several rows, the
    widest. Where nothing scores more than 0, as without a positive pixel, 0.5.
    """
    if not (np.nan_to_num(scores) > 0).any():
        return FIXED
    best = np.nan_to_num(scores, nan=-1.0) >= np.nanmax(scores) - 1e-12
    starts = np.flatnonzero(best & ~np.append(False, best[:-1]))
    ends = np.flatnonzero(best & ~np.append(best[1:], False))
    widest = int((np.append(CUTS, 1.0)[ends + 1] - CUTS[starts]).argmax())
    first, last = starts[widest], ends[widest]
    middle = (CUTS[first] + np.append(CUTS, 1.0)[last + 1]) / 2  # all up to the next cut call the same pixels
    return float(CUTS[first + np.abs(CUTS[first : last + 1] - middle).argmin()])


def learn(found: Histograms, names: Sequence[str], *, empty: Empty = "nan") -> Thresholds:
    """Return the thresholds that are best on validation images.

    names: of each image, in the order of `found.index`; part of the run's hash.
    """
    swept = {"f1": pooled_f1(found), "dice": mean_dice(found, empty)}
    cuts = {kind: tuple(map(best_cut, scores)) for kind, scores in swept.items()}
    scored = {
        kind: tuple(defined(line[_place(cut)]) for line, cut in zip(scores, cuts[kind], strict=True))
        for kind, scores in swept.items()
    }
    return Thresholds(
        f1=cuts["f1"],
        dice=cuts["dice"],
        f1_score=scored["f1"],
        dice_score=scored["dice"],
        empty=empty,
        images=len(found.index),
        run=histograms.digest(found, names),
    )


def auprc(found: Histograms) -> Scores:
    """Return the average precision over all images' pixels of each channel, (K,); nan without a positive pixel.

    Within a bin, positive and negative pixels are taken to be spread alike; in the first and last, which scores of 0
    and 1 fill, to be tied. Where there are few distinct scores, rounded to 8 bits or bfloat16, the result is some
    thousandths off: take the sigmoid in float32, or `average_precision`.
    """
    pixels = _checked(found).sum(0, dtype=np.int64)[..., ::-1].astype(np.float64)  # (K, 2, B), from the highest score
    positive, both = pixels[:, POSITIVE], pixels.sum(1)
    found_before, called_before = (np.cumsum(each, -1) - each for each in (positive, both))
    with np.errstate(divide="ignore", invalid="ignore"):
        # The mean over t in 0..1 of (found_before + t positive) / (called_before + t both), in closed form.
        slope = positive / both
        inside = slope + (found_before - slope * called_before) / both * np.log1p(both / called_before)
        spread = np.where(called_before > 0, inside, slope)
        tied = (found_before + positive) / (called_before + both)
    precision = np.concatenate([tied[:, :1], spread[:, 1:-1], tied[:, -1:]], axis=-1)
    total = positive.sum(-1)
    area = np.where(positive > 0, positive * precision, 0).sum(-1)
    return np.asarray(area / np.where(total > 0, total, np.nan))


def average_precision(probability: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Return the exact average precision of (M,) scores; sorts them all, so for small sets. nan without a positive.

    The sum over falling distinct scores of precision times the rise of recall: equal scores are called together.
    """
    scores, truth = np.asarray(probability).ravel(), np.asarray(target).ravel() == 1
    if np.isnan(scores).any():
        raise NonFiniteError(f"probability: {np.isnan(scores).sum()} of {scores.size} are NaN")
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)
    found = np.cumsum(truth[order])[last]
    return float((found / (last + 1) * np.diff(found, prepend=0)).sum() / truth.sum())


def all_empty(found: Histograms) -> Counts:
    """Return the counts (N, K, 4) of calling nothing anywhere: what a score must beat to say anything."""
    pixels = _checked(found).sum(-1, dtype=np.int64)
    return _counts(np.zeros_like(pixels), pixels)


def all_called(found: Histograms) -> Counts:
    """Return the counts (N, K, 4) of calling every pixel: the other thing that takes no looking."""
    pixels = _checked(found).sum(-1, dtype=np.int64)
    return _counts(pixels, pixels)


def scores(counts: Counts, empty: Empty = "nan") -> dict[str, Scores]:
    """Return the scores of counts (N, K, 4), each (K,).

    pooled_NAME is of all images' pixels together, image_NAME the mean over images, of precision, recall, f1, iou and
    dice. frac_images_iou_ge_50 and so on is the share of images whose IoU is at least 0.5. recall_per_image is the mean
    over all images with 0 for those without a positive pixel, whatever `empty` says.
    """
    pooled, image = (Convention(pooling=pooling, empty=empty) for pooling in ("pixel", "image"))
    each = metrics.fill_empty(metrics.iou(counts), empty)  # (N, K)
    known = (~np.isnan(each)).sum(0)
    return {
        **{f"pooled_{name}": metrics.per_class(name, counts, pooled) for name in FAMILIES},
        **{f"image_{name}": metrics.per_class(name, counts, image) for name in FAMILIES},
        "recall_per_image": metrics.per_class("recall", counts, Convention(pooling="image", empty="zero")),
        **{
            f"frac_images_iou_ge_{round(100 * share)}": (np.nan_to_num(each, nan=-1.0) >= share).sum(0)
            / np.where(known > 0, known, np.nan)
            for share in IOU_SHARES
        },
    }


def iou_at_cuts(found: Histograms, empty: Empty = "nan") -> dict[str, Scores]:
    """Return iou_50, iou_75 and iou_90, (K,) each: the mean over images of the IoU with probabilities cut there."""
    image = Convention(pooling="image", empty=empty)
    return {f"iou_{round(100 * cut)}": metrics.per_class("iou", counts_at(found, cut), image) for cut in IOU_CUTS}


def report(found: Histograms, thresholds: Thresholds, channels: Sequence[str]) -> dict[str, Any]:
    """Return all scores as plain data: at the frozen thresholds, at 0.5 beside them, of calling nothing and everything.

    `thresholds` are told with the hash of the run that they were learnt on; the convention is theirs.
    """
    if not len(channels) == found.pixels.shape[1] == len(thresholds.f1):
        raise ValueError(
            f"got histograms of {found.pixels.shape[1]} channels, thresholds of {len(thresholds.f1)} "
            f"and the names {', '.join(channels)}; they must agree"
        )
    convention = thresholds.empty
    at = {"fixed": counts_at(found, FIXED), "f1": counts_at(found, thresholds.f1)}
    at |= {"dice": counts_at(found, thresholds.dice), "all_empty": all_empty(found), "all_called": all_called(found)}
    blocks = {kind: scores(counts, convention) for kind, counts in at.items()}
    single = {**iou_at_cuts(found, convention), "auprc": auprc(found)}
    return {
        "thresholds": {"fixed": FIXED, **thresholds.record()},
        "images": len(found.index),
        "channels": {
            name: {
                **{score: defined(values[k]) for score, values in single.items()},
                **{kind: {score: defined(v[k]) for score, v in block.items()} for kind, block in blocks.items()},
            }
            for k, name in enumerate(channels)
        },
    }


def _bins(values: npt.NDArray[np.float32]) -> Array:
    """Return how many cuts each probability is more than: np.searchsorted(EDGES, values), several times as fast."""
    first, edge = _table()
    # Exact, and as fine near 1 as near 0: p where it is at most one half, else p - 1, which is -0.0 for 1.
    folded = np.where(values > 0.5, -(1 - values), values + np.float32(0))
    cell = folded.view(np.uint32) >> CELL_BITS
    return np.add(first.take(cell), folded > edge.take(cell), dtype=np.int64)


@functools.cache
def _table() -> tuple[Array, Array]:
    """Return of each run of 2^13 folded float32 the bin of the lowest, and the one cut that it may hold."""
    half = np.float32(0.5).view(np.uint32) >> CELL_BITS
    minus = np.uint32(1 << 31) >> CELL_BITS
    cells = np.arange(minus + half + 1, dtype=np.uint32)
    ends = np.stack([cells << CELL_BITS, (cells << CELL_BITS) + np.uint32((1 << CELL_BITS) - 1)])
    with np.errstate(invalid="ignore"):
        folded = ends.view(np.float32).astype(np.float64)
    used = (cells <= half) | (cells >= minus)
    low, high = np.sort(np.where(used, np.where(cells >= minus, folded + 1, folded), 0.0), axis=0)
    below, within = np.searchsorted(EDGES.astype(np.float64), [low, high])
    assert (within - below).max() <= 1
    near = EDGES[np.minimum(below, len(EDGES) - 1)]
    edge = np.where(within > below, np.where(cells >= minus, -(1 - near), near), np.float32(np.inf))
    return below.astype(np.int16), edge.astype(np.float32)


def _place(cut: float) -> int:
    """Return which of CUTS a number is."""
    near = int(np.abs(CUTS - cut).argmin())
    if EDGES[near] != np.float32(cut):
        raise ValueError(f"cut: got {cut}; histograms are cut at multiples of {1 / STEPS}, the nearest is {CUTS[near]}")
    return near


def _checked(found: Histograms) -> npt.NDArray[np.uint32]:
    if found.pixels.shape[2:] != (2, BINS):
        raise ValueError(f"got histograms {found.pixels.shape}; expected (N, K, 2, {BINS}) of probabilities")
    return found.pixels


def _swept(pixels: Array) -> Counts:
    """Return the counts at every cut, (n, C, K, 4), of pixels (n, K, 2, B)."""
    called = np.cumsum(pixels[..., ::-1], axis=-1, dtype=np.int64)[..., ::-1]  # of this bin and those above
    swept = np.moveaxis(called[..., 1:], -1, 1)  # (n, C, K, 2)
    return _counts(swept, np.broadcast_to(called[:, None, :, :, 0], swept.shape))


def _counts(called: Array, pixels: Array) -> Counts:
    """Return counts (..., 4) of negative and positive pixels, (..., 2): those called and all there are."""
    missed = pixels - called
    return np.stack(
        [called[..., POSITIVE], called[..., NEGATIVE], missed[..., POSITIVE], missed[..., NEGATIVE]], axis=-1
    )


def _batches(pixels: Array) -> Iterator[Array]:
    """Yield some images at a time: their counts at every cut take hundreds of times the room."""
    for first in range(0, len(pixels), BATCH):
        yield pixels[first : first + BATCH]
