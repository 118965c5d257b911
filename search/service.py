"""One search from its spec to an evaluated winner: each step looks at what is done already and does the rest."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

import durable
from search import (
    address,
    comparison,
    evaluation,
    evaluation_jobs,
    executor,
    leaderboard,
    parent,
    promotion,
    report,
    samplers,
    study_spec,
    workload,
)
from search.desk import Desk
from search.evaluation import Candidate
from search.planning import Plan
from search.ray_session import RaySession
from search.record import DEFAULTS, StudyPaths, TrialRecord
from search.spec import Promotion, Stopping
from search.study import Study, lease

if TYPE_CHECKING:
    from search.database import Database


def run(plan: Plan, stream: TextIO) -> list[leaderboard.Row]:
    """Carry a search to its end and return the leaderboard; what an earlier process did is not done again.

    Args:
        plan: of the search.
        stream: where progress is shown.
    Raises:
        StudyError: if the folder belongs to another search, or another process holds it.
        EvaluationError: if a promoted checkpoint could not be evaluated; everything else is kept.
    """

    with lease(plan.paths, address.resolve(plan.spec.search.storage)) as database:
        study_spec.write(plan.paths, plan.spec, plan.config, plan.manifest)
        plan.paths.push()
        with RaySession(plan.room) as session:
            plan = parent.inherit(plan, lambda training: _search(plan, training, session, stream), database)
            scanned = parent.scan(plan, session.start)
            study = Study(plan.paths, plan.spec, database=database)
            study.enqueue(plan.incumbent, DEFAULTS)
            parent.enqueue(study, plan.spec, scanned)
            _search(plan, study, session, stream)
            candidates = [*parent.candidates(plan), *_candidates(plan, study, session, stream)]
            _evaluate(plan, candidates, session, stream)
        rows = write_outputs(plan, study.records(), [candidate.name for candidate in candidates])
        _write_models(plan.paths, rows)
        plan.paths.push()
    return rows


def _search(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> None:
    """Run what is left of a study's trials."""
    may_start = _budget(study)
    if not study.left() or not (study.in_flight() or may_start()):
        why = "all its trials have ended" if not study.left() else "its budget is used up"
        _say(stream, f"{study.name}: complete, {why}")
        return
    session.start()
    desk = Desk(study, stream)
    try:
        executor.run(study, plan.slots, desk, may_start)
    finally:
        desk.close()
    study.sync()


def _budget(study: Study) -> Callable[[], bool]:
    """Return whether another trial may start: false once wall time or slot hours are used up."""
    search = study.spec.search

    def may_start() -> bool:
        if search.wall_time_s is None and search.slot_hours is None:
            return True
        records = study.records()
        spent = sum(record.slot_s for record in records) / 3600
        in_time = search.wall_time_s is None or wall_time(records) < search.wall_time_s
        return in_time and (search.slot_hours is None or spent < search.slot_hours)

    return may_start


def _candidates(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> list[Candidate]:
    """Write who was promoted and why; return what to evaluate: the search's checkpoints, or those trained again."""
    records, rule = study.records(), plan.spec.promotion
    promoted = promotion.promote(records, plan.spec.objectives, rule)
    incumbent = next((r.number for r in records if r.is_incumbent and r.state == "complete" and r.checkpoint), None)
    content = {"promoted": list(map(asdict, promoted)), "incumbent": incumbent, "rule": asdict(rule)}
    durable.write_json(plan.paths.promotion, content)
    numbers = dict.fromkeys([*(item.trial for item in promoted), *([] if incumbent is None else [incumbent])])
    chosen = [study.record(number) for number in numbers]
    if rule.epochs is None and rule.seeds == 1:
        return [_candidate(str(record.number), record.number, record) for record in chosen]
    again = _trained_again(plan, chosen, study.database)
    _search(plan, again, session, stream)
    ended = {record.note: record for record in again.records()}
    candidates = []
    for number, seed in itertools.product((record.number for record in chosen), range(rule.seeds)):
        record = ended[_note(number, seed, rule)]
        if record.state == "complete" and record.checkpoint is not None:
            candidates.append(_candidate(f"{number}-seed{seed}", number, record))
        else:
            _say(stream, f"trial {number}, trained again with seed {seed}, is not evaluated: {record.reason}")
    return candidates


def _evaluate(plan: Plan, candidates: Sequence[Candidate], session: RaySession, stream: TextIO) -> None:
    """Run the evaluation jobs that are still missing."""
    todo = evaluation.missing(plan.paths, candidates)
    if todo:
        _say(stream, f"evaluating {len(todo)} checkpoints on the test split")
        session.start()
        run = evaluation_jobs.run if plan.spec.evaluation.run_as == "jobs" else evaluation.run
        run(plan.paths, plan.spec, todo, lambda name: _say(stream, f"evaluated trial {name}"))


def _say(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def _trained_again(plan: Plan, chosen: Sequence[TrialRecord], database: Database | None) -> Study:
    """Return the study in which the promoted travel the same road again, longer and with several seeds."""
    rule = plan.spec.promotion
    count = len(chosen) * rule.seeds
    spec = dataclasses.replace(
        plan.spec,
        constraints=(),  # they held in the search; other epochs or seeds are no reason to ask for another trial
        search=dataclasses.replace(plan.spec.search, trials=count, wall_time_s=None, slot_hours=None),
        stopping=Stopping(rule="none"),
        promotion=dataclasses.replace(rule, k=sys.maxsize),  # each of them is evaluated, so each keeps its checkpoint
    )
    again = Study(plan.paths, spec, name=f"{plan.spec.name}/promotion", trials="promotion", database=database)
    for record in chosen:
        for seed in range(rule.seeds):
            overrides = {"seed": samplers.trial_seed(record.seed, seed) if seed else record.seed}
            overrides |= {} if rule.epochs is None else {"epochs": rule.epochs}
            again.enqueue(record.params, _note(record.number, seed, rule), overrides)
    return again


def _note(number: int, seed: int, rule: Promotion) -> str:
    """Return what tells a promoted trial's training from all others, those for fewer epochs included."""
    return f"{number}-seed{seed}" if rule.epochs is None else f"{number}-seed{seed} for {rule.epochs} epochs"


def _candidate(name: str, number: int, record: TrialRecord) -> Candidate:
    assert record.checkpoint is not None
    assert record.checkpoint_sha256 is not None
    epochs = max(record.epochs, default=0)
    return Candidate(name, number, record.checkpoint, record.checkpoint_sha256, epochs, record.slot_s)


def write_outputs(plan: Plan, records: Sequence[TrialRecord], names: Sequence[str]) -> list[leaderboard.Row]:
    """Write everything that can be made again from the study and the evaluations; return the leaderboard.

    Args:
        plan: of the search.
        records: all trials.
        names: the evaluations that count; those of trials that were promoted once and no more are left out.
    """
    paths, spec = plan.paths, plan.spec
    promoted = leaderboard.read_promotion(paths)
    evaluations = [item for item in leaderboard.read_evaluations(paths) if item["name"] in names]
    rows = leaderboard.rows(spec, records, promoted, evaluations)
    leaderboard.write_leaderboard(paths.leaderboard, rows, spec)
    leaderboard.write_table(paths.table, records, spec)
    table = workload.table_of(workload.load(spec.workload))
    compared = comparison.lines(spec, records, evaluations, table) if plan.compares else []
    if compared:
        comparison.write(paths.pareto, spec, compared, table)
    facts = report.Facts(
        wall_s=wall_time(records),
        slots=plan.slots,
        sampler=plan.sampler,
        versions=study_spec.versions(),
        manifest=plan.manifest,
        warnings=plan.notes,
    )
    report.write(paths, spec, records, promoted, evaluations, facts, compared)
    return rows


def wall_time(records: Sequence[TrialRecord]) -> float:
    """Return the seconds in which at least one trial ran, over all runs of a study."""
    spans = sorted((r.started, r.finished) for r in records if r.started is not None and r.finished is not None)
    total, until = 0.0, None
    for start, end in spans:
        begin = start if until is None or start > until else until
        if end > begin:
            total += (end - begin).total_seconds()
        until = end if until is None or end > until else until
    return total


def _write_models(paths: StudyPaths, rows: Sequence[leaderboard.Row]) -> None:
    """Copy each evaluated checkpoint to a folder that `predict` can use, the best promoted one also as `best`."""
    for row in rows:
        target = paths.model(row.name)
        source = durable.below(paths.folder, row.checkpoint, links=True)
        if source is not None and source.is_dir() and durable.seal_of(target) != row.checkpoint_sha256:
            paths.store.pull(source)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
    best = next((row.name for row in rows if "promoted" in row.role), None)
    if best is not None:
        link = paths.model("best")
        link.unlink(missing_ok=True)
        link.symlink_to(best)
