"""What a network costs: numbers learned, and multiplications for one image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segmentation import networks
from segmentation.networks import Network, timm_unet

BACKBONES = (
    *("convnext_tiny", "convnext_small", "convnext_base"),
    *("hrnet_w18", "hrnet_w32", "hrnet_w48"),
    *("efficientnet_b0", "efficientnet_b3"),
    *("resnet34", "resnet50"),
)
"""timm encoders of different families and sizes; any other with features_only will do as well."""


@dataclass(frozen=True)
class Backbone:
    """One row of the table of encoders."""

    name: str
    encoder_parameters: int
    parameters: int
    """Of the whole network."""
    macs: int
    """Of the whole network, for one image of the table's size."""
    channels: tuple[int, ...]
    """Of each level of the encoder, finest first."""
    strides: tuple[int, ...]
    """Of each level of the encoder."""


def backbones(
    names: Sequence[str] = BACKBONES, *, network: Network | None = None, size: int = 512, classes: int = 3
) -> Iterator[Backbone]:
    """Return what each encoder costs in a network (unet3plus if not given), for square RGB images.

    Raises:
        ValueError: for an encoder that timm lacks, before the first row; that gives no feature maps, or none of use for
            images of this size.
    """
    for name in names:
        timm_unet.check_name(name)
    network = networks.without_weights(network or Network(name="unet3plus"))
    return (_backbone(name, network, size, classes) for name in names)


def _backbone(name: str, network: Network, size: int, classes: int) -> Backbone:
    # Only shapes count: on the meta device nothing is drawn or stored.
    with torch.device("meta"):
        model = networks.build(replace(network, encoder=name), 3, classes)
    encoder: Any = model.get_submodule("encoder")
    info = encoder.feature_info
    try:
        count = macs(model, 3, size, size)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"encoder: {name!r} gives no maps that {network.name} can use for images of {size} pixels ({error}); "
            "choose another size or another encoder"
        ) from error
    return Backbone(
        name, parameters(encoder), parameters(model), count, tuple(info.channels()), tuple(info.reduction())
    )


def parameters(model: nn.Module) -> int:
    """Return how many numbers the network has, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, in_channels: int, height: int, width: int) -> int:
    """Return the multiply-accumulates of one image's logits in evaluation; divided by 1e9 they are GMACs.

    Convolutions, transposed ones, linear layers and matrix products count, one MAC for two FLOPs; normalisation,
    activations, pooling and interpolation do not. The network is left as it is; nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        shapes_alone(model, in_channels, height, width)
    flops: int = counter.get_total_flops()
    return flops // 2


@torch.no_grad()
def shapes_alone(model: nn.Module, in_channels: int, height: int, width: int) -> Any:
    """Return what the network makes of one image in evaluation, on the meta device, where nothing is computed."""
    state = model.training
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    try:
        image = torch.zeros(1, in_channels, height, width, device="meta")
        return torch.func.functional_call(model, tensors, (image,))
    finally:
        model.train(state)
