"""Ray tasks side by side, at most so many at once: each done again if its worker died, progress on one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from search.errors import BadInput, SearchError
from search.resources import Room

DEATHS = 2
"""How often a task is begun again after its worker died."""
LOOK_S = 0.5
SAY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many tasks at once, and what each gets."""

    workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


def check(asked: Workers, room: Room) -> None:
    """Refuse workers that would wait for ever.

    Raises:
        BadInput: if they ask for more than there is and ever will be, with the arithmetic.
    """
    cpus, gpus = asked.workers * asked.cpus_per_worker, asked.workers * asked.gpus_per_worker
    if (cpus > room.cpus + 1e-9 or gpus > room.gpus + 1e-9) and not room.grows:
        raise BadInput(
            f"--workers: {asked.workers} x ({asked.cpus_per_worker:g} CPU, {asked.gpus_per_worker:g} GPU) = "
            f"{cpus:g} CPU, {gpus:g} GPU, but {room.where} has {room.cpus:g} CPU, {room.gpus:g} GPU; "
            "lower --workers or what each gets"
        )


def run(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    asked: Workers,
    *,
    title: Callable[[int], str],
    status: Callable[[int, float], str],
    stream: TextIO,
) -> list[Any]:
    """Let Ray do every call of a function; return what each returned, in the order of the calls.

    title: what a call is, by its number, for errors.
    status: how far it is, in one line, from how many are done and the seconds since the start.

    Raises:
        BadInput: that a call raised. No other begins then.
        SearchError: if a call failed otherwise, or lost its worker too often.
    """
    import ray

    job = ray.remote(function).options(
        num_cpus=asked.cpus_per_worker, num_gpus=asked.gpus_per_worker, max_retries=DEATHS
    )
    line, began = _Line(stream), time.monotonic()
    waiting = list(reversed(range(len(calls))))
    running: dict[Any, int] = {}
    done: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < asked.workers:
                number = waiting.pop()
                running[job.remote(*calls[number])] = number
            ready, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
            for one in ready:
                done[running[one]] = _outcome(one, title(running[one]))
                del running[one]
            line.show(lambda: status(len(done), time.monotonic() - began), not (waiting or running))
    finally:
        # What is left is not cancelled: Ray 2.60 aborts a driver whose task ends in that moment. With the driver its
        # workers go.
        line.end()
    return [done[number] for number in sorted(done)]


def _outcome(job: Any, title: str) -> Any:
    import ray
    from ray import exceptions

    try:
        return ray.get(job)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, BadInput):
            raise error.cause from None
        raise SearchError(f"{title} failed:\n{error}") from error
    except exceptions.RayError as error:
        raise SearchError(
            f"{title} lost its worker {DEATHS + 1} times, out of memory perhaps ({error}); take fewer --workers"
        ) from error


class _Line:
    """One line that is written over where there is a terminal; elsewhere a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._live, self._said = stream, stream.isatty(), time.monotonic()

    def show(self, text: Callable[[], str], last: bool) -> None:
        """Show what `text()` returns, if it is time for it."""
        if self._live:
            self._stream.write(f"\r\x1b[K{text()}")
        elif last or time.monotonic() - self._said >= SAY_S:
            self._said = time.monotonic()
            self._stream.write(f"{text()}\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._live:
            self._stream.write("\n")
