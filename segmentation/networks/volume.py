"""Volumes on the way of images.

A volume (C, D, H, W) travels as one tall image (C, D * H, W), its slices below each other, and its mask (D, H, W) as
(D * H, W): whatever is counted, lost or weighed pixel by pixel is the same in both forms. Only the network takes it
apart.
"""

from __future__ import annotations

from torch import Tensor, nn

from segmentation.outputs import Outputs


class Volumes(nn.Module):
    """A network of volumes for tall images, all of so many slices."""

    def __init__(self, network: nn.Module, slices: int) -> None:
        super().__init__()
        self.network, self.slices = network, slices

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Return logits (B, K, D * H, W), or Outputs of such, of volumes (B, C, D * H, W)."""
        output = self.network(to_volume(image, self.slices))
        if not isinstance(output, Outputs):
            return to_image(output)
        return Outputs(to_image(output.logits), tuple(map(to_image, output.auxiliary)), output.presence)


def to_image(volume: Tensor) -> Tensor:
    """Return (..., D * H, W) of (..., D, H, W)."""
    return volume.flatten(-3, -2)


def to_volume(image: Tensor, slices: int) -> Tensor:
    """Return (..., D, H, W) of (..., D * H, W).

    Raises:
        ValueError: if the height is no multiple of the slices.
    """
    if image.shape[-2] % slices:
        raise ValueError(f"image: got height {image.shape[-2]}; expected a multiple of its {slices} slices")
    return image.reshape(*image.shape[:-2], slices, -1, image.shape[-1])
