"""What a workload yields and returns: an epoch of training, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class NonFiniteError(ArithmeticError):
    """A loss became NaN or infinite: the trial ends as failed, never as a score."""


class NoFallError(ArithmeticError):
    """The loss fell at no learning rate."""


class SanityError(RuntimeError):
    """Data, network and loss are not wired rightly: which check says so, and what is usually wrong."""


class OutOfMemoryError(MemoryError):
    """The device's memory does not hold a micro batch; the run can go on from a checkpoint with a smaller one."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message, micro_batch)
        self.message = message
        self.micro_batch = micro_batch
        """What to try next, at least 1: half of what did not fit."""

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message


class DataError(ValueError):
    """Data on disk that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: its number (from 1), its metrics, and a way to keep the state it ended in."""

    number: int
    metrics: Mapping[str, float]
    """Scalars under the names that the workload's `metrics(config)` promises; None is never among them."""
    save: Callable[[Path], None]
    """Write a self-describing checkpoint into this folder (made if missing). Valid until the next epoch is pulled."""
    draw: Callable[[Path], None] | None = None
    """Write a PNG picture of some validation predictions; where there is nothing to draw, None. Valid as long."""


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint is worth on one split, as plain data that can be written as JSON."""

    metrics: Mapping[str, float | None]
    """Scores under their names; None where a score is undefined (a class that never occurs)."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % percentile bootstrap intervals over groups, for some of the metrics."""
    resamples: Mapping[str, list[float]]
    """The bootstrap replicates behind `intervals`. Replicate i draws the same groups for every checkpoint of a
    split, so that the difference of two evaluations, replicate by replicate, is a paired comparison."""
    groups: Mapping[str, Mapping[str, float | None]]
    """Scores of each group (patient, tile, image), by its name."""
    figures: tuple[str, ...] = ()
    """Files written below the output folder, relative to it; PNG pictures first."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else is worth keeping: conventions of each metric, thresholds, data manifest, timings."""
