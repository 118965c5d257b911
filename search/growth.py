"""How far the cluster can grow that this process is connected to: Ray's API does not tell, but its head has been told.

On the head two things are looked at, in this order: the variable TUNE_CLUSTER_MOST, such as `96 CPU, 12 GPU`, for
KubeRay, whose file stays outside; and the file that Ray's autoscaler was started with, as `ray up` does.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import configuration
from search.errors import BadInput

VARIABLE = "TUNE_CLUSTER_MOST"
KEPT_S = 60.0
"""How long an answer is taken for granted: the owner may raise the limits."""
ASK_S = 60.0
"""How long the head may take to answer."""
HEAD = "node:__internal_head__"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """What may come."""

    autoscales: bool = False
    """Whether machines come when they are asked for."""
    most: tuple[float, float] | None = None
    """CPUs and GPUs for trials when the cluster is at its largest; None where nobody says."""


def now() -> Growth:
    """Return how far the cluster can grow that this process is connected to."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return _asked(address.rpartition(":")[2], int(time.monotonic() // KEPT_S))


def told(port: str, environment: Mapping[str, str]) -> Growth:
    """Return what this machine knows, the head of the cluster whose store has this port.

    Raises:
        BadInput: if that cannot be read.
    """
    if amounts := environment.get(VARIABLE):
        return Growth(True, read(amounts))
    if file := _autoscaler_file(port):
        return Growth(True, _of_file(file))
    return Growth("RAY_USAGE_STATS_KUBERAY_IN_USE" in environment)


def read(amounts: str) -> tuple[float, float]:
    """Return the CPUs and GPUs that a value of TUNE_CLUSTER_MOST says.

    Raises:
        BadInput: if it says none.
    """
    found = re.fullmatch(r"\s*(\d+) CPU(?:, (\d+) GPU)?\s*", amounts)
    if not found:
        raise BadInput(f"{VARIABLE}: got {amounts!r}; write such as 96 CPU, 12 GPU")
    return float(found[1]), float(found[2] or 0)


def written(most: tuple[float, float]) -> str:
    """Return a value of TUNE_CLUSTER_MOST."""
    return f"{most[0]:g} CPU, {most[1]:g} GPU"


@functools.lru_cache(maxsize=1)
def _asked(port: str, _period: int) -> Growth:
    import ray
    from ray.exceptions import RayError

    try:
        if _is_head():
            return told(port, os.environ)
        ask = ray.remote(_told_here).options(num_cpus=0, resources={HEAD: 0.001})
        found: Growth = ray.get(ask.remote(port), timeout=ASK_S)
        return found
    except (ValueError, TypeError, LookupError, OSError, RayError) as error:
        logger.warning("how far the cluster can grow is not known: %s", error)
        return Growth(autoscales=True)


def _told_here(port: str) -> Growth:
    return told(port, os.environ)


def _is_head() -> bool:
    import ray

    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and HEAD in node["Resources"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def _autoscaler_file(port: str) -> Path | None:
    """Return the file that the autoscaler of this cluster works by."""
    import psutil

    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        ours = any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)
        files = [word.removeprefix(option) for word in words if word.startswith(option)]
        if ours and files:
            return Path(files[0]).expanduser()
    return None


def largest(groups: Iterable[tuple[float, float, int]], most: int) -> tuple[float, float]:
    """Return the CPUs and GPUs of the largest cluster there can be: of what has GPUs before what has none.

    Args:
        groups: CPUs, GPUs and the largest number of machines that are alike.
        most: how many machines there can be in all.
    """
    cpus, gpus = 0.0, 0.0
    for each_cpus, each_gpus, count in sorted(groups, key=lambda group: (group[1], group[0]), reverse=True):
        taken = min(count, most)
        cpus, gpus, most = cpus + taken * each_cpus, gpus + taken * each_gpus, most - taken
    return cpus, gpus


def _of_file(path: Path) -> tuple[float, float] | None:
    """Return what the launcher's file says, with what it has filled in; None where machines are hosts of a list."""
    content = configuration.read_yaml(path)
    most = int(content["max_workers"])
    kinds = [kind for name, kind in content["available_node_types"].items() if name != content["head_node_type"]]
    if not all(kind.get("resources") for kind in kinds):
        return None
    has = [(kind["resources"], kind.get("max_workers", most)) for kind in kinds]
    return largest([(float(each.get("CPU", 0)), float(each.get("GPU", 0)), count) for each, count in has], most)
