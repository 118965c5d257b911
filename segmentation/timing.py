"""Where the time of an epoch's steps goes; asked for by `profile`, since it makes a GPU wait for every part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
PARTS = ("data", "forward", "backward", "step", "sync")


class Clock:
    """Adds up the seconds of each part; switched off, it does nothing."""

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.device, self.on = device, on
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what runs inside; parts must not overlap."""
        if not self.on:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[part] += time.perf_counter() - started

    def waiting(self, items: Iterable[T], part: str) -> Iterator[T]:
        """Yield the items, counting the wait for each."""
        source, end = iter(items), object()
        while True:
            with self(part):
                item = next(source, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def percentages(self) -> dict[str, float]:
        """Return each part's share of their sum, as metrics of an epoch; empty if switched off."""
        total = sum(self.seconds.values())
        return {f"time_{part}": 100 * seconds / total for part, seconds in self.seconds.items()} if total else {}
