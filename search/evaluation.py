"""Evaluation jobs: promoted checkpoints on the test split, as Ray tasks, each exactly once."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

import durable
from search import workload
from search.errors import DiskError, EvaluationError, disk_error, is_disk
from search.record import StudyPaths
from search.spec import SearchSpec
from search.storage.store import Store

logger = logging.getLogger(__name__)

FILE = "evaluation.json"


@dataclass(frozen=True)
class Candidate:
    """One checkpoint to evaluate."""

    name: str
    """Of its folder: the trial's number, or that and a seed."""
    trial: int
    checkpoint: str
    """Folder, relative to the study's."""
    sha256: str
    epochs: int
    """It was trained for, its best one perhaps before the last."""
    slot_s: float
    """Seconds that a slot worked on it."""


def missing(paths: StudyPaths, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates without an evaluation of just this checkpoint."""
    return [candidate for candidate in candidates if _done(paths, candidate) != candidate.sha256]


def run(paths: StudyPaths, spec: SearchSpec, candidates: Sequence[Candidate], finished: Callable[[str], None]) -> None:
    """Evaluate candidates side by side; Ray must be up. One that fails does not keep the others from being kept.

    Raises:
        EvaluationError: naming each that failed and why.
        DiskError: if the disk is full.
    """
    job = ray.remote(_job).options(num_cpus=spec.evaluation.cpus, num_gpus=float(spec.evaluation.gpus), max_retries=2)
    jobs = {job.remote(*arguments(paths, spec, candidate)): candidate.name for candidate in candidates}
    problems = []
    while jobs:
        (ready,), _ = ray.wait(list(jobs), num_returns=1)
        name = jobs.pop(ready)
        try:
            ray.get(ready)
            paths.store.pull(paths.evaluation(name))
            finished(name)
        except DiskError:
            raise
        except Exception as error:
            problems.append(f"evaluation of trial {name}: {error}")
    if problems:
        raise EvaluationError("\n".join(problems))


def arguments(paths: StudyPaths, spec: SearchSpec, candidate: Candidate) -> list[Any]:
    """Return what a job is told, as plain data."""
    return [spec.workload, str(paths.folder.absolute()), asdict(candidate), paths.store.uri]


def _job(workload_name: str, study: str, plain: dict[str, Any], uri: str | None) -> None:
    """Evaluate one checkpoint. Runs in a Ray worker."""
    try:
        _evaluate(workload_name, StudyPaths(Path(study), Store(Path(study), uri)), Candidate(**plain))
    except OSError as error:
        if is_disk(error):
            raise disk_error(error, error.filename or study) from error
        raise


def _evaluate(workload_name: str, paths: StudyPaths, candidate: Candidate) -> None:
    """Evaluate one checkpoint and write evaluation.json last, so that half a job is none."""
    checkpoint, folder = paths.folder / candidate.checkpoint, paths.evaluation(candidate.name)
    paths.store.pull(checkpoint)
    if durable.sealed(checkpoint) != candidate.sha256:
        raise EvaluationError(f"{checkpoint}: changed since the trial ended; its numbers would not be the trial's")
    paths.store.delete(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    evaluation = workload.load(workload_name).evaluate(checkpoint, "test", folder)
    content = {
        **dataclasses.asdict(evaluation),
        "trial": candidate.trial,
        "name": candidate.name,
        "checkpoint": candidate.checkpoint,
        "checkpoint_sha256": candidate.sha256,
        "epochs": candidate.epochs,
        "slot_s": candidate.slot_s,
        "split": "test",
    }
    durable.write_json(folder / FILE, content)
    paths.store.push(folder)


def main() -> None:
    """Evaluate one checkpoint as the entry point of a job: its argument is that of `_job`, as JSON."""
    _job(*json.loads(sys.argv[1]))


def _done(paths: StudyPaths, candidate: Candidate) -> str | None:
    try:
        content = json.loads((paths.evaluation(candidate.name) / FILE).read_text())
    except (OSError, ValueError):
        return None
    sha256: str = content["checkpoint_sha256"]
    return sha256


if __name__ == "__main__":
    main()
