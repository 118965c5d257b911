"""UNet++: Zhou et al. 2018, arXiv:1807.10165. Between encoder and decoder of a UNet, nodes that reduce their distance.

Node (i, j) is at level i, finest first, and the j-th from the left; (i, 0) are the encoder's. It reads all nodes to its
left at its level, and the one below them enlarged: X[i][j] = net(cat(X[i][0], ..., X[i][j - 1], up(X[i + 1][j - 1]))).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from segmentation.networks.parts import LAYERS, fitted
from segmentation.networks.unet import DoubleConv, level_widths, multiples, strides
from segmentation.outputs import Outputs

if TYPE_CHECKING:
    from segmentation.networks import Network


def build(config: Network, in_channels: int, classes: int, *, slices: int = 0) -> nn.Module:
    """Return a UNet++ of the configured widths, or of `depth` levels that double from `base`.

    slices: of the volumes that it is for; 0: it is for images.
    """
    widths = level_widths(config)
    return UNetPlusPlus(
        in_channels,
        classes,
        widths,
        norm=config.norm,
        dropout=config.dropout,
        deep_supervision=config.deep_supervision,
        strides=strides(len(widths) - 1, slices),
    )


class UNetPlusPlus(nn.Module):
    """The nodes, and a head on the last of the finest level; with deep supervision, in training, on all of them.

    widths: channels of the nodes of each level, finest first, the bottleneck's last.
    strides: as those of a UNet.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[int],
        *,
        norm: str = "batch",
        dropout: float = 0.0,
        deep_supervision: bool = False,
        strides: Sequence[tuple[int, ...]] = (),
    ) -> None:
        super().__init__()
        count = len(widths) - 1
        self.strides = tuple(strides) or ((2, 2),) * count
        self.dims = len(self.strides[0])
        layers, inputs = LAYERS[self.dims], [in_channels, *widths]
        self.encoders = nn.ModuleList(
            DoubleConv(inputs[i], width, norm, dims=self.dims) for i, width in enumerate(widths)
        )
        self.ups = nn.ModuleList(
            nn.ModuleList(
                layers.transposed(widths[i + 1], widths[i], self.strides[i], stride=self.strides[i])
                for _ in range(count - i)
            )
            for i in range(count)
        )
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                DoubleConv((j + 1) * widths[i], widths[i], norm, dropout, self.dims) for j in range(1, count - i + 1)
            )
            for i in range(count)
        )
        self.final_conv = layers.conv(widths[0], classes, 1)
        # Last, so that the weights drawn before do not depend on whether these are there.
        sides = count - 1 if deep_supervision else 0
        self.side_heads = nn.ModuleList(layers.conv(widths[0], classes, 1) for _ in range(sides))

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size; Outputs in training, if there is more."""
        return fitted(self._logits, image, multiples(self.strides))

    def _logits(self, image: Tensor) -> Tensor | Outputs:
        features, rows = image, []
        for encoder, stride in zip(self.encoders, (*self.strides, None), strict=True):
            rows.append([encoder(features)])
            features = rows[-1][0] if stride is None else LAYERS[self.dims].max_pool(rows[-1][0], stride)
        for j in range(1, len(rows)):
            for i in range(len(rows) - j):
                up, node = self.ups[i][j - 1], self.nodes[i][j - 1]  # type: ignore[index]
                rows[i].append(node(torch.cat([*rows[i], up(rows[i + 1][j - 1])], 1)))
        *sides, last = rows[0][1:]
        logits: Tensor = self.final_conv(last)
        if not (self.training and self.side_heads):
            return logits
        # The more nodes are behind one, the finer it is: those come first.
        pairs = zip(self.side_heads, reversed(sides), strict=True)
        return Outputs(logits, tuple(head(side) for head, side in pairs))
