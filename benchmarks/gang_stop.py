"""Stop 200 trials of two workers early and kill 20 ranks in between: how soon the gang is free again, and what is left.

`reusable` runs from the moment a trial that is then stopped has kept its last epoch, to the moment both ranks are asked
for the first epoch of the next: report, verdict, the study's record, the next question and the orders lie in between.
`kill_to_report` runs from a SIGKILL to the next epoch that any trial reports.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import _gangs, _searches
from search import epochs
from search.epochs import EpochLine
from search.record import StudyPaths, TrialRecord

TINY = {"stops": 3, "kills": 1}
TRIALS_PER_STOP = 1.75
"""Asha lets one in three go on, but early on more."""
BETWEEN_S = (0.5, 3.0)
"""Time from the first report after a kill to the next kill."""
LEAVE_S = 20.0
"""How long processes may take to end once the search has."""


def measure(stops: int = 200, kills: int = 20, seed: int = 0) -> dict[str, Any]:
    """Return seconds, and counts: processes and placement groups that are left over, trials that were stopped."""
    content = _gangs.content(max(6, int(stops * TRIALS_PER_STOP)), epochs=3)
    content["stopping"] = {"rule": "asha", "min_epochs": 1, "reduction": 3}
    content["resources"]["max_attempts"] = 1 + kills
    with _searches.ray_up():
        before = _places()
        with tempfile.TemporaryDirectory() as folder:
            killer = Killer(StudyPaths(Path(folder) / "study"), kills, seed)
            killer.start()
            paths, records = _searches.search(Path(folder), content)
            killer.ended.set()
            killer.join()
            free = reusable(records, {record.number: epochs.read(paths.trial(record.number)) for record in records})
        left = _left_over() + _places() - before
    return {
        "reusable_p95_s": round(float(np.percentile(free, 95)), 4),
        "left_over": left,
        "stops": sum(record.state == "stopped" for record in records),
        "kills": len(killer.gaps),
        "kill_to_report_s": round(max(killer.gaps, default=0.0), 2),
        "epochs_redone": max(killer.redone, default=0),
        "failed": sum(record.state == "failed" for record in records),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    what = f"{result['stops']} stops, {result['kills']} killed ranks"
    return [
        ("stop of a trial to gang reusable, p95", f"{result['reusable_p95_s']:.3f} s", "aim: at most 0.3 s"),
        (f"left over after {what}", str(result["left_over"]), "processes and placement groups; aim: 0"),
        (
            "kill -9 of a rank to the next report, longest",
            f"{result['kill_to_report_s']:.1f} s, {result['epochs_redone']} epochs redone",
            "aim: at most 15 s, 1 epoch",
        ),
    ]


def reusable(records: list[TrialRecord], rows: dict[int, list[EpochLine]]) -> list[float]:
    """Return the seconds from each stopped trial to the next one, where no process died in either."""
    ran = sorted((record for record in records if rows[record.number]), key=lambda r: rows[r.number][0].time)
    return [
        rows[after.number][0].metrics["entered"] - rows[before.number][-1].time
        for before, after in pairwise(ran)
        if before.state == "stopped" and before.attempts == after.attempts == 1
    ]


class Killer(threading.Thread):
    """Kills a process of this kind, waits for the next report, lets some time pass, and so on."""

    def __init__(self, paths: StudyPaths, kills: int, seed: int, victims: str = _gangs.WORKER) -> None:
        super().__init__(daemon=True)
        self.victims, self.least = victims, _gangs.RANKS if victims == _gangs.WORKER else 1
        self.paths, self.kills, self.draw, self.ended = paths, kills, random.Random(seed), threading.Event()
        self.gaps: list[float] = []
        self.redone: list[int] = []

    def run(self) -> None:
        """Kill as often as asked for, or until the search has ended."""
        while len(self.gaps) < self.kills and not self.ended.wait(self.draw.uniform(*BETWEEN_S)):
            known = self._newest()
            found = [process for process, name in _gangs.processes().items() if name.startswith(self.victims)]
            if known is None or len(found) < self.least:
                continue
            with contextlib.suppress(psutil.Error):
                self.draw.choice(sorted(found, key=lambda process: process.pid)).kill()
                self._wait_for_a_report(time.time(), known)

    def _wait_for_a_report(self, at: float, known: tuple[int, EpochLine]) -> None:
        while not self.ended.wait(0.05):
            number, row = self._newest() or known
            if row.time > at and (row.attempt > 1 or number != known[0]):
                self.gaps.append(row.time - at)
                if number == known[0]:
                    # Of the epoch after the last that was kept, some steps may have been done.
                    first = next(row for row in epochs.read(self.paths.trial(number)) if row.time > at)
                    self.redone.append(known[1].epoch + 2 - first.epoch)
                return

    def _newest(self) -> tuple[int, EpochLine] | None:
        """Return the number of the last trial that has reported, and its last epoch."""
        numbers = sorted((int(path.name) for path in self.paths.trial(0).parent.glob("*")), reverse=True)
        for number in numbers[:2]:
            if rows := epochs.read(self.paths.trial(number)):
                return number, rows[-1]
        return None


def _left_over() -> int:
    """Return how many processes of gangs are still there some time after the search."""
    until = time.monotonic() + LEAVE_S
    while (left := len(_gangs.working(_gangs.processes()))) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def _places() -> int:
    """Return how many placement groups there are."""
    from ray.util import placement_group_table

    table = placement_group_table()
    return sum(row["state"] != "REMOVED" for row in table.values())
