"""Trials that give no score, workers that commit too late, clocks that are wrong, and promotions that are killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search import epochs
from search.study import read_outcome
from search.trial import Superseded, TrialRun
from tests.faults.faulty import GIVES
from tests.faults.studies import MakeStudy
from tests.faults.table import Tell
from workloads import toy

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(200)]

HOUR_S = 3600
REASONS = {
    "nan": "non-finite: score is nan at epoch 2",
    "inf": "non-finite: score is inf at epoch 2",
    "-inf": "non-finite: score is -inf at epoch 2",
    "nothing": "ValueError: score is undefined at epoch 2",
    "huge": "exploded: score is 1e+30 at epoch 2, beyond 1e+18",
}


@pytest.mark.row("F9")
def test_a_trial_without_a_score_fails_at_that_report_and_no_other_does(make_study: MakeStudy, tell: Tell) -> None:
    kinds = ["score", *GIVES, "nothing"]
    parameters = {"gives": {"choices": kinds}, "lr": {"choices": [0.01, 0.1]}}
    search = {"sampler": "grid", "trials": 2 * len(kinds)}
    study = make_study(parameters=parameters, search=search, resources={"slots": 2})
    assert study.run() == 0, study.said()
    records = study.records()
    failing = [record for record in records if record.params["gives"] != "score"]
    others = [record for record in records if record.params["gives"] == "score"]
    assert len(others) == 2 and {record.params["gives"] for record in failing} == set(REASONS)
    failed = sum(r.state == "failed" and r.reason == REASONS[r.params["gives"]] for r in failing)
    late = max(len(record.epochs) - 1 for record in failing)
    hit = sum(
        record.state != "complete"
        or record.epochs != {e: (toy.curve(toy.Config(lr=record.params["lr"]), e),) for e in (1, 2, 3)}
        for record in others
    )
    counts = {"trials": len(failing), "failed": failed, "most_reports_late": late, "others_hit": hit}
    tell("score that is none", "NaN, infinities, missing, exploding", **counts)
    assert failed == len(failing)
    assert set(study.promoted()) == {record.number for record in others}


@pytest.mark.parametrize("shifts", [(0, HOUR_S, -HOUR_S), (0, -HOUR_S, HOUR_S)], ids=["forward", "back"])
@pytest.mark.row("F12")
def test_a_wrong_clock_has_nothing_run_again(make_study: MakeStudy, tell: Tell, shifts: tuple[int, ...]) -> None:
    study = make_study(search={"sampler": "random", "trials": 6, "seed": 5})
    kept: dict[str, tuple[int, bytes]] = {}
    lost = again = 0
    # Killed in the middle of the third trial, then of the fifth, each time with the clock an hour off the last.
    for shift, crash in zip(shifts, ("mid 8", "mid 7", ""), strict=True):
        (study.folder / "clock").write_text(str(shift))
        assert study.run(crash) == (-9 if crash else 0), study.said()
        assert study.has_crashed() == bool(crash)
        now = study.committed()
        lost += len(kept.keys() - now.keys())
        again += sum(now.get(name, was) != was for name, was in kept.items())
        kept = now
    assert len(kept) == 6
    begun = study.begun()
    again += sum(times - 1 for times in begun.values()) - 2  # the two epochs that were killed
    times = [row.time for number in range(6) for row in epochs.read(study.paths.trial(number))]
    assert max(times) - min(times) > HOUR_S, "the clock was not wrong"
    assert [record.state for record in study.records()] == ["complete"] * 6
    tell("clock an hour off", f"by {[shift // HOUR_S for shift in shifts]} h", starts=3, run_again=again, lost=lost)


@pytest.mark.row("F14")
def test_a_promotion_killed_before_its_jobs_evaluates_each_winner_once(make_study: MakeStudy, tell: Tell) -> None:
    study = make_study(promotion={"k": 3})
    promoted = set()
    for kill in range(10):
        assert study.run("before evaluation 1") == -9, study.said()
        assert study.has_crashed()
        promoted.add(tuple(study.promoted()))
        assert study.noted("evaluated") == [], f"kill {kill} came too late"
    assert study.run() == 0, study.said()
    (winners,) = promoted
    assert tuple(study.promoted()) == winners and len(winners) == 3
    evaluated = study.evaluated()
    missing = sum(evaluated[number] == 0 for number in {*winners, 0})
    twice = sum(times > 1 for times in evaluated.values())
    tell("promotion killed", "10 kills", kills=10, winners=len(winners), missing=missing, evaluated_twice=twice)
    assert set(evaluated) == {*winners, 0}
    before = study.paths.leaderboard.read_text()
    assert study.run() == 0, study.said()
    assert (study.evaluated(), study.paths.leaderboard.read_text()) == (evaluated, before)


def _ends_late(folder: Path, late: TrialRun, successor: TrialRun) -> None:
    """The successor has committed before the late one does."""
    for _ in range(3):
        successor.step()


def _ends_first(folder: Path, late: TrialRun, successor: TrialRun) -> None:
    """The late one would commit first."""


def _fails(folder: Path, late: TrialRun, successor: TrialRun) -> None:
    """The late one has lost its workload."""
    late.epochs = iter(_broken, 0)


def _runs_dry(folder: Path, late: TrialRun, successor: TrialRun) -> None:
    """The late one believes that it has come to its end."""
    late.epochs = iter(())


def _broken() -> Any:
    raise RuntimeError("the driver is gone")


@pytest.mark.parametrize("how", [_ends_late, _ends_first, _fails, _runs_dry])
@pytest.mark.row("F13")
def test_a_worker_that_outlived_its_driver_cannot_commit(
    tell: Tell, tmp_path: Path, how: Callable[[Path, TrialRun, TrialRun], None]
) -> None:
    """It was two of three epochs far when its driver died, and another process took the trial."""
    folder = tmp_path / "trials" / "0"
    folder.mkdir(parents=True)
    order = {
        "number": 0,
        "workload": "toy",
        "config": {**toy.Config().__dict__, "epochs": 3},
        "objectives": [{"metric": "score", "mode": "max"}],
        "folder": str(folder),
        "tensorboard": False,
    }
    late = TrialRun(order)
    late.step()
    late.step()
    successor = TrialRun(order)
    how(folder, late, successor)
    before = (folder / "result.json").read_bytes() if (folder / "result.json").exists() else None
    with pytest.raises(Superseded):
        late.step()
    after = (folder / "result.json").read_bytes() if (folder / "result.json").exists() else None
    for _ in range(3):
        _, _, outcome = successor.step()
    assert outcome is not None and outcome == read_outcome(folder)
    assert (outcome.state, outcome.attempts, len(outcome.epochs)) == ("complete", 2, 3)
    assert json.loads((folder / "result.json").read_text())["attempts"] == 2
    tell("late commit", how.__name__.strip("_").replace("_", " "), commits=1, rejected=before == after)
