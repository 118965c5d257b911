"""One search from its spec to an evaluated winner: each step looks at what is done already and does the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import durable
from search import (
    evaluation,
    evaluation_jobs,
    executor,
    logs,
    parent,
    promotion,
    queues,
    rules,
    samplers,
    study_spec,
    workload,
)
from search.desk import Desk
from search.evaluation import Candidate
from search.planning import Plan
from search.promotion import Promoted
from search.ray_session import RaySession
from search.record import DEFAULTS, StudyPaths, TrialRecord
from search.results import comparison, leaderboard, report
from search.spec import Promotion, Stopping
from search.storage import address, holder
from search.storage.lease import lease
from search.study import Study

if TYPE_CHECKING:
    from search.storage.database import Database


def run(plan: Plan, stream: TextIO) -> list[leaderboard.Row]:
    """Carry a search to its end and return the leaderboard; what an earlier process did is not done again.

    Args:
        plan: of the search.
        stream: where progress is shown.
    Raises:
        StudyError: if the folder belongs to another search, or another process holds it.
        EvaluationError: if a promoted checkpoint could not be evaluated; everything else is kept.
    """

    with _held(plan) as database:
        study_spec.write(plan.paths, plan.spec, plan.config, plan.manifest)
        plan.paths.push()
        with RaySession(plan.room) as session:
            plan = parent.inherit(plan, lambda training: _search(plan, training, session, stream), database)
            scanned = parent.scan(plan, session.start)
            study = Study(plan.paths, plan.spec, database=database)
            study.enqueue(plan.incumbent, DEFAULTS)
            parent.enqueue(study, plan.spec, scanned)
            _search(plan, study, session, stream)
            _promote(plan, study)
            names = _evaluate(plan, study, session, stream)
        return _conclude(plan, study, names)


def promote(plan: Plan, numbers: Sequence[int], k: int, stream: TextIO) -> list[leaderboard.Row]:
    """Promote trials by hand and evaluate them, by the road that the rule's own go; return the leaderboard.

    Args:
        plan: of the search, which need not have ended.
        numbers: of trials that have finished; none: the best k by the study's rule.
        k: how many, where there are no numbers.
        stream: where progress is shown.
    Raises:
        StudyError: if one of them cannot be promoted, or another process holds the study.
        EvaluationError: as `run`.
    """
    with _held(plan) as database:
        study_spec.write(plan.paths, plan.spec, plan.config, plan.manifest)
        with RaySession(plan.room) as session:
            plan = parent.inherit(plan, lambda training: _search(plan, training, session, stream), database)
            study = Study(plan.paths, plan.spec, database=database)
            chosen = promotion.by_hand(study.records(), plan.spec.objectives, plan.spec.promotion, numbers, k)
            _promote(plan, study, chosen)
            names = _evaluate(plan, study, session, stream)
        return _conclude(plan, study, names)


@contextlib.contextmanager
def _held(plan: Plan) -> Iterator[Database | None]:
    """Hold the study, and listen for who asks it to stop."""
    with lease(plan.paths, address.resolve(plan.spec.search.storage)) as database, holder.attending(plan.paths):
        yield database


def _search(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> None:
    """Run what is left of a study's trials."""
    if not study.left() or not (study.in_flight() or not _enough(study)):
        _say(stream, f"{study.name}: complete, {_ended(study)}")
        return
    session.start()
    with queues.turn(study.trial_folder(0).parent, study.spec.resources, plan.slots, stream) as turn:
        desk = Desk(study, stream, turn)
        try:
            executor.run(study, plan.slots, desk, lambda: not _enough(study), lambda: turn.slots)
        finally:
            desk.close()
    if len(study.records()) < study.spec.search.trials and (why := _ended(study)):
        _say(stream, f"{study.name}: complete, {why}")
    study.sync()


def _ended(study: Study) -> str:
    """Return why a search has no more trials to run."""
    if study.left():
        return _enough(study)
    return "every configuration has been tried" if study.exhausted else "all its trials have ended"


def _enough(study: Study) -> str:
    """Return why no other trial may start, in words; nothing where one may."""
    search = study.spec.search
    if search.wall_time_s is not None or search.slot_hours is not None:
        records = study.records()
        spent = sum(record.slot_s for record in records) / 3600
        if search.wall_time_s is not None and wall_time(records) >= search.wall_time_s:
            return "its budget is used up"
        if search.slot_hours is not None and spent >= search.slot_hours:
            return "its budget is used up"
    first = study.spec.objectives[0]
    if search.target is not None and rules.reached(study.history, first, search.target):
        return f"{first.metric} has reached {search.target:g}"
    return ""


def _promote(plan: Plan, study: Study, chosen: Sequence[Promoted] | None = None) -> None:
    """Write who is promoted and why: by the rule once the search has ended, and whoever was chosen by hand.

    chosen: by hand now; None: the search has ended.
    """
    records, rule = study.records(), plan.spec.promotion
    before = leaderboard.read_promotion(plan.paths)
    able = {record.number for record in records if promotion.can_move_on(record, rule)}
    earlier = [Promoted(**item) for item in before["promoted"] if item["trial"] in able]
    if chosen is None:
        before["trials"] = len(records)
        ruled = promotion.promote(records, plan.spec.objectives, rule)
        promoted = promotion.joined(ruled, [item for item in earlier if item.by == "hand"])
    else:
        promoted = promotion.joined(earlier, chosen)
    incumbent = next((r.number for r in records if r.is_incumbent and r.state == "complete" and r.checkpoint), None)
    content = {"promoted": list(map(asdict, promoted)), "incumbent": incumbent, "rule": asdict(rule)}
    durable.write_json(plan.paths.promotion, {**before, **content})


def _evaluate(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> list[str]:
    """Run the evaluation jobs that are still missing; return the names of all that count."""
    candidates = [*parent.candidates(plan), *_candidates(plan, study, session, stream)]
    todo = evaluation.missing(plan.paths, candidates)
    if todo:
        _say(stream, f"evaluating {len(todo)} checkpoints on the test split")
        session.start()
        run = evaluation_jobs.run if plan.spec.evaluation.run_as == "jobs" else evaluation.run
        run(plan.paths, plan.spec, todo, lambda name: _say(stream, f"evaluated trial {name}"))
    return [candidate.name for candidate in candidates]


def _candidates(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> list[Candidate]:
    """Return what to evaluate of the promoted: the search's checkpoints, or those trained again."""
    rule = plan.spec.promotion
    chosen = [study.record(number) for number in _numbers(leaderboard.read_promotion(plan.paths))]
    if not promotion.trains_again(rule):
        return [_candidate(str(record.number), record.number, record) for record in chosen]
    again = _trained_again(plan, chosen, study.database)
    _search(plan, again, session, stream)
    ended = {record.note: record for record in again.records()}
    candidates = []
    for record in chosen:
        for seed, name in enumerate(promotion.names(record.number, rule)):
            trained = ended[_note(record.number, seed, rule)]
            if trained.state == "complete" and trained.checkpoint is not None:
                candidates.append(_candidate(name, record.number, trained))
            else:
                problem = f"trained again with seed {seed}, is not evaluated: {trained.reason}"
                _say(stream, f"trial {record.number}, {problem}")
    return candidates


def _numbers(promoted: Mapping[str, Any]) -> list[int]:
    """Return the trials to evaluate: the promoted, and the incumbent to compare them with."""
    incumbent = [] if promoted["incumbent"] is None else [promoted["incumbent"]]
    return list(dict.fromkeys([*(item["trial"] for item in promoted["promoted"]), *incumbent]))


def _conclude(plan: Plan, study: Study, names: Sequence[str]) -> list[leaderboard.Row]:
    rows = write_outputs(plan, study.records(), names)
    _write_models(plan.paths, rows)
    plan.paths.push()
    return rows


def _say(stream: TextIO, text: str) -> None:
    logs.say(stream, text)


def _trained_again(plan: Plan, chosen: Sequence[TrialRecord], database: Database | None) -> Study:
    """Return the study in which the promoted travel the same road again, longer and with several seeds."""
    rule = plan.spec.promotion
    count = len(chosen) * rule.seeds
    spec = dataclasses.replace(
        plan.spec,
        constraints=(),  # they held in the search; other epochs or seeds are no reason to ask for another trial
        search=dataclasses.replace(plan.spec.search, trials=count, wall_time_s=None, slot_hours=None, target=None),
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


def evaluated(plan: Plan) -> list[str]:
    """Return the names of the evaluations that count, as far as they are known without doing any."""
    rule, promoted = plan.spec.promotion, leaderboard.read_promotion(plan.paths)
    names = [name for number in _numbers(promoted) for name in promotion.names(number, rule)]
    return [*(candidate.name for candidate in parent.candidates(plan)), *names]


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
    if len(spec.parameters) == 1:
        leaderboard.write_comparison(paths.comparison(spec.parameters[0].name), rows, spec)
    table = workload.table_of(workload.load(spec.workload))
    compared = comparison.lines(spec, records, evaluations, table) if plan.compares else []
    if compared:
        comparison.write(paths.pareto, spec, compared, table)
    facts = report.Facts(
        wall_s=wall_time(records),
        slots=plan.slots,
        sampler=plan.sampler,
        versions=study_spec.recorded_versions(paths),
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
