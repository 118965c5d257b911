"""Runs the trials of a study in slots: Ray Tune carries them out, the study says what they are.

Ray Tune is the executor only. Its searcher interface asks our study, its scheduler interface asks our rules, its
loggers and its restore are not used: what is true stands in the study and in the trials' folders.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from search import epochs, logs, ray_tune, trial
from search.drain import LEAVING
from search.errors import OUT_OF_MEMORY, DiskError, SearchError, disk_error, is_disk
from search.record import State, TrialRecord
from search.resources import is_gang, worker
from search.slot import Slot
from search.spec import Resources
from search.study import RESULT, Outcome, Study, Task, outcome_from

logger = logging.getLogger(__name__)

HOLD_S = 15.0
"""How long finished trials wait for slots that are starting; once waited in vain, not again until all are up."""
CRASHES = 3
"""Trials in a row that lose every process they are given before the search is broken off."""
DEATHS = 10
"""Processes in a row that may die of one trial without an epoch, over all runs of a study, before it has failed."""
ASK_AHEAD_SHARE = 0.05
"""A question that takes more than this share of a trial is asked while the slots work."""


class Listener(Protocol):
    """Whoever wants to see what happens while trials run; called in the driver."""

    def trial_started(self, number: int, params: dict[str, Any]) -> None:
        """The trial waits for its process."""

    def trial_placed(self, number: int) -> None:
        """A process has the trial."""

    def trial_retried(self, number: int, reason: str) -> None:
        """The trial lost its process and waits for another; the reason is one word of few."""

    def trial_epoch(self, number: int, epoch: int, values: tuple[float, ...], metrics: dict[str, float]) -> None:
        """The trial has finished an epoch."""

    def trial_ended(self, record: TrialRecord) -> None:
        """The trial has ended, and the study knows."""

    def tick(self) -> None:
        """Some time has passed."""


def run(
    study: Study,
    slots: int,
    listener: Listener,
    may_start: Callable[[], bool] = lambda: True,
    allowed: Callable[[], int] | None = None,
) -> None:
    """Run trials until the study has no more to ask; Ray must be up.

    Args:
        study: what to run, and where everything is recorded.
        slots: how many trials run at the same time.
        listener: hears of every start, epoch and end.
        may_start: False once a budget is used up; trials that run then are carried to their end.
        allowed: how many of the slots may be used now; None: all.
    """
    director = Director(study, slots, listener, may_start, allowed)
    resources = study.spec.resources
    scratch = tempfile.mkdtemp(prefix="tune-")
    try:
        with _quiet():
            tune.Tuner(
                _trainable(resources),
                tune_config=tune.TuneConfig(
                    search_alg=_Questions(director),
                    scheduler=_Verdicts(director),
                    num_samples=-1,
                    reuse_actors=True,
                    # Ray Tune would otherwise wait for one slot after another, and a cluster grow one by one.
                    max_concurrent_trials=slots,
                ),
                run_config=tune.RunConfig(
                    name=study.name.replace("/", "-"),
                    storage_path=scratch,
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=resources.max_attempts - 1),
                    callbacks=[_Ticks(director)],
                ),
            ).fit()
    finally:
        director.close()
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(study.paths.gangs, ignore_errors=True)
    if director.broken is not None:
        raise director.broken


def _trainable(resources: Resources) -> Any:
    """Return the process in which trials run, with all the places that a trial's workers need."""
    place = worker(resources)
    if not is_gang(resources):
        return tune.with_resources(Slot, tune.PlacementGroupFactory([place]))
    from search.gang.gang import Gang

    return tune.with_resources(Gang, tune.PlacementGroupFactory([{}, *[place] * resources.workers]))


class Director:
    """Joins Ray Tune's three interfaces to the study; lives in the driver."""

    def __init__(
        self,
        study: Study,
        slots: int,
        listener: Listener,
        may_start: Callable[[], bool],
        allowed: Callable[[], int] | None,
    ) -> None:
        self.study, self.slots, self.listener, self.may_start = study, slots, listener, may_start
        self.allowed = allowed or (lambda: slots)
        self.running: dict[str, Task] = {}
        self.broken: Exception | None = None
        self.crash = ""
        self._crashes = 0
        self._verdicts: dict[int, str] = {}
        self._started: dict[int, float] = {}
        self._asker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ask")
        self._ahead: Future[Task | None] | None = None
        self._holding_since: float | None = None
        self._patience_s = HOLD_S
        self._ask_s, self._trial_s = 0.0, float("inf")

    def next_task(self, trial_id: str) -> Task | None:
        """Return the next trial for a free slot; None once there is none."""
        task = self._take()
        if task is not None:
            self.running[trial_id] = task
            self._started[task.number] = time.monotonic()
            self.listener.trial_started(task.number, dict(task.params))
        return task

    def judge(self, trial_id: str, epoch: int, metrics: dict[str, float]) -> bool:
        """Record an epoch; return whether the trial ends early."""
        number = self.running[trial_id].number
        values = tuple(metrics[objective.metric] for objective in self.study.spec.objectives)
        with self._minding_errors():
            verdict = self.study.report(number, epoch, values)
            self.listener.trial_epoch(number, epoch, values, metrics)
            if verdict.stop:
                self._verdicts[number] = verdict.why
            return verdict.stop
        return False

    def ended(self, trial_id: str, outcome_json: str | None, crashed: bool) -> None:
        """Tell the study how a trial ended: by itself, by a verdict, or with its process."""
        task = self.running.pop(trial_id, None)
        if task is None or isinstance(self.broken, DiskError):
            return  # Untold, the trial goes on at the next start; a journal that could not be written is not touched.
        self._crashes = self._crashes + 1 if crashed else 0
        if self._crashes == CRASHES:
            self.broken = SearchError(f"{CRASHES} trials in a row could not be run; the last said: {self.crash}")
        self._trial_s = time.monotonic() - self._started.pop(task.number)
        with self._minding_errors():
            self.study.fetch(task.number)
            self.study.tell(task.number, self._outcome(task.number, outcome_json, crashed))
            self.listener.trial_ended(self.study.record(task.number))

    def died(self, trial_id: str, kind: str, crash: str) -> None:
        """Take note that a trial lost its process; of memory that does not suffice it would die again."""
        self.crash = crash
        task = self.running.get(trial_id)
        if task is not None and kind == "memory":
            with self._minding_errors():
                self.study.fetch(task.number)
                self._end(task.number, "failed", "out of memory: killed by Ray before its machine ran out of it")

    def halt(self, reason: str) -> None:
        """Start nothing more: a slot found the disk full."""
        self.broken = self.broken or DiskError(reason)

    @contextlib.contextmanager
    def _minding_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Tune would take it for a fault of the trial, and kill its slot
            where = getattr(error, "filename", None) or self.study.paths.folder
            self.broken = disk_error(error, where) if is_disk(error) else error

    def may_leave(self, starting: bool) -> bool:
        """Return whether a finished trial may give its slot back now.

        Ray Tune hands a freed slot to a trial whose own slot is still starting, and throws that start away: with short
        trials, a second slot would never come up. So while a slot is starting, finished trials hold theirs a little.
        """
        now = time.monotonic()
        if not starting:
            self._holding_since, self._patience_s = None, HOLD_S
            return True
        self._holding_since = self._holding_since or now
        self._patience_s = min(self._patience_s, HOLD_S - (now - self._holding_since))
        return self._patience_s <= 0

    def close(self) -> None:
        """End the asking thread."""
        self._asker.shutdown(wait=True, cancel_futures=True)

    def _outcome(self, number: int, outcome_json: str | None, crashed: bool) -> Outcome:
        if outcome_json is not None:
            outcome = outcome_from(json.loads(outcome_json))
            # Its slot has committed it, but a store knows only what the driver says.
            return self._commit(number, outcome) if self.study.paths.store else outcome
        if crashed:
            died = f"its process died {self.study.spec.resources.max_attempts} times: {self.crash}"
            return self._end(number, "failed", died)
        return self._end(number, "stopped", self._verdicts.pop(number, "stopped"))

    def _end(self, number: int, state: State, reason: str) -> Outcome:
        """Commit how a trial ended that did not say so itself, from what its folder shows."""
        folder, objectives = self.study.trial_folder(number), self.study.spec.objectives
        return self._commit(number, trial.outcome_of(folder, objectives, state, reason))

    def _commit(self, number: int, outcome: Outcome) -> Outcome:
        folder, store = self.study.trial_folder(number), self.study.paths.store
        store.check()
        committed = trial.commit(folder, outcome)
        store.push(folder / RESULT)
        return committed

    def _take(self) -> Task | None:
        future, self._ahead = self._ahead, None
        task = future.result() if future is not None else self._ask()
        if task is not None and self._ask_s > ASK_AHEAD_SHARE * self._trial_s:
            self._ahead = self._asker.submit(self._ask)
        return task

    def _ask(self) -> Task | None:
        # What an earlier process left in flight had started in time: it is carried to its end.
        if self.broken is not None or not (self.study.in_flight() or self.may_start()):
            return None
        began = time.monotonic()
        task = self.study.ask()
        while task is not None and (ended := self._ended_already(task)):
            self.study.tell(task.number, self._end(task.number, *ended))
            self.listener.trial_ended(self.study.record(task.number))
            task = self.study.ask()
        self._ask_s = time.monotonic() - began
        return task

    def _ended_already(self, task: Task) -> tuple[State, str] | None:
        """Return how a trial that an earlier process left should have ended by then; None for all others."""
        if not task.resumed:
            return None
        folder = self.study.trial_folder(task.number)
        rows = epochs.read(folder)
        deaths = trial.attempts(folder) - (rows[-1].attempt if rows else 0)
        if deaths >= DEATHS:
            return "failed", f"{deaths} processes in a row died before its next epoch"
        for row in rows:
            if row.epoch >= task.config["epochs"]:
                break  # At the last epoch there is nothing left to stop.
            values = tuple(row.metrics[objective.metric] for objective in self.study.spec.objectives)
            verdict = self.study.report(task.number, row.epoch, values)
            if verdict.stop:
                return "stopped", verdict.why
        return None


class _InDriver:
    """Stays in the driver: Ray Tune copies and pickles what it is given, but the study has one writer."""

    director: Director

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Questions(_InDriver, Searcher):
    """Ray Tune asks here for configurations and tells here how trials ended."""

    def __init__(self, director: Director) -> None:
        super().__init__()
        self.director = director

    def suggest(self, trial_id: str) -> Any:
        director = self.director
        if len(director.running) >= director.allowed():
            return None
        try:
            task = director.next_task(trial_id)
        except Exception as error:  # Tune would log it and ask for ever
            director.broken = disk_error(error, director.study.paths.folder) if is_disk(error) else error
            task = None
        return _order(director.study, task) if task is not None else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the scheduler has recorded it already."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.director.ended(trial_id, (result or {}).get("outcome_json"), error)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a new searcher reads the study."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: the study is on disk already."""


class _Verdicts(_InDriver, FIFOScheduler):
    """Ray Tune asks here whether a trial goes on."""

    def __init__(self, director: Director) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.director = director

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if len(self.director.running) >= self.director.allowed() < self.director.slots:
            tune_controller._cleanup_cached_actors(force_all=True)  # a slot kept warm that others are to have
        if "halt" in result:
            self.director.halt(result["halt"])
            return TrialScheduler.STOP
        metrics = json.loads(result["metrics_json"])
        stop = bool(metrics) and self.director.judge(trial.trial_id, result["epoch"], metrics)
        if "outcome_json" in result:
            starting = any(other.status == other.PENDING for other in tune_controller.get_live_trials())
            stop = self.director.may_leave(starting)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Look at a death before Ray Tune starts the trial again."""
        error = ray_tune.ended_by(trial)
        kind, crash = _lost(error), _told(error)
        logger.warning("trial %s: %s", trial.config.get("number"), crash)
        if kind == "machine":
            trial.max_failures += 1  # taken away, which is no fault of the trial
        self.director.died(trial.trial_id, kind, crash)


class _Ticks(_InDriver, tune.Callback):
    def __init__(self, director: Director) -> None:
        self.director = director
        self.at_sigusr1 = signal.getsignal(signal.SIGUSR1)

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Put back what this process does at SIGUSR1: Ray Tune would end the trials as if they were to end there."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self.at_sigusr1)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if task := self.director.running.get(trial.trial_id):
            self.director.listener.trial_placed(task.number)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if task := self.director.running.get(trial.trial_id):
            self.director.listener.trial_retried(task.number, _lost(ray_tune.ended_by(trial)))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.director.listener.tick()


def _told(error: Exception | None) -> str:
    """Return what there is to read of an error in a line: of a traceback the end, of Ray's advice nothing."""
    text = " ".join(str(error).split())
    return text[-500:] if isinstance(error, RayTaskError) else text.partition(" Some common causes")[0][:500]


def _lost(error: Exception | None) -> str:
    """Return what a trial lost its process to, in one of few words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if LEAVING in str(error):
        return "machine"
    if OUT_OF_MEMORY in str(error):
        return "memory"
    if "NodeDiedError" in kinds or "node has died" in str(error):
        return "node"
    return "process" if kinds & {"RayActorError", "WorkerCrashedError"} else "error"


def _order(study: Study, task: Task) -> dict[str, Any]:
    """Return what a slot or a gang needs to run a trial, as plain data."""
    return {
        "number": task.number,
        "workload": study.spec.workload,
        "config": dict(task.config),
        "objectives": [asdict(objective) for objective in study.spec.objectives],
        "folder": str(study.trial_folder(task.number).absolute()),
        "tensorboard": study.spec.tracking.tensorboard,
        "resources": asdict(study.spec.resources),
        "study": study.label,
        "log": logs.kind(),
        "scratch": str(study.paths.gangs.absolute()),
        "store": study.paths.store.uri,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Ray Tune says of loggers and result files that we do not use."""
    tune_logger = logging.getLogger("ray.tune")
    level = tune_logger.level
    tune_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tune_logger.setLevel(level)
