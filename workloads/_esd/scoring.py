"""What is known of each subtile that was looked at, and the scores that are made of it, under the names of the ESD.

mean_iou, iou_CLASS             also as mean_jaccard, jaccard_CLASS: two words for one number
mean_f1, f1_CLASS, contest_f1   the contest's score is that of class 0, settlement without electricity
accuracy                        share of the cells that are right
mean_accuracy, accuracy_CLASS   share of a class's cells that are found, as torchmetrics has it: recall
mean_auroc, auroc_CLASS         each class against the others, over all cells at once, never a mean of batches
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segmentation import evaluation, metrics, ranks
from segmentation.collecting import Collector
from segmentation.epoch import Evaluation
from segmentation.evaluation import ImageScores
from segmentation.losses import Loss, build_per_image
from segmentation.metrics import Convention
from segmentation.training import Batch
from workloads._esd.satellites import CLASSES

V = TypeVar("V")
CONVENTION = Convention()
ALSO = {"iou": "jaccard"}
"""Families of scores that go by a second name."""
ELSE = {"dice": "f1", "recall": "accuracy"}
"""Families that go by another name."""
CONTEST = "contest_f1"
DROPPED = ("_no_bg", "_background")
"""Ends of names that mean nothing here: no class is the background."""


@dataclass(frozen=True)
class Found:
    """Scores and probabilities of some subtiles, in the order of `index`."""

    scores: ImageScores
    cells: npt.NDArray[np.float32]
    """(N, K, h, w), probabilities."""
    masks: npt.NDArray[np.uint8]
    """(N, h, w)"""

    @property
    def index(self) -> npt.NDArray[np.int64]:
        """Return the sample numbers (N,)."""
        return self.scores.index

    def called(self) -> npt.NDArray[np.uint8]:
        """Return the likeliest class of each cell, (N, h, w)."""
        return np.asarray(self.cells.argmax(axis=1), dtype=np.uint8)


class Scorer:
    """Takes the logits of one batch after another."""

    def __init__(self, loss: Loss) -> None:
        self._loss = build_per_image(loss, multilabel=False)
        self._found: Collector[Found] | None = None

    def add(self, logits: Tensor, mask: Tensor, index: Tensor) -> None:
        """Score a batch: logits (B, K, h, w), mask (B, h, w), numbers (n,), of which a rank's last batch may lack."""
        logits = logits.detach().float()
        count = len(index)
        part = ImageScores(
            index.cpu().numpy(),
            metrics.count(logits, mask, multilabel=False)[:count],
            self._loss(logits, mask).double().cpu().numpy()[:count],
        )
        cells = logits.softmax(1).cpu().numpy()[:count]
        found = Found(part, cells, mask.cpu().numpy().astype(np.uint8)[:count])
        if self._found is None:
            self._found = Collector(merge, _nothing(found))
        self._found.add(found)

    def whole(self) -> Found:
        """Return what was added by all processes, each subtile once, in order of number."""
        mine = None if self._found is None else self._found.whole()
        parts = [part for part in ranks.gather(mine) if part is not None]
        if not parts:
            raise ValueError("no subtile was scored")
        return merge(parts)


def merge(parts: Sequence[Found]) -> Found:
    """Return all parts in order of number, each subtile once."""
    numbers = np.concatenate([part.index for part in parts])
    _, order = np.unique(numbers, return_index=True)
    return Found(
        evaluation.merge([part.scores for part in parts]),
        np.concatenate([part.cells for part in parts])[order],
        np.concatenate([part.masks for part in parts])[order],
    )


@torch.inference_mode()
def look(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> Found:
    """Return what a network, left in evaluation mode, makes of some subtiles."""
    model.eval()
    scorer = Scorer(loss)
    for image, mask, index in batches:
        scorer.add(model(image), mask, index)
    return scorer.whole()


def names() -> list[str]:
    """Return the names of the scores that `epoch_scores` gives behind `val_`, the loss left out."""
    plain = evaluation.conventions(CLASSES, CONVENTION, multilabel=False)
    return [*renamed(plain), "mean_auroc", *(f"auroc_{name}" for name in CLASSES)]


def epoch_scores(found: Found, prefix: str = "val_") -> dict[str, float]:
    """Return what an epoch reports, without what is not defined, such as the AUROC of a class that is not there."""
    plain = evaluation.summary(found.scores, CLASSES, multilabel=False, convention=CONVENTION)
    loss = {"loss": plain.pop("loss")}
    areas = {name: value for name, value in auroc(found).items() if value is not None}
    return {f"{prefix}{name}": value for name, value in {**renamed(plain), **areas, **loss}.items()}


def evaluated(found: Found, tiles: Sequence[str], details: Mapping[str, Any], majority: int) -> Evaluation:
    """Return all scores, with intervals over tiles.

    tiles: that of each subtile.
    majority: the class most frequent in training; calling every cell it is scored too.
    """
    plain = evaluation.evaluation(
        found.scores, tiles, CLASSES, multilabel=False, convention=CONVENTION, details=details, majority=majority
    )
    areas = auroc(found)
    missing = [name.removeprefix("auroc_") for name, value in areas.items() if value is None]
    notices = [f"{name}: all cells or none are of it, so it has no AUROC" for name in missing if name in CLASSES]
    return replace(
        plain,
        metrics={**renamed(plain.metrics), **areas},
        intervals=renamed(plain.intervals),
        resamples=renamed(plain.resamples),
        groups={tile: renamed(scores) for tile, scores in plain.groups.items()},
        details={
            **plain.details,
            "conventions": renamed(plain.details["conventions"]),
            "confusion": confusion(found),
            "notices": notices,
        },
    )


def auroc(found: Found) -> dict[str, float | None]:
    """Return the area under the ROC curve of each class against the others, and their mean; None where undefined."""
    from torchmetrics.functional.classification import binary_auroc

    areas: dict[str, float | None] = {}
    for number, name in enumerate(CLASSES):
        truth = found.masks == number
        scores = torch.from_numpy(found.cells[:, number].reshape(-1))
        there = truth.any() and not truth.all()
        areas[f"auroc_{name}"] = float(binary_auroc(scores, torch.from_numpy(truth.reshape(-1)))) if there else None
    known = [area for area in areas.values() if area is not None]
    return {"mean_auroc": float(np.mean(known)) if known else None, **areas}


def confusion(found: Found) -> list[list[int]]:
    """Return how many cells of each true class, by row, were called each class."""
    cells = len(CLASSES) * found.masks.astype(np.int64) + found.called()
    table = np.bincount(cells.ravel(), minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))
    return [[int(count) for count in row] for row in table]


def renamed(values: Mapping[str, V]) -> dict[str, V]:
    """Return scores of `segmentation.evaluation` under the names of this module."""
    found: dict[str, V] = {}
    for name, value in values.items():
        if name.endswith(DROPPED):
            continue
        family = name.removeprefix("mean_").partition("_")[0]
        found[name.replace(family, ELSE[family], 1) if family in ELSE else name] = value
        if family in ALSO:
            found[name.replace(family, ALSO[family], 1)] = value
    if (score := f"f1_{CLASSES[0]}") in found:
        found[CONTEST] = found[score]
    return found


def _nothing(like: Found) -> Found:
    return Found(evaluation.empty(len(CLASSES)), like.cells[:0], like.masks[:0])
