"""Additive counts first, scores after.

Counts are int64 numpy arrays (..., K, 4) of true positives, false positives, false negatives and true negatives of each
class. They are made per image, (N, K, 4), and summed over images, batches and ranks before any score is made of them:
a score of sums does not depend on how the images were dealt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Counts = npt.NDArray[Any]  # int64; float64 where resampled sums take their place
Scores = npt.NDArray[np.float64]

TP, FP, FN, TN = range(4)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a score is made of counts; every score is kept together with this."""

    pooling: Literal["pixel", "image"] = "pixel"
    """pixel: of the counts summed over all images. image: the mean of each image's own score."""
    background: Literal["in", "out"] = "in"
    """Whether class 0 counts in the mean over classes."""
    empty: Literal["nan", "one", "zero"] = "nan"
    """What a class scores that is neither there nor predicted; nan: it is left out of means."""

    def record(self) -> dict[str, str]:
        """Return the convention as plain data."""
        return asdict(self)


def confusion(predicted: Tensor, mask: Tensor, classes: int, *, ignore_index: int = 255) -> Counts:
    """Return how often each true class was called what, in each image: (N, K, K), rows true, columns predicted.

    predicted: (N, H, W), class ids.
    mask: (N, H, W), class ids; ignored pixels count for nothing.
    """
    images = torch.arange(len(mask), device=mask.device).view(-1, 1, 1)
    known = mask != ignore_index
    cell = (images * classes + mask) * classes + predicted
    table = torch.bincount(cell[known], minlength=len(mask) * classes * classes)
    return np.asarray(table.view(len(mask), classes, classes).cpu().numpy(), dtype=np.int64)


def counts_from_confusion(table: Counts) -> Counts:
    """Return counts (..., K, 4) of confusion tables (..., K, K)."""
    true_positive = np.diagonal(table, axis1=-2, axis2=-1)
    false_positive = table.sum(-2) - true_positive
    false_negative = table.sum(-1) - true_positive
    total = table.sum((-2, -1))[..., None]
    true_negative = total - true_positive - false_positive - false_negative
    return np.stack([true_positive, false_positive, false_negative, true_negative], axis=-1)


def counts_multilabel(predicted: Tensor, mask: Tensor, *, ignore_index: int = 255) -> Counts:
    """Return counts (N, K, 4) of predictions and masks (N, K, H, W) of zeros and ones."""
    known, positive, called = mask != ignore_index, mask == 1, predicted.bool()
    cells = [called & positive, called & ~positive, ~called & positive, ~called & ~positive]
    table = torch.stack([(cell & known).sum((2, 3)) for cell in cells], dim=-1)
    return np.asarray(table.cpu().numpy(), dtype=np.int64)


def count(
    logits: Tensor,
    mask: Tensor,
    *,
    multilabel: bool,
    threshold: float | tuple[float, ...] = 0.5,
    ignore_index: int = 255,
) -> Counts:
    """Return counts (N, K, 4) of logits (N, K, H, W).

    mask: (N, H, W) class ids, or (N, K, H, W) zeros and ones.
    threshold: probability above which a class is called, one for all or one a class (multilabel).
    """
    if not multilabel:
        return counts_from_confusion(confusion(logits.argmax(1), mask, logits.shape[1], ignore_index=ignore_index))
    limit = torch.tensor(threshold, device=logits.device).view(1, -1, 1, 1)
    return counts_multilabel(logits.float().sigmoid() > limit, mask, ignore_index=ignore_index)


def iou(counts: Counts) -> Scores:
    """Return intersection over union of each class, (..., K); nan where a class is neither there nor predicted."""
    return _ratio(counts[..., TP], counts[..., TP] + counts[..., FP] + counts[..., FN], counts)


def dice(counts: Counts) -> Scores:
    """Return the Dice coefficient, which of pixels is F1: (..., K), nan like `iou`."""
    return _ratio(2 * counts[..., TP], 2 * counts[..., TP] + counts[..., FP] + counts[..., FN], counts)


def precision(counts: Counts) -> Scores:
    """Return the share of calls that are right; 0 where the class is there and never called."""
    return _ratio(counts[..., TP], counts[..., TP] + counts[..., FP], counts)


def recall(counts: Counts) -> Scores:
    """Return the share of the class that was found; 0 where the class is called and never there."""
    return _ratio(counts[..., TP], counts[..., TP] + counts[..., FN], counts)


def accuracy(counts: Counts) -> Scores:
    """Return the share of pixels whose membership of the class was told right; nan without pixels."""
    return _share(counts[..., TP] + counts[..., TN], counts.sum(-1))


SCORES: dict[str, Callable[[Counts], Scores]] = {
    "iou": iou,
    "dice": dice,
    "f1": dice,
    "precision": precision,
    "recall": recall,
    "accuracy": accuracy,
}


def per_class(name: str, counts: Counts, convention: Convention) -> Scores:
    """Return the score of each class over images: (..., N, K, 4) to (..., K).

    Pooled by pixel, the axis of images is summed away; pooled by image, each image is scored and the mean is taken over
    the images in which the score is defined.
    """
    if convention.pooling == "pixel":
        return fill_empty(SCORES[name](counts.sum(-3)), convention.empty)
    return _nanmean(fill_empty(SCORES[name](counts), convention.empty), axis=-2)


def mean_over_classes(scores: Scores, convention: Convention) -> Scores:
    """Return the mean over the classes in which the score is defined, (..., K) to (...); nan where in none."""
    return _nanmean(scores[..., 1:] if convention.background == "out" else scores, axis=-1)


def pixel_accuracy(counts: Counts, *, multilabel: bool) -> Scores:
    """Return the share of pixels told right, (..., K, 4) to (...): of all classes' pixels when multilabel."""
    right = counts[..., TP].sum(-1) + (counts[..., TN].sum(-1) if multilabel else 0)
    total = counts.sum((-2, -1)) if multilabel else counts[..., 0, :].sum(-1)
    return _share(right, total)


def background_accuracy(counts: Counts, *, multilabel: bool) -> Scores:
    """Return the pixel accuracy of calling everything background: what a score must beat to say anything."""
    there = counts[..., TP] + counts[..., FN]
    total = counts.sum((-2, -1)) if multilabel else counts[..., 0, :].sum(-1)
    right = total - there.sum(-1) if multilabel else there[..., 0]
    return _share(right, total)


def majority(pixels: Any) -> int:
    """Return the class with most pixels, (..., K) of how many each has in training masks; the first of equals."""
    totals = np.asarray(pixels)
    return int(totals.reshape(-1, totals.shape[-1]).sum(0).argmax())


def counts_calling(label: int, counts: Counts) -> Counts:
    """Return the counts (..., K, 4) of calling every pixel this class, for the masks that some counts are of."""
    there = counts[..., TP] + counts[..., FN]
    rest = counts.sum(-1) - there
    called = np.arange(counts.shape[-2]) == label
    nothing = np.zeros_like(there)
    found = [np.where(called, there, nothing), np.where(called, rest, nothing)]
    return np.stack([*found, np.where(called, nothing, there), np.where(called, nothing, rest)], axis=-1)


def class_shares(counts: Counts) -> Scores:
    """Return the share of pixels that each class covers in the masks, (..., K)."""
    return _share(counts[..., TP] + counts[..., FN], counts.sum(-1))


def fill_empty(scores: Scores, empty: str) -> Scores:
    """Return the scores with nan replaced as the convention says."""
    return scores if empty == "nan" else np.where(np.isnan(scores), {"one": 1.0, "zero": 0.0}[empty], scores)


def as_dict(names: tuple[str, ...], values: Any, prefix: str) -> dict[str, float]:
    """Return `prefix_name: value` for each class."""
    return {f"{prefix}_{name}": float(value) for name, value in zip(names, values, strict=True)}


def _ratio(above: Counts, below: Counts, counts: Counts) -> Scores:
    """Divide; 0 where nothing is below the line, but nan where the class is neither there nor predicted."""
    absent = counts[..., TP] + counts[..., FP] + counts[..., FN] == 0
    return np.where(absent, np.nan, np.where(below > 0, _share(above, below), 0.0))


def _share(part: Any, whole: Any) -> Scores:
    """Divide; nan where the whole is 0, without numpy's warning."""
    return np.asarray(part / np.where(whole > 0, whole, np.nan), dtype=np.float64)


def _nanmean(values: Scores, axis: int) -> Scores:
    """Return the mean of what is defined, nan where nothing is, without numpy's warning."""
    defined = ~np.isnan(values)
    return _share(np.where(defined, values, 0).sum(axis), defined.sum(axis))
