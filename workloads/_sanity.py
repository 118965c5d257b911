"""The ladder of checks of segmentation.sanity, for any workload that tells its parts and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import configuration
import durable
from segmentation import losses, normalisation, sanity, splits, training
from segmentation.sanity import Known, Rung
from segmentation.training import Batch
from workloads import WorkloadError, _model

HOOKS = ("parts", "samples")
LOOKED_AT = 500
"""Samples of training, for what is frequent, and of validation that are looked at, evenly spread."""


def need(name: str, workload: ModuleType) -> None:
    """Raise WorkloadError for a workload that trains no network, or does not tell which."""
    if missing := [hook for hook in HOOKS if not hasattr(workload, hook)]:
        raise WorkloadError(f"workload {name!r} has no network to check: it lacks {' and '.join(missing)}")


def climb(workload: ModuleType, config: Any, steps: int) -> list[Rung]:
    """Return what the checks find; the test split is not opened."""
    samples, made = workload.samples(config)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    device = training.resolve_device(config.device)

    def as_they_are(indices: Sequence[int]) -> Iterator[Batch]:
        return _model.evaluation_batches(samples, indices, normaliser, batch_size=config.batch_size, device=device)

    known = Known(
        as_they_are,
        train=_model.spread(made.train, LOOKED_AT),
        validation=_model.spread(splits.indices(made, "validation"), LOOKED_AT),
        groups=made.groups,
        ignore_index=int(getattr(config.data, "ignore_index", losses.IGNORE_INDEX)),
    )
    return sanity.climb(config, workload.parts(config), known, steps=steps)


def write(path: Path, name: str, config: Any, found: Sequence[Rung]) -> Path:
    """Write what was checked, and what was found, as JSON; return the path."""
    content = {
        "workload": name,
        "config": configuration.to_values(config),
        "passed": all(rung.passed for rung in found),
        "rungs": [dataclasses.asdict(rung) for rung in found],
    }
    return durable.write_json(path, content)


def table(found: Sequence[Rung]) -> str:
    """Return what was found as text, a line for each check."""
    rows = [("check", "", "measured", "expected")]
    rows += [(rung.name, "ok" if rung.passed else "failed", rung.measured, rung.expected) for rung in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
