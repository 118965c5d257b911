"""Optuna's journal in a study's folder: appended to by one process, checked line by line when it is opened."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from search.errors import StudyError
from search.record import StudyPaths

logger = logging.getLogger(__name__)

_CHECKSUM = b',"crc":"'


class _NoLock(BaseJournalFileLock):
    """No lock for the journal: its writer holds the study's lease, and a killed process leaves nothing behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Journal(JournalFileBackend):
    """Optuna's journal, which waits for the disk only when told to, and whose lines carry a checksum.

    What is written outlives a kill at once. After a power cut a trial that a slot has begun must be known, so `sync`
    comes before it; how it ended is in its committed result, from which the next start tells the study again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lock_obj=_NoLock())
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write entries, each a line."""
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, logs)))

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def opened(paths: StudyPaths) -> Journal:
    """Return the journal of a study, what a killed process left half written cut off.

    Raises:
        StudyError: if it is damaged, or gone while the trials are there.
    """
    begun = has_trials(paths)
    _mend(paths.journal, begun)
    if begun and not (paths.journal.exists() and paths.journal.stat().st_size):
        state = "empty" if paths.journal.exists() else "gone"
        raise StudyError(
            f"{paths.journal}: {state}, but its trials are there; put it back, "
            "or start a study of your own with --study NAME"
        )
    return Journal(paths.journal)


def has_trials(paths: StudyPaths) -> bool:
    """Return whether a study's folder holds trials."""
    return any(paths.trial(0).parent.glob("*"))


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry of the journal; Optuna passes over the checksum at its end."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return text[:-1] + _CHECKSUM + b'%08x"}\n' % zlib.crc32(text)


def _is_whole(line: bytes) -> bool:
    """Return whether a line of the journal is as it was written; one without a checksum has to be JSON at least."""
    text, found, checksum = line.rpartition(_CHECKSUM)
    try:
        if found:
            return line.endswith(b'"}\n') and zlib.crc32(text + b"}") == int(checksum[:-3], 16)
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _mend(path: Path, begun: bool) -> None:
    """Cut what a killed process left half written: the journal is unreadable after one more append otherwise.

    Args:
        path: of the journal; it need not exist.
        begun: whether there are trials, so that it cannot be cut to nothing.
    Raises:
        StudyError: if it is damaged before its end, where nothing can be cut without losing what follows.
    """
    if not path.exists():
        return
    whole = size = damaged = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            size += len(line)
            if not _is_whole(line):
                damaged = damaged or number
            elif damaged:
                raise _damaged(path, damaged)
            else:
                whole = size
    if damaged == 1 and begun:
        raise _damaged(path, damaged)
    if damaged:
        logger.warning("%s: cut %d bytes that a killed process left half written", path, size - whole)
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def _damaged(path: Path, number: int) -> StudyError:
    cut = f"head -n {number - 1} {path} > {path}.whole && mv {path}.whole {path}"
    or_cut = f", or cut it there ({cut}): trials after it are taken up from their folders" if number > 1 else ""
    return StudyError(f"{path}: line {number} is damaged; nothing was changed; put back a copy{or_cut}")


def replayed(journal: Journal) -> JournalStorage:
    """Return the storage with everything that the journal says."""
    try:
        return JournalStorage(journal)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        # Only lines of older studies come this far: they carry no checksum.
        raise StudyError(f"{journal.path}: cannot be read ({error!r}); nothing was changed; put back a copy") from error
