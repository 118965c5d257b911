"""How far a cluster can grow, as its head knows it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster import fit
from cluster.files import read
from search import growth
from search.errors import BadInput
from search.growth import Growth
from search.queues import Broker
from search.resources import Room
from tests import heads
from tests.conftest import ROOT

AWS = ROOT / "cluster" / "aws.yaml"


@pytest.fixture
def autoscaler() -> Iterator[str]:
    """Have a process that looks as Ray's autoscaler does; give the port of its cluster."""
    port = str(heads.free_port())
    words = [f"--gcs-address=127.0.0.1:{port}", f"--autoscaling-config={AWS}"]
    process = subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE)
    yield port
    process.communicate(b"\n")


@pytest.mark.row("C10")
def test_the_file_of_the_autoscaler_tells(autoscaler: str) -> None:
    assert growth.told(autoscaler, {}) == Growth(True, (64.0, 8.0)) == Growth(True, fit.largest(read(AWS)))
    assert growth.told("1", {}) == Growth(autoscales=False), "that of another cluster does not"


@pytest.mark.row("C10")
def test_the_owner_tells_where_there_is_no_file(autoscaler: str) -> None:
    assert growth.told(autoscaler, {growth.VARIABLE: "96 CPU, 12 GPU"}) == Growth(True, (96.0, 12.0))
    assert growth.read("8 CPU") == (8.0, 0.0) and growth.read(growth.written((96, 12))) == (96.0, 12.0)
    assert growth.told("1", {"RAY_USAGE_STATS_KUBERAY_IN_USE": "1"}) == Growth(autoscales=True)
    with pytest.raises(BadInput, match="TUNE_CLUSTER_MOST: got 'lots'; write such as 96 CPU, 12 GPU"):
        growth.told("1", {growth.VARIABLE: "lots"})


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_heads_are_told_what_their_groups_come_to(name: str) -> None:
    file = read(ROOT / "cluster" / name)
    assert f'{growth.VARIABLE}, value: "{growth.written(fit.largest(file))}"' in file.text


@pytest.mark.parametrize(("known", "slots"), [(Growth(True, (3.0, 0.0)), 3), (Growth(True), 8), (Growth(), 0)])
@pytest.mark.row("C10")
def test_an_empty_cluster_is_shared_as_large_as_it_can_get(
    known: Growth, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(0.0, 0.0, "a cluster", grows=True, autoscales=known.autoscales, most=known.most)
    monkeypatch.setattr("search.ray_session.cluster", lambda: room)
    claim = {"study": "a", "queue": "default", "wanted": 8, "cpus": 1.0, "gpus": 0.0, "since": 0.0}
    assert Broker().ask(claim) == {"slots": slots, "searches": 1}
