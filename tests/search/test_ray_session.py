from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from search import growth, ray_session, ray_token
from search.errors import StudyError
from search.growth import Growth
from search.ray_session import RaySession
from search.resources import Room


def test_this_machine_has_the_processors_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    monkeypatch.setattr(ray_session, "_gpus", lambda: 2)
    assert ray_session.room() == Room(3.0, 2.0, "this machine")


def test_sigterm_in_the_start_of_ray_does_what_it_did_before() -> None:
    """Ray puts an exit of its own in its place, for as long as it starts."""

    @ray_session._own_signals()
    def start_ray() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    @ray_session._own_signals()
    def fail() -> None:
        sys.exit(1)

    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            start_ray()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        with pytest.raises(SystemExit):
            fail()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_named_cluster_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_token, "answer", lambda address: asked.append(f"who are you, {address}") or "guarded")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **options: asked.append(address))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0, "memory": 1.0})
    nodes = [{"Alive": True, "Resources": {"CPU": 32.0, "GPU": 4.0}}] * 2
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 32.0}}])
    monkeypatch.setattr(growth, "now", lambda: Growth(True, (640.0, 80.0)))
    there: Any = {"nodes": ((32.0, 4.0), (32.0, 4.0)), "most": (640.0, 80.0)}
    assert ray_session.room() == Room(64.0, 8.0, "the cluster at present", grows=True, autoscales=True, **there)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {})
    monkeypatch.setattr(ray, "nodes", lambda: [])
    monkeypatch.setattr(growth, "now", Growth)
    assert ray_session.room() == Room(0.0, 0.0, "the cluster at present", grows=True)
    assert asked == ["who are you, 10.0.0.1:6379", "10.0.0.1:6379"] * 2
    monkeypatch.setattr(ray_token, "answer", lambda address: "open")
    with pytest.raises(StudyError, match="asks nobody for a token"):
        ray_session.room()
    assert len(asked) == 4, "nothing was started on it"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AuthenticationError("no"), "wants its token and got none or another; put it into"),
        (ConnectionError("no"), "no cluster answers there"),
    ],
)
def test_a_cluster_that_lets_nobody_in_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    import ray

    def refused(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(ray_token, "answer", lambda address: "none")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(StudyError, match=rf"^RAY_ADDRESS=127\.0\.0\.1:6379: .*{message}"):
        ray_session.room()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_runs_already_is_used_and_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *arguments, **options: pytest.fail("Ray was started twice"))
    with RaySession(Room(2.0, 0.0, "here")) as session:
        session.start()
        session.start()
    assert ray.is_initialized()


def test_a_ray_of_our_own_is_reachable_from_here_only_and_ends_with_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    calls = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **options: calls.append((address, options)))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    with RaySession(Room(3.0, 1.0, "here")):
        pass
    assert calls == [], "a complete study needs no Ray"
    with RaySession(Room(3.0, 1.0, "here")) as session:
        session.start()
    (address, options), ended = calls
    assert (address, ended) == ("local", "shutdown")
    assert (options["num_cpus"], options["num_gpus"], options["include_dashboard"]) == (3, 1, False)
    assert "_node_ip_address" not in options or options["_node_ip_address"] == "127.0.0.1"


def test_slots_find_this_project_and_a_workload_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    found = ray_session._python_path()
    assert found[0] == str(Path(ray_session.__file__).resolve().parent.parent)
    assert str(tmp_path) in found and str(Path.cwd()) in found
    assert not any("site-packages" in path for path in found)
