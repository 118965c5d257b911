"""What the benchmarks run: a search of ours in this process, a command, or a script with stock Ray Tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import configuration
from benchmarks import BenchmarkError
from search import planning, ray_session, service, spec_file
from search.ray_session import RaySession
from search.record import StudyPaths, TrialRecord
from search.study import Study

ROOT = Path(__file__).resolve().parent.parent
OURS = ("TUNE_", "RAY_AIR_NEW_OUTPUT", "RAY_CHDIR_TO_TRIAL_DIR")
"""Variables that `search` sets for its own use of Ray Tune; stock Ray Tune must not see them."""

TOY: dict[str, Any] = {
    "workload": "toy",
    "objective": {"metric": "score", "mode": "max"},
    "parameters": {
        "lr": {"type": "float", "low": 1e-5, "high": 1.0, "log": True},
        "width": {"type": "int", "low": 8, "high": 256, "log": True},
    },
    "promotion": {"k": 1},
}
"""A search space that needs no data."""


def say(text: str) -> None:
    """Show what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


def write_space(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a search space as a file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return path


def resolved(space: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Return the content of a search space of this repository, with some values changed."""
    content: dict[str, Any] = yaml.safe_load((ROOT / spec_file.FOLDER / space).read_text(encoding="utf-8"))
    for text in assignments:
        key, value = configuration.parse_assignment(text)
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: value}
    return content


@contextmanager
def ray_up() -> Iterator[None]:
    """Keep one Ray for several searches."""
    with RaySession(ray_session.room()) as session:
        session.start()
        yield


def search(folder: Path, content: Mapping[str, Any]) -> tuple[StudyPaths, list[TrialRecord]]:
    """Run a whole search in this process; return where the study is, and its trials."""
    spec = spec_file.load(str(write_space(folder / "space.yaml", content)))
    plan = planning.make(spec, folder / "study")
    service.run(plan, sys.stderr)
    return plan.paths, Study(plan.paths, spec).records()


def span_s(records: Sequence[TrialRecord]) -> float:
    """Return the seconds from the question for the first trial to the last trial's end, start of slots included."""
    started = min(record.started for record in records if record.started is not None)
    finished = max(record.finished for record in records if record.finished is not None)
    return (finished - started).total_seconds()


def stock(
    script: str, timeout_s: float = 900.0, environment: Mapping[str, str] | None = None, **arguments: object
) -> dict[str, Any]:
    """Run a script of benchmarks/stock in a process of its own, and return the JSON object that it prints last.

    Args:
        script: its module's name.
        timeout_s: after which it is given up.
        environment: variables besides those of this process.
        arguments: its flags.
    Raises:
        BenchmarkError: with the end of what it said, if it fails.
    """
    say(f"stock Ray Tune: {script} {' '.join(f'{name}={value}' for name, value in arguments.items())}")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", f"benchmarks.stock.{script}", *flags]
    known = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**known, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise BenchmarkError(f"{script} with stock Ray Tune failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
