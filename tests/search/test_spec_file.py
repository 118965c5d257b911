from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import configuration
from search import spec_file
from search.errors import SpecError
from search.spec import Objective, Parameter, SearchSpec
from workloads import toy as toy_workload

Load = Callable[..., SearchSpec]
SPACES = sorted(Path(spec_file.__file__).resolve().parent.parent.joinpath("search_spaces").glob("*.yaml"))
LR = {"type": "float", "low": 1.0e-5, "high": 1.0, "log": True}
OPTIONS = {"type": "categorical", "choices": [8, 16]}
NESTED: dict[str, Any] = {"workload": "mine.nested", "objective": {"metric": "score"}}
WORKLOAD = """
from dataclasses import dataclass, field
from workloads.toy import evaluate, inspect, metrics, predict, prepare, train

@dataclass(frozen=True, kw_only=True)
class Data:
    root: str | None = None
    tile: int | None = None

@dataclass(frozen=True, kw_only=True)
class Loss:
    dice: float = 0.5
    ce: float = 0.5

@dataclass(frozen=True, kw_only=True)
class Config:
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    lr: float = 0.1
    epochs: int = 2
    seed: int = 0
"""


@pytest.fixture
def nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a workload of somebody's own, whose Config has parts."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nested.py").write_text(WORKLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delitem(sys.modules, "mine.nested", raising=False)


def refusal(toy: Load, *assignments: str, **sections: Any) -> str:
    with pytest.raises(SpecError) as caught:
        toy(*assignments, **sections)
    return str(caught.value).removeprefix("toy.yaml: ")


def lr(**changes: Any) -> dict[str, Any]:
    """Return parameters with one entry of lr changed; `...` takes it out."""
    return {"lr": {key: value for key, value in {**LR, **changes}.items() if value is not ...}}


def test_a_whole_file_becomes_a_spec(toy: Load) -> None:
    spec = toy(fixed={"epochs": 9}, search={"trials": 4}, constraints=["lr * width < 10"])
    assert (spec.name, spec.workload, spec.fixed, spec.search.trials) == ("toy", "toy", {"epochs": 9}, 4)
    assert spec.objectives == (Objective(metric="score", mode="max"),)
    assert spec.parameters[0] == Parameter(name="lr", type="float", low=1e-5, high=1.0, log=True)
    assert spec.constraints == ("lr * width < 10",)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_search_space_that_comes_along_loads(path: Path) -> None:
    spec = spec_file.load(path.stem, folder=path.parent)
    assert spec == spec_file.load(str(path)) == spec_file.load(path.name, folder=path.parent)
    assert spec.parameters


def test_some_search_space_comes_along() -> None:
    assert SPACES


# Each key that does not exist is answered with the nearest that does, wherever it stands.
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"paramters": {}}, "paramters: unknown key; did you mean 'parameters'"),
        ({"search": {"trails": 3}}, "search.trails: unknown key; did you mean 'trials'?"),
        ({"stopping": {"min_epoch": 3}}, "stopping.min_epoch: unknown key; did you mean 'min_epochs'"),
        ({"resources": {"slot": 3}}, "resources.slot: unknown key; did you mean 'slots'"),
        ({"promotion": {"kk": 3}}, "promotion.kk: unknown key; did you mean 'k'?"),
        ({"evaluation": {"metrics": "x"}}, "evaluation.metrics: unknown key; did you mean 'metric'?"),
        ({"tracking": {"tensorbord": True}}, "tracking.tensorbord: unknown key; did you mean 'tensorboard'?"),
        ({"fixed": {"epoch": 3}}, "fixed.epoch: unknown key; did you mean 'epochs' or 'epoch_s'"),
        (
            {"parameters": {"widht": {"type": "int", "low": 1, "high": 2}}},
            "parameters.widht: unknown key; did you mean",
        ),
        ({"parameters": lr(lo=1.0)}, "parameters.lr.lo: unknown key; did you mean 'low' or 'log'?"),
        ({"search": {"zzzzzz": 1}}, "search.zzzzzz: unknown key; known keys: sampler, trials, seed, wall_time_s"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(toy: Load, sections: dict[str, Any], message: str) -> None:
    assert refusal(toy, **sections).startswith(message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"search": {"trials": "many"}}, "search.trials: got 'many'; expected whole number"),
        ({"search": {"trials": 2.5}}, "search.trials: got 2.5; expected whole number"),
        ({"search": {"trials": True}}, "search.trials: got True; expected whole number"),
        ({"search": {"trials": 0}}, "search.trials: got 0; expected at least 1"),
        (
            {"search": [1]},
            "search: expected keys sampler, trials, seed, wall_time_s, slot_hours, target, storage; got [1]",
        ),
        ({"search": {"sampler": "tpee"}}, "expected one of auto, tpe, gp, cmaes, nsga2, qmc, random, grid; did you"),
        ({"search": {"wall_time_s": 0.0}}, "search.wall_time_s: got 0.0; expected more than 0, or null for no limit"),
        ({"stopping": {"reduction": 1}}, "stopping.reduction: got 1; expected at least 2"),
        ({"promotion": {"epochs": 0}}, "promotion.epochs: got 0; expected at least 1"),
        ({"resources": {"slots": "some"}}, "resources.slots: got 'some'; expected whole number or one of auto"),
        ({"resources": {"cpus_per_worker": 0.0}}, "resources.cpus_per_worker: got 0.0; expected more than 0"),
        ({"resources": {"gpus_per_worker": -1.0}}, "resources.gpus_per_worker: got -1.0; expected at least 0"),
        (
            {"resources": {"gpus_per_worker": 1.5}},
            "resources.gpus_per_worker: got 1.5; above one GPU it must be a whole",
        ),
        ({"evaluation": {"cpus": -1.0}}, "evaluation.cpus: got -1.0; expected at least 0"),
        ({"fixed": {"epochs": 0}}, "fixed.epochs: got 0; expected at least 1"),
        ({"fixed": {"epochs": "9"}}, "fixed.epochs: got text '9'; write 9"),
        ({"fixed": ["epochs"]}, "fixed: expected keys of the workload's Config; got ['epochs']"),
        ({"tracking": {"wandb": True}}, "tracking.wandb: got True; expected one of offline, online"),
        ({"workload": ...}, "workload: missing; every search space names it"),
        ({"objective": ...}, "objective: missing; every search space names it"),
        ({"parameters": {}}, "parameters: expected at least one `name: {type: float, low: ..., high: ...}`"),
        ({"workload": "toyy"}, "workload: workload 'toyy' not found; did you mean 'toy'?"),
        ({"workload": ".toy"}, "workload: got '.toy'; expected a name, or a whole one as package.module"),
        ({"workload": "json.tool"}, "workload: json.tool is no workload: it lacks Config"),
        (
            {"objective": {"metric": "scor"}},
            "objective.metric: the workload does not report 'scor'; did you mean 'score' or 'cost'?",
        ),
        (
            {"objective": {"metric": "score", "mode": "maximum"}},
            "objective.mode: got 'maximum'; expected one of max, min",
        ),
        ({"objective": "score"}, "objective: expected {metric: NAME, mode: max or min}; got 'score'"),
        ({"objective": {"metric": "score", "goal": 1}}, "objective: expected {metric: NAME, mode: max or min}; got {'"),
        ({"objective": []}, "objective: empty; name a metric and a mode"),
        ({"objective": [{"metric": "score"}] * 2}, "objective.metric: 'score' stands twice"),
    ],
)
def test_a_wrong_value_is_told_with_its_remedy(toy: Load, sections: dict[str, Any], message: str) -> None:
    assert message in refusal(toy, **sections)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lr(low=...), "low: missing; float and int have low and high"),
        (lr(low=1.0, high=0.5), "low: 1.0 is above high 0.5; swap them"),
        (lr(low=0.5, high=0.5), "low: the range from 0.5 to 0.5 has one value; put it under fixed"),
        (lr(low=0.0), "low: got 0.0; a logarithmic scale needs more than 0"),
        (lr(low=-1.0), "low: got -1.0; a logarithmic scale needs more than 0"),
        (lr(low=float("-inf")), "low: got -inf; expected a finite number"),
        (lr(log="yes please"), "log: got 'yes please'; expected true or false"),
        (lr(step=0.1), "step: not together with log"),
        (lr(log=False, step=0.0), "step: got 0.0; expected more than 0 and at most 0.99999"),
        (lr(log=False, step=2.0), "step: got 2.0; expected more than 0 and at most 0.99999"),
        (lr(type="flaot"), "type: got 'flaot'; expected one of float, int, categorical; did you mean 'float'?"),
        (lr(type=...), "type: got None; expected one of float, int, categorical"),
        (lr(type="categorical"), "low: belongs to float and int; a categorical has choices"),
        (lr(choices=[0.1]), "choices: belongs to type categorical; this one is float"),
        ({"lr": {"choices": []}}, "choices: got []; expected a list of at least one value"),
        ({"lr": {"choices": 0.1}}, "choices: got 0.1; expected a list of at least one value"),
        ({"lr": {"choices": [0.1, 0.2, 0.1]}}, "choices: a value stands twice"),
        ({"lr": {"choices": [0.1, "1e-5"]}}, "choices[1]: got text '1e-5'; write 1.0e-5"),
        ({"lr": {"choices": [-1.0]}}, "choices[0]: got -1.0; expected more than 0"),
        ({"lr": 0.1}, ": expected {type, low, high} or {type, choices}; got 0.1"),
        ({"lr": {**LR, "when": 3}}, "when: expected {parameter: value or list of values}; got 3"),
        ({"lr": {"type": "float", "low": -2.0, "high": -1.0}}, "low: got -2.0; expected more than 0"),
    ],
)
def test_a_parameter_is_checked_whole(toy: Load, entry: dict[str, Any], message: str) -> None:
    text = refusal(toy, parameters=entry)
    assert text.startswith(f"parameters.lr.{message}" if not message.startswith(":") else f"parameters.lr{message}")


def test_choices_have_probabilities_where_the_sampler_is_random(toy: Load) -> None:
    width = {"choices": [8, 16], "probabilities": [0.25, 0.75]}
    assert toy(parameters={"width": width}, search={"sampler": "random"}).parameters[0].probabilities == (0.25, 0.75)
    expected = "parameters.width.probabilities: known to the sampler random only; this search's is tpe"
    assert refusal(toy, parameters={"width": width}, search={"sampler": "tpe"}) == expected
    text = refusal(toy, parameters=lr(probabilities=[1.0]))
    assert text == "parameters.lr.probabilities: belongs to type categorical; this one is float"


def test_a_fraction_where_a_whole_number_belongs(toy: Load) -> None:
    text = refusal(toy, parameters={"width": {"type": "float", "low": 8.0, "high": 16.0}})
    assert text == "parameters.width.type: got float; width takes whole number"
    text = refusal(toy, parameters={"fail": {"type": "float", "low": 8.0, "high": 16.0}})
    assert text.startswith("parameters.fail.type: got float; fail takes one of never, error")


def test_a_number_that_yaml_takes_for_text(toy: Load) -> None:
    """YAML 1.1 knows 1.0e-5, but takes 1e-5 for text."""
    space = "workload: toy\nobjective: {metric: score}\nparameters:\n  lr: {type: float, low: 1e-5, high: 1.0}\n"
    assert refusal(toy, text=space) == "parameters.lr.low: got text '1e-5'; write 1.0e-5"


def test_a_bound_that_fits_only_beside_other_values_is_left_to_the_trials(toy: Load) -> None:
    epochs = {"type": "int", "low": 1, "high": 40}
    space = {"workload": "pairs", "objective": {"metric": "val_mean_dice"}}
    searched = {"rewind_epoch": {"type": "int", "low": 0, "high": 30}, "epochs": epochs}
    assert toy(**space, parameters=searched).parameters[0].high == 30
    text = refusal(toy, **space, parameters={"rewind_epoch": searched["rewind_epoch"]})
    assert text.startswith("parameters.rewind_epoch.high: got 30; expected at most epochs")


@pytest.mark.row("P8")
@pytest.mark.parametrize(("key", "bound"), [("high", 1.0), ("high", 1.5), ("low", -0.1)])
@pytest.mark.parametrize("name", ["prune.encoders.0", "prune.default", "prune.global"])
def test_a_ratio_that_would_empty_a_block_is_refused_at_load(toy: Load, name: str, key: str, bound: float) -> None:
    space = {"workload": "pairs", "objective": {"metric": "val_mean_dice"}}
    entry = {"type": "float", "low": 0.0, "high": 0.5, key: bound}
    text = refusal(toy, **space, parameters={name: entry, "lr": lr()["lr"]})
    assert text.startswith(f"parameters.{name}.{key}: got {bound}; expected 0 or more, and less than 1")
    assert refusal(toy, **space, fixed={name: bound}).startswith(f"fixed.{name}: got {bound}; expected 0 or more")


def test_an_impossible_bound_is_refused_though_the_other_fits(toy: Load) -> None:
    text = refusal(toy, parameters=lr(low=-1.0, log=False))
    assert text == "parameters.lr.low: got -1.0; expected more than 0"


def test_searched_and_fixed(toy: Load) -> None:
    assert refusal(toy, fixed={"lr": 0.1}) == "parameters.lr: searched and fixed at once; remove one of the two"


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"widht": 8}, "parameters.noise.when.widht: unknown key; did you mean 'width'?"),
        ({"epochs": 5}, "parameters.noise.when: 'epochs' must stand above 'noise'"),
        ({"width": 9}, "parameters.noise.when.width: got 9, which width never is; it is one of 8, 16"),
        ({"width": [8, 9]}, "parameters.noise.when.width: got 9, which width never is; it is one of 8, 16"),
        ({"lr": 3.0}, "parameters.noise.when.lr: got 3.0, which lr never is; it is from 1e-05 to 1.0"),
    ],
)
def test_when_names_a_parameter_above_and_values_that_it_can_have(
    toy: Load, when: dict[str, Any], message: str
) -> None:
    noise = {"type": "float", "low": 0.0, "high": 1.0, "when": when}
    parameters = {"lr": LR, "width": OPTIONS, "noise": noise, "epochs": {"choices": [5, 6]}}
    assert refusal(toy, parameters=parameters) == message


def test_when_takes_one_value_or_several(toy: Load) -> None:
    noise = {"type": "float", "low": 0.0, "high": 1.0}
    for wanted in (8, [8]):
        spec = toy(parameters={"width": OPTIONS, "noise": {**noise, "when": {"width": wanted}}})
        assert spec.parameters[1].when == {"width": (8,)}


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("lr <", "cannot read 'lr <': "),
        ("lrr < 1", "'lrr < 1': no value is called 'lrr'"),
        ("lr < 0 and lrr < 1", "'lr < 0 and lrr < 1': no value is called 'lrr'"),
        ("lr > 0 or max(lrr, 1) > 1", "no value is called 'lrr'"),
        ("open('x')", "only arithmetic, comparisons, and, or, not, min, max, abs, len, sum are allowed"),
        ("fail < 3", "not supported between"),
        ("fail + 'x' == 'y'", "fail is 'never'; arithmetic needs numbers"),
        ("9 ** 9 ** 9 ** 9 > lr", "Numerical result out of range"),
        ("1 / (width - width) > lr", "division by zero"),
        ("(" * 1000 + "lr" + ")" * 1000, "too many nested parentheses"),
    ],
)
def test_constraints_are_tried_before_anything_starts(toy: Load, constraint: str, message: str) -> None:
    text = refusal(toy, constraints=["lr < 2", constraint])
    assert text.startswith("constraints[1]: ") and message in text


def test_constraints_are_a_list(toy: Load) -> None:
    expected = "constraints: expected a list of texts such as 'a.b * 2 <= c'; got "
    assert refusal(toy, constraints="lr < 1") == f"{expected}'lr < 1'"
    assert refusal(toy, constraints=[True]) == f"{expected}[True]"


@pytest.mark.usefixtures("nested")
def test_constraints_see_what_is_fixed(toy: Load) -> None:
    parts = {**NESTED, "parameters": lr(), "constraints": ["data.tile * loss.dice < 4"]}
    assert toy(**parts, data={"tile": 4}).constraints
    assert "data.tile is None; arithmetic needs numbers" in refusal(toy, **parts)


@pytest.mark.parametrize(
    ("search", "parameters", "message"),
    [
        ({"sampler": "grid"}, {"lr": LR}, "search.sampler: grid needs choices or a step for lr"),
        (
            {"sampler": "grid"},
            {"width": OPTIONS, "epochs": {"choices": [1, 2], "when": {"width": 8}}},
            "search.sampler: grid knows no conditional parameters (epochs); use tpe",
        ),
        (
            {"sampler": "grid"},
            {"seed": {"type": "int", "low": 0, "high": 2**31 - 1}},
            "search.sampler: the grid has 2147483648 points; use random, qmc or tpe",
        ),
    ],
)
def test_grid_takes_what_can_be_counted(
    toy: Load, search: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    assert refusal(toy, search=search, parameters=parameters) == message


def test_cmaes_takes_one_objective(toy: Load) -> None:
    objectives = [{"metric": "score"}, {"metric": "cost"}]
    expected = "search.sampler: cmaes knows one objective; use tpe, gp or nsga2"
    assert refusal(toy, objective=objectives, search={"sampler": "cmaes"}) == expected
    assert [objective.mode for objective in toy(objective=objectives).objectives] == ["max", "min"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {trials: 1}\nsearch: {trials: 2}\n", "key 'search' stands twice"),
        ("search: {trials: 1, trials: 2}\n", "key 'trials' stands twice"),
        ("a: &x {b: 1}\nc: *x\n", "aliases are not supported; write the value out"),
        ("- a\n- b\n", "expected keys workload, data, objective, parameters, constraints, fixed, parent, search"),
        ("", "got NoneType"),
        ("a: [\n", "not YAML: while parsing"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("[" * 5000, "nested too deeply, more than 50 levels; a configuration has a few"),
        ("x" * (2**20 + 1), "larger than 1 MiB; expected some pages of YAML"),
    ],
)
def test_a_file_that_is_no_search_space(toy: Load, text: str, message: str) -> None:
    found = refusal(toy, text=text or "\n")
    assert message in found and "Traceback" not in found


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"^a\.yaml: not YAML"):
        spec_file.load("a", folder=tmp_path)


def test_a_missing_file_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=re.escape(f"nuclei: no such search space; here are none (in {tmp_path}/)")):
        spec_file.load("nuclei", folder=tmp_path)
    for name in ("b.yaml", "a.yaml", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(SpecError, match=r"nuclei: no such search space; here are a\.yaml, b\.yaml"):
        spec_file.load("nuclei", folder=tmp_path)
    with pytest.raises(SpecError, match="no such search space"):
        spec_file.load(str(tmp_path), folder=tmp_path)


@pytest.mark.usefixtures("nested")
def test_nested_and_dotted_names_say_the_same(toy: Load) -> None:
    dice = {"type": "float", "low": 0.0, "high": 1.0}
    noise = {"type": "float", "low": 0.0, "high": 1.0, "when": {"loss": {"dice": [0.5]}}}
    dotted = toy(
        **NESTED,
        parameters={"loss.dice": dice, "lr": {**LR, "when": {"loss.dice": [0.5]}}},
        fixed={"loss.ce": 0.25, "data.root": "here", "data.tile": 8},
    )
    nested = toy(
        **NESTED,
        parameters={"loss": {"dice": dice}, "lr": {**LR, "when": noise["when"]}},
        fixed={"loss": {"ce": 0.25}},
        data={"root": "here", "tile": 8},
    )
    assert nested == toy(
        **NESTED,
        parameters={
            "loss.dice.type": "float",
            "loss": {"dice.low": 0.0, "dice.high": 1.0},
            "lr": {**LR, "when.loss.dice": [0.5]},
        },
        fixed={"loss.ce": 0.25},
        data={"root": "here", "tile": 8},
    )
    assert dotted == nested
    assert dotted.fixed == {"loss.ce": 0.25, "data.root": "here", "data.tile": 8}
    assert toy("data.root=there", "fixed.loss.ce=0.75", **NESTED, parameters={"loss.dice": dice}).fixed == {
        "data.root": "there",
        "loss.ce": 0.75,
    }


@pytest.mark.usefixtures("nested")
def test_a_value_written_both_ways_is_refused(toy: Load) -> None:
    dice = {"type": "float", "low": 0.0, "high": 1.0}
    text = refusal(toy, **NESTED, parameters={"loss.dice": dice, "loss": {"dice": dice}})
    assert text == "parameters.loss.dice.type: stands twice, nested and with dots; keep one"
    text = refusal(toy, **NESTED, parameters={"loss.dice": dice}, fixed={"loss": {"ce": 1}, "loss.ce": 2})
    assert text == "fixed.loss.ce: stands twice, nested and with dots; keep one"
    text = refusal(toy, **NESTED, parameters={"lr": LR}, fixed={"data.root": "a"}, data={"root": "b"})
    assert text == "data.root: stands under fixed and under data; keep one"


@pytest.mark.usefixtures("nested")
def test_an_unknown_key_in_a_part_is_answered_with_its_whole_name(toy: Load) -> None:
    assert refusal(toy, **NESTED, data={"rot": 1}, parameters={"lr": LR}) == (
        "data.rot: unknown key; did you mean 'data.root' or 'data.tile'?"
    )
    assert refusal(toy, **NESTED, fixed={"dice": 1.0}, parameters={"lr": LR}) == (
        "fixed.dice: unknown key; did you mean 'loss.dice'?"
    )
    assert refusal(toy, **NESTED, parameters={"loss": {"dce": LR}}).startswith(
        "parameters.loss.dce: unknown key; did you mean 'loss.dice' or 'loss.ce'"
    )


def test_assignments_change_the_file(toy: Load) -> None:
    spec = toy(
        "search.trials=5", "fixed.epochs=7", "parameters.lr.low=1e-3", "objective.metric=loss", "objective.mode=min"
    )
    assert (spec.search.trials, spec.fixed, spec.parameters[0].low) == (5, {"epochs": 7}, 1e-3)
    assert spec.objectives == (Objective(metric="loss", mode="min"),)
    assert toy("search={trials: 6, seed: 3}", search={"trials": 2}).search.seed == 3
    assert toy("constraints=[lr < 1]").constraints == ("lr < 1",)
    # A whole entry takes the place of the old one, of which nothing stays.
    # It keeps its place: those that depend on it stand below.
    assert toy("parameters.lr={choices: [0.1, 0.2]}").parameters[0].choices == (0.1, 0.2)
    assert toy("parameters.lr={choices: [0.1, 0.2]}", "parameters.lr.choices=[0.3]").parameters[0].choices == (0.3,)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("search.trials", "search.trials: expected key=value"),
        ("=3", "=3: expected key=value"),
        ("trials=3", "trials: no such section; known: workload, data, objective,"),
        ("lr=3", "Values of the workload: fixed.lr=..."),
        ("search.trails=3", "search.trails: unknown key; did you mean 'trials'?"),
        ("search.trials=abc", "search.trials: got 'abc'; expected whole number"),
        ("search.trials=", "search.trials: got None; expected whole number"),
        ("search.trials.more=3", "search.trials.more: unknown key; did you mean 'trials'?"),
        ("search=3", "search: expected keys sampler"),
        ("fixed.epochs=[", "fixed.epochs: cannot read '[' as YAML; quote it"),
        ("fixed.epoch=3", "fixed.epoch: unknown key; did you mean 'epochs'"),
        ("parameters.lr.lwo=1.0", "parameters.lr.lwo: unknown key; did you mean 'low'"),
        ("parameters.lr.low=abc", "parameters.lr.low: got 'abc'; expected number"),
        ("constraints.0=lr < 1", "constraints.0: constraints has no keys of its own; write constraints=[...]"),
    ],
)
def test_a_wrong_assignment_is_told_like_a_wrong_file(toy: Load, assignment: str, message: str) -> None:
    assert message in refusal(toy, assignment)


def test_an_assignment_into_a_list_of_objectives(toy: Load) -> None:
    text = refusal(toy, "objective.metric=loss", objective=[{"metric": "score"}])
    assert text == "objective.metric: objective has no keys of its own in the file; write objective=..."


OTHER: dict[str, Any] = {
    "eat_gib": 2.0,
    "lr": 0.5,
    "width": 16,
    "epochs": 3,
    "seed": 4,
    "noise": 0.25,
    "epoch_s": 0.125,
    "fail": "nan",
    "fail_epoch": 5,
    "fail_once": True,
}


@pytest.mark.row("X3")
@pytest.mark.parametrize("name", configuration.fields(toy_workload.Config))
def test_every_value_can_be_set_and_its_misspelling_is_answered(toy: Load, name: str) -> None:
    spec = toy(
        parameters={"seed" if name == "lr" else "lr": {"choices": [1] if name == "lr" else [0.1]}},
        fixed={name: OTHER[name]},
    )
    values = spec_file.config_values(spec, {})
    assert values[name] == OTHER[name] != configuration.fields(toy_workload.Config)[name].default
    assert f"fixed.{name}x: unknown key; did you mean '{name}'" in refusal(toy, fixed={f"{name}x": 1})


def test_a_trial_gets_fixed_values_its_own_and_defaults(toy: Load) -> None:
    values = spec_file.config_values(toy(fixed={"epochs": 7}), {"lr": 0.25})
    assert (values["epochs"], values["lr"], values["width"]) == (7, 0.25, 32)
    with pytest.raises(configuration.ConfigError, match="lr: got -1"):
        spec_file.config_values(toy(), {"lr": -1.0})
