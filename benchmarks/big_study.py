"""Go on with a study of 10,000 finished trials: time from the command to the next question, and the driver's memory.

The study is made through our own interface without Ray. Then `tune.py` runs 20 more trials: `start_s` is from the start
of its process to the first new trial (Python, Ray and the study included), `driver_peak_gib` the most memory it ever
held, up to the report.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import configuration
from benchmarks import BenchmarkError, _memory, _searches
from search import planning, spec_file
from search.record import DEFAULTS, StudyPaths
from search.spec import SearchSpec
from search.study import Outcome, Study
from workloads import toy

TINY = {"trials": 30, "more": 8}
EPOCHS = 9
END_S = 900.0
"""Longest time of the command."""


def measure(trials: int = 10_000, more: int = 20) -> dict[str, Any]:
    """Return how long the start takes, and the most memory that the driver held."""
    content = {**_searches.TOY, "fixed": {"epochs": EPOCHS}, "search": {"trials": trials + more, "sampler": "tpe"}}
    content["parameters"] = {**content["parameters"], "noise": {"type": "float", "low": 0.0, "high": 0.1}}
    with tempfile.TemporaryDirectory() as folder:
        space = _searches.write_space(Path(folder) / "big.yaml", content)
        spec, paths = spec_file.load(str(space)), StudyPaths(Path(folder) / "big")
        fill(paths, spec, trials)
        began = time.time()
        peak_gib = _peak_gib([sys.executable, "tune.py", "--space", str(space), "--runs", folder])
        first = Study(paths, spec).record(trials)
        assert first.started is not None
        return {
            "trials": trials,
            "driver_peak_gib": round(peak_gib, 3),
            "start_s": round(first.started.timestamp() - began, 2),
        }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    trials = f"{result['trials']:,} finished trials"
    return [
        (
            f"from the command to the next trial, {trials} in the study",
            f"{result['start_s']:.1f} s",
            "aim: at most 12 s",
        ),
        (f"peak memory of the driver, {trials}", f"{result['driver_peak_gib']:.2f} GiB", "aim: at most 0.8 GiB"),
    ]


def fill(paths: StudyPaths, spec: SearchSpec, trials: int) -> None:
    """Make a study in which this many trials have finished, one in three of them stopped early."""
    paths.folder.mkdir(parents=True)
    drawn = dataclasses.replace(spec, search=dataclasses.replace(spec.search, sampler="random", trials=trials))
    study = Study(paths, drawn)
    study.enqueue(planning.defaults(spec, configuration.to_values(toy.Config()))[0], DEFAULTS)
    for done in range(trials):
        task = study.ask()
        assert task is not None
        study.tell(task.number, _outcome(task.config, stopped=done % 3 == 2))
        if (done + 1) % 1000 == 0:
            _searches.say(f"{done + 1} of {trials} trials are in the study")


def _outcome(values: Mapping[str, Any], stopped: bool) -> Outcome:
    """Return how a trial of the toy ends; its checkpoint has been deleted since, like most in a long study."""
    config = configuration.build(toy.Config, values)
    scores = {epoch: (toy.curve(config, epoch),) for epoch in range(1, 4 if stopped else EPOCHS + 1)}
    best = max(scores, key=lambda epoch: scores[epoch])
    score = scores[best][0]
    return Outcome(
        state="stopped" if stopped else "complete",
        reason="stopped at the rung of epoch 3" if stopped else "finished",
        epochs=scores,
        best_epoch=best,
        metrics={"score": score, "loss": 1 - score, "cost": float(config.width)},
        slot_s=0.1 * len(scores),
    )


def _peak_gib(command: list[str]) -> float:
    """Run a command to its end; return the most memory that its process held."""
    driver = subprocess.Popen(command, cwd=_searches.ROOT, stdout=sys.stderr)
    peak_kib, until = 0, time.monotonic() + END_S
    try:
        while driver.poll() is None and time.monotonic() < until:
            peak_kib = max(peak_kib, _memory.kib("VmHWM", driver.pid))
            time.sleep(0.05)
    finally:
        if driver.poll() is None:
            psutil.Process(driver.pid).terminate()
    if driver.wait(60):
        raise BenchmarkError(f"tune.py ended with exit code {driver.returncode}")
    return peak_kib / 2**20
