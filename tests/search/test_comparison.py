"""The table beside the parent: who stands in it, in which order, and what is known of each."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from search.record import TrialRecord
from search.results import comparison
from search.results.leaderboard import Interval
from search.spec import Objective, Parameter, SearchSpec

SPEC = SearchSpec(
    name="cells",
    workload="pairs",
    objectives=(Objective(metric="val_dice", mode="max"), Objective(metric="gmacs", mode="min")),
    parameters=(Parameter(name="prune.bottleneck", type="float", low=0.0, high=0.7),),
)
TABLE = {"params": "params", "gmacs": "GMACs", "dice_before": "Dice before training"}


def trial(number: int, dice: float, gmacs: float) -> TrialRecord:
    params = {"prune.bottleneck": number / 10}
    return TrialRecord(number=number, state="complete", params=params, values=(dice, gmacs))


def evaluation(name: str, number: int, dice: float, **metrics: float) -> dict[str, Any]:
    groups = {group: {"dice": dice + shift} for group, shift in (("a", -0.1), ("b", 0.0), ("c", 0.1))}
    return {
        "name": name,
        "trial": number,
        "metrics": {"dice": dice, **metrics},
        "intervals": {"dice": [dice - 0.1, dice + 0.1]},
        "resamples": {"dice": [dice - 0.1, dice, dice + 0.1]},
        "groups": groups,
    }


RECORDS = [trial(0, 0.9, 4.0), trial(1, 0.8, 2.0), trial(2, 0.7, 3.0), trial(3, 0.6, 1.0)]
PARENT = evaluation("parent", -1, 0.85, params=100.0, gmacs=5.0)
EVALUATED = [
    evaluation("2", 2, 0.75, params=60.0, gmacs=3.0, dice_before=0.2),
    PARENT,
    evaluation("0", 0, 0.8, params=80.0, gmacs=4.0, dice_before=0.3),
]


@pytest.mark.row("P53")
def test_the_parent_stands_first_then_evaluated_and_front_by_validation() -> None:
    found = comparison.lines(SPEC, RECORDS, EVALUATED, TABLE)
    assert [line.name for line in found] == ["parent", "0", "1", "2", "3"]
    assert [line.on_front for line in found] == [False, True, True, False, True]
    parent, first, unevaluated = found[:3]
    assert parent.figures == {"params": 100.0, "GMACs": 5.0, "Dice before training": None}
    assert (parent.test.value, parent.difference, parent.validation, parent.params) == (0.85, Interval(None), {}, {})
    assert first.figures["Dice before training"] == 0.3 and first.validation == {"val_dice": 0.9, "gmacs": 4.0}
    assert first.difference.value == pytest.approx(-0.05)
    assert (unevaluated.figures, unevaluated.test.value, unevaluated.difference.value) == ({}, None, None)
    assert comparison.lines(SPEC, RECORDS[::-1], EVALUATED[::-1], TABLE) == found, "the order of records says nothing"


def test_without_a_parent_there_are_no_differences_and_less_may_be_better() -> None:
    spec = SearchSpec(**{**vars(SPEC), "objectives": SPEC.objectives[::-1]})
    records = [TrialRecord(**{**vars(record), "values": (record.values or ())[::-1]}) for record in RECORDS]
    found = comparison.lines(spec, records, [EVALUATED[0]], TABLE)
    assert [line.name for line in found] == ["3", "1", "2", "0"], "by GMACs, the least first"
    assert all(line.difference == Interval(None) for line in found)


def test_a_trial_trained_with_several_seeds_has_a_line_for_each() -> None:
    again = [evaluation(f"0-seed{seed}", 0, 0.8) for seed in (0, 1)]
    found = comparison.lines(SPEC, RECORDS[:1], [*again, PARENT], TABLE)
    assert [line.name for line in found] == ["parent", "0-seed0", "0-seed1"]
    assert all(line.on_front for line in found[1:])


@pytest.mark.row("P53")
def test_the_file_has_a_column_once_and_leaves_empty_what_is_unknown(tmp_path: Path) -> None:
    found = comparison.lines(SPEC, RECORDS, EVALUATED, TABLE)
    with comparison.write(tmp_path / "pareto.csv", SPEC, found, TABLE).open() as file:
        header, *rows = list(csv.reader(file))
    ends = [f"test_dice{middle}{end}" for middle in ("", "_minus_parent") for end in ("", "_low", "_high")]
    assert header == ["name", "on_front", "val_dice", *TABLE, *ends, "prune.bottleneck"]
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(by_name) == ["parent", "0", "1", "2", "3"]
    assert by_name["parent"]["gmacs"] == "5.0" and by_name["parent"]["val_dice"] == ""
    assert by_name["1"]["gmacs"] == "2.0", "as the trial told it"
    assert (by_name["1"]["params"], by_name["1"]["test_dice"], by_name["1"]["prune.bottleneck"]) == ("", "", "0.1")
    assert float(by_name["0"]["test_dice_minus_parent"]) == pytest.approx(-0.05)
    low, high = (float(by_name["0"][f"test_dice_minus_parent_{end}"]) for end in ("low", "high"))
    assert low - 1e-9 <= -0.05 <= high + 1e-9
