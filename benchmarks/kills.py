"""Kill a 40-trial toy search 30 times with SIGKILL at random moments, let it end, and count what was lost or repeated.

Each moment is drawn between the time the driver holds the study and some seconds later, so that some hit the start of
Ray and most hit trials. The driver dies first, what it had started up to half a second later: for a while slots
outlive their driver. `repeated` counts configurations that stand under two numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import BenchmarkError, _searches
from search import epochs, spec_file
from search.record import StudyPaths, TrialRecord
from search.study import RESULT, Study

TINY = {"kills": 1, "trials": 3, "epoch_s": 0.2, "longest_s": 8.0}
START_S = 120.0
"""Longest time that a driver may take until it holds the study."""
END_S = 900.0
"""Longest time of the last start, which runs to the end."""

Finished = dict[int, tuple[str, int, int]]
"""By trial: its result, when the file was written, and how many epochs and attempts its folder shows."""


@dataclass
class Seen:
    """What the kills found."""

    kills: int = 0
    while_running: int = 0
    """Kills of a driver whose slots were at work; the others hit the start of Ray or of the slots."""
    finished: Finished = field(default_factory=dict)
    """Each trial as it was when it was first seen finished."""


def measure(
    kills: int = 30,
    trials: int = 40,
    epoch_s: float = 0.8,
    longest_s: float = 12.0,
    seed: int = 0,
    at_work: float = 0.0,
    address: str = "",
) -> dict[str, Any]:
    """Return the counts; `finished` should be all trials, `lost`, `finished_twice`, `run_again` and `repeated` 0.

    at_work: share of the kills whose moment is drawn from when a slot has begun, however long Ray takes to start.
    address: of a Ray that outlives the drivers; none: each starts its own, which dies with it.
    """
    content = {
        **_searches.TOY,
        "fixed": {"epochs": 9, "epoch_s": epoch_s},
        "search": {"trials": trials, "seed": seed},
        "stopping": {"rule": "asha", "min_epochs": 3, "reduction": 3},
    }
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        space = _searches.write_space(Path(folder) / "kills.yaml", content)
        paths, seen = StudyPaths(Path(folder) / "kills"), Seen()
        for _ in range(kills):
            if not _run_and_kill(space, paths, draw, longest_s, seen, at_work, address):
                break
        _finish(space, paths, address)
        records = Study(paths, spec_file.load(str(space))).records()
        return {
            "kills": seen.kills,
            "while_running": seen.while_running,
            **count(seen, finished(paths), records),
        }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    twice = result["finished_twice"] + result.get("run_again", 0)  # results that were kept before count both as one
    found = f"{result['lost']} lost, {twice} run twice, {result['repeated']} repeated"
    return [(f"trials after {result['kills']} kills with SIGKILL", found, "aim: 0 of each")]


def count(seen: Seen, at_the_end: Finished, records: list[TrialRecord]) -> dict[str, int]:
    """Return how many trials ended, were lost, were touched after they had finished, and stand there twice."""
    ended = {record.number for record in records if record.state in ("complete", "stopped", "failed")}
    configurations = Counter(json.dumps(dict(record.params), sort_keys=True) for record in records)
    return {
        "finished": len(ended),
        "lost": len(seen.finished.keys() - (ended & at_the_end.keys())),
        "finished_twice": sum(at_the_end.get(number, was)[:2] != was[:2] for number, was in seen.finished.items()),
        "run_again": sum(at_the_end.get(number, was)[2] != was[2] for number, was in seen.finished.items()),
        "repeated": sum(times - 1 for times in configurations.values()),
    }


def finished(paths: StudyPaths) -> Finished:
    """Return the finished trials of a study's folder."""
    found: Finished = {}
    for result in paths.trial(0).parent.glob(f"*/{RESULT}"):
        work = len(epochs.read(result.parent)) * 1000 + len(list(result.parent.glob("attempt-*")))
        found[int(result.parent.name)] = (result.read_text(), result.stat().st_mtime_ns, work)
    return found


def running(paths: StudyPaths, since: float) -> bool:
    """Return whether a trial that has not ended was taken up by a slot since then."""
    attempts = paths.trial(0).parent.glob("*/attempt-*")
    return any(path.stat().st_mtime > since and not (path.parent / RESULT).exists() for path in attempts)


def _run_and_kill(
    space: Path, paths: StudyPaths, draw: random.Random, longest_s: float, seen: Seen, at_work: float, address: str
) -> bool:
    """Start the search and kill it at some moment; return whether it was still at work."""
    began = time.time()
    driver = start(space, paths, address)
    try:
        wait_for(lambda: holder(paths).get("pid") == driver.pid, driver, paths)
        if at_work and draw.random() < at_work:
            wait_for(lambda: running(paths, began) or driver.poll() is not None, driver, paths)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(draw.uniform(0, longest_s))
        if driver.poll() is not None:
            return False
        seen.kills += 1
        seen.while_running += running(paths, began)
    finally:
        kill(driver, draw.uniform(0, 0.5))
    seen.finished = {**finished(paths), **seen.finished}
    _searches.say(f"kill {seen.kills}: {len(seen.finished)} trials have finished")
    return True


def start(space: Path, paths: StudyPaths, address: str = "") -> subprocess.Popen[bytes]:
    """Start the search; what it says goes to log.txt beside its study."""
    environment = {**os.environ, "RAY_ADDRESS": address} if address else None
    command = [sys.executable, "tune.py", "--space", str(space), "--runs", str(paths.folder.parent)]
    log = (paths.folder.parent / "log.txt").open("ab")
    with log:
        return subprocess.Popen(command, cwd=_searches.ROOT, stdout=log, stderr=log, env=environment)


def wait_for(happened: Callable[[], bool], driver: subprocess.Popen[bytes], paths: StudyPaths) -> None:
    """Wait until something has happened; BenchmarkError if the driver ends before, or takes too long."""
    until = time.monotonic() + START_S
    while not happened():
        if time.monotonic() > until or driver.poll() is not None:
            raise BenchmarkError(f"no search began: {(paths.folder.parent / 'log.txt').read_text()[-2000:]}")
        time.sleep(0.02)


def holder(paths: StudyPaths) -> Mapping[str, Any]:
    """Return what the study's lease says."""
    try:
        holder: dict[str, Any] = json.loads(paths.lease.read_text())
    except (OSError, ValueError):
        return {}
    return holder


def kill(driver: subprocess.Popen[bytes], pause_s: float) -> None:
    """Kill the driver, and a moment later every process that it and its children had started."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    driver.kill()
    driver.wait()
    time.sleep(pause_s)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)


def _finish(space: Path, paths: StudyPaths, address: str) -> None:
    driver = start(space, paths, address)
    try:
        code = driver.wait(END_S)
    finally:
        kill(driver, 0)
    if code:
        raise BenchmarkError(f"exit code {code}: {(paths.folder.parent / 'log.txt').read_text()[-2000:]}")
