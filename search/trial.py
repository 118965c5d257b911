"""One trial in its folder: what a process that trains it reads and writes, and the outcome it commits.

trials/<number>/config.json        every value of the workload's Config
                changes.json       values that had to give way since, such as micro_batch
                attempt-1, -2      one for each process that took the trial; a later one supersedes an earlier
                hung.txt           where a process stood whose epoch took too long
                metrics.jsonl      a line for each epoch
                checkpoints/       the newest two and the best, each sealed with a manifest
                result.json        the committed outcome: whoever links it first, wins
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import logging
import math
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import configuration
import durable
from search import epochs, logs, rules, watchdog, workload
from search.epochs import EpochLine
from search.errors import DiskError, disk_error, is_disk
from search.record import State, is_extra
from search.spec import Objective
from search.storage.store import Store
from search.study import CONFIG, RESULT, Outcome, read_outcome

CHANGES = "changes.json"
HUGE = 1e18
"""No objective that means anything is beyond it: a value that is, comes from a training that has diverged."""
POLL_S = 0.02
"""Pause of a finished trial that is pulled again because it may not leave its slot yet."""
logger = logging.getLogger(__name__)

KEPT = 2
"""Newest checkpoints of a running trial that stay besides its best: one may be torn when the process is killed."""
PICTURES_S = 10.0
"""Least time between two pictures of a trial's predictions in TensorBoard, besides that of its last epoch."""


class TrialRun:
    """One trial as it runs in a process: pulls epochs, keeps files, and ends in a committed outcome.

    Args:
        order: `number`, `workload`, `config`, `objectives`, `folder`, `resources`, `tensorboard` (whether to write
            events) and perhaps `store` (the URI of the study's folder), as plain data.
        saving: called with a checkpoint's folder before it is saved, so that other ranks of the trial can do their
            part of it.
    """

    def __init__(self, order: Mapping[str, Any], saving: Callable[[Path], None] | None = None) -> None:
        self.saving, self.order = saving, order
        self.folder = Path(order["folder"])
        self.number: int = order["number"]
        self.config: dict[str, Any] = dict(order["config"])
        self.objectives = [Objective(**objective) for objective in order["objectives"]]
        self.hung_after_s: float | Literal["auto"] = order.get("resources", {}).get("hung_after_s", "auto")
        self.last = self.drawn = time.time()
        self.rows: list[EpochLine] = []
        self.store = Store(self.folder.parent.parent, order.get("store"))
        self.committed: Outcome | None = None
        self.disk: DiskError | None = None
        try:
            with _minding_the_disk(self.folder):
                self.store.pull(self.folder, skip=is_extra)
                self.committed = read_outcome(self.folder) or self._hung()
                if self.committed is None:
                    self._begin(order["workload"], order["tensorboard"])
        except DiskError as error:
            self.disk = error

    def _hung(self) -> Outcome | None:
        """Return the outcome of a trial whose process before this one took too long for an epoch; None otherwise."""
        if not watchdog.ended(self.folder):
            return None
        self.rows = epochs.read(self.folder)
        reason = watchdog.reason(self.limit_s())
        return fail(self.folder, self.objectives, reason, watchdog.stacks(self.folder))

    def _begin(self, name: str, tensorboard: bool) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.attempt = _claim(self.folder)
        logs.in_worker(self.order, rank=0, attempt=self.attempt)
        if self.attempt == 1:
            durable.write_json(self.folder / CONFIG, self.config)
        self._announce()
        self.config |= durable.read_json(changes) if (changes := self.folder / CHANGES).is_file() else {}
        told = epochs.read(self.folder)
        self.resume = _newest(self.checkpoints, _last_row(told))
        self.rows = self._rows_until(_epoch_of(self.resume) if self.resume else 0, told)
        self.workload = workload.load(name)
        self.epochs: Iterator[Any] | None = None
        self.events = self._open_events() if tensorboard else None

    def step(self) -> tuple[int, dict[str, float], Outcome | None]:
        """Pull one epoch; return its number, its metrics, and the outcome if it was the last.

        Raises:
            MemoryError, or a device's own error: after the outcome is committed, so that the process is replaced.
            DiskError: without an outcome, since the trial did nothing wrong and will go on from its checkpoint.
        """
        if self.committed is not None:
            time.sleep(POLL_S)
            return last_epoch(self.committed), {}, self.committed
        try:
            return self.pull()
        except (Superseded, DiskError):
            raise
        except Exception as error:
            self._refuse_superseded()
            self.committed = fail(self.folder, self.objectives, failure(error), traceback.format_exc())
            if is_unhealthy(error):
                raise
            return _last_row(self.rows), {}, self.committed

    def pull(self) -> tuple[int, dict[str, float], Outcome | None]:
        """Pull one epoch as `step` does, and leave it to the caller what an error means for the trial.

        Raises:
            DiskError: if a file cannot be written for want of room.
        """
        with _minding_the_disk(self.folder):
            if self.disk is not None:
                raise self.disk
            epoch = next(self._epochs(), None)
            if epoch is None:
                return _last_row(self.rows), {}, self._finish()
            finished = epoch.number >= self.config["epochs"]
            self._keep(epoch, finished)
            return epoch.number, dict(self.rows[-1].metrics), self._finish() if finished else None

    def limit_s(self) -> float:
        """Return how long the next epoch may take."""
        return watchdog.limit_s(self.hung_after_s, [row.seconds for row in self.rows])

    def close(self) -> None:
        """Let go of everything that the trial held."""
        pulled, self.epochs = getattr(self, "epochs", None), None
        if pulled is not None and hasattr(pulled, "close"):
            pulled.close()
        events, self.events = getattr(self, "events", None), None
        if events is not None:
            events.close()
        gc.collect()
        try:
            self.store.push(self.folder, skip=lambda name: not (is_extra(name) or name == "error.txt"))
        except DiskError as error:  # what matters is there already
            logger.warning("trial %s: %s", self.number, error)

    def _announce(self) -> None:
        """Tell the store who has the trial now, and fetch the parent."""
        if not self.store:
            return
        self.mark = uuid.uuid4().hex.encode()
        self.store.write(_attempt(self.folder, self.attempt), self.mark)
        self.store.push(self.folder / CONFIG)
        parent = self.store.folder / "parent"
        if self.config.get("parent") == str(parent):
            self.store.pull(parent)

    def _refuse_superseded(self) -> None:
        mine, later = _attempt(self.folder, self.attempt), _attempt(self.folder, self.attempt + 1)
        if later.exists() or (self.store and self.store.read(later) is not None):
            raise Superseded(f"{self.folder}: attempt {self.attempt + 1} has taken over")
        # Of two that took the same number, because neither saw the other, the one that wrote last goes on.
        if self.store and self.store.read(mine) != self.mark:
            raise Superseded(f"{self.folder}: another process has taken attempt {self.attempt} over")

    def _open_events(self) -> Any:
        from search.results.tensorboard import Scalars

        return Scalars(self.folder, _last_row(self.rows) + 1)

    def _rows_until(self, epoch: int, told: Sequence[EpochLine]) -> list[EpochLine]:
        """Return the rows up to an epoch, and cut the file after them: what follows is trained again."""
        rows = [row for row in told if row.epoch <= epoch]
        if self.attempt > 1:
            epochs.rewrite(self.folder, rows)
        return rows

    def _epochs(self) -> Iterator[Any]:
        if self.epochs is None:
            self.epochs = iter(self.workload.train(configuration.build(self.workload.Config, self.config), self.resume))
        return self.epochs

    def _keep(self, epoch: Any, finished: bool) -> None:
        """Write what the epoch gave, the checkpoint before the line that says it exists."""
        self._refuse_superseded()
        for objective in self.objectives:
            if objective.metric not in epoch.metrics:
                raise ValueError(f"{objective.metric} is undefined at epoch {epoch.number}")
        values = tuple(float(epoch.metrics[objective.metric]) for objective in self.objectives)
        for objective, value in zip(self.objectives, values, strict=True):
            if not math.isfinite(value):
                raise ArithmeticError(f"{objective.metric} is {value} at epoch {epoch.number}")
            if abs(value) > HUGE:
                raise OverflowError(f"{objective.metric} is {value:.3g} at epoch {epoch.number}, beyond {HUGE:.0e}")
        folder = self.checkpoints / _name(epoch.number)
        if self.saving is not None:
            self.saving(folder)
        _save(epoch, folder)
        self.store.push(folder)
        now = time.time()
        row = EpochLine(
            epoch=epoch.number,
            metrics={name: float(value) for name, value in epoch.metrics.items()},
            seconds=round(now - self.last, 4),
            attempt=self.attempt,
            time=now,
        )
        self.last = now
        self.rows.append(row)
        epochs.append(self.folder, row)
        self.store.push(self.folder / epochs.FILE)
        if logger.isEnabledFor(logging.INFO):
            shown = ", ".join(f"{o.metric} {value:g}" for o, value in zip(self.objectives, values, strict=True))
            logger.info("trial %s epoch %s %s %.1f s", self.number, row.epoch, shown, row.seconds)
        self._thin_out()
        if self.events is not None:
            self.events.write(epoch.number, row.metrics, now)
            self._draw(self.events, epoch, finished)

    def _draw(self, events: Any, epoch: Any, finished: bool) -> None:
        """Show predictions in TensorBoard, now and then and at the end, where the workload draws any."""
        if epoch.draw is None or not (finished or time.time() - self.drawn >= PICTURES_S):
            return
        self.drawn = time.time()
        picture = self.folder / "predictions.png"
        try:
            epoch.draw(picture)
            events.image("predictions", picture, epoch.number)
        except Exception as error:  # a picture is no reason to lose a trial
            if is_disk(error):
                raise
            logger.warning("trial %s: no picture of epoch %s: %s", self.number, epoch.number, error)

    def _thin_out(self, kept: int = KEPT) -> None:
        """Delete all checkpoints but the newest few and the best."""
        best = self._best()
        for folder in _all_checkpoints(self.checkpoints)[: -kept or None]:
            if _epoch_of(folder) != best:
                self.store.delete(folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _best(self) -> int | None:
        return rules.best_epoch(_objective_values(self.rows, self.objectives), self.objectives)

    def _finish(self) -> Outcome:
        best = self._best()
        if best is None:
            return self._commit(self._outcome("failed", "the workload yielded no epoch"))
        self._thin_out(kept=0)
        last = self.rows[-1].epoch
        reason = "finished" if last >= self.config["epochs"] else f"the workload ended it after epoch {last}"
        return self._commit(self._outcome("complete", reason))

    def _outcome(self, state: State, reason: str) -> Outcome:
        return dataclasses.replace(outcome_of(self.folder, self.objectives, state, reason), attempts=self.attempt)

    def _commit(self, outcome: Outcome) -> Outcome:
        self._refuse_superseded()
        self.committed = commit(self.folder, outcome)
        return self.committed


class Superseded(RuntimeError):
    """Another process took this trial over; this one must not write any more."""


def commit(folder: Path, outcome: Outcome) -> Outcome:
    """Make an outcome durable and return it; where another was there before, that one."""
    for _ in range(2):  # again where a damaged one stood in the way
        durable.commit(folder / RESULT, asdict(outcome))
        committed = read_outcome(folder)
        if committed is not None:
            return committed
    raise OSError(errno.EIO, "what was written is not what is read", str(folder / RESULT))


def outcome_of(folder: Path, objectives: Sequence[Objective], state: State, reason: str) -> Outcome:
    """Return the outcome that a trial's folder shows, for whoever ends the trial: its slot, or the driver."""
    rows = epochs.read(folder)
    values = _objective_values(rows, objectives)
    best = rules.best_epoch(values, objectives)
    checkpoint = folder / "checkpoints" / _name(best) if best is not None else None
    sha256 = durable.seal_of(checkpoint) if checkpoint else None
    return Outcome(
        state=state,
        reason=reason,
        epochs=values,
        best_epoch=best,
        metrics=next((row.metrics for row in rows if row.epoch == best), None),
        checkpoint=str(checkpoint.relative_to(folder.parent.parent)) if checkpoint and sha256 else None,
        checkpoint_sha256=sha256,
        attempts=max(1, attempts(folder)),
        slot_s=round(sum(row.seconds for row in rows), 4),
    )


def failure(error: BaseException) -> str:
    """Return why an error ends a trial."""
    if isinstance(error, OverflowError):
        return f"exploded: {error}"
    mistake = isinstance(error, ZeroDivisionError) or not isinstance(error, ArithmeticError)
    return f"{type(error).__name__}: {error}" if mistake else f"non-finite: {error}"


def change(folder: Path, values: Mapping[str, Any]) -> None:
    """Have the next attempt at a trial run with other values."""
    durable.write_json(folder / CHANGES, values)


def fail(folder: Path, objectives: Sequence[Objective], reason: str, trace: str) -> Outcome:
    """Commit that a trial failed, its traceback beside it; return the outcome."""
    with _minding_the_disk(folder):
        (folder / "error.txt").write_text(trace or reason)
        return commit(folder, outcome_of(folder, objectives, "failed", reason))


@contextlib.contextmanager
def _minding_the_disk(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into the error that halts the search."""
    try:
        yield
    except OSError as error:
        if is_disk(error):
            raise disk_error(error, error.filename or folder) from error
        raise


def is_unhealthy(error: BaseException) -> bool:
    """Return whether a process should not be trusted with another trial: out of memory, or a device error."""
    names = {kind.__name__ for kind in type(error).__mro__}
    device = isinstance(error, RuntimeError) and any(word in str(error) for word in ("CUDA", "cuDNN", "NCCL", "HIP"))
    return bool(names & {"MemoryError", "OutOfMemoryError", "AcceleratorError"}) or device


def _objective_values(rows: Sequence[EpochLine], objectives: Sequence[Objective]) -> dict[int, tuple[float, ...]]:
    return {row.epoch: tuple(row.metrics[objective.metric] for objective in objectives) for row in rows}


def attempts(folder: Path) -> int:
    """Return how many processes have taken a trial."""
    return len(list(folder.glob("attempt-*")))


def _claim(folder: Path) -> int:
    """Return the number of this attempt; a process that made an earlier one is superseded from now on."""
    attempt = attempts(folder) + 1
    _attempt(folder, attempt).touch(exist_ok=False)
    return attempt


def _attempt(folder: Path, number: int) -> Path:
    return folder / f"attempt-{number}"


def _save(epoch: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    epoch.save(folder)
    durable.seal(folder)


def _newest(checkpoints: Path, told: int) -> Path | None:
    """Return the newest checkpoint that is whole, and delete the newer ones that are not.

    One after the epoch that was told last is none either: its numbers would be missing for good.
    """
    for folder in reversed(_all_checkpoints(checkpoints)):
        if _epoch_of(folder) <= told and durable.sealed(folder):
            return folder
        logger.warning("%s: torn, damaged or not told of; the trial goes on from one before", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _all_checkpoints(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("epoch-*"), key=_epoch_of)


def _name(epoch: int) -> str:
    return f"epoch-{epoch:04d}"


def _epoch_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def last_epoch(outcome: Outcome) -> int:
    """Return the last epoch that a trial reached."""
    return max(outcome.epochs, default=0)


def _last_row(rows: Sequence[EpochLine]) -> int:
    return rows[-1].epoch if rows else 0
