"""What the benchmarks of gangs have in common: their search, and a look at the processes that Ray has started."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil

WORKER = "ray::RayTrainWorker"
SLOT = "ray::ResourceTrainable"
"""Also the process that drives a gang."""
RANKS = 2


def content(trials: int, epochs: int = 2, epoch_s: float = 0.0, **resources: Any) -> dict[str, Any]:
    """Return a search of trials of two workers, with room for one at a time on two CPUs."""
    return {
        "workload": "benchmarks._parallel",
        "objective": {"metric": "val_loss", "mode": "min"},
        "parameters": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "fixed": {"epochs": epochs, "epoch_s": epoch_s, "batch_size": 4, "threads": 1},
        "search": {"trials": trials, "sampler": "random"},
        "stopping": {"rule": "none"},
        "resources": {"slots": 1, "workers": RANKS, "cpus_per_worker": 1.0, **resources},
        "promotion": {"k": 1},
    }


def processes() -> dict[psutil.Process, str]:
    """Return what this process has started, directly or not, with the names that Ray gives: `ray::IDLE`."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[process] = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
    return found


def working(names: Mapping[psutil.Process, str]) -> list[psutil.Process]:
    """Return the processes of trials: their workers, and what drives these."""
    return [process for process, name in names.items() if name.startswith((WORKER, SLOT))]


def control(names: Mapping[psutil.Process, str]) -> list[psutil.Process]:
    """Return all processes of Ray but those in which training happens, and those that wait for something to do."""
    return [process for process, name in names.items() if not name.startswith((WORKER, "ray::IDLE"))]


def mib(found: list[psutil.Process]) -> float:
    """Return the memory that would be free if these processes ended."""
    total = 0
    for process in found:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


class Watch(threading.Thread):
    """Looks at the processes again and again while something runs: `seen` has time, control and ranks' MiB, ranks."""

    def __init__(self, every_s: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.every_s, self.ended = every_s, threading.Event()
        self.seen: list[tuple[float, float, float, int]] = []

    def run(self) -> None:
        """Look until the watch is left."""
        while not self.ended.wait(self.every_s):
            names = processes()
            ranks = [process for process, name in names.items() if name.startswith(WORKER)]
            self.seen.append((time.time(), mib(control(names)), mib(ranks), len(ranks)))

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.join()
