"""From a trial's last training step to the next trial's first, two workers in the same gang; stock builds them anew.

In between lie, for us, the checkpoint, the committed outcome, the report, the study's record, the next question and the
order to both ranks; for stock, a Tune trial that builds a TorchTrainer for each. Medians; the first trial is warm-up.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from benchmarks import _gangs, _searches
from benchmarks.trial_start import gaps, ran

TINY = {"trials": 4, "deepspeed_trials": 3, "stock_trials": 2}


def measure(trials: int = 30, deepspeed_trials: int = 15, stock_trials: int = 5) -> dict[str, Any]:
    """Return the medians, in seconds."""
    with _searches.ray_up():
        ddp = statistics.median(gaps(ran(_gangs.content(trials)))[1:])
        deepspeed = statistics.median(
            gaps(ran(_gangs.content(deepspeed_trials, strategy="deepspeed", zero_stage=1)))[1:]
        )
    with tempfile.TemporaryDirectory() as folder:
        stock = statistics.median(gaps(_searches.stock("gang", trials=stock_trials, folder=folder)["trials"]))
    return {
        "ddp_first_step_s": round(ddp, 4),
        "deepspeed_first_step_s": round(deepspeed, 4),
        "stock_first_step_s": round(stock, 3),
        "stock_over_ours": round(stock / ddp, 1),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = f"{result['stock_first_step_s']:.1f} s where each trial builds a TorchTrainer"
    what = "last training step of a trial of two workers to first of the next"
    return [
        (f"{what}, DDP", f"{result['ddp_first_step_s']:.3f} s", f"{stock}; aim: at most 0.1 s"),
        (f"{what}, DeepSpeed ZeRO 1", f"{result['deepspeed_first_step_s']:.3f} s", "aim: at most 0.6 s"),
    ]
