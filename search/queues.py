"""Several searches on one cluster: named queues with shares, and how many trials each search may run at once.

Every driver tells a small actor on the head what it wants, and is told what it may have. Nothing is taken from a trial
that runs: a search that is to have less starts no other until it has.

    share of a queue      its weight beside the other queues that want something; all of a queue's searches have equal
                          parts of it; what a queue or a search does not want flows to the others
    the shares' file      named by TUNE_QUEUES where the cluster's head is started: `vision: 3`, a line for each queue;
                          without it all queues have equal shares
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import configuration
from search import logs
from search.errors import SpecError
from search.resources import Room, worker
from search.spec import Resources

logger = logging.getLogger(__name__)

VARIABLE = "TUNE_QUEUES"
DEFAULT = "default"
ACTOR, NAMESPACE = "queues", "segmentation-search"
BEAT_S = 2.0
"""How often a search says what it wants."""
FORGET_S = 20.0
"""A search that has said nothing for so long has ended."""
PATIENCE_S = 30.0
"""How long the actor may take to come up."""
SAY_S = 60.0
"""How often a search that waits for its first slot says so."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one search wants of the cluster."""

    study: str
    """Its folder, which no other search has."""
    queue: str
    wanted: int
    """Trials that it would run at once, had it the cluster to itself."""
    cpus: float
    """Of one slot, all its workers together."""
    gpus: float
    since: float
    """When it came, in seconds since 1970: the first has its first slot first."""


def allot(claims: Iterable[Claim], shares: Mapping[str, float], room: Room) -> dict[str, int]:
    """Return how many slots each search may have: weighted max-min fairness over queues, and over searches in each.

    Every search has one slot before any has two, those that came first before the others. Then slots go one by one to
    the queue that has least for its share, and in it to the search that has least. What counts is the part of the
    cluster's CPUs or GPUs that is taken, whichever is larger. A search whose next slot finds no room is passed over.
    """
    order = sorted(claims, key=lambda claim: (claim.since, claim.study))
    has = dict.fromkeys((claim.study for claim in order), 0)
    taken = dict.fromkeys((claim.queue for claim in order), 0.0)
    part = {claim.study: _part(claim, room) for claim in order}
    cpus, gpus = _whole(room)
    hungry = order

    def turn_of(claim: Claim) -> tuple[bool, float, float]:
        if not has[claim.study]:
            return False, 0.0, 0.0
        return True, taken[claim.queue] / shares.get(claim.queue, 1.0), has[claim.study] * part[claim.study]

    while hungry := [claim for claim in hungry if has[claim.study] < claim.wanted and _fits(claim, cpus, gpus)]:
        claim = min(hungry, key=turn_of)  # of equals the first that came
        has[claim.study] += 1
        taken[claim.queue] += part[claim.study]
        cpus, gpus = cpus - claim.cpus, gpus - claim.gpus
    return has


def _fits(claim: Claim, cpus: float, gpus: float) -> bool:
    rounding = 1e-9
    return claim.cpus <= cpus + rounding and claim.gpus <= gpus + rounding


def _part(claim: Claim, room: Room) -> float:
    cpus, gpus = _whole(room)
    return max(claim.cpus / cpus if cpus else 0.0, claim.gpus / gpus if gpus else 0.0)


def _whole(room: Room) -> tuple[float, float]:
    """Return the CPUs and GPUs of a cluster at its largest; no end of them where it grows and nobody says how far."""
    most = room.most or ((math.inf, math.inf) if room.autoscales else (0.0, 0.0))
    return max(room.cpus, most[0]), max(room.gpus, most[1])


def read_shares(path: Path) -> dict[str, float]:
    """Return the share of each queue in a file of the cluster's owner.

    Raises:
        SpecError: naming the file, the queue and what is wrong.
    """
    try:
        content = configuration.read_yaml(path)
    except (OSError, configuration.YamlError) as error:
        wanted = f"{VARIABLE} names a file with a line for each queue"
        raise SpecError(f"{path}: cannot be read ({error}); {wanted}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: got {type(content).__name__}; expected a line for each queue, such as `vision: 3`")
    for name, share in content.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            raise SpecError(f"{path}: {name}: got {share!r}; expected a share, a number above 0")
    return {DEFAULT: 1.0, **{str(name): float(share) for name, share in content.items()}}


class Broker:
    """Knows who wants what. One actor a cluster, on its head; searches that say nothing more are forgotten.

    Args:
        shares: file of the shares; None: all queues are equal.
    """

    def __init__(self, shares: str | None = None) -> None:
        self._file = Path(shares) if shares else None
        self._read_at, self._shares = 0, {DEFAULT: 1.0}
        self._claims: dict[str, Claim] = {}
        self._heard: dict[str, float] = {}

    def ask(self, claim: Mapping[str, Any]) -> dict[str, Any]:
        """Take what a search wants; return how many `slots` it may have and how many `searches` there are.

        Or `error`, in words, where its queue does not exist.
        """
        made, now = Claim(**claim), time.monotonic()
        try:
            self._look()
        except SpecError as error:
            return {"error": str(error)}
        if self._file is not None and made.queue not in self._shares:
            known = ", ".join(sorted(self._shares))
            return {"error": f"resources.queue: no queue {made.queue!r} on this cluster; known: {known}"}
        came = self._claims[made.study].since if made.study in self._claims else time.time()
        self._claims[made.study], self._heard[made.study] = dataclasses.replace(made, since=came), now
        for study in [study for study, heard in self._heard.items() if now - heard > FORGET_S]:
            self._forget(study)
        slots = _allotted(tuple(self._claims.values()), tuple(self._shares.items()), self._room())[made.study]
        return {"slots": slots, "searches": len(self._claims)}

    def leave(self, study: str) -> bool:
        """Forget a search that has ended; return whether it was the last."""
        self._forget(study)
        return not self._claims

    def claims(self) -> list[dict[str, Any]]:
        """Return what everybody wants."""
        return [asdict(claim) for claim in self._claims.values()]

    def _forget(self, study: str) -> None:
        self._claims.pop(study, None)
        self._heard.pop(study, None)

    def _look(self) -> None:
        """Read the shares anew where the owner has changed them."""
        if self._file is None:
            return
        changed = self._file.stat().st_mtime_ns if self._file.is_file() else -1
        if changed != self._read_at:
            self._shares = read_shares(self._file)
            self._read_at = changed

    def _room(self) -> Room:
        from search import ray_session

        return ray_session.cluster()


@functools.lru_cache(maxsize=8)
def _allotted(claims: tuple[Claim, ...], shares: tuple[tuple[str, float], ...], room: Room) -> dict[str, int]:
    return allot(claims, dict(shares), room)


class Alone:
    """The turn of a search that has its machine to itself."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def tick(self, wanted: Callable[[], int]) -> None:
        """Do nothing: nobody else wants anything."""


class Turn:
    """A search's place among those of a cluster. Lives in the driver, whose main loop calls `tick`.

    Args:
        claim: what it wants at the most.
        stream: where it says what it is given, when that changes.
    """

    def __init__(self, claim: Claim, stream: TextIO) -> None:
        self.claim, self.slots, self._stream = claim, claim.wanted, stream
        self._broker: Any = None
        self._answer: Any = None
        self._asked = -math.inf

    def enter(self) -> None:
        """Wait for the first slot. Where the queues do not answer, the search goes on as if it were alone.

        Raises:
            SpecError: if there is no such queue.
        """
        import ray

        said, until = -math.inf, time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                answer = ray.get(self._ask(self.claim), timeout=PATIENCE_S)
            except (ray.exceptions.RayError, ValueError) as error:  # such as a broker that was just ending
                self._broker = None
                logger.info("the queues do not answer, and are asked again: %s", error)
                time.sleep(BEAT_S / 10)
                continue
            if "error" in answer:
                raise SpecError(answer["error"])
            if answer["slots"]:
                self._take(answer)
                return
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self._say(f"waiting for a slot: {answer['searches'] - 1} other searches have all of the cluster")
            until = time.monotonic() + PATIENCE_S
            time.sleep(BEAT_S)
        logger.warning("the queues of this cluster have not answered for %g s; going on without them", PATIENCE_S)

    def tick(self, wanted: Callable[[], int]) -> None:
        """Take an answer that has come; ask again where it is time. Never waits.

        wanted: returns how many trials run or are still to run.
        """
        import ray

        now = time.monotonic()
        if now - self._asked < BEAT_S:
            return
        self._asked = now
        try:
            if self._answer is not None:
                ready, _ = ray.wait([self._answer], timeout=0)
                if not ready:
                    return
                self._take(ray.get(self._answer))
            most = max(1, min(wanted(), self.claim.wanted))
            self._answer = self._ask(dataclasses.replace(self.claim, wanted=most))
        except (ray.exceptions.RayError, ValueError) as error:  # the head is away, or a broker was just ending
            logger.info("the queues do not answer, and are asked again: %s", error)
            self._broker = self._answer = None

    def leave(self) -> None:
        """Give everything back; the last one out ends the actor."""
        import ray

        try:
            if ray.get(self._named().leave.remote(self.claim.study), timeout=BEAT_S):
                ray.kill(self._broker)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.info("the queues do not answer, and will forget this search: %s", error)

    def _ask(self, claim: Claim) -> Any:
        return self._named().ask.remote(asdict(claim))

    def _named(self) -> Any:
        """Return the cluster's broker, made where there is none."""
        import ray

        if self._broker is None:
            options: dict[str, Any] = {
                "name": ACTOR,
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "get_if_exists": True,
                "num_cpus": 0,
                "max_restarts": -1,
                "max_task_retries": 0,
                # The head: it stays, and the file of the shares is its owner's.
                "resources": {"node:__internal_head__": 0.001},
            }
            self._broker = ray.remote(_OnHead).options(**options).remote()
        return self._broker

    def _take(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            return  # The owner is changing the file, or took the queue away: what runs goes on as it was.
        slots = max(1, answer["slots"])
        if slots != self.slots:
            others = answer["searches"] - 1
            self._say(f"{slots} of {self.claim.wanted} slots, queue {self.claim.queue}, {others} other searches here")
        self.slots = slots

    def _say(self, text: str) -> None:
        logs.say(self._stream, text)


class _OnHead(Broker):
    """The broker as an actor, told by its own machine's environment where the shares are."""

    def __init__(self) -> None:
        super().__init__(os.environ.get(VARIABLE))


@contextmanager
def turn(study: Path, resources: Resources, slots: int, stream: TextIO) -> Iterator[Alone | Turn]:
    """Take a search's turn on the cluster; Ray must be up. On a Ray of its own there is nobody to share with.

    Raises:
        SpecError: if there is no such queue.
    """
    if "RAY_ADDRESS" not in os.environ:
        yield Alone(slots)
        return
    one = worker(resources)
    claim = Claim(
        study=f"{socket.gethostname()}:{study.absolute()}",
        queue=resources.queue,
        wanted=slots,
        cpus=resources.workers * one["CPU"],
        gpus=resources.workers * one["GPU"],
        since=0.0,
    )
    taken = Turn(claim, stream)
    try:
        taken.enter()
        yield taken
    finally:
        taken.leave()
