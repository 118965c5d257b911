"""A workload: the toy, in whose processes faults happen as files in a folder say.

crash       `POINT N`: at the N-th time that this point is reached, this process and the driver are killed with SIGKILL
crashed     the same file, once that has happened
clock       seconds by which the clock of every process is wrong
begun       a line for each epoch that was begun: seed, epoch, process
evaluated   a line for each evaluation that was begun: the checkpoint

A workload is imported in the driver and in every slot, so that this module can wrap what it wants to break there, and
nothing in the product knows of it.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import optuna.storages.journal._storage as optuna_journal

import durable
from search import evaluation, promotion, space
from search.study import RESULT, Study
from segmentation.epoch import Epoch, Evaluation
from workloads import toy

POINTS = (
    "ask",
    "start",
    "mid",
    "before fsync",
    "before link",
    "after link",
    "before tell",
    "after tell",
    "before promotion",
)
GIVES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e30}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set."""

    lr: float = 1e-3
    """Learning rate; 1e-2 is best."""
    width: int = 32
    """Channels; 64 is best."""
    epochs: int = 4
    """Epochs of a whole trial."""
    seed: int = 0
    """Seed of the noise."""
    epoch_s: float = 0.0
    """Seconds that an epoch takes."""
    faults: str = ""
    """Folder that says what happens, and what did; the study lies in `runs/study` there."""
    gives: Literal["score", "nan", "inf", "-inf", "nothing", "huge"] = "score"
    """What comes in place of the score from the second epoch on."""

    @classmethod
    def debug(cls) -> Config:
        """Return the smallest run."""
        return cls(epochs=2)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports."""
    return {"score": "max", "loss": "min"}


def prepare(config: Config) -> dict[str, Any]:
    """Return the manifest of no data; the driver calls this."""
    _faults_in(config)
    return toy.prepare(_plain(config))


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield the points of the toy's curve; a slot calls this."""
    _faults_in(config)
    _reached("start")
    for epoch in toy.train(_plain(config), resume):
        _note("begun", f"{config.seed} {epoch.number} {os.getpid()}")
        yield Epoch(epoch.number, _scores(config, epoch), functools.partial(_save, epoch))


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Return the toy's evaluation; an evaluation job calls this."""
    state = json.loads((checkpoint / toy.STATE_FILE).read_text())
    _faults_in(Config(faults=state["faults"]))
    _note("evaluated", str(checkpoint))
    return toy.evaluate(checkpoint, split, out_dir, changes)


def predict(checkpoint: Path, source: Path, out_dir: Path) -> list[Path]:
    """Do nothing."""
    return []


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Do nothing."""
    return []


_folder: Path | None = None
_times: Counter[str] = Counter()
_clock_s = 0.0


def _faults_in(config: Config) -> None:
    global _folder, _clock_s
    _folder = Path(config.faults) if config.faults else None
    clock = _folder / "clock" if _folder else None
    _clock_s = float(clock.read_text()) if clock and clock.exists() else 0.0


def _reached(point: str) -> None:
    """Crash here if it is time to."""
    plan = _folder / "crash" if _folder else None
    if plan is None or not plan.exists():
        return
    wanted, _, times = plan.read_text().rpartition(" ")
    _times[point] += 1
    if wanted == point and _times[point] == int(times):
        plan.rename(plan.with_name("crashed"))
        driver = json.loads((plan.parent / "runs" / "study" / "lease.json").read_text())["pid"]
        os.kill(driver, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _save(epoch: Epoch, folder: Path) -> None:
    """Write the toy's checkpoint; a crash leaves half of it."""
    epoch.save(folder)
    path = folder / toy.STATE_FILE
    text = json.dumps({**json.loads(path.read_text()), "faults": str(_folder or "")})
    path.write_text(text[: len(text) // 2])
    _reached("mid")
    path.write_text(text)


def _scores(config: Config, epoch: Epoch) -> dict[str, float]:
    scores = dict(epoch.metrics)
    if epoch.number >= 2 and config.gives == "nothing":
        del scores["score"]
    elif epoch.number >= 2 and config.gives != "score":
        scores["score"] = GIVES[config.gives]
    return scores


def _note(name: str, line: str) -> None:
    if _folder is not None:
        with (_folder / name).open("a") as file:
            file.write(f"{line}\n")


def _plain(config: Config) -> toy.Config:
    names = {field.name for field in fields(toy.Config)}
    return toy.Config(**{field.name: getattr(config, field.name) for field in fields(config) if field.name in names})


def _wrapped(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        if before:
            _reached(before)
        result = inner(*arguments, **named)
        if after:
            _reached(after)
        return result

    setattr(owner, name, call)


def _break_commits() -> None:
    """Have crashes around the two steps that make a result durable, and nowhere else."""
    commit, fsync, link = durable.commit, os.fsync, os.link
    committing: list[Path] = []

    def our_commit(path: Path, value: Mapping[str, Any]) -> bool:
        committing.append(path)
        try:
            return commit(path, value)
        finally:
            committing.pop()

    def our_fsync(descriptor: int) -> None:
        if committing and committing[-1].name == RESULT and not committing[-1].exists():
            _reached("before fsync")
        fsync(descriptor)

    def our_link(source: Any, target: Any, **named: Any) -> None:
        _reached("before link")
        link(source, target, **named)
        _reached("after link")

    durable.commit, os.fsync, os.link = our_commit, our_fsync, our_link


class _Datetime(datetime.datetime):
    """A clock that is wrong."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return datetime.datetime.now(tz) + datetime.timedelta(seconds=_clock_s)


def _shift_clock() -> None:
    right = time.time
    time.time = lambda: right() + _clock_s
    optuna_journal.datetime = _Datetime


_break_commits()
_shift_clock()
_wrapped(space, "suggest", after="ask")
_wrapped(Study, "tell", before="before tell", after="after tell")
_wrapped(promotion, "promote", before="before promotion")
_wrapped(evaluation, "run", before="before evaluation")
