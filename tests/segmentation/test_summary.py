"""The table of a network's layers: shapes worked by hand, and the network as it was before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segmentation.networks import Network, build, coarse, parameter_count
from segmentation.networks.coarse import CoarseNetwork
from segmentation.networks.summary import lines

torch.set_num_threads(1)


@pytest.mark.row("E39")
def test_shapes_and_numbers_are_those_of_the_specification():
    with torch.device("meta"):
        model = coarse.build(CoarseNetwork(), 99, 4)
    assert [line.split() for line in lines(model, 99, 200, 200)] == [
        ["module", "kind", "output", "parameters"],
        ["image", "99", "x", "200", "x", "200"],
        ["encoders", "ModuleList", "1,200,704"],
        ["encoders.0", "Sequential", "64", "x", "40", "x", "40", "94,016"],
        ["encoders.1", "Sequential", "128", "x", "8", "x", "8", "221,440"],
        ["encoders.2", "Sequential", "256", "x", "4", "x", "4", "885,248"],
        ["head", "Conv2d", "4", "x", "4", "x", "4", "1,028"],
        ["total", "SegmentationCNN", "4", "x", "4", "x", "4", "1,201,732"],
    ]


@pytest.mark.row("E39")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", {"bottleneck": "256 x 50 x 50", "decoders.3": "64 x 200 x 200", "final_conv": "4 x 200 x 200"}),
        ("fcn_resnet101", {"backbone.conv1": "64 x 100 x 100", "backbone": "2048 x 25 x 25", "pool": "4 x 4 x 4"}),
    ],
)
def test_networks_of_cells_end_in_cells(name, expected):
    with torch.device("meta"):
        model = coarse.build(CoarseNetwork(name=name), 99, 4)
    found = lines(model, 99, 200, 200)
    for key, shape in {**expected, "total": "4 x 4 x 4"}.items():
        (line,) = [line for line in found if line.split()[0] == key]
        assert f"  {shape}  " in line
    assert found[-1].endswith(f" {parameter_count(model):,}")


def test_maps_of_several_levels_stand_side_by_side_and_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    model = build(Network(name="unet3plus", encoder="resnet10t", cat_channels=4, guided=True), 3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = lines(model, 3, 128, 64)
    assert "64 x 64 x 32; 64 x 32 x 16; 128 x 16 x 8; 256 x 8 x 4; 512 x 4 x 2" in found[2]
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_called_has_no_shape_and_a_failing_network_keeps_no_hook():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 5, 1)

        def forward(self, image):
            return {"out": self.used(image)}

    model = Half()
    assert [line.split() for line in lines(model, 3, 4, 4)[2:]] == [
        ["used", "Conv2d", "2", "x", "4", "x", "4", "8"],
        ["idle", "Conv2d", "20"],
        ["total", "Half", "2", "x", "4", "x", "4", "28"],
    ]
    with pytest.raises(RuntimeError, match="channel"):
        lines(model, 1, 4, 4)
    assert not any(module._forward_hooks for module in model.modules())
