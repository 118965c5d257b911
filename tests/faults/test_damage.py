"""What a power cut or a bad disk leaves: files torn, empty, or with a bit flipped, in each place that a restart reads.

The study is broken off with two trials told, one committed and not told, and one in flight; then one file is damaged,
and the study goes on in this process, without Ray: what detects the damage is the same code.
"""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search import epochs, spec_file
from search.errors import StudyError
from search.record import StudyPaths
from search.spec import SearchSpec
from search.study import RESULT, Study, Task
from search.trial import TrialRun
from tests.faults.table import Tell
from tests.search.conftest import order

pytestmark = pytest.mark.faults

SPACE = """
workload: toy
objective: {metric: score, mode: max}
parameters:
  lr: {type: float, low: 1.0e-4, high: 1.0, log: true}
  width: {type: int, low: 8, high: 256, log: true}
fixed: {epochs: 5, noise: 0.2}
search: {sampler: random, trials: 6, seed: 4}
stopping: {rule: none}
"""
UNTOLD, IN_FLIGHT = 2, 3
Damage = Callable[[bytes, random.Random], bytes]


def torn(content: bytes, draw: random.Random) -> bytes:
    return content[: len(content) - draw.randint(2, min(40, len(content) - 1))]


def zeros(content: bytes, draw: random.Random) -> bytes:
    return content + b"\0" * draw.randint(1, 4096)


def empty(content: bytes, draw: random.Random) -> bytes:
    return b""


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def flipped_in_the_last_line(content: bytes, draw: random.Random) -> bytes:
    start = content[:-1].rfind(b"\n") + 1
    return content[:start] + flipped(content[start:-1], draw) + b"\n"


def flipped_in_the_middle(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines) // 4, len(lines) // 2)
    return b"".join([*lines[:number], flipped(lines[number][:-1], draw) + b"\n", *lines[number + 1 :]])


CASES: dict[tuple[str, str], Damage] = {
    ("study.journal", "torn"): torn,
    ("study.journal", "zeros at the end"): zeros,
    ("study.journal", "flipped at the end"): flipped_in_the_last_line,
    ("study.journal", "flipped in the middle"): flipped_in_the_middle,
    ("study.journal", "empty"): empty,
    (f"trials/{UNTOLD}/{RESULT}", "torn"): torn,
    (f"trials/{UNTOLD}/{RESULT}", "empty"): empty,
    (f"trials/{UNTOLD}/{RESULT}", "flipped"): flipped,
    (f"trials/{IN_FLIGHT}/checkpoints/epoch-0003/state.json", "torn"): torn,
    (f"trials/{IN_FLIGHT}/checkpoints/epoch-0003/state.json", "empty"): empty,
    (f"trials/{IN_FLIGHT}/checkpoints/epoch-0003/state.json", "flipped"): flipped,
    (f"trials/{IN_FLIGHT}/checkpoints/epoch-0003/manifest.json", "torn"): torn,
    (f"trials/{IN_FLIGHT}/checkpoints/epoch-0003/manifest.json", "flipped"): flipped,
}


def load(folder: Path) -> SearchSpec:
    (folder / "mine.yaml").write_text(SPACE)
    return spec_file.load(str(folder / "mine.yaml"))


def pulled(study: Study, task: Task, until: int) -> Any:
    """Run a trial for some epochs; return its outcome if it ends."""
    run = TrialRun(order(study, task))
    outcome = None
    for _ in range(until):
        _, _, outcome = run.step()
        if outcome is not None:
            break
    run.close()
    return outcome


def broken_off(folder: Path, spec: SearchSpec) -> StudyPaths:
    folder.mkdir(parents=True)
    study = Study(StudyPaths(folder), spec)
    for number in range(IN_FLIGHT + 1):
        task = study.ask()
        assert task is not None and task.number == number
        outcome = pulled(study, task, 3 if number == IN_FLIGHT else 9)
        if number < UNTOLD:
            study.tell(number, outcome)
    return study.paths


def gone_on(paths: StudyPaths, spec: SearchSpec) -> Study:
    study = Study(paths, spec)
    for task in iter(study.ask, None):
        study.tell(task.number, pulled(study, task, 9))
    return study


def found(study: Study) -> list[Any]:
    return [(r.number, r.state, r.params, r.values, r.epochs, r.seed, r.best_epoch) for r in study.records()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    return found(gone_on(StudyPaths(folder), load(folder)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("file", "how"), CASES, ids=lambda part: part.replace("/", "-").replace(" ", "-"))
@pytest.mark.row("F8")
def test_damage_is_seen_and_costs_no_more_than_what_it_hit(
    tell: Tell, tmp_path: Path, unbroken: list[Any], caplog: pytest.LogCaptureFixture, file: str, how: str, seed: int
) -> None:
    spec = load(tmp_path)
    paths = broken_off(tmp_path / "mine", spec)
    sound = shutil.copytree(paths.folder, tmp_path / "sound")
    path = paths.folder / file
    damaged = CASES[file, how](path.read_bytes(), random.Random(f"{file} {how} {seed}"))
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    results = {name: (paths.trial(name) / RESULT).stat().st_mtime_ns for name in range(UNTOLD)}

    caplog.set_level(logging.WARNING)
    detected = True
    try:
        study = gone_on(paths, spec)
        detected = file in caplog.text or path.parent.name in caplog.text
    except StudyError as error:
        _do_as_told(str(error), path, sound / file)
        study = gone_on(paths, spec)

    rows = epochs.read(paths.trial(IN_FLIGHT))
    restarted = sum(row.attempt > 1 for row in rows) > 3  # epoch 3 may be trained again, 4 and 5 are new
    again = sum((paths.trial(name) / RESULT).stat().st_mtime_ns != written for name, written in results.items())
    different = found(study) != unbroken
    counts = {"undetected": not detected, "restarted": restarted + again, "different": different}
    tell("torn, empty or flipped", f"{file} {how} {seed}", cases=1, **counts)


def _do_as_told(message: str, path: Path, copy: Path) -> None:
    """Do what the error says: cut the file where it can be cut, put back a copy where it cannot."""
    assert "put back a copy" in message or "put it back" in message
    if "cut it there" in message:
        subprocess.run(message.split("(")[1].split(")")[0], shell=True, check=True, timeout=10)
    else:
        shutil.copy(copy, path)
