"""The front door as people use it: a command, its exit code, what it prints, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tune
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
TRIALS = 30
WAIT_S = 60.0


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
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.started.append(process)
        return process

    def ended(self, number: int) -> bool:
        return len(self.results()) >= number

    def results(self) -> dict[str, int]:
        """Return when each trial that has ended was committed."""
        return {file.parent.name: file.stat().st_mtime_ns for file in self.runs.glob("mine/trials/*/result.json")}

    def wait_for(self, process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not happened():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.02)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Tune]:
    made = Tune(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Return `tune.main`, which leaves this process's signals as they are."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    return tune.main


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


@pytest.mark.ray
def test_ended_by_any_signal_and_gone_on_with_by_the_same_command(command: Tune) -> None:
    kept: dict[str, int] = {}
    for sent, expected in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = command.start()
        goal = len(kept) + 2
        command.wait_for(process, lambda goal=goal: command.ended(goal))  # type: ignore[misc]
        if sent == signal.SIGTERM:
            refused_while_it_runs(command, process)
        os.kill(process.pid, sent)
        code, out, err = end(process)
        assert (code, out) == (expected, "")
        if expected == 130:
            assert "tune.py: interrupted; nothing is lost, the same command goes on from here" in err
            assert "Traceback" not in err
        now = command.results()
        assert kept.items() <= now.items(), "what had ended was not run again"
        kept = now
    assert len(kept) < TRIALS

    code, out, err = end(command.start())
    assert code == 0, err
    assert kept.items() <= command.results().items()
    check(command, TRIALS)
    # Results on stdout, all else on stderr.
    assert out.splitlines()[0].split()[:3] == ["rank", "trial", "role"]
    assert "best score" in out and "report.html" in out and "epoch 4" not in out
    assert "workload toy" in err and "epoch 4" in err and "rank" not in err
    assert command.paths.report.exists() and command.paths.model("best").exists()


def refused_while_it_runs(command: Tune, first: subprocess.Popen[str]) -> None:
    code, out, err = end(command.start())
    assert (code, out) == (2, "")
    assert "another search holds this study" in err and f'"pid": {first.pid}' in err and "--study NAME" in err
    assert "Traceback" not in err


@pytest.mark.ray
@pytest.mark.slow  # seven starts of Ray
def test_ended_at_many_moments_and_finished_by_the_same_command(command: Tune) -> None:
    kept: dict[str, int] = {}
    for index, sent in enumerate((signal.SIGKILL, signal.SIGINT) * 3):
        process = command.start()
        command.wait_for(process, command.paths.lease.exists)
        time.sleep(3 + index * 0.5)
        process.send_signal(sent)
        code, out, err = end(process)
        assert (code, out) == (-signal.SIGKILL if sent == signal.SIGKILL else 130, ""), err
        now = command.results()
        assert kept.items() <= now.items()
        kept = now
    code, _, err = end(command.start())
    assert code == 0, err
    assert kept.items() <= command.results().items()
    check(command, TRIALS)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_in_which_nothing_finishes_has_failed(
    command: Tune, run: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command.arguments("--set", "fixed.fail=error", "--set", "search.trials=2", "--study", "bad")
    assert run(arguments) == 1
    out, err = capsys.readouterr()
    assert out.startswith("nothing was evaluated: no finished trial has a checkpoint")
    assert "trial 0 epoch 1" in err and "failed: RuntimeError: the toy was told to fail" in err
    assert (command.runs / "bad" / "trials" / "1" / "error.txt").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    command: Tune, run: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.arguments("--dry-run", "--set", "resources.slots=1")) == 0
    out, err = capsys.readouterr()
    assert "workload toy" in out and "30 of at most 4 epochs: 120 epochs at the most" in out
    assert err == ""
    assert not command.runs.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "search.trails=3"], "mine.yaml: search.trails: unknown key; did you mean 'trials'?"),
        (["--set", "fixed.data.rot=x"], "unknown key"),
        (["--set", "search.trials=0"], "mine.yaml: search.trials: got 0; expected at least 1"),
        (["--set", "search"], "expected key=value"),
        (["--space", "nucleii.yaml"], "nucleii.yaml: no such search space; here are "),
        (["--set", "tracking.mlflow=http://me:secret@host"], "came with a password"),
    ],
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(
    command: Tune,
    run: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(command.arguments(*arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tune.py: ") and message in err
    assert not command.runs.exists()


def test_a_folder_that_cannot_be_written_is_told(
    command: Tune, run: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    command.runs.write_text("a file, where the folder should be")
    assert run(command.arguments("--set", "resources.slots=1")) == 2
    err = capsys.readouterr().err
    assert "tune.py: " in err and str(command.runs) in err and "Traceback" not in err
    assert command.runs.read_text() == "a file, where the folder should be"


def test_the_exit_code_of_the_command_itself(command: Tune) -> None:
    code, out, err = end(command.start("--set", "search.trails=3"))
    assert (code, out) == (2, "")
    assert json.dumps(err).count("\\n") == 1 and "did you mean 'trials'?" in err
    assert not command.runs.exists()
