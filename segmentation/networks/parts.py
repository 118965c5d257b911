"""What the networks have in common: convolution blocks, normalisation, and sizes that do not divide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.outputs import Outputs, cropped

Output = TypeVar("Output", Tensor, Outputs, Tensor | Outputs)


@dataclass(frozen=True)
class Layers:
    """The layers that differ between images and volumes."""

    conv: type[nn.Module]
    transposed: type[nn.Module]
    batch_norm: type[nn.Module]
    instance_norm: type[nn.Module]
    dropout: type[nn.Module]
    max_pool: Callable[..., Tensor]
    interpolation: str


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Dropout2d, F.max_pool2d, "bilinear"),
    3: Layers(
        nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d, nn.Dropout3d, F.max_pool3d, "trilinear"
    ),
}
"""By the number of dimensions: of images (B, C, H, W) and of volumes (B, C, D, H, W)."""


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


def conv(in_channels: int, out_channels: int, norm: str = "batch", dims: int = 2) -> list[nn.Module]:
    """Return the layers of a convolution 3 wide with normalisation and ReLU; a bias only where nothing normalises."""
    return [
        LAYERS[dims].conv(in_channels, out_channels, 3, padding=1, bias=norm == "none"),
        normalisation(norm, out_channels, dims),
        nn.ReLU(inplace=True),
    ]


def normalisation(name: str, channels: int, dims: int = 2) -> nn.Module:
    """Return the normalisation layer; group takes as many groups as divide the channels, 8 at the most."""
    if name == "none":
        return nn.Identity()
    if name == "group":
        return nn.GroupNorm(max(count for count in range(1, 9) if channels % count == 0), channels)
    if name == "instance":
        return LAYERS[dims].instance_norm(channels, affine=True)
    return LAYERS[dims].batch_norm(channels)


def fitted(forward: Callable[[Tensor], Output], image: Tensor, multiple: int | Sequence[int]) -> Output:
    """Run a network on an image padded at the end of each side, and cut the padding off the logits.

    image: (B, C, H, W) or (B, C, D, H, W); the edge is repeated until every side is a multiple of `multiple`, and
        height and width twice it at least: a bottleneck of one pixel has no variance to normalise by.
    multiple: one for all sides, or one for each.
    """
    size = tuple(image.shape[2:])
    sides: tuple[int, ...] = (multiple,) * len(size) if isinstance(multiple, int) else tuple(multiple)
    least = (*(1 for _ in sides[:-2]), 2, 2)
    missing = [_missing(*each) for each in zip(size, sides, least, strict=True)]
    # A graph that is being exported is for every size: it always pads, perhaps by nothing.
    if not (torch.compiler.is_exporting() or any(missing)):
        return forward(image)
    pads = [pad for each in reversed(missing) for pad in (0, each)]  # the last side first
    output = forward(F.pad(image, pads, mode="replicate"))
    return output.cropped(size) if isinstance(output, Outputs) else cropped(output, size)


def _missing(size: int, multiple: int, least: int) -> int:
    # sym_max, and the multiple before it: an exporter, for which sizes are symbols, can then divide the sum.
    parts: Any = torch.sym_max(least, (size + multiple - 1) // multiple)
    return multiple * parts - size  # type: ignore[no-any-return]
