"""An ONNX file says what its network says at every size, and its runner what the stored picture calls for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from segmentation import prediction
from segmentation.deployment import DeploymentError
from segmentation.deployment import onnx as deployed
from segmentation.deployment.onnx import Description, Onnx, Session
from segmentation.networks import NETWORKS, Network, build
from segmentation.normalisation import Normaliser

onnx = pytest.importorskip("onnx")
ROW = pytest.mark.row("P45")
DESCRIPTION = Description(
    workload="pairs",
    classes=("background", "nucleus"),
    in_channels=1,
    normaliser=Normaliser(method="standard", mean=(100.0,), std=(50.0,)),
    colours=((0, 0, 0), (255, 0, 0)),
    checkpoint_sha256="ab" * 32,
)
SHAPES = ((1, 1, 64, 64), (2, 1, 64, 96), (3, 1, 37, 91), (1, 1, 200, 33), (2, 1, 5, 7))
CASES = [
    pytest.param(Network(name=name, base=4, depth=3), id=name)
    if name == "unet"
    else pytest.param(
        Network(name=name, base=4, encoder="resnet10t", cat_channels=4, guided=name == "unet3plus"),
        id=name,
        marks=pytest.mark.slow,
    )
    for name in NETWORKS
]
CASES += [
    pytest.param(
        Network(name="unet3plus", encoder="convnext_atto", cat_channels=4), id="convnext", marks=pytest.mark.slow
    )
]


def trained_like(network):
    """Return a network whose batch norm has seen something."""
    torch.manual_seed(0)
    model = build(network, 1, 2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a small network and the file that was made of it."""
    model, path = trained_like(Network(base=4, depth=2)), tmp_path_factory.mktemp("onnx") / "model.onnx"
    deployed.export(model, path, DESCRIPTION, height=64, width=64)
    return model, path


@ROW
@pytest.mark.parametrize("network", CASES)
def test_logits_are_those_of_the_network_for_any_batch_height_and_width(network, tmp_path):
    model, path = trained_like(network), tmp_path / "model.onnx"
    record = deployed.export(model, path, DESCRIPTION, height=64, width=64)
    onnx.checker.check_model(str(path), full_check=True)
    (given,) = onnx.load(path).graph.input
    assert [each.dim_param or each.dim_value for each in given.type.tensor_type.shape.dim] == [
        "batch",
        1,
        "height",
        "width",
    ]
    assert record["size"] is None
    assert deployed.parity(model, Session(path), SHAPES) < 1e-4
    with torch.inference_mode():
        image = torch.randn(3, 1, 37, 91)
        assert (model(image) - Session(path)(image)).abs().max() < 1e-4 * max(1, float(model(image).abs().max()))


@ROW
@pytest.mark.slow
def test_a_network_of_one_size_is_exported_for_that_size(tmp_path):
    model, path = trained_like(Network(name="timm_unet", encoder="vit_tiny_patch16_224")), tmp_path / "model.onnx"
    assert deployed.export(model, path, DESCRIPTION, height=224, width=224)["size"] == [224, 224]
    assert deployed.parity(model, Session(path), [(3, 1, 224, 224)]) < 1e-4
    with pytest.raises(DeploymentError, match=r"uint8 \(1, 64, 64\); this network takes no other .* \[224, 224\]"):
        Onnx(path).probabilities(np.zeros((1, 64, 64), np.uint8))


@ROW
def test_what_the_user_has_to_know_is_beside_the_file_and_in_it(exported):
    _, path = exported
    beside = json.loads(path.with_suffix(".json").read_text())
    (held,) = [each for each in onnx.load(path).metadata_props if each.key == deployed.KEY]
    assert {**json.loads(held.value), "sha256": beside["sha256"]} == beside
    assert Description.from_dict(beside) == DESCRIPTION
    assert beside["versions"].keys() >= {"torch", "onnx", "onnxruntime"}
    assert (beside["precision"], beside["value_range"], beside["activation"]) == ("fp32", [0, 255], "softmax")


def test_nothing_of_the_machine_that_exported_is_in_the_file(exported):
    _, path = exported
    assert b"site-packages" not in path.read_bytes() and b".py" not in path.read_bytes()


@ROW
@pytest.mark.parametrize("changes", [{}, {"tile": 24}, {"flips": True}, {"activation": "sigmoid"}], ids=str)
def test_the_runner_scales_tiles_and_activates(exported, changes):
    model, path = exported
    told, image = (
        dataclasses.replace(DESCRIPTION, **changes),
        np.random.default_rng(0).integers(0, 256, (1, 40, 52), np.uint8),
    )
    runner = Onnx(path)
    runner.description = told
    seen, multilabel = (torch.from_numpy(image).float() - 100) / 50, told.activation == "sigmoid"
    expected = prediction.predict_tiles(
        model, seen, tile=told.tile or 52, multilabel=multilabel, overlap=told.overlap, flips=told.flips
    )
    found = runner.probabilities(image)
    assert found.shape == (2, 40, 52) and np.abs(found - expected.numpy()).max() < 1e-5
    called = expected > 0.5 if multilabel else expected.argmax(0)
    assert (runner.classes(image) == called.numpy()).mean() > 0.999


@ROW
def test_the_runner_resizes_and_brings_back(exported):
    model, path = exported
    runner = Onnx(path)
    runner.description = dataclasses.replace(DESCRIPTION, resize=32)
    flat = np.full((1, 40, 52), 77, np.uint8)
    with torch.inference_mode():
        expected = model(torch.full((1, 1, 32, 32), (77 - 100) / 50)).softmax(1)[0, :, 16, 16].numpy()
    found = runner.probabilities(flat)
    assert found.shape == (2, 40, 52)
    assert np.abs(found[:, 20, 26] - expected).max() < 0.02


@pytest.mark.parametrize(
    "image", [np.zeros((1, 8, 8), np.uint16), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8)], ids=str
)
def test_another_kind_of_image_is_refused(exported, image):
    with pytest.raises(DeploymentError, match=r"expected uint8 \(1, H, W\), as stored"):
        Onnx(exported[1]).probabilities(image)


def test_files_that_do_not_belong_together_are_refused(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported[1].read_bytes())
    assert deployed.read(path)["workload"] == "pairs", "the file alone tells all"
    beside = json.loads(exported[1].with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**beside, "sha256": "0" * 64}))
    with pytest.raises(DeploymentError, match=r"model.json: is of another file than model.onnx"):
        Onnx(path)
    with pytest.raises(DeploymentError, match="no such file"):
        Onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(DeploymentError, match=r"text.onnx: not an ONNX file"):
        Onnx(tmp_path / "text.onnx")
    bare = onnx.load(exported[1])
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(DeploymentError, match="tells neither classes nor scaling"):
        Onnx(tmp_path / "bare.onnx")


def test_a_graph_that_says_something_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        deployed.Session, "forward", lambda self, image: torch.full((len(image), 2, *image.shape[2:]), 9.0)
    )
    with pytest.raises(DeploymentError, match=r"logits of onnxruntime and PyTorch differ by"):
        deployed.export(nn.Conv2d(1, 2, 1), tmp_path / "m.onnx", DESCRIPTION, height=64, width=64)
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_package_is_answered_with_the_extra(monkeypatch, tmp_path):
    import segmentation.deployment as deployment

    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(DeploymentError, match=r"onnxscript not installed; pip install 'segmentation-search\[onnx\]'"):
        deployed.export(nn.Conv2d(1, 2, 1), tmp_path / "m.onnx", DESCRIPTION, height=8, width=8)
