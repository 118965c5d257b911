from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.record import StudyPaths
from search.resources import Room, resolved
from search.results import summary
from search.results.leaderboard import Interval, Row
from search.results.summary import expected_epochs, plan_text, result_text
from search.service import Plan
from search.spec import SearchSpec

Load = Callable[..., SearchSpec]


def plan(spec: SearchSpec, folder: Path, **changes: Any) -> Plan:
    made: dict[str, Any] = {
        "paths": StudyPaths(folder),
        "config": {"epochs": 9, "lr": 1e-3},
        "manifest": {"samples": {"train": 70, "validation": 15, "test": 15}},
        "slots": 2,
        "room": Room(4.0, 1.0, "this machine"),
        "sampler": "tpe: it copes",
        "incumbent": {"lr": 1e-3, "width": 32},
        "notes": ("mind this",),
    }
    made |= changes
    return Plan(spec=resolved(spec, made["room"]), **made)


def lines(text: str) -> dict[str, str]:
    return {
        line.split("  ")[0].strip() or line.split("  ")[1]: line.partition("  ")[2].strip()
        for line in text.splitlines()
    }


def test_the_plan_says_what_would_be_done(toy: Load, tmp_path: Path) -> None:
    spec = toy(
        search={"trials": 27, "wall_time_s": 1800.0, "slot_hours": 3.0},
        stopping={"rule": "asha", "min_epochs": 1, "reduction": 3},
        promotion={"k": 2, "epochs": 20, "seeds": 3},
        parameters={
            "lr": {"type": "float", "low": 1.0e-5, "high": 1.0, "log": True},
            "width": {"type": "int", "low": 8, "high": 256, "step": 8},
            "fail": {"choices": ["never", "nan"], "when": {"width": [8, 16]}},
        },
    )
    text = plan_text(plan(spec, tmp_path / "runs" / "toy", manifest={"samples": {"train": 7}, "synthetic": True}))
    found = lines(text)
    assert found["search"] == f"toy, workload toy, in {tmp_path}/runs/toy"
    assert found["data"] == "7 train; SYNTHETIC"
    assert found["objective"] == "score max"
    words = " ".join(text.split())
    assert (
        "parameters lr float 1e-05 to 1, log width int 8 to 256, step 8 fail one of never, nan, when width is" in words
    )
    assert found["first trial"] == "lr 0.001, width 32"
    assert found["stopping"] == "asha, rungs at epoch 1, 3 of 9; one in 3 goes on"
    # 27 trials for one epoch, 9 for two more, 3 for the last six: 27 + 18 + 18 = 63.
    assert found["trials"] == (
        "27 of at most 9 epochs: 243 epochs at the most, about 63 with early stops; at 1 s an epoch 32 s on 2 slots"
    )
    assert found["slots"] == "2 x (1 CPU, 1 GPU) of 4 CPU, 1 GPU on this machine"
    assert found["budget"] == (
        "no new trial after 1800 s = 1 slot-hours; no new trial after 3 slot-hours = 5400 s on 2 slots"
    )
    assert found["promotion"] == (
        "the best 2, and the first trial to compare with; trained again for 20 epochs and with 3 seeds; "
        "evaluated on the test split"
    )
    assert text.endswith("\nnote: mind this")


def test_the_plan_of_a_study_that_has_begun_says_so(toy: Load, tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / "trials" / str(number)).mkdir(parents=True)
    (tmp_path / "trials" / "0" / "result.json").write_text("{}")
    spec = toy(stopping={"rule": "median"}, promotion={"rule": "pareto", "k": 4})
    found = lines(plan_text(plan(spec, tmp_path)))
    assert found["search"].endswith("(1 trials have ended there)")
    assert found["stopping"] == "median, 9 epochs"
    assert found["promotion"].startswith("the Pareto set, at most 4, and the first trial")
    assert "budget" not in found


@pytest.mark.parametrize(
    ("trials", "epochs", "stopping", "expected"),
    [
        (27, 9, {"rule": "asha", "reduction": 3}, 27 + 9 * 2 + 3 * 6),
        (27, 9, {"rule": "none"}, 243),
        (27, 9, {"rule": "median"}, 243),
        (10, 9, {"rule": "asha", "reduction": 3}, 10 + 4 * 2 + 2 * 6),
        (10, 3, {"rule": "asha", "min_epochs": 3}, 30),
        (1, 9, {"rule": "asha"}, 9),
        (16, 10, {"rule": "asha", "min_epochs": 2, "reduction": 4}, 16 * 2 + 4 * 6 + 1 * 2),
    ],
)
def test_expected_epochs_by_hand(toy: Load, trials: int, epochs: int, stopping: dict[str, Any], expected: int) -> None:
    assert expected_epochs(toy(search={"trials": trials}, stopping=stopping), epochs) == expected


def row(**changes: Any) -> Row:
    made: dict[str, Any] = {
        "rank": 1,
        "trial": 3,
        "name": "3",
        "role": "promoted",
        "params": {"lr": 0.01, "width": 64},
        "validation": {"score": 0.81234},
        "metric": "score",
        "test": Interval(0.8, 0.75, 0.85),
        "difference": Interval(0.1, -0.05, 0.25),
        "epochs": 9,
        "slot_s": 1.0,
    }
    return Row(**{**made, **changes})


def test_the_result_says_who_won_why_and_where_everything_is(
    toy: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan(toy(), tmp_path / "runs" / "toy")
    made.paths.folder.mkdir(parents=True)
    made.paths.promotion.write_text(
        '{"promoted": [{"trial": 3, "why": "best score 0.8123 of 9 trials"}], "incumbent": 0}'
    )
    incumbent = row(rank=None, trial=0, name="0", role="incumbent", difference=Interval(None), test=Interval(0.7))
    text = result_text(made, [row(), incumbent])
    table = text.splitlines()[:3]
    assert [cell for cell in table[0].split("  ") if cell][:3] == ["rank", "trial", "role"]
    assert table[1].split()[:4] == ["1", "3", "promoted", "0.8123"]
    assert "0.8000 [0.7500, 0.8500]" in table[1] and "+0.1000 [-0.0500, +0.2500]" in table[1]
    assert table[2].split() == ["-", "0", "incumbent", "0.8123", "0.7000", "0.01", "64"]
    assert "trial 3: best score 0.8123 of 9 trials" in text
    assert "report       runs/toy/report.html" in text
    assert "models       runs/toy/models" in text
    assert f"tensorboard --logdir {tmp_path}/runs" in text


def test_without_a_finished_trial_the_result_says_so(toy: Load, tmp_path: Path) -> None:
    assert result_text(plan(toy(), tmp_path), []).startswith(
        "nothing was evaluated: no finished trial has a checkpoint\n"
    )


def test_a_long_space_is_shown_in_part(toy: Load, tmp_path: Path) -> None:
    parameters = {name: {"choices": [1]} for name in ("width", "epochs", "seed", "fail_epoch")}
    more = {name: {"choices": [0.5]} for name in ("lr", "noise", "epoch_s")}
    spec = toy(parameters={**parameters, **more})
    header = result_text(plan(spec, tmp_path), [row()]).splitlines()[0]
    assert "noise" in header and "epoch_s" not in header
    assert len(spec.parameters) == summary.SHOWN_PARAMETERS + 1
