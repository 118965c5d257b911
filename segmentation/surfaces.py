"""How far the outlines of prediction and truth lie apart: HD95 and normalised surface Dice (NSD), by MONAI.

HD95 is the larger of the two 95th percentiles of the distances from one outline to the other. NSD is the share of both
outlines that lies within a tolerance of the other. Outlines are the voxels of a class that touch others, the volume's
edge included. Where a class is neither there nor predicted, both are undefined and left out. Where it is only one of
the two, HD95 is the volume's diagonal, the largest distance there could be, and NSD is 0.
Source: Maier-Hein et al. 2024, Metrics reloaded, arXiv:2206.01653.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from segmentation import bootstrap
from segmentation.epoch import Evaluation
from segmentation.evaluation import defined

Array = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]

FAMILIES = ("hd95", "nsd")
PERCENTILE = 95
CONVENTION = {"pooling": "volume", "background": "out", "empty": "nan"}
ONE_EMPTY = {"hd95": "diagonal", "nsd": "zero"}


def compare(predicted: Array, mask: Array, classes: int, *, spacing: Sequence[float], tolerance: float) -> Scores:
    """Return HD95 and NSD of each class but the background, (2, K - 1); nan where undefined.

    Args:
        predicted: (H, W) or (H, W, Z) class ids; of a single slice (Z = 1) the outlines are taken in its plane.
        mask: the same of the truth.
        classes: background included.
        spacing: distance between pixels along each axis, in mm or whatever the distances shall be in.
        tolerance: of NSD, in the same unit.
    """
    if predicted.shape != mask.shape or len(spacing) < predicted.ndim:
        raise ValueError(f"got shapes {predicted.shape} and {mask.shape} and spacing {tuple(spacing)}; they must agree")
    if mask.ndim == 3 and mask.shape[2] == 1:
        predicted, mask = predicted[..., 0], mask[..., 0]
    steps = tuple(spacing[: mask.ndim])
    diagonal = math.hypot(*(length * step for length, step in zip(mask.shape, steps, strict=True)))
    found = [_of_class(predicted == k, mask == k, steps, tolerance, diagonal) for k in range(1, classes)]
    return np.array(found, dtype=np.float64).reshape(classes - 1, len(FAMILIES)).T


def add(
    scored: Evaluation, outlines: Sequence[tuple[str, Scores]], names: Sequence[str], *, unit: str, tolerance: float
) -> Evaluation:
    """Return an evaluation with hd95_NAME, nsd_NAME and their means over classes added, and intervals over its groups.

    A class scores the mean over the volumes in which it is defined.

    Args:
        scored: of the same groups.
        outlines: of each volume, its group and what `compare` returned.
        names: of each class, background first.
        unit: of distances.
        tolerance: of NSD, in this unit.
    """
    groups, distances = zip(*outlines, strict=True)
    found = np.stack(distances)  # (V, 2, K - 1)
    labels, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    columns = np.stack([np.nan_to_num(found), ~np.isnan(found)], axis=-1)  # (V, 2, K - 1, 2)
    of_group = np.zeros((len(labels), *columns.shape[1:]))
    np.add.at(of_group, member, columns)
    draws = scored.details["bootstrap"]
    drawn = bootstrap.resample_sums(of_group, replicates=draws["replicates"], seed=draws["seed"])
    values, each, resamples = (_means(sums, names) for sums in (of_group.sum(0), of_group, drawn))
    known = {name: draw for name, draw in resamples.items() if not np.isnan(draw).all()}
    told = {family: {**CONVENTION, "one_empty": ONE_EMPTY[family], "unit": unit} for family in FAMILIES}
    told["nsd"] |= {"unit": "share", "tolerance": f"{tolerance:g} {unit}"}
    return dataclasses.replace(
        scored,
        metrics={**scored.metrics, **{name: defined(value) for name, value in values.items()}},
        intervals={**scored.intervals, **{name: bootstrap.interval(draw) for name, draw in known.items()}},
        resamples={**scored.resamples, **_whole(known)},
        groups={
            label: {**own, **{name: defined(column[list(labels).index(label)]) for name, column in each.items()}}
            for label, own in scored.groups.items()
        },
        details={
            **scored.details,
            "conventions": {**scored.details["conventions"], **{name: told[_family(name)] for name in values}},
            "volumes": len(found),
        },
    )


def _of_class(
    predicted: Array, mask: Array, spacing: tuple[float, ...], tolerance: float, diagonal: float
) -> tuple[float, float]:
    if not (predicted.any() or mask.any()):
        return math.nan, math.nan
    if not (predicted.any() and mask.any()):
        return diagonal, 0.0
    # Its import takes seconds that training need not pay.
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    one, other = (torch.from_numpy(np.ascontiguousarray(each))[None, None] for each in (predicted, mask))
    with warnings.catch_warnings():
        # MONAI 1.6 calls itself in a way that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(one, other, include_background=True, percentile=PERCENTILE, spacing=spacing)
        nsd = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=spacing)
    return float(hd95), float(nsd)


def _means(sums: Scores, names: Sequence[str]) -> dict[str, Scores]:
    """Return every score of summed columns (..., 2, K - 1, 2), each of shape (...)."""
    found: dict[str, Scores] = {}
    for place, family in enumerate(FAMILIES):
        total, count = sums[..., place, :, 0], sums[..., place, :, 1]
        each = total / np.where(count > 0, count, np.nan)
        there = ~np.isnan(each)
        whole = np.where(there, each, 0).sum(-1) / np.where(there.any(-1), there.sum(-1), np.nan)
        found[f"mean_{family}"] = np.asarray(whole)
        found |= {f"{family}_{name}": each[..., k] for k, name in enumerate(names[1:])}
    return found


def _whole(known: Mapping[str, Scores]) -> dict[str, list[float]]:
    """Return the replicates of scores that are defined in all of them; others have no JSON."""
    return {name: draw.tolist() for name, draw in known.items() if not np.isnan(draw).any()}


def _family(name: str) -> str:
    return next(family for family in FAMILIES if name.startswith((family, f"mean_{family}")))
