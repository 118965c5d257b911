"""From what was found on a split to an Evaluation: a network's strips and somebody else's predictions alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmentation import calibration, froc, operating_points
from segmentation import evaluation as counted
from segmentation.epoch import Evaluation
from segmentation.evaluation import ImageScores
from segmentation.metrics import Convention
from segmentation.operating_points import FIXED, Empty, Thresholds
from workloads._severstal import scoring
from workloads._severstal.learnt import Learnt
from workloads._severstal.scoring import Found

POOLED = ("pooled_precision", "pooled_recall", "pooled_f1")
"""Of all strips' pixels together, at the frozen threshold of Dice."""
OTHER_NAMES = {"mean_dice": "dice_opt", "mean_iou": "iou_opt"}
"""Scores at the frozen threshold, and what an epoch calls them."""
CLEANED = {"mean_dice": "dice_clean", "mean_iou": "iou_clean"}
RUNS, WARM_UP = 5, 2


def evaluation(
    found: Found,
    learnt: Learnt,
    groups: Sequence[str],
    names: Sequence[str],
    *,
    budget: float,
    cleaned: ImageScores | None = None,
    details: Mapping[str, Any],
) -> Evaluation:
    """Return scores at the frozen thresholds with intervals over groups; at 0.5, of calling nothing and all beside.

    Args:
        found: on the split.
        learnt: on validation.
        groups: of each strip, in the order of `found.pixels.index`.
        names: of the classes.
        budget: false alarms a strip at which recall_fp_image is told.
        cleaned: counts of cleaned predictions; None: nothing is cleaned.
        details: whatever else is worth keeping.
    """
    thresholds, pixels = learnt.thresholds, found.pixels
    convention = Convention(pooling="image", empty=thresholds.empty)
    counts = operating_points.counts_at(pixels, thresholds.dice)
    at_dice = ImageScores(pixels.index, counts, found.scores.losses)
    report = operating_points.report(pixels, thresholds, names)
    scored = counted.evaluation(
        at_dice,
        groups,
        names,
        multilabel=True,
        convention=convention,
        details={
            **details,
            "froc": froc.scores(found.defects, budget=budget),
            **report,
            **_learnt_details(found, learnt, names),
        },
    )
    told = scoring.epoch_scores(found, thresholds, budget)
    pooled = operating_points.scores(counts, thresholds.empty)
    made = {
        **scored.metrics,
        **{name.removeprefix("val_"): value for name, value in told.items() if not math.isnan(value)},
        **{name: scoring.mean(pooled[name]) for name in POOLED},
    }
    scored = _with_names(dataclasses.replace(scored, metrics=made), scored, OTHER_NAMES)
    if cleaned is None:
        return scored
    again = counted.evaluation(cleaned, groups, names, multilabel=True, convention=convention)
    return _with_names(scored, again, CLEANED)


def fixed(channels: int, empty: Empty) -> Thresholds:
    """Return thresholds of 0.5, which nobody learnt."""
    cuts, unknown = (FIXED,) * channels, (None,) * channels
    return Thresholds(
        f1=cuts, dice=cuts, f1_score=unknown, dice_score=unknown, empty=empty, images=0, run="none: fixed at 0.5"
    )


def speed(model: nn.Module, image: Tensor) -> dict[str, Any]:
    """Return how long the network takes for one strip of a batch (B, C, H, W), after warming up."""
    from segmentation.deployment import measure  # here, because it takes seconds that training need not pay

    gpu = image.device.type == "cuda"
    with torch.inference_mode():
        taken = measure.latency(
            lambda: model(image),
            runs=RUNS,
            warmup=WARM_UP,
            wait=(lambda: torch.cuda.synchronize(image.device)) if gpu else None,
        )
    return {
        "ms_per_image": taken.p50_ms / len(image),
        "batch": len(image),
        "size": list(image.shape[1:]),
        "device": torch.cuda.get_device_name(image.device) if gpu else str(image.device),
        "threads": None if gpu else torch.get_num_threads(),
        "runs": taken.runs,
        "warmup": taken.warmup,
    }


def draw_reliability(out_dir: Path, found: Found, learnt: Learnt, names: Sequence[str]) -> list[str]:
    """Draw how often pixels are defects by their probability, before and after the temperature; return files' names."""
    if found.logits is None or learnt.temperature is None:
        return []
    curves = {}
    for channel, name in enumerate(names):
        scale = learnt.temperature.temperature[channel]
        curves[name] = calibration.reliability(found.logits, channel)
        curves[f"{name}, temperature {scale:.2f}"] = calibration.reliability(found.logits, channel, temperature=scale)
    return [calibration.draw(out_dir / "reliability.png", curves).name]


def _learnt_details(found: Found, learnt: Learnt, names: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if learnt.cleanings:
        made["cleaning"] = {
            name: dataclasses.asdict(choice) for name, choice in zip(names, learnt.cleanings, strict=True)
        }
    if learnt.temperature is not None and found.logits is not None:
        scales = learnt.temperature.temperature
        ece = {
            name: {
                "ece": calibration.reliability(found.logits, channel).ece(),
                "ece_scaled": calibration.reliability(found.logits, channel, temperature=scales[channel]).ece(),
            }
            for channel, name in enumerate(names)
        }
        made["calibration"] = {"learnt": learnt.temperature.record(), "classes": ece}
    return made


def _with_names(scored: Evaluation, other: Evaluation, names: Mapping[str, str]) -> Evaluation:
    """Return an evaluation with some scores of another, or of itself, by other names."""

    def taken(values: Mapping[str, Any]) -> dict[str, Any]:
        return {new: values[old] for old, new in names.items() if old in values}

    return dataclasses.replace(
        scored,
        metrics={**scored.metrics, **taken(other.metrics)},
        intervals={**scored.intervals, **taken(other.intervals)},
        resamples={**scored.resamples, **taken(other.resamples)},
    )
