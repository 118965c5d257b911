from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import durable
from search import trial
from search.errors import StudyError
from search.record import StudyPaths
from search.spec import SearchSpec
from search.storage.lease import lease
from search.study import Outcome, Study, Task, read_outcome

Load = Callable[..., SearchSpec]
Open = Callable[[SearchSpec], Study]
Drive = Callable[[Study, Task], Outcome]
RANDOM = {"sampler": "random", "trials": 6, "seed": 3}


def complete(*scores: float) -> Outcome:
    epochs = {epoch: (score,) for epoch, score in enumerate(scores, start=1)}
    return Outcome(state="complete", reason="finished", epochs=epochs, best_epoch=scores.index(max(scores)) + 1)


def ask(study: Study) -> Task:
    task = study.ask()
    assert task is not None
    return task


def as_optuna_sees_it(study: Study) -> optuna.Study:
    """Open the study as anybody would who has never heard of us."""
    storage = JournalStorage(JournalFileBackend(str(study.paths.journal)))
    return optuna.load_study(study_name=study.spec.name, storage=storage)


def test_optuna_is_told_the_truth(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search=RANDOM))
    first, second, third, fourth = (ask(study) for _ in range(4))
    study.tell(first.number, complete(0.5, 0.9, 0.7))
    study.tell(second.number, Outcome(state="stopped", reason="place 3 of 3", epochs={1: (0.4,), 2: (0.6,)}))
    study.tell(third.number, Outcome(state="failed", reason="RuntimeError: no", epochs={1: (0.1,)}, attempts=2))
    trials = as_optuna_sees_it(study).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    assert trials[0].value == 0.9 and trials[0].user_attrs["best_epoch"] == 2
    assert trials[0].intermediate_values == {1: 0.5, 2: 0.9, 3: 0.7}
    # Optuna itself gives a pruned trial its last intermediate value; the best of a low epoch is no score.
    assert trials[1].intermediate_values == {1: 0.4, 2: 0.6} and trials[1].user_attrs["reason"] == "place 3 of 3"
    assert trials[2].user_attrs["reason"] == "RuntimeError: no" and trials[2].value is None
    assert trials[3].params == fourth.params
    assert as_optuna_sees_it(study).best_trial.number == 0

    assert [record.state for record in study.records()] == ["complete", "stopped", "failed", "running"]
    assert [record.values for record in study.records()] == [(0.9,), None, None, None]
    assert study.record(1).epochs == {1: (0.4,), 2: (0.6,)}
    assert (study.record(2).reason, study.record(2).attempts) == ("RuntimeError: no", 2)
    assert len({record.seed for record in study.records()}) == 4
    assert [record.params for record in study.records()] == [t.params for t in (first, second, third, fourth)]


def test_what_is_told_is_read_back(toy: Load, open_study: Open) -> None:
    spec = toy(search=RANDOM, parameters={"width": {"choices": [8, 16]}, "lr": {"choices": [0.1, 0.2, 0.3, 0.4]}})
    study = open_study(spec)
    for _ in range(3):
        study.tell(ask(study).number, complete(0.5, 0.25))
    assert open_study(spec).records() == study.records()
    assert open_study(spec).history == study.history


def test_two_objectives_are_kept_at_every_epoch(toy: Load, open_study: Open) -> None:
    spec = toy(objective=[{"metric": "score"}, {"metric": "cost"}], search=RANDOM)
    study = open_study(spec)
    epochs = {1: (0.5, 8.0), 2: (0.75, 8.0)}
    study.tell(ask(study).number, Outcome(state="complete", reason="", epochs=epochs, best_epoch=2))
    study.tell(ask(study).number, Outcome(state="stopped", reason="late", epochs={1: (0.1, 9.0)}))
    first, second = open_study(spec).records()
    assert (first.values, first.epochs) == ((0.75, 8.0), epochs)
    assert (second.values, second.epochs, second.state) == (None, {1: (0.1, 9.0)}, "stopped")
    seen = as_optuna_sees_it(study)
    assert [t.number for t in seen.best_trials] == [0]
    assert seen.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]


def test_a_trial_ends_once(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search=RANDOM))
    number = ask(study).number
    study.tell(number, complete(0.5))
    study.tell(number, Outcome(state="failed", reason="late", epochs={}))
    assert (study.record(number).state, study.record(number).values) == ("complete", (0.5,))


def test_an_enqueued_trial_comes_first_once_and_is_never_stopped(toy: Load, open_study: Open) -> None:
    spec = toy(search=RANDOM, stopping={"rule": "asha", "min_epochs": 1})
    for _ in range(2):
        study = open_study(spec)
        study.enqueue({"lr": 0.25, "width": 16}, "defaults")
        study.enqueue({"lr": 0.25, "width": 16}, "defaults")
    assert study.left() == 6
    first, second = ask(study), ask(study)
    assert (first.number, first.params, study.record(0).note) == (0, {"lr": 0.25, "width": 16}, "defaults")
    assert second.params != first.params and study.record(1).note == ""
    study.report(1, 1, (0.9,))
    assert not study.report(0, 1, (0.1,)).stop
    again = open_study(spec)
    again.enqueue({"lr": 0.25, "width": 16}, "defaults")
    assert [ask(again).number for _ in range(3)] == [0, 1, 2]
    again.report(1, 1, (0.9,))
    again.report(2, 1, (0.8,))
    assert not again.report(0, 1, (0.1,)).stop, "an enqueued trial is protected after a restart, too"
    assert again.report(2, 1, (0.8,)).stop


def test_enqueued_lists_and_overrides_reach_the_configuration(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search={"trials": 1}))
    study.enqueue({"lr": 0.5, "width": 9}, "7-seed1", {"epochs": 3, "seed": 77})
    study.enqueue({"lr": 0.5, "width": 9}, "7-seed2", {"epochs": 3, "seed": 78})
    assert study.left() == 2, "all that is enqueued is run, whatever the spec wants"
    first, second = ask(study), ask(study)
    assert (first.config["epochs"], first.config["seed"], second.config["seed"]) == (3, 77, 78)
    assert (study.ask(), study.left()) == (None, 0)
    assert [record.seed for record in study.records()] == [77, 78]


def test_what_is_enqueued_later_is_left_to_run(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search={"trials": 1}))
    study.tell(ask(study).number, complete(0.5))
    assert study.left() == 0
    study.enqueue({"lr": 0.5, "width": 9}, "another")
    assert study.left() == 1
    assert ask(study).params == {"lr": 0.5, "width": 9}


def test_configurations_that_break_a_constraint_do_not_count(toy: Load, open_study: Open) -> None:
    spec = toy(search=RANDOM, constraints=["lr * width < 1"])
    study = open_study(spec)
    tasks = [ask(study) for _ in range(3)]
    study = open_study(spec)
    tasks = [ask(study) for _ in range(6)]
    assert study.ask() is None
    assert all(task.params["lr"] * task.params["width"] < 1 for task in tasks)
    assert [record.number for record in study.records()] == [task.number for task in tasks]
    refused = [t for t in as_optuna_sees_it(study).trials if "refused" in t.user_attrs]
    assert refused and all(t.state == TrialState.PRUNED for t in refused)
    assert refused[0].user_attrs["refused"] == "constraints: lr * width < 1 does not hold"


def test_what_the_config_refuses_does_not_count(toy: Load, open_study: Open) -> None:
    spec = toy(search=RANDOM, parameters={"lr": {"type": "float", "low": 0.1, "high": 1.0}})
    (lr,) = spec.parameters
    study = open_study(dataclasses.replace(spec, parameters=(dataclasses.replace(lr, low=-1.0),)))
    assert all(ask(study).config["lr"] > 0 for _ in range(6))


def test_a_constraint_that_cannot_be_computed_does_not_hold(toy: Load, open_study: Open) -> None:
    """It could at the first point, where it was tried; the search must not break at another."""
    parameters = {"lr": {"choices": [0.1]}, "width": {"type": "int", "low": 8, "high": 10}}
    spec = toy(search={"trials": 9}, parameters=parameters, constraints=["1 / (width - 9) < 5"])
    study = open_study(spec)
    assert {task.params["width"] for task in iter(study.ask, None)} == {8, 10}
    reasons = {t.user_attrs["refused"] for t in as_optuna_sees_it(study).trials if "refused" in t.user_attrs}
    assert reasons == {"constraints: 1 / (width - 9) < 5 cannot be computed: float division by zero"} or reasons == {
        "constraints: 1 / (width - 9) < 5 cannot be computed: division by zero"
    }


def test_constraints_that_nothing_fulfils_are_told(
    toy: Load, open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.study.REFUSALS", 5)
    study = open_study(toy(search=RANDOM, constraints=["lr > 2"]))
    with pytest.raises(StudyError, match="5 configurations in a row broke a constraint; loosen constraints: or the"):
        study.ask()


@pytest.mark.parametrize("tail", [b'{"op_code": 4, "wor', b'{"op_code": 4, "wor\n', b"\0" * 40, b'{"a":1}\n\n\0\n{"x'])
def test_a_torn_tail_of_the_journal_is_cut(
    toy: Load, open_study: Open, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    spec = toy(search=RANDOM)
    study = open_study(spec)
    study.tell(ask(study).number, complete(0.5))
    whole = study.paths.journal.read_bytes()
    if tail.startswith(b'{"a"'):
        tail = tail[len(b'{"a":1}\n') :]
    study.paths.journal.write_bytes(whole + tail)
    again = open_study(spec)
    assert f"cut {len(tail)} bytes" in caplog.text
    assert study.paths.journal.read_bytes().startswith(whole)
    assert all(map(json.loads, study.paths.journal.read_bytes().splitlines()))
    assert again.records() == study.records()
    again.tell(ask(again).number, complete(0.25))
    assert [record.values for record in open_study(spec).records()] == [(0.5,), (0.25,)]


def test_a_journal_cut_at_any_byte_opens_and_goes_on(toy: Load, tmp_path: Path) -> None:
    spec = toy(search=RANDOM)
    study = Study(StudyPaths(tmp_path), spec)
    study.tell(ask(study).number, complete(0.5))
    whole = study.paths.journal.read_bytes()
    for cut in range(0, len(whole), 97):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "study.journal").write_bytes(whole[:cut])
        again = Study(StudyPaths(folder), spec)
        assert again.left() + sum(record.state == "complete" for record in again.records()) == 6
        tasks = list(iter(again.ask, None))
        assert len(tasks) == again.spec.search.trials - sum(record.state == "complete" for record in again.records())
        shutil.rmtree(folder)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "nsga2"])
def test_a_half_asked_trial_is_asked_to_its_end(
    toy: Load, open_study: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """The process is killed between two parameters; the values are those of an unbroken study."""
    spec = toy(search={**RANDOM, "sampler": sampler})
    unbroken = Study(StudyPaths(tmp_path), spec)
    study = open_study(spec)
    ask(study)
    original = optuna.Trial.suggest_int

    def killed(*arguments: Any, **named: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(optuna.Trial, "suggest_int", killed)
    with pytest.raises(KeyboardInterrupt):
        study.ask()
    monkeypatch.setattr(optuna.Trial, "suggest_int", original)
    again = open_study(spec)
    assert again.left() == 6
    tasks = [ask(again) for _ in range(6)]
    assert again.ask() is None
    assert [task.number for task in tasks] == [0, 1, 2, 3, 4, 5]
    # qmc counts its questions in the study, and so goes on with another point.
    assert [task.params for task in tasks] == [ask(unbroken).params for _ in range(6)]


def test_a_half_asked_trial_that_was_enqueued_keeps_its_values(
    toy: Load, open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy(search=RANDOM)
    study = open_study(spec)
    study.enqueue({"lr": 0.25, "width": 16}, "defaults")

    def killed(*arguments: Any, **named: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(optuna.Trial, "suggest_int", killed)
        with pytest.raises(KeyboardInterrupt):
            study.ask()
    again = open_study(spec)
    again.enqueue({"lr": 0.25, "width": 16}, "defaults")
    assert ask(again).params == {"lr": 0.25, "width": 16}
    assert again.record(0).note == "defaults"
    assert ask(again).params != {"lr": 0.25, "width": 16}


def test_a_bit_flipped_before_the_journals_end_is_told_and_what_to_do_works(
    toy: Load, open_study: Open, drive: Drive
) -> None:
    """What follows the damage stands in the trials' folders, and is taken up from there with the same numbers."""
    spec = toy(search=RANDOM, fixed={"epochs": 2}, constraints=["width > 20"])
    study = open_study(spec)
    for task in iter(study.ask, None):
        drive(study, task)
    journal, before = study.paths.journal, study.records()
    lines = journal.read_bytes().splitlines(keepends=True)
    for number in range(2, len(lines), 19):
        line = bytearray(lines[number])
        line[len(line) // 2] ^= 1
        damaged = b"".join([*lines[:number], bytes(line), *lines[number + 1 :]])
        journal.write_bytes(damaged)
        if number == len(lines) - 1:
            continue
        with pytest.raises(StudyError, match=rf"line {number + 1} is damaged; nothing was changed; put back") as told:
            open_study(spec)
        assert journal.read_bytes() == damaged
        subprocess.run(str(told.value).split("(")[1].split(")")[0], shell=True, check=True)
        again = open_study(spec)
        for task in iter(again.ask, None):
            drive(again, task)
        as_before = [dataclasses.replace(record, started=None, finished=None, note="") for record in before]
        now = [dataclasses.replace(record, started=None, finished=None, note="") for record in again.records()]
        assert now == as_before


@pytest.mark.parametrize(("content", "state"), [(b"", "empty"), (b"\0" * 500, "line 1 is damaged")])
def test_a_journal_of_nothing_is_not_taken_for_a_new_study(
    toy: Load, open_study: Open, drive: Drive, content: bytes, state: str
) -> None:
    spec = toy(search=RANDOM, fixed={"epochs": 1})
    study = open_study(spec)
    drive(study, ask(study))
    study.paths.journal.write_bytes(content)
    with pytest.raises(StudyError, match=state):
        open_study(spec)
    assert study.paths.journal.read_bytes() == content


def test_a_journal_without_checksums_is_read_as_before(toy: Load, open_study: Open) -> None:
    """As Optuna writes it, or as we did once."""
    spec = toy(search=RANDOM)
    study = open_study(spec)
    study.tell(ask(study).number, complete(0.5))
    bare = [json.loads(line) for line in study.paths.journal.read_bytes().splitlines()]
    lines = [json.dumps({key: value for key, value in entry.items() if key != "crc"}) + "\n" for entry in bare]
    study.paths.journal.write_text("".join(lines))
    assert open_study(spec).records() == study.records()
    study.paths.journal.write_text("".join(lines).replace("op_code", "oq_code", 3))
    with pytest.raises(StudyError, match=r"cannot be read \(KeyError\('op_code'\)\); nothing was changed"):
        open_study(spec)


def test_a_committed_trial_is_told_at_the_next_start(toy: Load, open_study: Open, drive: Drive) -> None:
    spec = toy(search=RANDOM, fixed={"epochs": 3})
    study = open_study(spec)
    task = ask(study)
    other = ask(study)
    drive(study, other)
    expected = drive(open_study(spec), task)  # this driver "dies" after the commit, before any further question
    forgetful = StudyPaths(study.paths.folder.parent / "copy")
    shutil.copytree(study.paths.folder, forgetful.folder)
    lines = forgetful.journal.read_bytes().splitlines(keepends=True)
    asked = [line for line in lines if json.loads(line)["op_code"] < 6 or b"seed" in line]
    forgetful.journal.write_bytes(b"".join(asked))
    again = Study(forgetful, spec)
    assert [record.state for record in again.records()] == ["complete", "complete"]
    assert again.record(task.number).values == expected.epochs[3] == study.record(task.number).values
    assert again.left() == 4


def test_a_trial_in_flight_is_issued_again_as_it_was(toy: Load, open_study: Open) -> None:
    spec = toy(search=RANDOM)
    study = open_study(spec)
    tasks = [ask(study) for _ in range(3)]
    study.tell(1, complete(0.5))
    again = open_study(spec)
    assert (again.left(), again.in_flight()) == (5, 2)
    assert [ask(again), ask(again)] == [tasks[0], tasks[2]]
    assert again.in_flight() == 0
    assert ask(again).number == 3


def test_a_process_killed_while_it_told_has_its_work_finished(
    toy: Load, open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the epochs stand in the journal already; Optuna would warn of each that is told again."""
    spec = toy(search=RANDOM)
    study = open_study(spec)
    task = ask(study)
    outcome = complete(0.1, 0.2, 0.3)
    study.trial_folder(task.number).mkdir(parents=True)
    trial.commit(study.trial_folder(task.number), outcome)
    report = optuna.Trial.report

    def killed(self: optuna.Trial, value: float, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        report(self, value, step)

    monkeypatch.setattr(optuna.Trial, "report", killed)
    with pytest.raises(KeyboardInterrupt):
        study.tell(task.number, outcome)
    monkeypatch.setattr(optuna.Trial, "report", report)
    record = open_study(spec).record(task.number)
    assert (record.state, record.values, record.epochs) == ("complete", (0.3,), outcome.epochs)


def test_more_trials_go_on_where_the_study_ended(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search={**RANDOM, "trials": 2}))
    for task in iter(study.ask, None):
        study.tell(task.number, complete(0.5))
    more = open_study(toy(search={**RANDOM, "trials": 4}))
    assert [task.number for task in iter(more.ask, None)] == [2, 3]
    assert open_study(toy(search={**RANDOM, "trials": 1})).left() == 2, "those in flight are carried to their end"


def test_a_lost_journal_is_told_before_old_trials_are_taken_for_new_ones(
    toy: Load, open_study: Open, drive: Drive
) -> None:
    spec = toy(search=RANDOM, fixed={"epochs": 1})
    study = open_study(spec)
    drive(study, ask(study))
    study.paths.journal.unlink()
    with pytest.raises(StudyError, match=r"study\.journal: gone, but its trials are there; put it back, or start"):
        open_study(spec)


def test_checkpoints_are_forgotten_and_numbers_stay(toy: Load, open_study: Open, drive: Drive) -> None:
    study = open_study(toy(search=RANDOM, fixed={"epochs": 2}))
    drive(study, ask(study))
    record = study.record(0)
    assert record.checkpoint == "trials/0/checkpoints/epoch-0002" and record.checkpoint_sha256
    assert record.metrics["cost"] == record.params["width"]
    study.forget_checkpoint(0)
    assert study.record(0).checkpoint is None
    assert study.record(0).values == record.values


@pytest.mark.parametrize("kind", ["torn", "empty", "flipped", "null"])
def test_a_damaged_result_is_put_aside_and_the_trial_goes_on(
    toy: Load, open_study: Open, drive: Drive, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    spec = toy(search=RANDOM, fixed={"epochs": 3})
    study = open_study(spec)
    task = ask(study)
    folder = study.trial_folder(task.number)
    expected = drive(open_study(spec), task)
    content = (folder / "result.json").read_bytes()
    digit = content.index(b"0.") + 2
    damaged = {
        "torn": content[:-20],
        "empty": b"",
        "flipped": content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :],
        "null": b"null",
    }[kind]
    (folder / "result.json").write_bytes(damaged)
    assert read_outcome(folder) is None
    assert (folder / "result.json.damaged-1").read_bytes() == damaged
    assert "damaged (" in caplog.text and "the trial goes on from its checkpoint" in caplog.text
    again = drive(study, task)
    assert (again.epochs, again.state, again.attempts) == (expected.epochs, "complete", 2)
    assert study.record(task.number).values == expected.epochs[3]


def test_a_result_whose_hash_is_lost_is_damaged_and_one_of_a_later_version_is_read(
    toy: Load, open_study: Open, drive: Drive, tmp_path: Path
) -> None:
    study = open_study(toy(search=RANDOM, fixed={"epochs": 2}))
    task = ask(study)
    expected = drive(study, task)
    path = study.trial_folder(task.number) / "result.json"
    content = json.loads(path.read_text())
    assert len(content.pop("sha256")) == 64
    durable.commit(tmp_path / "result.json", {**content, "of a later version": 1})
    assert read_outcome(tmp_path) == expected
    path.write_text(json.dumps({**content, "{ha256": "0" * 64}))
    assert read_outcome(path.parent) is None


def test_no_outcome_is_read_from_nowhere(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None


HOLD = """
import sys, time
from pathlib import Path
from search.record import StudyPaths
from search.storage.lease import lease
with lease(StudyPaths(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_study(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "study")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError) as caught, lease(paths):
            pass
        text = str(caught.value)
        assert "another search holds this study" in text and f'"pid": {holder.pid}' in text
        assert "wait for it, stop it, or start a study of your own with --study NAME" in text
        holder.kill()
        holder.wait(timeout=10)
        with lease(paths):
            assert json.loads(paths.lease.read_text())["pid"] != holder.pid
    finally:
        holder.kill()
        holder.communicate(timeout=10)


def test_a_lease_is_given_back(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    with pytest.raises(RuntimeError), lease(paths):
        raise RuntimeError
    with lease(paths):
        pass
