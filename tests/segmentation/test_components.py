"""Cleaning by hand, and its candidates against cleaning with each of them."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from segmentation import components, evaluation, metrics
from segmentation.components import Cleaning

AREAS = (0, 2, 10, 40, 10_000)


def drawn(text):
    return np.array([[character == "#" for character in line.strip()] for line in text.strip().splitlines()])


PICTURE = drawn("""
    ###.....#
    #.#......
    ###..#...
    ......#..
""")


def test_components_join_at_corners():
    labels, count = components.label(PICTURE)
    assert count == 3
    assert labels[2, 5] == labels[3, 6] != labels[0, 8]
    assert components.label(np.zeros((2, 2), bool))[1] == 0


@pytest.mark.parametrize(
    ("cleaning", "expected"),
    [
        (Cleaning(), PICTURE.sum()),
        (Cleaning(min_area=1), PICTURE.sum()),
        (Cleaning(min_area=2), 10),
        (Cleaning(min_area=3), 8),
        (Cleaning(min_area=9), 0),
        (Cleaning(fill_holes=True), 12),
        (Cleaning(min_area=9, fill_holes=True), 9),
    ],
)
def test_a_ring_a_pair_and_a_dot(cleaning, expected):
    whole = components.clean(PICTURE, cleaning)
    assert whole.sum() == expected and whole.dtype == bool
    assert (components.clean(whole, cleaning) == whole).all()


def test_a_hole_that_opens_over_an_edge_is_none_and_one_at_a_corner_is():
    ring = drawn("""
        .##.
        #..#
        .##.
    """)
    assert components.clean(ring, Cleaning(fill_holes=True)).sum() == 8
    ring[0, 1] = False
    assert components.clean(ring, Cleaning(fill_holes=True)).sum() == 5


def random_images(count=5):
    generator = np.random.default_rng(0)
    fields = np.stack([gaussian_filter(generator.normal(size=(48, 64)), 3) for _ in range(count)])
    noise = np.stack([gaussian_filter(generator.normal(size=(48, 64)), 1) for _ in range(count)])
    mask = (fields > 0.12).astype(np.uint8)
    mask[3] = 0
    return torch.from_numpy(fields + 0.2 * noise > 0.1), torch.from_numpy(mask)


def counted(indices=range(5), fill_holes=False):
    called, mask = random_images()
    place = torch.tensor(list(indices))
    return components.count_candidates(called[place], mask[place], place, AREAS, fill_holes=fill_holes)


@pytest.mark.parametrize("fill_holes", [False, True])
def test_candidates_count_what_cleaning_leaves(fill_holes):
    called, mask = random_images()
    mask[2, :10] = 255
    found = components.count_candidates(called, mask, torch.arange(5), AREAS, fill_holes=fill_holes)
    cleanings = [Cleaning(min_area=area, fill_holes=fill_holes) for area in AREAS]
    left = torch.stack([components.cleaned(called, cleaning) for cleaning in cleanings], dim=1)
    expected = metrics.counts_multilabel(left, mask[:, None].expand_as(left))
    np.testing.assert_array_equal(found.counts, expected)
    assert len(np.unique(found.counts.sum(0), axis=0)) == len(AREAS)


def test_validation_prefers_the_area_of_the_best_dice():
    choice = components.choose(counted(), AREAS, fill_holes=False, empty="one")
    called, mask = random_images()
    for area in AREAS:
        left = components.cleaned(called, Cleaning(min_area=area))
        scores = metrics.fill_empty(metrics.dice(metrics.counts_multilabel(left[:, None], mask[:, None])), "one")
        assert choice.dice[area] == pytest.approx(scores.mean())
    assert choice.dice[choice.cleaning.min_area] == max(choice.dice.values()) > choice.dice[0]
    assert Cleaning(**json.loads(json.dumps(choice.cleaning.record()))) == choice.cleaning


def test_of_equal_candidates_the_smallest_is_chosen():
    square = torch.ones(1, 4, 4, dtype=torch.uint8)
    found = components.count_candidates(square, square, torch.zeros(1), (16, 9, 0), fill_holes=False)
    choice = components.choose(found, (16, 9, 0), fill_holes=False)
    assert choice.cleaning == Cleaning() and choice.dice == {0: 1, 9: 1, 16: 1}
    nothing = components.count_candidates(square * 0, square * 0, torch.zeros(1), (3, 0), fill_holes=True)
    choice = components.choose(nothing, (3, 0), fill_holes=True)
    assert choice.cleaning == Cleaning(fill_holes=True) and choice.dice == {0: None, 3: None}


@pytest.mark.row("X9")
def test_parts_and_repeated_images_change_nothing():
    merged = evaluation.merge([counted([4, 0, 2]), counted([1, 3, 0])])
    np.testing.assert_array_equal(merged.counts, counted().counts)
    nothing = components.count_candidates(
        torch.zeros(0, 4, 4), torch.zeros(0, 4, 4), torch.zeros(0), AREAS, fill_holes=True
    )
    assert evaluation.merge([nothing, counted()]).counts.shape == (5, len(AREAS), 4)
    assert components.cleaned(torch.zeros(0, 4, 4), Cleaning()).shape == (0, 4, 4)


def test_what_does_not_fit_is_refused():
    square = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match=r"expected \(N, H, W\) of both"):
        components.count_candidates(square, square[0], torch.zeros(1), (0,), fill_holes=False)
    with pytest.raises(ValueError, match=r"areas: got \[-1\]"):
        components.count_candidates(square, square, torch.zeros(1), (-1,), fill_holes=False)
    with pytest.raises(ValueError, match="areas: got 2, and counts of 5 candidates"):
        components.choose(counted(), (0, 1), fill_holes=False)
    with pytest.raises(ValueError, match="min_area: got -1"):
        Cleaning(min_area=-1)
