"""Figures of a running search for Prometheus, by the agent of the Ray that it runs on; nothing where there is none.

Kept as plain numbers and handed to Ray now and then, so that a report costs an addition. All are labelled with the
study and the workload; Ray puts `ray_` before each name.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.record import TrialRecord

FLUSH_S = 5.0
"""How often Ray is told: half of its own agent's pace."""
LABELS = ("study", "workload")


@dataclass(frozen=True)
class Metric:
    """One figure as Prometheus knows it."""

    kind: str
    """counter: goes up only, and its name ends in _total. gauge: what it is now."""
    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "search_trials": Metric("gauge", "trials of the study by state", ("state",)),
    "search_trials_ended_total": Metric("counter", "trials that ended since the driver started", ("state",)),
    "search_reports_total": Metric("counter", "epochs that trials reported"),
    "search_retries_total": Metric("counter", "trials started again after losing a process", ("reason",)),
    "search_slots": Metric("gauge", "trials that may run at once"),
    "search_slots_used": Metric("gauge", "trials that run"),
    "search_pending_age_seconds": Metric("gauge", "how long the oldest trial without a process has waited"),
}


class Figures:
    """What has happened in one search. Lives in the driver."""

    def __init__(self, study: str, workload: str) -> None:
        self.same = {"study": study, "workload": workload}
        self.slots = 0
        self.states: Counter[str] = Counter()
        self.counted: Counter[tuple[str, tuple[str, ...]]] = Counter()
        """What counters are to be raised by at the next flush, by name and labels."""
        self.waiting: dict[int, float] = {}
        """Trials that have no process yet, and since when."""
        self.running: set[int] = set()
        self._attempts: dict[int, int] = {}
        self._flushed = -FLUSH_S
        self._metrics: dict[str, Any] | None = None

    def trial_started(self, number: int, attempts: int = 0) -> None:
        """Count a trial that waits for its process; earlier drivers have made some attempts at it."""
        self.waiting[number] = time.monotonic()
        self._attempts[number] = attempts

    def trial_placed(self, number: int) -> None:
        """Count a trial that has its process."""
        self.waiting.pop(number, None)
        self.running.add(number)

    def trial_retried(self, number: int, reason: str) -> None:
        """Count a trial that waits for another process."""
        self.counted["search_retries_total", (reason,)] += 1
        self._attempts[number] += 1
        self.running.discard(number)
        self.waiting[number] = time.monotonic()

    def trial_epoch(self) -> None:
        """Count a report."""
        self.counted["search_reports_total", ()] += 1

    def trial_ended(self, record: TrialRecord) -> None:
        """Count a trial that has ended."""
        self.waiting.pop(record.number, None)
        self.running.discard(record.number)
        # What is not known here, a gang has done by itself: it replaced a rank.
        unseen = record.attempts - 1 - self._attempts.pop(record.number, record.attempts)
        if unseen > 0:
            self.counted["search_retries_total", ("rank",)] += unseen
        self.states[record.state] += 1
        self.counted["search_trials_ended_total", (record.state,)] += 1

    def gauges(self, now: float) -> dict[tuple[str, tuple[str, ...]], float]:
        """Return what is so at a time, by name and labels."""
        states = {**self.states, "running": len(self.running), "pending": len(self.waiting)}
        return {
            **{("search_trials", (state,)): float(count) for state, count in states.items()},
            ("search_slots", ()): float(self.slots),
            ("search_slots_used", ()): float(len(self.running)),
            ("search_pending_age_seconds", ()): max((now - since for since in self.waiting.values()), default=0.0),
        }

    def tick(self, now: float) -> None:
        """Hand everything to Ray where it is time."""
        if now - self._flushed >= FLUSH_S:
            self._flushed = now
            self.flush(now)

    def flush(self, now: float) -> None:
        """Hand everything to Ray."""
        counted, self.counted = self.counted, Counter()
        if self._metrics is None:
            self._metrics = _made() if has_agent() else {}
        for (name, labels), value in (*self.gauges(now).items(), *counted.items()):
            if name in self._metrics:
                tags = {**self.same, **dict(zip(METRICS[name].labels, labels, strict=True))}
                record = self._metrics[name]
                (record.inc if METRICS[name].kind == "counter" else record.set)(value, tags=tags)


def has_agent() -> bool:
    """Return whether this Ray has an agent that Prometheus can ask: one installed as ray[default]."""
    return all(importlib.util.find_spec(name) for name in ("aiohttp_cors", "opencensus", "prometheus_client"))


def _made() -> dict[str, Any]:
    from ray.util import metrics

    kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge}
    return {
        name: kinds[metric.kind](name.removesuffix("_total"), metric.help, (*LABELS, *metric.labels))
        for name, metric in METRICS.items()
    }
