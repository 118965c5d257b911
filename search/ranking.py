"""Which trials are better: pure functions of records and objectives, independent of the records' order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from search import rules
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
        if not any(rules.dominates(_costs(other, objectives), _costs(record, objectives)) for other in front):
            front.append(record)
    return front


def _finished(record: TrialRecord) -> bool:
    return record.state == "complete" and record.values is not None and all(map(math.isfinite, record.values))


def _costs(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float, ...]:
    assert record.values is not None
    return rules.costs(record.values, objectives)
