from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import durable
from search import epochs, trial
from search.errors import DiskError
from search.spec import Objective
from search.study import RESULT, Outcome, read_outcome
from search.trial import Superseded, TrialRun
from segmentation.epoch import Epoch
from workloads import toy

SCORE = (Objective(metric="score", mode="max"),)


def start(folder: Path, objectives: tuple[Objective, ...] = SCORE, **config: Any) -> TrialRun:
    """Take a trial as a slot would."""
    folder.mkdir(parents=True, exist_ok=True)
    return TrialRun(
        {
            "number": 7,
            "workload": "toy",
            "config": {**toy.Config().__dict__, "epochs": 6, "noise": 0.3, **config},
            "objectives": [asdict(objective) for objective in objectives],
            "folder": str(folder),
            "tensorboard": False,
        }
    )


def finish(run: TrialRun) -> Outcome:
    for _ in range(20):
        _, _, outcome = run.step()
        if outcome is not None:
            return outcome
    raise AssertionError("the trial has no end")


def points(folder: Path) -> dict[int, float]:
    return {row.epoch: row.metrics["score"] for row in epochs.read(folder)}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trials" / "7"


@pytest.fixture
def yields(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the toy workload yield these scores instead of its own."""

    def replace(*scores: float, **more: float) -> None:
        def train(config: toy.Config, resume: Path | None = None) -> Iterator[Epoch]:
            for number, score in enumerate(scores, start=1):
                yield Epoch(number, {"score": score, **more}, lambda folder: folder.mkdir())

        monkeypatch.setattr(toy, "train", train)

    return replace


def test_a_trial_from_start_to_end(folder: Path) -> None:
    run = start(folder, epochs=3, noise=0.0)
    config = toy.Config(epochs=3)
    first = run.step()
    assert first == (1, {"score": toy.curve(config, 1), "loss": 1 - toy.curve(config, 1), "cost": 32.0}, None)
    assert read_outcome(folder) is None
    outcome = finish(run)
    assert (outcome.state, outcome.reason, outcome.best_epoch, outcome.attempts) == ("complete", "finished", 3, 1)
    assert outcome.epochs == {epoch: (toy.curve(config, epoch),) for epoch in (1, 2, 3)}
    assert outcome.metrics == {"score": toy.curve(config, 3), "loss": 1 - toy.curve(config, 3), "cost": 32.0}
    assert outcome.checkpoint == "trials/7/checkpoints/epoch-0003"
    assert outcome.checkpoint_sha256 == durable.sealed(folder / "checkpoints" / "epoch-0003")
    assert read_outcome(folder) == outcome
    assert json.loads((folder / "config.json").read_text())["epochs"] == 3
    assert checkpoints(folder) == ["epoch-0003"]


def test_a_committed_trial_that_is_pulled_again_gives_its_outcome(folder: Path) -> None:
    run = start(folder, epochs=2)
    outcome = finish(run)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run.step() == (2, {}, outcome)
    again = start(folder, epochs=2)
    assert again.step() == (2, {}, outcome)
    again.close()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files, "not even an attempt is noted"


def test_the_newest_two_checkpoints_and_the_best_are_kept(folder: Path, yields: Callable[..., None]) -> None:
    yields(0.1, 0.9, 0.3, 0.4, 0.5, 0.6)
    run = start(folder)
    seen = []
    for _ in range(5):
        run.step()
        seen.append([int(name[-4:]) for name in checkpoints(folder)])
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    outcome = finish(run)
    assert (outcome.best_epoch, checkpoints(folder)) == (2, ["epoch-0002"])


def test_the_best_of_a_loss_is_the_least(folder: Path, yields: Callable[..., None]) -> None:
    yields(0.5, 0.1, 0.3, 0.4, 0.2, 0.6)
    assert finish(start(folder, (Objective(metric="score", mode="min"),))).best_epoch == 2


@pytest.mark.parametrize("killed_after", range(6))
@pytest.mark.parametrize("damaged", [0, 1])
def test_a_resumed_trial_gives_the_same_rows_as_an_unbroken_one(
    folder: Path, tmp_path: Path, killed_after: int, damaged: int
) -> None:
    """With the newest checkpoint damaged it goes back to the one before, with none it starts anew."""
    unbroken = finish(start(tmp_path / "trials" / "8"))
    first = start(folder)
    for _ in range(killed_after):
        first.step()
    for name in checkpoints(folder)[::-1][:damaged]:
        (folder / "checkpoints" / name / toy.STATE_FILE).write_text('{"epoch": 1')
    second = start(folder)
    assert max(points(folder), default=0) == max(0, killed_after - damaged)
    outcome = finish(second)
    assert (outcome.epochs, outcome.best_epoch) == (unbroken.epochs, unbroken.best_epoch)
    assert points(folder) == points(tmp_path / "trials" / "8")
    assert outcome.attempts == 2
    assert len((folder / epochs.FILE).read_text().splitlines()) == 6, "no epoch stands twice"
    assert [row.attempt for row in epochs.read(folder)].count(1) == max(0, killed_after - damaged)


def test_a_checkpoint_without_its_manifest_is_none(folder: Path) -> None:
    run = start(folder)
    run.step()
    run.step()
    (folder / "checkpoints" / "epoch-0002" / durable.MANIFEST).unlink()
    again = start(folder)
    assert checkpoints(folder) == ["epoch-0001"]
    assert again.step()[0] == 2


def test_a_checkpoint_that_no_line_tells_of_is_trained_over(folder: Path) -> None:
    """Killed between the checkpoint and its line: the epoch has a checkpoint, but no numbers."""
    run = start(folder)
    run.step()
    run.step()
    lines = (folder / epochs.FILE).read_text().splitlines(keepends=True)
    (folder / epochs.FILE).write_text(lines[0] + lines[1][:25])
    outcome = finish(start(folder))
    assert sorted(outcome.epochs) == [1, 2, 3, 4, 5, 6]


def test_a_superseded_attempt_refuses_to_write(folder: Path) -> None:
    old = start(folder)
    old.step()
    new = start(folder)
    before = (folder / epochs.FILE).read_text()
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        old.step()
    assert (folder / epochs.FILE).read_text() == before
    assert read_outcome(folder) is None, "that it was superseded is no failure of the trial"
    assert finish(new).state == "complete"


@pytest.mark.row("X11")
def test_a_loss_that_is_not_finite_is_a_failure_and_never_a_score(folder: Path) -> None:
    outcome = finish(start(folder, fail="nan", fail_epoch=2))
    assert (outcome.state, outcome.reason) == ("failed", "non-finite: loss is nan at epoch 2")
    assert list(outcome.epochs) == [1]
    assert all(math.isfinite(value) for values in outcome.epochs.values() for value in values)
    assert "NonFiniteError" in (folder / "error.txt").read_text()


@pytest.mark.row("X11")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_not_finite_is_a_failure(folder: Path, yields: Callable[..., None], value: float) -> None:
    yields(0.5, value, 0.9)
    outcome = finish(start(folder))
    assert (outcome.state, outcome.reason) == ("failed", f"non-finite: score is {value} at epoch 2")
    assert outcome.epochs == {1: (0.5,)}


def test_another_metric_that_is_not_finite_is_kept(folder: Path, yields: Callable[..., None]) -> None:
    yields(0.5, 0.6, other=math.nan)
    outcome = finish(start(folder, epochs=2))
    assert outcome.state == "complete" and outcome.metrics is not None and math.isnan(outcome.metrics["other"])
    assert read_outcome(folder) is not None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no such layer"), "RuntimeError: no such layer"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (FloatingPointError("overflow"), "non-finite: overflow"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a.png"),
            "FileNotFoundError: [Errno 2] No such file: 'a.png'",
        ),
        (KeyError("score"), "KeyError: 'score'"),
    ],
)
def test_a_failure_tells_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def train(config: Any, resume: Any = None) -> Iterator[Epoch]:
        raise error
        yield

    monkeypatch.setattr(toy, "train", train)
    outcome = finish(start(folder))
    assert (outcome.state, outcome.reason, outcome.best_epoch, outcome.checkpoint) == ("failed", reason, None, None)
    assert "Traceback" in (folder / "error.txt").read_text()
    assert read_outcome(folder) == outcome


def test_a_workload_that_yields_nothing_has_failed(folder: Path, yields: Callable[..., None]) -> None:
    yields()
    outcome = finish(start(folder))
    assert (outcome.state, outcome.reason) == ("failed", "the workload yielded no epoch")


def test_a_workload_may_end_early(folder: Path, yields: Callable[..., None]) -> None:
    yields(0.5, 0.4)
    outcome = finish(start(folder))
    assert (outcome.state, outcome.reason) == ("complete", "the workload ended it after epoch 2")
    assert outcome.best_epoch == 1


def test_metrics_of_any_number_type_become_plain_numbers(folder: Path, yields: Callable[..., None]) -> None:
    import numpy

    yields(numpy.float32(0.5), other=numpy.int64(3))  # type: ignore[arg-type]
    _, metrics, outcome = start(folder, epochs=1).step()
    assert json.dumps(metrics) == '{"score": 0.5, "other": 3.0}'
    assert outcome is not None and outcome.state == "complete"


def test_out_of_memory_is_committed_and_raised_so_that_the_process_is_replaced(folder: Path) -> None:
    run = start(folder, fail="memory", fail_epoch=3)
    run.step()
    run.step()
    with pytest.raises(MemoryError):
        run.step()
    outcome = start(folder).step()[2]
    assert outcome is not None
    assert (outcome.state, outcome.reason) == ("failed", "MemoryError: the toy was told to run out of memory")
    assert list(outcome.epochs) == [1, 2]


@pytest.mark.parametrize(
    ("error", "unhealthy"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("x"), True),
        (type("AcceleratorError", (RuntimeError,), {})("x"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA"), False),
    ],
)
def test_after_which_errors_a_process_is_replaced(error: BaseException, unhealthy: bool) -> None:
    assert trial.is_unhealthy(error) is unhealthy


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_ends_no_trial(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    run = start(folder)
    run.step()

    def full(*arguments: Any) -> None:
        raise OSError(code, "No space left on device", str(folder / "weights"))

    with monkeypatch.context() as broken:
        broken.setattr(epochs, "append", full)
        with pytest.raises(DiskError, match="weights: No space left on device; make room, then run the same command"):
            run.step()
    assert read_outcome(folder) is None and not (folder / "error.txt").exists()
    assert finish(start(folder)).epochs == finish(start(folder.with_name("8"))).epochs


@pytest.mark.parametrize("where", ["commit", "write_json"])
def test_a_disk_full_at_the_first_or_last_file(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(durable, where, full)
        run = start(folder, epochs=1)
        with pytest.raises(DiskError, match="7: No space left on device"):
            run.step()
        run.close()
    assert read_outcome(folder) is None
    assert finish(start(folder, epochs=1)).state == "complete"


def test_another_operating_system_error_fails_the_trial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    run = start(folder)
    monkeypatch.setattr(trial, "_save", refused)
    outcome = run.step()[2]
    assert outcome is not None and outcome.reason == "PermissionError: [Errno 13] Permission denied"


def test_the_driver_commits_a_stop_unless_the_trial_has_ended(folder: Path) -> None:
    run = start(folder)
    run.step()
    run.step()
    stopped = trial.outcome_of(folder, SCORE, "stopped", "place 3 of 3")
    assert (stopped.state, stopped.best_epoch, sorted(stopped.epochs)) == ("stopped", run._best(), [1, 2])
    assert stopped.checkpoint is not None
    assert trial.commit(folder, stopped) == stopped
    assert finish(run) != stopped or read_outcome(folder) == stopped
    assert read_outcome(folder) == stopped, "who commits first, wins"


def test_two_objectives_are_recorded_at_every_epoch(folder: Path) -> None:
    both = (Objective(metric="score", mode="max"), Objective(metric="cost", mode="min"))
    outcome = finish(start(folder, both, epochs=2, width=8))
    assert [values[1] for values in outcome.epochs.values()] == [8.0, 8.0]
    assert outcome.metrics is not None and outcome.metrics["cost"] == 8.0


def test_closing_ends_the_workload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def train(config: Any, resume: Any = None) -> Iterator[Epoch]:
        try:
            for number in range(1, 9):
                yield Epoch(number, {"score": 0.5}, lambda folder: folder.mkdir())
        finally:
            ended.append(number)

    monkeypatch.setattr(toy, "train", train)
    run = start(folder)
    run.step()
    run.step()
    run.close()
    run.close()
    assert ended == [2]


def test_a_picture_is_drawn_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def train(config: Any, resume: Any = None) -> Iterator[Epoch]:
        for number in (1, 2, 3):
            yield Epoch(number, {"score": 0.5}, lambda folder: folder.mkdir(), draw=draw)

    def draw(path: Path) -> None:
        from PIL import Image

        drawn.append(path.name)
        Image.new("RGB", (4, 4)).save(path)

    monkeypatch.setattr(toy, "train", train)
    folder.mkdir(parents=True)
    run = TrialRun(
        {
            "number": 7,
            "workload": "toy",
            "config": {**toy.Config().__dict__, "epochs": 3},
            "objectives": [asdict(SCORE[0])],
            "folder": str(folder),
            "tensorboard": True,
        }
    )
    outcome = finish(run)
    run.close()
    assert (outcome.reason, drawn) == ("finished", ["predictions.png"])
    assert list(folder.glob("events.*")) or list(folder.rglob("*tfevents*"))


def test_a_late_commit_of_a_superseded_attempt_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that outlived its driver and fails, or ends early, while its successor is still at work."""
    ends, fails = start(folder, epochs=2), start(folder, epochs=2)
    new = start(folder, epochs=2)
    new.step()
    monkeypatch.setattr(toy, "train", lambda config, resume=None: iter(()))
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        ends.step()

    def wrong(config: Any, resume: Any = None) -> Iterator[Epoch]:
        raise FileNotFoundError("checkpoints/epoch-0001")
        yield

    monkeypatch.setattr(toy, "train", wrong)
    with pytest.raises(Superseded, match="attempt 3 has taken over"):
        fails.step()
    assert read_outcome(folder) is None and not (folder / "error.txt").exists()
    assert finish(new).reason == "finished"


@pytest.mark.parametrize("value", [1e30, -3.4e38])
def test_an_objective_that_explodes_is_a_failure(folder: Path, yields: Callable[..., None], value: float) -> None:
    yields(0.5, value, 0.9)
    outcome = finish(start(folder))
    assert (outcome.state, outcome.reason) == ("failed", f"exploded: score is {value:.3g} at epoch 2, beyond 1e+18")
    assert outcome.epochs == {1: (0.5,)}


def test_a_damaged_result_gives_way_to_a_new_one(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / RESULT).write_text("{")
    stopped = trial.outcome_of(folder, SCORE, "stopped", "place 3 of 3")
    assert trial.commit(folder, stopped) == stopped == read_outcome(folder)
    assert (folder / f"{RESULT}.damaged-1").read_text() == "{"
