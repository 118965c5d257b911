"""Trials that hang, alone or in one rank, and trials for which the memory does not suffice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from search import epochs, spec_file
from search.record import StudyPaths, TrialRecord
from search.study import Study
from tests.conftest import ROOT
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

LIMIT_S = 8.0
"""The watchdog's time in these tests; a gang's first epoch has to fit."""
EATEN_GIB = 6.0
"""Far more than what runs beside these tests may take meanwhile."""
TOY: dict[str, Any] = {
    "workload": "toy",
    "objective": {"metric": "score", "mode": "max"},
    "fixed": {"epochs": 3, "epoch_s": 0.2},
    "search": {"sampler": "grid", "trials": 4},
    "stopping": {"rule": "none"},
    "promotion": {"k": 1},
}


@pytest.mark.parametrize("workers", [1, 2], ids=["slot", "gang"])
@pytest.mark.row("F11")
def test_what_hangs_is_ended_and_the_next_trial_runs(tmp_path: Path, tell: Tell, workers: int) -> None:
    fails = {"fail": {"choices": ["hang", "never"]}} if workers == 1 else {"fails": {"choices": ["hang", ""]}}
    space = {
        **TOY,
        "workload": "toy" if workers == 1 else "tests.parallel_workload",
        "parameters": {**fails, "lr": {"choices": [0.01, 0.1]}},
        "resources": {"workers": workers, "slots": 1, "hung_after_s": LIMIT_S},
    }
    records, folder = run(tmp_path, space)
    hung = [record for record in records if "hang" in record.params.values()]
    others = [record for record in records if record not in hung]
    assert all(record.reason.startswith(f"hung: no epoch in {LIMIT_S:g} s") for record in hung)
    waited = [
        record.finished.timestamp() - epochs.read(folder.trial(record.number))[-1].time
        for record in hung
        if record.finished is not None
    ]
    tell(
        "hung trial or rank",
        "a slot" if workers == 1 else "a rank of a gang",
        hung=len(hung),
        ended=sum(record.state == "failed" for record in hung),
        others_unfinished=sum(record.state != "complete" for record in others),
        slowest_end_after_the_limit_s=max(waited) - LIMIT_S,
    )
    assert len(hung) == len(others) == 2


@pytest.mark.parametrize("workers", [1, 2], ids=["slot", "gang"])
@pytest.mark.row("F10")
def test_a_machine_without_memory_costs_the_trial_that_eats_it(tmp_path: Path, tell: Tell, workers: int) -> None:
    """Ray ends a process before the system has to: its limit is set a little above what is in use now.

    It looks once a second, so that the memory of a process that it has ended is free when it looks again.
    """
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (EATEN_GIB - 1) * 2**30) / memory.total
    if limit > 0.95:
        pytest.skip("too much of this machine's memory is in use")
    environment = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "1000"}
    lr = {"lr": {"choices": [0.01, 0.1]}}
    if workers == 1:
        parts = {
            "parameters": {"fail": {"choices": ["eat", "never"]}, **lr},
            "fixed": {**TOY["fixed"], "eat_gib": EATEN_GIB},
            "resources": {"slots": 2},
        }
    else:
        parts = {
            "workload": "tests.parallel_workload",
            "parameters": {"fails": {"choices": ["eat", ""]}, **lr},
            "resources": {"workers": 2},
        }
    records, _ = run(tmp_path, {**TOY, **parts}, environment)
    _tell(tell, f"of the host, {workers} workers", records, "eat", "out of memory: ")


@pytest.mark.row("F10")
def test_a_device_without_memory_costs_its_trial(tmp_path: Path, tell: Tell) -> None:
    parameters = {"fail": {"choices": ["memory", "device", "never"]}, "lr": {"choices": [0.01, 0.1]}}
    records, _ = run(tmp_path, {**TOY, "parameters": parameters, "search": {"sampler": "grid", "trials": 6}})
    _tell(tell, "as a process meets it", records, "memory", "MemoryError: ")
    _tell(tell, "a device's error", records, "device", "RuntimeError: CUDA error: ")


def _tell(tell: Tell, done: str, records: list[TrialRecord], how: str, reason: str) -> None:
    eaters = [record for record in records if how in record.params.values()]
    others = [record for record in records if not {"never", ""}.isdisjoint(map(str, record.params.values()))]
    tell(
        "out of memory",
        done,
        trials=len(eaters),
        marked=sum(record.state == "failed" and record.reason.startswith(reason) for record in eaters),
        tried_again=sum(record.attempts - 1 for record in eaters),
        others_unfinished=sum(record.state != "complete" for record in others),
    )
    assert len(eaters) == len(others) == 2


def run(
    folder: Path, space: dict[str, Any], environment: dict[str, str] | None = None
) -> tuple[list[TrialRecord], StudyPaths]:
    """Run a whole search in a Ray of its own; return its trials and where they are."""
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space))
    command = [sys.executable, "tune.py", "--space", str(file), "--runs", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    paths = StudyPaths(folder / "space")
    return Study(paths, spec_file.load(str(file))).records(), paths
