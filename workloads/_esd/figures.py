"""What a person looks at: a tile as the eye sees it, its truth and its prediction; and the files of its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from segmentation import figures
from segmentation.augmentation import Augmenter
from segmentation.figures import Colour, Painted
from segmentation.loading import generator
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples
from workloads._esd.satellites import COLOURS, SENTINEL1, TITLES, VIIRS, VISIBLE, Channel

Array = npt.NDArray[Any]
RGB: tuple[Colour, ...] = tuple((int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in COLOURS)
ZOOM = 16
"""Pixels to the side of a cell in the pictures of labels."""
DARK = 0
"""The class that the contest's map is about."""
STITCHED = "restitched_visible_gt_prediction.png"
BLIND = "restitched_visible_prediction.png"
"""The same where the truth is not known."""


def visible(image: Array, channels: Sequence[Channel]) -> Array:
    """Return red, green and blue (3, H, W) of an image (C, H, W), on the date with the fewest bright pixels: clouds.

    Where these bands are not among the channels, the first channel as grey (1, H, W).
    """
    source, bands = VISIBLE
    places = {(one.date, one.band): number for number, one in enumerate(channels) if one.source == source}
    dates = sorted({date for date, _ in places if all((date, band) in places for band in bands)})
    if not dates:
        return np.asarray(image[:1], np.float32)
    pictures = [np.asarray(image[[places[date, band] for band in bands]], np.float32) for date in dates]
    return min(pictures, key=lambda picture: float(np.mean(picture)))


def save_tile(
    folder: Path, tile: str, predicted: Array, truth: Array | None, seen: Array, *, first_class: int
) -> list[Path]:
    """Write a tile's prediction and, where it is known, its truth, as rasters and pictures; return the paths.

    predicted, truth: (16, 16) of 0 to 3.
    seen: see `visible`.
    first_class: what class 0 is in the raster: 0, or 1 as in the contest's files.
    """
    import tifffile

    folder.mkdir(parents=True, exist_ok=True)
    rasters = {"prediction": predicted.astype(np.uint8) + first_class, "contest": (predicted == DARK).astype(np.uint8)}
    written = []
    for name, raster in rasters.items():
        written.append(folder / f"{tile}_{name}.tif")
        tifffile.imwrite(written[-1], raster.astype(np.uint8))
    maps = {"prediction": _painted(predicted), "contest": _grey(predicted == DARK)}
    if truth is not None:
        maps["ground_truth"] = _painted(truth)
    for name, painted in maps.items():
        written.append(folder / f"{tile}_{name}.png")
        Image.fromarray(painted.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)).save(written[-1])
    titles = ["visible", *(["ground truth"] if truth is not None else []), "prediction"]
    panels = [figures.as_picture(seen), *(_painted(each) for each in (truth, predicted) if each is not None)]
    written.append(
        _save_panels(folder / tile / "plot" / (BLIND if truth is None else STITCHED), [panels], titles, [tile])
    )
    return written


def save_samples(
    path: Path,
    samples: Samples,
    shown: Sequence[int],
    channels: Sequence[Channel],
    normalise: Normaliser,
    augment: Augmenter,
) -> Path:
    """Write a row for each of some subtiles: to the eye, to radar, at night, its cells, and both as augmented."""
    image = torch.cat([normalise(torch.from_numpy(samples.image(index).copy())[None]) for index in shown])
    mask = torch.stack([torch.from_numpy(samples.mask(index).copy()).long() for index in shown])
    moved, moved_mask = augment(image, mask, generator(0))
    others = [place for name in (SENTINEL1.name, VIIRS.name) if (place := _first(channels, name)) is not None]
    titles = ["visible", *(f"{channels[place].source} {channels[place].band}" for place in others)]
    rows = []
    for row in range(len(shown)):
        plain = image[row].numpy()
        panels = [figures.as_picture(visible(plain, channels))]
        panels += [figures.as_picture(plain[place : place + 1]) for place in others]
        panels.append(_painted(mask[row].numpy()))
        rows.append(
            [*panels, figures.as_picture(visible(moved[row].numpy(), channels)), _painted(moved_mask[row].numpy())]
        )
    names = [samples.names[index] for index in shown]
    return _save_panels(path, rows, [*titles, "ground truth", "augmented", "its truth"], names)


def strip_example(name: str, seen: Array, cells: Array, mask: Array) -> figures.Example:
    """Return what `figures.strips` draws, cells as large as their pixels."""
    scale = seen.shape[1] // mask.shape[0]
    large = [np.asarray(each).repeat(scale, axis=-2).repeat(scale, axis=-1) for each in (cells, mask)]
    return figures.Example(name=name, image=seen, probability=large[0], mask=large[1])


def _first(channels: Sequence[Channel], source: str) -> int | None:
    return next((number for number, one in enumerate(channels) if one.source == source), None)


def _painted(cells: Array) -> Painted:
    return figures.class_map(cells, RGB)


def _grey(cells: Array) -> Painted:
    return np.repeat(np.asarray(cells, np.uint8)[..., None] * np.uint8(255), 3, axis=2)


def _save_panels(path: Path, rows: Sequence[Sequence[Painted]], titles: Sequence[str], names: Sequence[str]) -> Path:
    """Write pictures in rows, and the four classes below them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.6 * len(titles), 2.5 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, panels in enumerate(rows):
        for axis, panel in zip(axes[row], panels, strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(names[row][-28:], fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    patches = [
        Patch(facecolor=c, edgecolor="black", linewidth=0.5, label=t) for c, t in zip(COLOURS, TITLES, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
