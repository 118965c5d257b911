"""A UNet decoder on any timm encoder that gives feature maps.

Channels and strides are read from the encoder's feature_info. Wightman 2019, PyTorch Image Models; the decoder after
Ronneberger et al. 2015, arXiv:1505.04597.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation import checkpoints
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.networks.parts import EncoderNetwork, conv, fitted

if TYPE_CHECKING:
    from segmentation.networks import Network

DECODER_WIDTHS = (256, 128, 64, 32, 16)
PROBE = 64
"""Side of an image that any encoder takes, unless it takes one side only."""


def build(config: Network, in_channels: int, classes: int) -> nn.Module:
    """Return the configured encoder with a decoder on it."""
    encoder = build_encoder(config, in_channels)
    return TimmUNet(
        encoder,
        in_channels,
        classes,
        config.decoder_widths,
        norm=config.norm,
        dropout=config.dropout,
        frozen=config.freeze_encoder,
    )


class TimmUNet(EncoderNetwork):
    """A timm encoder, and a decoder that doubles the resolution up to that of the image."""

    def __init__(
        self,
        encoder: nn.Module,
        in_channels: int,
        classes: int,
        decoder_widths: Sequence[int] = (),
        *,
        norm: str = "batch",
        dropout: float = 0.0,
        frozen: bool = False,
    ) -> None:
        super().__init__(encoder, frozen)
        info: Any = encoder.feature_info
        skips = [*info.channels()[-2::-1], in_channels]  # coarsest first; the image itself is the last skip
        widths = tuple(decoder_widths) or DECODER_WIDTHS[-len(skips) :]
        if len(widths) != len(skips):
            raise ValueError(f"decoder_widths: got {list(widths)}; expected {len(skips)} widths for this encoder")
        inputs = [info.channels()[-1], *widths]
        self.decoder = nn.ModuleList(
            DecoderBlock(inputs[i] + skip, width, norm, dropout)
            for i, (skip, width) in enumerate(zip(skips, widths, strict=True))
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of an image (B, C, H, W) of any size."""
        return fitted(self._logits, image, self.strides[-1])

    def _logits(self, image: Tensor) -> Tensor:
        *skips, features = self.encoder(image)
        for block, skip in zip(self.decoder, [*reversed(skips), image], strict=True):
            features = block(features, skip)
        logits: Tensor = self.head(features)
        return logits


class DecoderBlock(nn.Module):
    """Enlarge to the skip's size, concatenate, convolve twice."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, dropout: float) -> None:
        super().__init__()
        layers = [*conv(in_channels, out_channels, norm), *conv(out_channels, out_channels, norm)]
        self.net = nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Return (B, out_channels, H, W) of the skip's height and width."""
        features = F.interpolate(features, size=skip.shape[-2:], mode="nearest")
        features = self.net(torch.cat([features, skip], 1))
        return features


def build_encoder(config: Network, in_channels: int) -> nn.Module:
    """Return timm's encoder with its weights: fresh, published, or those of a file.

    Raises:
        ValueError: for a name that timm lacks, or an encoder that gives no feature maps.
        DataError: where asked-for weights cannot be had; never fresh ones instead.
    """
    if config.weights_path is not None and not Path(config.weights_path).is_file():
        raise DataError(
            f"weights_path: no file {config.weights_path}; give the timm weights of {config.encoder}, or set "
            "weights_path=null and pretrained=true to download them, or pretrained=false to start without"
        )
    if not (config.pretrained or config.weights_path):
        return _create(config, in_channels)
    with torch.random.fork_rng(devices=[]):
        fresh = _create(config, in_channels)
    loaded = _create_pretrained(config, in_channels)
    _refuse_fresh(fresh, loaded, config)
    return loaded


def _timm(encoder: str) -> Any:
    try:
        import timm  # here, because it takes seconds that the other networks need not pay
    except ModuleNotFoundError as error:
        raise ValueError(
            f"encoder: {encoder!r} is one of timm, which is not installed; pip install timm, or take another network"
        ) from error
    return timm


def _create(config: Network, in_channels: int, **weights: Any) -> nn.Module:
    check_name(config.encoder)
    try:
        encoder = _features(config.encoder, config.encoder_levels, in_channels, **weights)
    except (AssertionError, IndexError, AttributeError, TypeError) as error:
        if weights:
            raise
        asked = f" at {config.encoder_levels} levels" if config.encoder_levels else ""
        raise ValueError(
            f"encoder: {config.encoder!r} gives no feature maps{asked} ({error}); "
            "choose fewer encoder_levels or another encoder, such as resnet18 or convnext_tiny"
        ) from error
    for name in _idle(config.encoder, config.encoder_levels, in_channels) if config.encoder_levels else ():
        encoder.get_parameter(name).requires_grad_(False)
    return encoder


def _features(name: str, levels: int, in_channels: int, **weights: Any) -> nn.Module:
    """Return timm's encoder with its first levels; 0: all."""
    chosen: dict[str, Any] = {"out_indices": tuple(range(levels))} if levels else {}
    encoder: nn.Module = _timm(name).create_model(name, features_only=True, in_chans=in_channels, **chosen, **weights)
    if levels:
        _cut(encoder)
    return encoder


def _cut(encoder: Any) -> None:
    """Take off the stages after the last that is asked for, where timm computes them all the same."""
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if isinstance(encoder, EfficientNetFeatures | MobileNetV3Features) and encoder.feature_hooks is None:
        encoder.blocks = encoder.blocks[: max(encoder._stage_out_idx)]


@functools.cache
def _idle(name: str, levels: int, in_channels: int) -> tuple[str, ...]:
    """Return the weights that no feature map depends on: several processes would wait for their gradients."""
    with torch.device("meta"):
        encoder: Any = _features(name, levels, in_channels).eval()
        published = getattr(encoder, "pretrained_cfg", {})
        side = published["input_size"][-1] if published.get("fixed_input_size") else PROBE
        maps = encoder(torch.zeros(1, in_channels, side, side))
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(sum(found.sum() for found in maps), parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _create_pretrained(config: Network, in_channels: int) -> nn.Module:
    try:
        overlay = {"pretrained_cfg_overlay": _file_weights(config)} if config.weights_path else {}
        with _quiet():
            return _create(config, in_channels, pretrained=True, **overlay)
    except Exception as error:  # timm, its hub client and torch raise many kinds; each means: no weights
        source = f"the file {config.weights_path}" if config.weights_path else "its published source"
        raise DataError(
            f"pretrained weights of {config.encoder!r} cannot be loaded from {source} "
            f"({type(error).__name__}: {_first_lines(error)}); set weights_path "
            "to a file of timm weights for this encoder, or pretrained=false to start without"
        ) from error


def _file_weights(config: Network) -> dict[str, Any]:
    """Return where timm takes the weights of a file from: the file, or those in it under timm's names.

    A file that shares no name with timm's network is one of another program: its tensors are paired in order. One that
    does not pair may still be of a form that timm knows; `_refuse_fresh` finds out.
    """
    weights, own = _read(config), _names(config)
    if own.keys().isdisjoint(weights):
        with contextlib.suppress(CheckpointError):
            return {"state_dict": checkpoints.paired(own, weights, source=str(config.weights_path))}
    return {"file": config.weights_path}


def _read(config: Network) -> dict[str, Tensor]:
    found: dict[str, Tensor] = _timm(config.encoder).models.load_state_dict(str(config.weights_path))
    return found


def _names(config: Network) -> dict[str, Tensor]:
    """Return the tensors, their values apart, of the whole network that timm publishes weights of."""
    timm = _timm(config.encoder)
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(config.encoder).state_dict()
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep timm from listing the tensors of the head, which no encoder has; `_refuse_fresh` tells what matters."""
    builder = logging.getLogger("timm.models._builder")
    before = builder.level
    builder.setLevel(logging.ERROR)
    try:
        yield
    finally:
        builder.setLevel(before)


def _first_lines(error: Exception) -> str:
    """Return what an error says first; PyTorch names the tensor in its second line."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2]) or "no detail"


def check_name(name: str) -> None:
    """Raise ValueError, naming the nearest, for an encoder that timm lacks."""
    timm = _timm(name)
    if timm.is_model(name):
        return
    architecture = name.partition(".")[0]
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see timm.list_models()"
    raise ValueError(f"encoder: timm has no model {name!r}; {hint}")


def _refuse_fresh(fresh: nn.Module, loaded: nn.Module, config: Network) -> None:
    """Raise where a kernel still has the random values that loading should have replaced.

    timm loads what fits and passes over the rest; both encoders were drawn from the same random numbers, so that an
    equal kernel is one that no file has filled.
    """
    drawn = dict(fresh.named_parameters())
    same = [
        name
        for name, parameter in loaded.named_parameters()
        if parameter.ndim > 1 and torch.equal(parameter, drawn[name])
    ]
    if same:
        raise DataError(
            f"pretrained weights of {config.encoder!r} leave {len(same)} kernels random, such as {same[0]}; "
            f"the file is of another encoder{_mismatch(config)}: give its own weights_path, or set pretrained=false"
        )


def _mismatch(config: Network) -> str:
    """Return, in brackets, where a file stops being the encoder's if its tensors are taken in order."""
    if config.weights_path is None:
        return ""
    try:
        checkpoints.paired(_names(config), _read(config), source=Path(config.weights_path).name)
    except CheckpointError as error:
        return f" ({error})"
    return ""
