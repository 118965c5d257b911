"""Images of many bands in .npz archives and rasters: read, split, drawn, predicted."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from segmentation import checkpoints, images, splits
from segmentation.epoch import DataError
from segmentation.networks import Network
from workloads import pairs
from workloads._pairs import archives, dataset
from workloads.pairs import Config, Data

BANDS = 6
SMALL = Network(name="tinyunet", base=4)
KEYS = {"npz_keys": ("img", "msk"), "classes": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))


def scene(number, height=32, width=48):
    """Return bands (H, W, 6) whose fourth is high where the class (H, W) is 1."""
    rng = np.random.default_rng(number)
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 3] = 1
    image = rng.random((height, width, BANDS)).astype(np.float32)
    image[..., 3] += 2 * mask
    return image, mask


@pytest.fixture
def scenes(tmp_path):
    """Four archives of an image and a mask (H, W, 1)."""
    root = tmp_path / "scenes"
    root.mkdir()
    for number in range(4):
        image, mask = scene(number)
        np.savez_compressed(root / f"s{number}.npz", img=image, msk=mask[..., None])
    return root


def config(root, **changed):
    return Config(data=Data(root=str(root), tile=16, **{**KEYS, **changed}), network=SMALL, epochs=1, threads=1)


def unsealed(root, **changed):
    """Return the whole image and mask of each of some scenes, (C, H, W) and (H, W)."""
    samples, _ = dataset.load(Data(root=str(root), **{**KEYS, "tile": 0, **changed}))
    with splits.test_split_open():
        return [(samples.image(index).copy(), samples.mask(index).copy()) for index in range(len(samples))]


def same(found, number=0):
    image, mask = scene(number)
    return np.array_equal(found[number][0], image.transpose(2, 0, 1)) and np.array_equal(found[number][1], mask)


def test_an_archive_of_both_is_a_pair(scenes):
    made = pairs.prepare(config(scenes))
    assert (made["images"], made["sample_shape"], made["group_key"]) == (4, [BANDS, 16, 16], "image")
    assert all(same(unsealed(scenes), number) for number in range(4))


def test_archives_of_one_array_lie_in_two_folders_beside_other_files(tmp_path):
    for number in range(3):
        image, mask = scene(number)
        for half in ("images", "masks"):
            (tmp_path / "data" / half).mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "data" / "images" / f"{number}.npz", image)
        path = tmp_path / "data" / "masks" / f"{number}"
        Image.fromarray(mask).save(f"{path}.png") if number else np.savez(f"{path}.npz", labels=mask)
    assert all(same(unsealed(tmp_path / "data", npz_keys=()), number) for number in range(3))


def test_a_raster_of_six_bands_is_learned_from_as_it_is_stored(tmp_path):
    for number in range(3):
        for half, array in zip(("images", "masks"), scene(number), strict=True):
            (tmp_path / "data" / half).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "data" / half / f"{number}.tif"
            tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig" if array.ndim == 3 else None,
                             compression="lzw", predictor=True)  # fmt: skip
    assert all(same(unsealed(tmp_path / "data", npz_keys=()), number) for number in range(3))


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((20, 30), "auto", (20, 30)),
        ((20, 30, 6), "auto", (20, 30, 6)),
        ((6, 20, 30), "auto", (20, 30, 6)),
        ((1, 20, 30), "auto", (20, 30, 1)),
        ((20, 30, 20), "first", (30, 20, 20)),
        ((20, 30, 20), "last", (20, 30, 20)),
        ((8, 30, 20), "last", (8, 30, 20)),
        ((20, 30), "first", (20, 30)),
    ],
)
def test_channels_are_the_smaller_of_the_outer_axes_unless_told(tmp_path, shape, layout, expected):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.savez(tmp_path / "a.npz", img=array, other=array)
    back = archives.read_image(tmp_path / "a.npz", "img", layout)
    assert back.shape == expected
    moved = np.moveaxis(array, 0, -1) if array.ndim == 3 and back.shape != array.shape else array
    assert layout == "first" or np.array_equal(back, moved)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (1, 20, 30)])
def test_a_mask_may_have_an_axis_more(tmp_path, shape):
    mask = np.random.default_rng(0).integers(0, 3, shape)
    np.savez(tmp_path / "a.npz", msk=mask)
    assert np.array_equal(archives.read_mask(tmp_path / "a.npz", ""), mask.reshape(20, 30))


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"img": np.zeros((16, 8, 16)), "msk": np.zeros((16, 16), int)},
         r"a\.npz: img has shape \(16, 8, 16\); .*: set data\.npz_channels to first or last"),
        ({"img": np.zeros((8, 16, 12)), "msk": np.zeros((8, 16), int)},
         r"a\.npz is 12x16, its mask .* is 16x8; they must have one size; data\.npz_channels says"),
        ({"img": np.zeros((16, 16))}, r"a\.npz: no array 'msk'; holds img; name those .* in data\.npz_keys"),
        ({"image": np.zeros((16, 16)), "mask": np.zeros(3)}, r"a\.npz: no array 'img'; holds image, mask; name those"),
        ({"img": np.full((16, 16, 6), np.nan), "msk": np.zeros((16, 16), int)}, r"a\.npz: 1536 values are NaN"),
        ({"img": np.zeros((16, 16, 6)), "msk": np.full((16, 16), 0.5)}, r"a\.npz: holds fractions"),
        ({"img": np.zeros((16, 16, 6)), "msk": np.arange(512).reshape(16, 16, 2)}, r"a\.npz: shape .* is no mask"),
        ({"img": np.zeros((2, 16, 16, 6)), "msk": np.zeros((16, 16), int)}, r"a\.npz: has shape \(2, 16, 16, 6\)"),
    ],
)  # fmt: skip
def test_an_archive_that_does_not_fit_is_refused_with_the_remedy(tmp_path, arrays, problem):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "a.npz", **arrays)
    with pytest.raises(DataError, match=problem):
        dataset.load(Data(root=str(tmp_path / "data"), tile=8, **KEYS))


def test_archives_without_their_keys_are_refused_with_what_to_write(scenes):
    with pytest.raises(DataError, match=r"such as s0\.npz; name those .* in data\.npz_keys, such as \[img, msk\]"):
        pairs.prepare(config(scenes, npz_keys=()))


def test_keys_without_archives_are_refused_by_the_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; data\.root should hold archives \*\.npz"):
        pairs.prepare(config(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no picture; expected \.npz files"):
        pairs.prepare(config(tmp_path))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"npz_keys": ("img",)}, r"npz_keys: got \['img'\]; expected two names"),
        ({"npz_keys": ("img", "img")}, "npz_keys: got .* expected two names"),
        ({"rgb": (0, 1)}, r"rgb: got \[0, 1\]; expected three bands"),
        ({"rgb": (0, -1, 1)}, "rgb: got .* counted from 0"),
    ],
)
def test_settings_of_arrays_are_refused_by_name(changed, problem):
    with pytest.raises(ValueError, match=problem):
        Data(**changed)


def test_bands_that_images_lack_cannot_be_drawn(scenes):
    with pytest.raises(DataError, match=r"data\.rgb: got \[6, 1, 0\]; images have 6 channels, counted from 0"):
        pairs.prepare(config(scenes, rgb=(6, 1, 0)))


def test_which_bands_are_drawn_changes_nothing_that_is_decoded(scenes, monkeypatch):
    first = pairs.prepare(config(scenes))
    monkeypatch.setattr(dataset, "_read_pair", lambda *_: pytest.fail("decoded again"))
    assert pairs.prepare(config(scenes, rgb=(3, 3, 3))) == first


def test_each_band_is_scaled_by_its_training_tiles_alone(scenes):
    samples, made = dataset.load(config(scenes).data)
    normaliser = pairs.normalisation.build(Config().normalise, samples, made.train)
    stored = np.concatenate([samples.image(index).reshape(BANDS, -1) for index in made.train], axis=1)
    assert normaliser.mean == pytest.approx(stored.mean(1, dtype=float))
    assert normaliser.std == pytest.approx(stored.std(1, dtype=float))


@pytest.fixture
def checkpoint(scenes, tmp_path):
    for epoch in pairs.train(config(scenes, rgb=(3, 1, 0))):
        epoch.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_prediction_reads_archives_without_masks_and_rasters(scenes, checkpoint, tmp_path):
    image = scene(9)[0]
    source = tmp_path / "new"
    source.mkdir()
    np.savez(source / "a.npz", img=image.transpose(2, 0, 1))
    np.savez(source / "b.npz", image)
    tifffile.imwrite(source / "c.tif", image, photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"b\.npz: no array 'img'; holds arr_0"):
        pairs.predict(checkpoint, source / "b.npz", tmp_path / "out")
    (source / "b.npz").unlink()
    written = pairs.predict(checkpoint, source, tmp_path / "out")
    assert [path.name for path in written] == ["a_mask.png", "a_overlay.png", "c_mask.png", "c_overlay.png"]
    masks, overlays = written[::2], written[1::2]
    assert images.read_mask(masks[0]).shape == (32, 48)
    for alike in (masks, overlays):
        assert np.array_equal(images.read_image(alike[0]), images.read_image(alike[1]))


def test_pictures_show_the_bands_asked_for(scenes, checkpoint, tmp_path):
    np.savez(tmp_path / "a.npz", img=scene(9)[0])
    changes = {"data.value_map": (0, 7)}
    shown = {}
    for bands in ((3, 3, 3), (0, 0, 0)):
        _, overlay = pairs.predict(checkpoint, tmp_path / "a.npz", tmp_path / "o", {**changes, "data.rgb": bands})
        shown[bands] = images.read_image(overlay)[..., 2].astype(float)
    left, right = (shown[3, 3, 3][:, part].mean() for part in (slice(0, 16), slice(16, 48)))
    assert abs(left - right) > 60
    assert not np.array_equal(shown[3, 3, 3], shown[0, 0, 0])
    with pytest.raises(DataError, match=r"data\.rgb: got \[0, 1, 9\]"):
        pairs.predict(checkpoint, tmp_path / "a.npz", tmp_path / "o", {"data.rgb": (0, 1, 9)})


def test_evaluation_tells_what_calling_everything_the_commonest_class_scores(checkpoint, tmp_path):
    scored = pairs.evaluate(checkpoint, "test", tmp_path / "out")
    assert scored.details["majority"] == "class0"
    assert scored.metrics["accuracy_majority"] == pytest.approx(2 / 3)
    assert scored.metrics["mean_iou_majority"] == pytest.approx(1 / 3)
    assert all((tmp_path / "out" / name).is_file() for name in scored.figures)
    assert checkpoints.read_meta(checkpoint)["in_channels"] == BANDS
