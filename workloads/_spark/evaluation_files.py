"""What an evaluation leaves behind: metrics.json, confusion_matrix.png, evaluation_report.txt and examples/.

Everything follows from one confusion table for each image, (N, K, K), rows true, columns predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import durable
from segmentation import bootstrap, figures, metrics
from segmentation.evaluation import defined
from segmentation.metrics import Convention
from workloads._spark.classes import CLASSES, COLOURS, paint

Table = npt.NDArray[Any]
Scores = dict[str, Any]

METRICS_FILE = "metrics.json"
MATRIX_FILE = "confusion_matrix.png"
REPORT_FILE = "evaluation_report.txt"
EXAMPLES = "examples"
FAMILIES = ("precision", "recall", "iou", "dice", "f1")


@dataclass(frozen=True)
class Example:
    """One picture with truth and prediction."""

    satellite: str
    name: str
    image: npt.NDArray[np.uint8]
    """(3, H, W)"""
    mask: npt.NDArray[np.uint8]
    """(H, W) class ids"""
    predicted: npt.NDArray[np.uint8]
    """(H, W) class ids"""


def write(
    out_dir: Path, tables: Table, satellites: Sequence[str], examples: Iterable[Example], count: int
) -> list[str]:
    """Write all files; return their names below the folder, pictures first.

    Args:
        out_dir: made if missing.
        tables: (N, K, K) counts.
        satellites: whose picture each of the N is.
        examples: pictures to draw; no more than `count` are taken.
        count: pictures to draw.
    """
    scores = score(tables, satellites)
    drawn = [f"{EXAMPLES}/{path.name}" for path in draw_examples(out_dir / EXAMPLES, examples, count)]
    draw_matrix(out_dir / MATRIX_FILE, tables.sum(0))
    durable.write(out_dir / REPORT_FILE, report(scores))
    durable.write(out_dir / METRICS_FILE, json.dumps(durable.plain(scores), indent=2))
    return [MATRIX_FILE, *drawn, METRICS_FILE, REPORT_FILE]


def score(tables: Table, satellites: Sequence[str]) -> Scores:
    """Return what metrics.json holds, None where a score is undefined.

    `per_satellite` scores the classes that a satellite's masks show: a class they lack is None there, and left out of
    its means, however often it is predicted. Such a pixel still counts against the class that it really is.
    """
    if len(tables) != len(satellites) or not len(tables):
        raise ValueError(f"got {len(tables)} tables and {len(satellites)} satellites; expected one of each an image")
    member = np.asarray(satellites, dtype=str)
    total = tables.sum(0)
    return {
        "overall": overall(total),
        "per_satellite": {str(name): _of_satellite(tables[member == name]) for name in np.unique(member)},
        "classes": list(CLASSES),
        "confusion_matrix": total.tolist(),
        "images": len(tables),
    }


def satellite_table(tables: Table, satellites: Sequence[str]) -> dict[str, Scores]:
    """Return the scores of each satellite, and the 95 % interval of its mean IoU over its own images."""
    member = np.asarray(satellites, dtype=str)
    found = {}
    for name in np.unique(member):
        own = tables[member == name]
        found[str(name)] = {**_of_satellite(own), "mean_iou_interval": _interval(own)}
    return found


def overall(table: Table) -> Scores:
    """Return the scores of a summed table (K, K); a class neither there nor predicted scores None."""
    counts = metrics.counts_from_confusion(table)
    each = {family: metrics.SCORES[family](counts) for family in FAMILIES}
    without = Convention(background="out")
    support = table.sum(1)
    return {
        "accuracy": defined(metrics.pixel_accuracy(counts, multilabel=False)),
        **{f"mean_{name}": defined(metrics.mean_over_classes(each[name], Convention())) for name in ("iou", "dice")},
        **{f"mean_{name}_no_bg": defined(metrics.mean_over_classes(each[name], without)) for name in ("iou", "dice")},
        "per_class": {
            label: {**{family: defined(each[family][k]) for family in FAMILIES}, "support": int(support[k])}
            for k, label in enumerate(CLASSES)
        },
    }


def matrix_figure(table: Table) -> Any:
    """Return a matplotlib figure of the table, counts at the left, shares of each row at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    shares = row_shares(table)
    panels = (("pixels", table, "{:,}"), ("share of the true class", shares, "{:.4f}"))
    for axis, (title, values, form) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_xticks(range(len(CLASSES)), CLASSES)
        axis.set_yticks(range(len(CLASSES)), CLASSES)
        axis.set(xlabel="predicted", ylabel="true")
        for row, column in np.ndindex(values.shape):
            text = "none" if np.isnan(values[row, column]) else form.format(values[row, column])
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    return figure


def draw_matrix(path: Path, table: Table) -> Path:
    """Write the confusion matrix as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix_figure(table).savefig(path, dpi=120)
    return path


def row_shares(table: Table) -> npt.NDArray[np.float64]:
    """Return the table with each row divided by its sum; nan in the row of a class that never occurs."""
    whole = table.sum(1, keepdims=True)
    return np.asarray(table / np.where(whole > 0, whole, np.nan), np.float64)


def report(scores: Mapping[str, Any]) -> str:
    """Return the scores for people: overall, each class, each satellite, the confusion matrix."""
    whole = scores["overall"]
    names = [name for name in whole if name != "per_class"]
    sections = [
        ("OVERALL", [f"images {scores['images']:>22,}", *(f"{name:<18}{_text(whole[name]):>11}" for name in names)]),
        ("PER CLASS", _class_lines(whole["per_class"])),
        ("PER SATELLITE (means over the classes that a satellite's masks show)", _satellite_lines(scores)),
        ("CONFUSION MATRIX (rows true, columns predicted)", _matrix_lines(scores["confusion_matrix"])),
    ]
    parts = ["\n".join([title, "-" * len(title), *lines]) for title, lines in sections]
    return "\n\n".join(["EVALUATION REPORT", *parts]) + "\n"


def draw_examples(folder: Path, examples: Iterable[Example], count: int) -> list[Path]:
    """Write example_0.png and so on, `count` of them or as many as there are; those of an earlier call go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("example_*.png"):
        old.unlink()
    chosen = (example for _, example in zip(range(count), examples, strict=False))
    return [draw_example(folder / f"example_{place}.png", example) for place, example in enumerate(chosen)]


def draw_example(path: Path, example: Example) -> Path:
    """Write the picture of one example."""
    example_figure(example).savefig(path, dpi=100)
    return path


def example_figure(example: Example) -> Any:
    """Return a matplotlib figure of input, truth and prediction side by side, the satellite's name above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    figure.suptitle(f"{example.satellite}  ({example.name})", fontsize=10)
    panels = {"input": example.image.transpose(1, 2, 0)}
    panels |= {"ground truth": paint(example.mask), "prediction": paint(example.predicted)}
    for axis, (title, picture) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[], title=title)
    figures.legend(figure, CLASSES, COLOURS, skip_first=False)
    return figure


def _of_satellite(tables: Table) -> Scores:
    table = tables.sum(0)
    counts = metrics.counts_from_confusion(table)
    there = table.sum(1) > 0
    each = {family: np.where(there, metrics.SCORES[family](counts), np.nan) for family in ("iou", "dice")}
    return {
        **{f"mean_{family}": defined(metrics.mean_over_classes(each[family], Convention())) for family in each},
        **{family: {label: defined(each[family][k]) for k, label in enumerate(CLASSES)} for family in each},
        "images": len(tables),
    }


def _interval(tables: Table) -> list[float]:
    drawn = bootstrap.resample_sums(tables)  # (R, K, K)
    each = np.where(drawn.sum(-1) > 0, metrics.iou(metrics.counts_from_confusion(drawn)), np.nan)
    return list(bootstrap.interval(metrics.mean_over_classes(each, Convention())))


def _class_lines(per_class: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = f"{'class':<12}" + "".join(f"{family:>11}" for family in FAMILIES) + f"{'support':>16}"
    rows = [
        f"{label:<12}" + "".join(f"{_text(row[family]):>11}" for family in FAMILIES) + f"{row['support']:>16,}"
        for label, row in per_class.items()
    ]
    return [head, *rows]


def _satellite_lines(scores: Mapping[str, Any]) -> list[str]:
    width = max(len("satellite"), *(len(name) for name in scores["per_satellite"])) + 2
    columns = [f"iou {label}" for label in scores["classes"]]
    head = f"{'satellite':<{width}}{'images':>8}{'mean_iou':>11}{'mean_dice':>11}"
    lines = [head + "".join(f"{column:>16}" for column in columns)]
    for name, row in scores["per_satellite"].items():
        line = f"{name:<{width}}{row['images']:>8,}{_text(row['mean_iou']):>11}{_text(row['mean_dice']):>11}"
        lines.append(line + "".join(f"{_text(row['iou'][label]):>16}" for label in scores["classes"]))
    return lines


def _matrix_lines(matrix: Sequence[Sequence[int]]) -> list[str]:
    lines = [" " * 12 + "".join(f"{label:>16}" for label in CLASSES)]
    for label, row in zip(CLASSES, matrix, strict=True):
        lines.append(f"{label:<12}" + "".join(f"{cell:>16,}" for cell in row))
    return lines


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.5f}"
