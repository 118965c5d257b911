"""Figures of images, masks, predictions and curves, as PNG files.

matplotlib is imported where it is used, and only its canvas for files: no window, no global state, any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Image = npt.NDArray[Any]
Painted = npt.NDArray[np.uint8]

LABEL_COLOURS: tuple[Colour, ...] = ((220, 20, 60), (255, 105, 180), (255, 255, 0), (0, 158, 115), (86, 180, 233))
"""Labels that may overlap; the first three are those of the telescope's cosmic rays, point sources and glitches."""
CLASS_COLOURS: tuple[Colour, ...] = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Classes that exclude each other, background first. Source: Okabe and Ito 2008, for all kinds of colour vision."""
IGNORED_COLOUR: Colour = (128, 128, 128)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with what is known and what is predicted of it."""

    name: str
    image: Image
    """(C, H, W)."""
    probability: Image
    """(K, H, W)."""
    mask: Image | None = None
    """(H, W) class ids, or (K, H, W) zeros and ones; None where the truth is not known."""


def composite_map(probs: Image, thr: float = 0.5, colours: Sequence[Colour] = LABEL_COLOURS) -> Painted:
    """Return (H, W, 3) in which each label is painted where its probability is more than `thr`, later ones on top."""
    painted = np.zeros((*probs.shape[1:], 3), dtype=np.uint8)
    for label, probability in enumerate(probs):
        painted[probability > thr] = colours[label % len(colours)]
    return painted


def class_map(mask: Image, colours: Sequence[Colour] = CLASS_COLOURS, ignore_index: int = 255) -> Painted:
    """Return (H, W, 3) in which each class id has its colour, and ignored pixels are grey."""
    table = np.array([colours[index % len(colours)] for index in range(256)], dtype=np.uint8)
    table[ignore_index] = IGNORED_COLOUR
    return np.asarray(table[np.asarray(mask, dtype=np.uint8)], dtype=np.uint8)


def as_picture(image: Image) -> Painted:
    """Return (H, W, 3) of an image (C, H, W): its first three channels or its first as grey, stretched to 0..255."""
    shown = np.asarray(image[:3] if len(image) >= 3 else image[:1], dtype=np.float64)
    low, high = float(shown.min()), float(shown.max())
    scaled = (shown - low) / (high - low) if high > low else np.zeros_like(shown)
    picture = np.rint(255 * np.moveaxis(scaled, 0, -1)).astype(np.uint8)
    return np.broadcast_to(picture, (*picture.shape[:2], 3))


def three_bands(image: Image, bands: Sequence[int] = (), low: float = 2, high: float = 98) -> Image:
    """Return three bands (3, H, W) of an image (C, H, W), each stretched to 0..1 between two of its percentiles.

    bands: red, green and blue; empty: the first three of more than four, and others as they are.
    """
    if not bands and len(image) <= 4:
        return image
    shown = np.asarray(image[list(bands or (0, 1, 2))], dtype=np.float64)
    bottom, top = np.percentile(shown, (low, high), axis=(1, 2), keepdims=True)
    return np.asarray(np.clip((shown - bottom) / np.where(top > bottom, top - bottom, 1), 0, 1))


def blend(picture: Painted, painted: Painted, alpha: float = 0.5) -> Painted:
    """Return the picture with the painted pixels over it; black ones are left clear."""
    over = painted.any(-1, keepdims=True)
    mixed = np.where(over, (1 - alpha) * picture + alpha * painted, picture)
    return np.rint(mixed).astype(np.uint8)


def prediction_grid(
    path: Path,
    examples: Sequence[Example],
    class_names: Sequence[str],
    *,
    multilabel: bool,
    thr: float = 0.5,
    colours: Sequence[Colour] | None = None,
) -> Path:
    """Write a row for each example: input, probability of each class, composite, and the truth where it is known.

    `thr` is where the composite cuts (labels that may overlap); it is printed on the figure.
    """
    colours = colours or default_colours(multilabel)
    truth = any(example.mask is not None for example in examples)
    titles = ["input", *(f"P({name})" for name in class_names), _prediction_title(multilabel, thr)]
    titles += ["ground truth"] if truth else []
    figure, axes = _panels(len(examples), len(titles))
    for row, example in enumerate(examples):
        _draw_example(axes[row], example, multilabel, thr, colours)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for row, example in enumerate(examples):
        axes[row][0].set_ylabel(example.name[-28:], fontsize=7)
    legend(figure, class_names, colours, skip_first=not multilabel)
    return _write(figure, path)


def strips(
    path: Path,
    examples: Sequence[Example],
    *,
    multilabel: bool,
    thr: float = 0.5,
    side: int = 128,
    colours: Sequence[Colour] | None = None,
) -> Path:
    """Write a row for each example: input, prediction over it, truth over it; in milliseconds, for use in training."""
    from PIL import Image as Pillow

    colours = colours or default_colours(multilabel)
    rows = [_strip(example, colours, multilabel=multilabel, thr=thr) for example in examples]
    zoom = max(1, side // rows[0].shape[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.concatenate(rows).repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)
    return path


def overlay(
    path: Path,
    image: Image,
    painted: Painted,
    class_names: Sequence[str],
    colours: Sequence[Colour],
    *,
    alpha: float = 0.5,
    title: str = "",
) -> Path:
    """Write the image (C, H, W) with a painted mask (H, W, 3) over it, and a legend of its classes."""
    figure, axes = _panels(1, 1, inches=4.5)
    axes[0][0].imshow(blend(as_picture(image), painted, alpha))
    axes[0][0].set_title(title, fontsize=9)
    legend(figure, class_names, colours, skip_first=tuple(colours[0]) == (0, 0, 0))
    return _write(figure, path)


def curves(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    series: Mapping[str, str],
    *,
    title: str,
    ylabel: str,
    colours: Mapping[str, Colour] | None = None,
) -> Path:
    """Write metrics over epochs, one line each; `rows` are the epochs' metrics, `series` maps a name to its label.

    A metric that no row has is left out; a row without it leaves a gap.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name in (name for name in series if any(name in row for row in rows)):
        values = [row.get(name, np.nan) for row in rows]
        colour = _unit(colours[name]) if colours and name in colours else None
        axis.plot(range(1, len(rows) + 1), values, label=series[name], color=colour, marker="o", markersize=2.5)
    axis.set(title=title, xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend(fontsize=8)
    return _write(figure, path)


def lines(
    path: Path,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Write a line through the points (x, y) of each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    for name, line in points.items():
        axis.plot(*zip(*sorted(line), strict=True), label=name, marker="o", markersize=3)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    if axis.lines:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return _write(figure, path)


def learning_rates(
    path: Path,
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    marks: Mapping[str, float],
) -> Path:
    """Write the loss at each learning rate, as it was and smoothed; `marks` names some of the rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, losses, color="0.75", linewidth=1, label="loss of a batch")
    axis.plot(rates, smoothed, color=_unit(CLASS_COLOURS[5]), label="smoothed")
    for colour, (name, rate) in zip(CLASS_COLOURS[1:], marks.items(), strict=False):
        axis.axvline(rate, color=_unit(colour), linestyle="--", label=f"{name} {rate:.1e}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _write(figure, path)


def class_colours(count: int) -> tuple[Colour, ...]:
    """Return a colour for each of so many classes, the same ones again where there are more classes than colours."""
    return tuple(CLASS_COLOURS[index % len(CLASS_COLOURS)] for index in range(count))


def default_colours(multilabel: bool) -> tuple[Colour, ...]:
    """Return the colours of labels that may overlap, or of classes that exclude each other."""
    return LABEL_COLOURS if multilabel else CLASS_COLOURS


def paint(mask: Image, colours: Sequence[Colour], *, multilabel: bool) -> Painted:
    """Return a true mask, (H, W) or (K, H, W), in its colours."""
    return composite_map(mask == 1, 0.5, colours) if multilabel else class_map(mask, colours)


def paint_prediction(probability: Image, colours: Sequence[Colour], *, multilabel: bool, thr: float = 0.5) -> Painted:
    """Return what is predicted, from probabilities (K, H, W), in its colours."""
    return composite_map(probability, thr, colours) if multilabel else class_map(probability.argmax(0), colours)


def _strip(example: Example, colours: Sequence[Colour], *, multilabel: bool, thr: float) -> Painted:
    """Return (H + 1, 3 W + 2, 3): the pictures side by side, white between them."""
    picture = as_picture(example.image)
    shown = [picture, blend(picture, paint_prediction(example.probability, colours, multilabel=multilabel, thr=thr))]
    if example.mask is not None:
        shown.append(blend(picture, paint(example.mask, colours, multilabel=multilabel)))
    framed = [np.pad(panel, ((0, 1), (0, 1), (0, 0)), constant_values=255) for panel in shown]
    return np.concatenate(framed, axis=1)[:, :-1]


def _draw_example(axes: Any, example: Example, multilabel: bool, thr: float, colours: Sequence[Colour]) -> None:
    axes[0].imshow(as_picture(example.image))
    for axis, probability in zip(axes[1:], example.probability, strict=False):
        axis.imshow(probability, cmap="viridis", vmin=0, vmax=1)
    predicted = paint_prediction(example.probability, colours, multilabel=multilabel, thr=thr)
    place = 1 + len(example.probability)
    axes[place].imshow(predicted)
    if example.mask is not None:
        axes[place + 1].imshow(paint(example.mask, colours, multilabel=multilabel))


def _prediction_title(multilabel: bool, thr: float) -> str:
    return f"prediction (p > {thr:g})" if multilabel else "prediction"


def _panels(rows: int, columns: int, inches: float = 1.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches * columns + 0.4, inches * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def legend(figure: Any, class_names: Sequence[str], colours: Sequence[Colour], *, skip_first: bool) -> None:
    """Name the colours below a figure; `skip_first` for a background that is black anyway."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=_unit(colours[index % len(colours)]), edgecolor="black", linewidth=0.5, label=name)
        for index, name in enumerate(class_names)
        if index or not skip_first
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)


def _unit(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def _write(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
