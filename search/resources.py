"""The arithmetic of what fits: slots, CPUs and GPUs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from search.errors import SpecError
from search.spec import Evaluation, Resources, SearchSpec


@dataclass(frozen=True)
class Room:
    """What a machine or cluster has."""

    cpus: float
    gpus: float
    where: str
    grows: bool = False
    """Whether more may come: machines may join a cluster."""
    autoscales: bool = False
    """Whether more comes when it is asked for."""
    nodes: tuple[tuple[float, float], ...] = ()
    """CPUs and GPUs of each machine; a worker has to fit on one. Empty: one machine has all of it."""
    most: tuple[float, float] | None = None
    """CPUs and GPUs that a growing cluster can have at the most, where that is known."""


def resolved(spec: SearchSpec, room: Room) -> SearchSpec:
    """Return the spec with a number of GPUs wherever it says auto."""
    there = 1.0 if room.gpus or (room.most and room.most[1]) else 0.0
    workers, evaluation = spec.resources, spec.evaluation
    if workers.gpus_per_worker == "auto":
        workers = dataclasses.replace(workers, gpus_per_worker=there)
    if evaluation.gpus == "auto":
        evaluation = dataclasses.replace(evaluation, gpus=there)
    return dataclasses.replace(spec, resources=workers, evaluation=evaluation)


def notes(spec: SearchSpec, room: Room) -> list[str]:
    """Return what to mind about a spec as it was written, on a cluster that does not say what may come."""
    if room.most is not None or not room.autoscales:
        return []
    found = []
    if spec.resources.slots == "auto":
        found.append(
            f"resources.slots: auto is what {room.where} has room for, and it does not say what may come; "
            "write how many (`python -m cluster fit SPACE FILE` tells), or set TUNE_CLUSTER_MOST on its head"
        )
    if spec.resources.gpus_per_worker == "auto" and not room.gpus:
        found.append(
            f"resources.gpus_per_worker: auto is none, since {room.where} has no GPU and does not say what may come; "
            "write 1 to ask for them"
        )
    return found


def worker(resources: Resources) -> dict[str, float]:
    """Return what a worker takes, in Ray's words; of a resolved spec."""
    return {"CPU": resources.cpus_per_worker, "GPU": float(resources.gpus_per_worker)}


def is_gang(resources: Resources) -> bool:
    """Return whether trials run in a gang of workers, not in a slot."""
    return resources.workers > 1 or resources.strategy == "deepspeed"


def each(resources: Resources) -> str:
    """Return what a trial gets, in words."""
    one = "({CPU:g} CPU, {GPU:g} GPU)".format(**worker(resources))
    return f"{resources.workers} workers x {one}" if is_gang(resources) else one


def slots(resources: Resources, room: Room) -> int:
    """Return how many trials run at the same time.

    Raises:
        SpecError: if not even one fits, or more are asked for than ever fit, with the arithmetic.
    """
    held = sum(places(resources, node) for node in room.nodes or ((room.cpus, room.gpus),))
    wanted = 1 if resources.slots == "auto" else resources.slots
    if held < wanted * resources.workers and not room.grows:
        raise SpecError(_does_not_fit(resources, wanted, (room.cpus, room.gpus), room.where, held))
    if room.most is not None:
        held = max(held, places(resources, room.most))
        if held < wanted * resources.workers:
            where = f"{room.where.removesuffix(' at present')} at its largest"
            raise SpecError(_does_not_fit(resources, wanted, room.most, where, held))
    return max(1, held // resources.workers) if resources.slots == "auto" else wanted


def places(resources: Resources, free: tuple[float, float]) -> int:
    """Return how many workers find room in so many CPUs and GPUs."""
    held = math.floor(free[0] / resources.cpus_per_worker + 1e-9)
    if gpus := worker(resources)["GPU"]:
        held = min(held, math.floor(free[1] / gpus + 1e-9))
    return held


def _does_not_fit(resources: Resources, wanted: int, has: tuple[float, float], where: str, places: int) -> str:
    workers = wanted * resources.workers
    needed = f"{workers * resources.cpus_per_worker:g} CPU, {workers * worker(resources)['GPU']:g} GPU"
    lower = "resources.workers" if resources.workers > 1 else "resources.slots"
    apart = f", room for {places} workers of {workers}" if resources.workers > 1 else ""
    return (
        f"resources: {wanted} slots x {each(resources)} = {needed}, "
        f"but {where} has {has[0]:g} CPU, {has[1]:g} GPU{apart}; "
        f"lower {lower} or what each {'worker' if resources.workers > 1 else 'slot'} gets"
    )


def check_evaluation(evaluation: Evaluation, room: Room) -> None:
    """Refuse an evaluation that cannot be run.

    Raises:
        SpecError: if it asks for more than there is.
    """
    if evaluation.run_as == "jobs" and not room.grows:
        raise SpecError(f"evaluation.run_as: {room.where} takes no jobs; write tasks, or name a cluster by RAY_ADDRESS")
    gpus = float(evaluation.gpus)
    if (evaluation.cpus > room.cpus or gpus > room.gpus) and not room.grows:
        raise SpecError(
            f"evaluation: one job takes {evaluation.cpus:g} CPU, {gpus:g} GPU, but {room.where} has "
            f"{room.cpus:g} CPU, {room.gpus:g} GPU; lower evaluation.cpus or evaluation.gpus"
        )
