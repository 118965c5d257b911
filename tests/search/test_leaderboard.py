from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from search.record import StudyPaths, TrialRecord
from search.results import leaderboard
from search.results.leaderboard import Interval
from search.spec import Evaluation, Objective, Parameter, SearchSpec

SPEC = SearchSpec(
    name="question",
    workload="toy",
    objectives=(Objective(metric="val_mean_iou", mode="max"),),
    parameters=(
        Parameter(name="lr", type="float", low=1e-5, high=1e-1, log=True),
        Parameter(name="network.widths", type="categorical", choices=([16, 32], [32, 64])),
        Parameter(name="momentum", type="float", low=0.0, high=1.0, when={"optimizer": "sgd"}),
    ),
)
PROMOTION = {"promoted": [{"trial": 2, "why": "best"}, {"trial": 1, "why": "second"}], "incumbent": 0, "rule": {}}


def trial(number: int, value: float | None, **changes: Any) -> TrialRecord:
    params = {"lr": 0.01, "network.widths": [16, 32]}
    values = None if value is None else (value,)
    state: Any = "failed" if value is None else "complete"
    return TrialRecord(
        number=number, state=state, params=params, values=values, epochs={1: (0.1,), 4: (0.2,)}, slot_s=8.0, **changes
    )


def evaluation(number: int, score: float | None, replicates: list[float | None], name: str = "") -> dict[str, Any]:
    return {
        "trial": number,
        "name": name or str(number),
        "checkpoint_sha256": f"sha-{number}",
        "split": "test",
        "metrics": {"mean_iou": score},
        "intervals": {"mean_iou": [0.1, 0.9]},
        "resamples": {"mean_iou": replicates},
    }


RECORDS = [trial(0, 0.5), trial(1, 0.7), trial(2, 0.9, checkpoint="trials/2/checkpoints/best"), trial(3, 0.8)]
EVALUATIONS = [
    evaluation(0, 0.4, [0.3, 0.4, 0.5]),
    evaluation(1, 0.7, [0.5, 0.7, 0.9]),
    evaluation(2, 0.5, [0.4, 0.5, 0.6]),
]


def test_order_is_that_of_validation_even_if_test_disagrees() -> None:
    table = leaderboard.rows(SPEC, RECORDS, PROMOTION, EVALUATIONS)
    assert [(row.rank, row.trial, row.role) for row in table] == [
        (1, 2, "promoted"),
        (3, 1, "promoted"),
        (4, 0, "incumbent"),
    ]
    assert table == leaderboard.rows(SPEC, RECORDS[::-1], PROMOTION, EVALUATIONS[::-1])


def test_paired_difference_by_hand() -> None:
    gap = leaderboard.difference(EVALUATIONS[2], EVALUATIONS[0], "mean_iou")
    assert gap.value == pytest.approx(0.1)
    # Every replicate differs by 0.1, although both intervals overlap: that is what pairing buys.
    assert (gap.low, gap.high) == (pytest.approx(0.1), pytest.approx(0.1))
    wide = leaderboard.difference(EVALUATIONS[1], EVALUATIONS[0], "mean_iou")
    # Differences 0.2, 0.3, 0.4; the 2.5th percentile lies 0.05 of a step above the first.
    assert (wide.low, wide.high) == (pytest.approx(0.205), pytest.approx(0.395))


def test_percentile_equals_numpy() -> None:
    values = [float(value) for value in np.random.default_rng(0).normal(size=37)]
    for percent in (0, 2.5, 50, 97.5, 100):
        assert leaderboard.percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_undefined_replicates_are_left_out_and_unequal_counts_refused() -> None:
    one = evaluation(1, 0.5, [0.5, None, 0.7])
    other = evaluation(0, 0.4, [0.4, 0.4, None])
    assert leaderboard.difference(one, other, "mean_iou").low == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 and 3 resamples of mean_iou; expected as many"):
        leaderboard.difference(evaluation(1, 0.5, [0.5, 0.6]), other, "mean_iou")


def test_undefined_scores_give_no_difference() -> None:
    gap = leaderboard.difference(evaluation(1, None, []), evaluation(0, 0.4, []), "mean_iou")
    assert gap == Interval(None)


@pytest.mark.parametrize(
    ("gap", "mode", "expected"),
    [
        (Interval(0.1, 0.05, 0.2), "max", "better"),
        (Interval(0.1, 0.05, 0.2), "min", "worse"),
        (Interval(-0.1, -0.2, -0.05), "min", "better"),
        (Interval(0.1, -0.05, 0.2), "max", "not distinguishable"),
        (Interval(0.1), "max", None),
    ],
)
def test_verdict(gap: Interval, mode: str, expected: str | None) -> None:
    assert leaderboard.verdict(gap, mode) == expected


def test_headline_and_its_direction() -> None:
    assert (leaderboard.headline(SPEC), leaderboard.headline_mode(SPEC)) == ("mean_iou", "max")
    loss = SearchSpec(name="q", workload="toy", objectives=(Objective(metric="val_loss", mode="min"),), parameters=())
    assert (leaderboard.headline(loss), leaderboard.headline_mode(loss)) == ("loss", "min")
    other = SearchSpec(
        name="q",
        workload="toy",
        objectives=loss.objectives,
        parameters=(),
        evaluation=Evaluation(metric="dice"),
    )
    assert (leaderboard.headline(other), leaderboard.headline_mode(other)) == ("dice", "max")


def test_seeds_of_one_trial_are_rows_of_their_own_and_a_failed_trial_has_no_rank() -> None:
    items = [evaluation(2, 0.5, [], "2-seed10"), evaluation(2, 0.5, [], "2-seed2"), evaluation(5, 0.1, [])]
    records = [*RECORDS, trial(5, None)]
    table = leaderboard.rows(SPEC, records, {"promoted": [{"trial": 2}], "incumbent": None}, items)
    assert [(row.rank, row.name) for row in table] == [(1, "2-seed2"), (1, "2-seed10"), (None, "5")]
    assert table[0].difference == Interval(None)


def test_csv_holds_every_column_and_leaves_the_unknown_empty(tmp_path: Path) -> None:
    table = leaderboard.rows(SPEC, RECORDS, PROMOTION, EVALUATIONS)
    path = leaderboard.write_leaderboard(tmp_path / "leaderboard.csv", table, SPEC)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0] == {
        "rank": "1",
        "trial": "2",
        "evaluation": "2",
        "role": "promoted",
        "lr": "0.01",
        "network.widths": "[16, 32]",
        "momentum": "",
        "val_mean_iou": "0.9",
        "test_mean_iou": "0.5",
        "test_mean_iou_low": "0.1",
        "test_mean_iou_high": "0.9",
        "difference": str(0.5 - 0.4),
        "difference_low": lines[0]["difference_low"],
        "difference_high": lines[0]["difference_high"],
        "epochs": "4",
        "slot_s": "8.0",
        "checkpoint": "trials/2/checkpoints/best",
        "checkpoint_sha256": "sha-2",
    }
    assert lines[2]["difference"] == ""
    assert [item.name for item in tmp_path.iterdir()] == ["leaderboard.csv"]


@pytest.mark.row("S3")
def test_a_search_over_one_parameter_has_its_values_side_by_side_in_their_order(tmp_path: Path) -> None:
    lr = Parameter(name="lr", type="categorical", choices=(1e-3, 1e-4))
    spec = replace(SPEC, parameters=(lr,))
    records = [replace(trial(0, 0.5), params={"lr": 1e-3}), replace(trial(1, 0.7), params={"lr": 1e-4})]
    promotion = {"promoted": [{"trial": 1}, {"trial": 0}], "incumbent": 0}
    table = leaderboard.rows(spec, records, promotion, EVALUATIONS[:2])
    assert [row.trial for row in table] == [1, 0], "the leaderboard begins with the best"
    path = leaderboard.write_comparison(StudyPaths(tmp_path).comparison("lr"), table, spec)
    assert path.name == "lr_comparison.csv"
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["lr"], first["difference"]) == ("0.001", "")
    assert (second["lr"], float(second["difference"])) == ("0.0001", pytest.approx(0.7 - 0.4))
    assert float(second["difference_low"]) == pytest.approx(0.205) and float(
        second["difference_high"]
    ) == pytest.approx(0.395)


def test_an_empty_leaderboard_keeps_its_header(tmp_path: Path) -> None:
    path = leaderboard.write_leaderboard(tmp_path / "leaderboard.csv", [], SPEC)
    assert path.read_text().startswith(
        "rank,trial,evaluation,role,lr,network.widths,momentum,val_mean_iou,test_mean_iou"
    )


def test_parquet_has_one_row_a_trial_with_typed_columns(tmp_path: Path) -> None:
    moment = datetime(2025, 11, 21, 12, tzinfo=UTC)
    records = [
        trial(0, 0.5, started=moment, metrics={"val_mean_iou": 0.5, "train_loss": 0.1}),
        TrialRecord(number=1, state="failed", params={"lr": 1, "momentum": 0.9}, reason="out of memory"),
    ]
    table = parquet.read_table(leaderboard.write_table(tmp_path / "trials.parquet", records, SPEC)).to_pylist()
    assert table[0]["params.lr"] == 0.01
    assert table[0]["params.network.widths"] == "[16, 32]"
    assert table[0]["params.momentum"] is None
    assert table[0]["objective.val_mean_iou"] == 0.5
    assert table[0]["metrics.train_loss"] == 0.1
    assert table[0]["started"] == moment
    assert table[1]["params.lr"] == 1.0
    assert (table[1]["state"], table[1]["reason"]) == ("failed", "out of memory")
    assert table[1]["objective.val_mean_iou"] is None


def test_parquet_of_no_trials_has_the_columns(tmp_path: Path) -> None:
    table = parquet.read_table(leaderboard.write_table(tmp_path / "trials.parquet", [], SPEC))
    assert table.num_rows == 0
    assert "params.lr" in table.column_names


def test_files_are_found_again(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    assert leaderboard.read_evaluations(paths) == []
    assert leaderboard.read_promotion(paths)["promoted"] == []
    folder = paths.evaluation("2")
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATIONS[2]))
    paths.promotion.write_text(json.dumps(PROMOTION))
    assert leaderboard.read_evaluations(paths) == [EVALUATIONS[2]]
    assert leaderboard.read_promotion(paths) == PROMOTION


@pytest.mark.row("E14")
def test_a_line_tells_the_score_beside_calling_everything_one_class() -> None:
    found = evaluation(2, 0.5, [0.4, 0.5, 0.6])
    found["metrics"]["mean_iou_majority"] = 0.1
    found["resamples"]["mean_iou_majority"] = [0.1, 0.1, 0.1]
    found["details"] = {"majority": "land"}
    row, *others = leaderboard.rows(SPEC, RECORDS, PROMOTION, [found, EVALUATIONS[0]])
    told = leaderboard.beside_majority(SPEC, row)
    assert told.startswith("Better than calling everything land (0.1000): mean_iou +0.400, paired 95 % interval +0.305")
    assert leaderboard.beside_majority(SPEC, others[0]) == "", "nothing is known of it"
    found["metrics"]["mean_iou"], found["resamples"]["mean_iou"] = 0.1, [0.05, 0.1, 0.15]
    [row, *_] = leaderboard.rows(SPEC, RECORDS, PROMOTION, [found])
    assert leaderboard.beside_majority(SPEC, row).startswith("Not distinguishable from calling everything land")
