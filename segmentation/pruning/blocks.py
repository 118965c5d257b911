"""Blocks: layers that lose the same channels, under one name that a ratio can be given to.

The two convolutions of a UNet's level and the transposed one that feeds it are one block, ranked by its last
convolution, as in the basic_UNet pruning system. Every other layer is a block by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from segmentation.networks.unet import DoubleConv
from segmentation.networks.volume import Volumes
from segmentation.pruning.channels import Channels
from segmentation.pruning.plan import PlanError, nearest


@dataclass(frozen=True)
class Block:
    """Layers that keep the same channels."""

    name: str
    ranked: str
    """The convolution whose filters are scored."""
    origins: tuple[str, ...]
    """Whose channels go."""
    total: int
    """Channels before."""


def of(model: nn.Module, channels: Channels, *, tied: bool = True) -> dict[str, Block]:
    """Return the blocks of a network by name, in the order in which they run.

    tied: the layers of a UNet's level keep the same channels; else each keeps its own.
    """
    sizes = channels.sizes()
    owner = _levels(model, channels) if tied else {}
    found: dict[str, list[str]] = {}
    for origin in sizes:
        found.setdefault(name_in(model, owner.get(origin, origin)), []).append(origin)
    return {
        name: Block(name, ranked(channels, origins), tuple(origins), sizes[origins[0]])
        for name, origins in found.items()
    }


def name_in(model: nn.Module, layer: str) -> str:
    """Return a layer's name in the network itself, which is the same for images and for volumes."""
    return layer.removeprefix("network.") if isinstance(model, Volumes) else layer


def ratios(blocks: Mapping[str, Block], given: Mapping[str, float], default: float) -> dict[str, float]:
    """Return the ratio of every block: that of the longest given name that it has or begins with, or the default.

    Raises:
        PlanError: for a name that no block has.
    """
    for name in given:
        if not any(_within(block, name) for block in blocks):
            raise PlanError(f"{name}: no block of this network; {nearest(name, blocks)}")
    chosen = {block: max((name for name in given if _within(block, name)), key=len, default=None) for block in blocks}
    return {block: default if name is None else given[name] for block, name in chosen.items()}


def _within(block: str, name: str) -> bool:
    return block == name or block.startswith(f"{name}.")


def _levels(model: nn.Module, channels: Channels) -> dict[str, str]:
    """Return the level of a UNet that each origin belongs to, for those that do."""
    owner: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, DoubleConv):
            continue
        inside = [layer for layer in channels.convolutions() if layer.name.startswith(f"{name}.")]
        width = inside[-1].writes[0][1]
        before = [origin for origin, count in inside[0].reads if count == width and _is_transposed(channels, origin)]
        for origin in [*before, *(layer.writes[0][0] for layer in inside)]:
            owner.setdefault(origin, name)
    return owner


def _is_transposed(channels: Channels, origin: str) -> bool:
    return origin in channels.layers and isinstance(channels.layers[origin].module, _ConvTransposeNd)


def ranked(channels: Channels, origins: list[str]) -> str:
    """Return the last convolution that writes channels of a block and does not transpose, or the last of all."""
    writers = [layer for layer in channels.convolutions() if layer.writes[0][0] in origins]
    plain = [layer for layer in writers if not isinstance(layer.module, _ConvTransposeNd) and layer.module.groups == 1]
    return (plain or writers)[-1].name
