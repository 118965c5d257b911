"""FROC: the share of lesions found against false positives an image, of one binary channel.

A lesion is a connected component of the mask, a candidate one of the pixels whose probability is more than a cut, both
of 8 neighbours. A candidate has one score and hits every lesion that it overlaps enough; one that hits none is a false
positive. As the score that is asked of candidates falls, lesions are found and false positives come in. Lesions that no
candidate hits at the cut are never found, however many false positives are allowed.
Source: Bunch et al. 1978, A free-response approach to the measurement and characterization of radiographic-observer
performance, J Appl Photogr Eng 4(4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from segmentation import components, histograms, ranks
from segmentation.evaluation import defined

Array = npt.NDArray[Any]

BUDGETS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives an image at which recall is told. Source: Setio et al. 2017, LUNA16, arXiv:1612.08012."""
NOTHING = np.empty((0, 3))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What candidates are, and when they hit; FROC curves by different rules cannot be compared."""

    cut: float = 0.5
    """Pixels of a higher probability make up candidates. Low cuts melt neighbours into one."""
    min_iou: float = 0.0
    """A candidate hits a lesion if their intersection over union is at least this; 0: if they share a pixel."""
    score: Literal["max", "mean"] = "max"
    """Of a candidate: the highest or the mean probability of its pixels."""
    most: int = 100
    """Candidates kept of an image, those of the highest score. The others count as false positives of the highest
    score among them: what is told is never better than the truth."""

    def __post_init__(self) -> None:
        if not (0 <= self.cut < 1 and 0 <= self.min_iou <= 1 and self.most >= 1):
            raise ValueError(f"FROC: got {self}; expected 0 <= cut < 1, 0 <= min_iou <= 1 and most >= 1")


@dataclass(frozen=True)
class Detections:
    """Lesions and candidates of each image: plain arrays, in the order of `index`."""

    index: npt.NDArray[np.int64]
    """(N,), the sample's number in its data set."""
    lesions: npt.NDArray[np.int64]
    """(N,), how many there are."""
    kept: npt.NDArray[np.int64]
    """(N,), how many of the candidates are each image's."""
    candidates: npt.NDArray[np.float64]
    """(M, 3), image after image: a candidate's score, how many lesions it hits that no candidate of a higher score
    does, and how many false positives it stands for."""


@dataclass(frozen=True)
class Curve:
    """What is found as the score asked for falls, one entry for each distinct score."""

    score: Array
    false_positives: Array
    """An image."""
    recall: Array
    """nan without lesions."""


def detect(
    probability: Tensor, mask: Tensor, index: Tensor, *, rule: Rule | None = None, ignore_index: int = 255
) -> Detections:
    """Return the lesions and candidates of a batch.

    Args:
        probability: (N, H, W).
        mask: (N, H, W), zeros and ones.
        index: (N,), sample numbers.
        rule: of all batches the same.
        ignore_index: pixels of this value in the mask are neither lesion nor candidate.
    Raises:
        NonFiniteError: where a probability is NaN.
        ValueError: where one lies outside 0 to 1, or sizes differ.
    """
    values, truth = histograms.probabilities(probability, index), mask.detach().cpu().numpy()
    if values.shape != truth.shape or values.ndim != 3 or len(index) != len(values):
        came = f"probabilities {values.shape}, masks {truth.shape}, {len(index)} numbers"
        raise ValueError(f"got {came}; expected (N, H, W), one channel at a time")
    rule, numbers = rule or Rule(), index.cpu().numpy().astype(np.int64)
    images = [_image(*pair, rule, ignore_index) for pair in zip(values, truth, strict=True)]
    lesions = np.array([count for count, _ in images], np.int64)
    kept = np.array([len(candidates) for _, candidates in images], np.int64)
    return Detections(numbers, lesions, kept, np.concatenate([NOTHING, *(candidates for _, candidates in images)]))


def empty() -> Detections:
    """Return the detections of no image at all."""
    none = np.empty(0, np.int64)
    return Detections(none, none, none, NOTHING)


def merge(parts: Sequence[Detections]) -> Detections:
    """Return the detections of all parts in order of index, each image once however often it was seen."""
    numbers, order = np.unique(np.concatenate([part.index for part in parts]), return_index=True)
    lesions, kept = (np.concatenate([getattr(part, name) for part in parts])[order] for name in ("lesions", "kept"))
    each = [rows for part in parts for rows in np.split(part.candidates, np.cumsum(part.kept))[:-1]]
    return Detections(numbers, lesions, kept, np.concatenate([NOTHING, *(each[place] for place in order)]))


def gather(detections: Detections) -> Detections:
    """Return the merged detections of all processes, on every one of them; the same where there is one."""
    parts = ranks.gather(detections)
    return merge(parts) if len(parts) > 1 else detections


def curve(detections: Detections) -> Curve:
    """Return recall and false positives an image at each distinct score, from the highest; empty without candidates."""
    table = detections.candidates
    score, row = np.unique(-table[:, 0], return_inverse=True)
    found, false = (np.cumsum(np.bincount(row, weights=column, minlength=len(score))) for column in table.T[1:])
    lesions, images = int(detections.lesions.sum()), len(detections.index)
    return Curve(-score, false / max(images, 1), found / (lesions or np.nan))


def recall_at(detections: Detections, budget: float) -> float:
    """Return the share of lesions found with at most so many false positives an image; nan without lesions.

    Nothing is interpolated: it is the recall of a score that could be asked for.
    """
    return _recall_at(detections, curve(detections), budget)


def _recall_at(detections: Detections, found: Curve, budget: float) -> float:
    if detections.lesions.sum() == 0:
        return float("nan")
    allowed = found.recall[found.false_positives <= budget + 1e-9]
    return float(allowed[-1]) if len(allowed) else 0.0


def scores(detections: Detections, *, budget: float = 1.0) -> dict[str, float | None]:
    """Return recall_fp_image, at the budget, recall_fp_0.125 to _8, and their mean, froc; None without lesions."""
    found = curve(detections)
    at = {f"recall_fp_{each:g}": _recall_at(detections, found, each) for each in BUDGETS}
    told = {"recall_fp_image": _recall_at(detections, found, budget), **at, "froc": float(np.mean(list(at.values())))}
    return {name: defined(value) for name, value in told.items()}


def _image(probability: Array, mask: Array, rule: Rule, ignore_index: int) -> tuple[int, npt.NDArray[np.float64]]:
    """Return how many lesions one image has, and its candidates (M, 3) from the highest score."""
    truth, lesions = components.label(mask == 1)
    called = probability > np.float32(rule.cut)
    labels, count = components.label(called & (mask != ignore_index))
    score = _component_scores(probability, labels, count, rule.score)
    hits = _hits(labels, truth, count, lesions, rule.min_iou)  # (pairs, 2)
    false = np.ones(count, bool)
    false[hits[:, 0]] = False
    # The last of a lesion's pairs is that of the highest score.
    hits = hits[np.argsort(score[hits[:, 0]], kind="stable")]
    best = np.full(lesions, -1)
    best[hits[:, 1]] = hits[:, 0]
    found = np.bincount(best[best >= 0], minlength=count)
    rows = np.stack([score, found, false], axis=1)[np.argsort(-score, kind="stable")]
    kept, others = rows[: rule.most], rows[rule.most :]
    return lesions, np.concatenate([kept, [[others[0, 0], 0, len(others)]]]) if len(others) else kept


def _component_scores(probability: Array, labels: Array, count: int, kind: str) -> npt.NDArray[np.float64]:
    inside = labels > 0
    each, values = labels[inside] - 1, probability[inside]
    if kind == "mean":
        return np.bincount(each, weights=values, minlength=count) / np.maximum(np.bincount(each, minlength=count), 1)
    highest = np.zeros(count, np.float32)
    np.maximum.at(highest, each, values)
    return highest.astype(np.float64)


def _hits(labels: Array, truth: Array, count: int, lesions: int, min_iou: float) -> npt.NDArray[np.int64]:
    """Return the pairs (candidate, lesion) that overlap enough, (P, 2), counted from 0."""
    both = (labels > 0) & (truth > 0)
    pairs, shared = np.unique((labels[both] - 1).astype(np.int64) * lesions + truth[both] - 1, return_counts=True)
    found = np.stack(np.divmod(pairs, max(lesions, 1)), axis=1)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:], np.bincount(truth.ravel(), minlength=lesions + 1)[1:]
    union = areas[0][found[:, 0]] + areas[1][found[:, 1]] - shared
    enough: npt.NDArray[np.int64] = found[shared >= min_iou * union]
    return enough
