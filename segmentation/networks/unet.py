"""UNet of any depth and widths: Ronneberger et al. 2015, arXiv:1505.04597, with padding and normalisation.

Layer names are those of the basic_UNet pruning system (encoders, bottleneck, decoders with the transposed convolutions
at even places, final_conv; the skip stands first in each concatenation), so that its weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.networks.parts import conv, fitted

if TYPE_CHECKING:
    from segmentation.networks import Network


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return a UNet of the configured widths, or of `depth` levels that double from `base`."""
    *widths, bottleneck = level_widths(config)
    return UNet(
        in_channels,
        classes,
        widths,
        bottleneck,
        decoder_widths=config.decoder_widths,
        norm=config.norm,
        dropout=config.dropout,
    )


def level_widths(config: Network) -> list[int]:
    """Return the channels of each level, finest first, and of the bottleneck."""
    widths = config.widths or tuple(config.base * 2**level for level in range(config.depth))
    return [*widths, config.bottleneck or 2 * widths[-1]]


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with normalisation and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        layers = [*conv(in_channels, out_channels, norm), *conv(out_channels, out_channels, norm)]
        self.net = nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, out_channels, H, W)."""
        features = self.net(features)
        return features


class UNet(nn.Module):
    """An encoder that halves the resolution after each level, and a decoder that doubles it again.

    decoder_widths: channels of the decoder's levels, coarsest first; empty: those of the encoder's.
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
    ) -> None:
        super().__init__()
        decoder_widths = tuple(decoder_widths) or tuple(reversed(widths))
        if len(decoder_widths) != len(widths):
            raise ValueError(
                f"decoder_widths: got {list(decoder_widths)}; expected {len(widths)} widths, one for each level above "
                "the bottleneck"
            )
        inputs = [in_channels, *widths]
        self.encoders = nn.ModuleList(DoubleConv(inputs[i], width, norm) for i, width in enumerate(widths))
        self.bottleneck = DoubleConv(widths[-1], bottleneck, norm)
        self.decoders = nn.ModuleList()
        below = bottleneck
        for skip, width in zip(reversed(widths), decoder_widths, strict=True):
            self.decoders.append(nn.ConvTranspose2d(below, width, 2, stride=2))
            self.decoders.append(DoubleConv(skip + width, width, norm, dropout))
            below = width
        self.final_conv = nn.Conv2d(below, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size."""
        return fitted(self._logits, image, 2 ** len(self.encoders))

    def _logits(self, image: Tensor) -> Tensor:
        features, skips = image, []
        for encoder in self.encoders:
            skips.append(encoder(features))
            features = F.max_pool2d(skips[-1], 2)
        features = self.bottleneck(features)
        for index, skip in enumerate(reversed(skips)):
            up, block = self.decoders[2 * index], self.decoders[2 * index + 1]
            features = block(torch.cat([skip, up(features)], 1))
        logits: Tensor = self.final_conv(features)
        return logits
