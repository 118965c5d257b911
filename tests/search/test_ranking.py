from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from search import rules
from search.ranking import best, pareto, ranked
from search.record import State, TrialRecord
from search.spec import Objective

SCORE = (Objective(metric="score", mode="max"),)
BOTH = (Objective(metric="score", mode="max"), Objective(metric="cost", mode="min"))


def trial(number: int, *values: float, state: State = "complete") -> TrialRecord:
    return TrialRecord(number=number, state=state, params={}, values=values or None)


def numbers(records: list[TrialRecord]) -> list[int]:
    return [record.number for record in records]


def test_best_is_first_in_the_direction_of_the_objective() -> None:
    records = [trial(0, 0.5), trial(1, 0.9), trial(2, 0.7)]
    assert numbers(ranked(records, SCORE)) == [1, 2, 0]
    assert numbers(ranked(records, (Objective(metric="loss", mode="min"),))) == [0, 2, 1]


def test_ties_go_by_the_other_objectives_then_by_number() -> None:
    records = [trial(3, 0.5, 1), trial(2, 0.5, 2), trial(1, 0.5, 1)]
    assert numbers(ranked(records, BOTH)) == [1, 3, 2]


def test_stopped_failed_and_nan_trials_are_never_ranked() -> None:
    records = [trial(0, 9.0, state="stopped"), trial(1, state="failed"), trial(2, math.nan), trial(3, math.inf)]
    assert ranked(records, SCORE) == []
    assert best(records, SCORE) is None
    assert pareto(records, SCORE) == []


def test_front_by_hand() -> None:
    # Trial 1 costs more than 0 for the same score; 3 is beaten by 2 in both; 4 equals 2 and stays with it.
    records = [trial(0, 0.5, 1), trial(1, 0.5, 2), trial(2, 0.8, 4), trial(3, 0.7, 5), trial(4, 0.8, 4)]
    assert numbers(pareto(records, BOTH)) == [2, 4, 0]


values = st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float))


@settings(max_examples=60, deadline=None)
@given(st.lists(values, max_size=12), st.randoms(use_true_random=False))
def test_front_holds_exactly_the_undominated_whatever_the_order(
    points: list[tuple[float, float]], shuffle: random.Random
) -> None:
    records = [trial(number, *point) for number, point in enumerate(points)]
    expected = {
        one.number
        for one in records
        if not any(rules.dominates(rules.costs(other.values, BOTH), rules.costs(one.values, BOTH)) for other in records)
    }
    shuffle.shuffle(records)
    front = numbers(pareto(records, BOTH))
    assert set(front) == expected
    assert numbers(ranked(records, BOTH)) == numbers(ranked(sorted(records, key=lambda r: r.number), BOTH))
