"""What can go wrong, drawn once: what a person can mend (exit code 2), and what failed in the doing (exit code 1)."""

from __future__ import annotations

import errno

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes of the commands."""
OUT_OF_MEMORY = "running low on memory"
"""What Ray says of a process that it killed before the machine ran out of memory."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class BadInput(ValueError):
    """Something to mend before the same command works: the message says what and how. Nothing is lost."""


class SpecError(BadInput):
    """A search space that cannot be run: the message names the file, the key and the remedy."""


class StudyError(BadInput):
    """A study that cannot be used: who holds it, or what differs, and what to do."""


def held(where: object, holder: str, hint: str = "") -> StudyError:
    """Return the refusal of a study that another process writes."""
    return StudyError(
        f"{where}: another search holds this study ({holder}){hint}; "
        "wait for it, stop it, or start a study of your own with --study NAME"
    )


class TrackingError(BadInput):
    """A logger that is asked for and cannot be used."""


class DiskError(BadInput):
    """A disk that takes no more. What was written stays, and the same command goes on from there."""


class StoreError(DiskError):
    """A database or an object store that cannot be reached or written: as with a full disk, nothing is lost."""


class SearchError(RuntimeError):
    """A search that cannot go on; what has ended is kept."""


class EvaluationError(RuntimeError):
    """A checkpoint that could not be evaluated."""


def is_disk(error: BaseException) -> bool:
    """Return whether an error says that the disk is full, read-only or broken: no fault of the trial."""
    return isinstance(error, OSError) and error.errno in DISK


def disk_error(error: BaseException, where: object) -> DiskError:
    """Return what to tell a person about such an error."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DiskError(f"{where}: {reason}; make room, then run the same command: it goes on from here")
