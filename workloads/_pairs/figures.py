"""What a person looks at: samples before training, as stored and as augmentation makes them; predictions after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation import augmentation, figures, volumes
from segmentation.augmentation import Augmentation
from segmentation.loading import generator
from segmentation.networks.volume import to_volume
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples

COLUMNS = ("as stored", "mask", "augmented", "its mask")


def save_samples(
    path: Path,
    samples: Samples,
    shown: Sequence[int],
    normalise: Normaliser,
    augment: Augmentation,
    class_names: Sequence[str],
    ignore_index: int,
    colours: Sequence[figures.Colour] = figures.CLASS_COLOURS,
    slices: int = 0,
    bands: Sequence[int] = (),
) -> Path:
    """Write a row for each of some samples: image, mask, and both as training may see them.

    slices: of each sample, where samples are volumes, of which one slice is shown.
    bands: see `figures.three_bands`.
    """
    from matplotlib.figure import Figure

    image = torch.cat([normalise(torch.from_numpy(samples.image(index).copy())[None]) for index in shown])
    mask = torch.stack([torch.from_numpy(samples.mask(index).copy()).long() for index in shown])
    moved, moved_mask = augmentation.build(augment, normalise.black, slices)(image, mask, generator(0))
    if slices:
        places = [volumes.fullest(one, slices, ignore_index=ignore_index) for one in mask]
        image, mask, moved, moved_mask = (_cut(each, slices, places) for each in (image, mask, moved, moved_mask))
    figure = Figure(figsize=(9, 2.6 * len(shown) + 0.6), layout="constrained")
    rows = figure.subplots(len(shown), len(COLUMNS), squeeze=False)
    for row, index in enumerate(shown):
        masks = [figures.class_map(each[row].numpy(), colours, ignore_index) for each in (mask, moved_mask)]
        pictures = [figures.as_picture(figures.three_bands(each[row].numpy(), bands)) for each in (image, moved)]
        for axis, picture in zip(rows[row], [pictures[0], masks[0], pictures[1], masks[1]], strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        rows[row][0].set_ylabel(samples.names[index][-28:], fontsize=7)
        rows[row][0].set_xlabel(_range(samples.image(index)), fontsize=7)
        rows[row][2].set_xlabel(_range(moved[row].numpy()), fontsize=7)
    for axis, title in zip(rows[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=9)
    figures.legend(figure, class_names, colours, skip_first=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def write_prediction(
    stem: Path, image: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]
) -> list[Path]:
    """Write NAME_mask.png, (H, W) of the data's own values, and NAME_overlay.png, the classes over the image."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}_mask.png")
    Image.fromarray(mask).save(path)
    return [path, write_overlay(stem, image, classes)]


def write_overlay(stem: Path, image: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]) -> Path:
    """Write NAME_overlay.png: an image (C, H, W) with classes (H, W) over it."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}_overlay.png")
    Image.fromarray(figures.blend(figures.as_picture(image), figures.class_map(classes))).save(path)
    return path


def _cut(tall: Tensor, slices: int, places: Sequence[int]) -> Tensor:
    """Return one slice of each volume (B, ..., D * H, W)."""
    return torch.stack([to_volume(one, slices)[..., place, :, :] for one, place in zip(tall, places, strict=True)])


def _range(image: np.ndarray[Any, Any]) -> str:
    return f"{image.dtype} {image.min():.4g} to {image.max():.4g}"
