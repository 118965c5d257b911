"""The front door as people use it: a command, its exit code, what it prints, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tune
from search.storage.lease import lease
from tests.command import Tune, check, end, tune_in


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Tune]:
    with tune_in(tmp_path) as made:
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Return `tune.main`, which leaves this process's signals as they are."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    return tune.main


@pytest.mark.ray
def test_ended_by_a_signal_and_gone_on_with_by_the_same_command(command: Tune) -> None:
    """The other signals, kills, and many moments are in tests/faults."""
    few = ("--set", "search.trials=12")
    process = command.start(*few)
    command.wait_for(process, lambda: command.ended(2))
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert (code, out) == (130, "")
    assert "tune.py: interrupted; nothing is lost, the same command goes on from here" in err
    assert "Traceback" not in err
    kept = command.results()
    assert 2 <= len(kept) < 12

    code, out, err = end(command.start(*few))
    assert code == 0, err
    assert kept.items() <= command.results().items(), "what had ended was not run again"
    check(command, 12)
    # Results on stdout, all else on stderr.
    assert out.splitlines()[0].split()[:3] == ["rank", "trial", "role"]
    assert "best score" in out and "report.html" in out and "epoch 4" not in out
    assert "workload toy" in err and "epoch 4" in err and "rank" not in err
    assert command.paths.report.exists() and command.paths.model("best").exists()


def test_a_study_that_another_process_holds_is_refused_before_anything_else(
    command: Tune, run: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with lease(command.paths):
        assert run(command.arguments()) == 2
        err = capsys.readouterr().err
        assert run(command.arguments("--dry-run", "--set", "resources.slots=1")) == 0, "a dry run disturbs nobody"
    assert "another search holds this study" in err and f'"pid": {os.getpid()}' in err and "--study NAME" in err
    assert "Traceback" not in err and "workload toy" not in err


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
