"""What a person asks of studies that are there: which, how far, how they compare; to stop, promote, report."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import durable
from search import glance, ranking
from search.errors import BadInput, SearchError, StudyError
from search.glance import Glance
from search.progress import duration
from search.record import State, StudyPaths, TrialRecord
from search.results import leaderboard, summary
from search.results.leaderboard import Interval
from search.results.plots import WORDS, show
from search.storage import holder

STATES: tuple[State, ...] = ("complete", "stopped", "failed", "running", "waiting")


def list_all(given: argparse.Namespace) -> None:
    """List the studies of a folder: who runs them, how far they are, their best, their age."""
    found = [_listed(paths) for paths in glance.all_below(given.runs)]
    if given.json or found:
        _print(found, given.json)
    else:
        print(f"no study in {given.runs}; --runs names another folder", file=sys.stderr)


def show_one(given: argparse.Namespace) -> None:
    """Show one study: its question, its best trials, why trials failed, who was promoted, who holds it."""
    seen = glance.at(find(given.study, given.runs))
    facts, best, failed = _facts(seen), _best_trials(seen, given.trials), _failures(seen)
    promoted = leaderboard.read_promotion(seen.paths)["promoted"]
    if given.json:
        print(json.dumps(durable.plain({**facts, "best": best, "failed": failed, "promoted": promoted})))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}".rstrip())
    for title, rows in (("best trials", best), ("failed", failed), ("promoted", promoted)):
        if rows:
            print(f"\n{title}")
            _print(rows)


def stop(given: argparse.Namespace) -> None:
    """Ask the process that runs a study to stop: nothing is lost, and the same command goes on from there."""
    paths = find(given.study, given.runs)
    held_by = glance.held_by(paths)
    if held_by is None:
        print(f"{paths.folder}: nobody runs it")
        return
    how = holder.ask_to_stop(paths, held_by)
    asked = "by SIGTERM" if how == "signal" else f"by {paths.stop.name} in its folder"
    print(f"{paths.folder}: asked {held_by} to stop, {asked}", flush=True)
    if not holder.wait_until_free(paths, given.wait):
        raise SearchError(f"{paths.folder}: not stopped after {given.wait:g} s; look with `show`, or --wait longer")
    print(f"{paths.folder}: stopped; nothing is lost, its own command goes on from there")


def promote(given: argparse.Namespace) -> None:
    """Promote finished trials by hand and evaluate them as the search would; what is done already is not done again."""
    paths = find(given.study, given.runs)
    seen = glance.at(paths)
    if seen.holder is not None:
        raise StudyError(f"{paths.folder}: {seen.holder} holds it; wait for it, or stop it first")
    from search import planning, promotion, service

    k = given.k or seen.spec.promotion.k
    promotion.by_hand(seen.records, seen.spec.objectives, seen.spec.promotion, given.trial, k)
    plan = planning.make(seen.spec, paths.folder)
    rows = service.promote(plan, given.trial, k, sys.stderr)
    print(summary.result_text(plan, rows))


def report(given: argparse.Namespace) -> None:
    """Write leaderboard, tables and report again from the study, also while it runs; print their paths."""
    paths = find(given.study, given.runs)
    from search import planning, service

    plan = planning.recorded(paths)
    service.write_outputs(plan, glance.at(paths).records, service.evaluated(plan))
    for path in (paths.leaderboard, paths.table, paths.report, *([paths.pareto] if plan.compares else [])):
        print(path)


def compare(given: argparse.Namespace) -> None:
    """Set studies side by side: best, test score with its 95 % interval, trials, slot-hours.

    Those of other objectives or test metrics are refused; those of other data are marked.
    """
    seen = [glance.at(find(study, given.runs)) for study in given.studies]
    _check_alike(seen)
    first = seen[0].resolved.get("data_sha256")
    others = [one for one in seen if one.resolved.get("data_sha256") != first]
    for one in others:
        note = "other data than the first; their scores cannot be set against each other"
        print(f"note: {one.paths.folder}: {note}", file=sys.stderr)
    _print([_compared(one, "other" if one in others else "same") for one in seen], given.json)


def find(study: str, runs: Path) -> StudyPaths:
    """Return the study of a folder, or of a name below the folder of all studies.

    Raises:
        StudyError: with the names that there are.
    """
    for folder in (Path(study), runs / study):
        if StudyPaths(folder).spec.is_file():
            return StudyPaths(folder)
    known = [paths.folder.name for paths in glance.all_below(runs)]
    near = difflib.get_close_matches(study, known, 1)
    there = f"here are {', '.join(known) or 'none'} (in {runs}/; --runs names another)"
    hint = f"did you mean {near[0]}?" if near else there
    raise StudyError(f"{study}: no such study; {hint}")


def _listed(paths: StudyPaths) -> dict[str, Any]:
    try:
        seen = glance.at(paths)
    except BadInput as error:  # one study that cannot be read does not hide the others
        return {"study": paths.folder.name, "state": "unreadable", "problem": str(error)}
    counts, best = seen.counts, seen.best
    return {
        "study": paths.folder.name,
        "state": seen.standing,
        **{WORDS[state]: counts[state] for state in STATES},
        "of": seen.spec.search.trials,
        "metric": seen.spec.objectives[0].metric,
        "best": best.values[0] if best is not None and best.values else None,
        "trial": best.number if best is not None else None,
        "age_s": round(time.time() - seen.begun, 1),
        **({"holder": str(seen.holder)} if seen.holder is not None else {}),
    }


def _facts(seen: Glance) -> dict[str, Any]:
    counted = ", ".join(f"{seen.counts[state]} {WORDS[state]}" for state in STATES if seen.counts[state])
    return {
        "study": str(seen.paths.folder),
        "state": f"{seen.standing}{f': {seen.holder}' if seen.holder is not None else ''}",
        "workload": seen.spec.workload,
        **summary.question(seen.spec, seen.resolved["config"]),
        "trials": f"{counted or 'none yet'}; {seen.spec.search.trials} wanted",
        "slot-hours": f"{seen.slot_hours:.3g}",
        "age": duration(time.time() - seen.begun),
    }


def _best_trials(seen: Glance, count: int) -> list[dict[str, Any]]:
    order = ranking.ranked(seen.records, seen.spec.objectives)[:count]
    return [_row(record, seen) for record in order]


def _row(record: TrialRecord, seen: Glance) -> dict[str, Any]:
    scores = {o.metric: value for o, value in zip(seen.spec.objectives, record.values or (), strict=True)}
    return {"trial": record.number, **scores, "epochs": max(record.epochs, default=0), **record.params}


def _failures(seen: Glance) -> list[dict[str, Any]]:
    """Return why trials failed, the most frequent reason first, and an example of each."""
    failed = [record for record in seen.records if record.state == "failed"]
    reasons = Counter(record.reason for record in failed)
    example = {record.reason: record.number for record in reversed(failed)}
    return [{"trials": count, "first": example[reason], "reason": reason} for reason, count in reasons.most_common()]


def _check_alike(seen: Sequence[Glance]) -> None:
    first = seen[0]
    for one in seen[1:]:
        for what, a, b in (
            ("objective", first.spec.objectives, one.spec.objectives),
            ("test metric", leaderboard.headline(first.spec), leaderboard.headline(one.spec)),
        ):
            if a != b:
                words = [", ".join(f"{o.metric} {o.mode}" for o in x) if isinstance(x, tuple) else x for x in (a, b)]
                raise StudyError(
                    f"{one.paths.folder}: its {what} is {words[1]}, that of {first.paths.folder} is {words[0]}; "
                    "compare studies that ask the same"
                )


def _compared(seen: Glance, data: str) -> dict[str, Any]:
    rows = [row for row in seen.rows() if "promoted" in row.role]
    test = rows[0].test if rows else Interval(None)
    best = (seen.best.values if seen.best is not None else None) or (None,) * len(seen.spec.objectives)
    return {
        "study": seen.paths.folder.name,
        "state": seen.standing,
        "trials": len(seen.records),
        "finished": seen.counts["complete"],
        **dict(zip((o.metric for o in seen.spec.objectives), best, strict=True)),
        "evaluated": rows[0].name if rows else None,
        f"test_{leaderboard.headline(seen.spec)}": test.value,
        "low": test.low,
        "high": test.high,
        "slot_hours": round(seen.slot_hours, 4),
        "data": data,
    }


def _print(rows: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    """Print rows as a table: drawn on a terminal, else plain columns; or as JSON."""
    if as_json:
        print(json.dumps(durable.plain(rows)))
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_text(name, row.get(name)) for name in names] for row in rows]
    heads = [_HEADS.get(name, name) for name in names]
    if sys.stdout.isatty():
        _draw(heads, cells)
        return
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in (heads, *cells):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _draw(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console().print(table, markup=False)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "list": list_all,
    "show": show_one,
    "stop": stop,
    "promote": promote,
    "report": report,
    "compare": compare,
}
_HEADS = {"age_s": "age", "slot_hours": "slot-hours"}


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    return duration(value) if name == "age_s" else str(value) if isinstance(value, int | str) else show(value)
