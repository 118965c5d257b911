"""Twelve short trials of two workers, wall clock, the start of the gang included; stock builds a TorchTrainer for each.

Neither figure includes the start of Ray itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _gangs, _searches

TINY = {"trials": 2}


def measure(trials: int = 12, epochs: int = 2) -> dict[str, Any]:
    """Return both wall clocks, in seconds, and ours as a part of stock's."""
    with tempfile.TemporaryDirectory() as folder:
        _, records = _searches.search(Path(folder), _gangs.content(trials, epochs))
        ours = _searches.span_s(records)
    with tempfile.TemporaryDirectory() as folder:
        stock = float(_searches.stock("gang", trials=trials, epochs=epochs, folder=folder)["wall_s"])
    return {"wall_s": round(ours, 1), "stock_wall_s": round(stock, 1), "ours_over_stock": round(ours / stock, 3)}


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    against = f"{result['stock_wall_s']:.0f} s where each trial builds a TorchTrainer; aim: at most a fifth"
    return [("12 short trials of two workers", f"{result['wall_s']:.0f} s", against)]
