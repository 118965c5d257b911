from __future__ import annotations

import math
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from search.promotion import promote
from search.record import TrialRecord
from search.spec import Objective, Promotion

SCORE = (Objective(metric="score", mode="max"),)
BOTH = (Objective(metric="score", mode="max"), Objective(metric="cost", mode="min"))


def record(number: int, *values: float, **more: Any) -> TrialRecord:
    made = {"state": "complete", "checkpoint": f"trials/{number}/checkpoints/epoch-0001", **more}
    return TrialRecord(number=number, params={}, values=values or None, **made)


def test_the_best_are_promoted_and_told_why() -> None:
    records = [record(0, 0.5), record(1, 0.9), record(2, 0.7), record(3, 0.123456), record(4, state="failed")]
    promoted = promote(records, SCORE, Promotion(k=4))
    assert [item.trial for item in promoted] == [1, 2, 0, 3]
    assert [item.why for item in promoted] == [
        "best score 0.9 of 5 trials, 4 finished",
        "second best score 0.7 of 5 trials, 4 finished",
        "third best score 0.5 of 5 trials, 4 finished",
        "number 4 by score 0.1235 of 5 trials, 4 finished",
    ]
    assert [item.trial for item in promote(records, (Objective(metric="loss", mode="min"),), Promotion(k=1))] == [3]


def test_who_cannot_be_evaluated_is_never_promoted() -> None:
    records = [
        record(0, 9.0, state="stopped"),
        record(1, 9.0, state="failed"),
        record(2, 9.0, state="running"),
        record(3, math.nan),
        record(4, 8.0, checkpoint=None),
        record(5, 0.1),
    ]
    assert [item.trial for item in promote(records, SCORE, Promotion(k=3))] == [5]
    assert promote(records[:5], SCORE, Promotion(k=3)) == ()
    assert promote([], SCORE, Promotion(k=3)) == ()


def test_the_pareto_set_is_promoted_in_order_of_the_first_objective() -> None:
    records = [record(0, 0.5, 1), record(1, 0.5, 2), record(2, 0.8, 4), record(3, 0.7, 5), record(4, 0.6, 2)]
    promoted = promote(records, BOTH, Promotion(rule="pareto", k=9))
    assert [item.trial for item in promoted] == [2, 4, 0]
    assert promoted[0].why == (
        "on the Pareto front of 3: no other trial is better in one of score 0.8, cost 4 without being worse in another"
    )
    assert [item.trial for item in promote(records, BOTH, Promotion(rule="pareto", k=2))] == [2, 4]
    assert [item.trial for item in promote(records, BOTH, Promotion(k=2))] == [2, 3], "top_k looks at the first alone"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4).map(float), st.integers(0, 4).map(float)), max_size=10),
    st.randoms(use_true_random=False),
    st.sampled_from(["top_k", "pareto"]),
    st.integers(1, 5),
)
def test_promotion_does_not_depend_on_the_order_of_records(
    points: list[tuple[float, float]], shuffle: random.Random, rule: Any, k: int
) -> None:
    records = [record(number, *point) for number, point in enumerate(points)]
    promoted = promote(records, BOTH, Promotion(rule=rule, k=k))
    assert promote(shuffle.sample(records, len(records)), BOTH, Promotion(rule=rule, k=k)) == promoted
    assert len(promoted) <= k
    if points:
        best = max(score for score, _ in points)
        assert points[promoted[0].trial][0] == best
