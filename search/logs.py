"""What this program logs, as lines for people or as JSON for machines, in the driver and in all that it starts.

In JSON each line is an object with time, level, logger and message, and with study, trial, attempt and rank as far as
they are known where it was written.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from search.errors import BadInput

VARIABLE = "TUNE_LOG"
KINDS = ("text", "json")
FIELDS = ("study", "trial", "attempt", "rank")
OURS = ("search", "segmentation", "workloads", "tune")
"""Loggers whose events are told too, not only their warnings, where they are told as JSON."""

logger = logging.getLogger("tune")
_now: dict[str, Any] = {}
"""What this process works on: it does one thing at a time."""


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line."""
        told = {name: getattr(record, name, _now.get(name)) for name in FIELDS}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in told.items() if value is not None},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Lines(io.StringIO):
    """Stands for a stream of progress whose lines are logged instead: see `say`."""


def say(stream: TextIO, text: str, **fields: Any) -> None:
    """Write a line for people, or log it with what it is about where the stream is `start`'s for machines."""
    if isinstance(stream, Lines):
        for line in filter(str.strip, text.splitlines()):
            logger.info("%s", line.strip(), extra=fields)
        return
    stream.write(f"{text}\n")
    stream.flush()


def fail(program: str, problem: object) -> None:
    """Tell why a command ends."""
    if isinstance(_formatter(), JsonLines):
        logger.error("%s", problem)
    else:
        print(f"{program}: {problem}", file=sys.stderr)


def kind(given: str | None = None) -> str:
    """Return how to log: as given, or as the environment says, or as text.

    Raises:
        BadInput: if the environment says something else.
    """
    found = given or os.environ.get(VARIABLE) or KINDS[0]
    if found not in KINDS:
        raise BadInput(f"{VARIABLE}: got {found!r}; expected one of {', '.join(KINDS)}")
    return found


def start(chosen: str) -> TextIO:
    """Log to stderr from now on; return where to show progress."""
    os.environ[VARIABLE] = chosen  # a Ray of our own hands it to its processes
    handler = logging.StreamHandler(sys.stderr)
    if chosen == "text":
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(JsonLines())
        for name in OURS:
            logging.getLogger(name).setLevel(logging.INFO)
    # In the place of whatever was there: among lines of JSON there is no other.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=chosen == "json")
    return sys.stderr if chosen == "text" else Lines()


def enter(**fields: Any) -> None:
    """Say what this process works on from now on; None: on none."""
    _now.update(fields)


def in_worker(order: Mapping[str, Any], rank: int | None, attempt: int | None = None) -> None:
    """Log as the driver does. Called in a slot, or in a rank of a gang, at the start of each trial."""
    if order.get("log", "text") != "text" and not isinstance(_formatter(), JsonLines):
        start(order["log"])
    enter(study=order.get("study"), trial=order["number"], attempt=attempt, rank=rank)


def _formatter() -> logging.Formatter | None:
    return next((handler.formatter for handler in logging.getLogger().handlers), None)
