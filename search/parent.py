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
from typing import TYPE_CHECKING, Any

import ray

import configuration
import durable
from search import samplers, space, spec_file, workload
from search.errors import DiskError, SearchError, SpecError, StudyError, disk_error, is_disk
from search.evaluation import Candidate
from search.record import StudyPaths
from search.results import comparison
from search.spec import Resources, SearchSpec, Stopping
from search.storage.store import Store
from search.study import Study

if TYPE_CHECKING:
    from search.planning import Plan
    from search.storage.database import Database

NOTE = "parent"
SCAN_NOTE = "sensitivity"


def inherit(plan: Plan, run: Callable[[Study], None], database: Database | None = None) -> Plan:
    """Return the plan in which every trial starts from the pinned parent; the plan itself where there is none.

    Args:
        plan: of the search; its study is held by this process.
        run: carries a study to its end, for a parent that is still to be trained.
        database: has the record of that study, where a journal has not.
    Raises:
        SpecError: if there is no such parent.
        StudyError: if the pinned one is damaged.
        SearchError: if its training failed.
    """
    if not plan.spec.parent.wanted:
        return plan
    store = plan.paths.store
    if (sha256 := _pinned(plan.paths)) is None:
        source = _source(plan.spec) or _trained(plan, run, database)
        shutil.rmtree(plan.paths.parent, ignore_errors=True)
        sha256 = _pin(source, plan.paths.parent)
        store.push(plan.paths.parent)
        store.push(plan.paths.pinned)
    fixed = {**plan.spec.fixed, "parent": str(plan.paths.parent.absolute()), "parent_sha256": sha256}
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, fixed=fixed))


def known(spec: SearchSpec, paths: StudyPaths) -> Path | None:
    """Return the parent's checkpoint; None: there is none, or it is still to be trained. Raises as `inherit`."""
    if not spec.parent.wanted:
        return None
    return paths.parent if _pinned(paths) else _source(spec)


def scan(plan: Plan, start: Callable[[], None]) -> dict[str, Any] | None:
    """Return how far the parent can be pruned, looked at once; None where nobody asks, or the workload cannot tell.

    Args:
        plan: from `inherit`.
        start: brings Ray up.
    Raises:
        SearchError: if it failed.
        DiskError: if the disk is full.
    """
    module = workload.load(plan.spec.workload)
    if not (plan.spec.parent.wanted and plan.spec.parent.scan and hasattr(module, "scan")):
        return None
    if not plan.paths.scan.is_file():
        start()
        cpus, gpus = _alone(plan).cpus_per_worker, float(plan.spec.resources.gpus_per_worker)
        job = ray.remote(_scan).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
        values, folder = spec_file.fixed_values(plan.spec), str(plan.paths.scan.parent.absolute())
        parts = tuple(f"{part}." for part in workload.uninherited_by(module))
        searched = {
            parameter.name: (parameter.low, parameter.high)
            for parameter in plan.spec.parameters
            if parameter.low is not None and parameter.name.startswith(parts)
        }
        try:
            found = ray.get(job.remote(plan.spec.workload, values, searched, folder, plan.paths.store.uri))
        except DiskError:
            raise
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            raise SearchError(
                f"the scan of the parent failed: {type(cause).__name__}: {cause}; "
                "the same command tries again, and with --set parent.scan=false it goes on without"
            ) from error
        plan.paths.store.pull(plan.paths.scan.parent)
        plan.paths.store.push(durable.write_json(plan.paths.scan, found))
    return durable.read_json(plan.paths.scan)


def enqueue(study: Study, spec: SearchSpec, found: Mapping[str, Any] | None) -> None:
    """Have a search begin with the points that a scan proposes, as many as it has trials for besides the first.

    Those that constraints refuse are left out, and nothing keeps these trials from being stopped.
    """
    if found is None or samplers.choose(spec)[0] == "grid":
        return
    by_name = {parameter.name: parameter for parameter in spec.parameters}
    for number, point in enumerate(found["points"][: spec.search.trials - 1], start=1):
        values = {name: space.nearest(by_name[name], value) for name, value in point.items()}
        study.enqueue(values, f"{SCAN_NOTE} {number}", protected=False)


def candidates(plan: Plan) -> list[Candidate]:
    """Return the parent as what is evaluated beside the promoted; none where there is none."""
    sha256 = durable.seal_of(plan.paths.parent) if plan.spec.parent.wanted else None
    return [Candidate(comparison.PARENT, -1, plan.paths.parent.name, sha256, 0, 0.0)] if sha256 else []


def _pinned(paths: StudyPaths) -> str | None:
    """Return the hash of the pinned parent, every file of it read; None: none has been pinned yet.

    Raises:
        StudyError: if it is not what was pinned.
    """
    if not (paths.parent.is_dir() or paths.pinned.is_file()):
        return None
    if paths.store and not paths.pinned.is_file():
        return None  # whoever pinned it was killed before all of it was in the store
    sha256 = durable.sealed(paths.parent)
    recorded = durable.read_json(paths.pinned)["sha256"] if paths.pinned.is_file() else sha256
    if sha256 is None or sha256 != recorded:
        state = "damaged since it was pinned" if paths.parent.is_dir() else "gone"
        raise StudyError(f"{paths.parent}: {state}; put it back, or start a study of its own with --study NAME")
    return sha256


def _source(spec: SearchSpec) -> Path | None:
    """Return the checkpoint that the parent is a copy of; None: it is still to be trained."""
    wanted = spec.parent
    if wanted.checkpoint is not None:
        try:
            return workload.checkpoint(Path(wanted.checkpoint))
        except ValueError as error:
            raise SpecError(f"{spec.name}.yaml: parent.checkpoint: {error}") from error
    if wanted.study is None:
        return None
    best = StudyPaths(Path(wanted.study)).model("best")
    if not best.is_dir():
        raise SpecError(
            f"{spec.name}.yaml: parent.study: {best}: no such model; "
            "name the folder of a study that has ended, such as runs/nuclei"
        )
    return best.resolve()


def _trained(plan: Plan, run: Callable[[Study], None], database: Database | None) -> Path:
    """Train the parent in a study of one trial, or find that it has been."""
    spec = dataclasses.replace(
        plan.spec,
        parameters=(),
        constraints=(),
        fixed=spec_file.parent_values(plan.spec),
        search=dataclasses.replace(
            plan.spec.search, trials=1, sampler="random", wall_time_s=None, slot_hours=None, target=None
        ),
        stopping=Stopping(rule="none"),
        resources=_alone(plan),
    )
    study = Study(plan.paths, spec, name=f"{plan.spec.name}/{NOTE}", trials="parent_training", database=database)
    study.enqueue({}, NOTE)
    run(study)
    (record,) = study.records()
    if record.state != "complete" or record.checkpoint is None:
        raise SearchError(
            f"the parent could not be trained: {record.reason}; mend parent.train or fixed, "
            "and give the search a folder of its own with --study NAME"
        )
    checkpoint = plan.paths.folder / record.checkpoint
    plan.paths.store.pull(checkpoint)
    return checkpoint


def _alone(plan: Plan) -> Resources:
    """Return what a single worker gets while no trial is beside it: the CPUs of all slots, if one machine has them."""
    given, room = plan.spec.resources, plan.room
    if given.workers > 1:
        return given
    machine = max((cpus for cpus, _ in room.nodes), default=room.cpus)
    cpus = max(given.cpus_per_worker, min(given.cpus_per_worker * plan.slots, machine))
    return dataclasses.replace(given, cpus_per_worker=cpus)


def _pin(source: Path, folder: Path) -> str:
    """Copy a checkpoint, seal it, and give it its name last of all; return its hash."""
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale)
    copy = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("state.pt", durable.MANIFEST))
    sha256 = durable.seal(copy)
    copy.rename(folder)
    durable.write_json(StudyPaths(folder.parent).pinned, {"source": str(source), "sha256": sha256})
    return sha256


def _scan(
    workload_name: str, values: Mapping[str, Any], searched: Mapping[str, Any], folder: str, uri: str | None
) -> dict[str, Any]:
    """Look at the parent. Runs in a Ray worker."""
    module = workload.load(workload_name)
    paths = StudyPaths(Path(folder).parent)
    store = Store(paths.folder, uri)
    store.pull(paths.parent)
    config = configuration.build(module.Config, values)
    try:
        found: dict[str, Any] = module.scan(config, searched, Path(folder))
        store.push(Path(folder))
    except OSError as error:
        if is_disk(error):
            raise disk_error(error, error.filename or folder) from error
        raise
    return found
