"""UNet of any depth and widths: Ronneberger et al. 2015, arXiv:1505.04597, with padding and normalisation.

Layer names are those of the basic_UNet pruning system (encoders, bottleneck, decoders with the transposed convolutions
at even places, final_conv; the skip stands first in each concatenation), so that its weights load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from segmentation.networks.parts import LAYERS, conv, fitted

if TYPE_CHECKING:
    from segmentation.networks import Network


def build(config: Network, in_channels: int, classes: int, *, slices: int = 0) -> nn.Module:
    """Return a UNet of the configured widths, or of `depth` levels that double from `base`.

    slices: of the volumes that it is for; 0: it is for images.
    """
    return build_as(UNet, config, in_channels, classes, slices)


def build_as(kind: type[UNet], config: Network, in_channels: int, classes: int, slices: int = 0) -> UNet:
    """Return a UNet, or one of a kind."""
    *widths, bottleneck = level_widths(config)
    return kind(
        in_channels,
        classes,
        widths,
        bottleneck,
        decoder_widths=config.decoder_widths,
        norm=config.norm,
        dropout=config.dropout,
        strides=strides(len(widths), slices),
    )


def level_widths(config: Network) -> list[int]:
    """Return the channels of each level, finest first, and of the bottleneck."""
    widths = config.widths or tuple(config.base * 2**level for level in range(config.depth))
    return [*widths, config.bottleneck or 2 * widths[-1]]


def strides(levels: int, slices: int = 0) -> list[tuple[int, ...]]:
    """Return by how much each level is halved to make the next: (2, 2) for images, 0 slices.

    Slices of a volume are halved while there are 8 or more, and then left as they are, (1, 2, 2): few thick slices are
    soon as coarse as many thin pixels. After Isensee et al. 2021, nnU-Net, arXiv:1904.08128, whose least is 4 as well.
    """
    if not slices:
        return [(2, 2)] * levels
    found: list[tuple[int, ...]] = []
    for _ in range(levels):
        found.append((2 if slices >= 8 else 1, 2, 2))
        slices = -(-slices // found[-1][0])
    return found


class DoubleConv(nn.Module):
    """Two convolutions 3 wide, each with normalisation and ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: str = "batch", dropout: float = 0.0, dims: int = 2
    ) -> None:
        super().__init__()
        layers = [*conv(in_channels, out_channels, norm, dims), *conv(out_channels, out_channels, norm, dims)]
        self.net = nn.Sequential(*layers, *([LAYERS[dims].dropout(dropout)] if dropout else []))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, out_channels, H, W), or (B, out_channels, D, H, W)."""
        features = self.net(features)
        return features


class UNet(nn.Module):
    """An encoder that halves the resolution after each level, and a decoder that doubles it again.

    decoder_widths: channels of the decoder's levels, coarsest first; empty: those of the encoder's.
    strides: by how much each level is halved, see `strides`; empty: (2, 2). Three numbers make it a UNet of volumes.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        bottleneck: int,
        *,
        decoder_widths: Sequence[int] = (),
        norm: str = "batch",
        dropout: float = 0.0,
        strides: Sequence[tuple[int, ...]] = (),
    ) -> None:
        super().__init__()
        decoder_widths = tuple(decoder_widths) or tuple(reversed(widths))
        if len(decoder_widths) != len(widths):
            raise ValueError(
                f"decoder_widths: got {list(decoder_widths)}; expected {len(widths)} widths, one for each level above "
                "the bottleneck"
            )
        self.strides = tuple(strides) or ((2, 2),) * len(widths)
        self.dims = len(self.strides[0])
        layers, inputs = LAYERS[self.dims], [in_channels, *widths]
        self.encoders = nn.ModuleList(
            DoubleConv(inputs[i], width, norm, dims=self.dims) for i, width in enumerate(widths)
        )
        self.bottleneck = DoubleConv(widths[-1], bottleneck, norm, dims=self.dims)
        self.decoders = nn.ModuleList()
        below = bottleneck
        for skip, width, stride in zip(reversed(widths), decoder_widths, reversed(self.strides), strict=True):
            self.decoders.append(layers.transposed(below, width, stride, stride=stride))
            self.decoders.append(DoubleConv(skip + width, width, norm, dropout, self.dims))
            below = width
        self.final_conv = layers.conv(below, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size; of a volume, with D before H."""
        return fitted(self._logits, image, multiples(self.strides))

    def features(self, image: Tensor) -> Tensor:
        """Return what the last convolution sees of an image (B, C, H, W): (B, F, H, W), F the finest level's width."""
        return fitted(self._features, image, multiples(self.strides))

    def _logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.final_conv(self._features(image))
        return logits

    def _features(self, image: Tensor) -> Tensor:
        features: Tensor = image
        skips: list[Tensor] = []
        for encoder, stride in zip(self.encoders, self.strides, strict=True):
            skips.append(encoder(features))
            features = LAYERS[self.dims].max_pool(skips[-1], stride)
        features = self.bottleneck(features)
        for index, skip in enumerate(reversed(skips)):
            up, block = self.decoders[2 * index], self.decoders[2 * index + 1]
            features = block(torch.cat([self._skipped(index, skip, features), up(features)], 1))
        return features

    def _skipped(self, index: int, skip: Tensor, below: Tensor) -> Tensor:
        """Return what a decoder level, coarsest first, gets of its encoder level; `below` is the level under it."""
        return skip


def multiples(strides: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what each side of the input has to be a multiple of."""
    return tuple(map(math.prod, zip(*strides, strict=True)))
