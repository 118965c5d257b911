"""Ray for one search: the cluster that the environment names, or one of our own on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from search import growth, ray_token
from search.errors import StudyError
from search.resources import Room


def room() -> Room:
    """Return what there is to run on; connects where a cluster is named."""
    if _own():
        return Room(float(len(os.sched_getaffinity(0))), float(_gpus()), "this machine")
    _connect()
    return cluster()


def cluster() -> Room:
    """Return what the cluster has that this process is connected to."""
    import ray

    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    known = growth.now()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Room(
        *_amounts(total),
        "the cluster at present",
        grows=True,
        nodes=tuple(_amounts(node) for node in nodes),
        autoscales=known.autoscales,
        most=known.most,
    )


class RaySession:
    """Ray, started when it is first needed: a study that is complete needs none."""

    def __init__(self, room: Room) -> None:
        self.room, self._mine = room, False

    def __enter__(self) -> RaySession:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._mine:
            import ray

            ray.shutdown()

    def start(self) -> None:
        """Connect to the cluster, or start Ray on this machine; does nothing where it runs already."""
        import ray

        if ray.is_initialized():
            return
        if not _own():
            _connect()
            return
        self._mine = True
        with _own_signals(), _all_or_nothing():
            ray.init(
                "local",
                num_cpus=int(self.room.cpus),
                num_gpus=int(self.room.gpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env(),
            )


def submitted() -> bool:
    """Return whether this process is the driver of a job that `ray job submit` has started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def runtime_env() -> dict[str, Any]:
    """Return what makes processes on this machine, or on one that sees its folders, find what this one does."""
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(_python_path())}}


def _amounts(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def _own() -> bool:
    import ray

    return "RAY_ADDRESS" not in os.environ and not ray.is_initialized()


def _connect() -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not submitted():  # a job brings its own code to every machine; else all of them see this one's folders
        options["runtime_env"] = runtime_env()
    given = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if not ray.is_initialized():
            ray_token.refuse_open(_address())
        with _own_signals():
            ray.init(given, ignore_reinit_error=True, **options)
    except (ray.exceptions.AuthenticationError, ConnectionError) as error:
        # Ray takes a refusal for a cluster that is not there.
        refused = isinstance(error, ray.exceptions.AuthenticationError) or ray_token.answer(given) == "guarded"
        if refused:
            problem = "the cluster wants its token and got none or another; put it into ~/.ray/auth_token, "
            problem += "RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names"
        else:
            problem = f"no cluster answers there ({error}); name its HOST:PORT, or leave RAY_ADDRESS out to search here"
        raise StudyError(f"RAY_ADDRESS={given}: {problem}") from error


def _address() -> str:
    """Return HOST:PORT of the cluster that the environment names, `auto` looked up."""
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given != "auto":
        return given
    from ray._private import services

    return services.canonicalize_bootstrap_address_or_die(given)


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[None]:
    """End what this process has started where it is broken off: Ray's agents outlive the raylet by a while."""
    import psutil

    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    except BaseException:
        for process in set(psutil.Process().children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raise


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray puts an exit of its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(before):  # it came while Ray's exit was in place
            before(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _gpus() -> int:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def _python_path() -> list[str]:
    """Return where slots find this project and a user's own workload: as this process does."""
    here = str(Path(__file__).resolve().parent.parent)
    known = [path for path in sys.path if path and "site-packages" not in path and not path.startswith(sys.base_prefix)]
    return list(dict.fromkeys([here, str(Path.cwd()), *known]))
