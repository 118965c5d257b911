"""What several workers predict is what one does, whatever happens to a worker."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from search import __main__ as command
from search import inference, tasks
from search.errors import BadInput, SearchError
from search.inference import Request
from search.resources import Room
from workloads import pairs, spark, telescope
from workloads._spark import generator
from workloads._spark.generator import Synthetic

DONE, FAILED, BAD_INPUT = 0, 1, 2
WORKLOAD, MERGING = "tests.search.sharded", "tests.search.sharded_and_merged"


pytestmark = pytest.mark.usefixtures("sigterm_as_before")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of seven pictures, some of them in folders of their own."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for number, name in enumerate(("a", "b", "c", "sub/a", "sub/b c", "sub/deep/a", "z")):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + number, 40), dtype=np.uint8)).save(path)
    (folder / ".hidden.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """Return what makes a checkpoint that tells the fake workload how to go wrong."""

    def write(**values: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "told.json").write_text(json.dumps(values))
        return folder

    return write


def predict(name: str, checkpoint: Path, images: Path, out: Path, workers: int = 2) -> tuple[list[Path], str]:
    stream = io.StringIO()
    request = Request(workload=name, checkpoint=checkpoint, source=images, out=out, workers=workers)
    return inference.run(request, stream), stream.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.ray
@pytest.mark.row("K34")
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workload", [pairs, telescope])
def test_two_workers_write_what_one_process_does_byte_for_byte(
    workload: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "trained"
    epochs = workload.train(workload.Config.debug())
    next(epochs).save(checkpoint)
    epochs.close()
    (images / ".hidden.png").unlink()
    workload.predict(checkpoint, images, tmp_path / "alone")
    name = workload.__name__.rpartition(".")[2]
    written, _ = predict(name, checkpoint, images, tmp_path / "together")
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")
    assert len(written) == 2 * 7
    assert {str(path.relative_to(tmp_path / "together")) for path in written} == set(hashes(tmp_path / "alone"))


@pytest.mark.ray
@pytest.mark.row("K34")
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_make_one_submission_of_spacecraft_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    checkpoint, alone, together = (tmp_path / name for name in ("trained", "alone", "together"))
    epochs = spark.train(spark.Config.debug())
    next(epochs).save(checkpoint)
    epochs.close()
    source = generator.ensure(Synthetic(samples=40, size=80, test_images=7), tmp_path) / generator.TEST_FOLDER
    spark.predict(checkpoint, source, alone)
    words = ["predict", "spark", str(checkpoint), str(source), "--workers", "2", "--out", str(together)]
    assert command.main(words) == DONE
    assert hashes(together) == hashes(alone)
    assert len(hashes(alone)) == 2 * 7 + 1
    assert capsys.readouterr().out.splitlines() == [str(together / name) for name in sorted(hashes(together))]


@pytest.mark.ray
@pytest.mark.row("K34")
@pytest.mark.usefixtures("ray_cluster")
def test_the_share_of_a_killed_worker_is_done_again(images: Path, told: Any, tmp_path: Path) -> None:
    checkpoint = told(deadly="b.png", times=1)
    written, said = predict(WORKLOAD, checkpoint, images, tmp_path / "out")
    assert json.loads((checkpoint / "told.json").read_text())["times"] == 0, "a worker has died"
    calls = [line.split() for line in (checkpoint / "calls.txt").read_text().splitlines()]
    assert sorted(int(count) for _, count in calls) == [3, 3, 4]
    lengths = {path.name: int(path.read_text()) for path in written}
    assert len(written) == 7
    assert all(
        int((tmp_path / "out" / path.relative_to(images)).with_suffix(".txt").read_text()) == path.stat().st_size
        for path in images.rglob("[a-z]*.png")
    )
    assert lengths["b c.txt"] == (images / "sub/b c.png").stat().st_size
    assert said.splitlines()[-1].startswith("predict: 2 of 2 shares done, ")
    assert not (tmp_path / "out" / inference.SHARES).exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_share_that_kills_every_worker_ends_the_prediction(images: Path, told: Any, tmp_path: Path) -> None:
    checkpoint = told(deadly="b.png", times=99)
    with pytest.raises(SearchError, match="a share of 3 files lost its worker 3 times"):
        predict(WORKLOAD, checkpoint, images, tmp_path / "out")
    assert hashes(tmp_path / "out") == {}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_files_are_as_many_shares_as_files(images: Path, told: Any, tmp_path: Path) -> None:
    checkpoint = told()
    written, said = predict(WORKLOAD, checkpoint, images / "sub", tmp_path / "out", workers=9)
    assert len(written) == 3
    assert "3 of 3 shares done" in said


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_file_that_the_workload_refuses_is_named_as_the_user_knows_it(
    images: Path, told: Any, tmp_path: Path
) -> None:
    checkpoint = told(refused="sub/b c.png")
    with pytest.raises(BadInput) as refusal:
        predict(WORKLOAD, checkpoint, images, tmp_path / "out")
    assert str(refusal.value) == f"{images}/sub/b c.png: no picture"
    checkpoint = told(broken="c.png")
    with pytest.raises(SearchError, match=r"(?s)a share of 4 files failed.*ZeroDivisionError: no length"):
        predict(WORKLOAD, checkpoint, images, tmp_path / "out")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_summary_is_merged_once_or_refused(
    images: Path, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = told(summary=True)
    written, _ = predict(MERGING, checkpoint, images, tmp_path / "merged")
    summary = (tmp_path / "merged" / "summary.csv").read_text().splitlines()
    assert summary == ["a.png", "b.png", "c.png", "sub/a.png", "sub/b c.png", "sub/deep/a.png", "z.png"]
    assert len(written) == 8
    with pytest.raises(SearchError, match=r"each share wrote its own summary\.csv; give the workload a function merge"):
        predict(WORKLOAD, checkpoint, images, tmp_path / "refused")
    alone, _ = predict(WORKLOAD, checkpoint, images, tmp_path / "alone", workers=1)
    assert len(alone) == 8
    module = inference.workload.load(MERGING)
    monkeypatch.setattr(module, "merge", lambda out, source: int("no archive"))
    with pytest.raises(BadInput, match="no archive"):
        predict(MERGING, checkpoint, images, tmp_path / "merged")


def test_an_output_folder_that_cannot_be_made_is_named(
    images: Path, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference.ray_session, "room", lambda: Room(2.0, 0.0, "this machine"))
    (tmp_path / "file").touch()
    words = ["predict", WORKLOAD, str(told()), str(images), "--out", str(tmp_path / "file")]
    assert command.main(words) == BAD_INPUT
    assert capsys.readouterr().err == f"python -m search: {tmp_path}/file/.shares: Not a directory\n"


def test_what_shares_wrote_alike_is_kept_once(tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
        (folder / "legend.txt").write_text("the same")
        (folder / f"{folder.name}.txt").write_text("own")
    written = inference.gather(folders, tmp_path / "out", merges=False)
    assert [path.name for path in written] == ["1.txt", "2.txt", "legend.txt"]


def test_shares_are_even_whole_and_never_empty() -> None:
    files = [str(number) for number in range(7)]
    for workers in (1, 2, 3, 7, 20):
        parts = inference.shares(files, workers)
        assert sorted(name for part in parts for name in part) == files
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == min(workers, 7)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "fits"),
    [(4, 1.0, 0.0, True), (5, 1.0, 0.0, False), (2, 1.0, 1.0, True), (3, 1.0, 1.0, False), (3, 1.0, 0.5, True)],
)
def test_more_workers_than_there_can_ever_be_are_refused(workers: int, cpus: float, gpus: float, fits: bool) -> None:
    request = Request(
        workload="pairs",
        checkpoint=Path(),
        source=Path(),
        out=Path(),
        workers=workers,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
    )
    tasks.check(request, Room(0.0, 0.0, "a cluster", grows=True))
    if fits:
        tasks.check(request, Room(4.0, 2.0, "this machine"))
    else:
        with pytest.raises(BadInput, match=rf"--workers: {workers} x .* this machine has 4 CPU, 2 GPU; lower"):
            tasks.check(request, Room(4.0, 2.0, "this machine"))


def test_a_line_says_that_nothing_has_begun_and_how_far_it_is(tmp_path: Path) -> None:
    request = Request(workload="pairs", checkpoint=tmp_path, source=tmp_path, out=tmp_path, workers=2)
    assert inference.status(0, 2, tmp_path / "no", request, 61) == (
        "predict: waiting for workers of 1 CPU, 0 GPU, 1 min 01 s"
    )
    out = tmp_path / "0" / "attempt" / "out"
    out.mkdir(parents=True)
    (out / "a.png").touch()
    assert inference.status(0, 2, tmp_path, request, 2) == "predict: 0 of 2 shares done, 1 files written, 2 s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toyy", "checkpoint", "images"], "workload 'toyy' not found; did you mean 'toy'?"),
        (["pairs", "nowhere", "images"], "nowhere: no such checkpoint folder"),
        (["pairs", "checkpoint", "nowhere"], "nowhere: no such folder; for a single file there is"),
        (["pairs", "checkpoint", "images/a.png"], "images/a.png: no such folder; for a single file there is"),
        (["pairs", "checkpoint", "empty"], "empty: holds no picture"),
        (["toy", "checkpoint", "empty"], "empty: holds no files; expected the images to predict"),
        (["toy", "checkpoint", "images", "--workers", "999"], "--workers: 999 x (1 CPU, 0 GPU) = 999 CPU, 0 GPU, but"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    words: list[str],
    message: str,
    images: Path,
    told: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference.ray_session, "room", lambda: Room(2.0, 0.0, "this machine"))
    monkeypatch.setattr(inference, "RaySession", lambda room: pytest.fail("Ray was started"))
    told()
    (tmp_path / "empty").mkdir()
    assert command.main(["predict", *words]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m search: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers", "two"], ["--gpus-per-worker", "-1"]])
def test_impossible_amounts_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["predict", "pairs", "checkpoint", "images", *words])
    assert end.value.code == BAD_INPUT
    assert f"got '{words[1]}'; expected a" in capsys.readouterr().err
