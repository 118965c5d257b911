"""Structured pruning: a network with fewer channels, by a plan that can be kept and applied again.

    channels      how the channels of any network hang together; cut it
    plan          which channels of each layer stay, as data
    blocks        layers that lose the same channels, under a name
    importance    scores of filters
    selection     which filters go: by ratios, all together, or down to a budget
    weights       the ways to begin after the cut: none, random, rewind; batch statistics anew

Rules, names and defaults are those of the basic_UNet pruning system (structured pruning of a UNet on ACDC).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from segmentation.pruning import blocks, dependency_graph, importance, plan, selection
from segmentation.pruning.blocks import Block
from segmentation.pruning.channels import Channels, trace
from segmentation.pruning.importance import Importance
from segmentation.pruning.plan import Plan, PlanError, apply

__all__ = ["Channels", "Plan", "PlanError", "Prune", "apply", "check", "make_plan", "plan_from", "trace"]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Which channels of a network go, and what the weights begin from. Ratios are shares of a block's filters."""

    default: float = 0.0
    """Ratio of every block without one of its own."""
    where: str = blocks.ALL
    """Which part of the network default, global, macs and params speak of; ratios of single blocks hold everywhere.
    all, encoder, decoder, deep (the bottleneck, and the deepest level of both), or the name of a block, such as
    decoders.1."""
    global_: float = 0.0
    """Share of the filters of all blocks together, the least important anywhere first; instead of ratios."""
    macs: float = 1.0
    """Drop as in global until the multiply-accumulates are at most this part of those before; instead of ratios."""
    params: float = 1.0
    """The same for the numbers learned."""
    importance: Importance = "l1"
    """What a filter is ranked by. l1, l2: norm of its weights. bn_scale: of the batch norm behind it. pearson, cosine:
    how unlike its feature maps are to those of others. random: nothing."""
    threshold: float = 0.0
    """pearson, cosine: filters less alike than this all stay, whatever the ratio; 0: the ratio alone decides."""
    mode: Literal["none", "random", "rewind"] = "none"
    """What the smaller network begins with. none: the weights that stay. random: fresh ones. rewind: those of an early
    epoch (rewind_epoch of the training of the parent)."""
    backend: Literal["blocks", "layers", "depgraph"] = "blocks"
    """blocks: the layers of a UNet's level keep the same channels. layers: each convolution its own. depgraph: groups
    by Torch-Pruning, for networks of any kind (pip install "segmentation-search[pruning]")."""
    min_channels: int = 1
    """Channels that stay in every block, whatever its ratio."""
    recalibrate: int = 5
    """Batches from which batch statistics are taken anew after the cut; 0: they stay. Only where weights stay."""
    plan: str | None = None
    """Apply this file (pruning_masks.json) instead of ranking filters."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Ratio of a block or of all below a name, such as prune.encoders.1: 0.3."""

    def __post_init__(self) -> None:
        for name in ("default", "global_", "threshold"):
            _check_ratio(name.rstrip("_"), getattr(self, name))
        for name, ratio in self.blocks.items():
            _check_ratio(name, ratio)
        for name in ("macs", "params"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected more than 0, and at most 1")
        if self.min_channels < 1:
            raise ValueError(f"min_channels: got {self.min_channels}; a layer needs at least 1")
        if self.recalibrate < 0:
            raise ValueError(f"recalibrate: got {self.recalibrate}; expected 0 or more batches")
        if len(ways := self._ways()) > 1:
            raise ValueError(f"{ways[0]}: together with {ways[1]}; filters can go in one way at a time")
        if self.plan is not None and self.where != blocks.ALL:
            raise ValueError(
                f"where: got {self.where!r} together with a plan, which says itself what goes; leave one out"
            )

    @property
    def active(self) -> bool:
        """Whether any channel may go."""
        return bool(self.way)

    @property
    def way(self) -> str:
        """What decides which filters go: plan, global, macs, params or ratios; empty: none goes."""
        return next(iter(self._ways()), "")

    def _ways(self) -> list[str]:
        ways = {"plan": self.plan is not None, "global": self.global_ > 0, "macs": self.macs < 1}
        ways |= {"params": self.params < 1, "ratios": self.default > 0 or any(self.blocks.values())}
        return [name for name, on in ways.items() if on]


def _check_ratio(name: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{name}: got {ratio}; expected 0 or more, and less than 1, which would empty a block")


def make_plan(
    prune: Prune, model: nn.Module, channels: Channels, *, images: Iterable[Tensor] = (), seed: int = 0
) -> Plan:
    """Return the plan that a configuration makes of a network with these weights.

    channels: of the network, from `trace` at the size of the images if a budget of MACs is given.
    images: (B, C, H, W) as the network takes them, for importance pearson and cosine.
    seed: of importance random.

    Raises:
        PlanError: for a block that the network lacks, a plan of another network, or a budget that cannot be met.
    """
    if prune.plan is not None:
        found = plan.read(Path(prune.plan))
        plan.origins(channels, found)
        return found
    groups = blocks_of(prune, model, channels)
    ratios(prune, channels, groups)  # refuses a wrong name before any filter is scored
    return plan_from(prune, channels, groups, scores_of(prune, model, channels, groups, images=images, seed=seed))


def scores_of(
    prune: Prune,
    model: nn.Module,
    channels: Channels,
    groups: Mapping[str, Block],
    *,
    images: Iterable[Tensor] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the scores of each block's filters, those of its ranked layer; arguments and errors as of `make_plan`."""
    ranked = [block.ranked for block in groups.values()]
    by_layer = importance.scores(model, channels, ranked, prune.importance, images=images, seed=seed)
    return {name: by_layer[block.ranked] for name, block in groups.items()}


def blocks_of(prune: Prune, model: nn.Module, channels: Channels) -> dict[str, Block]:
    """Return the blocks of a network as the configured backend sees them."""
    if prune.backend == "depgraph":
        return dependency_graph.blocks(model, channels)
    return blocks.of(model, channels, tied=prune.backend == "blocks")


def ratios(prune: Prune, channels: Channels, groups: Mapping[str, Block]) -> dict[str, float]:
    """Return the ratio of every block: its own, else the default where it is in the configured part, else 0.

    Raises:
        PlanError: for a name that no block has.
    """
    inside = blocks.part(groups, channels, prune.where)
    return blocks.ratios(groups, prune.blocks, prune.default, inside)


def check(prune: Prune, model: nn.Module, channels: Channels) -> None:
    """Refuse what no weights could change: an unknown block, a plan of another network, a budget out of reach.

    model: perhaps without values, on the meta device.

    Raises:
        PlanError: as `make_plan`.
    """
    if prune.plan is not None:
        plan.origins(channels, plan.read(Path(prune.plan)))
        return
    groups = blocks.of(model, channels, tied=prune.backend == "blocks")
    equal = {name: torch.ones(block.total, dtype=torch.float64) for name, block in groups.items()}
    plan_from(dataclasses.replace(prune, threshold=0.0), channels, groups, equal)


def plan_from(prune: Prune, channels: Channels, groups: Mapping[str, Block], scores: Mapping[str, Tensor]) -> Plan:
    """Return the plan of a configuration where the scores of each block are known; raises as `make_plan`."""
    redundancy = prune.importance in importance.REDUNDANCY
    below = 1 - prune.threshold if redundancy and prune.threshold else math.inf
    least, share = prune.min_channels, ratios(prune, channels, groups)
    inside = blocks.part(groups, channels, prune.where)
    within = {name: score for name, score in scores.items() if name in inside}
    comparable = within if redundancy else importance.per_block(within)
    kept: selection.Kept | None
    if prune.global_:
        count = math.floor(sum(groups[name].total for name in inside) * prune.global_)
        kept = selection.together(comparable, count, least=least, below=below)
    elif prune.macs < 1 or prune.params < 1:
        kept = selection.within(comparable, _fits(prune, channels, groups), least=least, below=below)
        if kept is None:
            what = "macs" if prune.macs < 1 else "params"
            layer = "layer" if prune.where == blocks.ALL else f"layer of {prune.where}"
            raise PlanError(
                f"{what}: even with {least} channels in every {layer} more than {getattr(prune, what)} of them are left"
            )
    else:
        kept = {name: selection.by_ratio(scores[name], share[name], least=least, below=below) for name in groups}
    return plan.of(channels, by_origin(groups, kept))


def by_origin(groups: Mapping[str, Block], kept: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return what each origin of channels keeps, where blocks keep these; others are left out, and keep all."""
    return {origin: places for name, places in kept.items() for origin in groups[name].origins}


def _fits(prune: Prune, channels: Channels, groups: Mapping[str, Block]) -> Callable[[selection.Kept], bool]:
    def fits(kept: selection.Kept) -> bool:
        widths = {origin: len(places) for origin, places in by_origin(groups, kept).items()}
        if prune.macs < 1:
            return channels.macs(widths) <= prune.macs * channels.macs()
        return channels.parameters(widths) <= prune.params * channels.parameters()

    return fits
