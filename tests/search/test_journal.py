"""The journal: whole lines that outlive a kill at once, and one wait for the disk before a slot gets a trial."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from search import spec_file
from search.record import StudyPaths
from search.spec import SearchSpec
from search.study import Outcome, Study


@pytest.fixture
def spec(tmp_path: Path) -> SearchSpec:
    space = tmp_path / "space.yaml"
    space.write_text(
        "workload: toy\nobjective: {metric: score, mode: max}\n"
        "parameters: {lr: {type: float, low: 0.001, high: 1.0}}\nsearch: {sampler: random, trials: 5}\n"
    )
    return spec_file.load(str(space))


def outcome(epochs: int) -> Outcome:
    scores = {epoch: (epoch / 10,) for epoch in range(1, epochs + 1)}
    return Outcome(state="complete", reason="finished", epochs=scores, best_epoch=epochs, metrics={"score": 0.5})


def test_everything_told_is_there_for_another_process_at_once(tmp_path: Path, spec: SearchSpec) -> None:
    paths = StudyPaths(tmp_path)
    study = Study(paths, spec)
    task = study.ask()
    assert task is not None
    study.tell(task.number, outcome(3))

    record = Study(paths, spec).record(task.number)

    assert record.epochs == {1: (0.1,), 2: (0.2,), 3: (0.3,)}
    assert (record.state, record.reason, record.params) == ("complete", "finished", dict(task.params))


def test_the_disk_is_waited_for_once_a_trial_however_long(
    tmp_path: Path, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(StudyPaths(tmp_path), spec)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))

    for asked in range(1, 4):
        task = study.ask()
        assert task is not None
        assert len(synced) == asked
        assert synced[-1] == (tmp_path / "study.journal").stat().st_size, "the trial is not yet in what is synced"
        study.tell(task.number, outcome(50))
        assert len(synced) == asked
