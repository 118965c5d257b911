"""The parent that all trials of a search start from: found or trained once, pinned in the study's folder, looked at.

parent/             the checkpoint, sealed: its hash is part of what every trial is told
parent.json         where it is from
parent_training/    its training, where the search trained it
scan/               how far it can be pruned, one value at a time: scan.json and the workload's own files
"""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

import configuration
import durable
from search import comparison, samplers, spec_file, workload
from search.errors import SearchError, SpecError, StudyError
from search.evaluation import Candidate
from search.planning import Plan
from search.record import StudyPaths
from search.spec import Parameter, SearchSpec, Stopping
from search.study import Study

NOTE = "parent"
SCAN_NOTE = "sensitivity"


def inherit(plan: Plan, run: Callable[[Study], None]) -> Plan:
    """Return the plan in which every trial starts from the pinned parent; the plan itself where there is none.

    Args:
        plan: of the search; its study is held by this process.
        run: carries a study to its end, for a parent that is still to be trained.
    Raises:
        SpecError: if there is no such parent.
        StudyError: if the pinned one is damaged.
        SearchError: if its training failed.
    """
    if not plan.spec.parent.wanted:
        return plan
    folder = plan.paths.parent
    if not folder.is_dir():
        _pin(_source(plan, run), folder)
    sha256 = durable.sealed(folder)
    if sha256 is None:
        raise StudyError(f"{folder}: damaged since it was pinned; put it back, or start a study of its own by --study")
    fixed = {**plan.spec.fixed, "parent": str(folder.absolute()), "parent_sha256": sha256}
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, fixed=fixed))


def scan(plan: Plan, start: Callable[[], None]) -> dict[str, Any] | None:
    """Return how far the parent can be pruned, looked at once; None where nobody asks, or the workload cannot tell.

    Args:
        plan: from `inherit`.
        start: brings Ray up.
    """
    module = workload.load(plan.spec.workload)
    if not (plan.spec.parent.wanted and plan.spec.parent.scan and hasattr(module, "scan")):
        return None
    if not plan.paths.scan.is_file():
        start()
        cpus, gpus = plan.spec.resources.cpus_per_worker, float(plan.spec.resources.gpus_per_worker)
        job = ray.remote(_scan).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
        values, folder = spec_file.fixed_values(plan.spec), str(plan.paths.scan.parent.absolute())
        parts = _uninherited(module)
        searched = {
            parameter.name: _range(parameter)
            for parameter in plan.spec.parameters
            if _is_number(parameter) and parameter.name.startswith(parts)
        }
        found = ray.get(job.remote(plan.spec.workload, values, searched, folder))
        durable.write_json(plan.paths.scan, found)
    return durable.read_json(plan.paths.scan)


def enqueue(study: Study, spec: SearchSpec, found: Mapping[str, Any] | None) -> None:
    """Have a search begin with the points that a scan proposes; those that constraints refuse are left out."""
    if found is None or samplers.choose(spec)[0] == "grid":
        return
    for number, point in enumerate(found["points"], start=1):
        study.enqueue(point, f"{SCAN_NOTE} {number}", protected=False)


def candidates(plan: Plan) -> list[Candidate]:
    """Return the parent as what is evaluated beside the promoted; none where there is none."""
    sha256 = durable.seal_of(plan.paths.parent) if plan.spec.parent.wanted else None
    return [Candidate(comparison.PARENT, -1, plan.paths.parent.name, sha256, 0, 0.0)] if sha256 else []


def _source(plan: Plan, run: Callable[[Study], None]) -> Path:
    """Return the checkpoint that the parent is a copy of."""
    wanted = plan.spec.parent
    if wanted.checkpoint is not None:
        try:
            return workload.checkpoint(Path(wanted.checkpoint))
        except ValueError as error:
            raise SpecError(f"parent.checkpoint: {error}") from error
    if wanted.study is not None:
        best = StudyPaths(Path(wanted.study)).model("best")
        if not best.is_dir():
            raise SpecError(
                f"parent.study: {best}: no such model; name the folder of a study that has ended, such as runs/nuclei"
            )
        return best.resolve()
    return _trained(plan, run)


def _trained(plan: Plan, run: Callable[[Study], None]) -> Path:
    """Train the parent in a study of one trial, or find that it has been."""
    module = workload.load(plan.spec.workload)
    fixed = {key: value for key, value in plan.spec.fixed.items() if not key.startswith(_uninherited(module))}
    spec = dataclasses.replace(
        plan.spec,
        parameters=(),
        constraints=(),
        fixed={**fixed, **plan.spec.parent.train.values},
        search=dataclasses.replace(plan.spec.search, trials=1, sampler="random", wall_time_s=None, slot_hours=None),
        stopping=Stopping(rule="none"),
    )
    study = Study(plan.paths, spec, name=f"{plan.spec.name}/{NOTE}", trials="parent_training")
    study.enqueue({}, NOTE)
    run(study)
    (record,) = study.records()
    if record.state != "complete" or record.checkpoint is None:
        raise SearchError(f"the parent could not be trained: {record.reason}")
    return plan.paths.folder / record.checkpoint


def _pin(source: Path, folder: Path) -> None:
    """Copy a checkpoint, seal it, and give it its name last of all."""
    copy = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("state.pt", durable.MANIFEST))
    durable.seal(copy)
    durable.write_json(folder.with_name("parent.json"), {"source": str(source), "sha256": durable.seal_of(copy)})
    copy.rename(folder)


def _scan(workload_name: str, values: Mapping[str, Any], searched: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Look at the parent. Runs in a Ray worker."""
    module = workload.load(workload_name)
    config = configuration.build(module.Config, values)
    found: dict[str, Any] = module.scan(config, searched, Path(folder))
    return found


def _uninherited(module: ModuleType) -> tuple[str, ...]:
    """Return how the names of what a parent is trained without begin."""
    return tuple(f"{part}." for part in getattr(module, "UNINHERITED", ()))


def _is_number(parameter: Parameter) -> bool:
    return parameter.low is not None


def _range(parameter: Parameter) -> tuple[float, float]:
    assert parameter.low is not None and parameter.high is not None
    return parameter.low, parameter.high
