"""Starts of `tune.py` that are quick, since there are many: forked from a process that has imported everything.

What runs is `tune.main` in a process of its own, which connects to the Ray that the tests hold. What is tested on the
command itself, with a Ray of its own, are kills of the driver, signals, and the full disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent


class Drivers:
    """A process that forks drivers, one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.drivers"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], log: Path) -> int:
        """Run `tune.py` to its end, whatever ends it; return its exit code as `subprocess` does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Drivers:
        return self

    def __exit__(self, *exception: object) -> None:
        for child in psutil.Process(self._process.pid).children():
            child.kill()
        self._process.kill()
        self._process.communicate(timeout=10)


def _main() -> None:
    import plotly.graph_objects  # noqa: F401  imported late by the report
    import ray

    import search.executor  # noqa: F401
    import tune
    from search import ray_session

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            # Connected here, the search takes this Ray for its own and has no queue to wait in.
            address = os.environ.pop("RAY_ADDRESS")
            ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=ray_session.runtime_env())
            sys.exit(tune.main(order["arguments"]))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _main()
