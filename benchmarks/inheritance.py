"""Search pruning ratios with inherited weights and from scratch, and time both to the same hypervolume.

The space that is shipped, `acdc_pruning.yaml`, and the same seeds: in one search every trial inherits the weights of a
parent and tunes them for a few epochs; in the other every trial trains its pruned network from fresh weights for as
many epochs as that parent had. What needs a parent (which importance, which mode) is not searched there. The
hypervolume is that of foreground Dice and of the share of the parent's GMACs that is saved, on validation. The time is
from the start of the search to the end of the trial that reaches what both searches reach: `with_parent` counts it all,
the parent's training too; `time_ratio_to_scratch` counts from when the parent is there, its scan included.

Generated hearts without `root`, the folder of ACDC:

    python -m benchmarks inheritance --set root=DIR
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import configuration
from benchmarks import _searches
from search.record import TrialRecord
from workloads import acdc

SPACE = "acdc_pruning.yaml"
TINY = {"seeds": 1, "trials": 2, "epochs": 2, "tuned": 1, "size": 48}
Point = tuple[float, float, float]
"""Seconds since the start, Dice, share of the MACs that are saved."""


def measure(
    seeds: int = 2, trials: int = 0, epochs: int = 0, tuned: int = 0, size: int = 0, root: str = ""
) -> dict[str, Any]:
    """Return the time to the same hypervolume with inheritance over that from scratch, the median over seeds.

    trials, epochs, tuned, size: how many trials, epochs of the parent and epochs of a trial, and the side of the
    slices in pixels; 0 is what the space says.
    root: the folder of ACDC; generated hearts without one.
    """
    rows = []
    with _searches.ray_up():
        for seed in range(seeds):
            space = _space(seed, trials, epochs, tuned, size, root)
            whole = _whole_gmacs(space)
            inherited, parent_s = _points(space, whole)
            scratch, _ = _points(_from_scratch(space, whole), whole)
            same = min(hypervolume(inherited), hypervolume(scratch))
            whole_s, scratch_s = seconds_to(inherited, same), seconds_to(scratch, same)
            rows.append(
                {
                    "seed": seed,
                    "time_ratio_to_scratch": round((whole_s - parent_s) / scratch_s, 4),
                    "with_parent": round(whole_s / scratch_s, 4),
                    "seconds": round(whole_s, 1),
                    "seconds_scratch": round(scratch_s, 1),
                    "parent_seconds": round(parent_s, 1),
                    "hypervolume": round(hypervolume(inherited), 4),
                    "hypervolume_scratch": round(hypervolume(scratch), 4),
                }
            )
            _searches.say(str(rows[-1]))
    return {
        "time_ratio_to_scratch": statistics.median(row["time_ratio_to_scratch"] for row in rows),
        "with_parent": statistics.median(row["with_parent"] for row in rows),
        "data": "ACDC" if root else "generated hearts",
        "trials": space["search"]["trials"],
        "rows": rows,
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    seeds = ", ".join(str(row["seed"]) for row in result["rows"])
    volumes = ", ".join(f"{row['hypervolume']:.3f}/{row['hypervolume_scratch']:.3f}" for row in result["rows"])
    return [
        (
            f"search over pruning ratios, inherited weights, {result['trials']} trials, {result['data']}: time to the "
            f"hypervolume that both reach, scan included, seed {seeds}",
            f"{result['time_ratio_to_scratch']:.2f} of that from scratch; {result['with_parent']:.2f} with training "
            "the parent",
            f"hypervolumes {volumes}; aim: at most a third",
        )
    ]


def _space(seed: int, trials: int, epochs: int, tuned: int, size: int, root: str) -> dict[str, Any]:
    """Return the shipped space with a seed, and with what was asked to be otherwise."""
    space = _searches.resolved(SPACE)
    space["search"] |= {"seed": seed} | ({"trials": trials} if trials else {})
    space["parent"]["train"] |= {"epochs": epochs, "rewind_epoch": epochs // 2} if epochs else {}
    space["fixed"] |= {"epochs": tuned} if tuned else {}
    space["data"] |= ({"size": size} if size else {}) | ({"root": root} if root else {})
    space["promotion"] = {"rule": "pareto", "k": 1}
    return space


def _from_scratch(space: dict[str, Any], whole_gmacs: float) -> dict[str, Any]:
    """Return the same search without a parent: each trial trains as long as the parent did."""
    needs_parent = ("prune.importance", "prune.mode")
    limit = float(space["constraints"][0].removeprefix("macs <= ").removesuffix(" * parent"))
    return {
        **{name: section for name, section in space.items() if name != "parent"},
        "parameters": {name: value for name, value in space["parameters"].items() if name not in needs_parent},
        "constraints": [f"macs <= {limit * whole_gmacs * 1e9:.0f}"],
        "fixed": {**space["fixed"], "epochs": space["parent"]["train"]["epochs"]},
    }


def _points(content: dict[str, Any], whole: float) -> tuple[list[Point], float]:
    """Return what each trial reached and when, in order of their ends; and the seconds until the parent was there."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        paths, records = _searches.search(Path(folder), content)
        parent_s = paths.pinned.stat().st_mtime - begun if paths.pinned.is_file() else 0.0
    ended = [record for record in records if record.finished is not None and record.values is not None]
    return sorted(_point(record, begun, whole) for record in ended), parent_s


def _point(record: TrialRecord, begun: float, whole: float) -> Point:
    assert record.finished is not None and record.values is not None
    dice, gmacs = record.values
    return record.finished.timestamp() - begun, dice, 1 - gmacs / whole


def _whole_gmacs(space: dict[str, Any]) -> float:
    data = {f"data.{name}": value for name, value in space["data"].items()}
    found: float = acdc.facts(configuration.build(acdc.Config, {**space["fixed"], **data}))["gmacs"]
    return found


def hypervolume(points: Sequence[Point]) -> float:
    """Return the area that is dominated by (Dice, share saved), from no Dice and nothing saved."""
    area, saved_before = 0.0, 0.0
    for _, dice, saved in sorted(points, key=lambda point: -point[1]):
        if saved > saved_before:
            area += dice * (saved - saved_before)
            saved_before = saved
    return area


def seconds_to(points: Sequence[Point], volume: float) -> float:
    """Return when the points, in the order of their times, first had this hypervolume together."""
    return next(
        (points[count - 1][0] for count in range(1, len(points) + 1) if hypervolume(points[:count]) >= volume - 1e-12),
        float("inf"),
    )
