"""From a trial's last training step to the next trial's first, in the same slot; stock starts a process for each.

In between lie, for us, the checkpoint, the committed outcome, the report, the study's record and the next question; for
stock, the report, the end of the process, and a new one that imports torch and timm. One slot; trials are long
enough that the next is not asked ahead. Medians; what comes before the first trial's end is warm-up.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import _searches
from search import epochs

TINY = {"trials": 4, "stock_trials": 2, "epoch_s": 0.01}

Trial = tuple[float, float]
"""When its first and its last step ran, seconds since 1970."""


def measure(trials: int = 30, stock_trials: int = 8, epoch_s: float = 0.25) -> dict[str, Any]:
    """Return the medians, in seconds."""
    ours = statistics.median(gaps(_ours(trials, epoch_s))[1:])
    with tempfile.TemporaryDirectory() as folder:
        found = _searches.stock("trial_start", trials=stock_trials, epoch_s=epoch_s, folder=folder)
    stock = statistics.median(gaps(found["trials"]))
    return {
        "first_step_s": round(ours, 4),
        "stock_first_step_s": round(stock, 3),
        "stock_over_ours": round(stock / ours, 1),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = f"{result['stock_first_step_s']:.2f} s with a stock function trainable; aim: at most 0.05 s"
    return [("last training step of a trial to first of the next", f"{result['first_step_s']:.3f} s", stock)]


def gaps(trials: Sequence[Trial]) -> list[float]:
    """Return the seconds between each trial's last step and the next trial's first, of trials in one slot."""
    return [after[0] - before[1] for before, after in pairwise(sorted(tuple(trial) for trial in trials))]


def _ours(trials: int, epoch_s: float) -> list[Trial]:
    content = {
        "workload": "benchmarks._training",
        "objective": {"metric": "loss", "mode": "min"},
        "parameters": {"lr": {"type": "float", "low": 0.01, "high": 1.0, "log": True}},
        "fixed": {"epoch_s": epoch_s},
        "search": {"trials": trials},
        "stopping": {"rule": "none"},
        "resources": {"slots": 1},
        "promotion": {"k": 1},
    }
    return ran(content)


def ran(content: Mapping[str, Any]) -> list[Trial]:
    """Run a search and return when the steps of its trials ran, as its workload reports."""
    with tempfile.TemporaryDirectory() as folder:
        paths, records = _searches.search(Path(folder), content)
        last = [epochs.read(paths.trial(record.number))[-1].metrics for record in records]
    return [(metrics["first_step"], metrics["last_step"]) for metrics in last]
