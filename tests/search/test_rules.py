from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import rules
from search.spec import Objective, Stopping

SCORE = (Objective(metric="score", mode="max"),)
LOSS = (Objective(metric="loss", mode="min"),)
BOTH = (Objective(metric="score", mode="max"), Objective(metric="cost", mode="min"))
ASHA = Stopping(rule="asha", min_epochs=1, reduction=3)
MEDIAN = Stopping(rule="median", min_epochs=1, min_trials=3)


def curves(**points: list[float]) -> dict[int, dict[int, tuple[float, ...]]]:
    """Return a history from t0=[score at epoch 1, at epoch 2, ...]."""
    return {
        int(name[1:]): {epoch: (value,) for epoch, value in enumerate(values, start=1)}
        for name, values in points.items()
    }


def test_rungs_by_hand() -> None:
    assert rules.rungs(ASHA, 0, 9) == [1, 3]
    assert rules.rungs(ASHA, 0, 10) == [1, 3, 9]
    assert rules.rungs(Stopping(min_epochs=2, reduction=4), 0, 100) == [2, 8, 32]
    assert rules.rungs(Stopping(min_epochs=5), 0, 5) == []
    two = Stopping(min_epochs=1, reduction=3, brackets=2)
    assert [rules.rungs(two, number, 28) for number in (0, 1, 2)] == [[1, 3, 9, 27], [3, 9, 27], [1, 3, 9, 27]]


def test_a_target_is_reached_at_any_epoch_of_any_trial() -> None:
    history = curves(t0=[0.2, 0.9, 0.4], t1=[math.nan, 0.5], t2=[])
    assert rules.reached(history, SCORE[0], 0.9) and not rules.reached(history, SCORE[0], 0.91)
    assert rules.reached(history, LOSS[0], 0.2) and not rules.reached(history, LOSS[0], 0.19)
    assert not rules.reached({}, SCORE[0], -1.0)


def test_asha_lets_the_best_third_go_on() -> None:
    history = curves(t0=[0.9], t1=[0.5], t2=[0.7], t3=[0.6], t4=[0.1], t5=[0.8])
    verdicts = {number: rules.judge(ASHA, SCORE, history, number, 1) for number in history}
    assert {number for number, verdict in verdicts.items() if not verdict.stop} == {0, 5}
    assert verdicts[2].why == "place 3 of 6 at rung 1, the best 2 go on"
    turned = {number: rules.judge(ASHA, LOSS, history, number, 1).stop for number in history}
    assert {number for number, stop in turned.items() if not stop} == {4, 1}


def test_asha_speaks_at_rungs_only_and_never_stops_the_first() -> None:
    history = curves(t0=[0.1, 0.1, 0.1], t1=[0.9, 0.9, 0.9], t2=[0.8, 0.8, 0.8])
    assert [rules.judge(ASHA, SCORE, history, 0, epoch).stop for epoch in (1, 2, 3)] == [True, False, True]
    assert rules.judge(ASHA, SCORE, curves(t0=[0.1]), 0, 1) == rules.GO_ON


def test_asha_compares_the_best_until_the_rung_with_those_who_reached_it() -> None:
    # At epoch 3 trial 0 is bad, but it has been the best before; trial 3 has not come so far and does not count.
    history = curves(t0=[0.9, 0.1, 0.1], t1=[0.5, 0.5, 0.5], t2=[0.6, 0.6, 0.7], t3=[1.0, 1.0])
    assert [rules.judge(ASHA, SCORE, history, number, 3).stop for number in (0, 1, 2)] == [False, True, True]
    assert rules.judge(ASHA, SCORE, history, 2, 3).why == "place 2 of 3 at rung 3, the best 1 go on"


@pytest.mark.row("K17")
def test_a_rung_between_two_validations_is_judged_at_the_next_report() -> None:
    every_second = Stopping(rule="asha", min_epochs=3, reduction=3)
    history = {0: {2: (0.9,), 4: (0.9,), 6: (0.9,)}, 1: {2: (0.5,), 4: (0.6,), 6: (0.6,)}}
    assert [rules.judge(every_second, SCORE, history, 1, epoch).stop for epoch in (2, 4, 6)] == [False, True, False]
    assert rules.judge(every_second, SCORE, history, 1, 4).why == "place 2 of 2 at rung 4, the best 1 go on"


def test_asha_compares_within_a_bracket() -> None:
    rule = Stopping(rule="asha", min_epochs=1, reduction=2, brackets=2)
    history = curves(t0=[0.1, 0.1], t1=[0.9, 0.9], t2=[0.05, 0.05], t3=[0.8, 0.8])
    assert rules.judge(rule, SCORE, history, 1, 1) == rules.GO_ON, "bracket 1 has its first rung at epoch 2"
    assert rules.judge(rule, SCORE, history, 0, 1) == rules.GO_ON, "better than trial 2, the other of bracket 0"
    assert rules.judge(rule, SCORE, history, 2, 1).stop
    assert rules.judge(rule, SCORE, history, 3, 2).why == "place 2 of 2 at rung 2, the best 1 go on"


def test_equals_go_by_number() -> None:
    history = curves(t0=[0.5], t1=[0.5], t2=[0.5])
    assert [rules.judge(ASHA, SCORE, history, number, 1).stop for number in range(3)] == [False, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [ASHA, MEDIAN])
def test_what_is_not_finite_is_stopped_and_beats_nobody(rule: Stopping, value: float) -> None:
    history = curves(t0=[value], t1=[0.5], t2=[0.4], t3=[0.6], t4=[0.1])
    assert rules.judge(rule, SCORE, history, 0, 1) == rules.Verdict(True, "objective is not finite at epoch 1")
    assert not rules.judge(rule, SCORE, history, 3, 1).stop
    assert rules.judge(rule, SCORE, history, 4, 1).stop


def test_none_stops_nobody_and_min_epochs_protects() -> None:
    history = curves(t0=[0.1, math.nan], t1=[0.9], t2=[0.8], t3=[0.7])
    assert rules.judge(Stopping(rule="none"), SCORE, history, 0, 2) == rules.GO_ON
    assert rules.judge(Stopping(rule="median", min_epochs=3, min_trials=1), SCORE, history, 0, 2) == rules.GO_ON


def test_median_by_hand() -> None:
    # Means until epoch 2: 0.3, 0.5, 0.7; their median is 0.5.
    history = curves(t0=[0.4, 0.45], t1=[0.2, 0.4], t2=[0.4, 0.6], t3=[0.6, 0.8, 9.9], t4=[0.9])
    verdict = rules.judge(MEDIAN, SCORE, history, 0, 2)
    assert verdict == rules.Verdict(True, "best 0.45 is worse than the median 0.5 of 3 at epoch 2")
    history[0][1] = (0.5,)
    assert not rules.judge(MEDIAN, SCORE, history, 0, 2).stop, "its best is the median"
    four = Stopping(rule="median", min_trials=4)
    history[0][1] = (0.0,)
    assert not rules.judge(four, SCORE, history, 0, 2).stop, "only three others have come so far"


def test_median_of_a_loss() -> None:
    history = curves(t0=[0.6], t1=[0.2], t2=[0.4], t3=[0.5])
    assert rules.judge(MEDIAN, LOSS, history, 0, 1).why == "best 0.6 is worse than the median 0.4 of 3 at epoch 1"
    assert not rules.judge(MEDIAN, LOSS, history, 1, 1).stop


def test_two_objectives_are_compared_by_front_then_by_the_first() -> None:
    values = {0: (0.5, 1.0), 1: (0.9, 5.0), 2: (0.4, 2.0), 3: (0.9, 6.0), 4: (math.nan, 0.0)}
    # Nobody beats 1 and 0; 2 is beaten by 0 and 3 by 1.
    assert rules.rank(values, BOTH) == [1, 0, 3, 2, 4]
    history = {number: {1: value} for number, value in values.items() if number != 4}
    rule = Stopping(rule="asha", reduction=2)
    assert [rules.judge(rule, BOTH, history, number, 1).stop for number in range(4)] == [False, False, True, True]


def test_best_epoch_is_the_earliest_of_equals_and_finite() -> None:
    assert rules.best_epoch({3: (0.5,), 1: (0.5,), 2: (math.nan,)}, SCORE) == 1
    assert rules.best_epoch({1: (0.5,), 2: (0.1,)}, LOSS) == 2
    assert rules.best_epoch({1: (math.nan,)}, SCORE) is None
    assert rules.best_epoch({}, SCORE) is None
    assert rules.best_epoch({1: (0.9, math.nan), 2: (0.5, 1.0)}, BOTH) == 2


def test_domination_by_hand() -> None:
    assert rules.dominates((1.0, 2.0), (1.0, 3.0))
    assert not rules.dominates((1.0, 2.0), (1.0, 2.0))
    assert not rules.dominates((1.0, 4.0), (2.0, 3.0))


values = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(allow_nan=True, allow_infinity=True))
histories = st.dictionaries(
    st.integers(0, 12),
    st.lists(values, min_size=1, max_size=9).map(lambda scores: {e: (s,) for e, s in enumerate(scores, start=1)}),
    min_size=1,
    max_size=9,
)
stoppings = st.builds(
    Stopping,
    rule=st.sampled_from(["asha", "median", "none"]),
    min_epochs=st.integers(1, 3),
    reduction=st.integers(2, 4),
    brackets=st.integers(1, 3),
    min_trials=st.integers(1, 4),
)
History = Mapping[int, Mapping[int, tuple[float, ...]]]


@settings(max_examples=150, deadline=None)
@given(histories, stoppings, st.randoms(use_true_random=False), st.sampled_from([SCORE, LOSS]))
def test_a_verdict_does_not_depend_on_any_order(
    history: History, rule: Stopping, shuffle: random.Random, objectives: tuple[Objective, ...]
) -> None:
    mixed = {}
    for number in shuffle.sample(list(history), len(history)):
        epochs = list(history[number])
        mixed[number] = {epoch: history[number][epoch] for epoch in shuffle.sample(epochs, len(epochs))}
    for number in history:
        for epoch in history[number]:
            verdict = rules.judge(rule, objectives, history, number, epoch)
            assert verdict == rules.judge(rule, objectives, mixed, number, epoch)
            assert bool(verdict.why) is verdict.stop


@settings(max_examples=100, deadline=None)
@given(histories)
def test_asha_lets_exactly_the_best_third_of_a_rung_go_on(history: History) -> None:
    scores = {number: epochs[1][0] for number, epochs in history.items()}
    finite = {number: score for number, score in scores.items() if math.isfinite(score)}
    going_on = [number for number in history if not rules.judge(ASHA, SCORE, history, number, 1).stop]
    assert len(going_on) == min(len(finite), max(1, math.ceil(len(history) / 3)))
    assert all(finite[winner] >= score for winner in going_on for n, score in finite.items() if n not in going_on)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 20), st.tuples(values, values), max_size=10))
def test_ranking_names_everyone_once_and_puts_nobody_before_one_who_beats_them(
    points: dict[int, tuple[float, ...]],
) -> None:
    order = rules.rank(points, BOTH)
    assert sorted(order) == sorted(points)
    finite = [number for number in order if all(map(math.isfinite, points[number]))]
    assert order[: len(finite)] == finite
    for place, number in enumerate(finite):
        costs = rules.costs(points[number], BOTH)
        assert not any(rules.dominates(rules.costs(points[later], BOTH), costs) for later in finite[place:])
