"""Cleaning of binary predictions: fill holes, and drop components below an area that validation chooses.

Pixels that touch at a corner are connected (8 neighbours); a hole is background that no way over edges (4 neighbours)
leads out of. Holes are filled first, so that the area of a ring is that of its disc. Areas are in pixels of the image
at its native size: clean predictions there, not at the network's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segmentation import metrics
from segmentation.evaluation import ImageScores, defined
from segmentation.metrics import Convention, Scores

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is done to a binary prediction; plain data, stored beside the threshold that it was chosen for."""

    min_area: int = 0
    """Components of fewer pixels are dropped."""
    fill_holes: bool = False

    def __post_init__(self) -> None:
        if self.min_area < 0:
            raise ValueError(f"min_area: got {self.min_area}; expected 0 or more pixels")

    def record(self) -> dict[str, Any]:
        """Return the steps as plain data; `Cleaning(**record)` is the same again."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which cleaning validation prefers, and what each candidate scored."""

    cleaning: Cleaning
    dice: dict[int, float | None]
    """Mean over images of the Dice, by least area; 0 is without dropping. None where no image has one."""


def label(mask: Array) -> tuple[Array, int]:
    """Return the number of each pixel's component, (H, W), 0 where there is none, and how many there are."""
    from scipy.ndimage import label as scipy_label

    labels = np.zeros(mask.shape, np.int32)
    count = scipy_label(mask, structure=np.ones((3, 3)), output=labels) if mask.any() else 0
    return labels, int(count)


def clean(called: Array, cleaning: Cleaning) -> npt.NDArray[np.bool_]:
    """Return a binary prediction (H, W) at native size with its holes filled and small components dropped."""
    whole = _filled(called, cleaning.fill_holes)
    if cleaning.min_area <= 1:
        return whole
    labels, count = label(whole)
    kept = np.bincount(labels.ravel(), minlength=count + 1) >= cleaning.min_area
    kept[0] = False
    return np.asarray(kept[labels])


def count_candidates(
    called: Tensor, mask: Tensor, index: Tensor, areas: Sequence[int], *, fill_holes: bool, ignore_index: int = 255
) -> ImageScores:
    """Return the counts of a batch cleaned by each of the areas, (N, A, 4), for `evaluation.merge` and `gather`.

    Args:
        called: (N, H, W), what is above the threshold, at native size.
        mask: (N, H, W), zeros and ones.
        index: (N,), sample numbers.
        areas: candidates; put 0 among them.
        fill_holes: whether holes are filled before.
        ignore_index: pixels of this value in the mask count for nothing.
    """
    predicted, truth = (tensor.detach().cpu().numpy() for tensor in (called, mask))
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise ValueError(f"got predictions {predicted.shape} and masks {truth.shape}; expected (N, H, W) of both")
    if len(areas) == 0 or min(areas) < 0:
        raise ValueError(f"areas: got {list(areas)}; expected one candidate or more, of 0 pixels or more")
    counts = [_candidates(*pair, areas, fill_holes, ignore_index) for pair in zip(predicted, truth, strict=True)]
    stacked = np.stack(counts) if counts else np.empty((0, len(areas), 4), np.int64)
    return ImageScores(index.cpu().numpy(), stacked, np.full(len(predicted), np.nan))


def choose(
    counted: ImageScores,
    areas: Sequence[int],
    *,
    fill_holes: bool,
    empty: Literal["nan", "one", "zero"] = "nan",
) -> Choice:
    """Return the area with the highest mean over validation images of the Dice; of equal ones the smallest.

    counted: of all images, by the same areas and the same `fill_holes`.
    """
    if counted.counts.shape[1] != len(areas):
        raise ValueError(f"areas: got {len(areas)}, and counts of {counted.counts.shape[1]} candidates")
    scores: Scores = metrics.per_class("dice", counted.counts, Convention(pooling="image", empty=empty))
    ranked = sorted(zip(areas, scores.tolist(), strict=True))
    best = max(ranked, key=lambda pair: -1.0 if np.isnan(pair[1]) else pair[1])  # the first of equal ones
    cleaning = Cleaning(min_area=best[0], fill_holes=fill_holes)
    return Choice(cleaning=cleaning, dice={area: defined(score) for area, score in ranked})


def cleaned(called: Tensor, cleaning: Cleaning) -> Tensor:
    """Return binary predictions (N, H, W) cleaned, on their device."""
    done = [clean(each, cleaning) for each in called.cpu().numpy()]
    return torch.from_numpy(np.stack(done)).to(called.device) if done else called.bool()


def _candidates(called: Array, mask: Array, areas: Sequence[int], fill_holes: bool, ignore_index: int) -> Array:
    """Return counts (A, 4) of one image: its components are found once, and each candidate keeps some of them."""
    labels, count = label(_filled(called, fill_holes))
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    right, wrong = (np.bincount(labels[place], minlength=count + 1)[1:] for place in (mask == 1, mask == 0))
    kept = area >= np.asarray(areas)[:, None]  # (A, components)
    true, false = kept @ right, kept @ wrong
    positive = int((mask == 1).sum())
    negative = int((mask != ignore_index).sum()) - positive
    return np.stack([true, false, positive - true, negative - false], axis=-1).astype(np.int64)


def _filled(called: Array, fill_holes: bool) -> npt.NDArray[np.bool_]:
    from scipy.ndimage import binary_fill_holes

    whole = np.asarray(called) > 0
    return np.asarray(binary_fill_holes(whole), dtype=bool) if fill_holes and whole.any() else whole
