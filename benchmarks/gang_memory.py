"""Memory that each further trial at the same time costs besides its workers, and a gang's growth over 50 trials.

Memory is what would be free if the processes ended (USS). The first figure is the difference of two gangs to one, over
all processes of Ray but the workers and those that are idle; stock's is the same with a TorchTrainer for each trial.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _gangs, _searches
from search.record import TrialRecord

TINY = {"trials": 3, "after": 1, "epoch_s": 0.5, "stock_epoch_s": 3.0}


def measure(trials: int = 55, after: int = 5, epoch_s: float = 2.0, stock_epoch_s: float = 6.0) -> dict[str, Any]:
    """Return MiB for each trial, ours and stock's, and how much larger a gang is in the end than after its fifth trial.

    Args:
        trials: that one gang runs, one after another.
        after: trials after which growth counts.
        epoch_s: length of an epoch while two gangs are compared with one.
        stock_epoch_s: the same with stock, whose trials take longer to start.
    """
    with _searches.ray_up():
        one, two = (_control(count, epoch_s) for count in (1, 2))
        growth = _growth(trials, after)
    stock = [_stock(count, stock_epoch_s) for count in (1, 2)]
    return {
        "control_mib_per_trial": round(two - one, 1),
        "growth_after_50": round(growth, 4),
        "stock_control_mib_per_trial": round(stock[1] - stock[0], 1),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = f"{result['stock_control_mib_per_trial']:.0f} MiB with a TorchTrainer for each"
    return [
        (
            "memory of each further trial at the same time, besides its workers",
            f"{result['control_mib_per_trial']:.0f} MiB",
            f"{stock}; aim: at most 143 MiB (150 MB)",
        ),
        ("growth of a gang from its 5th to its 55th trial", f"{result['growth_after_50']:.1%}", "aim: at most 5 %"),
    ]


def _control(slots: int, epoch_s: float) -> float:
    """Return the MiB of all that is no worker while so many gangs are at work."""
    content = _gangs.content(slots, epochs=5, epoch_s=epoch_s, slots=slots, cpus_per_worker=1.0 / slots)
    with tempfile.TemporaryDirectory() as folder, _gangs.Watch() as watch:
        _searches.search(Path(folder), content)
    full = [control for _, control, _, ranks in watch.seen if ranks == slots * _gangs.RANKS]
    # Gangs come up one after the other; what was seen while the last one started is not yet what they take.
    return statistics.median(full[len(full) // 3 :])


def _growth(trials: int, after: int) -> float:
    """Return how much larger the workers of a gang are after the last trial than after an early one."""
    with tempfile.TemporaryDirectory() as folder, _gangs.Watch(0.2) as watch:
        _, records = _searches.search(Path(folder), _gangs.content(trials, epoch_s=0.2))
    early, late = (_around(watch, records[number - 1]) for number in (after, trials))
    return late / early - 1


def _around(watch: _gangs.Watch, record: TrialRecord) -> float:
    """Return the workers' memory near a trial's end."""
    assert record.finished is not None
    at = record.finished.timestamp()
    nearest = sorted((seen for seen in watch.seen if seen[3] == _gangs.RANKS), key=lambda seen: abs(seen[0] - at))
    return statistics.median(ranks for _, _, ranks, _ in nearest[:3])


def _stock(concurrent: int, epoch_s: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        found = _searches.stock(
            "gang", trials=concurrent, epochs=5, epoch_s=epoch_s, concurrent=concurrent, folder=folder
        )
    return float(found["control_mib"])
