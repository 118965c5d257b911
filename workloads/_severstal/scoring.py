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

from segmentation import evaluation as counted
from segmentation import froc, histograms, operating_points
from segmentation.collecting import Collector
from segmentation.evaluation import ImageScores, defined
from segmentation.froc import Detections
from segmentation.histograms import Histograms
from segmentation.operating_points import Empty, Thresholds
from segmentation.samples import Samples
from segmentation.training import Batch
from workloads._severstal import dataset
from workloads._severstal.dataset import Data

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
    watch: Native | None = None,
) -> Found:
    """Return what is found on all strips of some batches; the network is left in evaluation mode.

    watch: is shown every strip at its own size.
    """
    model.eval()
    channels = len(dataset.classes(data.task))
    pixels = Collector(histograms.merge, operating_points.empty(channels))
    defects, losses = Collector(froc.merge, froc.empty()), Collector(counted.merge, counted.empty(channels))
    with torch.inference_mode():
        for image, mask, index in batches:
            logits = model(image)
            each = loss(logits, mask).double().cpu().numpy()
            losses.add(ImageScores(index.cpu().numpy(), np.zeros((len(index), channels, 4), np.int64), each))
            for own, masks, numbers in native(data, samples, logits.float().cpu(), index.cpu()):
                probability = own.sigmoid()
                pixels.add(operating_points.histogram(probability, masks, numbers))
                defects.add(froc.detect(probability.amax(1), masks.amax(1), numbers))
                if watch is not None:
                    watch(own, masks, numbers)
    return Found(pixels.whole(), defects.whole(), losses.whole())


def gather(found: Found) -> Found:
    """Return what all processes have found together, on every one of them."""
    return Found(histograms.gather(found.pixels), froc.gather(found.defects), counted.gather(found.scores))


def epoch_scores(found: Found, thresholds: Thresholds, budget: float) -> dict[str, float]:
    """Return what an epoch reports of its validation; means over the channels, those that are undefined left out."""
    empty = thresholds.empty
    fixed = operating_points.scores(operating_points.counts_at(found.pixels, operating_points.FIXED), empty)
    at_f1 = operating_points.scores(operating_points.counts_at(found.pixels, thresholds.f1), empty)
    at_dice = operating_points.scores(operating_points.counts_at(found.pixels, thresholds.dice), empty)
    nothing_called = operating_points.scores(operating_points.all_empty(found.pixels), empty)
    values: dict[str, npt.ArrayLike] = {
        "val_iou_fixed": fixed["image_iou"],
        "val_dice_fixed": fixed["image_dice"],
        "val_iou_opt": at_dice["image_iou"],
        "val_dice_opt": at_dice["image_dice"],
        "val_f1_opt": at_f1["pooled_f1"],
        "val_dice_all_empty": nothing_called["image_dice"],
        "opt_threshold_f1": thresholds.f1,
        "opt_threshold_dice": thresholds.dice,
        **operating_points.iou_at_cuts(found.pixels, empty),
        "auprc": operating_points.auprc(found.pixels),
        "recall_fp_image": froc.recall_at(found.defects, budget),
        "recall_per_image": at_f1["recall_per_image"],
    }
    means = {name: _mean(value) for name, value in values.items()}
    known = {name: value for name, value in means.items() if value is not None}
    return {"val_loss": float(found.scores.losses.mean()), **known}


def learn(found: Found, samples: Samples, empty: Empty) -> Thresholds:
    """Return the thresholds that are best on these strips, with the hash of what they were learnt on."""
    return operating_points.learn(found.pixels, [samples.names[index] for index in found.pixels.index], empty=empty)


def called(logits: Tensor, cut: float | Sequence[float]) -> npt.NDArray[np.bool_]:
    """Return which pixels (K, H, W) of logits of one strip, at its own size, are called."""
    cuts = torch.tensor(cut, dtype=torch.float32).view(-1, 1, 1)
    found: npt.NDArray[np.bool_] = (logits.sigmoid() > cuts).numpy()
    return found


def _mean(value: Any) -> float | None:
    known = np.asarray(value, np.float64)
    known = known[~np.isnan(known)]
    return defined(float(known.mean())) if known.size else None
