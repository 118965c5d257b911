"""What a hostile file may cost: time of the processor and memory, measured where it is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

MB = 10**6
Within = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def within() -> Within:
    """Return a context that fails where its body took longer, or had more memory at its peak, than is given."""

    @contextmanager
    def bounded(*, seconds: float, megabytes: float) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begun = _memory("VmRSS"), time.process_time()
        yield
        took, grew = time.process_time() - begun, (_memory("VmHWM") - before) / MB
        assert took < seconds, f"{took:.2f} s"
        assert grew < megabytes, f"{grew:.0f} MB"

    return bounded


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
