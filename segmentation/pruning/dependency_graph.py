"""Blocks as Torch-Pruning finds them: the layers that its dependency graph says lose channels together.

It comes to its groups on another way, through the graph of gradients, and knows networks of any kind. Fang et al. 2023,
arXiv:2301.12900; the package torch-pruning is optional. The plan and the cut are the same as everywhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from segmentation.networks.volume import Volumes
from segmentation.pruning import blocks as own
from segmentation.pruning.blocks import Block
from segmentation.pruning.channels import SIDE, Channels
from segmentation.pruning.plan import PlanError


def blocks(model: nn.Module, channels: Channels) -> dict[str, Block]:
    """Return the groups of convolutions that keep the same channels, each under the name of its first.

    Raises:
        PlanError: if the package is missing.
    """
    found: dict[str, Block] = {}
    for names in _groups(model, _in_channels(channels)):
        origins = tuple(dict.fromkeys(channels.origin(name) for name in names))
        if not channels.frozen.isdisjoint(origins):
            continue
        total = channels.layers[names[0]].writes[0][1]
        name = own.name_in(model, origins[0])
        found[name] = Block(name, own.ranked(channels, list(origins)), origins, total)
    return found


def _in_channels(channels: Channels) -> int:
    """Return the channels of the image: what the first layer reads."""
    first = next(iter(channels.layers.values()))
    return sum(count for _, count in first.reads)


def _groups(model: nn.Module, in_channels: int) -> Iterator[list[str]]:
    """Yield the convolutions of each group whose output channels go together."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise PlanError(
            'backend: depgraph needs Torch-Pruning; pip install "segmentation-search[pruning]", or write blocks'
        ) from error
    twin = copy.deepcopy(model).cpu().train().requires_grad_(True)
    graph: Any = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height = SIDE * (model.slices if isinstance(model, Volumes) else 1)
        graph.build_dependency(twin, torch.zeros(2, in_channels, height, SIDE), output_transform=_logits)
        names = {module: name for name, module in twin.named_modules()}
        for group in graph.get_all_groups(root_module_types=(nn.modules.conv._ConvNd,)):
            members = [
                names[item.dep.target.module]
                for item in group
                if isinstance(item.dep.target.module, _ConvNd) and graph.is_out_channel_pruning_fn(item.dep.handler)
            ]
            yield list(dict.fromkeys(members))


def _logits(output: Any) -> Any:
    """Return what Torch-Pruning can follow back: tensors in a plain list."""
    return (
        [tensor for tensor in vars(output).values() if isinstance(tensor, torch.Tensor)]
        if hasattr(output, "logits")
        else output
    )
