"""Int8 files are a quarter of the size and score nearly the same; aware training gives the weights that int8 has."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from segmentation import losses, training
from segmentation.deployment import DeploymentError, qat, quantise
from segmentation.deployment import onnx as deployed
from segmentation.deployment.onnx import Description, Session
from segmentation.epoch import NonFiniteError
from segmentation.losses import Loss
from segmentation.networks.unet import UNet
from segmentation.normalisation import Normaliser

onnx = pytest.importorskip("onnx")
ROW = pytest.mark.row("P44")
DESCRIPTION = Description(workload="pairs", classes=("dark", "bright"), in_channels=1, normaliser=Normaliser())


def some_batches(count, seed=0):
    """Return noisy pictures whose bright half is the mask."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        mask = torch.zeros(4, 32, 32, dtype=torch.int64)
        for row, side in enumerate(torch.randint(8, 24, (4,), generator=draw).tolist()):
            mask[row, :, side:] = 1
        image = mask[:, None] + 0.7 * torch.randn(4, 1, 32, 32, generator=draw)
        found.append((image, mask, torch.arange(4) + 4 * number))
    return found


def learned(widths, bottleneck):
    training.seed_everything(0)
    model = UNet(1, 2, widths, bottleneck)
    optimiser, loss = torch.optim.Adam(model.parameters(), lr=1e-2), losses.build(Loss(), multilabel=False)
    for image, mask, _ in some_batches(30):
        optimiser.zero_grad()
        loss(model(image), mask).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def networks():
    """Return a network, and one whose layers have fewer channels, as after pruning."""
    return {"full": learned((24, 48), 96), "pruned": learned((17, 35), 61)}


def calibration():
    return [image for image, _, _ in some_batches(4, seed=1)]


@pytest.fixture(scope="module")
def rows(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    found = quantise.compare(
        networks,
        folder,
        DESCRIPTION,
        calibration=calibration,
        batches=lambda: some_batches(4, seed=2),
        height=32,
        width=32,
        runs=3,
    )
    return folder, found


@ROW
def test_int8_is_under_a_third_of_the_size_and_loses_no_dice(rows):
    folder, found = rows
    order = [(name, precision) for name in ("full", "pruned") for precision in ("fp32", "int8")]
    assert [(row.network, row.precision) for row in found] == order
    for row in found:
        suffix = {"fp32": "", "int8": "_int8"}[row.precision]
        size = (folder / f"{row.network}{suffix}.onnx").stat().st_size
        assert row.size_mb == size / 1e6 and 0 < row.p50_ms <= row.p95_ms
        assert row.dice > 0.9 and row.dice_with_background > 0.9
        assert row.size_ratio == 1 if row.precision == "fp32" else row.size_ratio < 0.35
        assert row.dice_loss == 0 if row.precision == "fp32" else row.dice_loss <= 0.01
    assert found[2].parameters < found[0].parameters and found[3].size_mb < found[1].size_mb


@ROW
def test_every_kernel_but_the_heads_is_int8_also_those_of_transposed_convolutions(rows):
    folder, _ = rows
    graph = onnx.load(folder / "full_int8.onnx").graph
    every = [each for each in graph.initializer if len(each.dims) == 4]
    kernels = [each for each in every if each.data_type == onnx.TensorProto.INT8]
    assert (len(every), len(kernels)) == (5 * 2 + 2 + 1, 5 * 2 + 2)
    (head,) = [each for each in every if each not in kernels]
    assert list(head.dims) == [2, 24, 1, 1] and head.data_type == onnx.TensorProto.FLOAT
    scales = {each.name: np.prod(each.dims) for each in graph.initializer if each.name.endswith("_scale")}
    by_input = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for kernel in kernels:
        of_transposed = list(kernel.dims)[2:] == [2, 2]
        assert scales[by_input[kernel.name].input[1]] == kernel.dims[1 if of_transposed else 0]


@ROW
def test_logits_of_int8_are_not_rounded(rows):
    """In 256 steps half of these would be equal to others, and pixels whose classes tie would go to the first."""
    folder, _ = rows
    logits = Session(folder / "full_int8.onnx")(some_batches(1)[0][0])
    assert len(torch.unique(logits)) > 0.9 * logits.numel()


@ROW
def test_the_table_is_written_for_people_and_for_programs(rows):
    folder, found = rows
    table, text = quantise.write_table(found, folder, scored_on="test")
    read = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["network"], float(row["dice_loss"])) for row in read] == [
        (row.network, row.dice_loss) for row in found
    ]
    lines = text.read_text().splitlines()
    assert lines[0].startswith("| network | precision |") and len(lines) == 2 + len(found) + 2
    assert f"| full | int8 | {found[1].parameters:,} | {found[1].size_mb:.3f} |" in lines[3]
    assert "on the test split" in lines[-1]


@ROW
def test_the_description_says_what_was_done(rows):
    folder, _ = rows
    told = json.loads((folder / "full_int8.json").read_text())
    assert told["precision"] == "int8" and told["calibration"]["images"] == 16
    assert "largest_difference" not in told, "that is of the fp32 file"
    assert Description.from_dict(told) == DESCRIPTION
    assert deployed.read(folder / "full_int8.onnx") == told


@ROW
def test_int8_takes_any_size_as_well(rows):
    folder, _ = rows
    image = torch.randn(3, 1, 37, 50)
    plain, small = (Session(folder / f"full{suffix}.onnx")(image) for suffix in ("", "_int8"))
    assert small.shape == plain.shape == (3, 2, 37, 50)
    assert (small - plain).abs().mean() < 0.1 * plain.std()


@ROW
def test_a_network_with_group_norm_is_quantised_as_well(tmp_path):
    torch.manual_seed(0)
    model = UNet(1, 2, (16,), 32, norm="group").eval()
    deployed.export(model, tmp_path / "m.onnx", DESCRIPTION, height=32, width=32)
    quantise.quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration())
    image = calibration()[0]
    plain, small = Session(tmp_path / "m.onnx")(image), Session(tmp_path / "q.onnx")(image)
    assert (small - plain).std() < 0.1 * plain.std()
    kernels = [each for each in onnx.load(tmp_path / "q.onnx").graph.initializer if len(each.dims) == 4]
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in kernels) == 3 * 2 + 1


def test_symmetric_activations_have_their_zero_at_zero(rows, tmp_path):
    folder, _ = rows
    quantise.quantise(folder / "full.onnx", tmp_path / "s.onnx", calibration(), symmetric=True)
    graph = onnx.load(tmp_path / "s.onnx").graph
    zeros = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name.endswith("_zero_point")]
    assert zeros and not any(each.any() for each in zeros)


def test_calibration_without_images_is_refused(rows, tmp_path):
    with pytest.raises(DeploymentError, match="calibration: got no image"):
        quantise.quantise(rows[0] / "full.onnx", tmp_path / "q.onnx", [])


@ROW
def test_aware_training_ends_with_the_weights_that_int8_has(networks):
    loss = losses.build(Loss(), multilabel=False)
    before = {name: value.clone() for name, value in networks["full"].state_dict().items()}
    tuned = qat.finetune(networks["full"], some_batches(4), loss, steps=4)
    assert not tuned.training and tuned.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in networks["full"].state_dict().items())
    assert not torch.equal(tuned.final_conv.weight, before["final_conv.weight"])
    for layer, axis in ((tuned.final_conv, 0), (tuned.decoders[0], 1), (tuned.encoders[1].net[0], 0)):
        weight = layer.weight.detach().transpose(0, axis).flatten(1)
        steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
        assert (steps - steps.round()).abs().max() < 1e-3
    # Its batch norm is left alone, and so is what stays behind: no hook, no parametrisation.
    assert torch.equal(tuned.encoders[0].net[1].running_mean, before["encoders.0.net.1.running_mean"])
    assert not any(module._forward_pre_hooks for module in tuned.modules())


@ROW
def test_aware_training_mends_what_rounding_broke():
    """One channel of a kernel is so large that a shared scale of the next layer's input drowns the others."""
    torch.manual_seed(0)
    model = learned((8,), 16)
    with torch.no_grad():
        model.encoders[0].net[4].weight[0] *= 300
    loss = losses.build(Loss(), multilabel=False)
    image, mask, _ = some_batches(1, seed=5)[0]

    def rounded_loss(network):
        hooked = qat.finetune(network, [(image, mask, None)], loss, steps=1, lr=0.0)
        for layer in [each for each in hooked.modules() if isinstance(each, qat.LAYERS)]:
            layer.register_forward_pre_hook(qat._Input())
        with torch.no_grad():
            return float(loss(hooked(image), mask))

    tuned = qat.finetune(model, some_batches(40), loss, steps=40, lr=3e-3)
    assert rounded_loss(tuned) < 0.8 * rounded_loss(model)


def test_rounding_passes_gradients_straight_through():
    weight = torch.tensor([[1.0, 0.301], [0.5, -2.0]], requires_grad=True)
    found = qat.RoundedWeight(0)(weight)
    assert torch.allclose(found, torch.tensor([[1.0, 38 / 127], [32 * 2 / 127, -2.0]]))
    found.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 2))
    assert not qat.RoundedWeight(1)(torch.zeros(3, 2)).any()


def test_aware_training_refuses_what_cannot_be_learned():
    model = nn.Conv2d(1, 2, 1)
    loss = lambda logits, mask: logits.mean() * float("nan")  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"loss is nan in quantisation-aware training; lower its lr, now 0\.001"):
        qat.finetune(model, some_batches(1), loss, steps=1, lr=1e-3)
    with pytest.raises(ValueError, match="steps: got 0; expected at least 1"):
        qat.finetune(model, [], loss, steps=0)
