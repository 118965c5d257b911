"""Nobody gets at Ray who should not: ports on loopback only, and a token before everything that answers over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from search import ray_token
from search.errors import StudyError
from tests.conftest import ROOT

TIMEOUT_S = 60
Listener = tuple[str, str, int]


def listening(process: psutil.Process) -> set[Listener]:
    """Return name, address and port of everything that a process and those below it listen on."""
    found: set[Listener] = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = [each for each in one.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            found |= {(one.name(), each.laddr.ip, each.laddr.port) for each in sockets}
    return found


def beyond_loopback(found: set[Listener]) -> set[Listener]:
    return {each for each in found if not ipaddress.ip_address(each[1].removeprefix("::ffff:")).is_loopback}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_nothing_of_a_ray_of_our_own_listens_beyond_loopback() -> None:
    import ray

    worker = ray.remote(lambda: os.getpid()).remote()
    assert ray.get(worker) != os.getpid()
    found = listening(psutil.Process())
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in found}
    assert beyond_loopback(found) == set()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.row("N1")
def test_nothing_of_a_search_that_a_person_starts_listens_beyond_loopback(tmp_path: Path) -> None:
    """As a person starts it: without the settings that the tests make."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    changes = ["fixed.epoch_s=0.2", "search.trials=4"]
    settings = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "tune.py", "--space", "toy.yaml", "--runs", str(tmp_path), *settings]
    seen: set[Listener] = set()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        try:
            watched, until = psutil.Process(run.pid), time.monotonic() + 150
            while run.poll() is None and time.monotonic() < until:
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen |= listening(watched)
                time.sleep(0.2)
        finally:
            if run.poll() is None:
                run.kill()
        assert run.returncode == 0, run.stderr.read().decode() if run.stderr else ""
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in seen}
    assert beyond_loopback(seen) == set()


@dataclass(frozen=True)
class Head:
    """A cluster of one node, started as a person would start it."""

    address: str
    dashboard: str
    token: str
    process: psutil.Process
    environment: Mapping[str, str]


@contextlib.contextmanager
def head(mode: str) -> Iterator[Head]:
    """Start `ray start --head` with ports of its own, on loopback only; end it and all below it by their ids."""
    folder, token = Path(tempfile.mkdtemp(prefix="ray-")), secrets.token_hex(32)
    gcs, dashboard, agent, metrics = _free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0"}
    if mode == "token":
        environment["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        (folder / "token").write_text(token)
        (folder / "token").chmod(0o600)
    options = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": agent,
        "--metrics-export-port": metrics,
        "--num-cpus": 1,
        "--object-store-memory": 100_000_000,
        "--temp-dir": folder / "t",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--include-dashboard=true"]
    command += [f"{name}={value}" for name, value in options.items()]
    log = (folder / "log").open("w")
    process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        made = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}/api/jobs/", token, process, environment)
        _wait_until_up(made, folder / "log")
        yield made
    finally:
        below = process.children(recursive=True) if process.is_running() else []
        process.terminate()
        _, alive = psutil.wait_procs([process, *below], timeout=20)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(alive, timeout=10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def ask(url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> tuple[int, str]:
    """Return status and text of an answer."""
    content = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method, data=content)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _wait_until_up(made: Head, log: Path) -> None:
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if not made.process.is_running() or made.process.status() == psutil.STATUS_ZOMBIE:
            break
        with contextlib.suppress(OSError):
            if ask(made.dashboard, {"Authorization": f"Bearer {made.token}"})[0] == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"ray did not come up: {log.read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    """Return ports that are free, below those that Ray's workers take."""
    found: list[int] = []
    for port in range(8700 + secrets.randbelow(200), 10_000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Head]:
    pytest.importorskip("aiohttp_cors", reason="ray[default], the dashboard, is not installed")
    with head("token") as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.row("N1")
def test_jobs_are_told_only_to_who_shows_the_token(guarded: Head) -> None:
    right = {"Authorization": f"Bearer {guarded.token}"}
    assert ask(guarded.dashboard)[0] == 401
    assert ask(guarded.dashboard, {"Authorization": f"Bearer {secrets.token_hex(32)}"})[0] == 403
    assert ask(guarded.dashboard, right)[0] == 200
    browser = {"User-Agent": "Mozilla/5.0", "Origin": "http://example.org"}
    assert ask(guarded.dashboard, {**right, **browser}, "POST")[0] == 405


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["none", "wrong", "right", "right, in a file"])
@pytest.mark.row("N1")
def test_a_search_joins_only_with_the_token(guarded: Head, tmp_path: Path, how: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    canary = f"canary{secrets.token_hex(16)}"
    environment |= {"RAY_ADDRESS": guarded.address, "HOME": str(tmp_path), "AWS_SECRET_ACCESS_KEY": canary}
    if how in ("wrong", "right"):
        environment["RAY_AUTH_TOKEN"] = guarded.token if how == "right" else secrets.token_hex(32)
    file = tmp_path / ".ray" / "auth_token"
    if how == "right, in a file":
        file.parent.mkdir()
        file.write_text(guarded.token)
        file.chmod(0o644)
    command = [sys.executable, "tune.py", "--space", "toy.yaml", "--runs", str(tmp_path / "runs"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == (0 if how.startswith("right") else 2), done.stderr
    assert guarded.token not in done.stdout + done.stderr
    if not how.startswith("right"):
        assert "the cluster wants its token and got none or another" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        code, jobs = ask(guarded.dashboard, {"Authorization": f"Bearer {guarded.token}"})
        assert code == 200 and "DRIVER" in jobs, "the search was one of the cluster's jobs"
        assert canary not in jobs
    if file.exists():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_stranger_is_told_from_a_guest(guarded: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_token.answer(guarded.address) == "guarded"
    monkeypatch.setattr(ray_token, "is_loopback", lambda address: False)
    ray_token.refuse_open(guarded.address)
    with head("disabled") as unguarded:
        assert ray_token.answer(unguarded.address) == "open"
        with pytest.raises(StudyError, match="asks nobody for a token"):
            ray_token.refuse_open(unguarded.address)
