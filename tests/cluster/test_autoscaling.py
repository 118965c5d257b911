"""A search on a cluster that grows and shrinks: the fake machines of Ray's own autoscaler, raylets on this one."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import spec_file
from search.record import StudyPaths
from search.study import Study
from tests import heads
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SPOT, ON_DEMAND, MOST = 2, 2, 3
"""Machines of each kind that there may be, and of all kinds together."""
IDLE_MINUTES = 0.1
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
"""What every file of a cluster has; here there is nothing to set up."""
WATCH = """
import json, os, sys, time
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
while True:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = {kind: sum(kind in found for found in alive) for kind in ("spot", "on_demand")}
    print(json.dumps({"time": time.time(), **kinds}), flush=True)
    time.sleep(0.5)
"""


@dataclass
class Growing:
    """A cluster whose machines come and go."""

    address: str
    folder: Path

    def seen(self) -> list[dict[str, Any]]:
        """Return how many machines of each kind there were, over time."""
        return [json.loads(line) for line in (self.folder / "watch.txt").read_text().splitlines() if line[-1:] == "}"]

    def wait(self, count: int, timeout_s: float) -> None:
        """Wait until there are so many machines."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if (seen := self.seen()) and seen[-1]["spot"] + seen[-1]["on_demand"] == count:
                return
            time.sleep(0.5)
        raise AssertionError(f"not {count} machines in {timeout_s} s: {self.seen()[-3:]}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Growing]:
    """Start a head whose autoscaler adds machines of one CPU: spot ones first, all others once there are no more."""
    port, head = heads.free_port(), secrets.token_hex(28)
    config = {
        "cluster_name": "fake",
        "max_workers": MOST,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": head,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": node("spot", SPOT, 10),
            "on_demand": node("on_demand", ON_DEMAND, 0),
        },
        "head_node_type": "ray.head.default",
        **{key: [] for key in COMMANDS},
        **{"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
    }
    options = ("--num-cpus=0", "--include-dashboard=false", f"--autoscaling-config={tmp_path / 'cluster.yaml'}")
    with (
        heads.started(port, tmp_path, *options, environment=heads.variables(**environment)) as address,
        (tmp_path / "watch.txt").open("w") as seen,
    ):
        watching = {**os.environ, "RAY_ADDRESS": address}
        watch = subprocess.Popen([sys.executable, "-c", WATCH], env=watching, stdout=seen)
        try:
            yield Growing(address, tmp_path)
        finally:
            watch.kill()
            watch.wait()


@pytest.mark.row("C10")
def test_slots_come_with_the_machines_and_go_with_them(cluster: Growing) -> None:
    """From none to the most there may be and back, spot machines first; that many slots without being told."""
    paths, spec = search(cluster, {"fixed": {"epochs": 20, "epoch_s": 0.5}})
    seen = cluster.seen()
    assert max(line["spot"] + line["on_demand"] for line in seen) == MOST
    assert max(line["spot"] for line in seen) == SPOT
    first = next(line for line in seen if line["spot"] + line["on_demand"])
    assert first["on_demand"] == 0, "an on-demand machine came before the spot ones"
    cluster.wait(0, 60)
    records = Study(paths, spec).records()
    assert [record.state for record in records] == ["complete"] * 8
    assert at_once(records) == MOST


@pytest.mark.row("C10")
def test_a_gang_over_machines_is_given_back(cluster: Growing) -> None:
    resources = {"workers": 2, "max_attempts": 2}
    parameters = {"lr": {"type": "float", "low": 0.1, "high": 1.0}}
    fixed = {"epochs": 6, "epoch_s": 0.5}
    content = {"workload": "tests.parallel_workload", "parameters": parameters, "fixed": fixed, "resources": resources}
    paths, spec = search(cluster, {**content, "search": {"trials": 3}})
    cluster.wait(0, 60)
    assert [record.state for record in Study(paths, spec).records()] == ["complete"] * 3


def search(cluster: Growing, sections: dict[str, Any]) -> tuple[StudyPaths, Any]:
    content = {
        "workload": "toy",
        "objective": {"metric": "score", "mode": "max"},
        "parameters": {"lr": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}},
        "search": {"trials": 8},
        "stopping": {"rule": "none"},
        "promotion": {"k": 1},
        **sections,
    }
    space = cluster.folder / "space.yaml"
    space.write_text(yaml.safe_dump(content))
    command = [sys.executable, "tune.py", "--space", str(space), "--runs", str(cluster.folder)]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return StudyPaths(cluster.folder / "space"), spec_file.load(str(space))


def at_once(records: list[Any]) -> int:
    """Return how many trials ran at the same time, at the most."""
    moments = [(r.started, 1) for r in records] + [(r.finished, -1) for r in records]
    running = most = 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


def node(kind: str, most: int, priority: int) -> dict[str, Any]:
    return {
        "resources": {"CPU": 1, kind: 1},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
        "priority": priority,
    }
