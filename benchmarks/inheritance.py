"""Search pruning ratios with inherited weights and from scratch, and time both to the same hypervolume.

The same space on generated hearts, the same seeds: in one search every trial inherits the weights of a parent and tunes
them for a few epochs; in the other every trial trains its pruned network from fresh weights for as many epochs as that
parent had. The hypervolume is that of foreground Dice and of the share of the parent's GMACs that is saved, on
validation. The time is from the start of the search, the scan of the parent included, to the end of the trial that
reaches what both searches reach; `with_parent` counts the training of the parent as well.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _searches
from search.record import TrialRecord

TINY = {"seeds": 1, "trials": 2, "epochs": 2, "tuned": 1, "size": 48}
BLOCKS = ("encoders.0", "encoders.1", "bottleneck", "decoders.1", "decoders.3")
Point = tuple[float, float, float]
"""Seconds since the start, Dice, share of the MACs that are saved."""


def measure(seeds: int = 1, trials: int = 20, epochs: int = 20, tuned: int = 4, size: int = 64) -> dict[str, Any]:
    """Return the time to the same hypervolume with inheritance over that from scratch, the median over seeds."""
    ratios, whole_ratios, volumes = [], [], []
    with _searches.ray_up():
        for seed in range(seeds):
            inherited, parent_s = _points(_space(seed, trials, tuned, size, epochs))
            scratch, _ = _points(_space(seed, trials, epochs, size, 0))
            same = min(hypervolume(inherited), hypervolume(scratch))
            whole_s, scratch_s = seconds_to(inherited, same), seconds_to(scratch, same)
            ratios.append((whole_s - parent_s) / scratch_s)
            whole_ratios.append(whole_s / scratch_s)
            volumes.append((hypervolume(inherited), hypervolume(scratch)))
            _searches.say(f"seed {seed}: ratio {ratios[-1]:.3f}, hypervolumes {volumes[-1]}")
    return {
        "time_ratio_to_scratch": round(statistics.median(ratios), 4),
        "with_parent": round(statistics.median(whole_ratios), 4),
        "hypervolume": round(statistics.median(volume for volume, _ in volumes), 4),
        "hypervolume_scratch": round(statistics.median(volume for _, volume in volumes), 4),
        "trials": trials,
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    return [
        (
            f"search over pruning ratios, inherited weights, {result['trials']} trials: time to the hypervolume "
            "that both reach, scan included",
            f"{result['time_ratio_to_scratch']:.2f} of that from scratch; {result['with_parent']:.2f} with training "
            "the parent",
            f"hypervolumes {result['hypervolume']:.3f} and {result['hypervolume_scratch']:.3f}; aim: at most a third",
        )
    ]


def _space(seed: int, trials: int, epochs: int, size: int, parent_epochs: int) -> dict[str, Any]:
    parent = {"parent": {"train": {"epochs": parent_epochs, "lr": 5e-3}}} if parent_epochs else {}
    return {
        "workload": "acdc",
        "objective": [{"metric": "val_mean_dice_no_bg", "mode": "max"}, {"metric": "gmacs", "mode": "min"}],
        **parent,
        "parameters": {f"prune.{block}": {"type": "float", "low": 0.0, "high": 0.8} for block in BLOCKS},
        "fixed": {
            "network.name": "unet",
            "network.widths": [16, 32],
            "batch_size": 8,
            "lr": 5e-3,
            "lr_schedule": "onecycle",
            "epochs": epochs,
        },
        "data": {"size": size, "synthetic.patients": 16},
        "search": {"trials": trials, "seed": seed},
        "stopping": {"rule": "none"},
        "promotion": {"rule": "pareto", "k": 1},
    }


def _points(content: dict[str, Any]) -> tuple[list[Point], float]:
    """Return what each trial reached and when, in order of their ends; and the seconds until the parent was there."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        paths, records = _searches.search(Path(folder), content)
        parent_s = paths.pinned.stat().st_mtime - begun if paths.pinned.is_file() else 0.0
    whole = _whole_gmacs(content)
    ended = [record for record in records if record.finished is not None and record.values is not None]
    return sorted(_point(record, begun, whole) for record in ended), parent_s


def _point(record: TrialRecord, begun: float, whole: float) -> Point:
    assert record.finished is not None and record.values is not None
    dice, gmacs = record.values
    return record.finished.timestamp() - begun, dice, 1 - gmacs / whole


def _whole_gmacs(content: dict[str, Any]) -> float:
    import configuration
    from workloads import acdc

    data = {f"data.{name}": value for name, value in content["data"].items()}
    found: float = acdc.facts(configuration.build(acdc.Config, {**content["fixed"], **data}))["gmacs"]
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
