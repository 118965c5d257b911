"""An engine is built as TensorRT wants it, or one sentence says why not; a recording stands for TensorRT."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from segmentation.deployment import DeploymentError, quantise, tensorrt
from segmentation.deployment import onnx as deployed
from segmentation.deployment.onnx import Description, Session
from segmentation.deployment.tensorrt import Shapes
from segmentation.networks.unet import UNet
from segmentation.normalisation import Normaliser

onnx = pytest.importorskip("onnx")
ROW = pytest.mark.row("P45")
SHAPES = Shapes.around(64, 96, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return an exported file, an int8 one, and one whose activations are symmetric."""
    folder = tmp_path_factory.mktemp("engine")
    told = Description(workload="pairs", classes=("a", "b"), in_channels=1, normaliser=Normaliser())
    model = UNet(1, 2, (4,), 8).eval()
    deployed.export(model, folder / "model.onnx", told, height=64, width=96)
    images = [torch.randn(2, 1, 32, 32)]
    quantise.quantise(folder / "model.onnx", folder / "int8.onnx", images)
    quantise.quantise(folder / "model.onnx", folder / "symmetric.onnx", images, symmetric=True)
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Put a recording in TensorRT's place, on a machine with a GPU."""
    known = importlib.util.find_spec
    fake = MagicMock(__version__="11.4.0", NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    fake.Builder.return_value.build_serialized_network.return_value = b"engine"
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "tensorrt" or known(name, *more))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    return fake


@ROW
def test_what_is_missing_is_said_in_one_sentence(monkeypatch, files, tmp_path):
    known, there = importlib.util.find_spec, []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: there if name == "tensorrt" else known(name, *more)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeploymentError, match=r"built on the GPU that will run it, and PyTorch finds none here$"):
        tensorrt.build(files / "model.onnx", tmp_path / "e.engine", precision="fp16", shapes=SHAPES)
    there = None
    with pytest.raises(DeploymentError, match=r"^TensorRT is not installed; pip install tensorrt on the machine"):
        tensorrt.check()
    assert list(tmp_path.iterdir()) == []


@ROW
def test_an_engine_takes_every_size_between_the_least_and_the_most(recorded, files, tmp_path):
    told = tensorrt.build(files / "model.onnx", tmp_path / "e.engine", precision="fp32", shapes=SHAPES)
    builder = recorded.Builder.return_value
    builder.create_network.assert_called_once_with(1 << 1)
    profile = builder.create_optimization_profile.return_value
    profile.set_shape.assert_called_once_with("image", (1, 1, 16, 24), (1, 1, 64, 96), (8, 1, 128, 192))
    (content,) = recorded.OnnxParser.return_value.parse.call_args.args
    assert content == (files / "model.onnx").read_bytes()
    assert (tmp_path / "e.engine").read_bytes() == b"engine"
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(told))
    assert (told["precision"], told["engine_mb"], told["gpu"], told["tensorrt"]) == ("fp32", 6e-6, "some GPU", "11.4.0")
    assert told["classes"] == ["a", "b"] and "sha256" not in told


@ROW
def test_fp16_is_in_the_graph(files):
    half = tensorrt.typed(files / "model.onnx", "fp16")
    graph = onnx.load_from_string(half).graph
    kernels = [each for each in graph.initializer if len(each.dims) == 4]
    assert kernels and {each.data_type for each in kernels} == {onnx.TensorProto.FLOAT16}
    image = torch.randn(2, 1, 37, 50)
    assert (Session(half)(image) - Session(files / "model.onnx")(image)).abs().max() < 1e-2


@ROW
def test_the_file_has_to_be_of_the_precision(recorded, files, tmp_path):
    assert tensorrt.typed(files / "symmetric.onnx", "int8") == (files / "symmetric.onnx").read_bytes()
    for name in ("model", "int8"):
        with pytest.raises(DeploymentError, match="is no int8 file with symmetric activations"):
            tensorrt.build(files / f"{name}.onnx", tmp_path / "e.engine", precision="int8", shapes=SHAPES)
    with pytest.raises(DeploymentError, match="is in int8; an engine in fp16 needs the fp32 file"):
        tensorrt.build(files / "int8.onnx", tmp_path / "e.engine", precision="fp16", shapes=SHAPES)


@ROW
def test_what_tensorrt_cannot_do_is_passed_on(recorded, files, tmp_path):
    where = {"precision": "fp32", "shapes": SHAPES}
    recorded.Builder.return_value.build_serialized_network.return_value = None
    with pytest.raises(DeploymentError, match=r"TensorRT 11\.4\.0 built no engine"):
        tensorrt.build(files / "model.onnx", tmp_path / "e.engine", **where)
    recorded.OnnxParser.return_value.parse.return_value = False
    recorded.OnnxParser.return_value.num_errors = 1
    recorded.OnnxParser.return_value.get_error.return_value = "no such node"
    with pytest.raises(DeploymentError, match=r"cannot read it \(no such node\)"):
        tensorrt.build(files / "model.onnx", tmp_path / "e.engine", **where)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_one_size_has_an_engine_of_that_size():
    assert Shapes.around(100, 100, [224, 224]) == Shapes(least=(1, 224, 224), usual=(1, 224, 224), most=(8, 224, 224))
