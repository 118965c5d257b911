"""Telescope pictures on disk: both layouts, what is refused, splits, manifest."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import configuration
from segmentation import splits
from segmentation.epoch import DataError
from segmentation.loading import batches
from segmentation.normalisation import Normaliser
from workloads import telescope
from workloads._telescope import dataset, generator, reader
from workloads._telescope.dataset import Data
from workloads._telescope.generator import Synthetic

NAME = "TOD_1567419530.1567428401.ar5:f090_converted_10914-11427.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A generated tree in the original's layout."""
    root = tmp_path_factory.mktemp("telescope") / "real_converted_images32"
    generator.write(Synthetic(samples=40), root)
    return root


@pytest.fixture
def tree(tmp_path):
    """A tree of three pictures written by hand: one of each class folder, all masks empty."""
    root = tmp_path / "data"
    for number, folder in enumerate(("cosmic_ray", "point_source", "none")):
        for kind in ("images", "masks"):
            (root / kind / folder).mkdir(parents=True)
        save(np.full((32, 32), 10 * number, np.uint8), root / "images" / folder / f"{number}.a:b.png")
    return root


def save(pixels, path):
    Image.fromarray(pixels).save(path)


def load(root, tmp_path, variant="noEL", **values):
    return dataset.load(Data(root=str(root), cache=str(tmp_path / "cache"), **values), variant)


def only(root, variant="noEL"):
    """Return the first sample, decoded."""
    return next(iter(reader.read(reader.find(root, variant=variant))))


@pytest.mark.row("A1")
def test_one_key_selects_the_third_folder_and_nothing_else():
    without, with_el = (configuration.build(telescope.Config, {"variant": name}) for name in ("noEL", "withEL"))
    assert reader.class_folders(without.variant) == ("cosmic_ray", "point_source", "none")
    assert reader.class_folders(with_el.variant) == ("cosmic_ray", "point_source", "electronic_glitch")
    first, second = configuration.to_values(without), configuration.to_values(with_el)
    assert {key for key in first if first[key] != second[key]} == {"variant"}


@pytest.mark.row("A4")
def test_every_picture_is_found_by_its_whole_name(made):
    for variant in ("noEL", "withEL"):
        names = {path.name for folder in reader.class_folders(variant) for path in (made / "images" / folder).iterdir()}
        assert {source.name for source in reader.find(made, variant=variant)} == names
        assert len(names) > 20


@pytest.mark.row("A4")
def test_missing_folders_name_the_path_expected(tree, tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/nowhere: no such folder; expected {tmp_path}/nowhere/images"):
        reader.find(tmp_path / "nowhere", variant="noEL")
    with pytest.raises(DataError, match=r"images/electronic_glitch: no such folder.*variant=noEL"):
        reader.find(tree, variant="withEL")
    shutil.rmtree(tree / "masks" / "point_source")
    with pytest.raises(DataError, match="masks/point_source: no such folder"):
        reader.find(tree, variant="noEL")
    shutil.rmtree(tree / "images")
    with pytest.raises(DataError, match="data/images: no such folder"):
        reader.find(tree, variant="noEL")


def test_folders_without_pictures_are_refused(tree):
    for path in (tree / "images").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"no pictures .*cosmic_ray, point_source, none"):
        reader.find(tree, variant="noEL")


@pytest.mark.row("A2", "A5")
def test_masks_become_channels_of_zeros_and_ones(tree):
    mask = np.zeros((32, 32), np.uint8)
    mask[0, :3] = 0, 1, 255
    save(mask, tree / "masks" / "cosmic_ray" / "0.a:b.png")
    save(np.full((32, 32), 255, np.uint8), tree / "masks" / "none" / "0.a:b.png")
    sample = only(tree)
    assert sample.mask.shape == (3, 32, 32)
    assert sample.mask[0, 0, :3].tolist() == [0, 1, 1]
    assert sample.mask[0].sum() == 2
    assert not sample.mask[1].any()  # there is no such file
    assert sample.mask[2].all()
    assert sample.mask[:, 0, 1].tolist() == [1, 0, 1]  # two classes at one pixel
    assert reader.missing_masks(reader.find(tree, variant="noEL"), "noEL") == {"point_source": 1}


@pytest.mark.row("A3")
@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (np.arange(1024, dtype=np.uint8).reshape(32, 32), ".png"),
        (np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60, ".png"),
        (np.linspace(-3, 181.5, 1024, dtype=np.float32).reshape(32, 32), ".tiff"),
    ],
    ids=["8-bit", "16-bit", "float"],
)
def test_grey_values_reach_the_network_unchanged(tmp_path, tree, pixels, suffix):
    for number, path in enumerate(sorted((tree / "images").rglob("*.png"))):
        save(pixels, path.with_name(f"{number}{suffix}"))
        path.unlink()
    samples, dealt = load(tree, tmp_path)
    image, mask, _ = next(
        batches(samples, dealt.train, batch_size=1, normalise=Normaliser(method="none"), shuffle=False, seed=0, epoch=0)
    )
    assert image.dtype == torch.float32
    assert image.shape == (1, 1, 32, 32)
    assert mask.shape == (1, 3, 32, 32)
    np.testing.assert_array_equal(image[0, 0].numpy(), pixels.astype(np.float32))


@pytest.mark.row("A6")
def test_colours_and_odd_sizes_are_refused_by_name(tree):
    path = tree / "images" / "cosmic_ray" / "0.a:b.png"
    save(np.zeros((32, 32, 3), np.uint8), path)
    with pytest.raises(DataError, match=r"0\.a:b\.png: expected one grey channel, got an array of shape \(32, 32, 3\)"):
        only(tree)
    save(np.zeros((32, 32), np.uint8), path)
    save(np.zeros((32, 30), np.uint8), tree / "masks" / "cosmic_ray" / "0.a:b.png")
    with pytest.raises(DataError, match=r"0\.a:b\.png: 32x30 pixels, but its image 0\.a:b\.png has 32x32"):
        only(tree)
    (tree / "masks" / "cosmic_ray" / "0.a:b.png").unlink()
    save(np.zeros((40, 40), np.uint8), tree / "images" / "none" / "2.a:b.png")
    with pytest.raises(DataError, match=r"2\.a:b\.png: 40x40 pixels, but 0\.a:b\.png has 32x32"):
        list(reader.read(reader.find(tree, variant="noEL")))


@pytest.mark.row("A27")
def test_a_picture_in_two_folders_is_one_sample(tree):
    shutil.copy(tree / "images" / "cosmic_ray" / "0.a:b.png", tree / "images" / "point_source" / "0.a:b.png")
    sources = reader.find(tree, variant="noEL")
    assert [source.name for source in sources] == ["0.a:b.png", "1.a:b.png", "2.a:b.png"]
    assert sources[0].folders == ("cosmic_ray", "point_source")


@pytest.mark.row("A27")
def test_different_pictures_of_one_name_share_a_group(tree, tmp_path):
    save(np.full((32, 32), 99, np.uint8), tree / "images" / "point_source" / "0.a:b.png")
    sources = reader.find(tree, variant="noEL")
    twins = [source for source in sources if source.name.endswith("/0.a:b.png")]
    assert [source.name for source in twins] == ["cosmic_ray/0.a:b.png", "point_source/0.a:b.png"]
    assert {source.group for source in twins} == {"0.a:b.png"}
    _, dealt = load(tree, tmp_path)
    owners = {name for name in splits.NAMES for index in dealt[name] if "/" in dealt.names[index]}
    assert len(owners) == 1
    made = dataset.manifest(Data(root=str(tree), cache=str(tmp_path / "cache")), "noEL")
    assert any("2 pictures share a name but differ" in warning for warning in made["warnings"])


@pytest.mark.row("A27")
def test_grouping_by_observation_keeps_its_slices_together(made, tmp_path):
    assert reader.tod_of(NAME) == "TOD_1567419530.1567428401.ar5"
    assert reader.tod_of("img_00003.png") == "img_00003.png"
    _, dealt = load(made, tmp_path, group="tod")
    tods = [{reader.tod_of(dealt.names[index]) for index in dealt[name]} for name in splits.NAMES]
    assert sum(map(len, tods)) == len(set.union(*tods)) == 5
    assert dealt.key == "tod"


@pytest.mark.row("A25", "A26")
@pytest.mark.parametrize("variant", ["noEL", "withEL"])
def test_splits_are_disjoint_whole_and_used_by_the_loaders(made, tmp_path, variant):
    samples, dealt = load(made, tmp_path, variant)
    count = len(samples)
    assert [len(dealt[name]) for name in splits.NAMES] == [
        int(0.7 * count),
        int(0.85 * count) - int(0.7 * count),
        count - int(0.85 * count),
    ]
    seen = {}
    with splits.test_split_open():
        for name in splits.NAMES:
            found = batches(samples, dealt[name], batch_size=8, normalise=Normaliser(), shuffle=True, seed=0, epoch=1)
            seen[name] = [samples.names[index] for _, _, indices in found for index in indices.tolist()]
    assert {name: len(names) for name, names in seen.items()} == {name: len(dealt[name]) for name in splits.NAMES}
    assert sorted(name for names in seen.values() for name in names) == sorted(samples.names)
    assert len(set(samples.names)) == count


@pytest.mark.row("A25")
def test_splits_follow_their_seed(made, tmp_path):
    first, again, other = (load(made, tmp_path, split_seed=seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert set(first.test) != set(other.test)


def test_test_samples_stay_shut_until_evaluation(made, tmp_path):
    samples, dealt = load(made, tmp_path)
    with pytest.raises(splits.TestSplitError):
        samples.image(dealt.test[0])


@pytest.mark.row("A41")
def test_manifest_shows_how_rare_the_classes_are(made, tmp_path):
    data = Data(root=str(made), cache=str(tmp_path / "cache"))
    found = dataset.manifest(data, "withEL")
    samples, dealt = load(made, tmp_path, "withEL")
    masks = np.stack([samples.mask(index) for index in dealt.train])
    shares = found["class_shares"]["train"]
    np.testing.assert_allclose(list(shares.values()), masks.mean(axis=(0, 2, 3)))
    assert found["all_zero_accuracy"]["train"] == pytest.approx(1 - masks.mean())
    assert dataset.manifest(data, "noEL")["class_shares"]["train"]["electronic_glitch"] == 0
    assert found["synthetic"] is False
    assert found["samples"] == {name: len(dealt[name]) for name in splits.NAMES}
    assert json.loads(json.dumps(found)) == found


def test_manifest_changes_with_a_single_pixel(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    data = Data(root=str(root), cache=str(tmp_path / "cache"))
    before = dataset.manifest(data, "noEL")["sha256"]
    path = next((root / "images" / "cosmic_ray").iterdir())
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    save(pixels, path)
    assert dataset.manifest(data, "noEL")["sha256"] != before


def test_missing_masks_and_empty_splits_are_warned_of(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    next(root / "masks" / "cosmic_ray" / path.name for path in (root / "images" / "cosmic_ray").iterdir()).unlink()
    found = dataset.manifest(Data(root=str(root), cache=str(tmp_path / "cache")), "noEL")
    assert found["missing_masks"] == {"cosmic_ray": 1}
    assert any("1 pictures of images/cosmic_ray have no mask" in warning for warning in found["warnings"])


@pytest.mark.row("A4")
def test_synthetic_data_is_announced_loudly(tmp_path, caplog):
    data = Data(cache=str(tmp_path), synthetic=Synthetic(samples=20))
    found = telescope.prepare(telescope.Config(data=data))
    assert found["synthetic"] is True
    assert found["warnings"][0].startswith("SYNTHETIC DATA: data.root is not given")
    assert any(record.levelname == "WARNING" and "SYNTHETIC DATA" in record.message for record in caplog.records)
    assert str(tmp_path) in found["warnings"][0]


@pytest.mark.parametrize("variant", ["noEL", "withEL"])
def test_the_default_synthetic_data_has_every_class_in_every_split(tmp_path, variant):
    found = dataset.manifest(Data(cache=str(tmp_path)), variant)
    assert len(found["warnings"]) == 1  # that it is synthetic
    assert sum(found["samples"].values()) >= 250


def simulated(root, colours):
    """Write pictures in the simulated layout, each mask of one colour in its first row, none elsewhere."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number, colour in enumerate(colours):
        mask = np.full((32, 32, 3), (30, 100, 180), np.uint8)
        mask[0] = colour
        save(np.full((32, 32), number, np.uint8), root / "images" / f"img_{number:05d}.png")
        save(mask, root / "masks" / f"mask_{number:05d}.png")
    rows = ["batch_id,seed,n_srcs,cr_rate,start_idx,end_idx,tod_file"]
    rows += [f"{n},42,5,0.01,{n},{n},tod_{n // 2:02d}.npy" for n in range(len(colours))]
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


COLOURS = ((220, 20, 60), (255, 105, 180), (0, 206, 209), (30, 100, 180), (220, 20, 60), (220, 20, 60))


@pytest.mark.row("A39")
def test_simulated_colours_become_channels(tmp_path):
    root = simulated(tmp_path / "sim", COLOURS)
    assert reader.detect(root) == "simulated"
    masks = [sample.mask for sample in reader.read(reader.find(root, variant="noEL"))]
    rows = [mask[:, 0, 0].tolist() for mask in masks]
    assert rows[:4] == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert all(mask[:, 1:].sum() == 0 for mask in masks)
    groups = [source.group for source in reader.find(root, variant="noEL", group="tod")]
    assert groups == ["tod_00.npy"] * 2 + ["tod_01.npy"] * 2 + ["tod_02.npy"] * 2


@pytest.mark.row("A39")
def test_unknown_colours_are_reported_not_guessed(tmp_path):
    root = simulated(tmp_path / "sim", ((1, 2, 3), *COLOURS))
    with pytest.raises(DataError, match=r"mask_00000\.png: 1 unknown mask colours: \(1, 2, 3\) x 32; known are .*220"):
        list(reader.read(reader.find(root, variant="noEL")))


@pytest.mark.row("A39")
def test_simulated_pictures_and_masks_must_pair(tmp_path):
    root = simulated(tmp_path / "sim", COLOURS)
    (root / "masks" / "mask_00002.png").unlink()
    (root / "images" / "img_00004.png").unlink()
    with pytest.raises(DataError, match=r"1 images without a mask \['img_00002\.png'\], 1 masks without"):
        reader.find(root, variant="noEL")


@pytest.mark.row("A39")
def test_pictures_beyond_the_manifest_have_no_group(tmp_path):
    root = simulated(tmp_path / "sim", COLOURS)
    (root / "manifest.csv").write_text("batch_id,start_idx,end_idx,tod_file\n0,0,3,a\n")
    with pytest.raises(DataError, match="no row covers picture 4"):
        reader.find(root, variant="noEL", group="tod")


@pytest.mark.shared_data
@pytest.mark.row("A39")
def test_the_published_sample_is_read_whole(shared_data, tmp_path):
    samples, dealt = load(shared_data / "telescope_sim", tmp_path)
    assert len(samples) == 24
    assert samples.shape(0) == (1, 32, 32)
    with splits.test_split_open():
        totals = sum(samples.mask(index).sum(axis=(1, 2)) for index in range(24))
    assert totals.tolist() == [1289 + 388, 1912 + 388, 0]
    assert [len(dealt[name]) for name in splits.NAMES] == [16, 4, 4]


@pytest.mark.shared_data
@pytest.mark.row("A39")
def test_the_published_sample_trains(shared_data, tmp_path):
    values = {"data.root": str(shared_data / "telescope_sim"), "data.cache": str(tmp_path), "threads": 1}
    values |= {"epochs": 12, "base_c": 8, "lr": 1e-2, "batch_size": 2}
    epochs = [epoch.metrics for epoch in telescope.train(configuration.build(telescope.Config, values))]
    assert epochs[-1]["train_loss"] < 0.8 * epochs[0]["train_loss"]
    assert max(epoch["mean_iou"] for epoch in epochs) > 0.2
