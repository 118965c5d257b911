"""`ray job submit` with the command of a laptop: the same results, a small package, a stop that loses nothing."""

from __future__ import annotations

import csv
import re
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
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from search import epochs, spec_file
from search.record import StudyPaths
from search.study import Study
from tests import heads
from tests.conftest import ROOT
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

MOST_MIB = 8.0
"""Of the package that a job uploads: the code and the embedded image."""
SPACE: dict[str, Any] = {
    "workload": "toy",
    "objective": {"metric": "score", "mode": "max"},
    "parameters": {"lr": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}},
    "fixed": {"epochs": 3},
    "search": {"trials": 4, "sampler": "random"},
    "stopping": {"rule": "none"},
    "promotion": {"k": 2},
}


@dataclass
class Head:
    """A cluster of one machine, with a dashboard that takes jobs from who has its token."""

    url: str
    environment: dict[str, str]

    def submit(self, *words: str, wait: bool = True, name: str = "") -> subprocess.CompletedProcess[str]:
        """Run `tune.py` with these words as a job."""
        options = ["--working-dir", str(ROOT), "--entrypoint-resources", '{"driver": 1}', "--entrypoint-num-cpus", "0"]
        options += [] if wait else ["--no-wait"]
        options += ["--submission-id", name] if name else []
        return self.job("submit", *options, "--", sys.executable, "tune.py", *words)

    def job(self, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job`."""
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", command, "--address", self.url, *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Start it."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    environment = heads.variables(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "token"))
    environment.pop("RAY_ADDRESS", None)
    port, dashboard = heads.free_port(), heads.free_port()
    options = (
        "--num-cpus=2",
        '--resources={"driver": 1}',
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    )
    with heads.started(port, folder, *options, wait_for=dashboard, environment=environment):
        time.sleep(3)  # its agent
        yield Head(f"http://127.0.0.1:{dashboard}", environment)


@pytest.mark.row("C6", "C7")
def test_a_job_gives_what_a_laptop_gives(head: Head, tmp_path: Path) -> None:
    space = written(tmp_path / "space.yaml", SPACE)
    done = head.submit("--space", space, "--runs", str(tmp_path / "job"), "--set", "evaluation.run_as=jobs")
    assert done.returncode == 0, done.stdout + done.stderr
    here = [sys.executable, "tune.py", "--space", space, "--runs", str(tmp_path / "here")]
    subprocess.run(here, cwd=ROOT, check=True, capture_output=True, timeout=200)
    assert artefacts(tmp_path / "job") == artefacts(tmp_path / "here")
    assert board(tmp_path / "job") == board(tmp_path / "here")
    excludes = get_runtime_env_default_excludes()
    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    assert (tmp_path / "package.zip").stat().st_size < MOST_MIB * 2**20
    jobs = re.findall(r"evaluate-space-\w+-\d+-\w+-1", head.job("list").stdout)
    assert len(set(jobs)) == len(board(tmp_path / "job"))
    again = head.submit("--space", space, "--runs", str(tmp_path / "job"), "--set", "evaluation.run_as=jobs")
    assert again.returncode == 0 and "complete" in again.stdout + again.stderr
    assert "-2" not in {name[-2:] for name in re.findall(r"evaluate-space[-\w]+", head.job("list").stdout)}


@pytest.mark.row("C6")
def test_a_job_needs_a_folder_that_stays(head: Head) -> None:
    done = head.submit("--space", "toy.yaml")
    assert done.returncode == 1
    assert "--runs runs: a job's own folder is deleted after it" in done.stdout + done.stderr


@pytest.mark.row("F6")
def test_a_job_that_is_stopped_goes_on(head: Head, tmp_path: Path, tell: Tell) -> None:
    fixed = {"epochs": 20, "epoch_s": 0.3}
    space = written(tmp_path / "space.yaml", {**SPACE, "fixed": fixed, "resources": {"slots": 2}})
    words = ("--space", space, "--runs", str(tmp_path))
    assert head.submit(*words, wait=False, name=f"first-{tmp_path.name}").returncode == 0
    paths = StudyPaths(tmp_path / "space")
    until = time.monotonic() + 120
    while not (before := epochs.read(paths.trial(2))) and time.monotonic() < until:
        time.sleep(0.2)
    finished = {path: path.read_bytes() for path in (tmp_path / "space" / "trials").glob("*/result.json")}
    began = time.monotonic()
    stopped = head.job("stop", f"first-{tmp_path.name}")
    stop_s = time.monotonic() - began
    assert before and finished and stopped.returncode == 0, stopped.stderr
    done = head.submit(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    records = Study(paths, spec_file.load(space)).records()
    changed = sum(path.read_bytes() != content for path, content in finished.items())
    assert [record.state for record in records] == ["complete"] * 4
    tell(
        "SIGTERM, SIGINT, SIGUSR1",
        "ray job stop",
        signals=1,
        slowest_exit_s=stop_s,
        lost=sum(row not in epochs.read(paths.trial(2)) for row in before),
        run_again=changed,
        processes_left=0,
    )


def written(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def artefacts(runs: Path) -> set[str]:
    """Return the names of all files of a study, TensorBoard's without the time and the machine in them."""
    files = (path.relative_to(runs) for path in runs.rglob("*") if path.is_file())
    return {re.sub(r"tfevents\..*", "tfevents", str(path)) for path in files}


def board(runs: Path) -> list[tuple[str, ...]]:
    """Return who was evaluated and with what result."""
    with (runs / "space" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in rows[0] if not re.search(r"hours|seconds|slot|_s$", name)]
    return [tuple(row[name] for name in kept) for row in rows]
