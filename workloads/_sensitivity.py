"""How far a network can be pruned before it is trained again: one value at a time, one pass over validation each.

    sensitivity.csv    parameter, value, score, params, gmacs
    sensitivity.png    the score of each block over its ratio

The scan proposes where a search should begin: for each loss of score that may be allowed, the strongest pruning of
every parameter that alone does not lose more.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import configuration
import durable
from segmentation import figures, pruning, training
from segmentation.pruning import Prune, plan, weights
from segmentation.pruning.plan import PlanError
from workloads._pruned import Job, PrunableConfig, costs, whole_network

PREFIX = "prune."
RATIOS = (0.25, 0.5, 0.75)
"""At which every block is tried."""
STEPS = 4
"""Values at which a searched parameter is tried."""
LOSSES = (0.01, 0.03, 0.1)
"""Shares of the score that a point may lose by one parameter alone."""
SCORE = "mean_dice_no_bg"
AMOUNTS = ("default", "global", "macs", "params")
"""Numbers that prune, besides the ratios of blocks; all others say how."""
DOWN = ("macs", "params")
"""Less of these prunes more; of all others more does."""


@dataclass(frozen=True)
class Row:
    """What one value does."""

    parameter: str
    value: float
    score: float
    params: float
    gmacs: float


def scan(config: PrunableConfig, job: Job, searched: Mapping[str, Sequence[float]], out_dir: Path) -> dict[str, Any]:
    """Write the table and the picture; return the score of the whole network, the rows, and points to begin with.

    config: with its parent's network, from `inherited`.
    searched: lowest and highest value of the numbers below `prune` that the search varies, by their names in it.
    """
    whole = whole_network(config, job)
    channels = pruning.trace(whole, *job.shape)
    seen = list(job.images())
    groups = pruning.blocks_of(config.prune, whole, channels)
    scores = pruning.scores_of(config.prune, whole, channels, groups, images=seen, seed=config.seed)
    device = training.resolve_device(config.device)

    def tried(name: str, value: float) -> Row | None:
        try:
            made = pruning.plan_from(_only(config.prune, name, value), channels, groups, scores)
        except PlanError:  # a budget that is out of reach
            return None
        smaller = pruning.apply(whole, channels, made)
        weights.recalibrate(smaller, seen, config.prune.recalibrate)
        return Row(name, value, _score(smaller, job, device), **costs(channels, plan.counts(channels, made)))

    searched = {name: bounds for name, bounds in searched.items() if _prunes(name)}
    base = _score(copy.deepcopy(whole), job, device)
    known = {f"{PREFIX}{name}" for name in groups}
    wanted = {*itertools.product(known, RATIOS), *_of_searched(searched, known)}
    rows = [row for name, value in sorted(wanted) if (row := tried(name, value)) is not None]
    _write(out_dir, rows, base)
    return {
        "score": base,
        "metric": f"val_{SCORE}",
        "rows": [asdict(row) for row in rows],
        "points": points(rows, base, searched),
        "figures": ["sensitivity.png"],
    }


def points(rows: Sequence[Row], base: float, searched: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Return values of the searched parameters to begin with, the gentlest first, none twice."""
    found: list[dict[str, float]] = []
    for loss in LOSSES:
        point = {}
        for name, (low, high) in searched.items():
            mine = [row for row in rows if row.parameter == name and low <= row.value <= high]
            fine = [row.value for row in mine if row.score >= (1 - loss) * base]
            strongest, weakest = (min, high) if _falls(name) else (max, low)
            point[name] = strongest(fine, default=weakest)
        if point and point not in found:
            found.append(point)
    return found


def _falls(name: str) -> bool:
    return name.removeprefix(PREFIX) in DOWN


def _prunes(name: str) -> bool:
    """Return whether a number below `prune` makes channels go, as ratios and budgets do."""
    own = name.removeprefix(PREFIX)
    return own in AMOUNTS or own not in configuration.fields(Prune)


def _only(prune: Prune, name: str, value: float) -> Prune:
    """Return the configuration in which one value alone prunes."""
    nothing = dataclasses.replace(prune, default=0.0, global_=0.0, macs=1.0, params=1.0, plan=None, blocks={})
    own = name.removeprefix(PREFIX)
    if own in AMOUNTS:
        return configuration.replace(nothing, {own: value})
    return dataclasses.replace(nothing, blocks={own: value})


def _of_searched(searched: Mapping[str, Sequence[float]], known: set[str]) -> Iterator[tuple[str, float]]:
    """Yield values over each range, its ends among them; of a block, which is tried anyway, the upper end alone."""
    for name, (low, high) in searched.items():
        between = np.linspace(low, high, STEPS)[1:-1]
        over = (high,) if name in known else (low, *(round(float(value), 4) for value in between), high)
        yield from ((name, value) for value in over)


def _score(model: nn.Module, job: Job, device: torch.device) -> float:
    """Return the score of a network that is moved to the device and may not be used afterwards."""
    with torch.inference_mode():
        return float(job.score(model.to(device).eval(), "validation").get(SCORE, 0.0))


def _write(out_dir: Path, rows: Sequence[Row], base: float) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    durable.write(out_dir / "sensitivity.csv", text.getvalue())
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        line = lines.setdefault(row.parameter.removeprefix(PREFIX), [(0.0, base)] if not _falls(row.parameter) else [])
        line.append((row.value, row.score))
    figures.lines(out_dir / "sensitivity.png", lines, title="pruned, not trained again", xlabel="value", ylabel=SCORE)
