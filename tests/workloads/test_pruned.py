"""Networks that begin from a parent, through the workload pairs: what they begin with, tell, and go on from."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import configuration
import durable
from segmentation import checkpoints, pruning
from segmentation.epoch import DataError
from segmentation.pruning import plan
from segmentation.pruning.plan import PlanError
from tests import discs
from workloads import _pruned, pairs

CUT = {"prune.encoders.1": 0.5, "prune.bottleneck": 0.5, "prune.recalibrate": 0}
SCORE = "val_mean_dice_no_bg"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SEGMENTATION_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the values of every training here."""
    root = discs.write(tmp_path_factory.mktemp("discs"))
    shape = {"network.name": "unet", "network.widths": [4, 8], "network.bottleneck": 16}
    own = {"data.root": str(root), "data.tile": 32, "data.classes": 2, "data.fractions": [0.5, 0.25, 0.25]}
    return {**shape, **own, "batch_size": 3, "lr": 0.02, "threads": 1}


@pytest.fixture(scope="module")
def parents(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Return a folder with the checkpoint of each of six epochs, the second to be rewound to, and their scores."""
    folder = tmp_path_factory.mktemp("parents")
    config = configuration.build(pairs.Config, {**data, "epochs": 6, "rewind_epoch": 2})
    scores = []
    for epoch in pairs.train(config):
        epoch.save(folder / str(epoch.number))
        scores.append(epoch.metrics[SCORE])
    return folder, scores


@pytest.fixture
def parent(parents: tuple[Path, list[float]]) -> Path:
    return parents[0] / "6"


def child(data: dict[str, Any], parent: Path | None, **values: Any) -> pairs.Config:
    given = {} if parent is None else {"parent": str(parent)}
    return configuration.build(pairs.Config, {**data, "epochs": 3, **given, **values})


def trained(config: pairs.Config, folder: Path) -> None:
    """Save the checkpoint of the last epoch."""
    for epoch in pairs.train(config):
        epoch.save(folder)


def begun(config: pairs.Config) -> dict[str, Tensor]:
    return pairs.parts(config).model.state_dict()


def sliced(parent: Path, weights: dict[str, Tensor], made: plan.Plan) -> dict[str, Tensor]:
    """Return weights of the parent's network, cut by a plan."""
    _, model, _ = pairs.load(parent)
    checkpoints.fill(model, weights, source="test")
    return pruning.apply(model, pruning.trace(model, 1), made).state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def made(data: dict[str, Any], parent: Path, tmp_path: Path) -> Path:
    """Return the plan that a training in mode none leaves beside its weights."""
    trained(child(data, parent, **CUT), tmp_path / "none")
    return tmp_path / "none" / plan.FILE


@pytest.mark.row("P17", "P8")
def test_mode_none_begins_with_the_weights_of_the_filters_that_stay(
    data: dict[str, Any], parent: Path, made: Path
) -> None:
    found, weights = begun(child(data, parent, **CUT)), checkpoints.load_tensors(parent)
    assert same(found, sliced(parent, weights, plan.read(made)))
    # By hand: half of the eight filters, the strongest by L1 norm, of the layer that decides for its block.
    deciding = weights["encoders.1.net.3.weight"]
    kept = deciding.abs().sum((1, 2, 3)).argsort(stable=True)[4:].sort().values
    assert plan.read(made).kept["encoders.1.net.3"] == tuple(kept.tolist())
    assert torch.equal(found["encoders.1.net.3.weight"], deciding[kept][:, kept])


@pytest.mark.row("P18")
def test_mode_random_begins_with_fresh_weights_of_the_same_shapes_by_the_seed(
    data: dict[str, Any], parent: Path, tmp_path: Path
) -> None:
    kept, drawn = (begun(child(data, parent, **CUT, **{"prune.mode": mode})) for mode in ("none", "random"))
    assert {name: value.shape for name, value in drawn.items()} == {name: value.shape for name, value in kept.items()}
    convolutions = [name for name in kept if name.endswith("weight") and kept[name].ndim == 4]
    assert not any(torch.equal(drawn[name], kept[name]) for name in convolutions)
    config = child(data, parent, **CUT, **{"prune.mode": "random"})
    assert same(begun(config), drawn) and not same(begun(dataclasses.replace(config, seed=1)), drawn)
    trained(config, tmp_path / "random")
    told = checkpoints.read_meta(tmp_path / "random")["pruned"]["drawn"]
    for name in convolutions:
        layer = told[name.removesuffix(".weight")]
        for moment, weights in (("before", kept[name]), ("after", drawn[name])):
            assert layer[moment] == pytest.approx([weights.mean().item(), weights.std(correction=0).item()], abs=1e-7)


@pytest.mark.row("P19")
def test_mode_rewind_cuts_early_weights_by_the_plan_of_the_trained_ones(
    data: dict[str, Any], parents: tuple[Path, list[float]], parent: Path, made: Path, tmp_path: Path
) -> None:
    config = child(data, parent, **CUT, **{"prune.mode": "rewind"})
    early = checkpoints.load_tensors(parents[0] / "2")
    found = begun(config)
    assert same(found, sliced(parent, early, plan.read(made)))
    assert not same(found, begun(child(data, parent, **CUT)))
    trained(config, tmp_path / "rewind")
    assert plan.read(tmp_path / "rewind" / plan.FILE) == plan.read(made)


@pytest.mark.row("P19")
def test_a_parent_from_before_its_rewind_epoch_is_rewound_to_itself(
    data: dict[str, Any], parents: tuple[Path, list[float]]
) -> None:
    """The best epoch may come first; what it would be rewound to is still to come then."""
    early = parents[0] / "1"
    pairs.prepare(child(data, early, **CUT, **{"prune.mode": "rewind"}))
    rewound, kept = (begun(child(data, early, **CUT, **{"prune.mode": mode})) for mode in ("rewind", "none"))
    assert same(rewound, kept)


@pytest.mark.row("P19")
def test_without_early_weights_nothing_begins(data: dict[str, Any], parent: Path, tmp_path: Path) -> None:
    trained(child(data, None, epochs=1), tmp_path / "bare")
    config = child(data, tmp_path / "bare", **CUT, **{"prune.mode": "rewind"})
    for begin in (pairs.prepare, pairs.check, pairs.parts):
        with pytest.raises(DataError, match=rf"{tmp_path}/bare: has no rewind.safetensors.*rewind_epoch=1 or more"):
            begin(config)
    alone = child(data, None, **CUT, **{"prune.mode": "rewind"})
    for begin in (pairs.check, pairs.parts):
        with pytest.raises(PlanError, match="rewind begins from a parent's early weights; set parent, or write none"):
            begin(alone)


def test_what_a_parent_that_is_still_to_be_trained_will_lack_is_known_before(data: dict[str, Any]) -> None:
    config = child(data, None, **CUT, **{"prune.mode": "rewind"})
    with pytest.raises(DataError, match=r"set parent\.train\.rewind_epoch"):
        pairs.check(config, child(data, None))
    pairs.check(config, child(data, None, rewind_epoch=1))
    with pytest.raises(DataError, match=r"another network: network.widths \(4, 8\) is \(4, 8, 16\) there; leave"):
        pairs.check(config, child(data, None, rewind_epoch=1, **{"network.widths": [4, 8, 16]}))


@pytest.mark.row("P47")
def test_one_record_tells_scores_before_and_after_training(
    data: dict[str, Any],
    parents: tuple[Path, list[float]],
    parent: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    config = child(data, tmp_path / "parent", **CUT, latency=True)
    epochs = []
    for epoch in pairs.train(config):
        epochs.append(epoch.metrics)
        epoch.save(tmp_path / "child")
    assert epoch.metrics.keys() == pairs.metrics(config).keys()
    constant = ("params", "gmacs", "latency_ms", f"{SCORE}_before", "val_mean_dice_before")
    assert all(metrics[name] == epochs[0][name] > 0 for metrics in epochs for name in constant)
    assert len({metrics[SCORE] for metrics in epochs}) > 1
    found = pairs.evaluate(tmp_path / "child", "test", tmp_path / "evaluation").metrics
    _, model, _ = pairs.load(tmp_path / "child")
    _, whole, _ = pairs.load(parent)
    assert found["params"] == epochs[0]["params"] == sum(p.numel() for p in model.parameters())
    assert found["parent_params"] == sum(p.numel() for p in whole.parameters()) > found["params"]
    assert found["gmacs"] < found["parent_gmacs"] and found["latency_ms"] > 0
    assert set(pairs.TABLE) <= found.keys()
    assert found["mean_dice_no_bg"] > found["mean_dice_no_bg_before"], "it has learned since"
    # Nothing cut and not trained yet is the parent itself, to the last bit.
    untouched = next(pairs.train(child(data, parent, epochs=1))).metrics
    assert untouched[f"{SCORE}_before"] == parents[1][-1]
    # Without the parent an evaluation tells what it can.
    shutil.rmtree(tmp_path / "parent")
    own, model, normaliser = pairs.load(tmp_path / "child")
    samples, made = pairs.samples(own)
    job = pairs._job(own, samples, made, normaliser)
    with caplog.at_level(logging.WARNING):
        left = _pruned.evaluated(tmp_path / "child", own, model, job, "validation")
    assert left["params"] == found["params"] and not [name for name in left if name.endswith("_before")]
    assert "no scores from before training, since its parent is gone" in caplog.text


@pytest.mark.row("X10")
@pytest.mark.parametrize("mode", ["none", "random", "rewind"])
def test_a_pruned_training_goes_on_as_if_unbroken_though_its_parent_is_gone(
    data: dict[str, Any], parent: Path, tmp_path: Path, cache: Path, mode: str
) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    # Without a network of its own: it is the parent's, and has to be known when that is gone.
    own = {name: value for name, value in data.items() if not name.startswith("network.")}
    config = child(own, tmp_path / "parent", **{**CUT, "prune.mode": mode, "prune.recalibrate": 2})
    unbroken = []
    for epoch in pairs.train(config):
        unbroken.append(epoch.metrics)
        epoch.save(tmp_path / str(epoch.number))
    shutil.rmtree(tmp_path / "parent")
    shutil.rmtree(cache / "copies")
    _pruned._read.cache_clear()
    resumed = []
    for epoch in pairs.train(config, tmp_path / "1"):
        resumed.append(epoch.metrics)
        epoch.save(tmp_path / "resumed")
    assert resumed == unbroken[1:]
    assert same(checkpoints.load_tensors(tmp_path / "resumed"), checkpoints.load_tensors(tmp_path / "3"))
    assert plan.read(tmp_path / "resumed" / plan.FILE) == plan.read(tmp_path / "1" / plan.FILE)
    with pytest.raises(DataError, match="no such checkpoint folder"):
        next(pairs.train(config))


def test_a_parent_is_read_once_in_a_process_and_copied_once_on_a_machine(
    data: dict[str, Any], parent: Path, cache: Path
) -> None:
    _pruned._read.cache_clear()
    shutil.rmtree(cache / "copies", ignore_errors=True)
    for ratio in (0.25, 0.5):
        begun(child(data, parent, **{"prune.bottleneck": ratio}))
    assert _pruned._read.cache_info().misses == 1
    (copied,) = (cache / "copies").glob("*/weights.safetensors")
    written = copied.stat().st_mtime_ns
    _pruned._read.cache_clear()  # as another process would
    begun(child(data, parent, **CUT))
    assert copied.stat().st_mtime_ns == written and _pruned._read.cache_info().misses == 1


def test_a_damaged_parent_is_refused_and_no_copy_of_it_stays(
    data: dict[str, Any], parent: Path, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    weights = tmp_path / "parent" / checkpoints.WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(cache / "copies", ignore_errors=True)
    _pruned._read.cache_clear()
    with pytest.raises(DataError, match=r"/parent: its weights are not those that checkpoint\.json describes"):
        pairs.prepare(child(data, tmp_path / "parent"))
    weights.write_bytes(whole)
    pairs.prepare(child(data, tmp_path / "parent"))


def test_a_parent_of_another_kind_is_refused(data: dict[str, Any], parent: Path, tmp_path: Path) -> None:
    shutil.copytree(parent, tmp_path / "other")
    meta = durable.read_json(parent / checkpoints.META_FILE)
    foreign = {**meta, "workload": "telescope", "config": {"network.nodes": 3}}
    durable.write_json(tmp_path / "other" / checkpoints.META_FILE, foreign)
    cases: list[tuple[pairs.Config, str]] = [
        (child(data, tmp_path / "nowhere"), "nowhere: no such checkpoint folder"),
        (child(data, tmp_path / "other"), "of workload 'telescope'; expected 'pairs'"),
        (child({**data, "network.widths": [4, 16]}, parent), r"widths \(4, 16\) is \(4, 8\) there; leave network out"),
        (child(data, parent, parent_sha256="0" * 64), "not the checkpoint that was asked for, whose hash begins 0000"),
    ]
    for config, message in cases:
        with pytest.raises(DataError, match=message):
            pairs.prepare(config)


@pytest.mark.row("X7")
def test_a_parent_that_learned_from_the_test_split_of_today_is_refused(data: dict[str, Any], parent: Path) -> None:
    with pytest.raises(DataError, match="samples of the test split were used in training"):
        pairs.prepare(child({**data, "data.fractions": [0.25, 0.25, 0.5]}, parent))


@pytest.mark.row("P8")
def test_an_unknown_block_is_refused_with_the_nearest(data: dict[str, Any], parent: Path) -> None:
    for source in (parent, None):
        with pytest.raises(PlanError, match=r"encoder.1: no block of this network; did you mean 'encoders.1'"):
            pairs.check(child(data, source, **{"prune.encoder.1": 0.0}))


@pytest.mark.row("P11")
def test_a_plan_in_a_file_is_applied_to_its_own_network_only(
    data: dict[str, Any], parent: Path, made: Path, tmp_path: Path
) -> None:
    config = child(data, parent, **{"prune.plan": str(made), "prune.recalibrate": 0})
    assert same(begun(config), begun(child(data, parent, **CUT)))
    assert pairs.facts(config) == pairs.facts(child(data, parent, **CUT))
    other = child({**data, "network.widths": [4, 8, 8]}, None, **{"prune.plan": str(made)})
    with pytest.raises(PlanError, match="a plan of another network: "):
        pairs.prepare(other)
    with pytest.raises(PlanError, match="no such plan; a pruned checkpoint folder has one"):
        pairs.prepare(child(data, parent, **{"prune.plan": str(tmp_path / "none.json")}))


def test_a_parent_that_is_pruned_itself_is_pruned_further(data: dict[str, Any], parent: Path, tmp_path: Path) -> None:
    trained(child(data, parent, **CUT, epochs=1), tmp_path / "once")
    further = child(data, tmp_path / "once", **{"prune.encoders.1": 0.5}, epochs=1)
    trained(further, tmp_path / "twice")
    _, model, _ = pairs.load(tmp_path / "twice")
    assert model.get_submodule("encoders.1.net.3").weight.shape[:2] == (2, 2)
    told = pairs.facts(further)
    assert told["params"] == sum(p.numel() for p in model.parameters())
    assert told["parent.params"] == checkpoints.read_meta(tmp_path / "once")["constants"]["params"]
