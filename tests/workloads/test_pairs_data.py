import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import configuration
from segmentation import images, splits
from segmentation.epoch import DataError
from workloads import pairs
from workloads._pairs import dataset
from workloads.pairs import Config, Data

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Six grey pictures of 40 x 24 with the classes 0, 1 and 2."""
    rng = np.random.default_rng(0)
    for index in range(6):
        save(
            rng.integers(0, 255, (24, 40)).astype(np.uint8),
            tmp_path / "data" / "images" / f"{'ab'[index % 2]}_{index}.png",
        )
        save(
            rng.integers(0, 3, (24, 40)).astype(np.uint8),
            tmp_path / "data" / "masks" / f"{'ab'[index % 2]}_{index}.png",
        )
    return tmp_path / "data"


def config(folder, **changed):
    return Config(data=Data(root=str(folder), tile=16, **changed))


def test_the_cache_may_lie_in_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pairs.prepare(config(folder, cache="~/decoded"))
    assert list((tmp_path / "home" / "decoded").iterdir())
    assert not (tmp_path / "~").exists()


def refused(folder, problem, **changed):
    with pytest.raises(DataError, match=problem) as caught:
        pairs.prepare(config(folder, **changed))
    return str(caught.value)


def test_the_embedded_nuclei_are_an_ordinary_folder_of_pairs():
    made = pairs.prepare(Config())
    assert made["samples"] == {"train": 44, "validation": 10, "test": 10}
    assert made["groups"] == made["samples"]
    assert (made["images"], made["size_range"], made["sample_shape"]) == (1, [[512, 512]] * 2, [1, 64, 64])
    assert made["synthetic"] is False
    assert made["warnings"] == [
        "fewer than three images: split by region, so that scores say little about other images"
    ]
    shares = [sum(made["class_shares"][name].values()) for name in splits.NAMES]
    assert shares == pytest.approx([1, 1, 1])
    whole = sum(made["samples"][n] / 64 * made["class_shares"][n]["boundary"] for n in splits.NAMES)
    assert whole == pytest.approx(0.0624, abs=1e-4)
    json.dumps(made)


def test_embedded_data_are_small_and_carry_their_licence():
    files = [path for path in dataset.EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 230_000
    assert "BSD 3-Clause" in (dataset.EMBEDDED / "LICENSE.stardist").read_text()


@pytest.mark.shared_data
def test_the_embedded_mask_follows_from_the_original_instances():
    source = SHARED / "nuclei_stardist" / "stardist_nuclei_512.npz"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    from scipy import ndimage

    original = np.load(source)
    cross = ndimage.generate_binary_structure(2, 1)
    instances = original["instances"]
    boundary = ndimage.grey_dilation(instances, footprint=cross) != ndimage.grey_erosion(instances, footprint=cross)
    assert np.array_equal(np.asarray(Image.open(dataset.EMBEDDED / "images" / "nuclei.png")), original["image"])
    mask = np.asarray(Image.open(dataset.EMBEDDED / "masks" / "nuclei.png"))
    assert np.array_equal(mask, np.where(boundary, 2, instances > 0))


def test_tiles_show_the_pixels_they_are_named_after(folder):
    samples, made = dataset.load(config(folder).data)
    assert len(samples) == 6 * 2 * 3
    for index in (*made.train, *made.validation):
        name, _, place = samples.names[index].partition("@")
        top, left = map(int, place.split(","))
        stored = np.asarray(Image.open(folder / "images" / f"{name}.png"))
        assert np.array_equal(samples.image(index)[0], stored[top : top + 16, left : left + 16])
        mask = np.asarray(Image.open(folder / "masks" / f"{name}.png"))[top : top + 16, left : left + 16]
        counted = samples.mask(index) != 255
        assert np.array_equal(samples.mask(index)[counted], mask[counted])


@pytest.mark.row("X6")
def test_no_image_is_in_two_splits(folder):
    samples, made = dataset.load(config(folder).data)
    owner = {}
    for name in splits.NAMES:
        for index in made[name]:
            image = samples.extra(index)["image"]
            assert samples.groups[index] == image
            assert owner.setdefault(image, name) == name


@pytest.mark.parametrize("stride", [0, 8])
def test_no_pixel_of_a_single_image_is_in_two_splits(stride):
    samples, made = dataset.load(Data(tile=32, stride=stride))
    assert made.key == "region"
    owner = np.full((512, 512), -1)
    for number, name in enumerate(splits.NAMES):
        for index in made[name]:
            note = samples.extra(index)
            area = owner[int(note["top"]) :, int(note["left"]) :][:32, :32]
            assert set(np.unique(area)) <= {-1, number}
            area[:] = number
    assert (owner >= 0).all()


def test_names_that_begin_alike_stay_together(folder):
    for index in range(6):
        for half in ("images", "masks"):
            (folder / half / f"{'ab'[index % 2]}_{index}.png").rename(folder / half / f"p{index // 2}_{index}.png")
    made = pairs.prepare(config(folder, group="prefix"))
    assert (made["groups"], made["group_key"]) == ({"train": 1, "validation": 1, "test": 1}, "prefix")


def test_two_prefixes_cannot_make_three_splits(folder):
    refused(folder, "in 2 groups by prefix; three splits need at least 3 groups", group="prefix")


@pytest.mark.row("X7")
def test_test_tiles_are_sealed(folder):
    samples, made = dataset.load(config(folder).data)
    samples.image(made.train[0])
    with pytest.raises(splits.TestSplitError):
        samples.image(made.test[0])
    with splits.test_split_open():
        samples.image(made.test[0])


def test_whole_images_of_several_sizes_are_padded_and_the_padding_is_ignored(folder):
    save(np.full((30, 20), 9, np.uint8), folder / "images" / "c_6.png")
    save(np.ones((30, 20), np.uint8), folder / "masks" / "c_6.png")
    samples, _ = dataset.load(Data(root=str(folder), tile=0))
    assert [samples.shape(index) for index in range(7)] == [(1, 30, 40)] * 7
    assert json.loads(samples.extra(6)["pixels"]) == [0, 600, 0]
    with splits.test_split_open():
        assert (samples.mask(6) == 255).sum() == 600
        assert (samples.mask(6)[:30, :20] == 1).all()


def test_the_hash_follows_the_files_and_the_cache_follows_the_settings(folder):
    first, other_tile = pairs.prepare(config(folder)), pairs.prepare(Config(data=Data(root=str(folder), tile=8)))
    assert first["sha256"] == other_tile["sha256"]
    assert other_tile["sample_shape"] == [1, 8, 8]
    assert pairs.prepare(config(folder, split_seed=3))["sha256"] == first["sha256"]
    save(np.zeros((24, 40), np.uint8), folder / "images" / "a_0.png")
    changed = pairs.prepare(config(folder))
    assert changed["sha256"] != first["sha256"]
    samples, _ = dataset.load(config(folder).data)
    with splits.test_split_open():
        assert samples.image(0).max() == 0


def test_a_second_preparation_decodes_nothing(folder, monkeypatch):
    first = pairs.prepare(config(folder))
    monkeypatch.setattr(dataset.images, "read_image", lambda path: pytest.fail(f"decoded {path} again"))
    assert pairs.prepare(config(folder, split_seed=0)) == first


@pytest.mark.parametrize("missing", ["", "images", "masks"])
def test_a_missing_folder_is_refused_by_name(folder, missing):
    (folder / missing).rename(folder.with_name("elsewhere"))
    refused(folder, f"{folder}{'/' if missing else ''}{missing}: no such folder; .*should hold")


def test_an_empty_folder_is_refused_by_name(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    refused(folder, f"{folder}/images: holds no picture")


def test_all_that_lack_their_other_half_are_counted_and_listed(folder):
    for name in ("a_0", "b_1"):
        (folder / "masks" / f"{name}.png").unlink()
    for name in "stuvwxy":
        save(np.zeros((24, 40), np.uint8), folder / "masks" / f"{name}.png")
    message = refused(folder, "2 image without mask: a_0, b_1; 7 mask without image: s, t, u, v, w and 2 more")
    assert str(folder) in message
    assert "have the same name" in message


@pytest.mark.parametrize("half", ["images", "masks"])
def test_a_truncated_file_is_refused_by_name(folder, half):
    path = folder / half / "b_3.png"
    path.write_bytes(path.read_bytes()[:100])
    refused(folder, rf"{half}/b_3\.png: unreadable or truncated")


def test_image_and_mask_of_two_sizes_are_refused_with_both(folder):
    save(np.zeros((24, 39), np.uint8), folder / "masks" / "b_3.png")
    refused(folder, r"b_3\.png is 40x24, its mask .*masks/b_3\.png is 39x24; they must have one size")


def test_a_mask_value_outside_the_classes_is_refused_with_the_remedy(folder):
    save(np.full((24, 40), 7, np.uint8), folder / "masks" / "b_3.png")
    refused(folder, r"masks/b_3\.png: values 7 are outside the 3 classes; expected 0, 1, 2, or 255 .*data\.value_map")


def test_a_value_map_gives_each_value_its_class(folder):
    for path in (folder / "masks").iterdir():
        save((np.asarray(Image.open(path)) // 2 * 255).astype(np.uint8), path)
    made = pairs.prepare(config(folder, classes=2, value_map=(0, 255)))
    assert made["class_shares"]["train"]["class1"] == pytest.approx(1 / 3, abs=0.05)


def test_masks_of_0_and_255_without_a_value_map_are_refused(folder):
    for path in (folder / "masks").iterdir():
        save((np.asarray(Image.open(path)) // 2 * 255).astype(np.uint8), path)
    refused(folder, r"one class occurs in all masks \(class0\).*data\.value_map, such as \[0, 255\]", classes=2)


def test_a_split_without_a_class_is_told_in_the_manifest(folder):
    _, made = dataset.load(config(folder).data)
    kept = made.names[made.train[0]].partition("@")[0]
    for path in (folder / "masks").iterdir():
        if path.stem != kept:
            save(np.minimum(np.asarray(Image.open(path)), 1), path)
    warnings = pairs.prepare(config(folder, class_names=("sky", "sea", "ship")))["warnings"]
    assert warnings == [
        f"split {name} has no pixel of ship; try another data.split_seed or data.fractions"
        for name in ("validation", "test")
    ]


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((24, 40, 3), np.uint8), r"b_3\.png has 3 channels, a_0\.png has 1; set data\.channels to 1 or 3"),
        (np.zeros((24, 40), np.uint16), r"b_3\.png holds uint16, a_0\.png holds uint8; write them as one type"),
    ],
)
def test_images_of_two_kinds_are_refused_with_both(folder, array, problem):
    save(array, folder / "images" / "b_3.png")
    refused(folder, problem)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_made_alike_where_asked(folder, channels):
    grey = np.asarray(Image.open(folder / "images" / "b_3.png"))
    save(np.stack([grey] * 3, axis=-1), folder / "images" / "b_3.png")
    save(np.stack([grey] * 4, axis=-1), folder / "images" / "b_5.png")
    samples, _ = dataset.load(config(folder, channels=channels).data)
    first = next(index for index, name in enumerate(samples.names) if name == "b_3@0,0")
    with splits.test_split_open():
        assert samples.shape(0)[0] == channels
        assert all(np.array_equal(plane, grey[:16, :16]) for plane in samples.image(first))


def test_two_images_of_one_name_are_refused(folder):
    save(np.zeros((24, 40), np.uint8), folder / "images" / "b_3.bmp")
    refused(folder, r"b_3\.bmp and b_3\.png have one name")


def test_images_that_are_too_small_are_refused(folder):
    refused(folder, "is 40x24; data.min_size wants at least 30 pixels", min_size=30)


def test_one_folder_may_hold_both_when_masks_are_marked(folder):
    for path in (folder / "masks").iterdir():
        path.rename(folder / "images" / f"{path.stem}_mask.png")
    changed = {"images": "images", "masks": "images", "mask_suffix": "_mask"}
    assert pairs.prepare(config(folder, **changed))["images"] == 6


def test_a_cache_that_cannot_be_written_is_explained(folder, tmp_path):
    (tmp_path / "file").touch()
    refused(folder, "file: cannot write the cache: .*set SEGMENTATION_CACHE", cache=str(tmp_path / "file"))


def test_inspect_draws_training_samples_and_writes_the_splits(folder, tmp_path):
    (path,) = pairs.inspect(config(folder, class_names=("a", "b", "c")), tmp_path / "out")
    assert min(images.image_size(path)) > 500
    assert len(splits.read(tmp_path / "out" / "splits.json").train) == 24


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"classes": 1}, "classes: got 1"),
        ({"value_map": (0, 255)}, r"value_map: got \[0, 255\]; expected 3 different ones"),
        ({"class_names": ("a", "b")}, "class_names: got .* expected 3"),
        ({"ignore_index": 2}, "ignore_index: got 2; expected 3 to 255"),
        ({"stride": 65}, "stride: got 65; expected at most the tile of 64"),
        ({"tile": -1}, "tile: got -1"),
        ({"tile": 0, "group": "region"}, "group: got region with tile 0"),
        ({"region": 32}, "region: got 32; expected at least the tile"),
        ({"fractions": (0.5, 0.5, 0.0)}, "fractions: got"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(changed, problem):
    with pytest.raises(ValueError, match=problem):
        Data(**changed)


@pytest.mark.row("X3")
@pytest.mark.parametrize(
    "name", [name for name in configuration.fields(Config) if not name.endswith(configuration.OPEN)]
)
def test_every_value_has_help_and_can_be_set(name):
    field = configuration.fields(Config)[name]
    assert field.help
    plain = configuration.to_values(Config())
    assert configuration.to_values(configuration.build(Config, {name: plain[name]})) == plain


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(configuration.ConfigError, match=r"did you mean 'data\.stride'"):
        configuration.build(Config, {"data.strid": 3})


@pytest.mark.shared_data
def test_real_pictures_of_many_sizes_and_colours_are_cut(tmp_path):
    if not (SHARED / "nuclei").is_dir():
        pytest.skip(f"{SHARED / 'nuclei'} is not here")
    for path in sorted((SHARED / "nuclei" / "images").iterdir())[:12]:
        instances = np.asarray(Image.open(SHARED / "nuclei" / "instances" / path.name))
        save((instances > 0).astype(np.uint8), tmp_path / "data" / "masks" / path.name)
        save(np.asarray(Image.open(path)), tmp_path / "data" / "images" / path.name)
    made = pairs.prepare(Config(data=Data(root=str(tmp_path / "data"), classes=2, channels=1)))
    assert made["images"] == 12
    assert made["group_key"] == "image"
    assert all(0.01 < made["class_shares"][name]["class1"] < 0.9 for name in splits.NAMES)


@pytest.mark.shared_data
def test_real_colour_pictures_are_read_as_stored():
    if not (SHARED / "spark").is_dir():
        pytest.skip(f"{SHARED / 'spark'} is not here")
    made = pairs.prepare(Config(data=Data(root=str(SHARED / "spark"), tile=128)))
    assert (made["images"], made["sample_shape"]) == (6, [3, 128, 128])
