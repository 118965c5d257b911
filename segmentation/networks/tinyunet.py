"""TinyUNet: two resolutions below the image, one convolution where a UNet has two.

The names and the order of its layers are those of the ACT glitch-segmentation notebooks, so that their weights load.
Architecture after Ronneberger et al. 2015, arXiv:1505.04597.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from segmentation.networks.parts import conv, fitted

if TYPE_CHECKING:
    from segmentation.networks import Network


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return a TinyUNet of the configured base width and dropout."""
    return TinyUNet(in_channels, classes, config.base, config.dropout)


class TinyUNet(nn.Module):
    """The network of 235,683 parameters, for one channel, three classes and base 32."""

    def __init__(self, in_channels: int = 1, classes: int = 3, base: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(_block(in_channels, base), _block(base, base))
        self.enc2 = nn.Sequential(nn.MaxPool2d(2), _block(base, 2 * base))
        self.bott = nn.Sequential(nn.MaxPool2d(2), _block(2 * base, 4 * base))
        self.up1 = nn.ConvTranspose2d(4 * base, 2 * base, 2, stride=2)
        self.dec1 = nn.Sequential(_block(4 * base, 2 * base), nn.Dropout2d(dropout))
        self.up2 = nn.ConvTranspose2d(2 * base, base, 2, stride=2)
        self.dec2 = nn.Sequential(_block(2 * base, base), nn.Dropout2d(dropout))
        self.outc = nn.Conv2d(base, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size."""
        return fitted(self._logits, image, 4)

    def _logits(self, image: Tensor) -> Tensor:
        fine = self.enc1(image)
        middle = self.enc2(fine)
        coarse = self.bott(middle)
        middle = self.dec1(torch.cat([self.up1(coarse), middle], 1))
        fine = self.dec2(torch.cat([self.up2(middle), fine], 1))
        logits: Tensor = self.outc(fine)
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*conv(in_channels, out_channels))
