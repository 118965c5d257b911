"""Pictures of filters: how strong they are, which stay, how wide a network is. See `inspection`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segmentation.figures import CLASS_COLOURS

if TYPE_CHECKING:
    from segmentation.pruning.inspection import BlockRow, Layer

BINS = 24
KEPT, GONE = ("#{:02x}{:02x}{:02x}".format(*CLASS_COLOURS[place]) for place in (2, 1))
COLUMNS = 5
DPI = 100


def norms(path: Path, layers: Sequence[Layer]) -> Path:
    """Write the histograms of all layers side by side, on one y-axis."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(layers) / COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 1.9 * rows + 0.5))
    axes = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        _bars(axis, layer)
        axis.set_title(layer.name, fontsize=7)
        axis.tick_params(labelsize=6)
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.supxlabel("L1 norm of a filter", fontsize=9)
    figure.supylabel("% of filters", fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.99, top=1 - 0.3 / (1.9 * rows + 0.5), bottom=0.6 / (1.9 * rows + 0.5))
    figure.subplots_adjust(hspace=0.55, wspace=0.12)
    return _save(figure, path)


def histograms(paths: Mapping[str, Path], layers: Sequence[Layer]) -> None:
    """Write the histogram of each layer by itself, the y-axes all alike."""
    from matplotlib.figure import Figure

    highest = max(max(np.histogram(layer.norms, BINS)[0]) / len(layer.norms) for layer in layers)
    for layer in layers:
        figure = Figure(figsize=(4.2, 2.8))
        axis = figure.subplots()
        _bars(axis, layer)
        axis.set_ylim(0, 105 * highest)
        axis.set_title(f"{layer.name}: {len(layer.norms)} filters", fontsize=9)
        axis.set_xlabel("L1 norm of a filter", fontsize=8)
        axis.set_ylabel("% of filters", fontsize=8)
        axis.tick_params(labelsize=7)
        figure.subplots_adjust(left=0.13, right=0.97, top=0.9, bottom=0.17)
        _save(figure, paths[layer.name])


def masks(path: Path, layers: Sequence[Layer]) -> Path:
    """Write a row of cells for each layer: channels that stay, channels that go."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    widest = max(layer.total for layer in layers)
    cells = np.zeros((len(layers), widest))
    for row, layer in enumerate(layers):
        cells[row, : layer.total] = 2
        cells[row, list(layer.kept)] = 1
    figure = Figure(figsize=(min(20.0, 7 + widest / 100), 0.24 * len(layers) + 1.2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(cells, cmap=ListedColormap(["white", KEPT, GONE]), vmin=0, vmax=2, aspect="auto", interpolation="none")
    axis.hlines(np.arange(0.5, len(layers) - 1), -0.5, widest - 0.5, color="white", linewidth=2)
    labels = [f"{layer.name}  {len(layer.kept)} of {layer.total}" for layer in layers]
    axis.set_yticks(range(len(layers)), labels, fontsize=7)
    axis.set_xlabel("channel")
    _legend(figure)
    return _save(figure, path)


def widths(path: Path, blocks: Sequence[BlockRow]) -> Path:
    """Write a bar for each block in the order of running: as wide as its channels, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.34 * len(blocks) + 1.2), layout="constrained")
    axis = figure.subplots()
    for row, block in enumerate(blocks):
        axis.barh(row, block.before, left=-block.before / 2, color=GONE, height=0.7)
        axis.barh(row, block.after, left=-block.after / 2, color=KEPT, height=0.7)
        text = f"{block.before} → {block.after}" if block.after < block.before else str(block.before)
        axis.text(0, row, text, ha="center", va="center", fontsize=7)
    axis.set_yticks(range(len(blocks)), [block.name for block in blocks], fontsize=7)
    axis.set_xticks([])
    axis.invert_yaxis()
    _legend(figure)
    return _save(figure, path)


def _bars(axis: Any, layer: Layer) -> None:
    """Draw a histogram in % of a layer's filters; those that go stand out, where they are still there."""
    values = np.asarray(layer.norms)
    kept = np.ones(len(values), dtype=bool)
    if layer.total == len(values):
        kept[:] = False
        kept[list(layer.kept)] = True
    share = 100 / len(values)
    axis.hist(
        [values[kept], values[~kept]],
        bins=np.histogram_bin_edges(values, BINS),
        weights=[np.full(count, share) for count in (kept.sum(), (~kept).sum())],
        color=[KEPT, GONE],
        stacked=True,
    )


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for colour, label in ((KEPT, "stay"), (GONE, "go"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
