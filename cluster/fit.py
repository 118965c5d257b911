"""How much of a search a cluster holds: at the start, at the most, and what it never will."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster import kuberay, launcher, slurm
from cluster.files import ClusterFile, flag, listing, mapping, whole
from search import growth, resources
from search.errors import BadInput, SpecError
from search.resources import Room
from search.spec import Resources, SearchSpec


@dataclass(frozen=True)
class NodeGroup:
    """Nodes alike."""

    name: str
    cpus: float
    gpus: float
    least: int
    most: int

    @property
    def size(self) -> tuple[float, float]:
        """CPUs and GPUs of one node."""
        return self.cpus, self.gpus

    @property
    def has(self) -> str:
        """Return the same in words."""
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU"


def groups(file: ClusterFile) -> tuple[list[NodeGroup], int]:
    """Return the nodes that trials may run on, and how many there are at the most in all.

    Raises:
        BadInput: if the file does not say what its nodes have.
    """
    return {"cloud": _cloud, "hosts": _hosts, "kuberay": _kuberay, "slurm": _slurm}[file.kind](file)


def largest(file: ClusterFile) -> tuple[float, float]:
    """Return the CPUs and GPUs of the largest cluster that a file allows.

    Raises:
        BadInput: if the file does not say what its nodes have.
    """
    found, most = groups(file)
    return growth.largest([(*group.size, group.most) for group in found], most)


def text(spec: SearchSpec, file: ClusterFile) -> str:
    """Return how a search fits a cluster, for a person.

    Raises:
        SpecError: if not one trial ever fits, or fewer than the search asks for, with the arithmetic.
    """
    found, cap = groups(file)
    most = _at_the_most(spec, found, cap)
    spec = resources.resolved(spec, _room(f"{file.path} at its largest", most))
    asked = dataclasses.replace(spec.resources, slots="auto")
    _check_a_worker_fits(asked, found, file)
    at_most = resources.slots(asked, _room(f"{file.path} at its largest", most))
    resources.slots(spec.resources, _room(f"{file.path} at its largest", most))  # no more than fit are asked for
    start = [group for group in found for _ in range(group.least)]
    kind = "gang" if resources.is_gang(asked) else "slot"
    lines = [
        f"{spec.name} on {file.path}",
        f"a trial: {resources.each(asked)}",
        *(f"a node {group.name}: {group.has}, {_held(asked, group)}" for group in found),
        f"at the start: {_amount(_count(asked, start), kind)} on {_nodes(start)}",
        f"at the most: {_amount(at_most, kind)} on {_nodes(most)}",
    ]
    if spec.resources.slots != "auto":
        lines.append(f"asked for: {_amount(int(spec.resources.slots), kind)}")
    return "\n".join([*lines, *_never(spec, asked, found)])


def _check_a_worker_fits(asked: Resources, found: Sequence[NodeGroup], file: ClusterFile) -> None:
    usable = [group for group in found if group.most]
    if any(resources.places(asked, group.size) for group in usable):
        return
    largest = "; ".join(f"{group.name} has {group.has}" for group in usable) or "there is none"
    raise SpecError(
        f"resources: a worker takes {_worker(asked)} and has to fit one node, but of {file.path} {largest}; "
        "lower resources.cpus_per_worker or resources.gpus_per_worker, or take larger nodes"
    )


def _never(spec: SearchSpec, asked: Resources, found: Sequence[NodeGroup]) -> list[str]:
    lines = [
        f"never: a worker on {group.name}: it takes {_worker(asked)} of {group.has}"
        for group in found
        if not resources.places(asked, group.size)
    ]
    job = spec.evaluation
    if not any(job.cpus <= group.cpus and float(job.gpus) <= group.gpus for group in found if group.most):
        lines.append(
            f"never: an evaluation job: it takes {job.cpus:g} CPU, {float(job.gpus):g} GPU on one node; "
            "lower evaluation.cpus or evaluation.gpus"
        )
    return lines


def _at_the_most(spec: SearchSpec, found: Sequence[NodeGroup], cap: int) -> list[NodeGroup]:
    """Return the nodes of the cluster at its largest, of what is of use; under the cap what holds most workers."""
    there = _room("", [group for group in found if group.most])
    asked = resources.resolved(spec, there).resources
    first = sorted(found, key=lambda group: resources.places(asked, group.size), reverse=True)
    kept = {group.name: group.least for group in found}
    left = cap - sum(kept.values())
    for group in (each for each in first if resources.places(asked, each.size)):
        more = max(0, min(group.most - group.least, left))
        kept[group.name] += more
        left -= more
    return [group for group in found for _ in range(kept[group.name])]


def _room(where: str, nodes: Sequence[NodeGroup]) -> Room:
    cpus, gpus = sum(group.cpus for group in nodes), sum(group.gpus for group in nodes)
    return Room(cpus, gpus, where, nodes=tuple(group.size for group in nodes))


def _count(asked: Resources, nodes: Sequence[NodeGroup]) -> int:
    return sum(resources.places(asked, group.size) for group in nodes) // asked.workers


def _held(asked: Resources, group: NodeGroup) -> str:
    held = resources.places(asked, group.size)
    left_cpus = group.cpus - held * asked.cpus_per_worker
    left_gpus = group.gpus - held * float(asked.gpus_per_worker)
    idle = f", {left_cpus:g} CPU, {left_gpus:g} GPU left over" if left_cpus or left_gpus else ""
    nodes = str(group.most) if group.least == group.most else f"{group.least} to {group.most}"
    return f"{_amount(held, 'worker')}{idle}; {nodes} of them"


def _worker(asked: Resources) -> str:
    return "{CPU:g} CPU, {GPU:g} GPU".format(**resources.worker(asked))


def _amount(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _nodes(nodes: Sequence[NodeGroup]) -> str:
    names = dict.fromkeys(group.name for group in nodes)
    each = ", ".join(f"{sum(group.name == name for group in nodes)} {name}" for name in names)
    return f"{_amount(len(nodes), 'node')}{f' ({each})' if each else ''}"


def _cloud(file: ClusterFile) -> tuple[list[NodeGroup], int]:
    cap = whole(file.content.get("max_workers"), 2)
    found = []
    for name, each in launcher.node_types(file).items():
        if name != file.content.get("head_node_type"):
            least, most = whole(each.get("min_workers")), whole(each.get("max_workers"), cap)
            found.append(NodeGroup(name, *_amounts(each.get("resources")), least, min(most, cap)))
    return found, cap


def _amounts(given: Any) -> tuple[float, float]:
    has = mapping(given)
    return float(whole(has.get("CPU"))), float(whole(has.get("GPU")))


def _hosts(file: ClusterFile) -> tuple[list[NodeGroup], int]:
    words = launcher.start_words(file, "worker_start_ray_commands")
    cpus, gpus = flag(words, "--num-cpus"), flag(words, "--num-gpus")
    if cpus is None or gpus is None:
        raise BadInput(
            f"{file.path}: worker_start_ray_commands: does not say what a host has; add --num-cpus=N --num-gpus=N"
        )
    listed = len(listing(mapping(file.content.get("provider")).get("worker_ips")))
    least, most = (min(whole(file.content.get(key), listed), listed) for key in ("min_workers", "max_workers"))
    return [NodeGroup("host", float(whole(cpus)), float(whole(gpus)), least, most)], most


def _kuberay(file: ClusterFile) -> tuple[list[NodeGroup], int]:
    grows = file.ray.get("enableInTreeAutoscaling") is True
    found = []
    for key, each in kuberay.worker_groups(file).items():
        hosts = whole(each.get("numOfHosts"), 1)
        least = whole(each.get("minReplicas"))
        now = max(least, whole(each.get("replicas"), least)) * hosts
        most = whole(each.get("maxReplicas")) * hosts if grows else now
        found.append(NodeGroup(str(each.get("groupName", key)), *kuberay.amounts(each), now, most))
    return found, sum(group.most for group in found)


def _slurm(file: ClusterFile) -> tuple[list[NodeGroup], int]:
    nodes = slurm.nodes(file)
    return [NodeGroup("node", float(slurm.cpus(file)), float(slurm.gpus(file)), nodes, nodes)], nodes
