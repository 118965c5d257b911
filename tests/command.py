"""`python tune.py` as people type it, in a folder of its own; and what its study must hold at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search import spec_file
from search.record import StudyPaths
from search.study import Study, read_outcome
from workloads import toy

ROOT = Path(__file__).resolve().parent.parent
SPACE = """
workload: toy
objective: {metric: score, mode: max}
parameters:
  lr: {type: float, low: 1.0e-4, high: 1.0, log: true}
fixed: {epochs: 4, epoch_s: 0.1}
search: {sampler: random, trials: 30, seed: 1}
stopping: {rule: none}
promotion: {k: 2}
resources: {slots: 2}
"""
WAIT_S = 60.0


def _as_from_a_terminal() -> None:
    """Let SIGINT through: what a shell starts in the background, tests too, ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Tune:
    """`python tune.py` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.space = folder / "runs", folder / "mine.yaml"
        self.space.write_text(SPACE)
        self.paths = StudyPaths(self.runs / "mine")
        self.started: list[subprocess.Popen[str]] = []

    def arguments(self, *more: str) -> list[str]:
        return ["--space", str(self.space), "--runs", str(self.runs), *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "tune.py"), *self.arguments(*more)]
        # A session of its own: what a terminal sends to all, and what a kill leaves, stays apart from the tests.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_as_from_a_terminal,
        )
        self.started.append(process)
        return process

    def ended(self, number: int) -> bool:
        return len(self.results()) >= number

    def results(self) -> dict[str, int]:
        """Return when each trial that has ended was committed."""
        return {file.parent.name: file.stat().st_mtime_ns for file in self.runs.glob("mine/trials/*/result.json")}

    def holder(self) -> int | None:
        """Return the process that wrote last that it holds the study."""
        try:
            pid: int = json.loads(self.paths.lease.read_text())["pid"]
        except (OSError, ValueError):
            return None
        return pid

    def wait_for(self, process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not happened():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.02)


@contextlib.contextmanager
def tune_in(folder: Path) -> Iterator[Tune]:
    """Give a command its folder, and kill what is left of it."""
    made = Tune(folder)
    try:
        yield made
    finally:
        for process in made.started:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def check(command: Tune, trials: int) -> None:
    """Check that a study is whole: each trial ended once, with the numbers of its closed form."""
    records = Study(command.paths, spec_file.load(str(command.space))).records()
    assert [(record.number, record.state) for record in records] == [(n, "complete") for n in range(trials)]
    assert records[0].note == "defaults" and records[0].params == {"lr": toy.Config().lr}
    assert len({record.params["lr"] for record in records}) == trials
    for record in records:
        config = toy.Config(epochs=4, **record.params)
        assert record.epochs == {e: (pytest.approx(toy.curve(config, e)),) for e in (1, 2, 3, 4)}
        outcome = read_outcome(command.paths.trial(record.number))
        assert outcome is not None and outcome.attempts == record.attempts
