"""What runs in each worker of a gang: waits for orders, and pulls the epochs of one trial after another in lockstep.

Rank 0 keeps the trial's files as a slot does. The others pull the same generator, so that whatever the ranks do
together meets its counterpart: an epoch, and each rank's part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import configuration
from search import logs, trial, watchdog, workload
from search.errors import DiskError
from search.trial import TrialRun
from search.watchdog import Watchdog


def serve(options: dict[str, Any]) -> None:
    """Serve the gang at `address` with the secret `key` until it says quit. Ray Train calls this in every worker."""
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    with Client(tuple(options["address"]), authkey=bytes.fromhex(options["key"])) as crew:
        node = ray.get_runtime_context().get_node_id()
        send(crew, {"rank": rank, "generation": os.environ["MASTER_PORT"], "node": node})
        with contextlib.suppress(EOFError):  # the gang's process is gone, and Ray will end this one
            _serve(crew, rank)


def send(crew: Connection, message: Mapping[str, Any]) -> None:
    """Send plain data."""
    crew.send_bytes(json.dumps(message).encode())


def receive(crew: Connection) -> dict[str, Any]:
    """Wait for plain data."""
    message: dict[str, Any] = json.loads(crew.recv_bytes())
    return message


class Leader:
    """Rank 0 of a trial: keeps its files."""

    def __init__(self, order: Mapping[str, Any], saving: Callable[[Path], None]) -> None:
        self.run = TrialRun(order, saving)
        self.watchdog = Watchdog(self.run.folder / watchdog.file_of(0), fatal=False)

    def start(self) -> dict[str, Any]:
        """Return what the others need to go on from the same place."""
        if self.run.disk is not None:
            raise self.run.disk
        return {"resume": str(self.run.resume) if self.run.resume else None, "config": self.run.config}

    def step(self) -> dict[str, Any]:
        """Pull one epoch and keep it."""
        epoch, metrics, outcome = self.run.pull()
        return {"epoch": epoch, "metrics": metrics, "outcome": asdict(outcome) if outcome else None}

    def close(self) -> None:
        """Let go of the trial."""
        self.run.close()
        self.watchdog.close()


class Follower:
    """Another rank of a trial."""

    def __init__(self, number: int, order: Mapping[str, Any], resume: str | None, config: Mapping[str, Any]) -> None:
        module = workload.load(order["workload"])
        made = configuration.build(module.Config, config)
        self.epochs: Iterator[Any] = iter(module.train(made, Path(resume) if resume else None))
        self.epoch: Any = None
        self.watchdog = Watchdog(Path(order["folder"]) / watchdog.file_of(number), fatal=False)

    def step(self) -> dict[str, Any]:
        """Pull one epoch."""
        self.epoch = next(self.epochs, None)
        return {}

    def save(self, folder: Path) -> None:
        """Do this rank's part of a checkpoint."""
        self.epoch.save(folder)

    def close(self) -> None:
        """Let go of the trial."""
        self.epoch = None
        self.watchdog.close()
        if hasattr(self.epochs, "close"):
            self.epochs.close()
        gc.collect()


def _serve(crew: Connection, rank: int) -> None:
    part: Leader | Follower | None = None
    while (order := receive(crew))["do"] != "quit":
        try:
            answer: Mapping[str, Any] = {}
            if order["do"] in ("begin", "close") and part is not None:
                part.close()
                part = None
                _freeze("first trial's end")
            if order["do"] == "begin":
                part = _part(crew, rank, order)
                _freeze("first trial's start")
                answer = part.start() if isinstance(part, Leader) else {}
            elif order["do"] == "step":
                assert part is not None
                with part.watchdog.watching(order["limit_s"]):
                    answer = part.step()
            elif order["do"] == "save":
                assert isinstance(part, Follower)
                part.save(Path(order["folder"]))
            send(crew, {"did": order["do"], **answer})
        except DiskError as error:
            send(crew, {"did": order["do"], "halt": str(error)})
        except Exception as error:
            send(crew, {"did": order["do"], "error": _told(error)})


def _part(crew: Connection, rank: int, order: Mapping[str, Any]) -> Leader | Follower:
    if rank == 0:
        return Leader(order["trial"], lambda folder: send(crew, {"did": "saving", "folder": str(folder)}))
    logs.in_worker(order["trial"], rank, trial.attempts(Path(order["trial"]["folder"])) or None)
    return Follower(rank, order["trial"], order["resume"], order["config"])


@functools.cache
def _freeze(when: str) -> None:
    """Take what has been imported by now out of all later collections, once for each `when`: it stays."""
    gc.freeze()


def _told(error: Exception) -> dict[str, Any]:
    """Return an error as plain data."""
    return {
        "reason": trial.failure(error),
        "trace": traceback.format_exc(),
        "unhealthy": trial.is_unhealthy(error),
        "superseded": isinstance(error, trial.Superseded),
        "micro_batch": getattr(error, "micro_batch", None),
    }
