from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import study_spec
from search.errors import StudyError
from search.record import StudyPaths
from search.spec import SearchSpec

Load = Callable[..., SearchSpec]
MANIFEST = {"sha256": "abc", "samples": {"train": 3}}
CONFIG = {"lr": 1e-3, "epochs": 5, "size": (3, 4)}


def differences(toy: Load, *assignments: str, **sections: Any) -> list[str]:
    old, new = toy(), toy(*assignments, **sections)
    return study_spec.differences(
        study_spec.resolved(old, CONFIG, MANIFEST), study_spec.resolved(new, CONFIG, MANIFEST)
    )


def test_the_study_keeps_the_whole_question(toy: Load, tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    study_spec.write(paths, toy(parameters={"width": {"choices": [8, 16]}}), CONFIG, MANIFEST)
    kept = yaml.safe_load(paths.spec.read_text())
    assert kept["parameters"]["width"]["choices"] == [8, 16]
    assert kept["search"]["trials"] == 32 and kept["stopping"]["reduction"] == 3
    assert kept["config"] == {"lr": 1e-3, "epochs": 5, "size": [3, 4]}
    assert kept["data_sha256"] == "abc" and kept["manifest"] == MANIFEST
    assert {"python", "ray", "optuna"} <= set(kept["versions"])


@pytest.mark.parametrize(
    "assignment",
    [
        "search.trials=99",
        "search.wall_time_s=3.0",
        "search.slot_hours=3.0",
        "resources.slots=1",
        "resources.gpus_per_worker=0.5",
        "promotion.k=9",
        "evaluation.keep_checkpoints=9",
        "tracking.tensorboard=false",
    ],
)
def test_what_may_change_while_a_study_goes_on(toy: Load, tmp_path: Path, assignment: str) -> None:
    assert differences(toy, assignment) == []
    paths = StudyPaths(tmp_path)
    study_spec.write(paths, toy(), CONFIG, MANIFEST)
    before = yaml.safe_load(paths.spec.read_text())
    study_spec.write(paths, toy(assignment), CONFIG, MANIFEST)
    assert yaml.safe_load(paths.spec.read_text()) != before


@pytest.mark.parametrize(
    ("assignment", "difference"),
    [
        ("search.seed=9", "search.seed was 0, is now 9"),
        ("search.sampler=random", "search.sampler was 'auto', is now 'random'"),
        ("parameters.lr.low=1e-4", "parameters.lr.low was 1e-05, is now 0.0001"),
        ("stopping.reduction=4", "stopping.reduction was 3, is now 4"),
        ("fixed.epochs=9", "fixed.epochs was 'absent', is now 9"),
        ("constraints=[lr < 1]", "constraints was [], is now ['lr < 1']"),
    ],
)
def test_what_may_not_change_is_told_in_words(toy: Load, assignment: str, difference: str) -> None:
    assert differences(toy, assignment) == [difference]


def test_a_study_from_before_choices_had_probabilities_goes_on(toy: Load, tmp_path: Path) -> None:
    spec = toy(parameters={"width": {"choices": [8, 16]}}, search={"sampler": "random"})
    now = study_spec.resolved(spec, CONFIG, MANIFEST)
    before = {**now, "parameters": {"width": {k: v for k, v in now["parameters"]["width"].items() if k[0] != "p"}}}
    assert before != now and study_spec.differences(before, now) == []
    weighed = toy(
        parameters={"width": {"choices": [8, 16], "probabilities": [0.75, 0.25]}}, search={"sampler": "random"}
    )
    after = study_spec.resolved(weighed, CONFIG, MANIFEST)
    assert study_spec.differences(before, after) == ["parameters.width.probabilities was [], is now [0.75, 0.25]"]
    paths = StudyPaths(tmp_path)
    study_spec.write(paths, weighed, CONFIG, MANIFEST)
    assert study_spec.read(paths)[0].parameters == weighed.parameters


def test_more_workers_make_another_search() -> None:
    one, two = ({"resources": {"workers": count, "slots": count}} for count in (1, 2))
    assert study_spec.differences(one, two) == ["resources.workers was 1, is now 2"]


def test_another_objective_parameter_or_name_is_another_search(toy: Load) -> None:
    text = "; ".join(differences(toy, objective={"metric": "loss"}))
    assert "'metric': 'score'" in text and "'metric': 'loss'" in text
    removed = differences(toy, parameters={"lr": {"type": "float", "low": 1.0e-5, "high": 1.0, "log": True}})
    assert removed and all(
        line.startswith("parameters.width.") and line.endswith("is now 'absent'") for line in removed
    )
    assert differences(toy, name="other") == ["name was 'toy', is now 'other'"]


def test_other_data_or_another_default_is_another_search(toy: Load, tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    study_spec.write(paths, toy(), CONFIG, MANIFEST)
    with pytest.raises(StudyError, match="data_sha256 was 'abc', is now 'xyz'"):
        study_spec.write(paths, toy(), CONFIG, {**MANIFEST, "sha256": "xyz"})
    with pytest.raises(StudyError, match=r"config\.lr was 0.001, is now 0.1"):
        study_spec.write(paths, toy(), {**CONFIG, "lr": 0.1}, MANIFEST)


def test_many_differences_are_counted_and_the_old_spec_stays(toy: Load, tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "study")
    study_spec.write(paths, toy(), CONFIG, MANIFEST)
    before = paths.spec.read_bytes()
    changed = toy("search.seed=9", "fixed.noise=0.5", "fixed.epochs=9", "stopping.rule=median", "stopping.reduction=9")
    with pytest.raises(StudyError) as caught:
        study_spec.write(paths, changed, {**CONFIG, "lr": 0.5, "epochs": 9}, MANIFEST)
    text = str(caught.value)
    assert (
        text.startswith(f"{paths.folder}: made by another search: search.seed was 0, is now 9; ")
        and "; and 2 more; " in text
    )
    assert text.endswith("put the old values back, or give this search a folder of its own with --study NAME")
    assert paths.spec.read_bytes() == before


def test_a_study_made_before_a_key_came_or_went_is_the_same_search(toy: Load) -> None:
    new = study_spec.resolved(toy("fixed.epochs=9"), CONFIG, MANIFEST)
    old = {**new, "config": {"lr": 1e-3, "epochs": 5, "network.recompute": False}}
    old["fixed"] = {"epochs": 9, "network.recompute": True}
    del old["parent"]
    assert study_spec.differences(old, new) == []
    assert study_spec.differences({**old, "config": {**old["config"], "gone": 1}}, new) == [
        "config.gone was 1, is now 'absent'"
    ]
    asked = {**new, "parent": {**new["parent"], "checkpoint": "heart"}}
    assert study_spec.differences(old, asked) == ["parent.checkpoint was None, is now 'heart'"]
