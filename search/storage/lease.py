"""Who may write a study: one process at a time, on whatever machine it is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from search.errors import StudyError, held
from search.record import StudyPaths
from search.storage import address, holder

if TYPE_CHECKING:
    from search.storage.database import Database

TRIES = 3
"""How often a lease is asked for: whoever only looks whether it is taken has it for an instant."""


@contextlib.contextmanager
def lease(paths: StudyPaths, url: str | None = None) -> Iterator[Database | None]:
    """Hold the study for this process; the system gives it back when the process ends, however it ends.

    Args:
        paths: of the study.
        url: of the database that has its record, from `address.resolve`; None: a journal in its folder is the record.
    Raises:
        StudyError: if another process holds it, saying who, or its record is elsewhere.
        StoreError: if the database cannot be used.
    """
    paths.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if url is None or paths.store:
            stack.enter_context(file_lease(paths))
        if url is None:
            stack.enter_context(paths.store.held())
            paths.pull()
            paths.store.pull_journal(paths.journal)
            if paths.identity.exists():
                raise StudyError(
                    f"{paths.folder}: its record is in a database; name it as search.storage or {address.VARIABLE}, "
                    "or start a study of your own with --study NAME"
                )
            yield None
            return
        from search.storage.database import Database, identity  # what it needs is no burden to a slot

        paths.pull()
        if paths.journal.exists() or paths.store.has_journal():
            raise StudyError(
                f"{paths.folder}: its record is {paths.journal.name}; leave out search.storage and {address.VARIABLE}, "
                "or start a study of your own with --study NAME"
            )
        database = stack.enter_context(contextlib.closing(Database(url, identity(paths))))
        paths.pull()  # another driver may have ended since
        yield database


@contextlib.contextmanager
def file_lease(paths: StudyPaths) -> Iterator[None]:
    """Hold the folder of a study on this machine, or on the file system that it is on. Raises as `lease` does."""
    paths.folder.mkdir(parents=True, exist_ok=True)
    with paths.lease.open("a+") as file:
        _lock(paths, file)
        file.seek(0)
        file.truncate()
        json.dump(holder.lines(), file)
        file.flush()
        yield


def check(paths: StudyPaths) -> None:
    """Raise what `lease` would, without holding the study: early, before anything that takes its time."""
    if paths.lease.exists():
        with paths.lease.open("r+") as file:
            _lock(paths, file)


def _lock(paths: StudyPaths, file: TextIO) -> None:
    """Take the lease, or say who has it."""
    for _ in range(TRIES):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(holder.POLL_S)
    file.seek(0)
    raise held(paths.folder, file.read().strip())
