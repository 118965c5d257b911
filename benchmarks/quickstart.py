"""The README's first command, from the question to the report; its search next to a script with stock Ray Tune.

`wall_s` is the whole command. `search_over_stock` compares the searches alone on the same space, trials and epochs:
from the question for the first trial to the last trial's end, start of processes included, start of Ray excluded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError, _searches
from search import spec_file
from search.record import StudyPaths
from search.study import Study

TINY = {"assignments": ("search.trials=2", "fixed.epochs=2", "stopping.min_epochs=1", "promotion.k=1")}


def measure(assignments: tuple[str, ...] = (), timeout_s: float = 1800.0) -> dict[str, Any]:
    """Return the seconds of the whole command, what it found, and how its search compares."""
    with tempfile.TemporaryDirectory() as folder:
        content = _searches.resolved("nuclei.yaml", assignments)
        content["data"] = {**content.get("data", {}), "cache": f"{folder}/cache"}
        space = _searches.write_space(Path(folder) / "nuclei.yaml", content)
        wall_s = _tune(space, Path(folder) / "runs", timeout_s)
        ours = _found(space, Path(folder) / "runs")
        stock = _searches.stock("nuclei", space=space, folder=f"{folder}/stock")
    return {
        "wall_s": round(wall_s, 1),
        **ours,
        "stock_search_s": round(stock["wall_s"], 1),
        "stock_epochs": stock["epochs"],
        "stock_test_mean_iou": round(stock["test_mean_iou"], 4),
        "search_over_stock": round(ours["search_s"] / stock["wall_s"], 3),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    stock = "a script with OptunaSearch and ASHA"
    return [
        (
            f"`make tune` after installation: {result['trials']} trials, promotion, evaluation, report",
            f"{result['wall_s']:.0f} s",
            "aim: at most 150 s",
        ),
        (
            "mean IoU of its best promoted trial on the test split",
            f"{result['test_mean_iou']:.3f}",
            f"{result['stock_test_mean_iou']:.3f} with {stock}; aim: at least 0.68",
        ),
        (
            "the search alone",
            f"{result['search_s']:.0f} s, {result['epochs']} epochs",
            f"{result['stock_search_s']:.0f} s, {result['stock_epochs']} epochs with {stock}: "
            f"{result['search_over_stock']:.2f} of it; aim: at most 0.7",
        ),
    ]


def _tune(space: Path, runs: Path, timeout_s: float) -> float:
    command = [sys.executable, "tune.py", "--space", str(space), "--runs", str(runs)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=_searches.ROOT, stdout=sys.stderr, timeout=timeout_s, check=False)
    if done.returncode:
        raise BenchmarkError(f"tune.py ended with exit code {done.returncode}")
    return time.monotonic() - began


def _found(space: Path, runs: Path) -> dict[str, Any]:
    """Return what the command left: counts, the score of its best model, and the seconds of the search."""
    spec = spec_file.load(str(space))
    paths = StudyPaths(runs / spec.name)
    records = Study(paths, spec).records()
    best = paths.model("best").resolve().name
    evaluation = json.loads((paths.evaluation(best) / "evaluation.json").read_text())
    return {
        "trials": len(records),
        "epochs": sum(len(record.epochs) for record in records),
        "test_mean_iou": round(evaluation["metrics"]["mean_iou"], 4),
        "search_s": round(_searches.span_s(records), 1),
    }
