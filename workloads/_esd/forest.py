"""A random forest on what the last convolution sees of a cell: the ESD project's last idea, as a head beside the head.

It is learnt on the training split, when a checkpoint is evaluated, and scored as the network is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from segmentation.epoch import DataError, Evaluation
from segmentation.losses import Loss
from segmentation.training import Batch
from workloads._esd.satellites import CLASSES
from workloads._esd.scoring import Found, Scorer

Array = npt.NDArray[Any]
PREFIX = "forest_"
LEAST = 1e-6
"""What a class's probability is at least, so that its logarithm is a logit."""


@dataclass(frozen=True, kw_only=True)
class Forest:
    """A random forest on the network's features, learnt and scored by evaluate."""

    trees: int = 0
    """How many trees; 0: no forest."""
    max_depth: int = 0
    """How deep a tree may be; 0: any."""
    balanced: bool = False
    """Whether cells of rare classes weigh more."""

    def __post_init__(self) -> None:
        for name in ("trees", "max_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected 0 or more")


def require(config: Forest) -> None:
    """Raise DataError where a forest is asked for and scikit-learn is not installed."""
    if config.trees and importlib.util.find_spec("sklearn") is None:
        raise DataError(
            "forest.trees: scikit-learn not installed; pip install 'segmentation-search[forest]', or set it to 0"
        )


def look(
    config: Forest, model: nn.Module, train: Iterable[Batch], batches: Iterable[Batch], loss: Loss, *, seed: int
) -> Found:
    """Return what a forest that learnt on some subtiles makes of others.

    train, batches: image (B, C, H, W), mask (B, h, w) and index, on the network's device.
    """
    from sklearn.ensemble import RandomForestClassifier

    require(config)
    learnt = [(_features(model, image), mask.cpu().numpy().reshape(-1)) for image, mask, _ in train]
    trees = RandomForestClassifier(
        n_estimators=config.trees,
        max_depth=config.max_depth or None,
        class_weight="balanced" if config.balanced else None,
        random_state=seed,
    )
    trees.fit(np.concatenate([rows for rows, _ in learnt]), np.concatenate([labels for _, labels in learnt]))
    scorer = Scorer(loss)
    for image, mask, index in batches:
        chances = np.full((mask.numel(), len(CLASSES)), LEAST)
        chances[:, trees.classes_] = trees.predict_proba(_features(model, image)).clip(LEAST)
        logits = torch.from_numpy(np.log(chances)).view(*mask.shape, len(CLASSES)).movedim(-1, 1)
        scorer.add(logits, mask.cpu(), index)
    return scorer.whole()


def beside(scored: Evaluation, forest: Evaluation) -> Evaluation:
    """Return an evaluation with a forest's scores and intervals beside the network's, behind forest_."""

    def both(name: str) -> dict[str, Any]:
        more = {f"{PREFIX}{key}": value for key, value in getattr(forest, name).items()}
        return {**getattr(scored, name), **more}

    return Evaluation(
        metrics=both("metrics"),
        intervals=both("intervals"),
        resamples=both("resamples"),
        groups=scored.groups,
        figures=scored.figures,
        details={**scored.details, "forest": {"confusion": forest.details["confusion"]}},
    )


@torch.inference_mode()
def _features(model: nn.Module, image: torch.Tensor) -> Array:
    """Return what the head sees of each cell, (cells, F)."""
    maps: torch.Tensor = model.eval().features(image)  # type: ignore[operator]
    return maps.movedim(1, -1).flatten(0, 2).float().cpu().numpy()
