"""Searches on a cluster that others use too: its slots are shared, and Prometheus finds how they go."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from search import glance
from search.metrics import METRICS
from search.record import StudyPaths
from tests import heads
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Start a Ray of its own whose agent serves metrics; gives the ports and the address."""
    pytest.importorskip("prometheus_client", reason="needs ray[default]")
    exported = heads.free_port()
    environment = heads.variables(RAY_metrics_report_interval_ms="1000")
    options = ("--num-cpus=2", "--include-dashboard=false", f"--metrics-export-port={exported}")
    with heads.started(heads.free_port(), tmp_path, *options, environment=environment) as address:
        yield {"address": address, "metrics": f"http://127.0.0.1:{exported}/metrics", "env": environment}


@contextlib.contextmanager
def driver(head: dict[str, Any], folder: Path, name: str, trials: int, epochs: int) -> Iterator[subprocess.Popen[str]]:
    """Start `python tune.py` on the cluster; its slots are both CPUs."""
    space = folder / f"{name}.yaml"
    space.write_text(
        "workload: toy\nobjective: {metric: score, mode: max}\n"
        "parameters: {lr: {type: float, low: 1.0e-4, high: 1.0, log: true}}\n"
        f"fixed: {{epochs: {epochs}, epoch_s: 0.2}}\nsearch: {{sampler: random, trials: {trials}}}\n"
        "stopping: {rule: none}\nresources: {slots: 2, gpus_per_worker: 0}\n"
        "promotion: {k: 1}\nevaluation: {gpus: 0}\n"
    )
    command = [sys.executable, str(ROOT / "tune.py"), "--space", str(space), "--runs", str(folder / "runs")]
    environment = {**head["env"], "RAY_ADDRESS": head["address"]}
    with (folder / f"{name}.txt").open("w") as told:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=told, stderr=told, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(60)


def records(folder: Path, name: str) -> list[Any]:
    paths = StudyPaths(folder / "runs" / name)
    return glance.at(paths).records if paths.spec.exists() else []


def ended(folder: Path, name: str) -> int:
    return sum(record.state == "complete" for record in records(folder, name))


def wait_for(folder: Path, name: str, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 90
    while ended(folder, name) < count:
        assert process.poll() is None and time.monotonic() < until, (folder / f"{name}.txt").read_text()
        time.sleep(0.2)


def most_at_once(found: list[Any], since: datetime, until: datetime) -> int:
    """Return how many trials ran at the same time, of those that were begun in a span."""
    ended = (record for record in found if record.finished)
    spans = [(record.started, record.finished) for record in ended if since < record.started < until]
    return max((sum(a <= start < b for a, b in spans) for start, _ in spans), default=0)


@pytest.mark.row("C11")
def test_a_second_search_gets_its_share_at_once_and_gives_it_back(head: dict[str, Any], tmp_path: Path) -> None:
    """Without queues the first search, whose slots are reused, would keep both to its end."""
    with driver(head, tmp_path, "first", trials=60, epochs=5) as first:
        wait_for(tmp_path, "first", 4, first)
        with driver(head, tmp_path, "second", trials=6, epochs=5) as second:
            wait_for(tmp_path, "second", 1, second)
            assert ended(tmp_path, "first") < 55
            assert second.wait(90) == 0, (tmp_path / "second.txt").read_text()
        gone = datetime.now()
        wait_for(tmp_path, "first", ended(tmp_path, "first") + 12, first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 130
    mine, others = records(tmp_path, "first"), [r for r in records(tmp_path, "second") if r.started]
    assert len(others) == 6
    began, last = min(r.finished for r in others), max(r.started for r in others)
    assert most_at_once(mine, datetime.min, began) == 2, "all of the cluster while it was alone"
    assert most_at_once(mine, began, last) == 1, "its half while there were two"
    assert most_at_once(mine, gone, datetime.max) == 2, "and all again"
    assert "1 of 2 slots, queue default, 1 other searches here" in (tmp_path / "first.txt").read_text()


@pytest.mark.row("C13")
def test_prometheus_finds_the_figures_of_a_search_on_the_real_port(head: dict[str, Any], tmp_path: Path) -> None:
    with driver(head, tmp_path, "cells", trials=12, epochs=20) as search:
        try:
            seen: dict[str, float] = {}
            until = time.monotonic() + 120
            while time.monotonic() < until and not _all_there(seen):
                assert search.poll() is None
                time.sleep(1)
                seen |= _scrape(head["metrics"])
        finally:
            search.terminate()
    assert _all_there(seen), seen
    names = {re.split(r"[{ ]", line)[0] for line in seen}
    assert names >= {f"ray_{name}" for name in METRICS} - {"ray_search_retries_total"}
    assert seen[_key(seen, "ray_search_slots")] == 2
    assert seen[_key(seen, "ray_search_slots_used")] == 2
    assert 'study="cells"' in _key(seen, "ray_search_slots") and 'workload="toy"' in _key(seen, "ray_search_slots")


def _all_there(seen: dict[str, float]) -> bool:
    reports = [value for line, value in seen.items() if line.startswith("ray_search_reports_total")]
    ended = [value for line, value in seen.items() if line.startswith("ray_search_trials_ended_total")]
    used = [value for line, value in seen.items() if line.startswith("ray_search_slots_used")]
    return bool(reports and ended and used) and reports[0] > 20 and ended[0] >= 2 and used[0] == 2


def _key(seen: dict[str, float], name: str) -> str:
    return next(line for line in seen if line.startswith(f"{name}{{"))


def _scrape(url: str) -> dict[str, float]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = (line.rpartition(" ") for line in lines if line.startswith("ray_search"))
    return {name: float(value) for name, _, value in found}
