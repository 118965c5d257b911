"""Attention UNet: Oktay et al. 2018, arXiv:1804.03999. A UNet whose skips pass through additive attention gates.

A gate sees the skip and the map of the level below, and weighs each place of the skip by a number between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.networks.parts import LAYERS
from segmentation.networks.unet import UNet, build_as

if TYPE_CHECKING:
    from segmentation.networks import Network


def build(config: Network, in_channels: int, classes: int, *, slices: int = 0) -> nn.Module:
    """Return an attention UNet, configured like a UNet."""
    return build_as(AttentionUNet, config, in_channels, classes, slices)


class AttentionUNet(UNet):
    """A UNet with a gate in front of each level of its decoder, coarsest first."""

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], bottleneck: int, **options: Any) -> None:
        super().__init__(in_channels, classes, widths, bottleneck, **options)
        below = [bottleneck, *(block.net[3].out_channels for block in self.decoders[1::2])]  # type: ignore[index, union-attr]
        self.gates = nn.ModuleList(
            AttentionGate(skip, below[index], stride)
            for index, (skip, stride) in enumerate(zip(reversed(widths), reversed(self.strides), strict=True))
        )

    def _skipped(self, index: int, skip: Tensor, below: Tensor) -> Tensor:
        gated: Tensor = self.gates[index](skip, below)
        return gated


class AttentionGate(nn.Module):
    """sigmoid(psi(relu(theta(skip) + phi(below)))) at the size of `below`, enlarged, times the skip."""

    def __init__(self, skip: int, below: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        layers, inner = LAYERS[len(stride)], max(1, skip // 2)
        self.mode = layers.interpolation
        self.theta = layers.conv(skip, inner, stride, stride=stride, bias=False)
        self.phi = layers.conv(below, inner, 1)
        self.psi = layers.conv(inner, 1, 1)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Return the skip (B, C, H, W), weighed; `below` is smaller by the stride."""
        weight = torch.sigmoid(self.psi(torch.relu(self.theta(skip) + self.phi(below))))
        return skip * F.interpolate(weight, size=skip.shape[2:], mode=self.mode)
