"""`make setup` makes an environment, leaves a good one alone and replaces a broken one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the Makefile and a lock of nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("")
    return tmp_path


@pytest.mark.slow
def test_setup_makes_keeps_and_replaces_the_environment(checkout: Path) -> None:
    ready, left_behind = checkout / ".venv/.ready", checkout / ".venv/left-behind"

    first = make(checkout, "setup")
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout
    assert ready.exists()

    left_behind.touch()
    assert "setup:" not in make(checkout, "setup").stdout  # current: nothing is done

    (checkout / "requirements.lock").write_text("# another\n")
    changed = make(checkout, "setup")
    assert "installing" in changed.stdout
    assert left_behind.exists()  # a changed lock is installed in place

    ready.unlink()
    (checkout / ".venv/.installing").touch()
    assert "making .venv" in make(checkout, "setup").stdout  # interrupted: made anew
    assert not left_behind.exists()

    (checkout / ".venv/bin/python").unlink()
    assert "making .venv" in make(checkout, "setup").stdout  # interpreter gone: made anew
    assert ready.exists()


def test_setup_without_python_says_what_to_do(checkout: Path) -> None:
    done = make(checkout, "setup", "PYTHON=/nowhere/python")
    assert done.returncode == 2
    assert "no Python 3.11 or newer found" in done.stderr
    assert not (checkout / ".venv").exists()


def test_help_lists_every_target_that_people_type(checkout: Path) -> None:
    listed = {line.split()[1] for line in make(checkout).stdout.splitlines()}
    names = "help setup tune test faults lint lock bench report-browser postgres clean"
    assert listed == set(names.split())
    assert make(checkout, "--dry-run", *sorted(listed)).returncode == 0
