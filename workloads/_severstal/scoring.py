"""Scores of strips at their own size: whatever looks at a network's output goes through `pass_over`.

Logits on the canvas are brought back to the strip's own size, there become probabilities, and only then are cut: in
validation, in evaluation and in prediction alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segmentation import calibration, components, froc, histograms, metrics, operating_points
from segmentation import evaluation as counted
from segmentation.calibration import Temperature
from segmentation.collecting import Collector
from segmentation.evaluation import ImageScores, defined
from segmentation.froc import Detections
from segmentation.histograms import Histograms
from segmentation.operating_points import Empty, Thresholds
from segmentation.samples import Samples
from segmentation.training import Batch
from workloads._severstal import dataset
from workloads._severstal.dataset import Data
from workloads._severstal.learnt import Learnt

Native = Callable[[Tensor, Tensor, Tensor], None]
"""Shown logits (n, K, H, W) and masks (n, K, H, W) of strips of one size, at that size, and their numbers (n,)."""


@dataclass(frozen=True)
class Found:
    """What one look at a split gives, in bounded memory."""

    pixels: Histograms
    """Of probabilities at the strips' own size."""
    defects: Detections
    """Of the channels together: connected areas."""
    scores: ImageScores
    """Losses on the canvas, as in training; no counts."""
    logits: Histograms | None = None
    """Of logits at the strips' own size, where they were asked for."""


def native(data: Data, samples: Samples, logits: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield logits and masks (n, K, H, W) at the strips' own size, and their numbers, one size after the other."""
    masks = [dataset.native_mask(samples, number) for number in index.tolist()]
    rows_of = defaultdict(list)
    for row, mask in enumerate(masks):
        rows_of[mask.shape[1:]].append(row)
    for size, rows in rows_of.items():
        own = torch.from_numpy(np.stack([masks[row] for row in rows]))
        yield dataset.letterbox(data, size).back(logits[rows]), own, index[rows]


def look(
    data: Data,
    samples: Samples,
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    watch: Sequence[Native] = (),
    *,
    calibrate: bool = False,
) -> Found:
    """Return what is found on all strips of some batches; the network is left in evaluation mode.

    Args:
        data: how strips lie on the canvas.
        samples: have the masks of the strips' own size.
        model: gives logits (B, K, H, W) on the canvas.
        batches: strips on the canvas.
        loss: one number for each strip.
        watch: each is shown every strip at its own size.
        calibrate: whether logits are kept too.
    """
    channels = len(dataset.classes(data.task))
    losses = Collector(counted.merge, counted.empty(channels))
    seen = Seen(channels, calibrate=calibrate)
    for logits, mask, index in _canvas(model, batches):
        each = loss(logits, mask).double().cpu().numpy()
        losses.add(ImageScores(index.cpu().numpy(), np.zeros((len(index), channels, 4), np.int64), each))
        for own, masks, numbers in native(data, samples, logits.float().cpu(), index.cpu()):
            for show in (seen.add, *watch):
                show(own, masks, numbers)
    return seen.found(losses.whole())


def _canvas(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the logits of each batch with its masks and numbers."""
    model.eval()
    for image, mask, index in batches:
        with torch.inference_mode():
            logits = model(image)
        yield logits, mask, index


class Seen:
    """Collects what is to be known of strips from their logits, in bounded memory."""

    def __init__(self, channels: int, *, calibrate: bool = False) -> None:
        self.pixels = Collector(histograms.merge, operating_points.empty(channels))
        self.defects = Collector(froc.merge, froc.empty())
        self.logits = Collector(histograms.merge, calibration.empty(channels)) if calibrate else None

    def add(self, logits: Tensor, masks: Tensor, index: Tensor) -> None:
        """Take note of strips of one size, logits and masks (n, K, H, W)."""
        self.add_probabilities(logits.sigmoid(), masks, index)
        if self.logits is not None:
            self.logits.add(calibration.histogram(logits, masks, index))

    def add_probabilities(self, probability: Tensor, masks: Tensor, index: Tensor) -> None:
        """Take note of strips of one size, probabilities and masks (n, K, H, W)."""
        self.pixels.add(operating_points.histogram(probability, masks, index))
        self.defects.add(froc.detect(probability.amax(1), masks.amax(1), index))

    def found(self, scores: ImageScores) -> Found:
        """Return all of it beside the losses."""
        return Found(
            self.pixels.whole(), self.defects.whole(), scores, None if self.logits is None else self.logits.whole()
        )


class Called:
    """Counts what is called on strips of their own size, cleaned, once a checkpoint knows how."""

    def __init__(self, learnt: Learnt) -> None:
        self.learnt = learnt
        self.counts = Collector(counted.merge, counted.empty(len(learnt.thresholds.dice)))

    def add(self, logits: Tensor, masks: Tensor, index: Tensor) -> None:
        """Count strips of one size, logits and masks (n, K, H, W)."""
        called = torch.from_numpy(np.stack([self.learnt.called(one) for one in logits]))
        found = metrics.counts_multilabel(called, masks)
        self.counts.add(ImageScores(index.numpy(), found, np.full(len(index), np.nan)))


@dataclass(frozen=True, kw_only=True)
class Clean:
    """What is done to predictions at the strip's own size, if anything."""

    areas: tuple[int, ...] = ()
    """Least areas, in pixels, of which validation chooses the one with the best Dice: connected predictions that are
    smaller are dropped. 0, which drops none, is always among them. Empty: nothing is cleaned."""
    fill_holes: bool = False
    """Whether holes in predictions are filled first, where there are areas."""

    def __post_init__(self) -> None:
        if any(area < 0 for area in self.areas):
            raise ValueError(f"areas: got {list(self.areas)}; expected 0 or more pixels")

    @property
    def candidates(self) -> tuple[int, ...]:
        """Return all areas, 0 among them."""
        return tuple(sorted({0, *self.areas}))


def cleanings(
    data: Data,
    samples: Samples,
    model: nn.Module,
    batches: Iterable[Batch],
    cut: Sequence[float],
    clean: Clean,
    empty: Empty,
) -> tuple[components.Choice, ...]:
    """Return the cleaning of each channel that scores best on all ranks' strips, called above the cuts (K,)."""
    areas = clean.candidates
    parts = [Collector(counted.merge, counted.empty(len(areas))) for _ in cut]
    for logits, _, index in _canvas(model, batches):
        for own, masks, numbers in native(data, samples, logits.float().cpu(), index.cpu()):
            called = own.sigmoid() > torch.tensor(cut, dtype=torch.float32).view(-1, 1, 1)
            for channel, part in enumerate(parts):
                pair = called[:, channel], masks[:, channel]
                part.add(components.count_candidates(*pair, numbers, areas, fill_holes=clean.fill_holes))
    whole = [counted.gather(part.whole()) for part in parts]
    return tuple(components.choose(one, areas, fill_holes=clean.fill_holes, empty=empty) for one in whole)


def gather(found: Found) -> Found:
    """Return what all processes have found together, on every one of them."""
    logits = None if found.logits is None else histograms.gather(found.logits)
    return Found(histograms.gather(found.pixels), froc.gather(found.defects), counted.gather(found.scores), logits)


def epoch_scores(found: Found, thresholds: Thresholds, budget: float) -> dict[str, float]:
    """Return what an epoch reports of its validation; means over the channels, those that are undefined left out."""
    empty = thresholds.empty
    fixed = operating_points.scores(operating_points.counts_at(found.pixels, operating_points.FIXED), empty)
    at_f1 = operating_points.scores(operating_points.counts_at(found.pixels, thresholds.f1), empty)
    at_dice = operating_points.scores(operating_points.counts_at(found.pixels, thresholds.dice), empty)
    nothing = operating_points.scores(operating_points.all_empty(found.pixels), empty)
    everything = operating_points.scores(operating_points.all_called(found.pixels), empty)
    values: dict[str, npt.ArrayLike] = {
        "val_iou_fixed": fixed["image_iou"],
        "val_dice_fixed": fixed["image_dice"],
        "val_iou_opt": at_dice["image_iou"],
        "val_dice_opt": at_dice["image_dice"],
        "val_f1_opt": at_f1["pooled_f1"],
        "val_dice_all_empty": nothing["image_dice"],
        "val_dice_all_called": everything["image_dice"],
        "opt_threshold_f1": thresholds.f1,
        "opt_threshold_dice": thresholds.dice,
        **operating_points.iou_at_cuts(found.pixels, empty),
        "auprc": operating_points.auprc(found.pixels),
        "recall_fp_image": froc.recall_at(found.defects, budget),
        "recall_per_image": at_f1["recall_per_image"],
    }
    means = {name: mean(value) for name, value in values.items()}
    known = {name: value for name, value in means.items() if value is not None}
    return {"val_loss": float(found.scores.losses.mean()), **known}


def learn(found: Found, samples: Samples, empty: Empty) -> Thresholds:
    """Return the thresholds that are best on these strips, with the hash of what they were learnt on."""
    return operating_points.learn(found.pixels, [samples.names[index] for index in found.pixels.index], empty=empty)


def temperature(logits: Histograms, samples: Samples) -> Temperature:
    """Return what to divide logits by, with the hash of what it was learnt on."""
    return calibration.learn(logits, [samples.names[index] for index in logits.index])


def mean(value: Any) -> float | None:
    """Return the mean over channels (K,), those left out that are undefined; None where all are."""
    known = np.asarray(value, np.float64)
    known = known[~np.isnan(known)]
    return defined(float(known.mean())) if known.size else None
