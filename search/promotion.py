"""Who moves on to evaluation, and one sentence why: a pure function of the study's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search import ranking
from search.record import TrialRecord
from search.spec import Objective, Promotion


@dataclass(frozen=True)
class Promoted:
    """One trial that moves on."""

    trial: int
    why: str


def promote(records: Sequence[TrialRecord], objectives: Sequence[Objective], rule: Promotion) -> tuple[Promoted, ...]:
    """Return the trials that move on, best first; the order of the records does not matter.

    Only finished trials with a checkpoint can: those that were stopped, failed or lost their files cannot be evaluated.
    """
    able = [record for record in records if record.checkpoint is not None]
    if rule.rule == "pareto":
        return _front(able, objectives, rule.k)
    order = ranking.ranked(able, objectives)
    metric, total, finished = objectives[0].metric, len(records), sum(record.state == "complete" for record in records)
    return tuple(
        Promoted(record.number, f"{_place(place)} {metric} {_first(record):.4g} of {total} trials, {finished} finished")
        for place, record in enumerate(order[: rule.k], start=1)
    )


def _front(able: Sequence[TrialRecord], objectives: Sequence[Objective], k: int) -> tuple[Promoted, ...]:
    front = ranking.pareto(able, objectives)
    return tuple(Promoted(record.number, _why_front(record, objectives, len(front))) for record in front[:k])


def _why_front(record: TrialRecord, objectives: Sequence[Objective], size: int) -> str:
    values = zip(objectives, record.values or (), strict=True)
    scores = ", ".join(f"{objective.metric} {value:.4g}" for objective, value in values)
    return f"on the Pareto front of {size}: no other trial is better in one of {scores} without being worse in another"


def _first(record: TrialRecord) -> float:
    assert record.values is not None
    return record.values[0]


def _place(place: int) -> str:
    return {1: "best", 2: "second best", 3: "third best"}.get(place, f"number {place} by")
