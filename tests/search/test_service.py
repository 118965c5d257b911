"""Whole toy searches: from the spec to an evaluated winner, broken off in every way and gone on with."""

from __future__ import annotations

import csv
import dataclasses
import errno
import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import durable
from search import epochs, executor, planning, promotion, samplers, service
from search.errors import DiskError, StudyError
from search.record import DEFAULTS, StudyPaths, TrialRecord
from search.results import tracking
from search.results.leaderboard import Row
from search.spec import SearchSpec
from search.storage import journal
from search.study import Outcome, Study, read_outcome
from workloads import toy as toy_workload

Load = Callable[..., SearchSpec]
WIDTHS = {"width": {"choices": [8, 16, 64]}}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Search:
    """One study's folder, and what its last run said."""

    def __init__(self, folder: Path) -> None:
        self.paths = StudyPaths(folder)
        self.said = ""

    def run(self, spec: SearchSpec) -> list[Row]:
        stream = io.StringIO()
        try:
            return service.run(planning.make(spec, self.paths.folder), stream)
        finally:
            self.said = stream.getvalue()

    def records(self, spec: SearchSpec) -> list[TrialRecord]:
        return Study(self.paths, spec).records()

    def promoted(self) -> list[int]:
        return [item["trial"] for item in durable.read_json(self.paths.promotion)["promoted"]]

    def evaluation(self, name: str) -> dict[str, Any]:
        return durable.read_json(self.paths.evaluation(name) / "evaluation.json")

    def times(self, *folders: str) -> dict[str, int]:
        files = [file for folder in folders for file in (self.paths.folder / folder).rglob("*") if file.is_file()]
        return {str(file.relative_to(self.paths.folder)): file.stat().st_mtime_ns for file in files}


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path / "runs" / "toy")


def curve(record: TrialRecord, epoch: int, **fixed: Any) -> float:
    return toy_workload.curve(toy_workload.Config(**{**fixed, **record.params}), epoch)


@pytest.mark.row("S3")
def test_a_search_over_one_parameter_leaves_its_values_side_by_side(toy: Load, search: Search) -> None:
    asked = {"sampler": "grid", "trials": 2}
    parameters = {"lr": {"choices": [0.1, 0.01]}}
    search.run(toy(parameters=parameters, search=asked, stopping={"rule": "none"}, promotion={"k": 2}))
    with search.paths.comparison("lr").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [row["lr"] for row in (first, second)] == ["0.1", "0.01"], "as they are listed"
    told = [row for row in (first, second) if row["difference"]]
    assert len(told) == 1 and float(told[0]["difference_low"]) <= float(told[0]["difference"])
    assert float(told[0]["difference"]) <= float(told[0]["difference_high"])


@pytest.mark.row("X1")
@pytest.mark.row("X2")
@pytest.mark.row("X12")
def test_from_a_spec_to_an_evaluated_winner_once(toy: Load, search: Search) -> None:
    sections = {
        "parameters": {
            "lr": {"type": "float", "low": 1.0e-4, "high": 1.0, "log": True},
            "fail": {"choices": ["never", "error", "nan"]},
        },
        "fixed": {"epochs": 4, "epoch_s": 0.05},
        "stopping": {"rule": "asha", "min_epochs": 1, "reduction": 2},
        "promotion": {"k": 2},
        "resources": {"slots": 2},
    }
    spec = toy(search={"sampler": "random", "trials": 10, "seed": 2}, **sections)
    rows = search.run(spec)
    records = search.records(spec)
    assert [record.number for record in records] == list(range(10))

    # What became of each trial is what its closed form says.
    assert (records[0].note, records[0].params, records[0].state) == (
        "defaults",
        {"lr": 1e-3, "fail": "never"},
        "complete",
    )
    assert {record.state for record in records} == {"complete", "stopped", "failed"}
    for record in records:
        expected = {epoch: (pytest.approx(curve(record, epoch, epochs=4)),) for epoch in record.epochs}
        assert record.epochs == expected and list(expected) == list(range(1, len(expected) + 1))
        if record.state == "failed":
            assert record.params["fail"] != "never" and len(record.epochs) == 1
            reasons = {"error": "RuntimeError: the toy was told to fail", "nan": "non-finite: loss is nan at epoch 2"}
            assert record.reason == reasons[record.params["fail"]]
        elif record.state == "stopped":
            assert record.values is None and "go on" in record.reason and len(record.epochs) < 4
        else:
            assert record.params["fail"] == "never" and len(record.epochs) == 4

    # The best are promoted: their very checkpoints are evaluated, on the test split only.
    complete = sorted((r for r in records if r.state == "complete"), key=lambda r: r.values or (), reverse=True)
    assert search.promoted() == [record.number for record in complete[:2]]
    evaluated = {*search.promoted(), 0}
    assert {path.name for path in (search.paths.folder / "evaluation").iterdir()} == {str(n) for n in evaluated}
    for number in evaluated:
        evaluation = search.evaluation(str(number))
        assert evaluation["split"] == evaluation["details"]["split"] == "test"
        assert evaluation["checkpoint_sha256"] == records[number].checkpoint_sha256 is not None
        assert evaluation["metrics"]["score"] == pytest.approx((records[number].values or (0,))[0])
        assert durable.sealed(search.paths.model(str(number))) == records[number].checkpoint_sha256
    assert search.paths.model("best").resolve().name == str(search.promoted()[0])
    assert [row.rank for row in rows if "promoted" in row.role] == [1, 2]
    assert all(path.stat().st_size for path in (search.paths.report, search.paths.leaderboard, search.paths.table))

    # Trials ran side by side, each in a folder of its own.
    spans = [(r.started, r.finished) for r in records]
    assert any(a[0] < b[1] and b[0] < a[1] for i, a in enumerate(spans) for b in spans[:i])  # type: ignore[operator]
    for record in records:
        folder = search.paths.trial(record.number)
        assert json.loads((folder / "config.json").read_text())["seed"] == record.seed
        assert [row.attempt for row in epochs.read(folder)] == [1] * len(record.epochs)
        assert len(list(folder.glob("attempt-*"))) == 1
        assert not any(path.is_symlink() for path in folder.rglob("*"))

    # A second run does nothing twice.
    before = search.times("trials", "evaluation", "models")
    again = search.run(spec)
    assert search.said == "toy: complete, all its trials have ended\n"
    assert search.times("trials", "evaluation", "models") == before
    assert again == rows and search.records(spec) == records

    # More trials go on from there; what has ended stays as it is.
    more = toy(search={"sampler": "random", "trials": 12, "seed": 2}, **sections)
    search.run(more)
    # Checkpoints go where better ones came; numbers stay.
    bare = [dataclasses.replace(record, checkpoint=None) for record in search.records(more)]
    assert bare[:10] == [dataclasses.replace(record, checkpoint=None) for record in records]
    assert [record.number for record in search.records(more)] == list(range(12))
    after = search.times("trials")
    assert all(after.get(name, time) == time for name, time in before.items() if name.startswith("trials"))
    assert len([name for name in after if name.endswith("result.json")]) == 12

    # The study opens in Optuna as it is.
    seen = optuna.load_study(study_name="toy", storage=JournalStorage(JournalFileBackend(str(search.paths.journal))))
    assert seen.best_value == max(r.values[0] for r in search.records(more) if r.values)


def test_a_process_that_dies_is_replaced_and_its_trial_goes_on(toy: Load, search: Search) -> None:
    parameters = {"fail": {"choices": ["never", "exit", "memory", "hang"]}, "fail_once": {"choices": [True, False]}}
    spec = toy(
        parameters=parameters,
        fixed={"epochs": 3, "fail_epoch": 3},
        constraints=["fail == 'exit' or not fail_once"],
        search={"sampler": "grid", "trials": 8},
        stopping={"rule": "none"},
        resources={"slots": 2, "max_attempts": 2, "hung_after_s": 2.0},
        promotion={"k": 1},
    )
    search.run(spec)
    found = {(record.params["fail"], record.params["fail_once"]): record for record in search.records(spec)}
    assert len(found) == 5
    never, memory = found["never", False], found["memory", False]
    assert (never.number, never.note, never.state, never.attempts) == (0, "defaults", "complete", 1)
    assert (memory.state, memory.attempts) == ("failed", 1), "out of memory is the trial's own end"
    assert memory.reason == "MemoryError: the toy was told to run out of memory"
    resumed = found["exit", True]
    assert (resumed.state, resumed.attempts) == ("complete", 2)
    assert [row.attempt for row in epochs.read(search.paths.trial(resumed.number))] == [1, 1, 2]
    assert resumed.values == pytest.approx((curve(resumed, 3, epochs=3),))
    dead = found["exit", False]
    assert dead.state == "failed" and dead.reason.startswith("its process died 2 times: ")
    assert dead.reason.endswith("Worker unexpectedly exits with a connection error code 2. End of file.")
    assert dead.attempts == 2 and sorted(dead.epochs) == [1, 2]
    assert found["exit", False].number not in search.promoted()
    hung = found["hang", False]
    assert (hung.state, hung.reason) == ("failed", "hung: no epoch in 2 s; error.txt shows where it stood")
    assert sorted(hung.epochs) == [1, 2]
    assert "in _fail" in (search.paths.trial(hung.number) / "error.txt").read_text()


def test_two_objectives_promote_the_front(toy: Load, search: Search) -> None:
    spec = toy(
        objective=[{"metric": "score"}, {"metric": "cost"}],
        parameters={"width": {"choices": [8, 16, 64, 256]}, "lr": {"choices": [0.01, 0.5]}},
        fixed={"epochs": 2},
        search={"sampler": "grid", "trials": 8},
        stopping={"rule": "none"},
        promotion={"rule": "pareto", "k": 4},
        evaluation={"keep_checkpoints": 1},
        resources={"slots": 1},
    )
    search.run(spec)
    records = {(record.params["width"], record.params["lr"]): record for record in search.records(spec)}
    scores = {point: curve(record, 2, epochs=2) for point, record in records.items()}
    # A point is on the front if none as narrow or narrower scores higher; 256 is too wide to score well.
    front = [p for p in scores if not any(q[0] <= p[0] and scores[q] > scores[p] for q in scores)]
    assert {width for width, _ in front} == {8, 16, 64}
    assert search.promoted() == [records[p].number for p in sorted(front, key=lambda p: -scores[p])]
    expected = promotion.promote(list(records.values()), spec.objectives, spec.promotion)
    assert search.promoted() == [item.trial for item in expected]
    kept = {r.number for r in records.values() if r.checkpoint is not None}
    best = sorted(scores, key=lambda point: -scores[point])[:4]
    assert kept == {*search.promoted(), *(records[point].number for point in best), 0}
    assert len(kept) < len(records)


def test_the_promoted_are_trained_again_longer_and_with_seeds(toy: Load, search: Search) -> None:
    sections = {
        "parameters": WIDTHS,
        "fixed": {"epochs": 2, "lr": 0.01, "noise": 0.01},
        "stopping": {"rule": "none"},
        "resources": {"slots": 1},
        "evaluation": {"keep_checkpoints": 1},
    }
    twice = {"k": 1, "epochs": 3, "seeds": 2}
    small = toy(search={"sampler": "tpe", "trials": 1}, promotion=twice, **sections)
    rows = search.run(small)
    assert search.promoted() == [0]
    assert sorted(row.name for row in rows) == ["0-seed0", "0-seed1"]
    assert search.evaluation("0-seed1")["details"]["split"] == "test"
    folder = search.paths.folder / "promotion"
    configs = [durable.read_json(folder / str(number) / "config.json") for number in (0, 1)]
    seed = search.records(small)[0].seed
    assert [config["epochs"] for config in configs] == [3, 3]
    assert [config["seed"] for config in configs] == [seed, samplers.trial_seed(seed, 1)]
    before = search.times("promotion", "evaluation", "models")
    assert search.run(small) == rows
    assert search.times("promotion", "evaluation", "models") == before

    # A better trial comes later: it is trained again as well, beside those that were.
    large = toy("search.trials=9", search={"sampler": "tpe", "trials": 1}, promotion=twice, **sections)
    rows = search.run(large)
    best = search.promoted()[0]
    assert best != 0 and search.records(large)[best].params["width"] == 64
    assert {row.name for row in rows} == {f"{number}-seed{seed}" for number in (0, best) for seed in (0, 1)}
    now = search.times("promotion")
    assert all(now[name] == time for name, time in before.items() if name.startswith("promotion/"))

    # Other epochs are another training, whose result takes the place of the old one.
    longer = toy(
        "search.trials=9", search={"sampler": "tpe", "trials": 1}, promotion={**twice, "epochs": 4}, **sections
    )
    search.run(longer)
    config = durable.read_json(search.paths.model(f"{best}-seed0") / toy_workload.STATE_FILE)["config"]
    assert config["epochs"] == 4
    assert read_outcome(folder / "4") is not None


def test_no_trial_starts_once_the_time_is_used_up(toy: Load, search: Search) -> None:
    def spec(**limits: Any) -> SearchSpec:
        return toy(
            fixed={"epochs": 2, "epoch_s": 0.1},
            search={"sampler": "random", "trials": 50, **limits},
            stopping={"rule": "none"},
            promotion={"k": 1},
            resources={"slots": 1},
            evaluation={"keep_checkpoints": 2},
        )

    search.run(spec(wall_time_s=0.5))
    records = search.records(spec())
    assert 1 <= len(records) < 10
    assert {record.state for record in records} == {"complete"}, "those that run are carried to their end"
    search.run(spec(wall_time_s=0.5))
    assert search.said == "toy: complete, its budget is used up\n"
    assert len(search.records(spec())) == len(records)
    used = sum(record.slot_s for record in records)
    search.run(spec(slot_hours=(used + 0.1) / 3600))
    assert len(search.records(spec())) == len(records) + 1
    kept = [path for path in (search.paths.folder / "trials").glob("*/checkpoints") if any(path.iterdir())]
    assert len(kept) <= 3, "the best two, and the first"


def test_a_trial_in_flight_is_carried_to_its_end_after_the_time_is_used_up(toy: Load, search: Search) -> None:
    spec = toy(fixed={"epochs": 1}, search={"sampler": "random", "trials": 9, "slot_hours": 1.0}, promotion={"k": 1})
    search.paths.folder.mkdir(parents=True)
    study = Study(search.paths, spec)
    study.enqueue(planning.make(spec, search.paths.folder).incumbent, DEFAULTS)
    assert study.ask() is not None and study.ask() is not None
    study.tell(1, Outcome(state="failed", reason="lost", epochs={}, slot_s=3600.0))
    del study
    rows = search.run(spec)
    assert [record.state for record in search.records(spec)] == ["complete", "failed"]
    assert [row.name for row in rows] == ["0"]


def test_a_full_disk_breaks_off_writes_nothing_more_and_the_same_call_goes_on(
    toy: Load, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy(
        fixed={"epochs": 2},
        search={"sampler": "random", "trials": 6},
        stopping={"rule": "none"},
        promotion={"k": 1},
        resources={"slots": 2},
    )
    calls: list[str] = []
    append = journal.Journal.append_logs

    def full(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        calls.append("full" if len(calls) >= 45 else "written")
        if calls[-1] == "full":
            with search.paths.journal.open("ab") as journal:
                journal.write(b'{"op_code": 9, "wor')  # as much as still found room
            raise OSError(errno.ENOSPC, "No space left on device", str(search.paths.journal))
        append(self, logs)

    with monkeypatch.context() as broken:
        broken.setattr(journal.Journal, "append_logs", full)
        with pytest.raises(DiskError, match=r"study\.journal: No space left on device; make room, then run the same"):
            search.run(spec)
    assert calls.count("full") == 1, "nothing is written behind a torn line"
    ended = search.times("trials")
    results = {name: time for name, time in ended.items() if name.endswith("result.json")}
    assert len(results) > 0
    assert len(search.run(spec)) > 0
    records = search.records(spec)
    assert [(record.number, record.state) for record in records] == [(n, "complete") for n in range(len(records))]
    assert len(records) == 6
    now = search.times("trials")
    assert all(now[name] == time for name, time in results.items()), "what was committed was not run again"


def test_the_folder_of_another_search_is_refused_before_anything_starts(toy: Load, search: Search) -> None:
    sections = {"fixed": {"epochs": 1}, "promotion": {"k": 1}}
    search.run(toy(search={"trials": 1}, **sections))
    before = search.times(".")
    with pytest.raises(StudyError) as caught:
        search.run(toy(search={"trials": 1, "seed": 5}, **sections))
    assert "made by another search: search.seed was 0, is now 5; put the old values back" in str(caught.value)
    changed = {name for name, time in search.times(".").items() if before.get(name) != time}
    assert changed <= {"lease.json"}


def test_a_plan_is_made_without_writing(toy: Load, search: Search) -> None:
    spec = toy(parameters={"width": {"choices": [8, 16]}, "lr": {"type": "float", "low": 0.1, "high": 1.0}})
    plan = planning.make(spec, search.paths.folder)
    assert plan.incumbent == {"width": 8, "lr": 0.1}
    assert plan.notes == (
        "first trial: width 32 is outside the space; 8 instead",
        "first trial: lr 0.001 is outside the space; 0.1 instead",
    )
    assert not search.paths.folder.exists()


def test_a_first_trial_that_breaks_a_constraint_is_told_and_left_out(toy: Load, search: Search) -> None:
    spec = toy(
        parameters={"width": {"choices": [8, 16]}},
        constraints=["width > 8"],
        fixed={"epochs": 1},
        search={"trials": 1, "sampler": "random"},
        promotion={"k": 1},
    )
    plan = planning.make(spec, search.paths.folder)
    assert "first trial: these values break the constraint width > 8; it is left out" in plan.notes
    rows = search.run(spec)
    assert [record.params for record in search.records(spec)] == [{"width": 16}]
    assert [row.role for row in rows] == ["promoted"]


def test_a_logger_that_fails_costs_its_entries_and_nothing_else(
    toy: Load, search: Search, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Tune takes an error in the driver for one of the trial: it would kill the slot each time."""

    def unreachable(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tracking, "log_trial", unreachable)
    spec = toy(fixed={"epochs": 1}, search={"trials": 2}, promotion={"k": 1}, resources={"slots": 1})
    search.run(spec)
    assert [(record.state, record.attempts) for record in search.records(spec)] == [("complete", 1)] * 2
    for number in (0, 1):
        assert f"trial {number} is not in the logger: ConnectionError: no route to host" in caplog.text
    assert "None" not in caplog.text


def test_an_error_of_our_own_breaks_off_the_search(toy: Load, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        raise LookupError("a mistake in the driver")

    monkeypatch.setattr(Study, "tell", wrong)
    with pytest.raises(LookupError, match="a mistake in the driver"):
        search.run(toy(fixed={"epochs": 1}, search={"trials": 9}, resources={"slots": 1}))


@pytest.mark.row("F15")
def test_ray_tune_keeps_no_trial_that_has_ended(toy: Load, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[weakref.ref[Any]] = []
    kept: dict[int, int] = {}

    def count(ticks: executor._Ticks, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        gc.collect()
        started.append(weakref.ref(trial))
        kept[len(started)] = sum(ref() is not None for ref in started)

    monkeypatch.setattr(executor._Ticks, "on_trial_start", count)
    fails = {"fail": {"choices": ["never", "error"]}}
    spec = toy(
        parameters={"lr": {"type": "float", "low": 1.0e-4, "high": 1.0, "log": True}, **fails},
        fixed={"epochs": 2},
        search={"sampler": "random", "trials": 16},
        stopping={"rule": "none"},
        resources={"slots": 2},
    )
    search.run(spec)
    assert {record.state for record in search.records(spec)} == {"complete", "failed"}
    # Those of both slots, and one more for each that has been asked already.
    assert kept.keys() == set(range(1, 17)) and max(kept.values()) <= 4
