"""What several workers prepare is what one process does, whatever happens to a worker or to the command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import configuration
from search import __main__ as command
from search import preparation
from search.errors import BadInput, SearchError
from search.preparation import Prepared, Request
from search.resources import Room
from tests.conftest import ROOT
from workloads import esd

DONE, BAD_INPUT = 0, 2
WORKLOAD = "tests.search.in_pieces"
Told = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("sigterm_as_before")


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """Return what makes a folder of pieces that tells the fake workload how to go wrong."""

    def write(pieces: str = "abcdef", **values: Any) -> Path:
        folder = tmp_path / "pieces"
        folder.mkdir(exist_ok=True)
        (folder / "told.json").write_text(json.dumps({"pieces": list(pieces), **values}))
        return folder

    return write


def prepare(folder: Path, workers: int = 2) -> tuple[Prepared, str]:
    stream = io.StringIO()
    request = Request(workload=WORKLOAD, values={"root": str(folder)}, workers=workers)
    return preparation.run(request, stream), stream.getvalue()


def calls(folder: Path) -> list[str]:
    return sorted((folder / "calls.txt").read_text().split())


def content(folder: Path) -> dict[str, str]:
    """Return the hash of each file, those apart whose content is that they are there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation.ray_session, "room", lambda: Room(2.0, 0.0, "this machine"))
    monkeypatch.setattr(preparation, "RaySession", lambda room: pytest.fail("Ray was started"))


@pytest.mark.ray
@pytest.mark.row("E19")
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_write_what_one_process_does_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    values = {"preset": "debug", "data.cache": str(tmp_path / "cache"), "data.processed": str(together)}
    config = configuration.build(esd.Config, {**values, "data.processed": str(alone)})
    names = [f"Tile{number}" for number in range(1, 7)]
    assert esd.process(config, esd.pieces(config)) == names
    # As a command leaves it that was killed after two tiles and within the third.
    esd.process(configuration.build(esd.Config, values), names[:3])
    (together / "4x4/tiles/Tile3.json").unlink()
    next((together / "4x4").glob("*/subtiles/Tile3_2_*.npz")).write_bytes(b"PK")
    before = times(together, "Tile[12][._]*")

    words = ["prepare", "esd", "--workers", "2", *(f"--set={name}={value}" for name, value in values.items())]
    assert command.main(words) == DONE
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == ["processed  4 pieces now", "samples    64 train, 16 validation, 16 test"]
    assert "prepare: 4 of 4 pieces done, " in captured.err and "note: SYNTHETIC DATA" in captured.err
    assert content(together) == content(alone)
    assert len(before) == 2 * (2 * 16 + 2)
    assert times(together, "Tile[12][._]*") == before

    no_ray(monkeypatch)
    after = times(together, "*")
    assert command.main(words) == DONE
    assert capsys.readouterr().out.splitlines()[0] == "processed  0 pieces now"
    assert times(together, "*") == after


@pytest.mark.ray
@pytest.mark.row("E19")
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_command_is_gone_on_with_by_the_same_command(told: Told) -> None:
    import ray

    folder = told("abcdefgh", seconds=0.4)
    words = ["prepare", WORKLOAD, "--set", f"root={folder}"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-m", "search", *words], env=environment, start_new_session=True)
    until = time.monotonic() + 60
    while not (folder / "b").exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    wait_until_still(folder)
    done = {name for name in "abcdefgh" if (folder / name).exists()}
    assert {"a", "b"} <= done < set("abcdefgh")
    before = times(folder, "[a-h]")
    assert set(prepare(folder)[0].processed) == set("abcdefgh") - done
    assert times(folder, "[a-h]").items() >= before.items()


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob(pattern) if path.is_file()}


def wait_until_still(folder: Path) -> None:
    """Wait for the workers of a killed command, which end after it."""
    seen = None
    while seen != (seen := sorted(folder.iterdir())):
        time.sleep(1.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_piece_whose_worker_died_is_done_again_and_no_more_than_asked_for_run_at_once(told: Told) -> None:
    folder = told(deadly="c", times=2, seconds=0.05)
    prepared, said = prepare(folder)
    assert prepared.processed == tuple("abcdef") and prepared.manifest["samples"]["train"] == 6
    assert calls(folder) == sorted("abcccdef")
    assert max(int((folder / name).read_text()) for name in "abcdef") <= 2
    assert said.splitlines()[-1].startswith("prepare: 6 of 6 pieces done, ")
    again, said = prepare(folder)
    assert (again.processed, said, calls(folder)) == ((), "", sorted("abcccdef"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_piece_that_kills_every_worker_ends_the_command_and_what_is_done_stays(told: Told) -> None:
    folder = told("ab", deadly="b", times=99)
    with pytest.raises(SearchError, match="piece b lost its worker 3 times, out of memory perhaps"):
        prepare(folder, workers=1)
    assert (folder / "a").exists() and calls(folder) == list("abbb")
    told("ab")
    assert prepare(folder)[0].processed == ("b",)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_piece_that_the_workload_refuses_is_named_and_none_begins_after_it(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = told(refused="b")
    words = ["prepare", WORKLOAD, "--set", f"root={folder}"]
    assert command.main(words) == BAD_INPUT
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "python -m search: b: no piece\n")
    assert calls(folder) == ["a", "b"]
    told("ABC", refused="B", where="elsewhere/x.tif")
    with pytest.raises(BadInput, match=r"^B: elsewhere/x\.tif: no piece$"):
        prepare(folder, workers=1)
    told("xy", broken="x")
    with pytest.raises(SearchError, match=r"(?s)piece x failed.*ZeroDivisionError: no length"):
        prepare(folder, workers=1)


def test_nothing_left_needs_no_ray_and_tells_what_is_there(
    told: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_ray(monkeypatch)
    folder = told("")
    assert command.main(["prepare", WORKLOAD, "--set", f"root={folder}"]) == DONE
    captured = capsys.readouterr()
    assert captured.out == (
        "processed  0 pieces now\nsamples    0 train, 0 validation, 0 test\ndata       0123; SYNTHETIC\n"
    )
    assert captured.err == "note: these are no data\n"


def test_a_line_says_that_the_first_is_awaited_and_how_far_it_is() -> None:
    request = Request(workload="esd", workers=2, cpus_per_worker=0.5)
    assert (
        preparation.status(0, 60, request, 61) == "prepare: the first of 60 pieces, by workers of 0.5 CPU, 1 min 01 s"
    )
    assert preparation.status(7, 60, request, 2) == "prepare: 7 of 60 pieces done, 2 s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["esdd"], "workload 'esdd' not found; did you mean 'esd'?"),
        (["toy"], "toy: its data have no pieces to be done side by side, for it offers no `pieces(config)`"),
        ([WORKLOAD, "--set", "rot=x"], "rot: unknown key; did you mean 'root'"),
        ([WORKLOAD, "--set", "root"], "root: expected key=value"),
        ([WORKLOAD, "--set", "root={folder}", "--workers", "9"], "--workers: 9 x (1 CPU, 0 GPU) = 9 CPU, 0 GPU, but"),
        (["esd", "--set", "data.root=nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    words: list[str], message: str, told: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_ray(monkeypatch)
    folder = told()
    assert command.main(["prepare", *(word.format(folder=folder) for word in words)]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("python -m search: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("when", ["unreadable", "unusable"])
def test_data_that_cannot_be_used_are_refused_before_and_after(
    when: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_ray(monkeypatch)
    with pytest.raises(BadInput, match="pieces: no pieces" if when == "unreadable" else "pieces: not usable"):
        prepare(told("", **{when: True}))
