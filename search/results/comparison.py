"""What trials cost and score beside their parent: one row each for the parent, the evaluated and the Pareto set.

Which figures an evaluation tells besides its score is the workload's to say, by its TABLE.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import durable
from search.ranking import pareto
from search.record import TrialRecord
from search.results import leaderboard
from search.results.leaderboard import Interval
from search.spec import SearchSpec

PARENT = "parent"
UNKNOWN = Interval(None)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One network."""

    name: str
    """Of its evaluation: the trial's number, that and a seed, or `parent`."""
    on_front: bool
    """Whether no other trial beats it on validation in every objective."""
    params: Mapping[str, Any]
    validation: Mapping[str, float]
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """What its evaluation tells, by the headings of the workload's table; empty: not evaluated."""
    test: Interval = UNKNOWN
    """The headline metric."""
    difference: Interval = UNKNOWN
    """Of the headline metric from the parent's, with its paired interval."""


def lines(
    spec: SearchSpec,
    records: Sequence[TrialRecord],
    evaluations: Iterable[Mapping[str, Any]],
    table: Mapping[str, str],
) -> list[Line]:
    """Return the parent's line first, then those of trials from the best down by validation.

    table: metrics of an evaluation to show, and their headings.
    """
    by_name = {str(item["name"]): item for item in evaluations}
    front = {record.number for record in pareto(records, spec.objectives)}
    of_trial = {record.number: record for record in records}
    parent = by_name.pop(PARENT, None)
    evaluated = [
        _line(spec, name, of_trial.get(item["trial"]), item, parent, front, table) for name, item in by_name.items()
    ]
    known = {item["trial"] for item in by_name.values()}
    left = [_line(spec, str(number), of_trial[number], None, None, front, table) for number in front - known]
    first = [_line(spec, PARENT, None, parent, None, front, table)] if parent else []
    metric, sign = spec.objectives[0].metric, -1 if spec.objectives[0].mode == "max" else 1
    order = sorted([*evaluated, *left], key=lambda line: (sign * line.validation.get(metric, 0.0), line.name))
    return [*first, *order]


def write(path: Path, spec: SearchSpec, found: Sequence[Line], table: Mapping[str, str]) -> Path:
    """Write the lines as CSV; what is unknown stays empty.

    An objective that the table has too, such as gmacs, stands once: as evaluated, or else as the trial told it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric, searched = leaderboard.headline(spec), [parameter.name for parameter in spec.parameters]
    objectives = [objective.metric for objective in spec.objectives if objective.metric not in table]
    ends = ("", "_low", "_high")
    scores = [f"{name}{end}" for name in (f"test_{metric}", f"test_{metric}_minus_parent") for end in ends]
    writer.writerow(["name", "on_front", *objectives, *table, *scores, *searched])
    for line in found:
        intervals = [value for one in (line.test, line.difference) for value in (one.value, one.low, one.high)]
        cells = [
            *(line.validation.get(name) for name in objectives),
            *(line.figures.get(heading, line.validation.get(key)) for key, heading in table.items()),
            *intervals,
            *(line.params.get(name) for name in searched),
        ]
        writer.writerow([line.name, line.on_front, *("" if cell is None else cell for cell in cells)])
    return durable.write(path, text.getvalue())


def _line(
    spec: SearchSpec,
    name: str,
    record: TrialRecord | None,
    evaluation: Mapping[str, Any] | None,
    parent: Mapping[str, Any] | None,
    front: set[int],
    table: Mapping[str, str],
) -> Line:
    metric = leaderboard.headline(spec)
    found: Mapping[str, Any] = (evaluation or {}).get("metrics", {})
    objectives = [objective.metric for objective in spec.objectives]
    values = record.values if record is not None and record.values is not None else ()
    return Line(
        name=name,
        on_front=record is not None and record.number in front,
        params=record.params if record is not None else {},
        validation=dict(zip(objectives, values, strict=False)),
        figures={heading: found.get(key) for key, heading in table.items()} if evaluation else {},
        test=leaderboard.score(evaluation, metric) if evaluation else UNKNOWN,
        difference=leaderboard.difference(evaluation, parent, metric) if evaluation and parent else UNKNOWN,
    )
