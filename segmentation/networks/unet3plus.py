"""UNet 3+ on a timm encoder or on its own: Huang et al. 2020, arXiv:2004.08790.

unet3plus is the paper's network. A decoder level reads all scales, one branch each: the encoder's levels that are finer
or as fine, and the decoder's levels that are coarser, whose coarsest is the encoder's last level.
unet3plus_simplified is a plain UNet decoder whose levels are brought to the finest one's size and fused at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.networks.parts import EncoderNetwork, conv, fitted
from segmentation.networks.timm_unet import build_encoder
from segmentation.networks.unet import DoubleConv, level_widths
from segmentation.outputs import Outputs

if TYPE_CHECKING:
    from segmentation.networks import Network

PLAIN = "plain"
# How far the logits of a class that is not there are put below all others; finite, so that a loss stays finite.
GATE = 30.0


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the paper's network."""
    return _build(config, in_channels, classes, FullScaleDecoder)


def build_simplified(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the network with a UNet decoder and the fusion of its levels."""
    return _build(config, in_channels, classes, FusingDecoder)


def _build(
    config: Network, in_channels: int, classes: int, decoder: type[FullScaleDecoder] | type[FusingDecoder]
) -> nn.Module:
    encoder = PlainEncoder(config, in_channels) if config.encoder == PLAIN else build_encoder(config, in_channels)
    info: Any = encoder.feature_info
    if len(info.channels()) < 2:
        raise ValueError(f"encoder: {config.encoder!r} is used at one level; expected 2 or more, see encoder_levels")
    return UNet3Plus(
        encoder,
        decoder(info.channels(), info.reduction(), config),
        classes,
        deep_supervision=config.deep_supervision,
        guided=config.guided,
        frozen=config.freeze_encoder,
    )


class UNet3Plus(EncoderNetwork):
    """An encoder, a decoder that reads all of its levels, and heads."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: FullScaleDecoder | FusingDecoder,
        classes: int,
        *,
        deep_supervision: bool = False,
        guided: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(encoder, frozen)
        info: Any = encoder.feature_info
        self.decoder = decoder
        self.head = nn.Conv2d(decoder.width, classes, 3, padding=1)
        # Last, so that the weights drawn before do not depend on whether these are there.
        sides = decoder.side_channels if deep_supervision else ()
        self.side_heads = nn.ModuleList(nn.Conv2d(channels, classes, 3, padding=1) for channels in sides)
        self.presence = PresenceHead(info.channels()[-1], classes) if guided else None

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size; Outputs in training, if there is more."""
        return fitted(self._logits, image, self.strides[-1])

    def _logits(self, image: Tensor) -> Tensor | Outputs:
        features = self.encoder(image)
        final, sides = self.decoder(features)
        logits = _enlarged(_single(self.head(final)), image)
        presence = None if self.presence is None else _single(self.presence(features[-1]))
        if not self.training:
            return logits if presence is None else gated(logits, presence)
        pairs = zip(self.side_heads, sides, strict=True) if self.side_heads else ()
        auxiliary = tuple(_enlarged(_single(head(side)), image) for head, side in pairs)
        return Outputs(logits, auxiliary, presence) if auxiliary or presence is not None else logits


class FullScaleDecoder(nn.Module):
    """Levels that read every scale: finer ones pooled, coarser ones enlarged, each by a convolution of its own."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: Network) -> None:
        super().__init__()
        count = len(channels)
        self.width = config.cat_channels * count
        self.side_channels = (*[self.width] * (count - 2), channels[-1])
        """Channels of the levels below the finest, finest first; the last one is the encoder's."""
        self.levels = nn.ModuleList(
            FullScaleLevel([*channels[: at + 1], *[self.width] * (count - at - 2), channels[-1]], strides, at, config)
            for at in range(count - 1)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the finest level's map and those of the others, finest first."""
        maps = [features[-1]]
        for at in reversed(range(len(self.levels))):
            maps.insert(0, self.levels[at](*features[: at + 1], *maps))
        return maps[0], maps[1:]


class FullScaleLevel(nn.Module):
    """One branch for each scale, concatenated and convolved."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], at: int, config: Network) -> None:
        super().__init__()
        self.at = at
        self.ratios = [strides[at] // stride for stride in strides[:at]]
        self.branches = nn.ModuleList(
            nn.Sequential(*conv(inputs, config.cat_channels, config.norm)) for inputs in channels
        )
        width = config.cat_channels * len(channels)
        self.fuse = nn.Sequential(*conv(width, width, config.norm), *_dropout(config))

    def forward(self, *maps: Tensor) -> Tensor:
        """Return (B, width, H, W) from the maps of all scales, finest first, at the size of its own scale's."""
        same = maps[self.at]
        finer = [F.max_pool2d(each, ratio) for each, ratio in zip(maps, self.ratios, strict=False)]
        coarser = [_enlarged(each, same) for each in maps[self.at + 1 :]]
        scaled = [*finer, same, *coarser]
        found = [branch(each) for branch, each in zip(self.branches, scaled, strict=True)]
        fused: Tensor = self.fuse(torch.cat(found, 1))
        return fused


class FusingDecoder(nn.Module):
    """A UNet decoder of one width, and a fusion of its levels at the finest one's size."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: Network) -> None:
        super().__init__()
        count = len(channels)
        self.width = config.cat_channels * count
        self.side_channels = (self.width,) * (count - 1)
        """Channels of all levels, finest first; their fusion comes after them."""
        below = [*[self.width] * (count - 2), channels[-1]]
        self.levels = nn.ModuleList(UpLevel(below[at], channels[at], self.width, config) for at in range(count - 1))
        self.reduce = nn.ModuleList(nn.Conv2d(self.width, config.cat_channels, 1) for _ in range(count - 1))
        self.fuse = nn.Sequential(*conv(config.cat_channels * (count - 1), self.width, config.norm))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the fused map and those of all levels, finest first."""
        maps: list[Tensor] = []
        deeper = features[-1]
        for at in reversed(range(len(self.levels))):
            deeper = self.levels[at](deeper, features[at])
            maps.insert(0, deeper)
        reduced = [_enlarged(layer(each), maps[0]) for layer, each in zip(self.reduce, maps, strict=True)]
        return self.fuse(torch.cat(reduced, 1)), maps


class UpLevel(nn.Module):
    """Enlarge, convolve, concatenate the encoder's map, convolve twice."""

    def __init__(self, below: int, skip: int, width: int, config: Network) -> None:
        super().__init__()
        self.up = nn.Sequential(*conv(below, width, config.norm))
        self.net = DoubleConv(width + skip, width, config.norm, config.dropout)

    def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Return (B, width, H, W) of the skip's height and width."""
        found: Tensor = self.net(torch.cat([self.up(_enlarged(deeper, skip)), skip], 1))
        return found


class PresenceHead(nn.Module):
    """Which classes occur in the image, told from the encoder's last level."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv2d(channels, classes, 1)
        # Every class counts as there until learned otherwise: an early epoch is not scored on empty masks.
        nn.init.constant_(self.conv.bias, 2.0)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of features (B, C, H, W)."""
        logits: Tensor = self.conv(self.dropout(features)).amax((2, 3))
        return logits


class PlainEncoder(nn.Module):
    """The encoder of a UNet: levels of two convolutions, halved in between, the bottleneck as its last level."""

    def __init__(self, config: Network, in_channels: int) -> None:
        super().__init__()
        widths = level_widths(config)
        self.feature_info = FeatureInfo(widths)
        inputs = [in_channels, *widths]
        self.levels = nn.ModuleList(DoubleConv(inputs[at], width, config.norm) for at, width in enumerate(widths))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the map of each level, finest first."""
        maps = [self.levels[0](image)]
        for level in self.levels[1:]:
            maps.append(level(F.max_pool2d(maps[-1], 2)))
        return maps


class FeatureInfo:
    """What timm's encoders tell of their levels, for one that halves at each."""

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = list(widths)

    def channels(self) -> list[int]:
        """Return the channels of each level, finest first."""
        return list(self._widths)

    def reduction(self) -> list[int]:
        """Return the stride of each level."""
        return [2**at for at in range(len(self._widths))]


def gated(logits: Tensor, presence: Tensor) -> Tensor:
    """Put the logits (B, K, H, W) of classes less likely there than not, (B, K), below all others.

    Where no class is there all are equal: softmax's argmax is class 0, and no sigmoid is above 1/2.
    """
    floor = logits.amin(1, keepdim=True).clamp(max=0) - GATE
    return torch.where((presence < 0)[:, :, None, None], floor, logits)


def _enlarged(maps: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear")


def _single(logits: Tensor) -> Tensor:
    """Return logits of half precision, as autocast makes them, in single."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _dropout(config: Network) -> list[nn.Module]:
    return [nn.Dropout2d(config.dropout)] if config.dropout else []
