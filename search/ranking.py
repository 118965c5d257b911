"""Which trials are better: pure functions of records and objectives, independent of the records' order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from search.record import TrialRecord
from search.spec import Objective


def ranked(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the finished trials, best first by the first objective; ties go by the others, then by number.

    Trials that were stopped, failed, or have a value that is not finite are left out: a value at a low epoch says
    something else than one at the end.
    """
    return sorted(filter(_finished, records), key=lambda record: (_costs(record, objectives), record.number))


def best(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the first of `ranked`, or None before any trial has finished."""
    return next(iter(ranked(records, objectives)), None)


def pareto(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the finished trials that no other beats in one objective without losing in another, in rank order."""
    front: list[TrialRecord] = []
    # In rank order nobody is dominated by a later one, and domination is transitive: the front so far is enough.
    for record in ranked(records, objectives):
        if not any(dominates(other, record, objectives) for other in front):
            front.append(record)
    return front


def dominates(one: TrialRecord, other: TrialRecord, objectives: Sequence[Objective]) -> bool:
    """Say whether one trial is at least as good in every objective and better in some."""
    mine, theirs = _costs(one, objectives), _costs(other, objectives)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def _finished(record: TrialRecord) -> bool:
    return record.state == "complete" and record.values is not None and all(map(math.isfinite, record.values))


def _costs(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return the values turned so that less is better."""
    pairs = zip(record.values or (), objectives, strict=True)
    return tuple(-value if objective.mode == "max" else value for value, objective in pairs)
