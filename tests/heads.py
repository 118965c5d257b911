"""Clusters of one machine for tests, started as a person would start them, with ports of their own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.conftest import ROOT

UP_S = 60.0
END_S = 20.0


def free_port() -> int:
    """Return a port that nobody has, below those that the system deals out: Ray's processes take these meanwhile."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def variables(**changes: str) -> dict[str, str]:
    """Return the environment of a cluster and of those that join it: this process's, without what is its own."""
    # The tests' own Ray keeps to this machine; a cluster does so only if that is asked for.
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    return {**inherited, "PYTHONPATH": str(ROOT), **changes}


@contextlib.contextmanager
def started(
    port: int, folder: Path, *options: str, wait_for: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a head whose cluster store has this port; give its address, and end it and all that it started, by pid.

    Args:
        port: of the cluster.
        folder: for what it says, in head.txt.
        options: of `ray start`, besides ports and addresses.
        wait_for: a port that has to answer before it is up; 0: the cluster's own.
        environment: of the head and all that it starts; None: `variables()`.
    """
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}", *options),
    ]
    if not any(option.startswith("--metrics-export-port") for option in options):
        command.append(f"--metrics-export-port={free_port()}")
    with (folder / "head.txt").open("w") as log:
        process = psutil.Popen(command, env=environment or variables(), stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(wait_for or port, process, folder / "head.txt")
            yield f"127.0.0.1:{port}"
        finally:
            _end(process)


def _wait_for(port: int, process: psutil.Popen, log: Path) -> None:
    until = time.monotonic() + UP_S
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"ray did not come up: {log.read_text()[-2000:]}")


def _end(process: psutil.Popen) -> None:
    below = process.children(recursive=True) if process.is_running() else []
    process.terminate()
    _, alive = psutil.wait_procs([process, *below], timeout=END_S)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=END_S)
