"""Synthetic steel strips: what they show, that they are the same each time, and neither trivial nor beyond learning."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segmentation.epoch import DataError
from workloads._severstal import generator
from workloads._severstal.generator import Synthetic, strip

SMALL = Synthetic(samples=16, width=256, height=64)


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _strips(config, count):
    return [strip(config, number) for number in range(count)]


def test_strips_are_the_same_each_time_and_others_with_another_seed(tmp_path):
    config = dataclasses.replace(SMALL, form="both", duplicates=2)
    for name in ("a", "b"):
        generator.write(config, tmp_path / name)
    generator.write(dataclasses.replace(config, seed=1), tmp_path / "c")
    first, second, other = (_content(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first if name.endswith(".jpg"))


def test_a_strip_does_not_depend_on_how_many_there_are():
    more = dataclasses.replace(SMALL, samples=100)
    assert np.array_equal(strip(SMALL, 5).image, strip(more, 5).image)


@pytest.mark.parametrize(("clean", "expected"), [(0.5, 20), (0.25, 10), (0.0, 0)])
def test_a_share_of_plates_is_clean_and_every_other_shows_a_defect(clean, expected):
    config = Synthetic(width=128, height=32, clean=clean)
    empty = [not one.mask.any() for one in _strips(config, 40)]
    assert empty == [generator.is_clean(config, number) for number in range(40)]
    assert sum(empty) == expected


def test_each_class_is_in_a_fifth_of_the_defective_strips_or_more_and_none_overlap():
    made = [one.mask for one in _strips(Synthetic(width=128, height=32, clean=0.0), 40)]
    shown = np.array([mask.any(axis=(1, 2)) for mask in made])
    assert (shown.mean(axis=0) >= 0.2).all()
    assert shown.sum(axis=1).max() == 2
    assert all(mask.sum(axis=0).max() == 1 for mask in made)


def test_the_classes_differ_in_shape():
    made = [one.mask for one in _strips(Synthetic(width=512, height=128, clean=0.0), 8)]
    long = {}
    for index in range(4):
        rows, columns = (np.concatenate([mask[index].sum(axis) for mask in made]) for axis in (1, 0))
        long[index] = rows.max() / columns.max()
    # How long they are along the strip, by how far they reach across it.
    assert long[1] < 0.5 < long[0] < 4 < long[2]
    sizes = [np.mean([mask[index].sum() for mask in made if mask[index].any()]) for index in range(4)]
    assert sizes[3] > 2 * max(sizes[:2])


def test_no_threshold_on_brightness_finds_the_defects():
    made = _strips(dataclasses.replace(SMALL, clean=0.0), 24)
    grey = np.concatenate([one.image.ravel() for one in made])
    mask = np.concatenate([one.mask.any(axis=0).ravel() for one in made])
    best = 0.0
    for cut in range(5, 250, 5):
        for found in (grey < cut, (grey > cut)):
            best = max(best, 2 * (found & mask).sum() / (found.sum() + mask.sum()))
    assert best < 0.4


def test_no_defect_has_one_colour():
    for one in _strips(dataclasses.replace(SMALL, clean=0.0), 12):
        for channel in one.mask[one.mask.any(axis=(1, 2))]:
            assert one.image[channel > 0].std() > 4


@pytest.mark.row("S48")
def test_duplicates_show_the_first_strips_again_half_of_them_with_the_same_bytes(tmp_path):
    config = dataclasses.replace(SMALL, duplicates=4)
    generator.write(config, tmp_path)
    content = {number: (tmp_path / "supervisely/img" / generator.name_of(number)).read_bytes() for number in range(16)}
    assert [content[12 + number] == content[number] for number in range(4)] == [True, False, True, False]
    with Image.open(tmp_path / "supervisely/img" / generator.name_of(13)) as again:
        difference = np.asarray(again.convert("L"), float) - strip(config, 1).image
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("kaggle", {"train.csv", "train_images"}),
        ("supervisely", {"supervisely"}),
        ("both", {"train.csv", "train_images", "supervisely"}),
    ],
)
def test_only_the_form_asked_for_is_written(tmp_path, form, expected):
    folder = generator.ensure(dataclasses.replace(SMALL, form=form, samples=8), tmp_path)
    assert {path.name for path in folder.iterdir()} == expected
    picture = next(folder.rglob("*.jpg"))
    with Image.open(picture) as opened:
        assert (opened.mode, opened.size, opened.format) == ("RGB", (256, 64), "JPEG")
    if form != "kaggle":
        meta = json.loads((folder / "supervisely" / "meta.json").read_text())
        assert [one["title"] for one in meta["classes"]] == ["defect_1", "defect_2", "defect_3", "defect_4"]


def test_strips_are_made_once_for_each_configuration(tmp_path):
    config = dataclasses.replace(SMALL, samples=8)
    first = generator.ensure(config, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert generator.ensure(config, tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert generator.folder(dataclasses.replace(config, seed=1), tmp_path) != first


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot write the synthetic pictures .*; set data\.root"):
        generator.ensure(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 7}, "samples: got 7; expected at least 8"),
        ({"width": 63}, "width: got 63; expected at least 64"),
        ({"height": 31}, "height: got 31; expected at least 32"),
        ({"duplicates": -1}, "duplicates: got -1; expected at least 0"),
        ({"samples": 10, "duplicates": 6}, "duplicates: got 6; expected at most half of samples=10"),
        ({"clean": 1.0}, r"clean: got 1\.0; expected 0 or more, and less than 1"),
        ({"contrast": 0.0}, r"contrast: got 0\.0; expected more than 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(**values)


def test_the_smallest_strips_show_defects_too():
    config = Synthetic(width=64, height=32, clean=0.0)
    assert all(one.mask.any() for one in _strips(config, 40))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_network_learns_to_find_defects_on_strips_it_never_saw():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, clean=0.25)
    images, masks = zip(*((one.image, one.mask.any(axis=0)) for one in _strips(config, 120)), strict=True)
    image = torch.tensor(np.stack(images))[:, None].float()
    image = (image - image.mean()) / image.std()
    mask = torch.tensor(np.stack(masks))[:, None].float()
    widths = [1, 12, 12, 12, 12, 12]
    layers = []
    for place, (before, after) in enumerate(pairwise(widths)):
        reach = 2 ** min(place, 3)
        layers += [nn.Conv2d(before, after, 3, padding=reach, dilation=reach), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(200):
        batch = torch.randint(0, 90, (4,))
        probability = network(image[batch]).sigmoid()
        dice = 1 - 2 * (probability * mask[batch]).sum() / (probability + mask[batch]).sum()
        loss = dice + nn.functional.binary_cross_entropy(probability, mask[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.eval()
    with torch.no_grad():
        found = network(image[90:]) > 0
    truth = mask[90:] > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.55
