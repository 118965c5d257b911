"""Volumes cut into patches of so many slices, put together again, and scored and predicted as a whole.

A patch travels as a tall image, see `segmentation.networks.volume`. Together the patches of a volume show each slice
once: what a patch repeats, as it fills up a short volume or begins before the last one's end, is ignored in its mask.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from segmentation import evaluation, prediction, volumes
from segmentation.evaluation import ImageScores
from segmentation.networks.volume import to_image
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """One patch of a volume."""

    places: tuple[int, ...]
    """Which slices it shows, from the top down."""
    new: tuple[bool, ...]
    """Which of them no patch before it shows."""


@dataclass(frozen=True)
class Whole:
    """A volume put together from its patches."""

    group: str
    first: int
    """Number of its first patch among the samples."""
    image: Array
    """(C, D, H, W)"""
    mask: Array
    """(D, H, W)"""
    spacing: tuple[float, float, float]
    """Of rows, columns and slices, in mm."""


def windows(count: int, slices: int) -> list[Window]:
    """Return the patches of a volume of so many slices, evenly spread where they have to overlap."""
    if count <= slices:
        places = tuple(min(place, count - 1) for place in range(slices))
        return [Window(places, tuple(place < count for place in range(slices)))]
    found, seen = [], 0
    for start in prediction.starts(count, slices, overlap=0):
        places = tuple(range(start, start + slices))
        found.append(Window(places, tuple(place >= seen for place in places)))
        seen = start + slices
    return found


def together(samples: Samples, indices: Sequence[int], slices: int) -> Iterator[Whole]:
    """Yield the volumes that some samples are the patches of, one in memory at a time."""
    of_volume: dict[str, list[int]] = defaultdict(list)
    for index in sorted(indices):
        of_volume[samples.extra(index)["volume"]].append(index)
    for patches in of_volume.values():
        patches.sort(key=lambda index: int(samples.extra(index)["slice"]))
        new = [json.loads(samples.extra(index)["new"]) for index in patches]
        images = [apart(samples.image(index), slices)[:, mine] for index, mine in zip(patches, new, strict=True)]
        masks = [apart(samples.mask(index), slices)[mine] for index, mine in zip(patches, new, strict=True)]
        down, right, through = (*json.loads(samples.extra(patches[0])["spacing"]), 1.0)[:3]
        group = samples.groups[patches[0]]
        image, mask = np.concatenate(images, axis=1), np.concatenate(masks)
        yield Whole(group, patches[0], image, mask, (down, right, through))


def probability(model: nn.Module, normaliser: Normaliser, image: Array, slices: int, batch_size: int) -> Tensor:
    """Return the probability of each class, (K, D, H, W), for a volume (C, D, H, W) as samples are stored.

    A volume shorter than a patch is filled up as in training, and what was added is cut off again.
    """
    by_slice = normaliser(torch.from_numpy(np.ascontiguousarray(image.swapaxes(0, 1))))  # (D, C, H, W)
    volume = by_slice.transpose(0, 1).to(next(model.parameters()).device)
    if (missing := slices - volume.shape[1]) > 0:
        volume = functional.pad(volume[None], (0, 0, 0, 0, 0, missing), mode="replicate")[0]
    window = (slices, *volume.shape[2:])
    found = volumes.predict_volume(model, volume, window=window, multilabel=False, batch_size=batch_size)
    return found[:, : image.shape[1]]


def score(
    model: nn.Module,
    normaliser: Normaliser,
    found: Iterator[Whole],
    classes: int,
    *,
    slices: int,
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    watch: Callable[[Whole, Array], None] | None = None,
) -> ImageScores:
    """Return counts and losses of volumes, each voxel once; a volume's index is that of its first patch.

    watch: is shown each volume with its class ids (D, H, W).
    """
    parts = [evaluation.empty(classes)]
    for whole in found:
        likely = probability(model, normaliser, whole.image, slices, batch_size)[None]
        # Their softmax is the probability again; 0 would be an infinite loss.
        logits = likely.clamp_min(torch.finfo(likely.dtype).tiny).log()
        mask = torch.from_numpy(whole.mask).long()[None].to(logits.device)
        counts = volumes.count(logits, mask, multilabel=False)
        lost = loss(to_image(logits), to_image(mask)).double().cpu().numpy()
        parts.append(ImageScores(np.array([whole.first]), counts, lost))
        if watch is not None:
            watch(whole, likely[0].argmax(0).to(torch.uint8).cpu().numpy())
    return evaluation.merge(parts)


def apart(tall: Array, slices: int) -> Array:
    """Return (..., D, H, W) of (..., D * H, W)."""
    return tall.reshape(*tall.shape[:-2], slices, -1, tall.shape[-1])
