"""One search from its spec to an evaluated winner: each step looks at what is done already and does the rest."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import configuration
from search import (
    durable,
    epochs,
    evaluation,
    executor,
    leaderboard,
    promotion,
    ranking,
    ray_session,
    report,
    resources,
    samplers,
    space,
    study_spec,
    tensorboard,
    tracking,
    workload,
)
from search.errors import SpecError, is_disk
from search.evaluation import Candidate
from search.progress import Progress
from search.ray_session import RaySession
from search.record import StudyPaths, TrialRecord
from search.resources import Room
from search.spec import Promotion, SearchSpec, Stopping
from search.study import Study, lease

logger = logging.getLogger(__name__)

DEFAULTS = "defaults"
"""Note of the trial with the workload's own values: every search answers how much better than these."""
INCUMBENT = 0
"""Its number: it is asked before all others."""


@dataclass(frozen=True)
class Plan:
    """What a search is about to do, known before anything starts."""

    spec: SearchSpec
    paths: StudyPaths
    config: Mapping[str, Any]
    """The workload's Config of the defaults, fixed values merged."""
    manifest: Mapping[str, Any]
    slots: int
    room: Room
    sampler: str
    incumbent: Mapping[str, Any]
    """Values of the first trial."""
    notes: tuple[str, ...]


def plan(spec: SearchSpec, folder: Path) -> Plan:
    """Check a search against the machine and the data, and say what it would do; writes nothing but the data's cache.

    Raises:
        SpecError: if the resources are not there, or the workload refuses the data.
        TrackingError: if a logger is asked for and cannot be used.
    """
    tracking.check(spec.tracking)
    room = ray_session.room()
    slots = resources.slots(spec.resources, room)
    resources.check_evaluation(spec.evaluation, room)
    module = workload.load(spec.workload)
    config = configuration.build(module.Config, spec.fixed)
    try:
        manifest = module.prepare(config)
    except ValueError as error:  # the workload's own word for data that cannot be used
        raise SpecError(str(error)) from error
    incumbent, notes = defaults(spec, configuration.to_values(config))
    name, why = samplers.choose(spec)
    return Plan(
        spec=spec,
        paths=StudyPaths(folder),
        config=configuration.to_values(config),
        manifest=manifest,
        slots=slots,
        room=room,
        sampler=f"{name}: {why}",
        incumbent=incumbent,
        notes=(*notes, *manifest.get("warnings", [])),
    )


def defaults(spec: SearchSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the first trial, the workload's own where the space has them, and what had to give way."""
    values: dict[str, Any] = {}
    notes = []
    for parameter in spec.parameters:
        if not space.applies(parameter, values):
            continue
        value = space.nearest(parameter, config[parameter.name])
        values[parameter.name] = value
        if value != config[parameter.name]:
            notes.append(
                f"first trial: {parameter.name} {config[parameter.name]!r} is outside the space; {value!r} instead"
            )
    whole = {**config, **values}
    broken = next((text for text in spec.constraints if not _holds(text, whole)), None)
    if broken is not None:
        notes.append(f"first trial: these values break the constraint {broken}; it is left out")
    return values, notes


def _holds(constraint: str, values: Mapping[str, Any]) -> bool:
    try:
        return space.holds(constraint, values)
    except (ValueError, TypeError, ArithmeticError):
        return False


def run(plan: Plan, stream: TextIO) -> list[leaderboard.Row]:
    """Carry a search to its end and return the leaderboard; what an earlier process did is not done again.

    Args:
        plan: of the search.
        stream: where progress is shown.
    Raises:
        StudyError: if the folder belongs to another search, or another process holds it.
        EvaluationError: if a promoted checkpoint could not be evaluated; everything else is kept.
    """

    def say(text: str) -> None:
        stream.write(f"{text}\n")
        stream.flush()

    with lease(plan.paths), RaySession(plan.room) as session:
        study_spec.write(plan.paths, plan.spec, plan.config, plan.manifest)
        study = Study(plan.paths, plan.spec)
        study.enqueue(plan.incumbent, DEFAULTS)
        _search(plan, study, session, stream)
        promoted = promotion.promote(study.records(), plan.spec.objectives, plan.spec.promotion)
        incumbent = _incumbent(study.records())
        _write_promotion(plan, promoted, incumbent)
        candidates = _candidates(plan, study, session, stream, promoted, incumbent)
        todo = evaluation.missing(plan.paths, candidates)
        if todo:
            say(f"evaluating {len(todo)} checkpoints on the test split")
            session.start()
            evaluation.run(plan.paths, plan.spec, todo, lambda name: say(f"evaluated trial {name}"))
    rows = write_outputs(plan, study.records(), [candidate.name for candidate in candidates])
    _write_models(plan.paths, rows)
    return rows


def _search(plan: Plan, study: Study, session: RaySession, stream: TextIO) -> None:
    """Run what is left of a study's trials."""
    may_start = _budget(study)
    if not study.left() or not (study.in_flight() or may_start()):
        why = "all its trials have ended" if not study.left() else "its budget is used up"
        stream.write(f"{study.name}: complete, {why}\n")
        return
    session.start()
    desk = _Desk(study, stream)
    try:
        executor.run(study, plan.slots, desk, may_start)
    finally:
        desk.close()


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


class _Desk:
    """Hears what happens in a search, and keeps the screen, TensorBoard, loggers and the disk up to date."""

    def __init__(self, study: Study, stream: TextIO) -> None:
        records = study.records()
        self.study, self.spec = study, study.spec
        self.progress = Progress(study.spec, stream, records)
        self.kept = {record.number: record for record in records if record.checkpoint is not None}
        metrics = workload.load(study.spec.workload).metrics
        config = workload.load(study.spec.workload).Config
        reported = metrics(configuration.build(config, study.spec.fixed))
        self.events = study.spec.tracking.tensorboard
        if self.events:
            tensorboard.experiment(study.paths.folder, study.spec, reported)

    def trial_started(self, number: int, params: dict[str, Any]) -> None:
        self.progress.trial_started(number, params)
        folder = self.study.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        if self.events:
            tensorboard.session_start(folder, number, params)

    def trial_epoch(self, number: int, epoch: int, values: tuple[float, ...], metrics: dict[str, float]) -> None:
        self.progress.trial_epoch(number, epoch, values, metrics)

    def trial_ended(self, record: TrialRecord) -> None:
        self.progress.trial_ended(record)
        folder = self.study.trial_folder(record.number)
        if self.events:
            best = {o.metric: record.metrics[o.metric] for o in self.spec.objectives if o.metric in record.metrics}
            tensorboard.session_end(folder, record.state, best, record.best_epoch)
        self._log(record, folder)
        self._keep(record)

    def tick(self) -> None:
        self.progress.tick(time.monotonic())

    def close(self) -> None:
        """Give the terminal back."""
        self.progress.close()

    def _log(self, record: TrialRecord, folder: Path) -> None:
        """Send a trial to the loggers; one that cannot be reached costs its entry, not the search."""
        try:
            tracking.log_trial(
                self.spec.tracking,
                self.spec,
                record,
                epochs.read(folder),
                [folder / "config.json", folder / epochs.FILE],
                folder=self.study.paths.folder / "wandb",
            )
        except Exception as error:
            if is_disk(error):
                raise
            logger.warning("trial %s is not in the logger: %s: %s", record.number, type(error).__name__, error)

    def _keep(self, record: TrialRecord) -> None:
        """Hold the study to its quota of checkpoints: the best few and the first trial's."""
        self.kept[record.number] = record
        order = ranking.ranked(self.kept.values(), self.spec.objectives)
        quota = max(self.spec.evaluation.keep_checkpoints, self.spec.promotion.k)
        front = ranking.pareto(order, self.spec.objectives) if self.spec.promotion.rule == "pareto" else []
        wanted = {kept.number for kept in (*order[:quota], *front)} | {INCUMBENT}
        for number in self.kept.keys() - wanted:
            self.study.forget_checkpoint(number)
        self.kept = {number: kept for number, kept in self.kept.items() if number in wanted}


def _incumbent(records: Sequence[TrialRecord]) -> int | None:
    """Return the first trial, the workload's defaults, if it finished."""
    return next((r.number for r in records if r.number == INCUMBENT and r.checkpoint and r.state == "complete"), None)


def _write_promotion(plan: Plan, promoted: Sequence[promotion.Promoted], incumbent: int | None) -> None:
    content = {
        "promoted": [asdict(item) for item in promoted],
        "incumbent": incumbent,
        "rule": asdict(plan.spec.promotion),
    }
    durable.write_json(plan.paths.promotion, content)


def _candidates(
    plan: Plan,
    study: Study,
    session: RaySession,
    stream: TextIO,
    promoted: Sequence[promotion.Promoted],
    incumbent: int | None,
) -> list[Candidate]:
    """Return the checkpoints to evaluate: the search's own, or those of the promoted trained again."""
    numbers = list(dict.fromkeys([item.trial for item in promoted] + ([incumbent] if incumbent is not None else [])))
    chosen = [study.record(number) for number in numbers]
    rule = plan.spec.promotion
    if rule.epochs is None and rule.seeds == 1:
        return [_candidate(str(record.number), record.number, record) for record in chosen]
    again = _trained_again(plan, chosen)
    _search(plan, again, session, stream)
    ended = {r.note: r for r in again.records() if r.state == "complete" and r.checkpoint is not None}
    both = itertools.product((record.number for record in chosen), range(rule.seeds))
    return [
        _candidate(f"{number}-seed{seed}", number, ended[note])
        for number, seed in both
        if (note := _note(number, seed, rule)) in ended
    ]


def _trained_again(plan: Plan, chosen: Sequence[TrialRecord]) -> Study:
    """Return the study in which the promoted travel the same road again, longer and with several seeds."""
    rule = plan.spec.promotion
    count = len(chosen) * rule.seeds
    spec = dataclasses.replace(
        plan.spec,
        search=dataclasses.replace(plan.spec.search, trials=count, wall_time_s=None, slot_hours=None),
        stopping=Stopping(rule="none"),
        promotion=dataclasses.replace(rule, k=sys.maxsize),  # each of them is evaluated, so each keeps its checkpoint
    )
    again = Study(plan.paths, spec, name=f"{plan.spec.name}/promotion", trials="promotion")
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
    return Candidate(name, number, record.checkpoint, record.checkpoint_sha256)


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
    facts = report.Facts(
        wall_s=wall_time(records),
        slots=plan.slots,
        sampler=plan.sampler,
        versions=study_spec.versions(),
        manifest=plan.manifest,
        warnings=plan.notes,
    )
    report.write(paths, spec, records, promoted, evaluations, facts)
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
        source = paths.folder / row.checkpoint
        if row.checkpoint and source.is_dir() and durable.seal_of(target) != row.checkpoint_sha256:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
    best = next((row.name for row in rows if "promoted" in row.role), None)
    if best is not None:
        link = paths.model("best")
        link.unlink(missing_ok=True)
        link.symlink_to(best)
