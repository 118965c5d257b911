from __future__ import annotations

import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search import samplers
from search.errors import StudyError
from search.record import StudyPaths
from search.spec import Search, SearchSpec
from search.study import Outcome, Study, Task

Load = Callable[..., SearchSpec]
Open = Callable[[SearchSpec], Study]

SAMPLERS = typing.get_args(typing.get_type_hints(Search)["sampler"])
COUNTED = {"width": {"type": "int", "low": 8, "high": 20, "step": 4}, "lr": {"choices": [0.1, 0.2, 0.3]}}
TRIALS = 12
SMALL: dict[str, Any] = {"parameters": COUNTED, "search": {"sampler": "random", "trials": 12}}


def outcome(task: Task) -> Outcome:
    """Return a score that depends on nothing but the configuration."""
    score = -((math.log10(task.config["lr"]) + 2) ** 2) - (math.log2(task.config["width"]) - 6) ** 2
    return Outcome(state="complete", reason="finished", epochs={1: (score,)}, best_epoch=1)


def asked(study: Study, count: int = 100) -> list[dict[str, Any]]:
    """Ask and tell so many trials and return their configurations."""
    found = []
    for _ in range(count):
        task = study.ask()
        if task is None:
            break
        found.append(dict(task.config))
        study.tell(task.number, outcome(task))
    return found


def spec_of(toy: Load, sampler: str, trials: int = TRIALS, **more: Any) -> SearchSpec:
    parameters = {"parameters": COUNTED} if sampler == "grid" else {}
    return toy(search={"sampler": sampler, "trials": trials, "seed": 3}, **parameters, **more)


# Optuna's gp fits with scipy, which complains of points that lie close together.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_study_asks_what_an_unbroken_one_would(
    toy: Load, open_study: Open, tmp_path: Path, sampler: str
) -> None:
    # gp takes seconds for a question; with six trials two of them come from its model.
    trials = 6 if sampler == "gp" else TRIALS
    spec = spec_of(toy, sampler, trials=trials)
    unbroken = Study(StudyPaths(tmp_path), spec)
    expected = asked(unbroken)
    assert len(expected) == trials
    assert len({(values["lr"], values["width"]) for values in expected}) == trials
    assert len({values["seed"] for values in expected}) == trials
    assert [trial.state for trial in unbroken.records()] == ["complete"] * trials
    resumed = [values for _ in range(4) for values in asked(open_study(spec), 3)]
    assert resumed == expected
    assert open_study(spec).ask() is None


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "nsga2"])
def test_conditional_parameters_vary_from_trial_to_trial(toy: Load, open_study: Open, sampler: str) -> None:
    noise = {"type": "float", "low": 0.0, "high": 1.0, "when": {"width": [16, 32]}}
    parameters = {"lr": {"type": "float", "low": 0.1, "high": 1.0}, "width": {"choices": [8, 16, 32]}, "noise": noise}
    found = asked(open_study(toy(parameters=parameters, search={"sampler": sampler, "trials": TRIALS})))
    drawn = [values["noise"] for values in found if values["width"] != 8]
    assert len(set(drawn)) == len(drawn) > 1
    assert all(values["noise"] == 0.0 for values in found if values["width"] == 8)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "qmc", "random", "grid"])
def test_two_objectives(toy: Load, open_study: Open, sampler: str) -> None:
    objective = [{"metric": "score"}, {"metric": "cost"}]
    study = open_study(spec_of(toy, sampler, objective=objective))
    for _ in range(TRIALS):
        task = study.ask()
        assert task is not None
        values = (*outcome(task).epochs[1], float(task.config["width"]))
        study.tell(task.number, Outcome(state="complete", reason="", epochs={1: values}, best_epoch=1))
    assert study.ask() is None
    assert all(record.values is not None and len(record.values) == 2 for record in study.records())


def test_the_grid_is_covered_once_and_then_the_search_ends(toy: Load, open_study: Open) -> None:
    spec = toy(search={"sampler": "grid", "trials": 50}, parameters=COUNTED)
    study = open_study(spec)
    study.enqueue({"width": 12, "lr": 0.2}, "defaults")
    assert study.left() == 12
    points = [(values["width"], values["lr"]) for values in asked(study)]
    assert points[0] == (12, 0.2)
    assert sorted(points) == [(width, lr) for width in (8, 12, 16, 20) for lr in (0.1, 0.2, 0.3)]
    assert points[1:] != sorted(points[1:])
    assert (study.ask(), study.left()) == (None, 0)


def test_trials_in_flight_keep_their_point_of_the_grid(toy: Load, open_study: Open) -> None:
    study = open_study(toy(search={"sampler": "grid", "trials": 12}, parameters=COUNTED))
    tasks = [study.ask() for _ in range(12)]
    assert len({tuple(task.params.items()) for task in tasks if task is not None}) == 12
    assert study.ask() is None


def test_a_grid_under_a_constraint_ends_when_all_that_is_allowed_was_tried(toy: Load, open_study: Open) -> None:
    spec = toy(search={"sampler": "grid", "trials": 12}, parameters=COUNTED, constraints=["width * lr < 3"])
    found = asked(open_study(spec))
    assert sorted((values["width"], values["lr"]) for values in found) == sorted(
        (width, lr) for width in (8, 12, 16, 20) for lr in (0.1, 0.2, 0.3) if width * lr < 3
    )


DISCRETE: dict[str, dict[str, Any]] = {
    "choices and ints": {"parameters": COUNTED},
    "ints on a scale": {"parameters": {"width": {"type": "int", "low": 3, "high": 14, "log": True}}},
    "steps": {"parameters": {"noise": {"type": "float", "low": 0.1, "high": 1.2, "step": 0.1}}},
    "conditions": {
        "parameters": {
            "fail_once": {"choices": [True, False]},
            "lr": {"choices": [0.1, 0.2, 0.3], "when": {"fail_once": True}},
            "width": {"type": "int", "low": 1, "high": 3},
        }
    },
}


# Whatever the sampler: a model that has found its best would ask for it for ever.
@pytest.mark.row("E45")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("space", DISCRETE)
@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "qmc", "cmaes"])
def test_trials_that_run_at_the_same_time_or_after_each_other_are_never_the_same(
    toy: Load, open_study: Open, tmp_path: Path, sampler: str, space: str
) -> None:
    spec = toy(search={"sampler": sampler, "trials": 50, "seed": 1}, **DISCRETE[space])
    at_once = Study(StudyPaths(tmp_path), spec)
    tasks = list(iter(at_once.ask, None))
    assert len({tuple(task.params.items()) for task in tasks}) == len(tasks) == 12
    assert (at_once.left(), at_once.exhausted) == (0, True)

    one_by_one = [values for _ in range(4) for values in asked(open_study(spec), 3)]
    assert len({tuple(values.items()) for values in one_by_one}) == len(one_by_one) == 12
    assert (open_study(spec).left(), open_study(spec).exhausted) == (0, True)


@pytest.mark.row("E45")
def test_what_a_constraint_refuses_is_refused_once_and_the_rest_is_tried(toy: Load, open_study: Open) -> None:
    spec = toy(search={"sampler": "random", "trials": 12}, parameters=COUNTED, constraints=["width * lr < 3"])
    study = open_study(spec)
    found = {(task.params["width"], task.params["lr"]) for task in iter(study.ask, None)}
    assert found == {(width, lr) for width in (8, 12, 16, 20) for lr in (0.1, 0.2, 0.3) if width * lr < 3}
    assert len(study.optuna.get_trials(deepcopy=False)) == 12
    study = Study(StudyPaths(study.paths.folder), toy(name="none", **{**SMALL, "constraints": ["width > 20"]}))
    with pytest.raises(StudyError, match="all 12 configurations break a constraint; loosen constraints: or the"):
        study.ask()


def test_what_somebody_enqueues_is_tried_though_it_was(toy: Load, open_study: Open) -> None:
    study = open_study(toy(**SMALL))
    for note in ("one", "two"):
        study.enqueue({"width": 8, "lr": 0.1}, note)
    found = [(task.params["width"], task.params["lr"]) for task in iter(study.ask, None)]
    assert found[:2] == [(8, 0.1)] * 2 and sorted(found[1:]) == sorted(set(found)) and len(found) == 12


def test_a_space_too_large_to_list_is_drawn_from_until_something_is_new(
    toy: Load, open_study: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "LARGEST_GRID", 11)
    study = open_study(toy(**SMALL))
    tasks = [study.ask() for _ in range(12)]
    assert len({tuple(task.params.items()) for task in tasks if task is not None}) == 12
    assert not study.exhausted


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_killed_question_over_choices_is_asked_to_its_end(
    toy: Load, open_study: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    spec = toy(**{**SMALL, "search": {**SMALL["search"], "sampler": sampler}})
    expected = asked(Study(StudyPaths(tmp_path), spec))
    study = open_study(spec)
    found = asked(study, 7)
    with monkeypatch.context() as broken:
        broken.setattr(optuna.Trial, "suggest_categorical", killed)
        with pytest.raises(KeyboardInterrupt):
            study.ask()
    assert [*found, *asked(open_study(spec))] == expected


def killed(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_true_and_one_are_two_points(toy: Load, open_study: Open) -> None:
    parameters = {"fail_once": {"choices": [True, False]}, "width": {"choices": [1, 2]}}
    found = asked(open_study(toy(search={"sampler": "grid", "trials": 9}, parameters=parameters, fixed={"lr": 0.1})))
    assert {(values["fail_once"], values["width"]) for values in found} == {
        (a, b) for a in (True, False) for b in (1, 2)
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    ("sections", "name", "why"),
    [
        ({}, "tpe", "it copes with choices, conditions and early stops"),
        ({"search": {"sampler": "qmc"}}, "qmc", "as the search space says"),
        (
            {"search": {"trials": 12}, "parameters": COUNTED},
            "grid",
            "the space has 12 points, and 12 trials cover it",
        ),
        ({"search": {"trials": 11}, "parameters": COUNTED}, "tpe", "it copes"),
        ({"search": {"trials": 20_000}, "parameters": {"width": {"type": "int", "low": 1, "high": 15_000}}}, "tpe", ""),
        ({"parameters": {"seed": {"type": "int", "low": 0, "high": 2**31 - 1}}}, "tpe", "it copes"),
        (
            {"objective": [{"metric": "score"}, {"metric": "cost"}], "search": {"trials": 1000}},
            "nsga2",
            "2 objectives and 1000 trials suit a population",
        ),
        ({"objective": [{"metric": "score"}, {"metric": "cost"}], "search": {"trials": 999}}, "tpe", ""),
    ],
)
def test_auto_says_what_it_chose_and_why(toy: Load, sections: dict[str, Any], name: str, why: str) -> None:
    found, reason = samplers.choose(toy(**sections))
    assert found == name and reason.startswith(why)


def test_a_conditional_space_has_no_grid(toy: Load) -> None:
    lr = {**COUNTED["lr"], "when": {"width": [8]}}
    assert samplers.choose(toy(parameters={"width": COUNTED["width"], "lr": lr}))[0] == "tpe"


@given(st.integers(-(2**40), 2**40), st.integers(0, 10_000), st.integers(1, 100))
def test_seeds_differ_by_trial_and_by_search(seed: int, number: int, step: int) -> None:
    first = samplers.trial_seed(seed, number)
    assert 0 <= first < 2**31
    assert first == samplers.trial_seed(seed, number)
    assert first != samplers.trial_seed(seed, number + step)
    assert first != samplers.trial_seed(seed + step, number)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - {"auto", "grid", "qmc"}))
def test_trials_whose_seeds_of_31_bits_are_one_draw_apart(toy: Load, sampler: str) -> None:
    # Two trials of a long search had one configuration; a grid and a sequence keep their places instead.
    alike = (12869, 26998)
    assert len({samplers.trial_seed(0, number) for number in alike}) == 1
    drawn = set()
    for number in alike:
        study = optuna.create_study(sampler=samplers.make(toy(search={"sampler": sampler, "seed": 0}), number))
        drawn.add(study.ask().suggest_float("lr", 0, 1))
    assert len(drawn) == 2


def test_another_seed_is_another_search(toy: Load, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.append(asked(Study(StudyPaths(folder), toy(search={"sampler": "random", "trials": 3, "seed": seed}))))
    assert not {values["lr"] for values in found[0]} & {values["lr"] for values in found[1]}
