"""One self-contained page about a study: the answer first, then how it was found and what it cost."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import durable
from search.ranking import best, pareto, ranked
from search.record import StudyPaths, TrialRecord
from search.results import leaderboard, plots
from search.results.comparison import Line
from search.results.leaderboard import Interval, Row, show_score, signed
from search.results.plots import WORDS, show
from search.spec import SearchSpec

FIGURES_PER_TRIAL = 4
FIGURE_BYTES = 4_000_000
FEW_TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a report says besides the records."""

    wall_s: float = 0.0
    """Seconds that the search took, all its runs added up."""
    slots: int = 0
    """Trials at the same time; 0 if unknown."""
    sampler: str = ""
    """The sampler in use and why, in words."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python, the packages and this program."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The data's manifest, as the workload's `prepare` returned it."""
    warnings: Sequence[str] = ()
    """Whatever a reader must know before believing the numbers."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The first thing on the page."""

    title: str
    score: str = ""
    metric: str = ""
    interval: str = ""
    comparison: str = ""
    tone: str = "plain"
    """better, worse or plain: the colour of the comparison."""


@dataclass(frozen=True)
class Section:
    """One heading with figures."""

    title: str
    note: str
    figures: tuple[plots.Figure, ...] = ()
    grid: bool = False


def write(
    paths: StudyPaths,
    spec: SearchSpec,
    records: Sequence[TrialRecord],
    promotion: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    facts: Facts,
    compared: Sequence[Line] = (),
) -> Path:
    """Write report.html; the page needs no network and no other file.

    Args:
        paths: the study's; pictures of evaluations are read from here.
        spec: of the search.
        records: all trials, in any state.
        promotion: content of promotion.json.
        evaluations: content of each evaluation.json.
        facts: versions, data and warnings.
        compared: what networks cost and score beside their parent.
    """
    import jinja2
    from plotly import offline

    records = sorted(records, key=lambda record: record.number)
    rows = leaderboard.rows(spec, records, promotion, evaluations)
    sections = _sections(spec, records, promotion)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    figures = [figure for section in sections for figure in section.figures]
    page = template.render(
        spec=spec,
        answer=answer(spec, records, promotion, rows, compared),
        warnings=warnings(spec, records, promotion, rows, facts),
        winner=_winner(spec, records, promotion),
        rows=[_row_cells(row) for row in rows],
        metric=leaderboard.headline(spec),
        compared=_compared(spec, compared),
        scan=_scan(paths),
        sections=sections,
        examples=_examples(paths, rows),
        cost=_cost(records, facts),
        reasons=_reasons(records),
        about={"sampler": facts.sampler, **facts.versions},
        manifest={name: _shortened(show(value)) for name, value in facts.manifest.items() if name != "warnings"},
        figures_json=_script_json(figures),
        plotly_js=offline.get_plotlyjs() if figures else "",
    )
    return durable.write(paths.report, page)


def answer(
    spec: SearchSpec,
    records: Sequence[TrialRecord],
    promotion: Mapping[str, Any],
    rows: Sequence[Row],
    compared: Sequence[Line] = (),
) -> Answer:
    """Return the answer: who is best, its test score, and whether it beats the defaults, or else its parent."""
    winner = best(records, spec.objectives)
    if winner is None:
        counts = Counter(record.state for record in records)
        parts = ", ".join(f"{count} {WORDS[state]}" for state, count in counts.items())
        return Answer(title="No trial has finished yet", comparison=parts or "Nothing has started.")
    row = next((row for row in rows if row.trial == winner.number), None)
    objective, value = spec.objectives[0].metric, winner.values[0] if winner.values else float("nan")
    same = winner.number == promotion.get("incumbent")
    title = "The defaults are best" if same else f"Trial {winner.number} is best"
    if len(spec.objectives) > 1:
        title += f" by {objective}"
    if row is None or row.test.value is None:
        return Answer(
            title=title,
            score=show_score(value),
            metric=f"{objective} on validation",
            comparison="It has not been scored on the test split, so this number is too optimistic to report.",
        )
    comparison, tone = _comparison(spec, records, promotion, row, same)
    beside = next((line.difference for line in compared if line.name == row.name), None)
    if promotion.get("incumbent") is None and beside is not None and beside.value is not None:
        comparison, tone = leaderboard.against(spec, row, beside, "its parent")
    return Answer(
        title=title,
        score=show_score(row.test.value),
        metric=f"{row.metric} on the test split",
        interval=_interval(row.test),
        comparison=" ".join(filter(None, (comparison, leaderboard.beside_majority(spec, row)))),
        tone=tone,
    )


def warnings(
    spec: SearchSpec,
    records: Sequence[TrialRecord],
    promotion: Mapping[str, Any],
    rows: Sequence[Row],
    facts: Facts,
) -> list[str]:
    """Return what a reader must know before believing the numbers, gravest first."""
    found = []
    if facts.manifest.get("synthetic"):
        found.append("Synthetic data: the scores say that the search works, nothing about real images.")
    found += [str(text) for text in (*facts.warnings, *facts.manifest.get("warnings", ()))]
    by_number = {record.number: record for record in records}
    for row in rows:
        expected = by_number[row.trial].checkpoint_sha256
        retrained = row.name != str(row.trial)
        if expected and row.checkpoint_sha256 and expected != row.checkpoint_sha256 and not retrained:
            found.append(f"Trial {row.trial}: the checkpoint that was evaluated is not the one that the search chose.")
    failed = sum(record.state == "failed" for record in records)
    if failed:
        found.append(f"{failed} of {len(records)} trials failed; the reasons are under Cost.")
    finished = len(ranked(records, spec.objectives))
    if 0 < finished < FEW_TRIALS:
        found.append(f"Only {finished} trials finished: which parameter matters is little more than a guess.")
    evaluated = {row.trial for row in rows}
    missing = [item["trial"] for item in promotion.get("promoted", []) if item["trial"] not in evaluated]
    if missing:
        found.append(f"Promoted but not evaluated: trial {', '.join(map(str, missing))}.")
    return list(dict.fromkeys(found))


def _comparison(
    spec: SearchSpec, records: Sequence[TrialRecord], promotion: Mapping[str, Any], row: Row, same: bool
) -> tuple[str, str]:
    finished = len(ranked(records, spec.objectives))
    if same:
        return f"None of the {finished} trials that finished beat them on validation.", "plain"
    gap, incumbent = row.difference, promotion.get("incumbent")
    if incumbent is None or gap.value is None:
        return "The defaults were not evaluated, so there is nothing to compare it with.", "plain"
    return leaderboard.against(spec, row, gap, f"the defaults (trial {incumbent})")


def _winner(spec: SearchSpec, records: Sequence[TrialRecord], promotion: Mapping[str, Any]) -> dict[str, Any]:
    winner = best(records, spec.objectives)
    if winner is None:
        return {"values": [], "yaml": "", "epoch": None, "checkpoint": None, "number": None}
    default = next((record.params for record in records if record.number == promotion.get("incumbent")), {})
    values = []
    for parameter in spec.parameters:
        value, before = winner.params.get(parameter.name, _ABSENT), default.get(parameter.name, _ABSENT)
        shown = ["—" if item is _ABSENT else show(item) for item in (value, before)]
        values.append(
            {
                "name": parameter.name,
                "value": shown[0],
                "default": shown[1],
                "range": _range(parameter),
                "changed": shown[0] != shown[1],
            }
        )
    return {
        "values": values,
        "yaml": _yaml(winner.params),
        "epoch": winner.best_epoch,
        "checkpoint": winner.checkpoint,
        "number": winner.number,
    }


def _sections(spec: SearchSpec, records: Sequence[TrialRecord], promotion: Mapping[str, Any]) -> list[Section]:
    promoted = [item["trial"] for item in promotion.get("promoted", [])]
    histories = [plots.history(records, spec.objectives, index) for index in range(len(spec.objectives))]
    conditional = [parameter.name for parameter in spec.parameters if parameter.when]
    sections = [
        _section("Search history", "Validation score of each trial, and the best so far.", histories),
        _section(
            "Which parameters matter",
            "Share of the variance between finished trials that each parameter explains (PED-ANOVA)."
            + (f" Conditional: {', '.join(conditional)}." if conditional else ""),
            [plots.importance(records, spec)],
        ),
        _section(
            "Parallel coordinates",
            "One line a finished trial; the better, the stronger; gold is the best.",
            [plots.parallel(records, spec)],
        ),
        _section(
            "One parameter at a time",
            "Finished trials; gold is the best. Stopped trials are left out: their scores are of earlier epochs.",
            plots.slices(records, spec).values(),
            grid=True,
        ),
    ]
    if len(spec.objectives) > 1:
        size = len(pareto(records, spec.objectives))
        note = f"{size} trials that no other beats in every objective."
        if len(spec.objectives) > 2:
            note += " The picture shows the first two objectives only."
        sections.append(_section("Pareto front", note, [plots.front(records, spec.objectives)]))
    learning = plots.curves(records, spec.objectives, promoted)
    sections.append(
        _section("Learning curves", "Validation score after each epoch; stopped trials are faint.", [learning])
    )
    sections.append(_section("Slots", "When which slot was busy, and how each trial ended.", [plots.timeline(records)]))
    return sections


def _section(title: str, note: str, figures: Iterable[plots.Figure | None], *, grid: bool = False) -> Section:
    drawn = tuple(figure for figure in figures if figure is not None)
    return Section(title, note if drawn else "Nothing to draw yet: too few trials have got this far.", drawn, grid)


def _row_cells(row: Row) -> dict[str, Any]:
    return {
        "rank": "—" if row.rank is None else row.rank,
        "name": row.name,
        "role": row.role,
        "validation": ", ".join(map(show_score, row.validation.values())),
        "test": "—" if row.test.value is None else show_score(row.test.value),
        "interval": _interval(row.test),
        "difference": "—" if row.difference.value is None else signed(row.difference.value),
        "gap": "" if row.difference.low is None else f"{signed(row.difference.low)} to {signed(row.difference.high)}",
        "epochs": row.epochs,
        "slot": _duration(row.slot_s),
        "why": row.why,
    }


def _examples(paths: StudyPaths, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the pictures of the promoted evaluations, embedded; what is missing or too large is named."""
    examples = []
    for row in rows:
        if "promoted" not in row.role:
            continue
        folder = paths.evaluation(row.name)
        names = [name for name in row.evaluation.get("figures", ()) if str(name).lower().endswith(".png")]
        for name in names[:FIGURES_PER_TRIAL]:
            source, problem = _embedded(durable.below(folder, name))
            left_out = problem and f"{name} is {problem}"
            examples.append({"trial": row.name, "name": name, "source": source, "left_out": left_out})
    return examples


def _embedded(path: Path | None) -> tuple[str, str]:
    """Return a picture as text, or what keeps it from being shown."""
    if path is None or not path.is_file():
        return "", "missing"
    if path.stat().st_size > FIGURE_BYTES:
        return "", "too large to embed"
    return base64.b64encode(path.read_bytes()).decode(), ""


def _compared(spec: SearchSpec, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the table of what networks cost and score; empty without lines."""
    headings = next((list(line.figures) for line in lines if line.figures), [])
    objectives = [objective.metric for objective in spec.objectives if objective.metric.startswith("val_")]
    rows = [
        {
            "name": line.name,
            "front": line.on_front,
            "cells": [
                *(_figure(line.validation.get(name)) for name in objectives),
                *(_figure(line.figures.get(heading)) for heading in headings),
            ],
            "difference": signed(line.difference.value) if line.difference.value is not None else "",
            "gap": _gap(line.difference),
        }
        for line in lines
    ]
    return {"headings": [*objectives, *headings], "rows": rows}


def _scan(paths: StudyPaths) -> dict[str, Any]:
    """Return how far the parent can be pruned, as its scan found: a table and embedded pictures; empty without one."""
    if not paths.scan.is_file():
        return {}
    found = durable.read_json(paths.scan)
    pictures = [durable.below(paths.scan.parent, name) for name in found.get("figures", ())]
    rows = found["rows"]
    return {
        "metric": found["metric"],
        "score": _figure(found["score"]),
        "headings": list(rows[0]) if rows else [],
        "rows": [[_figure(value) for value in row.values()] for row in rows],
        "points": [", ".join(f"{name} {show(value)}" for name, value in point.items()) for point in found["points"]],
        "pictures": [base64.b64encode(path.read_bytes()).decode() for path in pictures if path and path.is_file()],
    }


def _figure(value: Any) -> str:
    """Return a number as people read it, whole ones with separators; what is unknown is empty."""
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, float | int) and value >= 1000 else show(value)


def _gap(gap: Interval) -> str:
    return "" if gap.low is None else f"{signed(gap.low)} to {signed(gap.high)}"


def _cost(records: Sequence[TrialRecord], facts: Facts) -> list[tuple[str, str]]:
    counts = Counter(record.state for record in records)
    busy = sum(record.slot_s for record in records)
    cost = [(WORDS[state], str(counts[state])) for state in WORDS if counts[state] or state == "complete"]
    cost.append(("slot-hours", show(busy / 3600)))
    if facts.wall_s > 0:
        cost.append(("wall time", _duration(facts.wall_s)))
        if facts.slots:
            cost.append(("slots busy", f"{min(1.0, busy / (facts.wall_s * facts.slots)):.0%} of {facts.slots}"))
    again = sum(record.attempts > 1 for record in records)
    return [*cost, ("started again", str(again))] if again else cost


def _reasons(records: Sequence[TrialRecord]) -> list[tuple[str, str, int]]:
    ends = [record for record in records if record.state in ("stopped", "failed")]
    counts = Counter((WORDS[record.state], _first_line(record.reason)) for record in ends)
    return [(state, reason, count) for (state, reason), count in counts.most_common(12)]


def _first_line(text: str) -> str:
    return _shortened(next(iter(text.strip().splitlines()), "no reason recorded"))


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


_ABSENT: Any = object()


def _range(parameter: Any) -> str:
    if parameter.type == "categorical":
        return ", ".join(map(show, parameter.choices))
    words = f"{show(parameter.low)} to {show(parameter.high)}"
    return f"{words}, logarithmic" if parameter.log else words


def _yaml(params: Mapping[str, Any]) -> str:
    """Return values as YAML that reads back the same: 1.0e-05, which plain 1e-05 does not."""
    import yaml

    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}
    return str(yaml.safe_dump(listed, default_flow_style=None, sort_keys=False, allow_unicode=True))


def _interval(score: Interval) -> str:
    return "" if score.low is None or score.high is None else f"{show_score(score.low)} to {show_score(score.high)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _script_json(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it can close the element."""
    return json.dumps(durable.plain(value), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
