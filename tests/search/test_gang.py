"""Trials of several workers, with real Ray, real processes and real collectives."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import epochs, planning, service, spec_file
from search.record import StudyPaths, TrialRecord
from search.study import Study
from tests.search.conftest import Load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

SPACE: dict[str, Any] = {
    "workload": "tests.parallel_workload",
    "objective": {"metric": "score", "mode": "max"},
    "parameters": {"lr": {"type": "float", "low": 0.1, "high": 1.0}},
    "stopping": {"rule": "none"},
    "promotion": {"k": 1},
    "resources": {"workers": 2, "max_attempts": 2},
}

Run = Callable[..., tuple[StudyPaths, list[TrialRecord]]]


@pytest.fixture
def run(toy: Load, tmp_path: Path) -> Run:
    """Return a function that runs a search of gangs to its end."""

    def searched(**sections: Any) -> tuple[StudyPaths, list[TrialRecord]]:
        spec = toy(**{**SPACE, **sections})
        plan = planning.make(spec, tmp_path / "study")
        service.run(plan, io.StringIO())
        return plan.paths, Study(plan.paths, spec).records()

    return searched


def workers() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "RayTrainWorker" in name or "ResourceTrainable" in name


def pids(paths: StudyPaths, number: int) -> list[int]:
    metrics = epochs.read(paths.trial(number))[-1].metrics
    return [int(metrics["pid0"]), int(metrics["pid1"])]


def placement_groups() -> list[str]:
    from ray.util import placement_group_table

    return [row["state"] for row in placement_group_table().values() if row["state"] != "REMOVED"]


@pytest.mark.row("K45")
def test_trials_run_one_after_another_in_the_same_processes_and_nothing_is_left(run: Run) -> None:
    paths, records = run(search={"trials": 6}, stopping={"rule": "asha", "min_epochs": 1, "reduction": 2})
    states = [record.state for record in records]
    assert set(states) == {"complete", "stopped"} and states.count("complete") >= 2
    assert len({tuple(pids(paths, record.number)) for record in records}) == 1
    assert len(set(pids(paths, 0))) == 2
    for record in records:
        rows = epochs.read(paths.trial(record.number))
        assert {row.metrics["world"] for row in rows} == {2.0}
        assert [row.epoch for row in rows] == list(range(1, len(rows) + 1))
    assert (workers(), placement_groups()) == ([], [])
    assert not paths.gangs.exists()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "gang"])
def test_a_killed_process_is_replaced_and_its_trial_goes_on(run: Run, tmp_path: Path, who: str) -> None:
    paths = StudyPaths(tmp_path / "study")
    killed: dict[str, Any] = {}

    def kill() -> None:
        for _ in range(600):
            if len(rows := epochs.read(paths.trial(0))) >= 2:
                ranks = pids(paths, 0)
                pid = ranks[1] if who == "rank" else next(pid for pid in workers() if pid not in ranks)
                killed.update(rows=len(rows), at=time.time())
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    _, records = run(search={"trials": 1}, fixed={"epochs": 8, "epoch_s": 0.4})
    killer.join()
    rows = epochs.read(paths.trial(0))
    assert [row.epoch for row in rows] == list(range(1, 9))
    assert [row.attempt for row in rows] == sorted(row.attempt for row in rows)
    assert (records[0].state, records[0].attempts) == ("complete", 2)
    assert sum(row.attempt == 1 for row in rows) >= killed["rows"]
    assert next(row.time for row in rows if row.attempt == 2) - killed["at"] < 60
    assert (workers(), placement_groups()) == ([], [])


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_its_trial_and_not_the_search(run: Run) -> None:
    """`short` is a lack of memory that half as many images in a pass may mend: the trial goes on."""
    _, records = run(
        parameters={"fails": {"type": "categorical", "choices": ["raise", "memory", "short", ""]}},
        search={"sampler": "grid", "trials": 4},
    )
    assert {record.params["fails"]: (record.state, record.reason, record.attempts) for record in records} == {
        "raise": ("failed", "ValueError: this rank cannot go on", 1),
        "memory": ("failed", "OutOfMemoryError: out of memory, on this rank only", 1),
        "short": ("complete", "finished", 3),
        "": ("complete", "finished", 1),
    }
    short = next(record for record in records if record.params["fails"] == "short")
    assert short.metrics["micro_batch"] == 2.0, "8 and 4 were too many"


@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_is_replaced(run: Run) -> None:
    paths, records = run(
        parameters={"fails": {"type": "categorical", "choices": ["exit", "hang", ""]}},
        resources={**SPACE["resources"], "hung_after_s": 8.0},
        search={"sampler": "grid", "trials": 3},
    )
    assert {record.params["fails"]: (record.state, record.reason, record.attempts) for record in records} == {
        "exit": ("failed", "rank 1 of 2 died, the last of 2 times", 2),
        "hang": (
            "failed",
            "hung: no epoch in 8 s; error.txt shows where it stood; no answer from rank 0, 1 of 2",
            1,
        ),
        "": ("complete", "finished", 1),
    }
    hung = next(record for record in records if record.params["fails"] == "hang")
    stacks = (paths.trial(hung.number) / "error.txt").read_text()
    assert "rank-1-hung.txt" in stacks and "in _fail" in stacks.partition("rank-1-hung.txt")[2]


def test_what_a_gang_cannot_be_given_is_refused(toy: Load) -> None:
    from search.errors import SpecError

    for resources, text in (
        ({"workers": 2, "strategy": "single"}, "resources.strategy: got single for 2 workers; write auto or ddp"),
        ({"workers": 0}, "resources.workers: got 0; expected at least 1"),
        ({"strategy": "deepseed"}, "resources.strategy"),
        ({"zero_stage": 4}, "resources.zero_stage"),
    ):
        with pytest.raises(SpecError, match=text.replace(".", r"\.")):
            toy(**{**SPACE, "resources": resources})
    with pytest.raises(SpecError, match="workload toy trains in one process only"):
        toy(resources={"workers": 2})
    with pytest.raises(SpecError, match="stands under fixed or parameters too"):
        toy(**{**SPACE, "resources": {"strategy": "ddp"}, "fixed": {"strategy": "ddp"}})
    assert spec_file.fixed_values(toy(**{**SPACE, "resources": {"strategy": "deepspeed", "zero_stage": 2}})) == {
        "strategy": "deepspeed",
        "zero_stage": 2,
    }
