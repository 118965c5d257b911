"""A disk that is full, and later has room: a file system in memory, mounted where only this test's processes see it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from search import spec_file
from search.record import StudyPaths
from search.study import RESULT, Study, read_outcome
from tests.command import ROOT, SPACE
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]

INSIDE = ("unshare", "--user", "--map-root-user", "--mount")
TRIALS = 24
SCRIPT = """
mount -t tmpfs -o size=$SIZE tmpfs runs || exit 77
$TUNE >full.out 2>full.err
echo $? >full.code
cp -r runs/mine full
mount -o remount,size=64m runs
$TUNE >freed.out 2>freed.err
echo $? >freed.code
cp -r runs/mine freed
"""


@pytest.fixture(scope="module")
def mounting() -> None:
    """Skip where this user may not mount a file system even in a namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here, with which a small file system could be mounted")
    tried = subprocess.run(
        [*INSIDE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")


@pytest.mark.usefixtures("mounting")
@pytest.mark.parametrize("size", ["200k", "300k"])
@pytest.mark.row("F7")
def test_a_full_disk_is_told_and_once_freed_the_search_goes_on(tell: Tell, tmp_path: Path, size: str) -> None:
    space = tmp_path / "mine.yaml"
    space.write_text(SPACE.replace("trials: 30", f"trials: {TRIALS}"))
    (tmp_path / "runs").mkdir()
    tune = f"{sys.executable} {ROOT / 'tune.py'} --space {space} --runs {tmp_path / 'runs'}"
    script = f"SIZE={size}\nTUNE='{tune}'\n{SCRIPT}"
    done = subprocess.run([*INSIDE, "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    told = (tmp_path / "full.err").read_text()
    clear = "No space left on device; make room, then run the same command: it goes on from here" in told
    clear = clear and "Traceback" not in told and (tmp_path / "full.code").read_text() == "2\n"
    assert clear, told
    kept = {file.parent.name: file.read_bytes() for file in (tmp_path / "full/trials").glob(f"*/{RESULT}")}
    assert 0 < len(kept) < TRIALS, "the disk was full too soon or too late"

    assert (tmp_path / "freed.code").read_text() == "0\n", (tmp_path / "freed.err").read_text()
    paths = StudyPaths(tmp_path / "freed")
    records = Study(paths, spec_file.load(str(space))).records()
    same = [(record.number, record.state) for record in records] == [(n, "complete") for n in range(TRIALS)]
    same = same and all(read_outcome(paths.trial(n)) is not None for n in range(TRIALS))
    lost = sum((paths.trial(int(n)) / RESULT).read_bytes() != content for n, content in kept.items())
    tell("disk full, then freed", size, disks=1, same=same, unclear=not clear, lost=lost)
