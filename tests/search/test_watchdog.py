"""The watchdog ends what hangs, whatever it hangs in."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from search import watchdog
from search.watchdog import Watchdog

HANGS = {
    "sleeps": "import time; time.sleep(60)",
    "waits": "import threading; threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "holds the interpreter": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize(
    ("given", "epochs_s", "expected"),
    [
        (5.0, [], 5.0),
        (5.0, [100.0], 5.0),
        ("auto", [], 21600.0),
        ("auto", [1.0, 2.0], 1800.0),
        ("auto", [100.0, 400.0, 300.0], 4000.0),
    ],
)
def test_the_limit_follows_the_longest_epoch(given: float, epochs_s: list[float], expected: float) -> None:
    assert watchdog.limit_s(given, epochs_s) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("how", HANGS)
@pytest.mark.row("F11")
def test_a_process_that_hangs_ends_and_says_where_it_stood(tmp_path: Path, how: str) -> None:
    code = (
        "from pathlib import Path; from search.watchdog import Watchdog\n"
        f"with Watchdog(Path({str(tmp_path / watchdog.FILE)!r}), fatal=True).watching(0.5): {HANGS[how]}"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert (done.returncode, time.monotonic() - began < 10) == (1, True)
    assert watchdog.ended(tmp_path)
    assert 'File "<string>", line 2 in <module>' in watchdog.stacks(tmp_path)


def test_nothing_is_left_where_nothing_hung(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / watchdog.FILE, fatal=True)
    with dog.watching(60):
        assert not watchdog.ended(tmp_path), "an empty file is that of a process which was killed otherwise"
    dog.close()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_was_late_tells_where_it_stood_and_lives(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / watchdog.file_of(1), fatal=False)
    with dog.watching(0.05):
        time.sleep(0.3)
    dog.close()
    assert not watchdog.ended(tmp_path), "only the file of a slot says that the trial has hung"
    assert "test_a_rank_that_was_late" in watchdog.stacks(tmp_path)


def test_a_full_disk_does_not_keep_it_from_watching(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "gone" / watchdog.FILE, fatal=False)
    with dog.watching(60):
        pass
    dog.close()
