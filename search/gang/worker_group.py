"""One Ray Train worker group, run from the process and in the placement group of the trial that drives it.

Ray Train would start more beside the workers: a process for the controller, one that joins their reports, one for data
sets, one that cleans up placement groups, and a placement group of its own inside the trial's. Here the controller runs
in a thread of the trial's process, and the workers take the places that Ray Tune holds for the trial. So a gang costs
one small process, nothing can wait for itself, and nothing is left when the trial's process is killed. Neither
`ray.train.report` nor Ray Data is used, so that nothing is missed.

Written against Ray 2.60: what begins with an underscore there may change with the next release.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

# Read when Ray Train is imported or its controller is made.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")

import ray
from ray.exceptions import RayError
from ray.train import BackendConfig, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state
from ray.train.v2._internal.execution.worker_group import worker_group as train_worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from search.errors import OUT_OF_MEMORY
from search.ray_token import is_loopback

JOIN_S = 1800
ASK_S = 5.0
"""How long Ray may take to say why a worker is gone."""
FAILED_STARTS = 3
"""Starts of a group in a row that may fail before it is given up."""


class TrainGroup:
    """The group of workers that run one function until it returns; those that die are replaced.

    Args:
        function: runs in each worker, called with `options`.
        options: plain data for the function.
        workers: how many.
        resources: what each of them gets: CPU, GPU.
        folder: where Ray Train may write; every worker's machine has to see it.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], None],
        options: Mapping[str, Any],
        workers: int,
        resources: Mapping[str, float],
        folder: str,
    ) -> None:
        _leave_out_barriers()
        self._policy = _Policy()
        self._trainer = _Trainer(
            function,
            train_loop_config=dict(options),
            backend_config=TorchGroup(),
            scaling_config=ScalingConfig(
                num_workers=workers, resources_per_worker=dict(resources), use_gpu=resources.get("GPU", 0) > 0
            ),
            run_config=RunConfig(name="gang", storage_path=folder),
        )
        self._trainer.policy = self._policy
        self.error: BaseException | None = None
        self._workers: list[Any] = []
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)
        self._thread.start()

    def is_up(self) -> bool:
        """Return whether the group works, starts or starts again; else `error` says why not."""
        return self._thread.is_alive()

    def works(self) -> None:
        """Take note that all workers are there: failures from here on are counted anew."""
        self._policy.failures = 0
        controller = self._trainer.controller
        group = controller.get_worker_group() if controller is not None else None
        # Kept, since Ray Train lets go of a group as soon as one of its workers is gone.
        self._workers = list(group.get_workers()) if group is not None and group.has_started() else []

    def kill(self) -> None:
        """End all workers now, whatever they wait for; new ones are started."""
        for worker in self._workers:
            ray.kill(worker.actor)

    def ran_out_of_memory(self) -> bool:
        """Return whether Ray has killed one of the workers because its machine was running low on memory.

        All are asked: whose death is heard of first may have been ended by Ray Train, for another one's sake.
        """
        answers = [worker.actor.__ray_ready__.remote() for worker in self._workers]
        ready = ray.wait(answers, num_returns=len(answers), timeout=ASK_S)[0] if answers else []
        return any(OUT_OF_MEMORY in _why_gone(answer) for answer in ready)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the group, once its function has returned."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # whoever waits for the workers reads it
            self.error = error


def _why_gone(answer: Any) -> str:
    """Return what Ray says of a worker that does not answer; "" of one that does."""
    try:
        ray.get(answer)
    except RayError as error:
        return str(error)
    return ""


class TorchGroup(BackendConfig):
    """Has the workers form a group of torch.distributed, as TorchConfig does, without torch in the controller."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what forms the group."""
        return _TorchBackend


class _TorchBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        kind = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        ray.get([worker_group.execute_single_async(i, join, i, size, address, port, kind) for i in range(size)])


def join(rank: int, world: int, address: str, port: int, kind: str) -> None:
    """Join the group of torch.distributed; runs in the worker."""
    from ray.train import torch as ray_torch
    from ray.train.torch import config

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    config._set_torch_distributed_env_vars()  # type: ignore[no-untyped-call]
    # All GPUs that the group has on this machine are visible to each of its workers: theirs is the one of this number.
    os.environ["LOCAL_RANK"] = str(ray_torch.get_device().index or 0)
    if not is_loopback(address):
        config._setup_torch_process_group(kind, rank, world, "env://")
        return
    # Left alone, the group's store listens on all addresses of this machine, and its members on that of its name.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    options: dict[str, Any] = {"timeout": timedelta(seconds=JOIN_S)}
    distributed: Any = config.dist  # type: ignore[attr-defined]
    store = distributed.TCPStore(address, port, world, rank == 0, **options, **_own_socket(address, port, rank))
    distributed.init_process_group(kind, store=store, rank=rank, world_size=world, **options)


def _own_socket(address: str, port: int, rank: int) -> dict[str, int]:
    """Return, for rank 0, the socket that its store listens on, which the store closes."""
    if rank:
        return {}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        return {"master_listen_fd": listener.detach()}


class _Policy(FailurePolicy):
    """Start again after every failure, unless several starts in a row have failed."""

    def __init__(self) -> None:
        self.failures = 0

    def make_decision(self, training_failed_error: Any) -> Any:
        self.failures += 1
        return FailureDecision.RAISE if self.failures > FAILED_STARTS else FailureDecision.RETRY


class _Placed(FixedScalingPolicy):
    """Asks the cluster for nothing: Ray Tune has."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Do nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Do nothing."""


class _OthersPlaces(DefaultPlacementGroupHandle):
    def shutdown(self) -> None:
        """Do nothing: whoever made the placement group removes it."""


class _WorkerGroup(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        places = ray.util.get_current_placement_group()
        if places is None:
            return super()._create_placement_group(scaling_config, worker_group_context)
        return _OthersPlaces(places)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _Trainer(DataParallelTrainer):
    controller: _Controller | None = None
    policy: _Policy
    scaling_config: Any

    def _create_default_callbacks(self) -> list[Any]:
        return [
            AcceleratorSetupCallback(self.backend_config, self.scaling_config),
            BackendSetupCallback(self.backend_config),
        ]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments.update(scaling_policy=_Placed(self.scaling_config), failure_policy=self.policy)
        self.controller = _Controller(**arguments)
        asyncio.run(self.controller.run())  # type: ignore[no-untyped-call]
        return self.controller.get_result()


class _NoBarrier:
    """Stands for the actor that joins the reports of ranks, a process of 120 MiB, where nobody calls for it."""

    def options(self, **options: Any) -> _NoBarrier:
        return self

    def remote(self, **arguments: Any) -> _NoBarrier:
        return self


def _leave_out_barriers() -> None:
    module: Any = train_worker_group
    module.SynchronizationActor = _NoBarrier()
    module = state
    module._shutdown_sync_actor = lambda actor: None
