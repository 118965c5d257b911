"""Ends what hangs: a process whose epoch takes too long says where it stood, and is replaced.

The clock is faulthandler's, a thread of the interpreter that needs no lock of it, so that a process which hangs in a
library's call is ended too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

FILE = "hung.txt"
"""In a trial's folder: where its process stood when it was ended for taking too long."""
FIRST_S = 6 * 3600.0
"""auto: limit of a trial's first epoch, which also reads its data."""
LEAST_S = 1800.0
"""auto: least limit of the others."""
TIMES = 10
"""auto: the limit of the others, in the trial's longest epochs."""


def limit_s(given: float | Literal["auto"], epochs_s: Sequence[float]) -> float:
    """Return how long the next epoch may take.

    Args:
        given: seconds, or auto.
        epochs_s: seconds of the trial's epochs so far.
    """
    if given != "auto":
        return float(given)
    return max(LEAST_S, TIMES * max(epochs_s)) if epochs_s else FIRST_S


class Watchdog:
    """Watches the epochs of one trial in this process.

    Args:
        path: file for the stacks of all threads, should an epoch take too long; gone again once all went well.
        fatal: end this process then, too.
    """

    def __init__(self, path: Path, *, fatal: bool) -> None:
        self.path, self.fatal = path, fatal
        try:
            self._file: TextIO = path.open("w")
        except OSError:  # a full disk is told by whoever keeps the trial
            self._file = sys.stderr

    @contextlib.contextmanager
    def watching(self, limit_s: float) -> Iterator[None]:
        """Watch an epoch that may take so many seconds."""
        faulthandler.dump_traceback_later(limit_s, exit=self.fatal, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching."""
        if self._file is not sys.stderr:
            self._file.close()
        if not _told(self.path):
            self.path.unlink(missing_ok=True)


def file_of(rank: int) -> str:
    """Return the name of the file of one rank of a gang; another process ends it."""
    return f"rank-{rank}-{FILE}"


def ended(folder: Path) -> bool:
    """Return whether an earlier process of a trial ended itself for taking too long."""
    return bool(_told(folder / FILE))


def reason(after_s: float) -> str:
    """Return why a trial that hung has failed."""
    return f"hung: no epoch in {after_s:g} s; error.txt shows where it stood"


def stacks(folder: Path) -> str:
    """Return where the processes of a trial that hung stood."""
    return "\n".join(f"{path.name}\n{_told(path)}" for path in sorted(folder.glob(f"*{FILE}")))


def _told(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
