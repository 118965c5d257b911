"""Slot-seconds that each of 500 one-epoch toy trials costs with everything on: study, commits, TensorBoard.

Two slots; slots x seconds / trials, from the question for the first trial to the last trial's end, which includes the
start of the slots and excludes that of Ray. Stock: function trainables with OptunaSearch and the default loggers,
fewer of them, since each takes a process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _searches

TINY = {"trials": 8, "stock_trials": 2}
SLOTS = 2


def measure(trials: int = 500, stock_trials: int = 30) -> dict[str, Any]:
    """Return slot-seconds a trial, with the sampler that costs nothing and with the default one."""
    with _searches.ray_up():
        ours = {f"slot_s_per_trial_{sampler}": round(_ours(sampler, trials), 4) for sampler in ("random", "tpe")}
    with tempfile.TemporaryDirectory() as folder:
        found = _searches.stock("toy", trials=stock_trials, slots=SLOTS, folder=folder)
    return {**ours, "stock_slot_s_per_trial": round(SLOTS * found["wall_s"] / stock_trials, 3)}


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = f"{result['stock_slot_s_per_trial']:.2f} with stock function trainables"
    return [
        (
            f"slot-seconds of bookkeeping a trial, {sampler} sampler",
            f"{result[f'slot_s_per_trial_{sampler}']:.3f}",
            f"{stock}; aim: at most {aim}",
        )
        for sampler, aim in (("random", 0.05), ("tpe", 0.1))
    ]


def _ours(sampler: str, trials: int) -> float:
    content = {
        **_searches.TOY,
        "fixed": {"epochs": 1},
        "search": {"trials": trials, "sampler": sampler},
        "resources": {"slots": SLOTS},
    }
    with tempfile.TemporaryDirectory() as folder:
        _, records = _searches.search(Path(folder), content)
    return SLOTS * _searches.span_s(records) / trials
