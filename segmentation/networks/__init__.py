"""Networks that turn an image (B, C, H, W) of any size into logits (B, K, H, W), found by their name.

Those of `VOLUMETRIC` do the same with volumes, which travel as tall images: see `volume`.

One module a family, with a function `build(config, in_channels, classes)`, which takes `slices` too in volumetric ones.
A new family is one more module, one more entry in `NETWORKS` and one more name in `Network.name`; the contract test
finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from segmentation.networks import attention_unet, smp, timm_unet, tinyunet, unet, unet3plus, unetplusplus
from segmentation.networks.volume import Volumes

VOLUMETRIC = ("unet", "attention_unet", "unetplusplus")
"""Networks that come for volumes too."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which network, and how large."""

    name: Literal[
        "tinyunet",
        "unet",
        "attention_unet",
        "unetplusplus",
        "timm_unet",
        "unet3plus",
        "unet3plus_simplified",
        "smp_unet",
        "smp_unetplusplus",
    ] = "unet"
    """Family: tinyunet (two resolutions below the image), unet (any depth) and its kinds, attention_unet
    (gates on its skips) and unetplusplus (nodes on its skips), timm_unet (a timm encoder), unet3plus (a timm encoder,
    and skips between all scales), unet3plus_simplified (a timm encoder, and decoder levels fused), smp_unet and
    smp_unetplusplus (those of segmentation-models-pytorch on a timm encoder)."""
    dims: Literal[2, 3] = 2
    """3: a network of volumes, for workloads that have some (unet and its kinds)."""
    base: int = 32
    """Channels at full resolution; they double at each level (tinyunet; unet, its kinds and encoder plain, without
    widths)."""
    depth: int = 4
    """Levels above the bottleneck (unet, its kinds and encoder plain, without widths)."""
    widths: tuple[int, ...] = ()
    """Channels of each level, finest first, instead of base and depth (unet and its kinds, encoder plain)."""
    bottleneck: int = 0
    """Channels of the bottleneck; 0: twice those of the level above it (unet and its kinds, encoder plain)."""
    norm: Literal["batch", "group", "instance", "none"] = "batch"
    """Normalisation after each convolution (unet and its kinds, encoder plain, and the decoders of the others but
    tinyunet)."""
    dropout: float = 0.0
    """Probability that a channel of a decoder level is dropped in training."""
    encoder: str = "resnet18"
    """Any timm model with features_only (timm_unet, unet3plus), or plain: that of a unet (unet3plus)."""
    encoder_levels: int = 0
    """How many of the encoder's levels are used, finest first; 0: all (timm encoders)."""
    decoder_widths: tuple[int, ...] = ()
    """Channels of the decoder's levels, coarsest first. Empty: those of the encoder's levels (unet,
    attention_unet); 256, 128, 64, 32, 16 cut to fit (timm_unet)."""
    pretrained: bool = False
    """Start the encoder from timm's published weights, downloaded once (timm encoders)."""
    weights_path: str | None = None
    """Start the encoder from this file of timm weights instead: .safetensors, .bin or .pth; under another program's
    names they are taken in order, if all shapes fit (timm encoders)."""
    freeze_encoder: bool = False
    """Train the decoder alone; the encoder's weights and batch-norm statistics stay (timm_unet, unet3plus)."""
    cat_channels: int = 64
    """Channels that each scale gives a decoder level; those of the level are their sum (unet3plus)."""
    attention: Literal["none", "scse"] = "none"
    """Attention in the decoder: scse weighs channels and places (smp_unet, smp_unetplusplus)."""
    deep_supervision: bool = False
    """In training, logits of every decoder level, scored with loss.aux_weight (unet3plus, unetplusplus,
    smp_unetplusplus)."""
    guided: bool = False
    """Learn which classes an image has, scored with loss.presence, and leave out the others (unet3plus)."""

    def __post_init__(self) -> None:
        for name in ("base", "depth", "cat_channels"):
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
        if self.dims == 3 and self.name not in VOLUMETRIC:
            raise ValueError(f"dims: got 3 for {self.name}; write 2, or a network of {', '.join(VOLUMETRIC)}")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "tinyunet": tinyunet.build,
    "unet": unet.build,
    "attention_unet": attention_unet.build,
    "unetplusplus": unetplusplus.build,
    "timm_unet": timm_unet.build,
    "unet3plus": unet3plus.build,
    "unet3plus_simplified": unet3plus.build_simplified,
    "smp_unet": smp.build,
    "smp_unetplusplus": smp.build_plusplus,
}


def build(config: Network, in_channels: int, classes: int, *, slices: int = 0) -> nn.Module:
    """Return the network with freshly drawn weights (or an encoder's published ones), on the CPU.

    slices: of the volumes that it shall see (dims 3), which it then takes as tall images; 0: it sees images.

    Raises:
        ValueError: for a network of images where there are volumes, and the other way round.
        ValueError: for an encoder that timm lacks, or that has too few levels.
        DataError: where pretrained weights are asked for and cannot be had.
    """
    if (config.dims == 3) != (slices > 0):
        there, wanted = ("volumes", 3) if slices else ("images", 2)
        raise ValueError(f"dims: got {config.dims}, but the samples here are {there}; write {wanted}")
    if not slices:
        return NETWORKS[config.name](config, in_channels, classes)
    return Volumes(NETWORKS[config.name](config, in_channels, classes, slices=slices), slices)


def without_weights(config: Network) -> Network:
    """Return the same network without its pretrained start, for weights that come from a checkpoint."""
    return replace(config, pretrained=False, weights_path=None)


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers the network learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
