"""The telescope workload's parts that need no network: synthetic data, run log, focal plane, composites."""

import csv
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from segmentation.epoch import DataError
from workloads._telescope import figures, focal_plane, generator, runlog
from workloads._telescope.generator import Synthetic

ROW = dict.fromkeys(runlog.COLUMNS["noEL"][1:], 0)


def test_pictures_depend_on_seed_and_number_only():
    few, many = generator.pictures(Synthetic(samples=12)), generator.pictures(Synthetic(samples=20))
    assert all(
        np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) for a, b in zip(few, many, strict=False)
    )
    assert not np.array_equal(few[0].image, generator.picture(Synthetic(samples=12, seed=1), 0).image)


def test_every_class_occurs_and_can_be_seen():
    made = generator.pictures(Synthetic(samples=40, noise=4.0))
    masks = np.stack([picture.mask for picture in made])
    assert (masks.any(axis=(2, 3)).sum(axis=0) >= 10).all()
    assert sum(not mask.any() for mask in masks) == 8
    for picture in made:
        if picture.mask.any():
            inside, outside = picture.image[picture.mask.any(axis=0)], picture.image[~picture.mask.any(axis=0)]
            assert inside.mean() > outside.mean() + 3 * 4.0


def test_events_have_the_shape_of_their_cause():
    def extent(mask):
        rows, columns = np.nonzero(mask)
        return np.ptp(rows) + 1, np.ptp(columns) + 1

    rng = np.random.default_rng(0)
    stripe, line, blob = (maker(rng, 32) for maker in (generator._stripe, generator._line, generator._blob))
    height, width = extent(stripe > stripe.max() / 2)
    assert width > 2 * height
    height, width = extent(line > 0)
    assert width == 1
    assert height > 5
    height, width = extent(blob > blob.max() / 4)
    assert abs(height - width) <= 1


@pytest.mark.row("A4")
def test_names_hold_a_colon_and_several_dots():
    names = [generator.name(number) for number in range(300)]
    assert len(set(names)) == 300
    assert all(name.count(":") == 1 and name.count(".") == 3 for name in names)


def test_synthetic_folder_appears_whole_and_only_once(tmp_path):
    config = Synthetic(samples=12)
    first = generator.ensure(config, tmp_path)
    stamp = {path: path.stat().st_mtime_ns for path in first.rglob("*.png")}
    assert generator.ensure(config, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.png")} == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert generator.ensure(Synthetic(samples=13), tmp_path) != first


def test_a_maker_that_comes_second_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    config, whole = Synthetic(samples=12), generator.write

    def overtaken(config, root):
        whole(config, root)
        whole(config, generator.folder(config, tmp_path))

    monkeypatch.setattr(generator, "write", overtaken)
    assert len(list(generator.ensure(config, tmp_path).rglob("*.png"))) > 12
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot write the synthetic pictures .* SEGMENTATION_CACHE"):
        generator.ensure(Synthetic(samples=12), tmp_path / "file")


def test_synthetic_refuses_too_few_samples():
    with pytest.raises(ValueError, match="samples: got 3; expected at least 12"):
        Synthetic(samples=3)


@pytest.mark.row("A21", "A22", "A23")
def test_run_log_columns_are_the_originals():
    head = "run_id,timestamp,epochs,batch_size,num_workers,dataset_size,train_loss,val_loss,best_val_iou,"
    tail = ",pixel_acc,gpu_used,train_time_hms"
    assert ",".join(runlog.COLUMNS["noEL"]) == f"{head}iou_cosmic,iou_pointsrc{tail}"
    assert ",".join(runlog.COLUMNS["withEL"]) == f"{head}iou_cr,iou_ps,iou_el{tail}"
    assert [len(runlog.COLUMNS[variant]) for variant in ("noEL", "withEL")] == [14, 15]
    assert runlog.FILES == {"noEL": "run_log_multilabel_noEL.csv", "withEL": "checkpoints_multilabel_withEL.csv"}


@pytest.mark.row("A21", "A22")
def test_run_log_writes_one_header_and_counts_runs(tmp_path):
    path = tmp_path / "log.csv"
    assert [runlog.append(path, "noEL", {**ROW, "gpu_used": None}) for _ in range(3)] == [1, 2, 3]
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(runlog.COLUMNS["noEL"])
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
    assert next(csv.DictReader(lines))["gpu_used"] == ""


def _append_many(path: Path) -> None:
    for _ in range(25):
        runlog.append(path, "noEL", ROW)


@pytest.mark.row("A21")
def test_run_log_survives_two_runs_that_end_together(tmp_path):
    path = tmp_path / "log.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(runlog.COLUMNS["noEL"])
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 51))
    assert {len(row) for row in rows} == {14}


@pytest.mark.row("A21")
def test_run_log_mends_a_line_without_end(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(",".join(runlog.COLUMNS["noEL"]) + "\n1,half")
    assert runlog.append(path, "noEL", ROW) == 2
    assert path.read_text().splitlines()[1:] == ["1,half", "2" + ",0" * 13]


@pytest.mark.row("A23")
def test_run_log_refuses_fields_of_the_other_variant(tmp_path):
    with pytest.raises(ValueError, match="iou_cosmic"):
        runlog.append(tmp_path / "log.csv", "withEL", ROW)
    runlog.append(tmp_path / "log.csv", "noEL", ROW)
    with pytest.raises(DataError, match=r"log\.csv: header"):
        runlog.append(tmp_path / "log.csv", "withEL", dict.fromkeys(runlog.COLUMNS["withEL"][1:], 0))


@pytest.mark.row("A22")
@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (1323, "0:22:03"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_run_log_writes_hours_minutes_seconds(seconds, text):
    assert runlog.hms(seconds) == text


@pytest.mark.row("A32")
def test_composite_paints_later_classes_over_earlier_and_the_threshold_is_strict():
    probs = np.array([[[0.9, 0.9, 0.9, 0.5]], [[0.1, 0.6, 0.6, 0.5]], [[0.1, 0.1, 0.7, 0.5]]])
    expected = [[[220, 20, 60], [255, 105, 180], [255, 255, 0], [0, 0, 0]]]
    picture = figures.composite_map(probs)
    assert picture.dtype == np.uint8
    assert picture.tolist() == expected
    assert figures.composite_map(probs, thr=0.65).tolist() == [[[220, 20, 60], [220, 20, 60], [255, 255, 0], [0, 0, 0]]]


def _plane(count: int = 300, size: int = 32) -> focal_plane.FocalPlane:
    rng = np.random.default_rng(3)
    radius, angle = 0.01 * np.sqrt(rng.uniform(size=count)), rng.uniform(0, 2 * np.pi, count)
    uid = [f"det{number:04d}" for number in range(count)]
    return focal_plane.focal_plane(uid, radius * np.cos(angle), radius * np.sin(angle), size=size)


@pytest.mark.row("A40")
def test_linear_field_is_exact_on_the_grid_and_back():
    plane = _plane()
    field = 3 + 200 * plane.x - 120 * plane.y
    frame = focal_plane.frames(plane, field[:, None])[0]
    columns = np.linspace(plane.x.min(), plane.x.max(), 32)
    rows = np.linspace(plane.y.min(), plane.y.max(), 32)
    truth = 3 + 200 * columns[None, :] - 120 * rows[:, None]
    assert plane.valid.mean() > 0.6
    np.testing.assert_allclose(frame[plane.valid], truth[plane.valid], atol=1e-5)
    assert (frame[~plane.valid] == 0).all()
    back = focal_plane.at_detectors(plane, frame[None])[0]
    inner = np.hypot(plane.x, plane.y) < 0.85 * np.hypot(plane.x, plane.y).max()
    np.testing.assert_allclose(back[inner], field[inner], atol=1e-5)
    cell = 320 * np.ptp(plane.x) / 31
    assert np.abs(back - field).max() < cell


@pytest.mark.row("A40")
def test_hits_have_seven_columns_and_a_threshold_for_each_class(tmp_path):
    plane = _plane(120)
    maps = np.zeros((2, 32, 32))
    maps[0, :, 16:], maps[1] = 0.8, 0.4
    rows = focal_plane.hits(plane, maps, start=10, stop=42, classes=("cr", "ps"), thresholds=(0.5, 0.5))
    right = {uid for uid, x in zip(plane.uid, plane.x, strict=True) if x > 0.001}
    assert right <= {row["det_uid"] for row in rows}
    assert {row["labels"] for row in rows} == {"cr"}
    assert list(rows[0]) == [
        "slice_from",
        "slice_to",
        "det_uid",
        "sky_x_rad",
        "sky_y_rad",
        "prob_cr",
        "prob_ps",
        "labels",
    ]
    both = focal_plane.hits(plane, maps, start=10, stop=42, classes=("cr", "ps"), thresholds=(0.5, 0.3), every=True)
    assert len(both) == 120
    assert {row["labels"] for row in both} == {"cr|ps", "ps"}
    focal_plane.write_hits(rows, ("cr", "ps"), tmp_path / "hits.csv")
    read = list(csv.DictReader((tmp_path / "hits.csv").read_text().splitlines()))
    assert len(read) == len(rows)
    assert (read[0]["slice_from"], read[0]["slice_to"]) == ("10", "42")


@pytest.mark.row("A40")
def test_slices_reduce_the_video():
    video = np.arange(4.0)[:, None, None] * np.ones((4, 2, 2))
    assert [focal_plane.slice_picture(video, 1, 4, how)[0, 0] for how in ("max", "sum", "mean")] == [3, 6, 2]
    with pytest.raises(ValueError, match="got 3:9"):
        focal_plane.slice_picture(video, 3, 9)


@pytest.mark.row("A40")
def test_high_pass_removes_drift_and_keeps_a_spike():
    time = np.arange(4000) / 400
    drift = 5 * np.sin(2 * np.pi * 0.1 * time)
    spike = np.where(np.arange(4000) == 2500, 10.0, 0.0)
    filtered = focal_plane.high_pass(np.stack([drift, drift + spike]), 400.0)
    assert np.abs(filtered[0, 500:]).max() < 0.01
    assert filtered[1].argmax() == 2500
    assert filtered[1, 2500] > 9
    with pytest.raises(ValueError, match="cut_hz"):
        focal_plane.high_pass(drift[None], 3.0)


@pytest.mark.row("A40")
def test_detectors_on_one_line_are_refused():
    with pytest.raises(DataError, match="on one line"):
        focal_plane.focal_plane(["a", "b", "c"], np.arange(3.0), np.arange(3.0) * 2)
    with pytest.raises(DataError, match="2 different uids for 3"):
        focal_plane.focal_plane(["a", "b", "b"], np.arange(3.0), np.arange(3.0) ** 2)
