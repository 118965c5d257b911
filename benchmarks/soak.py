"""Run toy trials for two hours in one study, kill the driver every five minutes, and watch memory and losses.

A driver knows all trials of its study, so it grows with them. What must not grow is anything else: each driver, just
before it is killed, is compared with the next one once that has read the same study. Slots are compared with themselves
half a minute after their start.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import BenchmarkError, _searches, kills
from benchmarks.kills import Seen
from search import spec_file
from search.record import StudyPaths
from search.study import Study

TINY = {"hours": 0.012, "every_s": 15.0, "trials": 60}
MOST = 1_000_000
"""More trials than there is time for."""
EPOCH_S = 0.3
"""Of a trial, so that the driver has rest between them, as with real ones."""
LOOK_S = 1.0
SETTLED_S = 30.0
"""After its start a slot has imported what it needs, and a driver has read its study."""


@dataclass
class Memory:
    """Resident memory of one driver and its slots over its life, in bytes, by the seconds since slots began."""

    driver: list[tuple[float, int]] = field(default_factory=list)
    slots: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def look(self, pid: int, after_s: float) -> None:
        """Take one sample."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            self.driver.append((after_s, process.memory_info().rss))
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ResourceTrainable" in " ".join(child.cmdline()) or "Slot" in child.name():
                        self.slots.setdefault(child.pid, []).append((after_s, child.memory_info().rss))


def measure(hours: float = 2.0, every_s: float = 300.0, trials: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Return how many trials ended, what was lost, and by what factor drivers and slots grew.

    trials: at least so many have to end.
    """
    content = {
        **_searches.TOY,
        "fixed": {"epochs": 1, "epoch_s": EPOCH_S},
        "search": {"trials": MOST, "seed": seed, "sampler": "random"},
        "stopping": {"rule": "none"},
        "tracking": {"tensorboard": False},
    }
    until, draw = time.monotonic() + hours * 3600, random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        space = _searches.write_space(Path(folder) / "soak.yaml", content)
        paths, seen, lives = StudyPaths(Path(folder) / "soak"), Seen(), []
        while time.monotonic() < until:
            lives.append(_live(space, paths, min(every_s, until - time.monotonic()), draw))
            seen.kills += 1
            seen.finished = {**kills.finished(paths), **seen.finished}
            _searches.say(f"kill {seen.kills}: {len(seen.finished)} trials have finished, {_mib(lives[-1])}")
        records = Study(paths, spec_file.load(str(space))).records()
        counts = kills.count(seen, kills.finished(paths), records)
    if counts["finished"] < trials:
        raise BenchmarkError(f"{counts['finished']} trials ended; expected at least {trials}")
    return {"hours": hours, "kills": seen.kills, **counts, **growth(lives)}


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    return [
        (
            f"soak: {result['finished']:,} trials in {result['hours']:g} h, {result['kills']} kills",
            f"{result['lost']} lost, {result['finished_twice'] + result['run_again']} run twice; memory of a driver "
            f"x {result['driver_growth']:.3f}, of slots x {result['slot_growth']:.3f}",
            "aim: 0 of each, flat within 5 %",
        )
    ]


def growth(lives: list[Memory]) -> dict[str, float]:
    """Return the largest factors: of a driver's memory over that of a fresh one with the same study, and of slots."""
    drivers = [
        statistics.median(_last(before.driver)) / statistics.median(_settled(after.driver))
        for before, after in itertools.pairwise(lives)
        if _settled(after.driver)
    ]
    slots = [
        statistics.median(_last(samples)) / statistics.median(_settled(samples))
        for life in lives
        for samples in life.slots.values()
        if len(_settled(samples)) and samples[-1][0] > 2 * SETTLED_S
    ]
    return {
        "driver_growth": round(max(drivers, default=1.0), 4),
        "slot_growth": round(max(slots, default=1.0), 4),
    }


def _settled(samples: list[tuple[float, int]]) -> list[int]:
    return [size for after_s, size in samples if SETTLED_S <= after_s < SETTLED_S + 10]


def _last(samples: list[tuple[float, int]]) -> list[int]:
    return [size for _, size in samples[-10:]]


def _live(space: Path, paths: StudyPaths, life_s: float, draw: random.Random) -> Memory:
    """Run one driver for its time and kill it; return what memory it took."""
    memory, known = Memory(), _size(paths)
    driver = kills.start(space, paths)
    try:
        kills.wait_for(lambda: _size(paths) > known, driver, paths)
        began = time.monotonic()
        while (after_s := time.monotonic() - began) < life_s:
            memory.look(driver.pid, after_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = driver.wait(LOOK_S)
                raise BenchmarkError(f"the search ended with exit code {code}")
    finally:
        kills.kill(driver, draw.uniform(0, 0.5))
    return memory


def _size(paths: StudyPaths) -> int:
    """Return how much the study knows, in bytes of its journal."""
    return paths.journal.stat().st_size if paths.journal.exists() else 0


def _mib(life: Memory) -> str:
    driver = life.driver[-1][1] / 2**20 if life.driver else 0
    return f"driver {driver:.0f} MiB, slots {[round(samples[-1][1] / 2**20) for samples in life.slots.values()]}"
