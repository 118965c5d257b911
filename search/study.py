"""The study: the only record of what was tried, written by one process.

It is Optuna's journal in the study's folder, or Optuna's tables in a database.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

import configuration
import durable
from configuration import ConfigError
from search import rules, samplers, space, workload
from search.errors import StudyError
from search.record import State, StudyPaths, TrialRecord, is_bulk
from search.spec import SearchSpec
from search.spec_file import config_values
from search.storage import journal
from search.storage.journal import Journal

if TYPE_CHECKING:
    from search.storage.database import Database

logger = logging.getLogger(__name__)

CONFIG, RESULT = "config.json", "result.json"
REFUSALS = 1000
"""Configurations in a row that constraints may refuse before the search gives up."""


@dataclass(frozen=True)
class Task:
    """One trial to run: everything that a slot needs, as plain data."""

    number: int
    config: Mapping[str, Any]
    params: Mapping[str, Any]
    resumed: bool = field(default=False, compare=False)
    """Whether an earlier process left it in flight; the trial is the same either way."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended, as its slot or the driver saw it."""

    state: State
    reason: str
    epochs: Mapping[int, tuple[float, ...]]
    best_epoch: int | None = None
    metrics: Mapping[str, float] | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    attempts: int = 1
    slot_s: float = 0.0


class Study:
    """What was tried and what it gave. Not safe for several writers: hold the lease.

    Args:
        paths: where the study lies.
        spec: the search space.
        name: of the Optuna study inside the journal; a promotion trains under a name of its own.
        trials: folder of the trials below the study's folder.
        database: holds the record; None: a journal in the study's folder does.
    """

    def __init__(
        self,
        paths: StudyPaths,
        spec: SearchSpec,
        name: str | None = None,
        trials: str = "trials",
        database: Database | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.paths, self.spec, self.name, self._folder = paths, spec, name or spec.name, trials
        self.database = database
        self._journal: Journal | None = None
        storage: optuna.storages.BaseStorage
        if database is None:
            self._journal, known_as = journal.opened(paths), self.name
            storage = journal.replayed(self._journal)
        else:
            storage, known_as = database.storage, database.study_name(self.name)
            if journal.has_trials(paths) and not database.knows(spec.name):
                raise StudyError(
                    f"{paths.folder}: its trials are there, but {database.where} has no record of them; "
                    "name the database that has, or start a study of your own with --study NAME"
                )
        self.optuna = optuna.create_study(
            storage=storage,
            study_name=known_as,
            directions=[_DIRECTIONS[objective.mode] for objective in spec.objectives],
            load_if_exists=True,
        )
        self.history: dict[int, dict[int, tuple[float, ...]]] = {}
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._again: list[Task] = []
        self._begun: list[FrozenTrial] = []
        """Trials that a killed process was asking for."""
        self._protected: set[int] = set()
        """Trials that somebody enqueued: they run to their end, or there would be nothing to compare with."""
        self._counted = 0
        every = samplers.points(spec.parameters)
        self._points = None if every is None else frozenset(every)
        self._reconcile()

    def enqueue(
        self,
        params: Mapping[str, Any],
        note: str,
        overrides: Mapping[str, Any] | None = None,
        *,
        protected: bool = True,
    ) -> None:
        """Have a trial with these values asked before any other, unless the same note was enqueued before.

        protected: it runs to its end, whatever the stopping rule says.
        """
        if note in {trial.user_attrs.get("note") for trial in self._frozen()}:
            return
        stored = {name: space.encode(value) for name, value in params.items()}
        attributes = {"note": note, "overrides": dict(overrides or {}), "protected": protected}
        self.optuna.enqueue_trial(stored, user_attrs=attributes)

    def ask(self) -> Task | None:
        """Return the next trial to run: one that was in flight, or a new one; None once the trials are used up."""
        if self._again:
            return self._again.pop(0)
        for _ in range(REFUSALS):
            if not self._new_left():
                if self.exhausted and not self._counted:
                    count = len(self._points or ())
                    raise StudyError(
                        f"all {count} configurations break a constraint; loosen constraints: or the ranges"
                    )
                return None
            task = self._ask_new()
            if task is not None:
                return task
        raise StudyError(f"{REFUSALS} configurations in a row broke a constraint; loosen constraints: or the ranges")

    def sync(self) -> None:
        """Wait until everything that the study knows would outlive this machine."""
        if self._journal is not None:
            self._journal.sync()
            self.paths.store.push_journal(self.paths.journal)

    def report(self, number: int, epoch: int, values: tuple[float, ...]) -> rules.Verdict:
        """Record the objectives after an epoch and return whether the trial ends early."""
        self.history.setdefault(number, {})[epoch] = values
        if number in self._protected:
            return rules.GO_ON
        return rules.judge(self.spec.stopping, self.spec.objectives, self.history, number, epoch)

    def tell(self, number: int, outcome: Outcome) -> None:
        """Record how a trial ended; a trial that has ended already stays as it is."""
        frozen = self._one(number)
        if frozen.state.is_finished():
            return
        trial = self._trials.pop(number, None) or optuna.trial.Trial(self.optuna, frozen._trial_id)
        self.history[number] = {**self.history.get(number, {}), **outcome.epochs}
        # A process that was killed while it told has told some epochs already.
        told = frozen.intermediate_values
        self._report_epochs(trial, {epoch: v for epoch, v in outcome.epochs.items() if epoch not in told})
        for key, value in _attributes(outcome).items():
            trial.set_user_attr(key, value)
        values, state = None, _OPTUNA_STATES[outcome.state]
        if outcome.state == "complete" and outcome.best_epoch is not None:
            values = list(outcome.epochs[outcome.best_epoch])
        self.optuna.tell(trial, values, state=state, skip_if_finished=True)

    def forget_checkpoint(self, number: int) -> None:
        """Delete the checkpoints of a trial; its numbers stay."""
        checkpoints = self.trial_folder(number) / "checkpoints"
        self.paths.store.delete(checkpoints)
        shutil.rmtree(checkpoints, ignore_errors=True)

    def fetch(self, number: int) -> None:
        """Have on this machine what is known of a trial, where its slot may have been on another; not its weights."""
        self.paths.store.pull(self.trial_folder(number), skip=is_bulk)

    @property
    def label(self) -> str:
        """What logs and figures call it: its folder's name, and which part of the search it is."""
        return f"{self.paths.folder.name}{self.name.removeprefix(self.spec.name)}"

    def trial_folder(self, number: int) -> Path:
        """Return the folder of one trial."""
        return self.paths.folder / self._folder / str(number)

    def record(self, number: int) -> TrialRecord:
        """Return one trial that was not refused."""
        record = self._record(self._one(number))
        assert record is not None
        return record

    def records(self) -> list[TrialRecord]:
        """Return all trials, refused ones left out, in order of their numbers."""
        return [record for trial in self._frozen() if (record := self._record(trial)) is not None]

    def left(self) -> int:
        """Return how many trials are still to run, those included that an earlier process left in flight."""
        return len(self._again) + self._new_left()

    @property
    def exhausted(self) -> bool:
        """Whether the space is small, and every configuration in it has been tried."""
        return self._points is not None and len(self._frozen()) >= len(self._points) and not self._untried()

    def in_flight(self) -> int:
        """Return how many trials that an earlier process left in flight are still to be run again."""
        return len(self._again)

    def _new_left(self) -> int:
        """Return how many trials are still to be asked: all that are enqueued, and as many as the spec wants."""
        trials = self._frozen()
        waiting = sum(trial.state == TrialState.WAITING for trial in trials) + len(self._begun)
        wanted = max(0, self.spec.search.trials - self._counted)
        if self._points is not None and wanted + len(trials) > len(self._points):
            wanted = min(wanted, len(self._untried()))
        return max(waiting, wanted)

    def _untried(self) -> frozenset[samplers.Point]:
        """Return the configurations of a small space that no trial has had yet; one that was refused has been had."""
        asked = (trial.params for trial in self._frozen() if trial.state != TrialState.WAITING)
        return (self._points or frozenset()).difference(samplers.point_of(self.spec.parameters, p) for p in asked)

    def _ask_new(self) -> Task | None:
        trial = self._question()
        params = self._suggest(trial)
        seed = samplers.trial_seed(self.spec.search.seed, trial.number)
        try:
            config = self._config(params, trial.user_attrs, seed)
        except ConfigError as error:
            self._refuse(trial, str(error))
            return None
        trial.set_user_attr("seed", config["seed"])
        if _is_protected(trial.user_attrs):
            self._protected.add(trial.number)
        self.sync()
        self._trials[trial.number] = trial
        self._counted += 1
        return Task(trial.number, config, params)

    def _question(self) -> optuna.trial.Trial:
        """Return a new trial, or one that a killed process was asking for."""
        if not self._begun:
            self.optuna.sampler = samplers.make(self.spec, len(self._frozen()))
            return self.optuna.ask()
        begun = self._begun.pop(0)
        self.optuna.sampler = samplers.make(self.spec, begun.number)
        if known := self._params_of_folder(begun.number):
            self.optuna._storage.set_trial_system_attr(begun._trial_id, "fixed_params", known)
        return optuna.trial.Trial(self.optuna, begun._trial_id)

    def _suggest(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        params: dict[str, Any] = {}
        drawn = dict(trial.params)
        for parameter in self.spec.parameters:
            if space.applies(parameter, params):
                if parameter.name in drawn:
                    samplers.draw_again(trial, parameter)
                stored = space.suggest(trial, parameter)
                params[parameter.name] = space.decode(parameter, stored)
        return params

    def _config(self, params: Mapping[str, Any], attributes: Mapping[str, Any], seed: int) -> dict[str, Any]:
        overrides = attributes.get("overrides", {})
        seeded = {} if "seed" in self.spec.fixed else {"seed": seed}
        values = config_values(self.spec, {**seeded, **params, **overrides})
        known = {**values, **self._facts(values)}
        for constraint in self.spec.constraints:
            try:
                holds = space.holds(constraint, known)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise ConfigError("constraints", f"{constraint} cannot be computed: {error}") from error
            if not holds:
                raise ConfigError("constraints", f"{constraint} does not hold")
        return values

    def _facts(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what the workload knows of a configuration, where constraints speak of it."""
        module = workload.load(self.spec.workload)
        spoken = {name for constraint in self.spec.constraints for name in space.names(constraint)}
        if spoken.isdisjoint(workload.facts_of(module)):
            return {}
        try:
            found: dict[str, float] = module.facts(configuration.build(module.Config, values))
        except ValueError as error:
            raise ConfigError("constraints", str(error)) from error
        return found

    def _refuse(self, trial: optuna.trial.Trial, reason: str) -> None:
        trial.set_user_attr("refused", reason)
        self.optuna.tell(trial, state=TrialState.PRUNED)

    def _report_epochs(self, trial: optuna.trial.Trial, epochs: Mapping[int, tuple[float, ...]]) -> None:
        if len(self.spec.objectives) > 1:
            trial.set_user_attr("epochs", {str(epoch): list(values) for epoch, values in epochs.items()})
            return
        for epoch, (value,) in sorted(epochs.items()):
            trial.report(value, epoch)

    def _reconcile(self) -> None:
        """Settle what an earlier process left: tell what is committed, run again what was in flight."""
        for trial in self._frozen():
            if trial.state == TrialState.RUNNING:
                self._settle(trial)
                trial = self._one(trial.number)
            if trial.state != TrialState.WAITING and "refused" not in trial.user_attrs:
                self._counted += trial not in self._begun
            if _is_protected(trial.user_attrs):
                self._protected.add(trial.number)
            if trial.state.is_finished():
                self.history[trial.number] = self._epochs(trial)
        self._take_up_unknown()

    def _settle(self, trial: FrozenTrial) -> None:
        params = {p.name: space.decode(p, trial.params[p.name]) for p in self.spec.parameters if p.name in trial.params}
        whole = all(p.name in params for p in self.spec.parameters if space.applies(p, params))
        self.fetch(trial.number)
        if not whole or "seed" not in trial.user_attrs:
            self._begun.append(trial)
        elif (outcome := read_outcome(self.trial_folder(trial.number))) is not None:
            self.tell(trial.number, outcome)
        else:
            config = self._config(params, trial.user_attrs, trial.user_attrs["seed"])
            self._again.append(Task(trial.number, config, params, resumed=True))

    def _take_up_unknown(self) -> None:
        """Have trials asked that have a folder but, where a damaged journal lost its end, no question.

        Their numbers and values are those of before, so that what they did counts.
        """
        folders = (self.paths.folder / self._folder).glob("*")
        numbers = [int(path.name) for path in folders if path.name.isdecimal()]
        for number in range(len(self._frozen()), max(numbers, default=-1) + 1):
            if params := self._params_of_folder(number):
                logger.warning("%s: trial %d is not in it, but has a folder; taken up", self.paths.journal, number)
                self.optuna.enqueue_trial(params)
            else:
                lost = {"refused": "lost with the end of a damaged journal"}
                self.optuna.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=lost))

    def _params_of_folder(self, number: int) -> dict[str, Any]:
        """Return the values that a trial's folder shows it was begun with, as Optuna stores them; nothing without."""
        try:
            config = durable.read_json(self.trial_folder(number) / CONFIG)
        except (OSError, ValueError):
            return {}
        params: dict[str, Any] = {}
        for parameter in self.spec.parameters:
            if space.applies(parameter, params) and parameter.name in config:
                params[parameter.name] = config[parameter.name]
        return {name: space.encode(value) for name, value in params.items()}

    def _record(self, trial: FrozenTrial) -> TrialRecord | None:
        attributes = trial.user_attrs
        if "refused" in attributes:
            return None
        names = [parameter.name for parameter in self.spec.parameters if parameter.name in trial.params]
        by_name = {parameter.name: parameter for parameter in self.spec.parameters}
        return TrialRecord(
            number=trial.number,
            state=_STATES[trial.state],
            params={name: space.decode(by_name[name], trial.params[name]) for name in names},
            values=tuple(trial.values) if trial.state == TrialState.COMPLETE else None,
            epochs=self._epochs(trial),
            seed=attributes.get("seed", 0),
            reason=attributes.get("reason", ""),
            best_epoch=attributes.get("best_epoch"),
            checkpoint=self._checkpoint(attributes),
            checkpoint_sha256=attributes.get("checkpoint_sha256"),
            attempts=attributes.get("attempts", 1),
            slot_s=attributes.get("slot_s", 0.0),
            started=trial.datetime_start,
            finished=trial.datetime_complete,
            metrics=attributes.get("metrics", {}),
            note=attributes.get("note", ""),
        )

    def _checkpoint(self, attributes: Mapping[str, Any]) -> str | None:
        name: str | None = attributes.get("checkpoint")
        path = durable.below(self.paths.folder, name, links=True)
        return name if path is not None and (path / durable.MANIFEST).is_file() else None

    def _epochs(self, trial: FrozenTrial) -> dict[int, tuple[float, ...]]:
        if len(self.spec.objectives) == 1:
            return {epoch: (value,) for epoch, value in sorted(trial.intermediate_values.items())}
        stored = trial.user_attrs.get("epochs", {})
        return {int(epoch): tuple(values) for epoch, values in stored.items()}

    def _frozen(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def _one(self, number: int) -> FrozenTrial:
        """Return a trial without a list of all: there may be thousands, and every end asks for one."""
        storage = self.optuna._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.optuna._study_id, number))


def _is_protected(attributes: Mapping[str, Any]) -> bool:
    return "note" in attributes and bool(attributes.get("protected", True))


def read_outcome(folder: Path) -> Outcome | None:
    """Return the committed outcome of a trial's folder, or None; one that is damaged is put aside and is none."""
    path = folder / RESULT
    try:
        values = durable.committed(path)
        return None if values is None else outcome_from(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        with contextlib.suppress(FileNotFoundError):  # put aside by another process
            aside = durable.put_aside(path)
            logger.warning("%s: damaged (%s), now %s; the trial goes on from its checkpoint", path, error, aside.name)
        return None


def outcome_from(values: Mapping[str, Any]) -> Outcome:
    """Return an outcome from plain data; what a later version may have put there too is passed over."""
    known = {item.name: values[item.name] for item in fields(Outcome) if item.name in values}
    epochs = {int(epoch): tuple(objectives) for epoch, objectives in values["epochs"].items()}
    return Outcome(**{**known, "epochs": epochs})


def _attributes(outcome: Outcome) -> dict[str, Any]:
    names = ("reason", "best_epoch", "checkpoint", "checkpoint_sha256", "attempts", "slot_s", "metrics")
    found = {name: getattr(outcome, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_OPTUNA_STATES = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
