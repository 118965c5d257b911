"""Compare pruned networks with whole ones in which the dropped channels are silent, and count the reference's network.

Random networks of four architectures, random channels of every block, images of a size that does not divide. The counts
are of a UNet of 64-128-256-512/1024 channels and of the same by the reference's ratios, for one image of 256x256.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from segmentation import networks
from segmentation.networks import Network
from segmentation.pruning import blocks, channels

TINY = {"cases": 8}
ARCHITECTURES = ("tinyunet", "unet", "unetplusplus", "unet3plus")
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.2, 0.1)
"""Of the reference's experiment, by blocks in the order in which they run."""


def measure(cases: int = 200) -> dict[str, Any]:
    """Return the largest difference between logits, and the counts."""
    drawn = torch.Generator().manual_seed(0)
    apart = [_difference(ARCHITECTURES[case % len(ARCHITECTURES)], drawn) for case in range(cases)]
    with torch.device("meta"):
        whole = networks.build(Network(name="unet", widths=(64, 128, 256, 512), bottleneck=1024), 1, 4)
    graph = channels.trace(whole, 1, 256, 256)
    kept = {
        origin: block.total - math.floor(block.total * ratio)
        for block, ratio in zip(blocks.of(whole, graph).values(), RATIOS, strict=True)
        for origin in block.origins
    }
    return {
        "equivalence_max_abs": max(apart),
        "cases": cases,
        "unet64_params": graph.parameters(),
        "pruned_params": graph.parameters(kept),
        "unet64_macs": graph.macs(),
        "pruned_macs": graph.macs(kept),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    what = f"pruned network against the whole one with dropped channels silent, {result['cases']} random cases"
    return [
        (what, f"{result['equivalence_max_abs']:.1g}", "largest difference of logits; aim: less than 1e-5"),
        (
            "UNet of 64-1024 channels by the reference's pruning ratios",
            f"{result['pruned_params']:,} parameters, {result['pruned_macs'] / 1e9:.2f} GMACs",
            f"whole: {result['unet64_params']:,}, {result['unet64_macs'] / 1e9:.2f}",
        ),
    ]


def _difference(name: str, drawn: torch.Generator) -> float:
    model = _network(name, drawn)
    graph = channels.trace(model, 1)
    kept = {origin: _some(size, drawn) for origin, size in graph.sizes().items()}
    image = torch.rand(2, 1, 24 + int(_up_to(17, drawn)), 40, generator=drawn)
    with torch.inference_mode():
        smaller = channels.cut(model, graph, kept)(image)
        return float((smaller - channels.silenced(model, graph, kept)(image)).abs().max())


def _network(name: str, drawn: torch.Generator) -> nn.Module:
    """Return a network of random widths, its biases and batch statistics random as well."""
    widths = tuple(2 + _up_to(9, drawn) for _ in range(2 + _up_to(2, drawn)))
    config = {
        "tinyunet": Network(name="tinyunet", base=widths[0]),
        "unet": Network(name="unet", widths=widths),
        "unetplusplus": Network(name="unetplusplus", widths=widths),
        "unet3plus": Network(name="unet3plus", encoder="plain", widths=widths, cat_channels=widths[0]),
    }[name]
    model = networks.build(config, 1, 3)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.data.copy_(torch.rand(tensor.shape, generator=drawn) + 0.25)
    return model.eval()


def _some(size: int, drawn: torch.Generator) -> list[int]:
    count = 1 + _up_to(size, drawn)
    return sorted(torch.randperm(size, generator=drawn)[:count].tolist())


def _up_to(bound: int, drawn: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=drawn))
