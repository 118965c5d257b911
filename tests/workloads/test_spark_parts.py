"""The spark workload's parts that need no network: reader, generator, samples, evaluation, submission, run folder."""

import csv
import dataclasses
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import networks, splits
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.networks import Network
from segmentation.splits import TestSplitError
from workloads._spark import classes, dataset, evaluation_files, generator, reader, submission, training_files
from workloads._spark.dataset import Data
from workloads._spark.generator import Synthetic
from workloads._spark.training_files import Architecture, RunFolder

SMALL = Synthetic(samples=80, size=64, test_images=4)
MASK = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return generator.ensure(SMALL, tmp_path_factory.mktemp("generated"))


@pytest.fixture
def data(tree, tmp_path):
    return Data(root=str(tree), target_size=32, cache=str(tmp_path / "cache"))


def _tree(root: Path, rows, *, columns=reader.COLUMNS, part="train") -> Path:
    """Write a CSV and, for each row, a picture and a mask of 8x8 pixels."""
    for satellite, image, mask in rows:
        for kind, name in (("images", image), ("mask", mask)):
            path = root / kind / satellite / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    with (root / f"{part}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return root


def _find(root: Path, part="train"):
    return reader.find(part, root / f"{part}.csv", root / "images", root / "mask")


def _saved(path: Path, pixels, **options) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def _opened(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


# Classes and colours


@pytest.mark.row("K9")
def test_classes_are_background_body_panels_in_black_red_blue():
    assert classes.CLASSES == ("background", "body", "panels")
    assert classes.paint(MASK).tolist() == [
        [[0, 0, 0], [255, 0, 0], [0, 0, 255]],
        [[0, 0, 255], [255, 0, 0], [0, 0, 0]],
    ]


@pytest.mark.row("K9")
def test_no_other_file_of_the_workload_names_a_colour():
    folder = Path(classes.__file__).parent
    naming = [path.name for path in folder.glob("*.py") if "(255, 0, 0)" in path.read_text()]
    assert naming == ["classes.py"]


def test_a_pixel_has_the_class_of_the_nearest_colour():
    near = [[200, 40, 60], [100, 30, 20], [30, 20, 140], [90, 0, 250], [250, 0, 251], [140, 120, 120]]
    assert classes.nearest_class(np.array([near], np.uint8))[0].tolist() == [[1, 0, 2, 2, 2, 1]]


@pytest.mark.row("K11")
def test_classes_are_those_of_the_smallest_distance():
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    distance = np.linalg.norm(colours[..., None, :].astype(float) - np.array(classes.COLOURS), axis=-1)
    assert np.array_equal(classes.nearest_class(colours)[0], distance.argmin(axis=-1))


def test_stray_pixels_are_those_inside_not_those_along_edges():
    line, area = np.zeros((2, 10, 10, 3), np.uint8)
    line[:, 4:6] = area[2:7, 2:7] = (0, 255, 0)
    assert classes.nearest_class(line)[1] == 0
    assert classes.nearest_class(area)[1] == 9 / 100


@pytest.mark.row("K11")
def test_of_two_colours_equally_near_the_first_counts():
    # (200, 0, 200) is as far from red as from blue. No whole number is as far from black as from red.
    assert classes.nearest_class(np.array([[[200, 0, 200]]], np.uint8))[0].tolist() == [[classes.BODY]]


@pytest.mark.row("K11")
@pytest.mark.parametrize("quality", [75, 95])
def test_a_jpeg_mask_decodes_to_more_than_99_percent_of_its_source(tmp_path, quality):
    for number in range(20):
        mask = generator.picture(Synthetic(), number).mask
        path = _saved(tmp_path / "mask.jpg", classes.paint(mask), quality=quality)
        assert (_opened(path) != classes.paint(mask)).any()
        assert (reader.read_mask(path) == mask).mean() > 0.99


@pytest.mark.shared_data
def test_shared_masks_survive_jpeg(shared_data, tmp_path):
    paths = sorted((shared_data / "spark" / "masks").glob("*.png"))
    assert len(paths) == 6
    for path in paths:
        mask = _opened(path)
        jpeg = _saved(tmp_path / "mask.jpg", classes.paint(mask), quality=75)
        assert (reader.read_mask(jpeg) == mask).mean() > 0.99


@pytest.mark.row("K11")
def test_classes_are_mapped_before_or_after_resizing_with_one_result(tree):
    path = next((tree / "mask" / "XMM Newton" / "train").glob("*.jpg"))
    first, after = (reader.read_mask(path, 24, order=order) for order in ("classes_first", "rgb_first"))
    assert first.shape == (24, 24)
    assert set(np.unique(first)) == {0, 1, 2}
    assert np.array_equal(first, after)


@pytest.mark.row("K11")
def test_a_mask_in_other_colours_is_refused_and_named(tmp_path):
    green = np.zeros((64, 64, 3), np.uint8)
    green[20:40, 20:40] = (0, 255, 0)
    path = _saved(tmp_path / "green.png", green)
    with pytest.raises(DataError, match=r"green\.png: 7\.9% of its pixels are more than 100 away .* data\.max_stray"):
        reader.read_mask(path)
    assert not reader.read_mask(path, max_stray=0.1).any()


def test_a_grey_mask_of_class_ids_is_refused_but_a_black_one_is_background(tmp_path):
    with pytest.raises(DataError, match=r"ids\.png: is grey, up to 2; expected the colours .* workload pairs"):
        reader.read_mask(_saved(tmp_path / "ids.png", MASK))
    assert not reader.read_mask(_saved(tmp_path / "black.png", MASK * 0)).any()


# Reader


@pytest.mark.row("K10")
def test_generated_tree_is_read_with_a_space_in_a_class(tree):
    found = _find(tree) + _find(tree, "val")
    assert {source.satellite for source in found} == set(classes.SATELLITES)
    assert len(found) == SMALL.samples
    newton = next(source for source in found if source.satellite == "XMM Newton")
    assert newton.mask.parent.parent == tree / "mask" / "XMM Newton"
    assert newton.name == f"XMM Newton/{newton.part}/{newton.image.name}"


@pytest.mark.row("K10")
def test_rows_whose_files_are_missing_are_counted_and_listed(tmp_path):
    rows = [("Soho", f"{number}_img.jpg", f"{number}_layer.jpg") for number in range(10)]
    root = _tree(tmp_path, rows)
    for number in range(7):
        (root / "mask" / "Soho" / "train" / f"{number}_layer.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.csv: 7 of 10 rows lack a file: .*/0_layer\.jpg.*/6_layer\.jpg; put"):
        _find(root)


@pytest.mark.row("K10")
def test_a_missing_class_folder_is_a_missing_file(tmp_path):
    root = _tree(tmp_path, [("Soho", "a.jpg", "b.jpg")])
    (root / "mask").rename(root / "masks")
    with pytest.raises(DataError, match=r"1 of 1 rows lack a file: .*/mask/Soho/train/b\.jpg"):
        _find(root)


@pytest.mark.row("K10")
def test_missing_columns_are_named_with_those_that_are_there(tmp_path):
    root = _tree(tmp_path, [("Soho", "a.jpg", "b.jpg")], columns=("Class", "image", "mask"))
    with pytest.raises(DataError, match="no column Image name, Mask name; it has Class, image, mask"):
        _find(root)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("Class,Image name,Mask name\n", "holds no row"),
        ("", "no column Class, Image name, Mask name; it has none"),
        ("Class,Image name,Mask name\nSoho,,b.jpg\nSoho,a.jpg\n", "2 rows with an empty cell, in lines 2, 3"),
        (b"Class,Image name,Mask name\n\xff\xfe\n", "cannot be read as CSV"),
    ],
)
def test_a_csv_that_says_too_little_is_refused(tmp_path, content, problem):
    (tmp_path / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=problem):
        _find(tmp_path)


def test_a_csv_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train\.csv: no such file; expected columns Class"):
        _find(tmp_path)


def test_a_row_that_stands_there_twice_is_refused(tmp_path):
    rows = [("Soho", "a.jpg", "b.jpg"), ("Smart1", "a.jpg", "b.jpg"), ("Soho", "a.jpg", "c.jpg")]
    with pytest.raises(DataError, match=r"1 pictures stand in it twice: Soho/train/a\.jpg;"):
        _find(_tree(tmp_path, rows))


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    root = _tree(tmp_path, [("Soho", "a.jpg", "b.jpg")])
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + (root / "train.csv").read_bytes())
    assert [source.satellite for source in _find(root)] == ["Soho"]


@pytest.mark.row("K29")
def test_test_images_are_found_whatever_the_case_of_their_suffix(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.Png", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in reader.test_images(tmp_path)] == ["a.jpeg", "b.JPG", "c.Png"]
    assert reader.test_images(tmp_path / "b.JPG") == [tmp_path / "b.JPG"]
    with pytest.raises(DataError, match=r"folder\.jpg: holds no \.jpg, \.jpeg, \.png file"):
        reader.test_images(tmp_path / "folder.jpg")
    with pytest.raises(DataError, match="no such file or folder"):
        reader.test_images(tmp_path / "elsewhere")


# Generator


def test_a_picture_depends_on_seed_and_number_only():
    one, same, other = (generator.picture(Synthetic(samples=8 + n, seed=n // 2), 3) for n in range(3))
    assert np.array_equal(one.image, same.image) and np.array_equal(one.mask, same.mask)
    assert not np.array_equal(one.image, other.image)


def test_every_picture_shows_body_and_panels_that_can_be_seen():
    for number in range(40):
        made = generator.picture(SMALL, number)
        shares = np.bincount(made.mask.ravel(), minlength=3) / made.mask.size
        assert min(shares) > 0.005, number
        assert np.median(made.image[made.mask == classes.BODY]) > 40
        panels = made.image[made.mask == classes.PANELS].mean(axis=0)
        assert panels[2] > panels[0]


def test_generated_csv_files_hold_every_satellite_and_a_quarter_in_val(tree):
    train, val = _find(tree), _find(tree, "val")
    assert (len(train), len(val)) == (60, 20)
    assert {source.satellite for source in val} == {source.satellite for source in train} == set(classes.SATELLITES)
    assert (tree / "train.csv").read_text().splitlines()[0] == "Class,Image name,Mask name"
    assert all(path.name.endswith("_layer.jpg") for path in (tree / "mask").rglob("*.jpg"))
    names = [path.name for path in reader.test_images(tree / generator.TEST_FOLDER)]
    assert names == [f"test_{number:05d}_img.jpg" for number in range(4)]


def test_generated_folder_appears_whole_and_only_once(tmp_path):
    config = Synthetic(samples=8, size=32, test_images=1)
    first = generator.ensure(config, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")}
    assert generator.ensure(config, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")} == stamps
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_generator_killed_half_way_leaves_no_folder_under_the_name(tmp_path, monkeypatch):
    config = Synthetic(samples=8, size=32)

    def killed(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(generator, "_save", killed)
    with pytest.raises(DataError, match=r"cannot write the synthetic pictures \(disk full\)"):
        generator.ensure(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_generator_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="samples: got 3; expected at least 8"):
        Synthetic(samples=3)
    with pytest.raises(ValueError, match="mask_quality: got 0; expected 1 to 95"):
        Synthetic(mask_quality=0)


# Samples and splits


def test_samples_are_squares_of_the_target_size_and_test_is_sealed(data):
    samples, made = dataset.load(data)
    assert len(samples) == SMALL.samples
    assert samples.image(made.train[0]).shape == (3, 32, 32)
    assert samples.mask(made.train[0]).shape == (32, 32)
    with pytest.raises(TestSplitError):
        samples.image(made.test[0])
    with splits.test_split_open():
        assert set(np.unique(samples.mask(made.test[0]))) <= {0, 1, 2}


def test_mask_and_image_are_those_of_their_row(data, tree):
    samples, made = dataset.load(data)
    number = {samples.names[index]: index for index in made.train}
    for source in dataset.deal(data)["train"][:5]:
        index = number[source.name]
        picture = Image.fromarray(_opened(source.image)).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(samples.image(index), np.asarray(picture).transpose(2, 0, 1))
        assert np.array_equal(samples.mask(index), reader.read_mask(source.mask, 32))
        assert dataset.satellites(samples, [index]) == [source.satellite]


def test_val_csv_is_the_test_split_and_a_part_of_train_csv_chooses(data):
    dealt = dataset.deal(data)
    assert {name: len(sources) for name, sources in dealt.items()} == {"train": 51, "validation": 9, "test": 20}
    assert {source.part for source in dealt["test"]} == {"val"}
    assert {source.part for source in dealt["train"] + dealt["validation"]} == {"train"}


def test_from_train_leaves_val_csv_to_choose(data):
    dealt = dataset.deal(_with(data, test="from_train"))
    assert {source.part for source in dealt["validation"]} == {"val"}
    assert {source.part for source in dealt["train"] + dealt["test"]} == {"train"}
    assert len(dealt["test"]) == 9


def test_held_out_samples_are_spread_over_satellites_and_follow_the_seed(data):
    first, again, other = (dataset.deal(_with(data, held_out=1 / 3, split_seed=seed)) for seed in (0, 0, 1))
    assert set(Counter(source.satellite for source in first["validation"]).values()) == {2}
    assert first == again
    assert {s.name for s in first["validation"]} != {s.name for s in other["validation"]}


@pytest.mark.row("K19")
def test_downsample_takes_n_and_a_tenth_with_satellites_in_proportion(data):
    dealt = dataset.deal(_with(data, downsample=40))
    assert {name: len(sources) for name, sources in dealt.items()} == {"train": 40, "validation": 4, "test": 4}
    counts = Counter(source.satellite for source in dealt["train"])
    assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 1
    samples, made = dataset.load(_with(data, downsample=5))
    assert (len(samples), len(made.train), len(made.validation), len(made.test)) == (7, 5, 1, 1)


@pytest.mark.row("K19")
def test_downsample_follows_unequal_satellites_and_more_holds_less():
    shares = {"Soho": 60, "Cheops": 30, "XMM Newton": 10}
    sources = [
        reader.Source(f"{name}/{number}", name, "train", Path(), Path())
        for name, count in shares.items()
        for number in range(count)
    ]
    ordered = dataset.in_proportion(sources, seed=0)
    assert Counter(source.satellite for source in ordered[:20]) == {"Soho": 12, "Cheops": 6, "XMM Newton": 2}
    assert dataset.in_proportion(sources[::-1], seed=0) == ordered
    assert dataset.in_proportion(sources, seed=1)[:20] != ordered[:20]


def test_manifest_warns_of_a_downsample_that_is_larger_than_the_data(data):
    assert len(dataset.deal(_with(data, downsample=52))["train"]) == 51
    warnings = dataset.manifest(_with(data, downsample=52))["warnings"]
    assert "data.downsample wants 52 samples to train on, and there are 51" in warnings


def test_one_row_cannot_be_trained_on_and_held_out(tmp_path):
    root = _tree(tmp_path, [("Soho", "a.jpg", "b.jpg")])
    with pytest.raises(DataError, match=r"train\.csv: 1 rows; expected at least 2"):
        dataset.deal(Data(root=str(root)))


def test_image_and_mask_of_different_sizes_are_named(tmp_path):
    for part in ("train", "val"):
        _tree(tmp_path, [("Soho", "a.png", "b.png"), ("Soho", "c.png", "d.png")], part=part)
    _saved(tmp_path / "mask" / "Soho" / "train" / "b.png", np.zeros((4, 8, 3)))
    with pytest.raises(DataError, match=r"a\.png: is 8x8, its mask .*b\.png is 8x4; they must have one size"):
        dataset.load(Data(root=str(tmp_path), target_size=8, cache=str(tmp_path / "cache")))


def test_an_unreadable_picture_is_named(tmp_path):
    for part in ("train", "val"):
        _tree(tmp_path, [("Soho", "a.jpg", "b.jpg"), ("Soho", "c.jpg", "d.jpg")], part=part)
    (tmp_path / "images" / "Soho" / "val" / "c.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match=r"val/c\.jpg: unreadable or truncated"):
        dataset.load(Data(root=str(tmp_path), target_size=8, cache=str(tmp_path / "cache")))


@pytest.mark.row("K18")
def test_other_places_for_csv_and_folders_are_used(tree, tmp_path):
    for name in ("train.csv", "val.csv", "images", "mask"):
        (tmp_path / f"other_{name}").symlink_to(tree / name)
    places = {"train_csv": "train.csv", "val_csv": "val.csv", "image_root": "images", "mask_root": "mask"}
    given = {field: str(tmp_path / f"other_{name}") for field, name in places.items()}
    assert len(dataset.find(Data(root=str(tmp_path), **given), "train")) == 60


@pytest.mark.shared_data
def test_shared_pictures_come_through_the_layout(shared_data, tmp_path):
    truth = {}
    for part, numbers in {"train": ("00", "03", "06", "09"), "val": ("12", "15")}.items():
        rows = [("XMM Newton", f"{number}_img.jpg", f"{number}_layer.jpg") for number in numbers]
        _tree(tmp_path, rows, part=part)
        for (satellite, image, mask), number in zip(rows, numbers, strict=True):
            truth[f"{satellite}/{part}/{image}"] = _opened(shared_data / "spark" / "masks" / f"{number}.png")
            picture = _opened(shared_data / "spark" / "images" / f"{number}.png")
            _saved(tmp_path / "images" / satellite / part / image, picture, quality=95)
            colours = classes.paint(truth[f"{satellite}/{part}/{image}"])
            _saved(tmp_path / "mask" / satellite / part / mask, colours, quality=75)
    data = Data(root=str(tmp_path), held_out=0.25, cache=str(tmp_path / "cache"))
    samples, made = dataset.load(data)
    assert (len(made.train), len(made.validation), len(made.test)) == (3, 1, 2)
    for index in made.train + made.validation:
        assert samples.image(index).shape == (3, 512, 512)
        assert (samples.mask(index) == truth[samples.names[index]]).mean() > 0.99
    # One of the six shows no panels; all show a spacecraft.
    assert not [warning for warning in dataset.manifest(data)["warnings"] if "background only" in warning]


def test_manifest_counts_satellites_and_class_shares(data):
    told = dataset.manifest(data)
    assert told["samples"] == {"train": 51, "validation": 9, "test": 20}
    assert {name: sum(counts.values()) for name, counts in told["satellites"].items()} == told["samples"]
    assert told["satellites"]["test"]["XMM Newton"] == 2
    assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in told["class_shares"].values())
    assert told["class_shares"]["train"]["background"] > 0.5
    assert told["synthetic"] is False
    [warning] = told["warnings"]
    assert warning.startswith("split validation has no picture of ")
    assert json.loads(json.dumps(told)) == told


def test_manifest_warns_of_splits_without_a_class_and_of_empty_masks(tmp_path):
    for part in ("train", "val"):
        _tree(tmp_path, [("Soho", "a.jpg", "b.jpg"), ("Soho", "c.jpg", "d.jpg")], part=part)
    warnings = dataset.manifest(Data(root=str(tmp_path), target_size=8, cache=str(tmp_path / "cache")))["warnings"]
    assert "split train has no pixel of body, panels; try another data.split_seed" in warnings
    assert any(warning.startswith("4 masks show background only") for warning in warnings)


def test_synthetic_data_says_so_loudly(tmp_path, caplog):
    data = Data(synthetic=Synthetic(samples=40, size=32, mask_quality=95), target_size=32, cache=str(tmp_path))
    told = dataset.manifest(data)
    assert told["synthetic"] is True
    assert told["warnings"][0].startswith("SYNTHETIC DATA: data.root is not given, so 40 generated pictures")
    dataset.warn_if_synthetic(data)
    assert "SYNTHETIC DATA" in caplog.text


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="target_size: got 0; expected 1 or more"):
        Data(target_size=0)
    with pytest.raises(ValueError, match=r"held_out: got 1\.0; expected more than 0, and less than 1"):
        Data(held_out=1.0)
    with pytest.raises(DataError, match=r"elsewhere: no such folder; data\.root should hold train\.csv"):
        dataset.deal(Data(root=str(tmp_path / "elsewhere")))


def _with(data, **changes):
    return dataclasses.replace(data, **changes)


# Evaluation

# Two images of Soho, one of XMM Newton without panels, of which two background pixels are called panels.
TABLES = np.array(
    [
        [[50, 2, 0], [1, 20, 1], [0, 2, 24]],
        [[60, 0, 0], [0, 20, 0], [4, 0, 16]],
        [[78, 0, 2], [5, 15, 0], [0, 0, 0]],
    ]
)
FLOWN = ["Soho", "Soho", "XMM Newton"]


@pytest.mark.row("K24")
def test_metrics_json_has_the_keys_and_values_worked_by_hand(tmp_path):
    evaluation_files.write(tmp_path, TABLES, FLOWN, [], 0)
    told = json.loads((tmp_path / "metrics.json").read_text())
    overall = told["overall"]
    means = {"accuracy", "mean_iou", "mean_iou_no_bg", "mean_dice", "mean_dice_no_bg", "per_class"}
    assert set(overall) == means
    assert set(overall["per_class"]) == {"background", "body", "panels"}
    body = overall["per_class"]["body"]  # 55 right, 4 called body, 7 missed
    assert set(body) == {"precision", "recall", "iou", "dice", "f1", "support"}
    assert body == pytest.approx(
        {"precision": 55 / 59, "recall": 55 / 62, "iou": 55 / 66, "dice": 110 / 121, "f1": 110 / 121, "support": 62}
    )
    ious = [188 / (188 + 4 + 10), 55 / 66, 40 / (40 + 6 + 3)]
    assert overall["mean_iou"] == pytest.approx(np.mean(ious))
    assert overall["mean_iou_no_bg"] == pytest.approx(np.mean(ious[1:]))
    dices = [2 * iou / (1 + iou) for iou in ious]
    assert overall["mean_dice"] == pytest.approx(np.mean(dices))
    assert overall["mean_dice_no_bg"] == pytest.approx(np.mean(dices[1:]))
    assert overall["accuracy"] == pytest.approx((188 + 55 + 40) / 300)
    assert told["confusion_matrix"] == TABLES.sum(0).tolist()


@pytest.mark.row("K24")
def test_scores_do_not_depend_on_how_images_are_dealt():
    order = [2, 0, 1]
    dealt = evaluation_files.score(TABLES[order], [FLOWN[index] for index in order])
    assert dealt == evaluation_files.score(TABLES, FLOWN)


@pytest.mark.row("K28")
def test_a_class_that_a_satellite_lacks_is_null_there_not_0():
    told = evaluation_files.score(TABLES, FLOWN)["per_satellite"]
    assert list(told) == ["Soho", "XMM Newton"]
    newton = told["XMM Newton"]
    assert newton["iou"] == {"background": 78 / 85, "body": 15 / 20, "panels": None}
    assert newton["mean_iou"] == pytest.approx((78 / 85 + 15 / 20) / 2)
    assert newton["mean_dice"] == pytest.approx((156 / 163 + 30 / 35) / 2)
    assert told["Soho"]["mean_iou"] == pytest.approx(np.mean([110 / 117, 40 / 46, 40 / 47]))


def test_a_class_that_is_nowhere_scores_null(tmp_path):
    table = np.array([[[10, 0, 0], [0, 5, 0], [0, 0, 0]]])
    evaluation_files.write(tmp_path, table, ["Soho"], [], 0)
    told = json.loads((tmp_path / "metrics.json").read_text())
    panels = {**dict.fromkeys(("precision", "recall", "iou", "dice", "f1")), "support": 0}
    assert told["overall"]["per_class"]["panels"] == panels
    assert told["overall"]["mean_iou"] == 1
    assert "none" in (tmp_path / "evaluation_report.txt").read_text()


@pytest.mark.row("K25")
def test_confusion_matrix_shows_the_counts_of_the_json_with_rows_true():
    figure = evaluation_files.matrix_figure(TABLES.sum(0))
    counts, shares = figure.axes
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in counts.texts}
    told = evaluation_files.score(TABLES, FLOWN)["confusion_matrix"]
    assert shown == {(column, row): f"{told[row][column]:,}" for row in range(3) for column in range(3)}
    assert (counts.get_ylabel(), counts.get_xlabel()) == ("true", "predicted")
    rows = np.array([float(text.get_text()) for text in shares.texts]).reshape(3, 3)
    np.testing.assert_allclose(rows, TABLES.sum(0) / TABLES.sum(0).sum(1, keepdims=True), atol=5e-5)


def test_the_row_of_a_class_that_never_occurs_has_no_share(tmp_path):
    table = np.array([[10, 0, 0], [0, 5, 0], [0, 0, 0]])
    texts = [text.get_text() for text in evaluation_files.matrix_figure(table).axes[1].texts]
    assert texts[6:] == ["none"] * 3
    path = evaluation_files.draw_matrix(tmp_path / "confusion_matrix.png", table)
    assert _opened(path).shape[:2] == (528, 1200)


@pytest.mark.row("K26")
def test_report_has_every_section_and_the_numbers_of_the_json():
    scores = evaluation_files.score(TABLES, FLOWN)
    text = evaluation_files.report(scores)
    for section in ("OVERALL", "PER CLASS", "PER SATELLITE", "CONFUSION MATRIX"):
        assert section in text
    lines = text.splitlines()
    for name in ("accuracy", "mean_iou", "mean_iou_no_bg", "mean_dice", "mean_dice_no_bg"):
        line = next(line for line in lines if line.split()[:1] == [name])
        assert float(line.split()[1]) == pytest.approx(scores["overall"][name], abs=1e-5)
    newton = next(line for line in lines if line.startswith("XMM Newton"))
    assert newton.split()[-1] == "none"
    assert float(newton.split()[3]) == pytest.approx(scores["per_satellite"]["XMM Newton"]["mean_iou"], abs=1e-5)
    assert lines[-1].split() == ["panels", "4", "2", "40"]


@pytest.mark.row("K27")
def test_examples_are_exactly_as_many_as_asked_for(tmp_path):
    image = np.zeros((3, 2, 3), np.uint8)
    endless = (evaluation_files.Example("XMM Newton", f"{n}", image, MASK, MASK) for n in range(10**9))
    names = evaluation_files.write(tmp_path, TABLES, FLOWN, endless, 3)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == [f"example_{n}.png" for n in range(3)]
    assert all((tmp_path / name).is_file() for name in names)
    assert next(endless).name == "3"
    again = [evaluation_files.Example("Soho", "a", image, MASK, MASK)]
    evaluation_files.write(tmp_path, TABLES, FLOWN, again, 20)
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["example_0.png"]


@pytest.mark.row("K9")
@pytest.mark.row("K27")
def test_an_example_shows_input_truth_and_prediction_of_a_named_satellite(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (3, 2, 3)).astype(np.uint8)
    example = evaluation_files.Example("XMM Newton", "a.jpg", image, MASK, MASK[::-1])
    figure = evaluation_files.example_figure(example)
    assert figure.get_suptitle().startswith("XMM Newton")
    assert [axis.get_title() for axis in figure.axes] == ["input", "ground truth", "prediction"]
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert np.array_equal(shown[0], image.transpose(1, 2, 0))
    assert np.array_equal(shown[1], classes.paint(MASK))
    assert np.array_equal(shown[2], classes.paint(MASK[::-1]))
    assert [text.get_text() for text in figure.legends[0].texts] == list(classes.CLASSES)


# Submission


@pytest.fixture
def handed_in(tmp_path):
    """Return a folder of three pictures of 3x2 pixels, and one of predictions for them."""
    pictures, out = tmp_path / "test", tmp_path / "out"
    pictures.mkdir()
    for number in range(3):
        name = f"test_{number:05d}_img.jpg"
        _saved(pictures / name, np.zeros((2, 3, 3)))
        submission.save(out, name, MASK)
    return reader.test_images(pictures), out


@pytest.mark.row("K30")
def test_prediction_is_bool_with_red_body_blue_panels_and_no_green(tmp_path):
    [path] = submission.save(tmp_path, "test_00000_img.jpg", MASK)
    assert path.name == "test_00000_layer.npz"
    with np.load(path) as content:
        assert content.files == ["data"]
        layer = content["data"]
    assert (layer.dtype, layer.shape) == (np.bool_, (2, 3, 3))
    assert np.array_equal(layer[..., 0], MASK == 1)
    assert np.array_equal(layer[..., 2], MASK == 2)
    assert not layer[..., 1].any()


@pytest.mark.row("K30")
def test_prediction_is_uint8_of_0_and_255_where_asked_for(tmp_path):
    [path] = submission.save(tmp_path, "test_00000_img.jpg", MASK, kind="uint8")
    assert np.array_equal(submission.load(path), classes.paint(MASK))


@pytest.mark.row("K30")
def test_stem_is_all_before_the_last_underscore():
    names = ("test_00000_img.jpg", "a_b_c.PNG", "plain.jpeg")
    assert [submission.stem(name) for name in names] == ["test_00000", "a_b", "plain"]
    with pytest.raises(DataError, match=r"a_1\.jpg and a_2\.jpg would both become a_layer\.npz"):
        submission.stems([Path("a_1.jpg"), Path("a_2.jpg")])


@pytest.mark.row("K31")
def test_picture_beside_shows_the_classes_in_their_colours(tmp_path):
    paths = submission.save(tmp_path, "test_00000_img.jpg", MASK, picture=True)
    assert [path.name for path in paths] == ["test_00000_layer.npz", "test_00000_pred.png"]
    assert np.array_equal(_opened(paths[1]), classes.paint(MASK))


@pytest.mark.row("K30")
def test_whole_submission_is_zipped_flat_and_the_same_each_time(handed_in):
    images, out = handed_in
    assert submission.problems(out, images) == []
    first = submission.write_zip(out, images)
    assert first.name == "submission.zip"
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [f"test_{number:05d}_layer.npz" for number in range(3)]
        assert archive.testzip() is None
    content = first.read_bytes()
    assert submission.write_zip(out, images).read_bytes() == content


def _spoil(change):
    layer = submission.to_layer(MASK, "uint8")
    return change(layer)


def _green(layer):
    layer[0, 0, 1] = 255
    return layer


def _both(layer):
    layer[0, 1] = (255, 0, 255)
    return layer


@pytest.mark.row("K30")
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"data": submission.to_layer(MASK[:1])}, r"shape (1, 3, 3); expected (2, 3, 3), the size of its picture"),
        ({"data": submission.to_layer(MASK)[..., 0]}, r"shape (2, 3); expected (2, 3, 3)"),
        ({"data": submission.to_layer(MASK).astype(np.float32)}, "type float32; expected bool or uint8"),
        ({"mask": submission.to_layer(MASK)}, "has keys mask; expected data alone"),
        ({"data": submission.to_layer(MASK), "more": MASK}, "has keys data, more; expected data alone"),
        ({"data": _spoil(_green)}, "green is on at 1 pixels; expected nowhere"),
        ({"data": _spoil(_both)}, "1 pixels are body and panels at once"),
        ({"data": _spoil(lambda layer: layer // 255)}, "4 values are neither 0 nor 255"),
        ({"data": _spoil(lambda layer: layer)}, "files of different types: 2 bool (test_00000_layer.npz), 1 uint8"),
        ({"data": np.array([{}], object)}, "cannot be read"),
        (b"no zip", "cannot be read"),
        (None, "1 of 3 predictions are missing: test_00001_layer.npz"),
    ],
)
def test_what_is_wrong_with_a_submission_is_named(handed_in, content, problem):
    images, out = handed_in
    path = out / "test_00001_layer.npz"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez_compressed(path, **content)
    assert [text for text in submission.problems(out, images) if problem in text]
    with pytest.raises(DataError, match=r"problems, no submission\.zip written: "):
        submission.write_zip(out, images)
    assert not (out / "submission.zip").exists()


def test_predictions_of_no_picture_are_counted(handed_in):
    images, out = handed_in
    submission.save(out, "other_00000_img.jpg", MASK)
    assert submission.problems(out, images) == ["1 files belong to none of the 3 pictures: other_00000_layer.npz"]


@pytest.mark.row("K30")
def test_classes_come_at_the_pictures_own_size():
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for upsample in ("logits", "nearest"):
        found = submission.to_classes(logits, (20, 31), upsample)
        assert (found.shape, found.dtype) == ((20, 31), np.uint8)
        assert np.array_equal(submission.to_classes(logits, (8, 8), upsample), logits.argmax(0).numpy())


@pytest.mark.row("K32")
def test_logits_follow_a_smooth_edge_better_than_nearest():
    def inside(size):
        place = (torch.arange(size) + 0.5) / size - 0.5
        return 0.31 - torch.hypot(place[:, None] + 0.03, place[None] - 0.02)

    truth = (inside(256) > 0).numpy()
    distance = 40 * inside(32)
    logits = torch.stack([-distance, distance, torch.full_like(distance, -9)])

    def iou(upsample):
        found = submission.to_classes(logits, (256, 256), upsample) == classes.BODY
        return (found & truth).sum() / (found | truth).sum()

    assert iou("logits") > 0.99
    assert iou("logits") > iou("nearest") + 0.02


# Run folder

WEIGHTS = {"conv.weight": torch.arange(6.0).view(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
ARCHITECTURE = Architecture(backbone_name="resnet34", cat_channels=32, deep_supervision=True)
KEYS = ["backbone_name", "n_channels", "n_classes", "cat_channels", "deep_supervision", "freeze_backbone"]


def _run(folder, epochs=7, every=2, **options):
    run = RunFolder(folder, ARCHITECTURE, save_every=3, **options)
    for epoch in range(1, epochs + 1):
        metrics = {"train_loss": 1 / epoch, "lr": 1e-4}
        if epoch % every == 0:
            metrics |= {"val_loss": abs(epoch - 4) + 0.5, "val_mean_iou": epoch / 10, "val_mean_dice": epoch / 9}
        run.add(epoch, metrics, {name: tensor + epoch for name, tensor in WEIGHTS.items()})
    run.finish({name: tensor + epochs for name, tensor in WEIGHTS.items()}, {"batch_size": 8, "world_size": 2})
    return run


def _epoch_of(folder):
    weights, _ = training_files.load_model(folder)
    return int(weights["bn.num_batches_tracked"]) - 3


@pytest.mark.row("K35")
def test_run_leaves_the_originals_tree(tmp_path):
    _run(tmp_path)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"unet3plus_best", "unet3plus_final", "unet3plus_epoch_3", "unet3plus_epoch_6"}
    for name in folders:
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"unet3plus_model.pt", "config.json"}
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"training_plots.png", "training_report.txt", "training_curves.npz", "history.json"}
    config = json.loads((tmp_path / "unet3plus_best" / "config.json").read_text())
    assert list(config) == ["model_type", *KEYS]
    content = torch.load(tmp_path / "unet3plus_best" / "unet3plus_model.pt", weights_only=True)
    assert list(content) == ["model_state_dict", *KEYS]


@pytest.mark.row("K35")
def test_best_is_by_validation_loss_or_the_declared_metric(tmp_path):
    _run(tmp_path / "loss")
    _run(tmp_path / "iou", metric="val_mean_iou", mode="max")
    assert [_epoch_of(tmp_path / name / "unet3plus_best") for name in ("loss", "iou")] == [4, 6]
    assert _epoch_of(tmp_path / "loss" / "unet3plus_final") == 7
    assert _epoch_of(tmp_path / "loss" / "unet3plus_epoch_6") == 6


def test_a_resumed_run_keeps_its_best_and_whole_curves(tmp_path):
    _run(tmp_path / "whole")
    first = RunFolder(tmp_path / "broken", ARCHITECTURE)
    rows = json.loads((tmp_path / "whole" / "history.json").read_text())["epochs"]
    for row in rows[:5]:
        first.add(row["epoch"], {name: value for name, value in row.items() if name != "epoch"}, WEIGHTS)
    second = RunFolder(tmp_path / "broken", ARCHITECTURE)
    second.begin(epochs_done=4)
    assert [row["epoch"] for row in second.rows] == [1, 2, 3, 4]
    second.add(5, {"val_loss": 0.6}, {name: tensor + 5 for name, tensor in WEIGHTS.items()})
    assert _epoch_of(tmp_path / "broken" / "unet3plus_best") == 0
    second.add(6, {"val_loss": 0.4}, {name: tensor + 6 for name, tensor in WEIGHTS.items()})
    assert _epoch_of(tmp_path / "broken" / "unet3plus_best") == 6


def test_an_epoch_whose_loss_is_no_number_is_never_best(tmp_path):
    run = RunFolder(tmp_path, ARCHITECTURE)
    run.add(1, {"val_loss": float("nan")}, WEIGHTS)
    run.add(2, {"val_loss": 2.0}, {name: tensor + 2 for name, tensor in WEIGHTS.items()})
    assert _epoch_of(tmp_path / "unet3plus_best") == 2


@pytest.mark.row("K36")
def test_validation_points_stand_at_their_true_epochs(tmp_path):
    run = _run(tmp_path)
    figure = training_files.plots_figure(run.rows)
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "mean IoU", "mean Dice"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["training"].get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert lines["validation"].get_xdata().tolist() == [2, 4, 6]
    assert lines["validation"].get_ydata().tolist() == [2.5, 0.5, 2.5]
    for axis in figure.axes[1:]:
        assert axis.lines[0].get_xdata().tolist() == [2, 4, 6]
    assert _opened(tmp_path / "training_plots.png").shape[1] > 1000


@pytest.mark.row("K37")
def test_curves_tell_the_epoch_of_every_value(tmp_path):
    _run(tmp_path)
    with np.load(tmp_path / "training_curves.npz") as curves:
        assert curves["train_loss_epochs"].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert curves["val_loss_epochs"].tolist() == [2, 4, 6]
        assert curves["val_loss"].tolist() == [2.5, 0.5, 2.5]
        assert curves["val_mean_iou"].tolist() == [0.2, 0.4, 0.6]


@pytest.mark.row("K37")
def test_report_has_settings_best_epoch_and_validation_in_its_own_rows(tmp_path):
    _run(tmp_path)
    lines = (tmp_path / "training_report.txt").read_text().splitlines()
    assert "best epoch: 4 (val_loss 0.50000)" in lines
    assert [line.split() for line in lines if line.startswith(("batch_size", "world_size"))] == [
        ["batch_size", "8"],
        ["world_size", "2"],
    ]
    head = next(line for line in lines if "epoch " in line and "val_loss" in line and ":" not in line).split()
    rows = {line.split()[0]: dict(zip(head, line.split(), strict=True)) for line in lines[-7:]}
    assert [rows[str(epoch)]["val_loss"] for epoch in (3, 4)] == ["-", "0.5"]


@pytest.mark.row("K40")
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_checkpoint_of_the_original_is_read(tmp_path, prefix):
    content = {"model_state_dict": {prefix + name: tensor for name, tensor in WEIGHTS.items()}}
    content |= dict(zip(KEYS, ("convnext_tiny", 3, 3, 64, False, True), strict=True))
    torch.save(content, tmp_path / "any.pt")
    weights, architecture = training_files.load_model(tmp_path / "any.pt")
    assert architecture == Architecture(backbone_name="convnext_tiny", freeze_backbone=True)
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_loading_runs_no_code_of_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model_state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=r"trap\.pt: not a file of tensors and plain data"):
        training_files.load_model(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            {"model_state_dict": WEIGHTS, "backbone_name": "a"},
            "no key n_channels, n_classes, .* it has model_state_dict",
        ),
        ([1], "holds a list; expected keys model_state_dict"),
        (
            {"model_state_dict": {"a": 1}, **dict(zip(KEYS, ("a", 3, 3, 64, False, True), strict=True))},
            "more than tensors",
        ),
        (
            {"model_state_dict": WEIGHTS, **dict(zip(KEYS, ("a", "3", 3, 64, False, True), strict=True))},
            "n_channels: got '3'",
        ),
    ],
)
def test_a_checkpoint_of_another_form_is_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / "any.pt")
    with pytest.raises(CheckpointError, match=problem):
        training_files.load_model(tmp_path / "any.pt")


def test_a_folder_mixed_from_two_runs_is_refused(tmp_path):
    training_files.save_model(tmp_path, WEIGHTS, ARCHITECTURE)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("resnet34", "resnet50"))
    with pytest.raises(CheckpointError, match="backbone_name 'resnet50' instead of 'resnet34'"):
        training_files.load_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"unet3plus_model\.pt: no such file"):
        training_files.load_model(tmp_path)


# The network of a run folder

LEAN = Architecture(backbone_name="resnet10t", cat_channels=4, n_classes=3)


def _made(name="unet3plus_simplified", seed=3, **changes):
    torch.manual_seed(seed)
    architecture = dataclasses.replace(LEAN, **changes)
    network = Network(name=name, encoder="resnet10t", cat_channels=4, deep_supervision=architecture.deep_supervision)
    model = networks.build(network, 3, 3)
    for buffer in model.buffers():
        buffer.add_(1)
    return model, architecture


def _foreign(weights):
    """Return the same tensors as another program may have named them, without counts of batches."""
    kept = [(name, tensor) for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
    return {f"net.part{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(kept)}


def _same_logits(one, other):
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(one.eval()(image), other.eval()(image), rtol=0, atol=0)


@pytest.mark.row("K40")
@pytest.mark.parametrize("name", ["unet3plus", "unet3plus_simplified"])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_model_of_ours_comes_back_as_the_network_it_was(tmp_path, name, deep_supervision):
    model, architecture = _made(name, deep_supervision=deep_supervision)
    training_files.save_model(tmp_path, model.state_dict(), architecture)
    found, network, told = training_files.load_network(tmp_path)
    assert (network.name, network.deep_supervision, told) == (name, deep_supervision, architecture)
    _same_logits(found, model)


@pytest.mark.row("K40")
@pytest.mark.parametrize("prefix", ["", "module."])
def test_tensors_under_other_names_fill_the_network_in_order(tmp_path, prefix):
    model, architecture = _made()
    weights = {prefix + name: tensor for name, tensor in _foreign(model.state_dict()).items()}
    training_files.save_model(tmp_path, weights, architecture)
    (tmp_path / "config.json").unlink()
    found, network, _ = training_files.load_network(tmp_path / "unet3plus_model.pt")
    assert network.name == "unet3plus_simplified"
    _same_logits(found, model)


@pytest.mark.row("K40")
def test_tensors_that_do_not_pair_are_refused_with_the_first_of_them(tmp_path):
    model, architecture = _made()
    weights = _foreign(model.state_dict())
    names = list(weights)
    at = next(i for i in range(len(names)) if weights[names[i]].ndim == 4 and i > 20)
    training_files.save_model(tmp_path / "shape", {**weights, names[at]: weights[names[at]][:1]}, architecture)
    with pytest.raises(CheckpointError, match=rf"in order, {names[at]} \(1, .* stands where \S+ \("):
        training_files.load_network(tmp_path / "shape")
    training_files.save_model(tmp_path / "short", dict(list(weights.items())[:-1]), architecture)
    with pytest.raises(CheckpointError, match=rf"{len(weights) - 1} tensors; expected {len(weights)}, in order"):
        training_files.load_network(tmp_path / "short")
    training_files.save_model(tmp_path / "paper", _foreign(_made("unet3plus")[0].state_dict()), architecture)
    with pytest.raises(CheckpointError, match="weights of another network: in order"):
        training_files.load_network(tmp_path / "paper")


def test_a_model_with_an_unknown_backbone_is_refused_with_its_file(tmp_path):
    model, architecture = _made()
    training_files.save_model(tmp_path, model.state_dict(), dataclasses.replace(architecture, backbone_name="resnet10"))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: encoder: timm has no model 'resnet10'; did you mean"):
        training_files.load_network(tmp_path)
