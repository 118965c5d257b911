"""W&B's sweep files: what they become, and that nothing in them is passed over."""

from __future__ import annotations

import io
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tune
from configuration import ConfigError
from search import planning, service, spec_file, sweep_file
from search.errors import SpecError
from search.record import StudyPaths
from search.results.summary import plan_text
from search.spec import Objective, Parameter, SearchSpec
from search.study import Outcome, Study, Task

Load = Callable[..., SearchSpec]
Open = Callable[[SearchSpec], Study]
Drive = Callable[[Study, Task], Outcome]

SWEEP = """
program: train.py
project: toys
name: first sweep
method: bayes
metric: {name: score, goal: maximize, target: 0.9}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-1}
  channels: {values: [8, 16, 32, 64]}
  max_epochs: {min: 3, max: 12}
  spread: {value: 0.0}
early_terminate: {type: hyperband, min_iter: 2}
run_cap: 20
command: ["${env}", "${interpreter}", "${program}", "${args}"]
"""
NAMES = {"learning_rate": "lr", "channels": "width", "max_epochs": "epochs", "spread": "noise"}
WORKLOAD = f"""
from workloads.toy import Config, evaluate, inspect, metrics, predict, prepare, train

SWEEP_NAMES = {NAMES!r}

def sweep_value(name, value):
    if name != "channels":
        return value
    if value == "none":
        raise ValueError("got 'none'; expected widths such as '8 px'")
    return int(value.split()[0]) if isinstance(value, str) else value
"""
LR = {"distribution": "log_uniform_values", "min": 1.0e-3, "max": 1.0}


@pytest.fixture
def renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Offer a workload whose sweep files have names and values of their own; return its name."""
    (tmp_path / "renaming_toy").mkdir()
    (tmp_path / "renaming_toy" / "workload.py").write_text(WORKLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("renaming_toy", "renaming_toy.workload"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "renaming_toy.workload"


@pytest.fixture
def sweeps(tmp_path: Path) -> Callable[..., SearchSpec]:
    """Return a function that loads a sweep file, given as text or as data."""

    def load(content: str | dict[str, Any], *assignments: str, trains: str | None = "toy") -> SearchSpec:
        path = tmp_path / "sweeps.yml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return spec_file.load(str(path), assignments, trains=trains)

    return load


def sweep(**changes: Any) -> dict[str, Any]:
    """Return a sweep over the toy's learning rate with some keys changed; `...` takes one out."""
    content = {"method": "random", "metric": {"name": "score", "goal": "maximize"}, "parameters": {"lr": LR}}
    return {key: value for key, value in {**content, **changes}.items() if value is not ...}


def translated(**changes: Any) -> dict[str, Any]:
    return sweep_file.translate(sweep(**changes), workload="toy")


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        translated(**changes)
    return str(caught.value)


@pytest.mark.row("E6")
def test_a_sweep_becomes_a_search_space() -> None:
    content = yaml.safe_load(SWEEP)
    assert sweep_file.is_sweep(content)
    found = sweep_file.translate(content, workload="toy", name_of=NAMES)
    assert found == {
        "workload": "toy",
        "objective": {"metric": "score", "mode": "max"},
        "parameters": {
            "lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "width": {"type": "categorical", "choices": [8, 16, 32, 64]},
            "epochs": {"type": "int", "low": 3, "high": 12},
        },
        "fixed": {"noise": 0.0},
        "search": {"sampler": "tpe", "trials": 20, "target": 0.9},
        "stopping": {"rule": "asha", "min_epochs": 2, "reduction": 3},
    }
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert sweep_file.translate(content, workload="toy", name_of=lambda name: NAMES.get(name, name)) == found
    assert not sweep_file.is_sweep(found)


@pytest.mark.row("E6")
@pytest.mark.row("E33")
def test_the_study_has_the_translated_space(sweeps: Load, renaming: str, tmp_path: Path) -> None:
    spec = sweeps(SWEEP, "search.trials=5", "search.wall_time_s=60", trains=renaming)
    assert (spec.name, spec.workload) == ("sweeps", renaming)
    assert spec.objectives == (Objective(metric="score", mode="max"),)
    assert spec.parameters[0] == Parameter(name="lr", type="float", low=1e-5, high=0.1, log=True)
    assert spec.fixed == {"noise": 0.0}
    assert (spec.search.trials, spec.search.wall_time_s, spec.search.target) == (5, 60.0, 0.9)
    written = tmp_path / "same.yaml"
    written.write_text(
        yaml.safe_dump(sweep_file.translate(yaml.safe_load(SWEEP), workload=renaming, name_of=NAMES), sort_keys=False)
    )
    assert spec_file.load(str(written)).parameters == spec.parameters


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"values": [0.1, 0.2]}, {"type": "categorical", "choices": [0.1, 0.2]}),
        ({"values": ["1e-3", "adam"]}, {"type": "categorical", "choices": [1e-3, "adam"]}),
        ({"distribution": "categorical", "values": [[5, 5], [3]]}, {"type": "categorical", "choices": [[5, 5], [3]]}),
        ({"min": 3, "max": 12}, {"type": "int", "low": 3, "high": 12}),
        ({"distribution": "int_uniform", "min": 3, "max": 12}, {"type": "int", "low": 3, "high": 12}),
        ({"min": 0, "max": 0.5}, {"type": "float", "low": 0.0, "high": 0.5}),
        ({"min": "1e-4", "max": "1e-3"}, {"type": "float", "low": 1e-4, "high": 1e-3}),
        ({"distribution": "uniform", "min": 0, "max": 1}, {"type": "float", "low": 0.0, "high": 1.0}),
        (
            {"distribution": "log_uniform", "min": -2, "max": 0},
            {"type": "float", "low": math.exp(-2), "high": 1.0, "log": True},
        ),
        (
            {"distribution": "inv_log_uniform", "min": 0, "max": 2},
            {"type": "float", "low": math.exp(-2), "high": 1.0, "log": True},
        ),
        (
            {"distribution": "inv_log_uniform_values", "min": 0.01, "max": 1},
            {"type": "float", "low": 0.01, "high": 1.0, "log": True},
        ),
        (
            {"distribution": "q_uniform", "min": 2, "max": 10, "q": 2},
            {"type": "int", "low": 2, "high": 10, "step": 2},
        ),
        ({"distribution": "q_uniform", "min": 2.0, "max": 4}, {"type": "int", "low": 2, "high": 4, "step": 1}),
        (
            {"distribution": "q_uniform", "min": 0.1, "max": 0.7, "q": 0.1},
            {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1},
        ),
        (
            {"distribution": "q_log_uniform_values", "min": 8, "max": 64},
            {"type": "int", "low": 8, "high": 64, "log": True},
        ),
        (
            {"values": ["a", "b"], "probabilities": [0.75, 0.25]},
            {"type": "categorical", "choices": ["a", "b"], "probabilities": [0.75, 0.25]},
        ),
    ],
)
def test_each_parameter_is_said_exactly(entry: dict[str, Any], expected: dict[str, Any]) -> None:
    (found,) = translated(parameters={"x": entry})["parameters"].values()
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_nested_parameters_have_dotted_names_and_constants_are_fixed() -> None:
    nested = {
        "loss": {"parameters": {"dice": {"min": 0.0, "max": 1.0}, "ce": {"distribution": "constant", "value": 1}}}
    }
    found = translated(parameters={**nested, "epochs": {"min": 5, "max": 5}})
    assert list(found["parameters"]) == ["loss.dice"]
    assert found["fixed"] == {"loss.ce": 1, "epochs": 5}


def test_what_a_file_leaves_open_is_as_at_wandb() -> None:
    found = translated(metric={"name": "loss"})
    assert found["objective"] == {"metric": "loss", "mode": "min"}, "goal: minimize"
    assert found["stopping"] == {"rule": "none"}, "no run is stopped"
    assert found["search"] == {"sampler": "random"}
    two = {"a": {"values": [1, 2, 3]}, "b": {"min": 1, "max": 4}, "c": {"value": 3}}
    assert translated(method="grid", parameters=two)["search"] == {"sampler": "grid", "trials": 12}
    assert translated(method="grid", parameters=two, run_cap=5)["search"] == {"sampler": "grid", "trials": 5}


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ({"min_iter": 3}, 3),
        ({"min_iter": 3, "eta": 3.0, "strict": False}, 3),
        ({"max_iter": 27, "s": 2}, 3),
        ({"max_iter": 27, "s": 3}, 1),
        ({"max_iter": 27, "s": 9}, 1),
        ({"max_iter": 27, "s": 1}, 9),
    ],
)
def test_hyperband_is_asha_with_the_same_rungs(content: dict[str, Any], first: int) -> None:
    found = translated(early_terminate={"type": "hyperband", **content})["stopping"]
    assert found == {"rule": "asha", "min_epochs": first, "reduction": 3}


@pytest.mark.row("E6")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": 1}, "methods: unknown key; did you mean 'method'?"),
        ({"controller": {"type": "local"}}, "controller: unknown key"),
        ({"program": ["train.py"]}, "program: got ['train.py']; expected text"),
        ({"kind": "job"}, "kind: got 'job'; expected sweep"),
        ({"method": "bayesian"}, "method: got 'bayesian'; expected one of grid, random, bayes; did you mean 'bayes'?"),
        ({"method": "custom"}, "method: got 'custom'; expected one of grid, random, bayes"),
        ({"metric": ...}, "metric: missing; trials are compared by it"),
        ({"metric": "score"}, "metric: got 'score'; expected keys name, goal, target"),
        ({"metric": {"goal": "maximize"}}, "metric.name: missing"),
        ({"metric": {"name": "score", "goal": "max"}}, "metric.goal: got 'max'; expected one of maximize, minimize"),
        ({"metric": {"name": "score", "impute": "best"}}, "metric.impute: unknown key"),
        ({"metric": {"name": "score", "target": "high"}}, "metric.target: got 'high'; expected number"),
        ({"run_cap": 2.5}, "run_cap: got 2.5; expected whole number"),
        ({"command": "python train.py"}, "command: got 'python train.py'; expected a list"),
        ({"command": ["python3", "${program}", "--fast"]}, "command[2]: got '--fast', which may change the run"),
        ({"command": ["${envvar:HOME}"]}, "command[0]: got '${envvar:HOME}', which may change the run"),
        ({"command": [["a"]]}, "command[0]: got ['a'], which may change the run"),
        ({"parameters": []}, "parameters: expected at least one parameter"),
        ({"parameters": {"lr": {"value": 1}}}, "parameters: every one has a single value"),
        ({"parameters": {"lr": 0.1}}, "parameters.lr: got 0.1; expected {value: ...}, {values: ...} or {min, max}"),
        ({"parameters": {"lr": {}}}, "parameters.lr: got {}; expected value, values, or min and max"),
        ({"parameters": {"loss": {"parameters": {}}}}, "parameters.loss: expected at least one parameter"),
        ({"parameters": {"loss": {"parameters": {"a": {"value": 1}}, "min": 1}}}, "parameters.loss.min: unknown key"),
        ({"parameters": {"lr": {"min": 0.1}}}, "parameters.lr.max: missing"),
        ({"parameters": {"lr": {"min": 0.1, "max": 1.0, "q": 0.1}}}, "parameters.lr.q: unknown key"),
        ({"parameters": {"lr": {"value": 0.1, "values": [1]}}}, "parameters.lr.values: unknown key"),
        ({"parameters": {"lr": {"values": []}}}, "parameters.lr.values: got []; expected a list"),
        ({"parameters": {"lr": {"min": "low", "max": 1}}}, "parameters.lr.min: got 'low'; expected number"),
        (
            {"parameters": {"lr": {"distribution": "int_uniform", "min": 1, "max": 2.5}}},
            "parameters.lr.max: got 2.5; expected whole number",
        ),
        (
            {"parameters": {"lr": {"distribution": "log_unifrom", "min": 1, "max": 2}}},
            "parameters.lr.distribution: got 'log_unifrom'; did you mean 'log_uniform'",
        ),
        (
            {"parameters": {"lr": {"distribution": "log_uniform", "min": 1e-5, "max": 1e5}}},
            "parameters.lr.max: e to the 100000 is no number here; log_uniform_values takes the values themselves",
        ),
        (
            {"parameters": {"lr": {"distribution": "q_uniform", "min": 1, "max": 10, "q": 3}}},
            "parameters.lr.min: got 1, which is no multiple of q 3",
        ),
        (
            {"parameters": {"lr": {"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}}},
            "parameters.lr.q: got 0; expected more than 0",
        ),
        (
            {"parameters": {"lr": {"distribution": "q_log_uniform_values", "min": 8, "max": 64, "q": 8}}},
            "parameters.lr.q: got 8; a logarithmic range has whole numbers, q 1, or none at all",
        ),
        (
            {"parameters": {"lr": {"distribution": "q_log_uniform", "min": 1, "max": 2}}},
            "parameters.lr.distribution: its ends are powers of e",
        ),
        (
            {"method": "bayes", "parameters": {"lr": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
            "parameters.lr.probabilities: method bayes does not draw by them",
        ),
        ({"early_terminate": "hyperband"}, "early_terminate: got 'hyperband'; expected keys type"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type: got 'envelope'; expected one of hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate.max_iter: missing; give min_iter, or max_iter"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s: missing beside max_iter"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "s": 2}},
            "early_terminate.s: together with min_iter; keep one",
        ),
        (
            {"early_terminate": {"type": "hyperband", "max_iter": 10, "s": 2}},
            "early_terminate.max_iter: got 10, and 3 does not divide 10; write min_iter",
        ),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1.5}},
            "early_terminate.eta: got 1.5; asha takes a whole number of at least 2",
        ),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}},
            "early_terminate.strict: got true",
        ),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "mu": 3}}, "early_terminate.mu: unknown key"),
    ],
)
def test_what_cannot_be_said_here_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes).startswith(message)


@pytest.mark.parametrize("distribution", sweep_file.SPREAD)
def test_distributions_without_bounds_are_refused_with_what_to_write(distribution: str) -> None:
    text = refused(parameters={"lr": {"distribution": distribution, "mu": 0, "sigma": 1}})
    assert text == (
        f"parameters.lr.distribution: no sampler here draws from {distribution}; "
        "give a range: uniform or log_uniform_values, with min and max"
    )


def test_two_names_of_one_value_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameters\.learning_rate: is lr, which another parameter is too; keep"):
        sweep_file.translate(
            sweep(parameters={"lr": LR, "learning_rate": {"value": 1}}), workload="toy", name_of={"learning_rate": "lr"}
        )


@pytest.mark.parametrize("content", [None, [], "method", {}, {"method": "grid"}, {"method": 1, "workload": "toy"}])
def test_what_is_no_sweep(content: Any) -> None:
    assert not sweep_file.is_sweep(content)


@pytest.mark.row("E7")
def test_a_metric_that_is_never_reported_is_told_with_those_that_are(sweeps: Load) -> None:
    with pytest.raises(SpecError) as caught:
        sweeps(sweep(metric={"name": "average ACC", "goal": "maximize", "target": 0.9}))
    assert str(caught.value) == (
        "sweeps.yml: metric.name: the workload does not report 'average ACC'; it reports score, loss, cost"
    )


# The search space is checked in its own words; a person has only ever seen those of the file.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_cap": 0}, "run_cap: got 0; expected at least 1"),
        ({"parameters": {"learning_rat": LR}}, "parameters.learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"parameters": {"channels": {"values": [8.5]}}}, "parameters.channels.values[0]: got 8.5; expected whole"),
        ({"parameters": {"channels": {"values": ["none"]}}}, "parameters.channels.values[0]: got 'none'; expected wid"),
        ({"parameters": {"channels": {"values": [8, "8 px"]}}}, "parameters.channels.values: a value stands twice"),
        ({"parameters": {"channels": {"min": 8, "max": 4}}}, "parameters.channels.min: 8 is above high 4; swap them"),
        ({"parameters": {"channels": {"min": 8.0, "max": 9.5}}}, "parameters.channels: got float; width takes whole"),
        ({"parameters": {"learning_rate": LR, "epochs": {"value": "many"}}}, "parameters.epochs.value: got 'many'"),
        (
            {"parameters": {"learning_rate": LR, "chanels": {"value": 8}}},
            "parameters.chanels: unknown key; did you mean 'channels'",
        ),
        ({"parameters": {"learning_rate": {"min": -1.0, "max": 1.0}}}, "parameters.learning_rate.min: got -1.0; exp"),
        ({"method": "grid"}, "method: grid needs choices or a step for lr"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 0}},
            "early_terminate.min_iter: got 0; expected at least 1",
        ),
        (
            {"parameters": {"channels": {"values": [8, 16], "probabilities": [0.5, 0.4]}}},
            "parameters.channels.probabilities: add up to 0.9; expected 1",
        ),
        (
            {"parameters": {"channels": {"values": [8, 16], "probabilities": [1.0, 0.0]}}},
            "parameters.channels.probabilities[1]: got 0.0; expected more than 0, so leave out a choice",
        ),
        (
            {"parameters": {"channels": {"values": [8, 16], "probabilities": [1.0]}}},
            "parameters.channels.probabilities: got 1 for 2 choices; expected one for each",
        ),
    ],
)
def test_the_checks_of_a_search_space_speak_of_the_file_s_own_keys(
    sweeps: Load, renaming: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        sweeps(sweep(**{"parameters": {"learning_rate": LR}, **changes}), trains=renaming)
    assert str(caught.value).startswith(f"sweeps.yml: {message}")


def test_a_wrong_assignment_is_told_in_its_own_words(sweeps: Load) -> None:
    with pytest.raises(SpecError, match=r"sweeps\.yml: search\.trials: got 0; expected at least 1"):
        sweeps(sweep(run_cap=5), "search.trials=0")


def test_values_of_the_original_become_those_of_the_config(sweeps: Load, renaming: str) -> None:
    parameters = {"channels": {"values": ["8 px", 16]}, "learning_rate": LR, "max_epochs": {"value": 3}}
    spec = sweeps(sweep(parameters=parameters), trains=renaming)
    assert spec.parameters[0].choices == (8, 16)
    assert spec.fixed == {"epochs": 3}


@pytest.mark.row("E31")
def test_a_sweep_over_batch_size_epochs_learning_rate_and_optimizer(sweeps: Load) -> None:
    parameters = {
        "batch_size": {"values": [4, 8, 16]},
        "epochs": {"min": 3, "max": 12},
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1},
        "optimizer": {"values": ["adam", "adamw", "sgd"]},
    }
    metric = {"name": "val_mean_iou", "goal": "maximize"}
    spec = sweeps(sweep(method="bayes", metric=metric, parameters=parameters), trains="pairs")
    assert [parameter.name for parameter in spec.parameters] == list(parameters)
    for optimizer in ("adam", "adamw", "sgd"):
        values = {"batch_size": 4, "epochs": 12, "lr": 1e-3, "optimizer": optimizer}
        assert values.items() <= spec_file.config_values(spec, values).items()


@pytest.mark.row("E33")
def test_the_front_door_takes_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    file, own = tmp_path / "sweeps.yml", tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(sweep(metric={"name": "score", "goal": "maximize", "target": 0.9})))
    own.write_text(yaml.safe_dump(sweep_file.translate(sweep(), workload="toy")))

    def run(path: Path, *more: str) -> tuple[int, str, str]:
        code = tune.main(["--space", str(path), "--runs", str(tmp_path / "runs"), "--dry-run", *more])
        return code, *capsys.readouterr()

    budget = ("--set", "search.trials=7", "--set", "search.wall_time_s=60")
    code, out, err = run(file, "--workload", "toy", *budget)
    assert (code, err) == (0, "") and "sweeps, workload toy" in out and "7 of at most 5 epochs" in out
    assert "no new trial once score is 0.9 or more" in out and "no new trial after 60 s" in out

    code, out, err = run(file)
    assert code == 2 and "sweeps.yml: a sweep of W&B, which does not say what trains; name it with --workload" in err
    code, out, err = run(file, "--workload", "toyy")
    assert code == 2 and "sweeps.yml: --workload: workload 'toyy' not found; did you mean 'toy'?" in err
    code, out, err = run(own, "--workload", "toy")
    assert code == 2 and "own.yaml: --workload: is for the sweep files of W&B; this search space names its own" in err
    assert run(own)[0] == 0


def test_random_draws_choices_by_their_probabilities(sweeps: Load, open_study: Open) -> None:
    parameters = {"width": {"values": [8, 16, 64], "probabilities": [0.6, 0.3, 0.1]}, "lr": LR}
    study = open_study(sweeps(sweep(parameters=parameters, run_cap=600)))
    tasks = [study.ask() for _ in range(600)]
    found = [task.config["width"] for task in tasks if task is not None]
    assert [record.params["width"] for record in study.records()] == found
    for width, probability in ((8, 0.6), (16, 0.3), (64, 0.1)):
        # Five standard deviations of a binomial.
        assert found.count(width) == pytest.approx(600 * probability, abs=5 * math.sqrt(600 * probability))
    again = open_study(study.spec)
    assert [record.params for record in again.records()] == [record.params for record in study.records()]


@pytest.mark.row("E6")
def test_a_search_over_epochs(sweeps: Load, open_study: Open, drive: Drive, tmp_path: Path) -> None:
    parameters = {"epochs": {"min": 2, "max": 10}, "lr": LR}
    stopping = {"type": "hyperband", "min_iter": 3, "eta": 2}
    spec = sweeps(sweep(parameters=parameters, early_terminate=stopping, run_cap=12))
    shown = plan_text(planning.make(spec, tmp_path / "runs" / "plan"))
    assert "asha, rungs at epoch 3, 6 of 10" in shown and "12 of at most 10 epochs: 120 epochs at the most" in shown
    study = open_study(spec)
    for _ in range(12):
        task = study.ask()
        assert task is not None
        outcome = drive(study, task)
        assert (outcome.state, max(outcome.epochs)) == ("complete", task.config["epochs"])
        assert task.config["epochs"] == task.params["epochs"]
        study.report(task.number, max(outcome.epochs), outcome.epochs[max(outcome.epochs)])
    assert len({record.params["epochs"] for record in study.records()}) > 3
    # A trial of two epochs is past no rung; among those of three and more only the best go on.
    reached = sorted(max(epochs) for epochs in study.history.values())
    assert study.history and reached[0] >= 2
    assert not study.report(0, 2, (0.0,)).stop, "before the first rung nobody ends"
    assert study.report(0, 3, (0.0,)).stop, "at it the last one does"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.row("E33")
@pytest.mark.row("E45")
def test_a_sweep_runs_each_configuration_once_and_as_many_at_a_time_as_there_are_slots(
    sweeps: Load, tmp_path: Path
) -> None:
    searched = {"width": {"values": [8, 16]}, "lr": {"values": [0.1, 0.01]}}
    parameters = {**searched, "epochs": {"value": 1}, "epoch_s": {"value": 0.2}}
    spec = sweeps(sweep(parameters=parameters, run_cap=9), "resources.slots=2", "promotion.k=1")
    said = io.StringIO()
    paths = StudyPaths(tmp_path / "runs" / "sweeps")
    rows = service.run(planning.make(spec, paths.folder), said)
    records = Study(paths, spec).records()
    tried = sorted((record.params["width"], record.params["lr"]) for record in records)
    assert tried == [(8, 0.01), (8, 0.1), (16, 0.01), (16, 0.1)]
    assert "sweeps: complete, every configuration has been tried" in said.getvalue()
    spans = [(record.started, record.finished) for record in records]
    at_once = [sum(a <= start < b for a, b in spans if a and b) for start, _ in spans if start]
    assert max(at_once) <= 2
    best = max(records, key=lambda record: record.values or (0.0,))
    assert rows[0].params == best.params

    target = sweeps(sweep(metric={"name": "score", "goal": "maximize", "target": 0.01}, run_cap=9), "resources.slots=1")
    paths = StudyPaths(tmp_path / "runs" / "target")
    service.run(planning.make(target, paths.folder), said)
    assert len(Study(paths, target).records()) < 3, "one that reached it, and perhaps one asked ahead"
    assert "sweeps: complete, score has reached 0.01" in said.getvalue()
