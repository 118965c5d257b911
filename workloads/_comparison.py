"""A checkpoint and predictions of others side by side: scores with their intervals, and what they are apart."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import durable
from segmentation import bootstrap
from segmentation.epoch import Evaluation

Interval = tuple[float | None, float | None]
UNKNOWN: Interval = (None, None)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of one of them."""

    name: str
    metric: str
    score: float | None
    interval: Interval
    """95 %, over groups."""
    difference: float | None
    """From the first; None for the first itself."""
    difference_interval: Interval
    """Paired: both were scored on the same groups in every replicate."""


def lines(evaluations: Mapping[str, Evaluation], metrics: Sequence[str]) -> list[Line]:
    """Return a line for each metric of each evaluation, the first being what the others are set against."""
    first = next(iter(evaluations))
    return [
        _line(name, metric, evaluation, None if name == first else evaluations[first])
        for metric in metrics
        for name, evaluation in evaluations.items()
    ]


def text(table: Sequence[Line]) -> str:
    """Return the lines as people read them: a row for each metric, a column for each name."""
    names, metrics = (list(dict.fromkeys(getattr(one, part) for one in table)) for part in ("name", "metric"))
    by_place = {(one.metric, one.name): one for one in table}
    rows = [["metric", *names], *([metric, *(_cell(by_place[metric, name]) for name in names)] for metric in metrics)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    made = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*made, f"in brackets: the difference from {names[0]}, and its paired 95 % interval"])


def write(path: Path, table: Sequence[Line]) -> Path:
    """Write the lines as CSV; what is unknown stays empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ["", "_low", "_high"]
    writer.writerow(["name", "metric", *(f"{value}{end}" for value in ("score", "difference") for end in ends)])
    for one in table:
        cells = [one.score, *one.interval, one.difference, *one.difference_interval]
        writer.writerow([one.name, one.metric, *("" if cell is None else cell for cell in cells)])
    return durable.write(path, out.getvalue())


def _line(name: str, metric: str, evaluation: Evaluation, first: Evaluation | None) -> Line:
    score = evaluation.metrics.get(metric)
    other = None if first is None else first.metrics.get(metric)
    return Line(
        name=name,
        metric=metric,
        score=score,
        interval=evaluation.intervals.get(metric, UNKNOWN),
        difference=None if score is None or other is None else score - other,
        difference_interval=UNKNOWN if first is None else _paired(evaluation, first, metric),
    )


def _paired(one: Evaluation, other: Evaluation, metric: str) -> Interval:
    """Return the interval of the difference, replicate by replicate; unknown where either has none."""
    left, right = one.resamples.get(metric), other.resamples.get(metric)
    if left is None or right is None:
        return UNKNOWN
    found = bootstrap.paired_difference(left, right)
    return found.low, found.high


def _cell(line: Line) -> str:
    if line.score is None:
        return "undefined"
    told = f"{line.score:.4f}"
    if line.difference is None:
        return told
    low, high = line.difference_interval
    between = "" if low is None or high is None else f", {low:+.4f} to {high:+.4f}"
    return f"{told} ({line.difference:+.4f}{between})"
