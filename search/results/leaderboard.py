"""The promoted trials with test scores and honest uncertainty, and all trials as one table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import durable
from search.ranking import ranked
from search.record import StudyPaths, TrialRecord
from search.spec import Objective, SearchSpec

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class Interval:
    """A score and the 95 % interval around it, None where unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated checkpoint on the leaderboard."""

    rank: int | None
    """Place by validation among all finished trials; None for one that did not finish."""
    trial: int
    name: str
    """Name of the evaluation: the trial's number, or that and a seed."""
    role: str
    """promoted, incumbent, or both."""
    params: Mapping[str, Any]
    validation: Mapping[str, float]
    metric: str
    """The headline metric on the test split."""
    test: Interval
    difference: Interval
    """Test score minus the incumbent's, with its paired interval."""
    epochs: int
    slot_s: float
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    why: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_evaluations(paths: StudyPaths) -> list[dict[str, Any]]:
    """Return every evaluation.json of a study, in order of their names."""
    return [durable.read_json(path) for path in sorted(paths.evaluation("x").parent.glob("*/evaluation.json"))]


def read_promotion(paths: StudyPaths) -> dict[str, Any]:
    """Return promotion.json, or one that promotes nobody."""
    return durable.read_json(paths.promotion) if paths.promotion.exists() else {"promoted": [], "incumbent": None}


def headline(spec: SearchSpec) -> str:
    """Return the test metric that the leaderboard shows."""
    return spec.evaluation.metric or spec.objectives[0].metric.removeprefix("val_")


def headline_mode(spec: SearchSpec) -> Literal["max", "min"]:
    """Say which way the headline metric is better: as its objective says, else less of a loss and more of the rest."""
    name = headline(spec)
    for objective in spec.objectives:
        if objective.metric.removeprefix("val_") == name.removeprefix("val_"):
            return objective.mode
    return "min" if any(word in name for word in ("loss", "error")) else "max"


def rows(
    spec: SearchSpec,
    records: Sequence[TrialRecord],
    promotion: Mapping[str, Any],
    evaluations: Iterable[Mapping[str, Any]],
) -> list[Row]:
    """Return one row for each evaluated checkpoint, in the order that validation gave them.

    The order is never that of the test scores: the best of several test scores is too good a score, and to choose
    by it would make the test split one more validation split.
    """
    evaluations = list(evaluations)
    by_number = {record.number: record for record in records}
    ranks = {record.number: place for place, record in enumerate(ranked(records, spec.objectives), start=1)}
    incumbent = _incumbent(promotion, evaluations)
    made = [
        _row(spec, by_number[item["trial"]], ranks.get(item["trial"]), promotion, item, incumbent)
        for item in evaluations
        if item["trial"] in by_number
    ]
    return sorted(made, key=lambda row: (row.rank is None, row.rank or 0, row.trial, len(row.name), row.name))


def score(evaluation: Mapping[str, Any], metric: str) -> Interval:
    """Return a metric of an evaluation with its interval."""
    low, high = evaluation.get("intervals", {}).get(metric) or (None, None)
    return Interval(_finite(evaluation.get("metrics", {}).get(metric)), _finite(low), _finite(high))


def difference(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Interval:
    """Return the score of one evaluation minus the other's, with the 95 % interval of the paired replicates.

    Replicate i of both drew the same groups, so their difference cancels what makes a group easy or hard.
    Replicates in which either score is undefined are left out.

    Raises:
        ValueError: if the evaluations have different numbers of replicates.
    """
    a, b = _finite(one["metrics"].get(metric)), _finite(other["metrics"].get(metric))
    point = None if a is None or b is None else a - b
    left, right = one.get("resamples", {}).get(metric, []), other.get("resamples", {}).get(metric, [])
    if len(left) != len(right):
        raise ValueError(
            f"evaluations {one['name']} and {other['name']}: {len(left)} and {len(right)} resamples of {metric}; "
            "expected as many; evaluate both again with the same settings"
        )
    pairs = [(_finite(x), _finite(y)) for x, y in zip(left, right, strict=True)]
    gaps = [x - y for x, y in pairs if x is not None and y is not None]
    return Interval(point, percentile(gaps, 2.5), percentile(gaps, 97.5)) if gaps else Interval(point)


def verdict(gap: Interval, mode: str) -> Verdict | None:
    """Say what a paired difference shows; None without an interval; an interval that holds zero shows nothing."""
    if gap.low is None or gap.high is None:
        return None
    if gap.low <= 0 <= gap.high:
        return "not distinguishable"
    return "better" if (gap.low > 0) == (mode == "max") else "worse"


def against(spec: SearchSpec, row: Row, gap: Interval, name: str) -> tuple[str, str]:
    """Return in words what a paired difference of the headline metric says, and its tone."""
    assert gap.value is not None
    shown = f"{row.metric} {signed(gap.value)}"
    found = verdict(gap, headline_mode(spec))
    if found is None:
        return f"{shown} against {name}; without replicates nothing says whether that is chance.", "plain"
    interval = f"paired 95 % interval {signed(gap.low)} to {signed(gap.high)}"
    if found == "not distinguishable":
        return f"Not distinguishable from {name}: {shown}, and the {interval} holds zero.", "plain"
    return f"{found.capitalize()} than {name}: {shown}, {interval}.", found


def beside_majority(spec: SearchSpec, row: Row) -> str:
    """Say how the headline stands beside that of calling everything the most frequent class; "" where not known."""
    name = f"{row.metric}_majority"
    blind = score(row.evaluation, name)
    if blind.value is None:
        return ""
    drawn = row.evaluation.get("resamples", {}).get(name, [])
    other = {**row.evaluation, "metrics": {row.metric: blind.value}, "resamples": {row.metric: drawn}}
    label = row.evaluation.get("details", {}).get("majority", "one class")
    gap = difference(row.evaluation, other, row.metric)
    return against(spec, row, gap, f"calling everything {label} ({blind.value:.4f})")[0]


def show_score(value: float) -> str:
    """Return a score for people: three decimals, or three digits where those would hide it."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def signed(value: float | None) -> str:
    """Return a difference for people, with its sign; nothing for None."""
    if value is None:
        return ""
    return f"{'−' if value < 0 else '+'}{show_score(abs(value))}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile of some numbers, linear between neighbours as in NumPy."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def write_leaderboard(path: Path, table: Sequence[Row], spec: SearchSpec) -> Path:
    """Write the leaderboard as CSV, in the order of `rows`; what is unknown stays empty."""
    lines = [_cells(row, spec) for row in table]
    names = _cells(_EMPTY, spec) if not lines else lines[0]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return durable.write(path, text.getvalue())


def write_comparison(path: Path, table: Sequence[Row], spec: SearchSpec) -> Path:
    """Write the leaderboard of a search over one parameter in the order of its values: choices as they are listed."""
    (parameter,) = spec.parameters

    def place(row: Row) -> tuple[Any, str]:
        value = row.params.get(parameter.name)
        return (parameter.choices.index(value) if parameter.choices else value), row.name

    return write_leaderboard(path, sorted(table, key=place), spec)


def write_table(path: Path, records: Sequence[TrialRecord], spec: SearchSpec) -> Path:
    """Write every trial as one row of a Parquet file: `params.<name>`, `objective.<metric>`, `metrics.<name>`."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(_columns(records, spec.objectives, spec))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return durable.write(path, sink.getvalue().to_pybytes())


_EMPTY = Row(
    rank=None,
    trial=0,
    name="",
    role="",
    params={},
    validation={},
    metric="",
    test=Interval(None),
    difference=Interval(None),
    epochs=0,
    slot_s=0.0,
)


def _row(
    spec: SearchSpec,
    record: TrialRecord,
    rank: int | None,
    promotion: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    incumbent: Mapping[str, Any] | None,
) -> Row:
    metric = headline(spec)
    reasons = {item["trial"]: item.get("why", "") for item in promotion.get("promoted", [])}
    same = incumbent is not None and incumbent["name"] == evaluation["name"]
    gap = Interval(None) if incumbent is None or same else difference(evaluation, incumbent, metric)
    values = record.values or (math.nan,) * len(spec.objectives)
    return Row(
        rank=rank,
        trial=record.number,
        name=str(evaluation["name"]),
        role=_role(record.number, reasons, promotion.get("incumbent")),
        params=record.params,
        validation={o.metric: value for o, value in zip(spec.objectives, values, strict=True)},
        metric=metric,
        test=score(evaluation, metric),
        difference=gap,
        # Where the trial was trained again, these are not the search's.
        epochs=evaluation.get("epochs", max(record.epochs, default=0)),
        slot_s=evaluation.get("slot_s", record.slot_s),
        checkpoint=evaluation.get("checkpoint") or record.checkpoint or "",
        checkpoint_sha256=evaluation.get("checkpoint_sha256") or "",
        why=reasons.get(record.number, ""),
        evaluation=evaluation,
    )


def _role(number: int, promoted: Mapping[int, str], incumbent: int | None) -> str:
    roles = [*(["promoted"] if number in promoted else []), *(["incumbent"] if number == incumbent else [])]
    return " and ".join(roles) or "evaluated"


def _incumbent(promotion: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    number = promotion.get("incumbent")
    named = [item for item in evaluations if item["trial"] == number]
    return next((item for item in named if str(item["name"]) == str(number)), named[0] if named else None)


def _cells(row: Row, spec: SearchSpec) -> dict[str, Any]:
    metric = headline(spec)
    return {
        "rank": _cell(row.rank),
        "trial": row.trial,
        "evaluation": row.name,
        "role": row.role,
        **{parameter.name: _cell(row.params.get(parameter.name, "")) for parameter in spec.parameters},
        **{objective.metric: _cell(row.validation.get(objective.metric)) for objective in spec.objectives},
        f"test_{metric}": _cell(row.test.value),
        f"test_{metric}_low": _cell(row.test.low),
        f"test_{metric}_high": _cell(row.test.high),
        "difference": _cell(row.difference.value),
        "difference_low": _cell(row.difference.low),
        "difference_high": _cell(row.difference.high),
        "epochs": row.epochs,
        "slot_s": round(row.slot_s, 3),
        "checkpoint": row.checkpoint,
        "checkpoint_sha256": row.checkpoint_sha256,
    }


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _columns(records: Sequence[TrialRecord], objectives: Sequence[Objective], spec: SearchSpec) -> dict[str, Any]:
    import pyarrow

    moment = pyarrow.timestamp("us", tz="UTC")
    params = dict.fromkeys(
        [*(parameter.name for parameter in spec.parameters), *(name for record in records for name in record.params)]
    )
    metrics = dict.fromkeys(name for record in records for name in record.metrics)
    columns: dict[str, Any] = {
        "number": pyarrow.array([record.number for record in records], pyarrow.int64()),
        "state": pyarrow.array([record.state for record in records], pyarrow.string()),
        "reason": pyarrow.array([record.reason for record in records], pyarrow.string()),
    }
    for name in params:
        columns[f"params.{name}"] = _column([record.params.get(name, _ABSENT) for record in records])
    for index, objective in enumerate(objectives):
        values = [record.values[index] if record.values else None for record in records]
        columns[f"objective.{objective.metric}"] = pyarrow.array(values, pyarrow.float64())
    for name in metrics:
        columns[f"metrics.{name}"] = pyarrow.array([r.metrics.get(name) for r in records], pyarrow.float64())
    columns |= {
        "epochs": pyarrow.array([max(record.epochs, default=0) for record in records], pyarrow.int64()),
        "best_epoch": pyarrow.array([record.best_epoch for record in records], pyarrow.int64()),
        "seed": pyarrow.array([record.seed for record in records], pyarrow.int64()),
        "attempts": pyarrow.array([record.attempts for record in records], pyarrow.int64()),
        "slot_s": pyarrow.array([record.slot_s for record in records], pyarrow.float64()),
        "started": pyarrow.array([_utc(record.started) for record in records], moment),
        "finished": pyarrow.array([_utc(record.finished) for record in records], moment),
        "checkpoint": pyarrow.array([record.checkpoint for record in records], pyarrow.string()),
        "checkpoint_sha256": pyarrow.array([record.checkpoint_sha256 for record in records], pyarrow.string()),
    }
    return columns


_ABSENT: Any = object()


def _column(values: Sequence[Any]) -> Any:
    """Return one parameter's values as a column of one type; lists, None and mixtures as JSON text."""
    import pyarrow

    present = [value for value in values if value is not _ABSENT]
    kinds = {type(value) for value in present}
    for accepted, kind in (({bool}, "bool"), ({int}, "int64"), ({int, float}, "float64"), ({str}, "string")):
        if kinds and kinds <= accepted:
            return pyarrow.array([None if value is _ABSENT else value for value in values], kind)
    return pyarrow.array([None if value is _ABSENT else json.dumps(value) for value in values], "string")


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
