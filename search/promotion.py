"""Who moves on to evaluation, and one sentence why: a pure function of the study's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from search import ranking
from search.errors import StudyError
from search.record import TrialRecord
from search.spec import Objective, Promotion


@dataclass(frozen=True)
class Promoted:
    """One trial that moves on."""

    trial: int
    why: str
    by: Literal["rule", "hand"] = "rule"


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


def by_hand(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], rule: Promotion, numbers: Sequence[int], k: int
) -> tuple[Promoted, ...]:
    """Return what somebody chose to move on: trials by their numbers, or else the best k by the study's own rule.

    Raises:
        StudyError: naming a trial that cannot, why, and which can.
    """
    if not numbers:
        chosen = promote(records, objectives, dataclasses.replace(rule, k=k))
        return tuple(Promoted(item.trial, f"by hand: {item.why}", "hand") for item in chosen)
    able = {record.number for record in records if can_move_on(record, rule)}
    by_number = {record.number: record for record in records}
    for number in numbers:
        if number not in able:
            known = ", ".join(map(str, sorted(able))) or "none yet"
            raise StudyError(f"trial {number}: {_why_not(by_number.get(number))}; those that can be promoted: {known}")
    return tuple(Promoted(number, "by hand", "hand") for number in dict.fromkeys(numbers))


def joined(first: Sequence[Promoted], by_hand: Sequence[Promoted]) -> list[Promoted]:
    """Return the promoted and those chosen by hand besides; who is both stays when the rule changes its mind."""
    hands = {item.trial for item in by_hand}
    both = [dataclasses.replace(item, by="hand") if item.trial in hands else item for item in first]
    known = {item.trial for item in first}
    return [*both, *(item for item in by_hand if item.trial not in known)]


def can_move_on(record: TrialRecord, rule: Promotion) -> bool:
    """Return whether there is something to evaluate: a finished trial's checkpoint, or one that is trained again."""
    return record.state == "complete" and (record.checkpoint is not None or trains_again(rule))


def trains_again(rule: Promotion) -> bool:
    """Return whether the promoted are trained again before they are evaluated."""
    return rule.epochs is not None or rule.seeds > 1


def names(number: int, rule: Promotion) -> list[str]:
    """Return the names of a promoted trial's evaluations: its number, or one for each seed that it is trained with."""
    return [f"{number}-seed{seed}" for seed in range(rule.seeds)] if trains_again(rule) else [str(number)]


def _why_not(record: TrialRecord | None) -> str:
    if record is None:
        return "there is none with this number"
    if record.state != "complete":
        return f"it is {record.state}{f' ({record.reason})' if record.reason else ''}, and only finished trials move on"
    return "its checkpoint is gone, since only the best are kept (evaluation.keep_checkpoints)"


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
