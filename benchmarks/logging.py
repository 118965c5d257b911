"""20 toy trials of 200 epochs with TensorBoard on, over the same with it off; stock: its default loggers on and off.

Ours from the first epoch to the last trial's end, median of interleaved repetitions. Stock in one go each, the start of
its processes included, which makes its ratio smaller than that of the logging alone.
"""

from __future__ import annotations

import statistics
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import _searches
from search import epochs

TINY = {"trials": 2, "reports": 5, "repetitions": 1, "stock_trials": 2}
SLOTS = 2


def measure(trials: int = 20, reports: int = 200, repetitions: int = 5, stock_trials: int = 20) -> dict[str, Any]:
    """Return the ratios, and the seconds behind ours."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    with _searches.ray_up():
        for tensorboard in islice(cycle((True, False, False, True)), 2 * repetitions):
            taken[tensorboard].append(_ours(trials, reports, tensorboard))
            _searches.say(f"tensorboard {tensorboard}: {taken[tensorboard][-1]:.1f} s")
    on_s, off_s = statistics.median(taken[True]), statistics.median(taken[False])
    return {
        "on_over_off": round(on_s / off_s, 3),
        "on_s": round(on_s, 2),
        "off_s": round(off_s, 2),
        "stock_on_over_off": round(_stock_s(stock_trials, reports, True) / _stock_s(stock_trials, reports, False), 2),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = f"{result['stock_on_over_off']:.1f} x with stock Ray Tune's loggers; aim: at most 1.3 x"
    return [("20 trials x 200 reports, TensorBoard on over off", f"{result['on_over_off']:.2f} x", stock)]


def _ours(trials: int, reports: int, tensorboard: bool) -> float:
    content = {
        **_searches.TOY,
        "fixed": {"epochs": reports},
        "search": {"trials": trials, "sampler": "random"},
        "stopping": {"rule": "none"},
        "resources": {"slots": SLOTS},
        "tracking": {"tensorboard": tensorboard},
    }
    with tempfile.TemporaryDirectory() as folder:
        paths, records = _searches.search(Path(folder), content)
        first = min(epochs.read(paths.trial(record.number))[0].time for record in records)
    return max(record.finished.timestamp() for record in records if record.finished is not None) - first


def _stock_s(trials: int, reports: int, loggers: bool) -> float:
    environment = {} if loggers else {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        found = _searches.stock(
            "toy", environment=environment, trials=trials, epochs=reports, slots=SLOTS, folder=folder
        )
    return float(found["wall_s"])
