"""Stored pixel values to what a network is fed, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from segmentation.samples import Samples

Method = Literal["unit", "percentile", "standard", "imagenet", "none"]

# Of ImageNet's training images; one channel is the mean of the three, as timm adapts its weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """How pixel values are scaled."""

    method: Method = "unit"
    """unit: divide by the largest value of the stored type. percentile: clip each channel of each image and stretch it
    to [0, 1]. standard: zero mean and unit deviation over the training split. imagenet: unit, then ImageNet's mean and
    deviation. none: as stored."""
    low: float = 0.5
    """percentile: what is darker becomes 0, in percent of the pixels."""
    high: float = 99.5
    """percentile: what is brighter becomes 1, in percent of the pixels."""

    def __post_init__(self) -> None:
        """Refuse percentiles that are not in order."""
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(f"low: got {self.low} with high {self.high}; expected 0 <= low < high <= 100")


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """A normalisation with all its numbers: call it on (B, C, H, W) as stored, get float32.

    Two of equal numbers are equal, and `to_dict` keeps them in a checkpoint, so that a prediction is scaled as
    training was.
    """

    method: Method = "unit"
    low: float = 0.5
    high: float = 99.5
    mean: tuple[float, ...] = ()
    """Of each channel; empty where the method needs none."""
    std: tuple[float, ...] = ()

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image scaled, float32 on its own device."""
        if self.method == "unit":
            return unit(image)
        if self.method == "percentile":
            return percentile(image, self.low, self.high)
        if self.method == "imagenet":
            return standardise(unit(image), self.mean, self.std)
        if self.method == "standard":
            return standardise(image.float(), self.mean, self.std)
        return image.to(torch.float32, copy=True)

    @property
    def black(self) -> tuple[float, ...]:
        """What a stored 0 becomes: in each channel, or one number for all; of percentile, the darkest that it gives."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True)) or (0.0,)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint's JSON; `from_dict` takes them back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def from_dict(values: Mapping[str, Any]) -> Normaliser:
    """Return the normaliser whose values `to_dict` gave."""
    return Normaliser(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def build(config: Normalise, samples: Samples, train: Sequence[int]) -> Normaliser:
    """Return the normaliser of a configuration; statistics come from the training samples alone.

    Raises:
        ValueError: if ImageNet's statistics are asked for and images have neither one nor three channels.
    """
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if config.method == "standard":
        mean, std = statistics(samples, train)
    if config.method == "imagenet":
        mean, std = imagenet(samples.shape(train[0])[0])
    return Normaliser(method=config.method, low=config.low, high=config.high, mean=mean, std=std)


def unit(image: Tensor) -> Tensor:
    """Divide by the largest value that the stored type can hold; float values stay as they are."""
    if image.is_floating_point():
        return image.to(torch.float32, copy=True)
    return image.float() / torch.iinfo(image.dtype).max


def percentile(image: Tensor, low: float, high: float) -> Tensor:
    """Clip each channel of each image to two of its percentiles and stretch them to [0, 1]; constant ones become 0.

    The percentiles are numpy's, with linear interpolation.
    """
    values = image.float().flatten(-2)  # (B, C, H * W)
    ordered = values.sort(dim=-1).values
    bottom, top = _quantile(ordered, low / 100), _quantile(ordered, high / 100)
    spread = (top - bottom).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values.clamp(bottom, top) - bottom) / spread).view(image.shape)


def standardise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation."""
    if image.shape[-3] != len(mean):
        raise ValueError(f"image has {image.shape[-3]} channels; statistics are of {len(mean)}")
    centre = torch.tensor(mean, dtype=torch.float32, device=image.device).view(-1, 1, 1)
    return (image - centre) / torch.tensor(std, dtype=torch.float32, device=image.device).view(-1, 1, 1)


def statistics(samples: Samples, indices: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel over all pixels of these samples; a constant channel deviates by 1.

    Two passes in double precision, because squares of 16-bit values would lose the small differences.
    """
    pixels = [samples.image(index) for index in indices]
    count = sum(image[0].size for image in pixels)
    mean = sum(image.sum(axis=(1, 2), dtype="f8") for image in pixels) / count
    square = sum(((image - mean[:, None, None]) ** 2).sum(axis=(1, 2)) for image in pixels) / count
    return tuple(mean.tolist()), tuple((square**0.5).tolist() if square.all() else [v**0.5 or 1.0 for v in square])


def imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and deviation for one or three channels."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    if channels == 1:
        return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    raise ValueError(f"method: got imagenet for {channels} channels; expected 1 or 3, or another method")


def _quantile(ordered: Tensor, fraction: float) -> Tensor:
    """Return (..., 1) at a fraction between the first and the last of sorted values."""
    place = fraction * (ordered.shape[-1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below : below + 1], ordered[..., above : above + 1], place - below)
