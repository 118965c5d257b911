"""Pictures of telescope predictions; matplotlib is imported only where something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmentation.figures import LABEL_COLOURS, Colour, Example, composite_map

Array = np.ndarray[Any, Any]

LINE_COLOURS: tuple[Colour, ...] = ((31, 119, 180), (214, 39, 40), (255, 127, 14))
"""Cosmic ray, point source and electronic glitch as lines and dots, the original's choice: blue, red, orange."""
MEAN_COLOUR: Colour = (64, 64, 64)
PLACEHOLDER = "none (placeholder)"
CLASS_NAMES: Mapping[str, tuple[str, str, str]] = {
    "noEL": ("CR", "PS", PLACEHOLDER),
    "withEL": ("CR", "PS", "EL"),
}


def save_examples(path: Path, examples: Sequence[Example], *, variant: str, thr: float = 0.5) -> Path:
    """Draw a row for each example: input, composite of the prediction, composite of the truth, scatter of all pixels.

    The scatter shows each channel's probability by pixel number, the threshold as a line.
    """
    figure, axes = _canvas(len(examples), 4, widths=(1, 1, 1, 1.8))
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(example.image[0], cmap="gray")
        row[1].imshow(composite_map(example.probability, thr))
        if example.mask is not None:
            row[2].imshow(composite_map(example.mask, 0.5))
        row[0].set_ylabel(_short(example.name), fontsize=6)
        _scatter(row[3], example.probability, CLASS_NAMES[variant], thr)
    for axis, title in zip(axes[0], ("input", f"prediction > {thr:g}", "ground truth", "probability"), strict=True):
        axis.set_title(title, fontsize=9)
    _legend(figure, variant)
    return _save(figure, path)


def save_raw_and_normalised(path: Path, raw: Array, normalised: Array, mask: Array, *, name: str, variant: str) -> Path:
    """Draw one sample as stored, as the network sees it, and its mask, with the smallest and largest values."""
    figure, axes = _canvas(1, 3)
    for axis, image, title in zip(axes[0], (raw, normalised), ("raw", "normalised"), strict=False):
        shown = axis.imshow(image, cmap="gray")
        axis.set_title(f"{title}: {image.min():g} to {image.max():.4g}", fontsize=9)
        figure.colorbar(shown, ax=axis, fraction=0.046)
    axes[0][2].imshow(composite_map(mask, 0.5))
    axes[0][2].set_title("mask", fontsize=9)
    axes[0][0].set_ylabel(_short(name), fontsize=6)
    _legend(figure, variant)
    return _save(figure, path)


def _canvas(rows: int, columns: int, widths: Sequence[float] | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    shares = widths or [1.0] * columns
    figure = Figure(figsize=(2.3 * sum(shares), 2.2 * rows + 0.6), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=shares)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _scatter(axis: Any, prob: Array, names: Sequence[str], thr: float) -> None:
    for channel, name, colour in zip(prob, names, LINE_COLOURS, strict=True):
        unit = tuple(part / 255 for part in colour)
        axis.scatter(np.arange(channel.size), channel.ravel(), s=1.5, color=unit, label=name, linewidths=0)
    axis.axhline(thr, color="black", linewidth=0.8, linestyle="--", label=f"threshold {thr:g}")
    axis.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1), xlabel="pixel")
    axis.legend(fontsize=5, markerscale=4, loc="upper right")


def _legend(figure: Any, variant: str) -> None:
    from matplotlib.patches import Patch

    pairs = zip(LABEL_COLOURS, CLASS_NAMES[variant], strict=False)
    patches = [Patch(color=(r / 255, g / 255, b / 255), label=name) for (r, g, b), name in pairs]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
