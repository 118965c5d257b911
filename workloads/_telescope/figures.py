"""Pictures of telescope predictions; matplotlib is imported only where something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

COLOURS: tuple[tuple[int, int, int], ...] = ((220, 20, 60), (255, 105, 180), (255, 255, 0))
"""Composite colours of cosmic ray, point source, electronic glitch."""
LINE_COLOURS = ("tab:blue", "tab:red", "tab:orange")
"""The same classes as lines and dots, the original's choice."""
PLACEHOLDER = "none (placeholder)"
CLASS_NAMES: Mapping[str, tuple[str, str, str]] = {
    "noEL": ("CR", "PS", PLACEHOLDER),
    "withEL": ("CR", "PS", "EL"),
}


def composite_map(probs: Array, thr: float = 0.5) -> Array:
    """Return (H, W, 3) uint8: black, painted where (3, H, W) probabilities exceed `thr`; the last channel wins."""
    picture = np.zeros((*probs.shape[1:], 3), np.uint8)
    for channel, colour in zip(probs, COLOURS, strict=True):
        picture[channel > thr] = colour
    return picture


def save_examples(
    path: Path,
    images: Sequence[Array],
    probs: Sequence[Array],
    masks: Sequence[Array],
    *,
    names: Sequence[str],
    variant: str,
    thr: float = 0.5,
) -> Path:
    """Draw a row for each sample: input, composite of the prediction, composite of the truth, scatter of all pixels.

    The scatter shows each channel's probability by pixel number, the threshold as a line.
    """
    figure, axes = _canvas(len(images), 4, widths=(1, 1, 1, 1.8))
    for row, image, prob, mask, name in zip(axes, images, probs, masks, names, strict=True):
        row[0].imshow(image, cmap="gray")
        row[1].imshow(composite_map(prob, thr))
        row[2].imshow(composite_map(mask, 0.5))
        row[0].set_ylabel(_short(name), fontsize=6)
        _scatter(row[3], prob, CLASS_NAMES[variant], thr)
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
        axis.scatter(np.arange(channel.size), channel.ravel(), s=1.5, color=colour, label=name, linewidths=0)
    axis.axhline(thr, color="black", linewidth=0.8, linestyle="--", label=f"threshold {thr:g}")
    axis.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1), xlabel="pixel")
    axis.legend(fontsize=5, markerscale=4, loc="upper right")


def _legend(figure: Any, variant: str) -> None:
    from matplotlib.patches import Patch

    names = CLASS_NAMES[variant]
    patches = [Patch(color=(r / 255, g / 255, b / 255), label=n) for (r, g, b), n in zip(COLOURS, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
