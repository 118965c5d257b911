"""Files of a study: written whole or not at all, and read back even when the last line was torn."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class EpochLine:
    """One line of a trial's metrics.jsonl."""

    epoch: int
    metrics: Mapping[str, float]
    seconds: float = 0.0
    attempt: int = 1
    time: float = 0.0
    """When the epoch ended, seconds since 1970."""


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write a file so that a reader sees the old content or the new, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def read_epochs(trial_folder: Path) -> list[EpochLine]:
    """Return a trial's epochs in order; of one that was done twice, the later line; none without a file."""
    path = trial_folder / METRICS
    if not path.exists():
        return []
    found = {line.epoch: line for line in _lines(path)}
    return [found[epoch] for epoch in sorted(found)]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run the same command to make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; expected an object")
    return content


def plain_json(value: Any) -> Any:
    """Return the value with NaN and infinities as None and tuples as lists, so that any JSON reader takes it."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _lines(path: Path) -> Iterator[EpochLine]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(text)
            yield EpochLine(
                epoch=int(content["epoch"]),
                metrics={name: float("nan") if score is None else score for name, score in content["metrics"].items()},
                seconds=content.get("seconds", 0.0),
                attempt=content.get("attempt", 1),
                time=content.get("time", 0.0),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            # A killed process leaves half a line; its epoch is done again by the next attempt.
            continue


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
