"""A trial's metrics.jsonl: a line for each epoch, read back even when the last line was torn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import durable

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class EpochLine:
    """One line of a trial's metrics.jsonl."""

    epoch: int
    metrics: Mapping[str, float]
    seconds: float = 0.0
    attempt: int = 1
    time: float = 0.0
    """When the epoch ended, seconds since 1970."""


def read(trial_folder: Path) -> list[EpochLine]:
    """Return a trial's epochs in order; of one that was done twice, the later line; none without a file."""
    path = trial_folder / FILE
    if not path.exists():
        return []
    found = {line.epoch: line for line in _lines(path)}
    return [found[epoch] for epoch in sorted(found)]


def append(trial_folder: Path, line: EpochLine) -> None:
    """Add one epoch."""
    with (trial_folder / FILE).open("a", encoding="utf-8") as file:
        file.write(_text(line))


def rewrite(trial_folder: Path, lines: Iterable[EpochLine]) -> None:
    """Keep these epochs only."""
    durable.write(trial_folder / FILE, "".join(map(_text, lines)))


def _text(line: EpochLine) -> str:
    return json.dumps(durable.plain(asdict(line))) + "\n"


def _lines(path: Path) -> Iterator[EpochLine]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content: dict[str, Any] = json.loads(text)
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
