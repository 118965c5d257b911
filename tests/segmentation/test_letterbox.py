"""Onto a canvas and back."""

import csv
from collections import defaultdict

import numpy as np
import pytest
import torch

from segmentation.letterbox import Letterbox

CANVAS = (256, 1024)
STRIP = Letterbox((256, 1600), CANVAS)


def discs(size, count=6):
    """Return a mask (1, H, W) of discs, and a picture (3, H, W) that shows them."""
    rng = np.random.default_rng(0)
    rows, columns = np.ogrid[: size[0], : size[1]]
    mask = np.zeros(size, bool)
    for _ in range(count):
        radius = rng.uniform(0.08, 0.2) * min(size)
        mask |= (rows - rng.uniform(0, size[0])) ** 2 + (columns - rng.uniform(0, size[1])) ** 2 < radius**2
    mask = mask[None].astype(np.uint8)
    return mask, np.repeat(mask * np.uint8(200) + np.uint8(20), 3, axis=0)


def there_and_back(box, mask):
    return (box.back(torch.from_numpy(box.mask(mask))[None].float())[0] >= 0.5).numpy().astype(np.uint8)


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.row("S19")
def test_a_strip_fills_the_width_and_lies_in_the_middle():
    assert (STRIP.content, STRIP.corner) == ((163, 1024), (46, 0))
    assert 256 - 46 - 163 == 47, "rows of padding below"
    laid = STRIP.image(np.full((3, 256, 1600), 200, np.uint8))
    assert laid.shape == (3, *CANVAS) and laid.dtype == np.uint8
    assert (laid[:, 46:209] == 200).all() and not laid[:, :46].any() and not laid[:, 209:].any()


@pytest.mark.row("S19")
@pytest.mark.parametrize("size", [(256, 1600), (1600, 256), (256, 1024), (64, 64), (100, 90), (2000, 3001), (1, 5)])
@pytest.mark.parametrize("canvas", [CANVAS, (128, 512), (37, 53)])
def test_nothing_is_stretched_and_one_side_fits(size, canvas):
    box = Letterbox(size, canvas)
    height, width = box.content
    assert (height, width)[0 if height == canvas[0] else 1] == canvas[0 if height == canvas[0] else 1]
    # Cutting to whole pixels is all that changes the shape.
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    assert 0 <= size[0] * scale - height < 1 and 0 <= size[1] * scale - width < 1
    assert box.image(np.zeros((3, *size), np.uint8)).shape == (3, *canvas)
    assert box.back(torch.zeros(1, 2, *canvas)).shape == (1, 2, *size)


@pytest.mark.row("S19")
def test_the_shape_of_a_strip_changes_by_less_than_a_percent():
    (height, width), (rows, columns) = STRIP.size, STRIP.content
    assert abs(columns / rows / (width / height) - 1) < 0.01


@pytest.mark.row("S19")
def test_image_and_mask_stay_together():
    mask, picture = discs((256, 1600))
    laid = STRIP.image(picture)[0]
    # Half way between the two grey values is the mask's edge.
    assert iou((laid >= 120).astype(np.uint8), STRIP.mask(mask)[0]) == 1.0


@pytest.mark.row("S20")
@pytest.mark.parametrize("size", [(256, 1600), (100, 90), (512, 2048)])
def test_a_mask_comes_back_nearly_as_it_was(size):
    mask, _ = discs(size)
    back = there_and_back(Letterbox(size, CANVAS), mask)
    assert back.shape == mask.shape
    assert iou(back, mask) > 0.95


@pytest.mark.row("S20")
def test_what_fits_already_comes_back_bit_for_bit():
    mask, picture = discs(CANVAS)
    box = Letterbox(CANVAS, CANVAS)
    np.testing.assert_array_equal(box.image(picture), picture)
    np.testing.assert_array_equal(there_and_back(box, mask), mask)


@pytest.mark.row("S20")
@pytest.mark.shared_data
def test_masks_of_real_strips_come_back(shared_data):
    """Many of their edges are ragged: of each strip at least 0.93 is kept, of all together 0.95."""
    flat = defaultdict(lambda: np.zeros(256 * 1600, np.uint8))
    with (shared_data / "steel" / "train.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = [int(word) for word in row["EncodedPixels"].split()]
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                flat[row["ImageId"]][start - 1 : start - 1 + length] = 1
    masks = np.stack([one.reshape(1600, 256).T for one in flat.values()])[:, None]
    back = np.stack([there_and_back(STRIP, mask) for mask in masks])
    assert len(masks) == 40
    assert iou(back, masks) > 0.95
    assert min(iou(one, other) for one, other in zip(back, masks, strict=True)) > 0.93


def test_bad_sizes_are_told():
    with pytest.raises(ValueError, match=r"a picture of 10000x1 has no pixel left on a canvas of 1024x256"):
        Letterbox((1, 10000), CANVAS)
    with pytest.raises(ValueError, match=r"expected at least 1 x 1"):
        Letterbox((0, 10), CANVAS)
    with pytest.raises(ValueError, match=r"got \(3, 10, 10\); expected \(C, 256, 1600\)"):
        STRIP.image(np.zeros((3, 10, 10), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(B, K, 256, 1024\)"):
        STRIP.back(torch.zeros(1, 256, 1024))
