"""Networks that turn an image (B, C, H, W) of any size into logits (B, K, H, W), found by their name.

One module a family, each with `build(config, in_channels, classes)`. A new family is one more module, one more
entry in `NETWORKS` and one more name in `Network.name`; the contract test finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from segmentation.networks import timm_unet, tinyunet, unet


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which network, and how large."""

    name: Literal["tinyunet", "unet", "timm_unet"] = "unet"
    """Family: tinyunet (two resolutions below the image), unet (any depth), timm_unet (a timm encoder)."""
    base: int = 32
    """Channels at full resolution; they double at each level (tinyunet, and unet without widths)."""
    depth: int = 4
    """Levels above the bottleneck (unet without widths)."""
    widths: tuple[int, ...] = ()
    """Channels of each level, finest first, instead of base and depth (unet)."""
    bottleneck: int = 0
    """Channels of the bottleneck; 0: twice those of the level above it (unet)."""
    norm: Literal["batch", "group", "instance", "none"] = "batch"
    """Normalisation after each convolution (unet, and the decoder of timm_unet)."""
    dropout: float = 0.0
    """Probability that a channel of a decoder level is dropped in training."""
    encoder: str = "resnet18"
    """Any timm model with features_only (timm_unet)."""
    encoder_levels: int = 0
    """How many of the encoder's levels are used, finest first; 0: all (timm_unet)."""
    decoder_widths: tuple[int, ...] = ()
    """Channels of the decoder's levels, coarsest first; empty: 256, 128, 64, 32, 16 cut to fit (timm_unet)."""
    pretrained: bool = False
    """Start the encoder from timm's published weights, downloaded once (timm_unet)."""
    weights_path: str | None = None
    """Start the encoder from this file of timm weights instead: .safetensors, .bin or .pth (timm_unet)."""

    def __post_init__(self) -> None:
        for name in ("base", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        for name in ("bottleneck", "encoder_levels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected 0 or more")
        for name in ("widths", "decoder_widths"):
            if any(width < 1 for width in getattr(self, name)):
                raise ValueError(f"{name}: got {list(getattr(self, name))}; expected channels of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected 0 or more, and less than 1")


NETWORKS: dict[str, Callable[[Network, int, int], nn.Module]] = {
    "tinyunet": tinyunet.build,
    "unet": unet.build,
    "timm_unet": timm_unet.build,
}


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the network with freshly drawn weights (or an encoder's published ones), on the CPU.

    Raises:
        ValueError: for an encoder that timm lacks, or that has too few levels.
        DataError: where pretrained weights are asked for and cannot be had.
    """
    return NETWORKS[config.name](config, in_channels, classes)


def without_weights(config: Network) -> Network:
    """Return the same network without its pretrained start, for weights that come from a checkpoint."""
    return replace(config, pretrained=False, weights_path=None)


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers the network learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
