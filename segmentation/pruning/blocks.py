"""Blocks: layers that lose the same channels, under one name that a ratio can be given to.

The two convolutions of a UNet's level and the transposed one that feeds it are one block, ranked by its last
convolution, as in the basic_UNet pruning system. Every other layer is a block by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from segmentation.networks.unet import DoubleConv
from segmentation.networks.volume import Volumes
from segmentation.pruning.channels import Channels
from segmentation.pruning.plan import PlanError, nearest

ALL, PARTS = "all", ("all", "encoder", "decoder", "deep")
ENCODER, BOTTLENECK = "enc", "bott"
"""How the names of their layers begin in every network here; what has neither name is of the decoder."""


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


def ratios(
    blocks: Mapping[str, Block], given: Mapping[str, float], default: float, inside: Collection[str] | None = None
) -> dict[str, float]:
    """Return the ratio of every block: that of the longest given name that it has or begins with, or the default.

    inside: the blocks that the default is for, others have 0; None: all.

    Raises:
        PlanError: for a name that no block has.
    """
    for name in given:
        if not any(within(block, name) for block in blocks):
            raise PlanError(f"{name}: no block of this network; {nearest(name, blocks)}")
    chosen = {block: max((name for name in given if within(block, name)), key=len, default=None) for block in blocks}
    others = {block: default if inside is None or block in inside else 0.0 for block in blocks}
    return {block: others[block] if name is None else given[name] for block, name in chosen.items()}


def part(blocks: Mapping[str, Block], channels: Channels, where: str) -> tuple[str, ...]:
    """Return the blocks of a part of the network, in order: one of `PARTS`, or the name of a block or of all below it.

    deep: the two coarsest resolutions, which are the bottleneck and the deepest levels of encoder and decoder.

    Raises:
        PlanError: if the network has no such part.
    """
    if where == ALL:
        return tuple(blocks)
    if where == "deep":
        coarsest = sorted({_pixels(channels, block) for block in blocks.values()})[:2]
        return tuple(name for name, block in blocks.items() if _pixels(channels, block) in coarsest)
    sides = {name: _side(name) for name in blocks}
    found = [name for name, side in sides.items() if where in (side, name) or within(name, where)]
    if not found or (where == "decoder" and "encoder" not in sides.values()):
        raise PlanError(
            f"where: got {where!r}; no part and no block of this network; {nearest(where, (*PARTS, *blocks))}"
        )
    return tuple(found)


def _side(block: str) -> str:
    if block.startswith(BOTTLENECK):
        return "bottleneck"
    return "encoder" if block.startswith(ENCODER) else "decoder"


def _pixels(channels: Channels, block: Block) -> int:
    """Return how many pixels the maps of a block have."""
    layer = channels.layers[block.ranked]
    larger = math.prod(layer.module.stride) if isinstance(layer.module, _ConvTransposeNd) else 1
    return layer.places * larger


def within(block: str, name: str) -> bool:
    """Return whether a name is that of a block or of something around it."""
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
        same = [layer.writes[0][0] for layer in inside if layer.writes[0][1] == width]  # not so once pruned by layers
        for origin in [*before, *same]:
            owner.setdefault(origin, name)
    return owner


def _is_transposed(channels: Channels, origin: str) -> bool:
    return origin in channels.layers and isinstance(channels.layers[origin].module, _ConvTransposeNd)


def ranked(channels: Channels, origins: list[str]) -> str:
    """Return the last convolution that writes channels of a block and does not transpose, or the last of all."""
    writers = [layer for layer in channels.convolutions() if layer.writes[0][0] in origins]
    plain = [layer for layer in writers if not isinstance(layer.module, _ConvTransposeNd) and layer.module.groups == 1]
    return (plain or writers)[-1].name
