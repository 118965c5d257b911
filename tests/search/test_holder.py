from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.record import StudyPaths
from search.storage import holder
from search.storage.lease import lease

HOLDS = """
import signal, sys, time
from pathlib import Path
from search.storage import holder
from search.record import StudyPaths
from search.storage.lease import lease
signal.signal(signal.SIGTERM, signal.default_int_handler)
paths = StudyPaths(Path(sys.argv[1]))
try:
    with lease(paths), holder.attending(paths):
        print("held", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def paths(tmp_path: Path) -> StudyPaths:
    return StudyPaths(tmp_path / "study")


@pytest.fixture
def driver(paths: StudyPaths) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the study until it is asked to stop."""
    command = [sys.executable, "-c", HOLDS, str(paths.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_nobody_holds_what_no_process_has_open(paths: StudyPaths) -> None:
    assert holder.of(paths) is None
    with lease(paths):
        held_by = holder.of(paths)
        assert held_by is not None and held_by.is_here and held_by.pid == os.getpid()
        assert f"process {os.getpid()} on " in str(held_by)
    assert holder.of(paths) is None
    assert paths.lease.exists(), "what an ended process left says nothing"


def test_a_number_that_another_process_has_by_now_is_not_the_driver(
    paths: StudyPaths, driver: subprocess.Popen[str]
) -> None:
    held_by = holder.of(paths)
    assert held_by is not None and held_by.is_here
    told = json.loads(paths.lease.read_text())
    for changed in ({"born": "another boot 17"}, {"born": ""}, {"pid": os.getpid()}, {"host": "elsewhere"}):
        with paths.lease.open("r+") as file:  # in place: it is this file that is locked
            file.truncate()
            json.dump({**told, **changed}, file)
        other = holder.of(paths)
        assert other is not None and not other.is_here, changed
        # So it is never sent a signal, but asked by a file.
        assert holder.ask_to_stop(paths, other) == "file" and paths.stop.exists()
        paths.stop.unlink()


def test_stopped_by_a_signal_on_the_same_machine(paths: StudyPaths, driver: subprocess.Popen[str]) -> None:
    held_by = holder.of(paths)
    assert held_by is not None
    assert not holder.wait_until_free(paths, 0.2)
    assert holder.ask_to_stop(paths, held_by) == "signal"
    assert driver.wait(10) == 130
    assert holder.wait_until_free(paths, 1.0)


def test_stopped_by_a_file_from_another_machine(paths: StudyPaths, driver: subprocess.Popen[str]) -> None:
    held_by = holder.Holder(1, "elsewhere", "then")
    assert holder.ask_to_stop(paths, held_by) == "file"
    assert driver.wait(10) == 130
    # The request is over with the next start.
    with lease(paths), holder.attending(paths):
        assert not paths.stop.exists()


def test_whoever_looks_keeps_nobody_from_starting(paths: StudyPaths) -> None:
    paths.folder.mkdir()
    paths.lease.touch()
    script = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); "
    script += "print(1, flush=True); time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-c", script, str(paths.lease)], stdout=subprocess.PIPE) as looks:
        assert looks.stdout is not None
        looks.stdout.readline()
        with lease(paths):
            pass


def test_attending_ends_with_the_search(paths: StudyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "LOOK_S", 0.01)
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    paths.folder.mkdir()
    with holder.attending(paths):
        pass
    paths.stop.touch()
    time.sleep(0.05)
    assert sent == []
    with holder.attending(paths):
        paths.stop.touch()
        until = time.monotonic() + 10
        while not sent and time.monotonic() < until:
            time.sleep(0.01)
    assert sent == [signal.SIGTERM]
