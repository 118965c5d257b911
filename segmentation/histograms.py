"""How often each score was given to positive and negative pixels, image by image: all that sweeps of thresholds need.

A histogram takes the same room however large the image, and keeps the image's number: parts from several processes are
merged, and an image that a sampler repeated counts once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from segmentation import ranks
from segmentation.epoch import NonFiniteError

Array = npt.NDArray[Any]

NEGATIVE, POSITIVE = range(2)


@dataclass(frozen=True)
class Histograms:
    """Pixels of each image by score: plain arrays whose order is that of `index`."""

    index: npt.NDArray[np.int64]
    """(N,), the sample's number in its data set."""
    pixels: npt.NDArray[np.uint32]
    """(N, K, 2, B) for K channels and B bins of rising scores; negative pixels, then positive ones."""


def count(bins: Array, mask: Tensor, index: Tensor, size: int, *, ignore_index: int = 255) -> Histograms:
    """Return the histograms of a batch.

    Args:
        bins: (N, K, H, W), the bin of each pixel, less than `size`.
        mask: (N, K, H, W), zeros and ones.
        index: (N,), sample numbers.
        size: how many bins there are.
        ignore_index: pixels of this value in the mask count for nothing.
    """
    target = mask.detach().cpu().numpy()
    images, channels = bins.shape[:2]
    if target.shape != bins.shape or len(index) != images:
        raise ValueError(f"got scores {bins.shape}, mask {target.shape} and {len(index)} numbers; they must agree")
    row = np.arange(images * channels, dtype=np.int64).reshape(images, channels, 1, 1) * (2 * size)
    cell = bins + row
    cell[target == 1] += size
    known = target != ignore_index
    if not known.all():
        cell, target = cell[known], target[known]
    if target.size and not 0 <= target.min() <= target.max() <= 1:
        raise ValueError(
            f"mask: got {target.min()} to {target.max()}; expected 0, 1 or {ignore_index} for pixels to ignore"
        )
    pixels = np.bincount(cell.ravel(), minlength=images * channels * 2 * size).astype(np.uint32)
    return Histograms(index.cpu().numpy().astype(np.int64), pixels.reshape(images, channels, 2, size))


def empty(channels: int, size: int) -> Histograms:
    """Return the histograms of no image at all."""
    return Histograms(np.empty(0, np.int64), np.empty((0, channels, 2, size), np.uint32))


def merge(parts: Sequence[Histograms]) -> Histograms:
    """Return the histograms of all parts in order of index, each image once however often it was counted."""
    index = np.concatenate([part.index for part in parts])
    numbers, order = np.unique(index, return_index=True)
    return Histograms(numbers, np.concatenate([part.pixels for part in parts])[order])


def gather(histograms: Histograms) -> Histograms:
    """Return the merged histograms of all processes, on every one of them; the same where there is one."""
    parts = ranks.gather(histograms)
    return merge(parts) if len(parts) > 1 else histograms


def digest(histograms: Histograms, names: Sequence[str]) -> str:
    """Return the SHA-256 of the images' names and histograms, whatever order they came in.

    names: of each image, in the order of `index`.
    """
    if len(names) != len(histograms.index):
        raise ValueError(f"got {len(names)} names of {len(histograms.index)} images; give one name an image")
    order = sorted(range(len(names)), key=names.__getitem__)
    head = json.dumps([[names[place] for place in order], histograms.pixels.shape])
    return hashlib.sha256(head.encode() + histograms.pixels[order].astype("<u4").tobytes()).hexdigest()


def finite(scores: Tensor, index: Tensor, what: str) -> npt.NDArray[np.float32]:
    """Return (N, ...) scores as an array of float32.

    Raises:
        NonFiniteError: naming the images in which a score is NaN.
    """
    values: npt.NDArray[np.float32] = scores.detach().float().cpu().numpy()
    if values.size and np.isnan(values.min()):  # NaN if any of them is
        bad = np.isnan(values).reshape(len(values), -1).sum(1)
        images = ", ".join(str(int(number)) for number in index.cpu()[bad > 0][:5])
        raise NonFiniteError(f"{what}: {bad.sum()} pixels are NaN, in {(bad > 0).sum()} images: sample {images}")
    return values


def probabilities(scores: Tensor, index: Tensor) -> npt.NDArray[np.float32]:
    """Return (N, ...) probabilities as an array of float32.

    Raises:
        NonFiniteError: where one is NaN.
        ValueError: where one lies outside 0 to 1.
    """
    values = finite(scores, index, "probability")
    if values.size and not 0 <= values.min() <= values.max() <= 1:
        raise ValueError(
            f"probability: got {values.min():g} to {values.max():g}; expected 0 to 1: logits need a sigmoid"
        )
    return values
