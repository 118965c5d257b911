"""From a network and batches to counts of each image, and from counts to an Evaluation with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segmentation import bootstrap, metrics, ranks
from segmentation.epoch import Evaluation
from segmentation.metrics import Convention, Counts, Scores

FAMILIES = ("iou", "dice", "precision", "recall")
MAJORITY = {"mean_iou": "mean_iou_majority", "accuracy": "accuracy_majority"}
"""Scores beside which those of calling everything one class are told."""


@dataclass(frozen=True)
class ImageScores:
    """What is known of each image scored: plain arrays whose order is that of `index`."""

    index: npt.NDArray[np.int64]
    """(N,), the sample's number in its data set."""
    counts: Counts
    """(N, K, 4), see segmentation.metrics."""
    losses: npt.NDArray[np.float64]
    """(N,), nan where no loss was asked for."""


def score_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    classes: int,
    *,
    multilabel: bool,
    threshold: float | tuple[float, ...] = 0.5,
    ignore_index: int = 255,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> ImageScores:
    """Return counts, and losses where one is given, of every image.

    `batches` yields image (B, C, H, W), mask (B, H, W) or (B, K, H, W), and index (B,), on the network's device.
    `loss` gives one number an image, see `losses.build_per_image`; `watch` is shown logits and index of each batch. The
    network is left in evaluation mode.
    """
    model.eval()
    parts = [empty(classes)]
    with torch.inference_mode():
        for image, mask, index in batches:
            logits = model(image)  # (B, K, H, W)
            found = metrics.count(logits, mask, multilabel=multilabel, threshold=threshold, ignore_index=ignore_index)
            if watch is not None:
                watch(logits, index)
            losses = np.full(len(index), np.nan) if loss is None else loss(logits, mask).double().cpu().numpy()
            parts.append(ImageScores(index.cpu().numpy(), found, losses))
    return merge(parts)


def empty(classes: int) -> ImageScores:
    """Return the scores of no image at all."""
    return ImageScores(np.empty(0, np.int64), np.empty((0, classes, 4), np.int64), np.empty(0))


def merge(parts: Sequence[ImageScores]) -> ImageScores:
    """Return the scores of all parts in order of index, each image once however often it was scored.

    Samplers that deal images to several processes repeat some to fill up; counting those twice would change the score.
    """
    index = np.concatenate([part.index for part in parts])
    order = np.unique(index, return_index=True)[1]
    counts = np.concatenate([part.counts for part in parts])
    losses = np.concatenate([part.losses for part in parts])
    return ImageScores(index[order], counts[order], losses[order])


def gather(scores: ImageScores) -> ImageScores:
    """Return the merged scores of all processes, on every one of them; the scores themselves where there is one."""
    parts = ranks.gather(scores)
    return merge(parts) if len(parts) > 1 else scores


def summary(
    scores: ImageScores,
    names: Sequence[str],
    *,
    multilabel: bool,
    convention: Convention | None = None,
    excluded: Sequence[str] = (),
    prefix: str = "",
) -> dict[str, float]:
    """Return the scores of all images, named as by `evaluation` behind a prefix, without those that are undefined.

    For an epoch's validation: its `loss`, where there is one, is the mean over images.
    """
    convention = convention or Convention()
    columns = _columns(scores.counts, names, convention, excluded, multilabel=multilabel).sum(0)
    values = _scores(columns, names, convention, excluded, multilabel=multilabel)
    if not np.isnan(scores.losses).all():
        values = {"loss": scores.losses.mean(), **values}
    return {f"{prefix}{name}": float(value) for name, value in values.items() if not np.isnan(value)}


def evaluation(
    scores: ImageScores,
    groups: Sequence[str],
    names: Sequence[str],
    *,
    multilabel: bool,
    convention: Convention | None = None,
    excluded: Sequence[str] = (),
    replicates: int = bootstrap.REPLICATES,
    seed: int = 0,
    details: Mapping[str, Any] | None = None,
    majority: int | None = None,
) -> Evaluation:
    """Return scores with 95 % bootstrap intervals over groups.

    Metrics: mean_iou, iou_NAME and the same of dice, precision and recall; accuracy, and beside it accuracy_background,
    that of calling everything background; for classes that exclude each other also mean_iou_no_bg and so on.
    `groups` names the group of each image, and `names` each class; classes `excluded` score None and stay out of means.
    With `majority`, the class most frequent in training (see `metrics.majority`), also mean_iou_majority and
    accuracy_majority, of calling everything that class: what a score must beat where there is no background.
    """
    if majority is not None and multilabel:
        raise ValueError("majority: labels may overlap, so that no one of them is everywhere; leave it out")
    convention = convention or Convention()
    labels, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)

    def scored(counts: Counts) -> tuple[dict[str, Scores], ...]:
        """Return scores of all images, of each group, and of each replicate."""
        columns = _columns(counts, names, convention, excluded, multilabel=multilabel)
        of_group = np.zeros((len(labels), *columns.shape[1:]))
        np.add.at(of_group, member, columns)
        drawn = bootstrap.resample_sums(of_group, replicates=replicates, seed=seed)
        return tuple(
            _scores(sums, names, convention, excluded, multilabel=multilabel)
            for sums in (of_group.sum(0), of_group, drawn)
        )

    values, each, resamples = scored(scores.counts)
    if majority is not None:
        constant = scored(metrics.counts_calling(majority, scores.counts))
        for found, blind in zip((values, each, resamples), constant, strict=True):
            found |= {name: blind[like] for like, name in MAJORITY.items()}
        details = {"majority": names[majority], **(details or {})}
    told = conventions(names, convention, multilabel=multilabel)
    told |= {name: told[like] for like, name in MAJORITY.items() if name in values}
    return Evaluation(
        metrics={name: defined(value) for name, value in values.items()},
        intervals={name: bootstrap.interval(draws) for name, draws in resamples.items() if not np.isnan(draws).all()},
        # An undefined replicate has no JSON; the metric then has an interval, and no paired comparison.
        resamples={name: draws.tolist() for name, draws in resamples.items() if not np.isnan(draws).any()},
        groups={
            str(label): {name: defined(column[row]) for name, column in each.items()}
            for row, label in enumerate(labels)
        },
        details={
            "conventions": told,
            "class_shares": _class_shares(scores.counts, names),
            "excluded": list(excluded),
            "images": len(scores.index),
            "bootstrap": {"replicates": replicates, "seed": seed, "groups": len(labels)},
            **(details or {}),
        },
    )


def conventions(names: Sequence[str], convention: Convention, *, multilabel: bool) -> dict[str, dict[str, str]]:
    """Return how each metric is made: its pooling, whether background counts, what an empty class scores."""
    made = {}
    for family in FAMILIES:
        for name in (f"mean_{family}", *(f"{family}_{name}" for name in names)):
            made[name] = convention.record()
        if not multilabel:
            made[f"mean_{family}_no_bg"] = {**convention.record(), "background": "out"}
    for name in ("accuracy", "accuracy_background"):
        made[name] = Convention(pooling="pixel", background="in", empty="nan").record()
    return made


def _class_shares(counts: Counts, names: Sequence[str]) -> dict[str, float | None]:
    """Return the share of pixels that each class covers in the masks: what makes accuracy look good."""
    shares = metrics.class_shares(counts.sum(0))
    return {name: defined(share) for name, share in zip(names, shares, strict=True)}


def _columns(
    counts: Counts, names: Sequence[str], convention: Convention, excluded: Sequence[str], *, multilabel: bool
) -> Scores:
    """Return all that scores are made of and that can be summed over images: (N, K, 4), or (N, K, 12).

    The columns are the counts and, pooled by image, each family's score and whether it is defined.
    """
    if counts.shape[1] != len(names):
        raise ValueError(f"got counts of {counts.shape[1]} classes and {len(names)} names: {', '.join(names)}")
    if multilabel and convention.background == "out":
        raise ValueError("background: labels that may overlap have no background class to leave out; write in")
    if unknown := sorted(set(excluded) - set(names)):
        raise ValueError(f"excluded: no class {', '.join(unknown)}; the classes are {', '.join(names)}")
    columns = [counts.astype(np.float64)]
    if convention.pooling == "image":
        each = [metrics.fill_empty(metrics.SCORES[family](counts), convention.empty) for family in FAMILIES]
        columns += [np.stack([np.nan_to_num(score), ~np.isnan(score)], axis=-1) for score in each]
    return np.concatenate(columns, axis=-1)


def _scores(
    columns: Scores, names: Sequence[str], convention: Convention, excluded: Sequence[str], *, multilabel: bool
) -> dict[str, Scores]:
    """Return every score of summed columns (..., K, M), each of shape (...)."""
    hidden = np.isin(names, list(excluded))  # (K,)
    found: dict[str, Scores] = {}
    for place, family in enumerate(FAMILIES):
        each = np.where(hidden, np.nan, _family(columns, place, convention))
        found[f"mean_{family}"] = metrics.mean_over_classes(each, convention)
        if not multilabel:
            found[f"mean_{family}_no_bg"] = metrics.mean_over_classes(each, Convention(background="out"))
        found |= {f"{family}_{name}": each[..., column] for column, name in enumerate(names)}
    counts = columns[..., ~hidden, :4] if multilabel else columns[..., :4]
    found["accuracy"] = metrics.pixel_accuracy(counts, multilabel=multilabel)
    found["accuracy_background"] = metrics.background_accuracy(counts, multilabel=multilabel)
    return found


def _family(columns: Scores, place: int, convention: Convention) -> Scores:
    """Return the score of each class, (..., K)."""
    if convention.pooling == "pixel":
        return metrics.fill_empty(metrics.SCORES[FAMILIES[place]](columns[..., :4]), convention.empty)
    total, defined = columns[..., 4 + 2 * place], columns[..., 5 + 2 * place]
    return np.asarray(total / np.where(defined > 0, defined, np.nan), dtype=np.float64)


def defined(value: Any) -> float | None:
    """Return a score as plain data; None where it is undefined."""
    return None if np.isnan(value) else float(value)
