"""Orders to the ranks of a gang, and their answers: JSON over sockets that only who has the gang's secret can open."""

from __future__ import annotations

import contextlib
import math
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from search.errors import DiskError
from search.gang import rank
from search.gang.worker_group import TrainGroup

START_S = 600.0
"""How long a group may take to come up."""
GRACE_S = 5.0
"""How long the other ranks may work on once one has failed: they may wait for it for ever."""
HASTE_S = 1.0
"""The same where the ranks are replaced anyway. A rank that died, which made others fail, is known sooner."""
END_S = 15.0
"""How long a group may take to end before it is killed."""
DUMP_S = 1.0
"""How long ranks that hang may take to write where they stand."""
LOOK_S = 1.0
"""How often a group is looked at whose ranks say nothing."""


class RankDied(RuntimeError):
    """A rank's process is gone; new ones are on their way. `memory`: Ray killed it before its machine ran out of it."""

    def __init__(self, told: str, *, memory: bool = False) -> None:
        super().__init__(told)
        self.memory = memory


class TrialError(RuntimeError):
    """A rank cannot go on with its trial: `told` says why, as plain data."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__(told["reason"])
        self.told = told


class Hung(RuntimeError):
    """Ranks have not answered in time."""


class GangError(RuntimeError):
    """The group of workers does not come up."""


class Crew:
    """The ranks of one gang.

    Args:
        workers: how many ranks.
        resources: what each of them gets: CPU, GPU.
        address: of this machine, as the ranks' machines know it.
        folder: where Ray Train may write; every machine has to see it.
    """

    def __init__(self, workers: int, resources: Mapping[str, float], address: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix="gang-", dir=folder)
        key = secrets.token_bytes(32)
        self.workers = workers
        self._listener = Listener((address, 0), backlog=workers, authkey=key)
        self._arrivals: queue.Queue[tuple[Connection, dict[str, Any]]] = queue.Queue()
        self._ranks: dict[int, Connection] = {}
        self.nodes: set[str] = set()
        """Ids of the machines that the ranks run on."""
        threading.Thread(target=self._accept, name="arrivals", daemon=True).start()
        options = {"address": list(self._listener.address), "key": key.hex()}
        self.group = TrainGroup(rank.serve, options, workers, resources, self.folder)

    def begin(self, trial: Mapping[str, Any]) -> None:
        """Have all ranks begin a trial, from the same checkpoint; wait for ranks that are starting.

        Raises:
            RankDied: if one of them does.
            TrialError: if one of them cannot; such as stand still by then are replaced.
            DiskError: if the trial's files cannot be written for want of room.
            GangError: if the ranks do not come up.
        """
        self._muster()
        start = self._ask([0], {"do": "begin", "trial": trial})[0]
        same = {"resume": start["resume"], "config": start["config"]}
        self._ask(range(1, self.workers), {"do": "begin", "trial": trial, **same})

    def step(self, limit_s: float) -> dict[str, Any]:
        """Have all ranks pull one epoch; return what rank 0 says of it.

        Raises:
            Hung: if that takes longer than it may; the ranks are replaced.
            RankDied, TrialError, DiskError, GangError: as `begin`.
        """
        return self._ask(range(self.workers), {"do": "step", "limit_s": limit_s}, limit_s + DUMP_S)[0]

    def close_trial(self) -> None:
        """Have all ranks let go of their trial; such as cannot are replaced."""
        if self._ranks:
            with contextlib.suppress(RankDied, TrialError):
                self._ask(range(self.workers), {"do": "close"})

    def recycle(self) -> None:
        """Replace all ranks; the next trial waits for the new ones."""
        self.group.kill()
        self._disband()

    def quit(self) -> None:
        """End the group and everything that belongs to it."""
        for connection in self._ranks.values():
            with contextlib.suppress(OSError):
                rank.send(connection, {"do": "quit"})
        self.group.join(END_S if len(self._ranks) == self.workers else 0)
        self._disband()
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
                self._arrivals.put((connection, rank.receive(connection)))
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # not one of ours, or one that died at the door
            except OSError:
                return  # the listener is closed

    def _muster(self) -> None:
        """Wait until all ranks of one generation are there."""
        until = time.monotonic() + START_S
        generation = None
        while len(self._ranks) < self.workers:
            try:
                connection, hello = self._arrivals.get(timeout=0.2)
            except queue.Empty:
                if not self.group.is_up() or time.monotonic() > until:
                    raise GangError(f"its {self.workers} workers do not come up: {self.group.error}") from None
                continue
            if hello["generation"] != generation:
                self._disband()
                generation = hello["generation"]
            self._ranks[hello["rank"]] = connection
            self.nodes.add(hello["node"])
        self.group.works()

    def _disband(self) -> None:
        for connection in self._ranks.values():
            connection.close()
        self._ranks.clear()
        self.nodes.clear()

    def _ask(
        self, ranks: Iterable[int], order: Mapping[str, Any], limit_s: float = math.inf
    ) -> dict[int, dict[str, Any]]:
        """Give some ranks an order and return their answers."""
        owed = Counter(ranks)
        for number in owed:
            self._tell(number, order)
        answers: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + limit_s
        while owed.total() and (left := until - time.monotonic()) > 0:
            for number, answer in self._heard(min(left, LOOK_S)):
                if answer["did"] == "saving":
                    for other in range(1, self.workers):
                        self._tell(other, {"do": "save", "folder": answer["folder"]})
                        owed[other] += 1
                    continue
                owed[number] -= 1
                answers[number] = answer
                if "error" in answer or "halt" in answer:
                    grace = HASTE_S if answer.get("error", {}).get("unhealthy") else GRACE_S
                    until = min(until, time.monotonic() + grace)
        self._refuse(answers, stuck=owed.total() > 0)
        if owed.total():
            raise Hung(f"no answer from rank {', '.join(map(str, sorted(+owed)))} of {self.workers}")
        return answers

    def _refuse(self, answers: Mapping[int, dict[str, Any]], *, stuck: bool) -> None:
        """Raise what a rank could not do, the first that said so; replace the ranks where they cannot go on."""
        errors = [answer["error"] for answer in answers.values() if "error" in answer]
        if stuck or any(error["unhealthy"] for error in errors):
            self.recycle()
        for answer in answers.values():
            if "halt" in answer:
                raise DiskError(answer["halt"])
        if errors:
            raise TrialError(errors[0])

    def _tell(self, number: int, order: Mapping[str, Any]) -> None:
        try:
            rank.send(self._ranks[number], order)
        except OSError as error:
            raise self._died(number) from error

    def _heard(self, timeout_s: float) -> list[tuple[int, dict[str, Any]]]:
        """Return what has arrived; a rank that is not asked says nothing unless it dies."""
        numbers = {connection: number for number, connection in self._ranks.items()}
        heard = []
        for connection in wait(list(numbers), timeout_s):
            assert isinstance(connection, Connection)
            try:
                heard.append((numbers[connection], rank.receive(connection)))
            except (EOFError, OSError) as error:
                raise self._died(numbers[connection]) from error
        if not self.group.is_up():
            raise GangError(f"its workers are gone: {self.group.error}")
        if not heard and not self._arrivals.empty():
            # A machine that is gone closes no connection. Ray Train has noticed, and new ranks are at the door.
            self._disband()
            raise RankDied(f"a machine of {self.workers} ranks is gone")
        return heard

    def _died(self, number: int) -> RankDied:
        memory = self.group.ran_out_of_memory()
        self.recycle()
        return RankDied(f"rank {number} of {self.workers} died", memory=memory)
