"""What the networks have in common: convolution blocks, normalisation, and sizes that do not divide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.outputs import Outputs

Output = TypeVar("Output", Tensor, Outputs, Tensor | Outputs)


class EncoderNetwork(nn.Module):
    """A network on an encoder with `feature_info`, which may be frozen."""

    def __init__(self, encoder: nn.Module, frozen: bool) -> None:
        super().__init__()
        info: Any = encoder.feature_info
        self.strides: list[int] = info.reduction()
        self.frozen = self.always_frozen = frozen
        self.idle = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
        """What never learns of the encoder. By name: some strategies put parameters of their own in these places."""
        self.encoder = encoder
        self.rest(frozen)

    def rest(self, resting: bool) -> None:
        """Freeze the encoder, or let it learn again; one that was built frozen stays so."""
        self.frozen = resting or self.always_frozen
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(not self.frozen and name not in self.idle)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder stays in evaluation, where batch norm keeps its statistics."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def conv(in_channels: int, out_channels: int, norm: str = "batch") -> list[nn.Module]:
    """Return the layers of a 3x3 convolution with normalisation and ReLU; a bias only where nothing normalises."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none"),
        normalisation(norm, out_channels),
        nn.ReLU(inplace=True),
    ]


def normalisation(name: str, channels: int) -> nn.Module:
    """Return the normalisation layer; group takes as many groups as divide the channels, 8 at the most."""
    if name == "none":
        return nn.Identity()
    if name == "group":
        return nn.GroupNorm(max(count for count in range(1, 9) if channels % count == 0), channels)
    if name == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels)


def fitted(forward: Callable[[Tensor], Output], image: Tensor, multiple: int) -> Output:
    """Run a network on an image padded at its right and lower edge, and cut the padding off the logits.

    image: (B, C, H, W); the edge is repeated until both sides are a multiple of `multiple`, and twice it at
        least: a bottleneck of one pixel has no variance to normalise by.
    """
    height, width = image.shape[-2:]
    down, right = _missing(height, multiple), _missing(width, multiple)
    # A graph that is being exported is for every size: it always pads, perhaps by nothing.
    if not (torch.compiler.is_exporting() or down or right):
        return forward(image)
    padded = F.pad(image, (0, right, 0, down), mode="replicate")
    output = forward(padded)
    return output.cropped(height, width) if isinstance(output, Outputs) else output[..., :height, :width]


def _missing(size: int, multiple: int) -> int:
    # sym_max, and the multiple before it: an exporter, for which sizes are symbols, can then divide the sum.
    parts: Any = torch.sym_max(2, (size + multiple - 1) // multiple)
    return multiple * parts - size  # type: ignore[no-any-return]
