"""Searches whose trials start from a parent: refused before anything is written, pinned, scanned, and compared."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import configuration
import durable
import tune
from search import epochs, parent, planning, service, spec_file, study_spec
from search.errors import SearchError, SpecError, StudyError
from search.planning import Plan
from search.resources import Room
from search.spec import SearchSpec
from search.study import Outcome, Study
from search.trial import TrialRun
from tests import discs
from tests.search.conftest import Load, Open, order
from workloads import pairs

pytestmark = pytest.mark.usefixtures("own_cache")


RATIO = {"type": "float", "low": 0.0, "high": 0.7}
UNET = {"network.name": "unet", "network.widths": [4, 8]}
CHECKPOINT = "PARENT"
"""Stands for the parent's folder in the spaces below."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discs.write(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parent that keeps no early weights."""
    folder = tmp_path_factory.mktemp("parent") / "checkpoint"
    values = {**UNET, "data.root": str(root), "data.tile": 32, "data.classes": 2, "epochs": 1, "threads": 1}
    for epoch in pairs.train(configuration.build(pairs.Config, values)):
        epoch.save(folder)
    return folder


def content(root: Path, **sections: Any) -> dict[str, Any]:
    return {
        "workload": "pairs",
        "objective": [{"metric": "val_mean_dice_no_bg"}, {"metric": "gmacs"}],
        "parameters": {"prune.encoders.1": RATIO, "prune.bottleneck": RATIO},
        "data": {"root": str(root), "tile": 32, "classes": 2},
        "fixed": {**UNET, "epochs": 1, "threads": 1},
        "search": {"trials": 3, "sampler": "random"},
        "stopping": {"rule": "none"},
        "promotion": {"rule": "pareto", "k": 1},
        "resources": {"slots": 2},
        **sections,
    }


@pytest.fixture
def plan(toy: Load, root: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Return a function that plans a search, always in the same folder."""

    def planned(*assignments: str, **sections: Any) -> Plan:
        spec = toy(*assignments, name="cells", **content(root, **sections))
        (tmp_path / "runs" / "cells").mkdir(parents=True, exist_ok=True)
        return planning.make(spec, tmp_path / "runs" / "cells")

    return planned


def never(study: Study) -> None:
    raise AssertionError("a parent is trained that is there")


REWIND = {"prune.mode": {"choices": ["none", "rewind"]}, "prune.bottleneck": RATIO}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parent": {"checkpoint": "nowhere"}}, "cells.yaml: parent.checkpoint: nowhere: no such checkpoint folder"),
    ({"parent": {"study": "nowhere"}}, "cells.yaml: parent.study: nowhere/models/best: no such model; name the folder"),
    (
        {"parent": {"checkpoint": CHECKPOINT, "study": "other"}},
        "cells.yaml: parent.checkpoint: together with parent.study; there is one parent, keep one",
    ),
    ({"parent": {"train": {}}}, "cells.yaml: parent: names none; give checkpoint, study or train"),
    ({"parent": {"scan": False}}, "cells.yaml: parent: names none; give checkpoint, study or train"),
    ({"parent": {"train": {"epoch": 3}}}, "cells.yaml: parent.train.epoch: unknown key; did you mean 'epochs'"),
    (
        {"workload": "toy", "objective": {"metric": "score"}, "parameters": {"lr": {"choices": [0.1, 0.2]}}}
        | {"fixed": {}, "data": {}, "parent": {"train": {"epochs": 2}}},
        "cells.yaml: parent: toy starts from no parent, its Config has none; remove this section",
    ),
    (
        {"parent": {"checkpoint": CHECKPOINT}, "fixed": {"parent": "other"}},
        "cells.yaml: fixed.parent: given twice; the section parent says what trials start from, remove this",
    ),
    (
        {"parent": {"checkpoint": CHECKPOINT}, "parameters": {"parent": {"choices": ["a", "b"]}}},
        "cells.yaml: parameters.parent: given twice",
    ),
    (
        {"parent": {"checkpoint": CHECKPOINT}, "fixed": {**UNET, "network.widths": [4, 16]}},
        "another network: network.widths (4, 16) is (4, 8) there; leave network out, or give its values",
    ),
    (
        {"parent": {"train": {"network.widths": [4, 16]}}},
        "parameters: parent still to be trained: another network: network.widths (4, 8) is (4, 16) there",
    ),
    (
        {"parent": {"checkpoint": CHECKPOINT}, "parameters": {"prune.encoder.1": RATIO}},
        "parameters: encoder.1: no block of this network; did you mean 'encoders.1'",
    ),
    (
        # The network is the parent's, and the block is searched beside some values only.
        {"parent": {"checkpoint": CHECKPOINT}, "fixed": {}}
        | {
            "parameters": {
                "prune.mode": {"choices": ["none", "random"]},
                "prune.encoders.4": {**RATIO, "when": {"prune.mode": "random"}},
            }
        },
        "parameters.prune.encoders.4: 0.0 cannot be trained: encoders.4: no block of this network",
    ),
    (
        {"parent": {"checkpoint": CHECKPOINT}, "parameters": REWIND},
        "parameters.prune.mode: 'rewind' cannot be trained: PARENT: has no rewind.safetensors",
    ),
    (
        {"parent": {"train": {"epochs": 2}}, "parameters": REWIND},
        "parameters.prune.mode: 'rewind' cannot be trained: mode: rewind begins from an early epoch of the parent; "
        "set parent.train.rewind_epoch",
    ),
    (
        {"parameters": REWIND},
        "parameters.prune.mode: 'rewind' cannot be trained: mode: rewind begins from a parent's early weights; "
        "set parent, or write none or random",
    ),
]


@pytest.mark.row("P19", "P53", "P8")
@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_a_parent_is_told_in_one_line_and_leaves_nothing(
    root: Path,
    checkpoint: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    text = json.dumps(content(root, **sections)).replace(CHECKPOINT, str(checkpoint))
    (tmp_path / "cells.yaml").write_text(text)
    given = ["--space", str(tmp_path / "cells.yaml"), "--runs", str(tmp_path / "runs")]
    for more in ([], ["--dry-run"]):
        assert tune.main([*given, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("tune.py: ") and err.count("\n") == 1
        assert message.replace(CHECKPOINT, str(checkpoint)) in err
    assert not (tmp_path / "runs").exists()


def test_a_parent_of_another_workload_is_refused(plan: Callable[..., Plan], checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "other")
    meta = durable.read_json(checkpoint / "checkpoint.json")
    durable.write_json(tmp_path / "other" / "checkpoint.json", {**meta, "workload": "acdc"})
    with pytest.raises(SpecError, match=r"parent .*/other: of workload 'acdc'; expected 'pairs'"):
        plan(parent={"checkpoint": str(tmp_path / "other")})


@pytest.mark.row("P53")
@pytest.mark.parametrize("kind", ["checkpoint", "study"])
def test_a_parent_is_pinned_with_its_hash_and_outlives_its_source(
    plan: Callable[..., Plan], checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source / "models" / "7")
    (source / "models" / "best").symlink_to("7")
    named = source / "models" / "7" if kind == "checkpoint" else source
    sections = {"parent": {kind: str(named)}}
    first = parent.inherit(plan(**sections), never)
    pinned = first.paths.parent
    assert first.spec.fixed["parent"] == str(pinned.absolute())
    assert (
        first.spec.fixed["parent_sha256"] == durable.sealed(pinned) == durable.read_json(first.paths.pinned)["sha256"]
    )
    assert durable.read_json(first.paths.pinned)["source"] == str(source / "models" / "7")
    assert (pinned / "weights.safetensors").read_bytes() == (checkpoint / "weights.safetensors").read_bytes()
    assert not (pinned / "state.pt").exists(), "nobody goes on from it"
    shutil.rmtree(source)
    assert parent.inherit(plan(**sections), never).spec == first.spec

    # One byte; then another folder that is whole in itself; then none.
    weights = pinned / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StudyError, match=f"{pinned}: damaged since it was pinned; put it back, or start a study of"):
        plan(**sections)
    durable.seal(pinned)
    with pytest.raises(StudyError, match="damaged since it was pinned"):
        parent.inherit(first, never)
    shutil.rmtree(pinned)
    with pytest.raises(StudyError, match=f"{pinned}: gone; put it back, or start a study of its own with --study"):
        plan(**sections)


def test_a_pin_that_was_broken_off_is_made_anew(plan: Callable[..., Plan], checkpoint: Path) -> None:
    made = plan(parent={"checkpoint": str(checkpoint)})
    torn = made.paths.folder / ".parent-0123abcd"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    parent.inherit(made, never)
    assert sorted(path.name for path in made.paths.folder.iterdir()) == ["parent", "parent.json"]


def train(study: Study, stop_after: int | None = None) -> None:
    """Run a study's trials in this process, as a slot would; break off after some epochs."""
    while (task := study.ask()) is not None:
        trial = TrialRun(order(study, task))
        for count in range(1, task.config["epochs"] + 2):
            _, _, outcome = trial.step()
            if outcome is not None:
                study.tell(task.number, outcome)
                break
            if count == stop_after:
                raise KeyboardInterrupt
        trial.close()


def test_a_parent_is_trained_once_and_goes_on_after_a_kill(plan: Callable[..., Plan]) -> None:
    sections = {"parent": {"train": {"epochs": 3, "rewind_epoch": 1}}, "parameters": REWIND}
    sections["constraints"] = ["params <= 0.5 * parent"]
    sections["fixed"] = {**UNET, "epochs": 1, "threads": 1, "prune.encoders.1": 0.25}
    with pytest.raises(KeyboardInterrupt):
        parent.inherit(plan(**sections), lambda study: train(study, stop_after=1))
    made = parent.inherit(plan(**sections), train)
    folder = made.paths.folder / "parent_training" / "0"
    assert [row.attempt for row in epochs.read(folder)] == [1, 2, 2], "no epoch twice"
    config = durable.read_json(folder / "config.json")
    assert (config["epochs"], config["rewind_epoch"], config["parent"]) == (3, 1, None)
    assert not [name for name in config if name == "prune.encoders.1"], "a parent is trained whole"
    assert (made.paths.parent / "rewind.safetensors").is_file()
    shutil.rmtree(folder.parent)
    assert parent.inherit(plan(**sections), never).spec == made.spec


def test_what_runs_alone_gets_the_cpus_of_all_slots_that_one_machine_has(plan: Callable[..., Plan]) -> None:
    made = plan(parent={"train": {"epochs": 1}}, resources={"cpus_per_worker": 1}, fixed={**UNET, "epochs": 1})

    def cpus(slots: int, workers: int = 1, nodes: tuple[tuple[float, float], ...] = ()) -> float:
        resources = dataclasses.replace(made.spec.resources, workers=workers)
        spec = dataclasses.replace(made.spec, resources=resources)
        room = Room(cpus=8, gpus=0, where="here", nodes=nodes)
        return parent._alone(dataclasses.replace(made, spec=spec, slots=slots, room=room)).cpus_per_worker

    assert [cpus(1), cpus(2), cpus(20)] == [1, 2, 8]
    assert cpus(8, nodes=((4, 0), (4, 0))) == 4 and cpus(4, workers=2) == 1


def test_a_parent_whose_training_fails_says_why(plan: Callable[..., Plan]) -> None:
    def fail(study: Study) -> None:
        if task := study.ask():
            study.tell(task.number, Outcome(state="failed", reason="non-finite: loss is nan", epochs={}))

    made = plan(parent={"train": {"epochs": 1}})
    for _ in range(2):
        with pytest.raises(SearchError, match=r"not be trained: non-finite: loss is nan; mend parent\.train .*--study"):
            parent.inherit(made, fail)
    assert not made.paths.parent.exists()


def point(*values: float) -> dict[str, Any]:
    return {"points": [{"lr": value} for value in values]}


def test_the_points_of_a_scan_come_first_fit_the_space_and_may_be_stopped(toy: Load, open_study: Open) -> None:
    stepped = {"lr": {"type": "float", "low": 0.1, "high": 0.9, "step": 0.1}}
    spec = toy(parameters=stepped, search={"trials": 3, "sampler": "random"})
    study = open_study(spec)
    study.enqueue({"lr": 0.5}, "defaults")
    for _ in range(2):  # the second time, as after a kill, adds nothing
        parent.enqueue(study, spec, point(0.25, 0.77, 0.9))
    tasks = [study.ask() for _ in range(4)]
    assert [task.params["lr"] for task in tasks[:3] if task] == [0.5, 0.2, 0.8] and tasks[3] is None
    assert [record.note for record in study.records()] == ["defaults", "sensitivity 1", "sensitivity 2"]
    assert study._protected == {0}


def test_a_grid_has_its_own_points(toy: Load, open_study: Open) -> None:
    spec = toy(parameters={"lr": {"choices": [0.1, 0.2]}}, search={"trials": 2, "sampler": "grid"})
    study = open_study(spec)
    parent.enqueue(study, spec, point(0.1))
    parent.enqueue(study, dataclasses.replace(spec), None)
    assert study.records() == []


# With Ray: one search from its parent's training to the table, looked at from all sides.


def sections_of(root: Path) -> dict[str, Any]:
    return content(
        root,
        objective=[{"metric": "val_mean_dice_no_bg", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
        parent={"train": {"epochs": 3, "rewind_epoch": 1}},
        parameters={"prune.encoders.0": RATIO, "prune.encoders.1": RATIO, "prune.bottleneck": RATIO, **REWIND},
        constraints=["params <= 0.5 * parent"],
        fixed={**UNET, "epochs": 1, "threads": 1, "latency": True},
        resources={"slots": 1},
    )


@dataclasses.dataclass
class Searched:
    """A search that has ended."""

    spec: SearchSpec
    plan: Plan
    said: str

    def again(self) -> str:
        stream = io.StringIO()
        service.run(planning.make(self.spec, self.plan.paths.folder), stream)
        return stream.getvalue()

    def times(self) -> dict[str, int]:
        files = [
            file
            for name in ("trials", "parent", "parent_training", "scan", "evaluation")
            for file in (self.plan.paths.folder / name).rglob("*")
            if file.is_file()
        ]
        return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def searched(ray_cluster: None, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("search")
    (folder / "cells.yaml").write_text(json.dumps(sections_of(root)))
    spec = spec_file.load(str(folder / "cells.yaml"))
    plan = planning.make(spec, folder / "runs" / "cells")
    stream = io.StringIO()
    service.run(plan, stream)
    return Searched(spec, plan, stream.getvalue())


@pytest.mark.ray
@pytest.mark.row("P53", "P47", "P39", "P8")
def test_a_search_over_ratios_and_mode_ends_in_a_table_beside_the_parent(searched: Searched) -> None:
    paths = searched.plan.paths
    records = Study(paths, searched.spec).records()
    assert [record.state for record in records] == ["complete"] * 3
    whole = durable.read_json(paths.parent / "checkpoint.json")
    for record in records:
        assert record.metrics["params"] <= 0.5 * whole["constants"]["params"]
        assert {"val_mean_dice_no_bg", "val_mean_dice_no_bg_before", "latency_ms"} <= record.metrics.keys()
        config = durable.read_json(paths.trial(record.number) / "config.json")
        assert (config["parent"], config["parent_sha256"]) == (str(paths.parent), durable.seal_of(paths.parent))
    with paths.pareto.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["name"] == "parent" and float(rows[0]["params"]) == whole["constants"]["params"]
    assert rows[0]["mean_dice_no_bg_before"] == ""
    promoted = {str(item["trial"]) for item in durable.read_json(paths.promotion)["promoted"]}
    evaluated = {row["name"]: row for row in rows if row["test_mean_dice_no_bg"]}
    assert evaluated.keys() == {"parent", *promoted}
    for name in promoted:
        assert all(float(evaluated[name][column]) >= 0 for column in pairs.TABLE)
        assert evaluated[name]["test_mean_dice_no_bg_minus_parent_low"] != ""
        assert evaluated[name]["on_front"] == "True" and evaluated[name]["prune.mode"] in ("none", "rewind")
    page = paths.report.read_text()
    for heading in (*pairs.TABLE.values(), "val_mean_dice_no_bg"):
        assert f">{heading}</th>" in page
    assert "1 MAC is 2 FLOPs" in page
    assert ">parent<" in page and "<img alt=" in page


@pytest.mark.ray
@pytest.mark.row("P53")
def test_the_parent_is_scanned_once_and_its_table_is_in_the_report(searched: Searched) -> None:
    paths = searched.plan.paths
    found = durable.read_json(paths.scan)
    with (paths.scan.parent / "sensitivity.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"]) > 12
    assert {"prune.encoders.0", "prune.decoders.3"} <= {row["parameter"] for row in found["rows"]}
    assert f"is {found['score']:.4g}" in paths.report.read_text() and found["metric"] in paths.report.read_text()


@pytest.mark.ray
def test_a_second_run_trains_scans_and_evaluates_nothing(searched: Searched) -> None:
    before = searched.times()
    assert searched.again() == "cells: complete, all its trials have ended\n"
    assert searched.times() == before


@pytest.mark.ray
def test_another_parent_for_the_same_study_is_refused_by_the_frozen_spec(searched: Searched) -> None:
    for train in ({"epochs": 4, "rewind_epoch": 1}, {"epochs": 3, "rewind_epoch": 1, "lr": 0.1}):
        other = dataclasses.replace(
            searched.spec.parent, train=dataclasses.replace(searched.spec.parent.train, values=train)
        )
        plan = planning.make(dataclasses.replace(searched.spec, parent=other), searched.plan.paths.folder)
        with pytest.raises(StudyError, match=r"made by another search: parent\.train\.values\..* --study NAME"):
            service.run(plan, io.StringIO())


@pytest.mark.ray
def test_a_scan_that_fails_says_why_and_the_search_can_do_without(
    plan: Callable[..., Plan], checkpoint: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> dict[str, Any]:
        raise ValueError("the validation split is gone")

    monkeypatch.setattr(parent, "_scan", broken)
    made = plan("search.trials=1", parent={"checkpoint": str(checkpoint)})
    with pytest.raises(SearchError, match="scan of the parent failed: ValueError: the validation split is gone; the"):
        service.run(made, io.StringIO())
    assert made.paths.parent.is_dir() and not made.paths.scan.exists()
    without = plan(
        "parent.scan=false", parent={"checkpoint": str(checkpoint)}, search={"trials": 1, "sampler": "random"}
    )
    study_spec.write(without.paths, without.spec, without.config, without.manifest)
    assert parent.scan(parent.inherit(without, never), lambda: pytest.fail("nothing is to be scanned")) is None


@pytest.mark.ray
@pytest.mark.slow  # a gang has to come up
def test_two_ranks_train_a_pruned_network(plan: Callable[..., Plan], checkpoint: Path, ray_cluster: None) -> None:
    made = plan(
        parent={"checkpoint": str(checkpoint), "scan": False},
        parameters={"prune.bottleneck": {"choices": [0.5]}},
        fixed={**UNET, "epochs": 2, "threads": 1, "prune.encoders.1": 0.5},
        search={"trials": 1},
        resources={"workers": 2},
    )
    service.run(made, io.StringIO())
    (record,) = Study(made.paths, parent.inherit(made, never).spec).records()
    assert record.state == "complete", record.reason
    whole = durable.read_json(checkpoint / "checkpoint.json")["constants"]["params"]
    assert record.metrics["params"] < 0.6 * whole
