from __future__ import annotations

import time

import pytest

from search import metrics
from search.metrics import METRICS, Figures
from search.record import State, TrialRecord


def record(number: int, state: State = "complete", attempts: int = 1) -> TrialRecord:
    return TrialRecord(number=number, state=state, params={}, attempts=attempts)


class Told:
    """Stands for one of Ray's metrics, and keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = self.values.get(tuple(tags.values()), 0) + value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    made = {name: Told() for name in METRICS}
    monkeypatch.setattr(metrics, "has_agent", lambda: True)
    monkeypatch.setattr(metrics, "_made", lambda: made)
    return made


@pytest.mark.row("C13")
def test_figures_by_hand(told: dict[str, Told], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    figures = Figures("cells", "toy")
    figures.slots = 4
    figures.trial_started(0)
    figures.trial_started(1)
    figures.trial_placed(0)
    now = 103.0
    figures.tick(now)
    same = ("cells", "toy")
    assert told["search_trials"].values == {(*same, "running"): 1, (*same, "pending"): 1}
    assert told["search_slots"].values == {same: 4} and told["search_slots_used"].values == {same: 1}
    assert told["search_pending_age_seconds"].values == {same: 3.0}

    figures.trial_placed(1)
    figures.trial_retried(1, "process")
    figures.trial_epoch()
    figures.trial_epoch()
    figures.trial_ended(record(0))
    now = 104.0
    figures.tick(now)
    assert told["search_reports_total"].values == {}, "told every few seconds, not with each event"
    now = 109.0
    figures.tick(now)
    assert told["search_reports_total"].values == {same: 2}
    assert told["search_retries_total"].values == {(*same, "process"): 1}
    assert told["search_pending_age_seconds"].values == {same: 6.0}
    assert told["search_trials"].values == {(*same, "running"): 0, (*same, "pending"): 1, (*same, "complete"): 1}

    figures.trial_placed(1)
    figures.trial_ended(record(1, "failed", attempts=2))
    figures.flush(now)
    figures.flush(now)
    assert told["search_trials_ended_total"].values == {(*same, "complete"): 1, (*same, "failed"): 1}
    assert told["search_retries_total"].values == {(*same, "process"): 1}, "known already"
    assert told["search_slots_used"].values == {same: 0} and told["search_pending_age_seconds"].values == {same: 0}


def test_ranks_that_a_gang_replaced_by_itself_count_and_earlier_drivers_do_not(told: dict[str, Told]) -> None:
    figures = Figures("cells", "toy")
    figures.trial_started(0)
    figures.trial_ended(record(0, attempts=3))
    figures.trial_started(1, attempts=2)
    figures.trial_ended(record(1, attempts=3))
    figures.flush(0.0)
    assert told["search_retries_total"].values == {("cells", "toy", "rank"): 2}


def test_without_an_agent_nothing_is_told_and_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_agent", lambda: False)
    monkeypatch.setattr(metrics, "_made", lambda: pytest.fail("there is no agent"))
    figures = Figures("cells", "toy")
    for epoch in range(3):
        figures.trial_epoch()
        figures.tick(10.0 * epoch)
    assert not figures.counted
