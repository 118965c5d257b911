"""The rows and bars of the fault suite, all in one place, and what the tests counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Bar:
    """What the counts of one fault may be at the most, and have to be at least, over all its tests."""

    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the bar in words."""
        least = [f"{name} >= {value:g}" for name, value in self.at_least.items()]
        return ", ".join([*least, *(f"{name} <= {value:g}" for name, value in self.at_most.items())])


BARS = {
    "driver killed": Bar(
        at_least={"kills": 30, "finished": 120},
        at_most={"lost": 0, "finished_twice": 0, "run_again": 0, "repeated": 0},
    ),
    "crash at nine points": Bar(at_least={"crashes": 27, "same": 27}),
    "slot killed": Bar(at_least={"kills": 5}, at_most={"unfinished": 0, "most_redone": 1}),
    "rank killed": Bar(at_least={"kills": 5}, at_most={"unfinished": 0, "most_redone": 1}),
    "SIGTERM, SIGINT, SIGUSR1": Bar(
        at_least={"signals": 6}, at_most={"slowest_exit_s": 10, "lost": 0, "run_again": 0, "processes_left": 0}
    ),
    "disk full, then freed": Bar(at_least={"disks": 2, "same": 2}, at_most={"unclear": 0, "lost": 0}),
    "torn, empty or flipped": Bar(at_least={"cases": 8}, at_most={"undetected": 0, "restarted": 0, "different": 0}),
    "score that is none": Bar(at_least={"trials": 5, "failed": 5}, at_most={"most_reports_late": 0, "others_hit": 0}),
    "clock an hour off": Bar(at_least={"starts": 6}, at_most={"run_again": 0, "lost": 0}),
    "two drivers": Bar(at_least={"refused": 3}, at_most={"slowest_s": 5}),
    "late commit": Bar(at_least={"commits": 4, "rejected": 4}),
    "machine gone": Bar(at_least={"machines": 2}, at_most={"unfinished": 0, "most_redone": 1, "longest_gap_s": 30}),
    "spot notice": Bar(at_least={"notices": 2}, at_most={"unfinished": 0, "most_redone": 0, "longest_gap_s": 60}),
    "hung trial or rank": Bar(
        at_least={"hung": 4, "ended": 4}, at_most={"others_unfinished": 0, "slowest_end_after_the_limit_s": 10}
    ),
    "out of memory": Bar(at_least={"trials": 8, "marked": 8}, at_most={"tried_again": 0, "others_unfinished": 0}),
    "promotion killed": Bar(at_least={"kills": 10, "winners": 3}, at_most={"missing": 0, "evaluated_twice": 0}),
}
"""By fault. A count whose name ends in `_s`, or begins with `most_`, is the largest of all tests, others add up."""


class Tell(Protocol):
    """Puts counts into a row."""

    def __call__(self, fault: str, done: str, **counts: float) -> None:
        """Say what was done to one study, and what was counted."""


class Table:
    """What the tests have told so far."""

    def __init__(self) -> None:
        self.done: dict[str, list[str]] = {}
        self.counts: dict[str, dict[str, float]] = {}

    def tell(self, fault: str, done: str, **counts: float) -> None:
        """Add one test's counts to a row; AssertionError where they alone are worse than the bar."""
        bar = BARS[fault]
        self._add(fault, [done], counts)
        worse = {name: value for name, value in counts.items() if value > bar.at_most.get(name, float("inf"))}
        assert not worse, f"{fault}, {done}: {worse}; the bar is {bar}"

    def add(self, plain: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what another process was told, as `plain` gives it."""
        for fault, row in plain.items():
            if row["counted"]:
                self._add(fault, row["done"], row["counted"])

    def holds(self) -> bool:
        """Return whether every row that was told keeps its bar."""
        return all(self._word(fault) == "yes" for fault in self.counts)

    def lines(self) -> list[str]:
        """Return the table as text."""
        heading = ["fault", "done", "counted", "bar", "holds"]
        cells = [
            [fault, self._done(fault), self._counted(fault), str(bar), self._word(fault)] for fault, bar in BARS.items()
        ]
        rows = [heading, *cells]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def plain(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {
            fault: {
                "done": self.done.get(fault, []),
                "counted": self.counts.get(fault, {}),
                "bar": str(bar),
                "holds": self._word(fault),
            }
            for fault, bar in BARS.items()
        }

    def _add(self, fault: str, done: Iterable[str], counts: Mapping[str, float]) -> None:
        self.done.setdefault(fault, []).extend(done)
        row = self.counts.setdefault(fault, {})
        for name, value in counts.items():
            largest = name.endswith("_s") or name.startswith("most_")
            row[name] = max(row.get(name, value), value) if largest else row.get(name, 0) + value

    def _word(self, fault: str) -> str:
        """Return whether a row keeps its bar: yes, NO, too few of what was to be done or counted, or not run."""
        bar, row = BARS[fault], self.counts.get(fault)
        if row is None:
            return "not run"
        if any(row.get(name, 0) > value for name, value in bar.at_most.items()):
            return "NO"
        return "yes" if all(row.get(name, 0) >= value for name, value in bar.at_least.items()) else "too few"

    def _done(self, fault: str) -> str:
        told = self.done.get(fault, [])
        return ", ".join(told) if len(told) <= 3 else f"{len(told)} cases"

    def _counted(self, fault: str) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.counts.get(fault, {}).items())
