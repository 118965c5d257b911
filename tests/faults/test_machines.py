"""Machines that go: without a word, or with the notice that a spot instance gets. They are raylets of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from search import epochs, spec_file
from search.epochs import EpochLine
from search.record import StudyPaths, TrialRecord
from search.study import Study
from tests.conftest import ROOT
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
EPOCHS = 30
TOY: dict[str, Any] = {
    "workload": "toy",
    "objective": {"metric": "score", "mode": "max"},
    "parameters": {"lr": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}},
    "fixed": {"epochs": EPOCHS, "epoch_s": 0.4},
    "stopping": {"rule": "none"},
    "promotion": {"k": 1},
}
GANG = {
    **TOY,
    "workload": "tests.parallel_workload",
    "parameters": {"lr": {"type": "float", "low": 0.1, "high": 1.0}},
    "resources": {"workers": 2, "max_attempts": 2},
}
NOTICE_S = 15
"""Seconds between a spot notice and the end of the machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a head that runs no trials."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


@pytest.fixture
def start(tmp_path: Path, cluster: Cluster) -> Iterator[Callable[[dict[str, Any]], subprocess.Popen[str]]]:
    """Return a function that starts a search on the cluster."""
    drivers: list[subprocess.Popen[str]] = []

    def started(space: dict[str, Any]) -> subprocess.Popen[str]:
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
        command = [sys.executable, "tune.py", "--space", str(tmp_path / "space.yaml"), "--runs", str(tmp_path)]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        with (tmp_path / "log.txt").open("w") as log:
            drivers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.kill()
        driver.wait()
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


@pytest.mark.row("F4")
def test_a_machine_that_dies_under_a_slot(
    cluster: Cluster, start: Callable[[dict[str, Any]], subprocess.Popen[str]], tmp_path: Path, tell: Tell
) -> None:
    node = cluster.add_node(num_cpus=1)
    driver = start({**TOY, "search": {"trials": 1}, "resources": {"slots": 1}})
    before = rows_once(tmp_path, 5)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    tell("machine gone", "under a slot", machines=1, **counted(tmp_path, driver, before))


@pytest.mark.row("F4")
def test_a_machine_that_dies_under_a_gang(
    cluster: Cluster, start: Callable[[dict[str, Any]], subprocess.Popen[str]], tmp_path: Path, tell: Tell
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    driver = start({**GANG, "search": {"trials": 1}})
    before = rows_once(tmp_path, 5)
    cluster.remove_node(nodes[1], allow_graceful=False)
    cluster.add_node(num_cpus=1)
    tell("machine gone", "under a gang", machines=1, **counted(tmp_path, driver, before))


@pytest.mark.parametrize("space", [TOY, GANG], ids=["slot", "gang"])
@pytest.mark.row("F5")
def test_a_spot_machine_that_gives_notice(
    cluster: Cluster,
    start: Callable[[dict[str, Any]], subprocess.Popen[str]],
    tmp_path: Path,
    tell: Tell,
    space: dict[str, Any],
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2 if space is GANG else 1)]
    driver = start({**space, "search": {"trials": 1}, "resources": {**space.get("resources", {}), "slots": 1}})
    rows_once(tmp_path, 5)
    drain(cluster, nodes[-1].node_id)
    cluster.add_node(num_cpus=1)
    time.sleep(1)
    before = epochs.read(StudyPaths(tmp_path / "space").trial(0))
    tell("spot notice", "gang" if space is GANG else "slot", notices=1, **counted(tmp_path, driver, before))


def rows_once(folder: Path, count: int) -> list[EpochLine]:
    """Wait until the trial has so many epochs; return what it has."""
    trial = StudyPaths(folder / "space").trial(0)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if len(rows := epochs.read(trial)) >= count:
            return rows
        time.sleep(0.1)
    raise AssertionError((folder / "log.txt").read_text())


def drain(cluster: Cluster, node: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address),
            *("--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE_S)),
        ],
        check=True,
        timeout=60,
        capture_output=True,
    )


def counted(folder: Path, driver: subprocess.Popen[str], before: list[EpochLine]) -> dict[str, float]:
    """Wait for the end of the search; return how many of these epochs were trained again, and how long nothing was."""
    code = driver.wait(200)
    assert code == 0, (folder / "log.txt").read_text()
    paths = StudyPaths(folder / "space")
    (record,) = records(paths, folder)
    rows = epochs.read(paths.trial(0))
    assert [row.epoch for row in rows] == list(range(1, EPOCHS + 1))
    _, second = sorted({row.attempt for row in rows})
    moved = next(place for place, row in enumerate(rows) if row.attempt == second)
    return {
        "unfinished": record.state != "complete",
        "most_redone": sum(row not in rows for row in before),
        "longest_gap_s": rows[moved].time - rows[moved - 1].time,
    }


def records(paths: StudyPaths, folder: Path) -> list[TrialRecord]:
    return Study(paths, spec_file.load(str(folder / "space.yaml"))).records()
