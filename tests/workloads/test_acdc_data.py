"""The readers of acdc: three layouts, the slices made of them, patients kept whole, and bad input named."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from segmentation import nifti, splits
from segmentation.epoch import DataError
from workloads import acdc
from workloads._acdc import dataset, generator, reader
from workloads._acdc.dataset import Data
from workloads._acdc.generator import Synthetic

HEARTS = Synthetic(patients=4, slices=3, size=48)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def original(tmp_path):
    root = tmp_path / "original"
    generator.write(HEARTS, root)
    return root


@pytest.fixture
def nnunet(original, tmp_path):
    """The same volumes in nnU-Net's raw layout."""
    root = tmp_path / "Dataset200_ACDC"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for path in original.rglob("*.nii.gz"):
        stem = nifti.stem(path)
        target = f"labelsTr/{stem.removesuffix('_gt')}" if stem.endswith("_gt") else f"imagesTr/{stem}_0000"
        shutil.copy(path, root / f"{target}.nii.gz")
    return root


def settings(root, **changed):
    return Data(**{"root": str(root), "size": 32, **changed})


def refused(root, problem, **changed):
    with pytest.raises(DataError, match=problem) as caught:
        acdc.prepare(acdc.Config(data=settings(root, **changed)))
    return str(caught.value)


def everything(data):
    samples, made = dataset.load(data)
    with splits.test_split_open():
        found = {
            name: (samples.image(index).tobytes(), samples.mask(index).tobytes(), samples.extra(index))
            for index, name in enumerate(samples.names)
        }
    return found, made


def save(path, values):
    nifti.save(path, values, np.diag([1.5, 1.5, 10.0, 1.0]))


@pytest.mark.row("P33")
def test_both_layouts_give_the_same_slices(original, nnunet):
    first, made = everything(settings(original))
    second, other = everything(settings(nnunet))
    assert len(first) == 4 * 2 * 3
    assert first == second
    assert (made.train, made.validation, made.test) == (other.train, other.validation, other.test)


@pytest.mark.row("P33")
def test_images_without_a_channel_number_and_films_are_understood(original, nnunet):
    expected = everything(settings(original))[0]
    for path in (nnunet / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    assert everything(settings(nnunet))[0] == expected
    shutil.copy(original / "patient001/patient001_frame01.nii.gz", original / "patient001/patient001_4d.nii.gz")
    assert everything(settings(original))[0] == expected


@pytest.mark.row("P33")
@pytest.mark.parametrize("told", [True, False])
def test_phases_come_from_info_cfg_or_from_the_order_of_frames(original, told):
    info = original / "patient002/Info.cfg"
    last = re.search(r"ES: (\d+)", info.read_text())[1]
    if told:  # the other way round than the order of the frames
        info.write_text(f"ED: {last}\nES: 1\nGroup: DCM\n")
    else:
        info.unlink()
    phases = {volume.name: volume.phase for volume in reader.find(original, r"patient\d+")}
    late = f"patient002_frame{int(last):02d}"
    assert (phases["patient002_frame01"], phases[late]) == (("ES", "ED") if told else ("ED", "ES"))
    assert phases["patient001_frame01"] == "ED"


@pytest.mark.row("P34", "X6")
@pytest.mark.parametrize("seed", range(5))
def test_both_frames_of_a_patient_are_in_one_split(original, seed):
    _, made = everything(settings(original, split_seed=seed))
    owner = {}
    for name in splits.NAMES:
        for index in made[name]:
            patient = re.match(r"patient\d+", made.names[index])[0]
            assert made.groups[index] == patient
            assert owner.setdefault(patient, name) == name
    assert len(owner) == 4 and made.key == "patient"


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("patient007_frame01", r"patient\d+", "patient007"),
        ("heart-a_frame12", r"patient\d+", "heart-a"),
        ("scan_12", r"patient\d+", "scan_12"),
        ("siteA_12_left", r"^site._\d+", "siteA_12"),
        ("siteA_12_left", "", "siteA_12_left"),
    ],
)
def test_whose_volume_it_is_follows_from_its_name(name, pattern, expected):
    assert reader._patient(name, pattern) == expected


@pytest.mark.row("P34")
def test_images_for_testing_are_the_test_split(nnunet):
    for half in ("images", "labels"):
        (nnunet / f"{half}Ts").mkdir()
        for path in [*(nnunet / f"{half}Tr").glob("patient003*")]:
            path.rename(nnunet / f"{half}Ts" / path.name)
    for seed in range(3):
        _, made = everything(settings(nnunet, split_seed=seed))
        assert {made.groups[index] for index in made.test} == {"patient003"}
    shutil.copy(nnunet / "imagesTr/patient001_frame01_0000.nii.gz", nnunet / "imagesTs")
    shutil.copy(nnunet / "labelsTr/patient001_frame01.nii.gz", nnunet / "labelsTs")
    refused(nnunet, "patient001 is both for training and for testing")


@pytest.mark.row("P35")
def test_a_slice_is_clipped_and_stretched_before_it_is_resized(original):
    samples, _ = dataset.load(settings(original, size=32))
    whole, _ = dataset.load(settings(original, size=48))
    stored, _ = nifti.read(original / "patient001/patient001_frame01.nii.gz")
    low, high = np.percentile(stored[..., 1], [1, 99])
    expected = (np.clip(stored[..., 1], low, high) - low) / (high - low + 1e-8)
    scaled = dataset.scaled(stored[None, ..., 1], Data(size=48))
    assert scaled.shape == (1, 48, 48) and scaled.dtype == np.float32
    rows = dataset.scaled(stored[None, ..., 1][:, :42], Data(size=42))  # 42 x 42, nothing to resize
    cut = stored[:42, :, 1]
    low, high = np.percentile(cut, [1, 99])
    np.testing.assert_allclose(rows[0], (np.clip(cut, low, high) - low) / (high - low + 1e-8), atol=1e-5)
    assert abs(scaled.mean() - expected.mean()) < 0.01
    assert samples.shape(0) == (1, 32, 32) and whole.shape(0) == (1, 48, 48)


@pytest.mark.row("P35")
def test_a_constant_slice_becomes_zeros():
    assert not dataset.scaled(np.full((1, 9, 7), 5, np.int16), Data(size=16)).any()


@pytest.mark.row("P35")
def test_a_mask_of_another_size_has_no_new_labels():
    mask = np.random.default_rng(0).choice(np.array([0, 3], np.uint8), (40, 31))
    assert set(np.unique(dataset.resized_mask(mask, 17, 64))) == {0, 3}
    assert np.array_equal(dataset.resized_mask(dataset.resized_mask(mask, 80, 62), 40, 31), mask)


def test_notes_tell_volume_slice_phase_and_the_spacing_of_the_pixels_left(original):
    samples, _ = dataset.load(settings(original, size=24))
    note = samples.extra(samples.names.index("patient001_frame01@02"))
    stored = nifti.head(original / "patient001/patient001_frame01.nii.gz")
    assert stored.shape == (48, 42, 3)
    assert (note["volume"], note["slice"], note["phase"]) == ("patient001_frame01", "2", "ED")
    step = stored.spacing[0]
    assert json.loads(note["spacing"]) == pytest.approx([step * 2, step * 42 / 24, 8.0])


@pytest.mark.parametrize(("wanted", "expected"), [(None, [0, 1, 2, 3, 4]), (3, [1, 2, 3]), (2, [1, 2]), (9, range(5))])
def test_only_the_middle_of_a_volume_may_be_used(wanted, expected):
    assert list(dataset.central(5, wanted)) == list(expected)


def test_fewer_patients_and_slices_may_be_used(original):
    made = acdc.prepare(acdc.Config(data=settings(original, patients=3, slices_per_volume=1)))
    assert sum(made["samples"].values()) == 3 * 2
    assert made["groups"] == {"train": 1, "validation": 1, "test": 1}
    assert (made["layout"], made["volumes"], made["phases"]) == ("original", 6, {"ED": 3, "ES": 3})


def test_the_cache_follows_what_decoding_depends_on(original):
    def path(**changed):
        return dataset.load(settings(original, **changed))[0].path

    assert path() == path(split_seed=5)
    different = [path(), path(size=40), path(percentiles=(0.0, 100.0)), path(slices_per_volume=1), path(patients=3)]
    assert len(set(different)) == len(different)


def colours(folder, count=6):
    """Write pairs of RGB pictures and masks of two classes, one of them as an array."""
    rng = np.random.default_rng(0)
    for half in ("images", "masks"):
        (folder / half).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((20, 24), np.uint8)
        mask[4 + number : 12 + number, 5:15] = 1
        picture = (rng.integers(0, 60, (20, 24, 3)) + 150 * mask[..., None]).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        if number:
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        else:
            np.save(folder / "masks" / "0.npy", mask)
    return folder


@pytest.mark.row("P32", "P36")
def test_colour_pictures_of_two_classes_are_learned(tmp_path):
    data = settings(colours(tmp_path / "own"), classes=2, in_channels=3, names=("sky", "kite"))
    config = replace(acdc.Config.debug(), data=data, epochs=12)
    *_, last = acdc.train(config)
    assert last.metrics.keys() == acdc.metrics(config).keys() >= {"val_dice_kite", "val_iou_sky"}
    assert last.metrics["val_dice_kite"] > 0.6
    last_samples, _ = dataset.load(data)
    assert last_samples.shape(0) == (3, 32, 32)


@pytest.mark.row("P32")
def test_volumes_may_be_pairs_too(original, tmp_path):
    expected = everything(settings(original))[0]
    for half in ("images", "masks"):
        (tmp_path / "pairs" / half).mkdir(parents=True)
    for path in original.rglob("*.nii.gz"):
        half = "masks" if nifti.stem(path).endswith("_gt") else "images"
        shutil.copy(path, tmp_path / "pairs" / half / path.name.replace("_gt", ""))
    found = everything(settings(tmp_path / "pairs"))[0]
    assert {name: pair[:2] for name, pair in found.items()} == {name: pair[:2] for name, pair in expected.items()}


@pytest.mark.row("P32")
def test_pairs_that_do_not_match_are_named(tmp_path):
    root = colours(tmp_path / "own")
    (root / "masks/3.png").rename(root / "masks/three.png")
    refused(root, "1 image without mask: 3; 1 mask without image: three; add the missing", classes=2)


@pytest.mark.row("P32")
def test_two_files_of_one_name_are_refused(tmp_path):
    root = colours(tmp_path / "own")
    shutil.copy(root / "masks/3.png", root / "masks/3.bmp")
    refused(root, r"masks: 3.bmp and 3.png have one name; keep one", classes=2)


def test_a_volume_without_its_mask_is_refused_by_name(original):
    (original / "patient002/patient002_frame01_gt.nii.gz").unlink()
    refused(original, "1 image without mask: patient002/patient002_frame01; add the missing files")


def test_labels_beyond_the_classes_are_refused_by_file(original):
    path = original / "patient002/patient002_frame01_gt.nii.gz"
    mask = nifti.read(path)[0].copy()
    mask[0, 0, 0] = 7
    save(path, mask)
    refused(
        original, f"{path}: labels 7 are outside the 4 classes; expected 0 to 3; mend the mask, or set data.classes"
    )


def test_labels_that_are_fractions_are_refused_by_file(original):
    path = original / "patient002/patient002_frame01_gt.nii.gz"
    save(path, nifti.read(path)[0].astype(np.float32) + 0.5)
    refused(original, f"{path}: holds fractions")


def test_shapes_of_image_and_mask_that_differ_are_refused_by_file(original):
    path = original / "patient002/patient002_frame01_gt.nii.gz"
    save(path, nifti.read(path)[0][:, :, :2])
    refused(original, rf"patient002_frame01.nii.gz: is 48x42x3, its mask {path} is 48x42x2; they must have one shape")


@pytest.mark.parametrize("other", ["shape", "spacing"])
def test_frames_of_a_patient_on_different_grids_are_refused(original, other):
    for mark in ("", "_gt"):
        path = original / f"patient002/patient002_frame01{mark}.nii.gz"
        values, head = nifti.read(path)
        step = head.spacing[0] + (0.4 if other == "spacing" else 0)
        values = values[:40] if other == "shape" else values
        nifti.save(path, values, np.diag([step, head.spacing[1], 8.0, 1.0]))
    refused(
        original, r"patient002_frame\d\d.nii.gz: slices are .* of the same patient .*must share a grid: resample one"
    )


@pytest.mark.parametrize("damage", ["truncated", "text", "values"])
def test_a_file_that_cannot_be_read_is_refused_by_name(original, damage):
    path = original / "patient002/patient002_frame01.nii.gz"
    if damage == "values":
        values = nifti.read(path)[0].astype(np.float32)
        values[1, 1, 1] = np.nan
        nifti.save(path, values, np.diag([*nifti.head(path).spacing, 1.0]))
        refused(original, f"{path}: 1 values are NaN or infinite; replace them")
        return
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no volume")
    refused(original, f"{path}: unreadable or truncated .*; copy it again or remove it")


def test_a_film_in_place_of_a_frame_is_refused(original):
    path = original / "patient002/patient002_frame01.nii.gz"
    save(path, np.zeros((48, 42, 3, 5), np.int16))
    refused(original, rf"{path}: has shape \(48, 42, 3, 5\); expected")


@pytest.mark.parametrize(("made", "problem"), [(False, "no such folder"), (True, "holds none of the known layouts")])
def test_a_folder_of_another_kind_is_refused(tmp_path, made, problem):
    if made:
        (tmp_path / "data").mkdir()
    refused(tmp_path / "data", rf"{tmp_path}/data: {problem}.*patientXXX/.*imagesTr/.*images/ and masks/")


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("images", "masks")])
def test_folders_that_are_empty_or_lack_their_other_half_are_refused(tmp_path, folders):
    (tmp_path / "data" / folders[0]).mkdir(parents=True)
    refused(tmp_path / "data", f"{tmp_path}/data/{folders[1]}: no such folder; it should hold")
    (tmp_path / "data" / folders[1]).mkdir()
    refused(tmp_path / "data", f"{tmp_path}/data: holds no image with a mask; expected patientXXX/")


def test_a_file_in_place_of_the_folder_is_refused(original):
    path = original / "patient001/patient001_frame01.nii.gz"
    refused(path, f"{path}: no such folder; data.root should hold")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("mark", ["", "_gt"])
def test_a_volume_that_was_not_copied_to_its_end_is_refused_by_name(original, mark, part):
    path = original / f"patient002/patient002_frame01{mark}.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refused(original, f"{path}: unreadable or truncated .*; copy it again or remove it")


def test_a_volume_with_another_byte_than_was_written_is_refused_by_name(original):
    path = original / "patient002/patient002_frame01.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum, so that all else can be read
    path.write_bytes(bytes(content))
    refused(original, f"{path}: unreadable or truncated .*CRC.*; copy it again or remove it")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_mask_that_is_not_finite_is_refused_by_name(original, value):
    path = original / "patient002/patient002_frame01_gt.nii.gz"
    mask = nifti.read(path)[0].astype(np.float32)
    mask[:2, 0, 0] = value
    save(path, mask)
    refused(original, f"{path}: 2 values are NaN or infinite; replace them")


@pytest.mark.row("P33", "P34")
@pytest.mark.parametrize("told", [True, False])
def test_a_patient_may_have_one_frame(original, told):
    """Its phase is what Info.cfg says of it, and unknown without one."""
    for path in [*(original / "patient002").glob("*.nii.gz")]:
        if "frame01" not in path.name:
            path.unlink()
    if not told:
        (original / "patient002/Info.cfg").unlink()
    made = acdc.prepare(acdc.Config(data=settings(original)))
    assert (made["volumes"], made["phases"]) == (7, {"ED": 4 if told else 3, "ES": 3})
    _, made = everything(settings(original))
    assert sum(group == "patient002" for group in made.groups) == 3


def test_fewer_patients_than_splits_are_refused(original):
    refused(original, "2 .*patient", patients=2)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"classes": 1}, "classes: got 1"),
        ({"names": ("a", "b")}, "names: got .* expected 4 different"),
        ({"slices_per_volume": 0}, "slices_per_volume: got 0; expected 1 or more, or null"),
        ({"percentiles": (99.0, 1.0)}, "percentiles: got"),
        ({"fractions": (0.5, 0.5, 0.5)}, "fractions: got"),
        ({"patient": "("}, "patient: got .*no pattern"),
        ({"size": 4}, "size: got 4"),
    ],
)
def test_impossible_settings_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        Data(**values)


def test_generated_hearts_shrink_from_diastole_to_systole():
    shares = {systole: [] for systole in (False, True)}
    for number in range(1, 6):
        for systole, found in shares.items():
            frame = generator.heart(HEARTS, number, systole=systole)
            assert frame.image.shape == frame.mask.shape == (48, 42, 3)
            assert set(np.unique(frame.mask)) == {0, 1, 2, 3}
            found.append((frame.mask == 3).sum())
    assert all(after < before for before, after in zip(shares[False], shares[True], strict=True))
    again, other = (generator.heart(replace(HEARTS, seed=seed), 1, systole=False) for seed in (0, 1))
    assert np.array_equal(again.image, generator.heart(HEARTS, 1, systole=False).image)
    assert not np.array_equal(again.mask, other.mask)


@pytest.mark.shared_data
@pytest.mark.row("P33", "P34")
def test_real_hearts_are_read(shared_data, tmp_path):
    data = Data(root=str(shared_data / "acdc"), size=64, cache=str(tmp_path))
    made = acdc.prepare(acdc.Config(data=data))
    assert sum(made["groups"].values()) == 10 and min(made["groups"].values()) >= 1
    assert (made["volumes"], made["phases"], made["synthetic"]) == (20, {"ED": 10, "ES": 10}, False)
    assert not made["warnings"]
    samples, _ = dataset.load(data)
    volumes = reader.find(shared_data / "acdc", data.patient)
    assert len(samples) == sum(nifti.head(volume.image).shape[2] for volume in volumes)
    first = volumes[0]
    image, mask, head = reader.read(first)
    index = samples.names.index(f"{first.name}@05")
    with splits.test_split_open():
        assert np.array_equal(samples.image(index), dataset.scaled(image[..., 5], data))
        assert np.array_equal(samples.mask(index), dataset.resized_mask(mask[..., 5], 64, 64))
    assert set(np.unique(mask)) == {0, 1, 2, 3}
    assert json.loads(samples.extra(index)["spacing"])[2] == pytest.approx(head.spacing[2])
