"""What is known of one trial, read from the study: plain data for leaderboards, reports and rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import durable
from search.storage.store import JOURNAL, LEASE, Store

DEFAULTS = "defaults"
"""Note of the trial with the workload's own values: every search answers how much better than these."""

TRIALS = ("trials", "promotion", "parent_training")
"""Folders of trials: of the search, of the promoted that are trained again, of the parent."""

State = Literal["waiting", "running", "complete", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study."""

    number: int
    state: State
    params: Mapping[str, Any]
    """The searched values under dotted names; conditional ones only where they applied."""
    values: tuple[float, ...] | None = None
    """The objectives at the best epoch, in the order of the spec; None unless complete."""
    epochs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """The objectives after each reported epoch."""
    seed: int = 0
    reason: str = ""
    """Why it ended, in words: finished, stopped at a rung, or how it failed."""
    best_epoch: int | None = None
    checkpoint: str | None = None
    """Folder of the best epoch's checkpoint, relative to the study's folder; None once it is deleted."""
    checkpoint_sha256: str | None = None
    attempts: int = 1
    slot_s: float = 0.0
    """Seconds a slot worked on it."""
    started: datetime | None = None
    finished: datetime | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics that the workload reported at the best epoch."""
    note: str = ""
    """Why it was tried, where the sampler did not ask for it: `defaults`, or which promoted trial it trains again."""

    @property
    def is_incumbent(self) -> bool:
        """Whether it has the workload's own values, with which all others are compared."""
        return self.note == DEFAULTS


@dataclass(frozen=True)
class StudyPaths:
    """Where everything of one study lies."""

    folder: Path
    store: Store = field(default_factory=Store, compare=False)
    """Where the truth is, if not in the folder."""

    @property
    def spec(self) -> Path:
        """Resolved spec: every value, every version, the data's manifest."""
        return self.folder / "spec.yaml"

    @property
    def journal(self) -> Path:
        """Optuna's journal: the truth."""
        return self.folder / "study.journal"

    @property
    def identity(self) -> Path:
        """What a database knows this folder's studies by; absent where the journal is the record."""
        return self.folder / "study.json"

    @property
    def lease(self) -> Path:
        """Held by the process that writes the study."""
        return self.folder / "lease.json"

    def pull(self) -> None:
        """Make this machine's copy what the store has, all but the trials: they are fetched when they are wanted."""
        self.store.pull(self.folder, skip=_is_of_a_trial)

    def push(self) -> None:
        """Write to the store what has come to this machine's copy, all but the trials: they are written by others."""
        self.store.push(self.folder, skip=_is_of_a_trial)

    @property
    def stop(self) -> Path:
        """Asks the driver that holds the study to stop; gone at the next start."""
        return self.folder / "stop"

    def trial(self, number: int) -> Path:
        """Folder of one trial: config.json, metrics.jsonl, result.json, checkpoints/, TensorBoard events."""
        return self.folder / "trials" / str(number)

    @property
    def gangs(self) -> Path:
        """What Ray Train writes while gangs run; gone once they have ended."""
        return self.folder / "gangs"

    @property
    def parent(self) -> Path:
        """The checkpoint that every trial starts from, pinned; parent.json beside it says where it is from."""
        return self.folder / "parent"

    @property
    def pinned(self) -> Path:
        """Where the parent is from, and its hash."""
        return self.folder / "parent.json"

    @property
    def scan(self) -> Path:
        """How far the parent can be pruned, one value at a time."""
        return self.folder / "scan" / "scan.json"

    @property
    def promotion(self) -> Path:
        """Who was promoted, and one sentence why."""
        return self.folder / "promotion.json"

    def evaluation(self, name: str) -> Path:
        """Folder of one evaluation: evaluation.json, figures; `name` is the trial's number, or `7-seed2`."""
        return self.folder / "evaluation" / name

    def model(self, name: str) -> Path:
        """Folder of one model ready to use."""
        return self.folder / "models" / name

    @property
    def leaderboard(self) -> Path:
        """The promoted, best first, with test scores and intervals."""
        return self.folder / "leaderboard.csv"

    @property
    def pareto(self) -> Path:
        """The parent, the Pareto set and all that were evaluated, with what they cost."""
        return self.folder / "pareto.csv"

    def comparison(self, parameter: str) -> Path:
        """The leaderboard in the order of the values of the one parameter that a search has, such as lr."""
        return self.folder / f"{parameter.rpartition('.')[2]}_comparison.csv"

    @property
    def table(self) -> Path:
        """All trials as Parquet."""
        return self.folder / "trials.parquet"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.folder / "report.html"


def is_bulk(name: str) -> bool:
    """Return whether a file of a trial is one that the driver need not have: weights, and what nobody reads back."""
    return is_extra(name) or (name.startswith("checkpoints/") and not name.endswith(f"/{durable.MANIFEST}"))


def is_extra(name: str) -> bool:
    """Return whether a file of a trial is one that no later attempt needs."""
    return name.startswith("events.") or name.endswith(".png")


def _is_of_a_trial(name: str) -> bool:
    """Return whether a file of a study is one that its slots write, or one that stands for the driver."""
    area, _, rest = name.partition("/")
    if area in TRIALS:
        return not (rest.endswith(f"/{durable.MANIFEST}") and "/checkpoints/" in rest)
    return area in (JOURNAL, "gangs", "study.journal") or area.startswith(LEASE)
