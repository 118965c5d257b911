"""What a person sees while the search runs: one live table on a terminal, else a few plain lines."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from search import logs
from search.ranking import best
from search.record import State, TrialRecord
from search.results.plots import WORDS, show
from search.spec import Objective, SearchSpec

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

REDRAW_S = 0.25
SUMMARY_S = 10.0
SHOWN_TRIALS = 12
RIGHT = ("trial", "epoch", "time")
SHORT: Mapping[State, str] = {"complete": "finished", "stopped": "stopped"}


@dataclass
class TrialLine:
    """One trial as the table shows it; `epoch` and `value` change while it runs."""

    number: int
    params: Mapping[str, Any]
    started: float
    """Seconds, on the clock that `tick` is given."""
    state: State = "running"
    epoch: int = 0
    value: float | None = None
    """The first objective: its best so far while the trial runs."""
    seconds: float = 0.0


@dataclass
class ProgressState:
    """All that the table and the summary are made of."""

    name: str
    total: int
    objective: Objective
    slots: int
    """Trials at the same time: as the spec says, else the most seen at once."""
    began: float
    running: dict[int, TrialLine] = field(default_factory=dict)
    ended: list[TrialLine] = field(default_factory=list)
    """The last few that ended."""
    counts: Counter[State] = field(default_factory=Counter)
    durations: list[float] = field(default_factory=list)
    """Slot seconds of every trial that finished or was stopped."""
    best: TrialRecord | None = None


class Progress:
    """Receive what happens in the search and show it; never raises for what it shows."""

    def __init__(
        self, spec: SearchSpec, stream: TextIO, records: Iterable[TrialRecord] = (), now: float | None = None
    ) -> None:
        """Start to show a search on a stream.

        Args:
            spec: of the search.
            stream: usually stderr; a live table if it is a terminal.
            records: trials that ended in earlier runs of the study.
            now: start, in seconds of `time.monotonic`.
        """
        slots = spec.resources.slots if isinstance(spec.resources.slots, int) else 0
        began = time.monotonic() if now is None else now
        self.state = ProgressState(spec.name, spec.search.trials, spec.objectives[0], slots, began)
        self._objectives = spec.objectives
        self._stream = stream
        self._drawn = self._said = began
        self._changed = False
        for record in records:
            if record.state not in ("waiting", "running"):
                self._count(record)
        self._live = _live(stream) if stream.isatty() else None
        if self._live is not None:
            self._live.start()

    def trial_started(self, number: int, params: Mapping[str, Any], now: float | None = None) -> None:
        """Show a trial as running."""
        moment = time.monotonic() if now is None else now
        self.state.running[number] = TrialLine(number, params, moment)
        self.state.slots = max(self.state.slots, len(self.state.running))
        self.tick(moment)

    def trial_epoch(
        self,
        number: int,
        epoch: int,
        values: Sequence[float],
        metrics: Mapping[str, float],
        now: float | None = None,
    ) -> None:
        """Show how far a trial is; costs microseconds, since drawing waits for `tick`'s clock."""
        line = self.state.running.get(number)
        if line is None:
            return
        line.epoch = epoch
        if line.value is None or _better(values[0], line.value, self.state.objective):
            line.value = values[0]
        self.tick(time.monotonic() if now is None else now)

    def trial_ended(self, record: TrialRecord, now: float | None = None) -> None:
        """Count a trial that finished, was stopped or failed."""
        self.state.running.pop(record.number, None)
        ended = self._count(record)
        self.state.ended = [*self.state.ended[1 - SHOWN_TRIALS :], ended]
        if self._live is None:
            logs.say(self._stream, line(record, self.state.objective), trial=record.number, attempt=record.attempts)
        self.tick(time.monotonic() if now is None else now)

    def tick(self, now: float) -> None:
        """Redraw at most four times a second; without a terminal, say a summary at most every ten seconds."""
        if self._live is not None:
            if now - self._drawn >= REDRAW_S:
                self._drawn = now
                self._live.update(table(self.state, now, self._live.console.width), refresh=True)
        elif self._changed and now - self._said >= SUMMARY_S:
            self._said, self._changed = now, False
            self._say(summary(self.state, now))

    def close(self, text: str = "", now: float | None = None) -> None:
        """Draw the last state, give the terminal back, and say how it ended."""
        moment = time.monotonic() if now is None else now
        if self._live is not None:
            self._live.update(table(self.state, moment, self._live.console.width), refresh=True)
            self._live.stop()
            self._live = None
        else:
            self._say(summary(self.state, moment))
        if text:
            self._say(text)

    def _count(self, record: TrialRecord) -> TrialLine:
        state = self.state
        state.counts[record.state] += 1
        if record.state in ("complete", "stopped"):
            state.durations.append(record.slot_s)
        candidates = [found for found in (state.best, record) if found is not None]
        state.best = best(candidates, self._objectives)
        self._changed = True
        return ended_line(record, state.objective)

    def _say(self, text: str) -> None:
        logs.say(self._stream, text)


def line(record: TrialRecord, objective: Objective) -> str:
    """Return one trial's end as a log line: `trial 17 epoch 9 val_dice 0.812 31.4 s`."""
    ended = ended_line(record, objective)
    score = "" if ended.value is None else f" {objective.metric} {show(ended.value)}"
    text = f"trial {record.number} epoch {ended.epoch}{score} {record.slot_s:.1f} s"
    reason = next(iter(record.reason.strip().splitlines()), "")
    if record.state == "complete":
        return text
    return f"{text} {WORDS[record.state]}{f': {reason}' if reason else ''}"


def summary(state: ProgressState, now: float) -> str:
    """Return all counts, the best, the time and the forecast in one line."""
    parts = [f"{state.name}: {_counted(state)} of {state.total}"]
    if state.best is not None and state.best.values:
        parts.append(f"best {state.objective.metric} {show(state.best.values[0])} (trial {state.best.number})")
    parts.append(f"{duration(now - state.began)} so far")
    remaining = _remaining(state, now)
    if remaining is not None and _waiting(state) + len(state.running):
        parts.append(f"about {duration(remaining)} to go")
    return ", ".join(parts)


def table(state: ProgressState, now: float, width: int = 100) -> Group:
    """Return the live table: running trials, the last that ended, and the summary below.

    Parameters get columns as long as all fits into `width` characters.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    running = sorted(state.running.values(), key=lambda shown: shown.number)[-SHOWN_TRIALS:]
    ended = state.ended[len(running) - SHOWN_TRIALS :] if len(running) < SHOWN_TRIALS else []
    shown = [*ended, *running]
    columns = _columns(shown, state.objective.metric, now, width)
    made = Table(box=None, pad_edge=False, header_style="dim")
    for name, _ in columns:
        made.add_column(
            name, justify="right" if name in RIGHT or name == state.objective.metric else "left", no_wrap=True
        )
    for index, one in enumerate(shown):
        made.add_row(*(cells[index] for _, cells in columns), style=_style(one, state))
    return Group(made, Text(summary(state, now), style="bold"))


def forecast(durations: Sequence[float], slots: int, running_s: Sequence[float], waiting: int) -> float | None:
    """Return the seconds until the last trial ends, or None before any has ended.

    Every trial is taken to last as long as the mean of those that ended, stopped ones included, because as many
    will be stopped again. The work left is shared over the slots, and no trial ends before its own time.

    Args:
        durations: seconds of each trial that ended.
        slots: trials at the same time.
        running_s: seconds that each running trial has had so far.
        waiting: trials that have not started.
    """
    if not durations:
        return None
    mean = sum(durations) / len(durations)
    left = [max(mean - spent, 0.0) for spent in running_s]
    longest = max([*left, mean if waiting else 0.0])
    return max((sum(left) + waiting * mean) / max(slots, 1), longest)


def ended_line(record: TrialRecord, objective: Objective) -> TrialLine:
    """Return a trial that ended as the table shows it: its objective, or the best it reached before it was stopped."""
    reached = [values[0] for values in record.epochs.values() if math.isfinite(values[0])]
    choose = max if objective.mode == "max" else min
    value = record.values[0] if record.values else choose(reached) if reached else None
    epoch = max(record.epochs, default=0)
    return TrialLine(record.number, record.params, 0.0, record.state, epoch, value, record.slot_s)


def duration(seconds: float) -> str:
    """Return a time as people say it: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    # Own clock instead of Rich's thread; results on stdout must not be led into the table.
    return Live(console=Console(file=stream), auto_refresh=False, redirect_stdout=False, vertical_overflow="crop")


def _counted(state: ProgressState) -> str:
    counts = {"complete": state.counts["complete"], "running": len(state.running)}
    words = [f"{counts['complete']} finished", *([f"{counts['running']} running"] if counts["running"] else [])]
    others: tuple[State, ...] = ("stopped", "failed")
    return ", ".join([*words, *(f"{state.counts[name]} {WORDS[name]}" for name in others if state.counts[name])])


def _waiting(state: ProgressState) -> int:
    return max(0, state.total - sum(state.counts.values()) - len(state.running))


def _remaining(state: ProgressState, now: float) -> float | None:
    spent = [now - running.started for running in state.running.values()]
    return forecast(state.durations, state.slots, spent, _waiting(state))


def _columns(shown: Sequence[TrialLine], metric: str, now: float, width: int) -> list[tuple[str, list[str]]]:
    columns = [
        ("trial", [str(one.number) for one in shown]),
        ("state", [SHORT.get(one.state, one.state) for one in shown]),
        ("epoch", [str(one.epoch) for one in shown]),
        (metric, ["" if one.value is None else show(one.value) for one in shown]),
        ("time", [duration(now - one.started if one.state == "running" else one.seconds) for one in shown]),
    ]
    room = width - sum(map(_width, columns))
    for name in _varied(shown):
        cells = [show(one.params[name]) if name in one.params else "" for one in shown]
        column = (name.rpartition(".")[2] or name, cells)
        if _width(column) > room:
            break
        room -= _width(column)
        columns.append(column)
    return columns


def _width(column: tuple[str, list[str]]) -> int:
    gap = 2
    return max(map(len, (column[0], *column[1]))) + gap


def _varied(lines: Sequence[TrialLine]) -> list[str]:
    """Return the parameters worth a column: those in which the shown trials differ, else all."""
    names = list(dict.fromkeys(name for shown in lines for name in shown.params))
    differ = [name for name in names if len({show(shown.params.get(name)) for shown in lines}) > 1]
    return differ or names


def _style(shown: TrialLine, state: ProgressState) -> str:
    if state.best is not None and shown.number == state.best.number:
        return "bold yellow"
    return {"stopped": "dim", "failed": "red", "running": "green"}.get(shown.state, "")


def _better(one: float, other: float, objective: Objective) -> bool:
    return one > other if objective.mode == "max" else one < other
