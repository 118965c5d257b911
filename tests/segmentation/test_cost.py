"""Costs are those worked by hand, and counting them leaves the network as it was."""

import pytest
import torch

from segmentation.networks import Network, build, parameter_count
from segmentation.networks.cost import backbones, macs, parameters
from segmentation.networks.unet import UNet

torch.set_num_threads(1)


def test_unet_costs_the_golden_numbers():
    with torch.device("meta"):
        model = UNet(1, 4, (64, 128, 256, 512), 1024)
    assert parameters(model) == 31_036_676
    assert macs(model, 1, 256, 256) == 48_104_472_576


def test_layers_worked_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
    assert macs(conv, 3, 10, 12) == 8 * 3 * 9 * 5 * 6
    assert macs(torch.nn.Conv2d(4, 4, 3, padding=1, groups=4), 4, 8, 8) == 4 * 9 * 8 * 8
    assert macs(torch.nn.ConvTranspose2d(4, 2, 2, stride=2), 4, 5, 7) == 4 * 2 * 4 * 5 * 7
    assert macs(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 5)), 2, 3, 4) == 24 * 5
    assert macs(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()), 3, 8, 8) == 0


def test_counting_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    config = Network(name="unet3plus", encoder="resnet10t", cat_channels=4, deep_supervision=True, guided=True)
    model = build(config, 3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = macs(model, 3, 64, 64)
    assert model.training
    assert model.side_heads[0].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert macs(model.eval(), 3, 64, 64) == first
    assert not model.training
    assert macs(model, 3, 128, 64) == pytest.approx(2 * first, rel=1e-3)


def test_frozen_numbers_count_as_parameters():
    config = Network(name="unet3plus", encoder="resnet10t", cat_channels=4)
    frozen = build(Network(name="unet3plus", encoder="resnet10t", cat_channels=4, freeze_encoder=True), 3, 2)
    assert parameters(frozen) == parameter_count(build(config, 3, 2)) > parameter_count(frozen)


@pytest.mark.row("K2")
def test_the_table_takes_any_encoder_of_timm():
    rows = list(backbones(("resnet10t", "mobilenetv3_small_050"), size=64))
    assert [row.name for row in rows] == ["resnet10t", "mobilenetv3_small_050"]
    for row in rows:
        model = build(Network(name="unet3plus", encoder=row.name), 3, 3)
        assert row.encoder_parameters == parameter_count(model.encoder)
        assert row.parameters == parameter_count(model) > row.encoder_parameters
        assert row.macs == macs(model, 3, 64, 64)
        features = model.encoder(torch.zeros(1, 3, 64, 64))
        assert row.channels == tuple(each.shape[1] for each in features)
        assert row.strides == tuple(64 // each.shape[2] for each in features)
    unet = next(backbones(("resnet10t",), network=Network(name="timm_unet"), size=64))
    assert unet.encoder_parameters == rows[0].encoder_parameters
    assert unet.parameters < rows[0].parameters


@pytest.mark.row("K2")
def test_an_unknown_encoder_is_refused_before_the_first_row_is_counted():
    with pytest.raises(ValueError, match=r"no model 'resnet35'; did you mean .*'resnet34'"):
        backbones(("resnet10t", "resnet35"))


def test_an_encoder_of_one_image_size_is_refused_with_it():
    with pytest.raises(ValueError, match=r"'swin_tiny_patch4_window7_224' gives no maps .* 512 pixels .*224"):
        next(backbones(("swin_tiny_patch4_window7_224",)))
