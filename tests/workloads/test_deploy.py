"""A checkpoint of any workload that has a network becomes files that say what the workload's own `predict` says."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import configuration
import workloads
from segmentation import nifti
from segmentation.deployment import PACKAGES, DeploymentError
from segmentation.deployment import onnx as deployed
from segmentation.deployment.onnx import Onnx
from workloads import __main__ as command
from workloads import _deploy
from workloads._spark.classes import paint

pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("sigterm_as_before")
DONE, BAD_INPUT = 0, 2
QUICK = ("acdc", "pairs", "telescope")
NAMES = [name for name in workloads.names() if all(hasattr(workloads.load(name), hook) for hook in _deploy.HOOKS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what trains a workload at debug size, once each, and returns its checkpoint."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("trained")

    def checkpoint(name):
        if name not in made:
            module = workloads.load(name)
            more = {"epochs": 5, "batch_size": 4} if name == "acdc" else {}  # else all is background
            config = configuration.replace(module.Config.debug(), {"epochs": 1, "device": "cpu", **more})
            module.prepare(config)
            for epoch in module.train(config):
                epoch.save(folder / name)
            made[name] = folder / name
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGMENTATION_CACHE", str(folder / "cache"))
        yield checkpoint


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """Return what exports a workload's checkpoint, once each, and returns the folder."""
    made: dict[str, Path] = {}

    def export(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"export-{name}")
            words = ["export", name, str(trained(name)), "--out", str(made[name])]
            assert command.main([*words, *["--int8", "--qat", "2"] * (name == "pairs")]) == DONE
        return made[name]

    return export


def test_the_workloads_with_a_network_are_found():
    assert {"acdc", "pairs", "spark", "telescope"} <= set(NAMES) and "toy" not in NAMES


@pytest.mark.row("P45")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_each_workload_is_exported_with_what_its_user_has_to_know(name, trained, exported):
    ready = _deploy.ready(name, workloads.load(name), trained(name), {})
    runner = Onnx(exported(name) / "model.onnx")
    assert runner.description == ready.description
    assert runner.description.checkpoint_sha256 == deployed.checkpoints.digest(trained(name))
    assert runner.record["size"] is None and runner.record["largest_difference"] < 1e-4
    # Samples are stretched already.
    runner.description = dataclasses.replace(runner.description, percentiles=())
    index = ready.made.train[0]
    raw = ready.samples.image(index).copy()
    with torch.inference_mode():
        logits = ready.model(ready.normaliser(torch.from_numpy(raw)[None]))[0]
    expected = logits.sigmoid() if ready.multilabel else logits.softmax(0)
    assert np.abs(runner.probabilities(raw) - expected.numpy()).max() < 1e-4
    assert len(runner.description.classes) == len(expected)


@pytest.mark.row("P45")
def test_pairs_predicts_the_same_mask(trained, exported, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (90, 130), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    written = workloads.load("pairs").predict(trained("pairs"), tmp_path / "a.png", tmp_path / "out")
    (mask,) = [np.asarray(Image.open(path)) for path in written if path.name == "a_mask.png"]
    assert (Onnx(exported("pairs") / "model.onnx").classes(picture[None]) == mask).mean() > 0.999


@pytest.mark.row("P45")
def test_telescope_predicts_the_same_probabilities(trained, exported, tmp_path):
    picture = np.random.default_rng(0).integers(0, 60_000, (70, 90)).astype(np.uint16)
    Image.fromarray(picture).save(tmp_path / "a.png")
    written = workloads.load("telescope").predict(trained("telescope"), tmp_path / "a.png", tmp_path / "out")
    (path,) = [path for path in written if path.name == "a_prob.npy"]
    runner = Onnx(exported("telescope") / "model.onnx")
    seen = workloads.load("telescope").reader.read_grey(tmp_path / "a.png")[None]
    assert np.abs(runner.probabilities(seen) - np.load(path)).max() < 1e-4


@pytest.mark.row("P45")
@pytest.mark.slow
def test_spark_predicts_the_same_layers(trained, exported, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a_img.png")
    workloads.load("spark").predict(trained("spark"), tmp_path / "a_img.png", tmp_path / "out")
    layer = np.load(tmp_path / "out" / "a_layer.npz")["data"]
    classes = Onnx(exported("spark") / "model.onnx").classes(picture.transpose(2, 0, 1))
    assert ((paint(classes) > 127) == layer).mean() > 0.999


@pytest.mark.row("P45")
@pytest.mark.parametrize("flips", [False, True])
def test_acdc_predicts_the_same_slices(trained, exported, tmp_path, flips):
    """Of stored values of any type and size, which both clip and stretch before they resize."""
    acdc = workloads.load("acdc")
    config, _, _ = acdc.load(trained("acdc"))
    path = acdc.dataset.root(config.data) / "patient002" / "patient002_frame01.nii.gz"
    acdc.predict(trained("acdc"), path, tmp_path / "out", {"flips": flips})
    mask, _ = nifti.read(tmp_path / "out" / "patient002_frame01_mask.nii.gz")
    stored, _ = nifti.read(path)
    runner = Onnx(exported("acdc") / "model.onnx")
    assert (runner.description.percentiles, runner.description.resize) == ((1.0, 99.0), 64)
    runner.description = dataclasses.replace(runner.description, flips=flips)
    assert stored.dtype == np.int16 and stored.shape[:2] == (64, 56)
    found = np.stack([runner.classes(stored[None, ..., z]) for z in range(stored.shape[2])], axis=-1)
    assert (found == mask).mean() > 0.999
    assert len(np.unique(mask)) > 1
    with pytest.raises(DeploymentError, match=r"image is bool \(1, 64, 56\); expected numbers \(1, H, W\), as stored"):
        runner.classes(stored[None, ..., 0] > 0)


@pytest.mark.row("P43", "P45")
def test_a_network_of_volumes_is_not_exported_but_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    acdc = workloads.load("acdc")
    values = {"network.dims": 3, "data.patch_slices": 3, "data.size": 32, "epochs": 1, "device": "cpu"}
    for epoch in acdc.train(configuration.replace(acdc.Config.debug(), values)):
        epoch.save(tmp_path / "deep")
    assert command.main(["export", "acdc", str(tmp_path / "deep"), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert (
        "deep: a network of volumes (network.dims 3); export takes networks of images only" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    costs = [_deploy.cost("acdc", acdc, tmp_path / "deep", {}, size=size, threads=1)[0] for size in (None, 16)]
    assert [(cost.height, cost.width) for cost in costs] == [(3 * 32, 32), (3 * 16, 16)]
    assert costs[0].macs == 4 * costs[1].macs


@pytest.mark.row("P44")
def test_export_writes_int8_aware_training_and_the_table(exported):
    folder = exported("pairs")
    names = {"model", "model_int8", "model_int8_qat"}
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}{suffix}" for name in names for suffix in (".onnx", ".json")),
        *("quantisation.csv", "quantisation.md"),
    }
    rows = list(csv.DictReader((folder / "quantisation.csv").read_text().splitlines()))
    assert [row["precision"] for row in rows] == ["fp32", "int8", "int8 QAT"]
    assert all(0 <= float(row["dice"]) <= 1 and float(row["p50_ms"]) > 0 for row in rows)
    assert "on the test split" in (folder / "quantisation.md").read_text()
    assert json.loads((folder / "model_int8.json").read_text())["calibration"]["images"] == 44


@pytest.mark.row("P44")
def test_int8_is_scored_as_the_workload_scores(trained, exported, tmp_path):
    evaluation = workloads.load("pairs").evaluate(trained("pairs"), "test", tmp_path)
    first = next(csv.DictReader((exported("pairs") / "quantisation.csv").read_text().splitlines()))
    assert float(first["dice"]) == pytest.approx(evaluation.metrics["mean_dice_no_bg"], abs=1e-3)
    assert float(first["dice_with_background"]) == pytest.approx(evaluation.metrics["mean_dice"], abs=1e-3)


@pytest.mark.row("P41")
def test_cost_prints_a_table_and_keeps_the_conventions(trained, tmp_path, capsys):
    words = ["cost", "telescope", str(trained("telescope")), "--out", str(tmp_path), "--size", "32", "--threads", "1"]
    assert command.main(words) == DONE
    told = capsys.readouterr().out
    (found, *_) = json.loads((tmp_path / "cost.json").read_text())["costs"]
    assert f"parameters    {found['parameters']:,}\n" in told and "latency p95" in told and "cpu, 1 thread," in told
    assert (found["channels"], found["height"], found["width"], found["device"]) == (1, 32, 32, "cpu")
    assert found["conventions"].keys() == {"parameters", "macs", "latency", "peak_mib"}


@pytest.mark.parametrize("word", ["export", "cost"])
def test_a_workload_without_a_network_says_so(word, tmp_path, capsys):
    assert command.main(["train", "toy", "--out", str(tmp_path / "toy")]) == DONE
    assert command.main([word, "toy", str(tmp_path / "toy"), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert "workload 'toy' has no network to deploy: it lacks load and samples" in capsys.readouterr().err


@pytest.mark.row("P45")
def test_an_engine_without_tensorrt_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    words = ["export", "pairs", str(trained("pairs")), "--out", str(tmp_path / "out"), "--tensorrt"]
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorrt" else known(name, *more)
    )
    assert command.main(words) == BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "TensorRT" in line]
    assert line == f"python -m workloads: {NO_TENSORRT}"
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_one_sentence(trained, tmp_path, monkeypatch, capsys):
    words = ["export", "pairs", str(trained("pairs")), "--out", str(tmp_path / "out")]
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in PACKAGES else known(name, *more)
    )
    assert command.main(words) == BAD_INPUT
    assert f"{', '.join(PACKAGES)} not installed; pip install 'segmentation-search[onnx]'" in capsys.readouterr().err


NO_TENSORRT = "TensorRT is not installed; pip install tensorrt on the machine whose GPU will run it"
