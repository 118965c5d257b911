"""Outlines worked by hand, and what is said of classes that are not there."""

import math

import numpy as np
import pytest

from segmentation import evaluation, metrics, surfaces
from segmentation.evaluation import ImageScores

NAN = math.nan


def plane(*columns, height=12, width=12):
    """Return a class map in which class 1 fills columns first to last of rows 2 to 9."""
    made = np.zeros((height, width), np.uint8)
    for first, last in columns:
        made[2:10, first : last + 1] = 1
    return made


def test_a_line_beside_a_line_is_as_far_as_the_pixels_between():
    """Two lines of eight pixels, three columns apart: every distance is 3 times the step between columns."""
    found = surfaces.compare(plane((2, 2)), plane((5, 5)), 2, spacing=(1.0, 1.5), tolerance=4.4)
    assert found == pytest.approx(np.array([[4.5], [0.0]]))
    within = surfaces.compare(plane((2, 2)), plane((5, 5)), 2, spacing=(1.0, 1.5), tolerance=4.6)
    assert within[1] == pytest.approx(1.0)


def test_surface_dice_is_the_share_of_both_outlines_within_the_tolerance():
    """Truth is a line of eight; the prediction has it too, and one of the same length six columns away."""
    found = surfaces.compare(plane((2, 2), (8, 8)), plane((2, 2)), 2, spacing=(1.0, 1.0), tolerance=1.0)
    assert found[1, 0] == pytest.approx((8 + 8) / (16 + 8))
    # From prediction to truth half of the distances are 6, from truth to prediction all are 0.
    assert found[0, 0] == pytest.approx(6.0)


def test_the_95th_percentile_lets_a_twentieth_of_an_outline_be_anywhere():
    mask = np.zeros((3, 64), np.uint8)
    mask[1, :60] = 1
    stray = mask.copy()
    stray[1, 63] = 1
    found = surfaces.compare(stray, mask, 2, spacing=(1.0, 1.0), tolerance=0.5)
    assert found[0, 0] == pytest.approx(0.0)
    assert found[1, 0] == pytest.approx((60 + 60) / (61 + 60))


def test_distances_between_slices_are_those_of_their_spacing():
    mask, called = (np.zeros((8, 8, 6), np.uint8) for _ in range(2))
    mask[2:6, 2:6, 1] = 1
    called[2:6, 2:6, 3] = 1
    found = surfaces.compare(called, mask, 2, spacing=(1.5, 1.5, 10.0), tolerance=2.0)
    assert found[0, 0] == pytest.approx(20.0)


def test_a_single_slice_has_its_outlines_in_its_plane():
    """Taken in space, every voxel of a slice alone would be outline, and its inside would hide an error."""
    called, mask = plane((2, 9)), plane((2, 9))
    called[5, 5] = 0
    flat = surfaces.compare(called, mask, 2, spacing=(1.0, 1.0), tolerance=0.5)
    assert np.array_equal(
        surfaces.compare(called[..., None], mask[..., None], 2, spacing=(1, 1, 9), tolerance=0.5), flat
    )
    assert flat[1, 0] < 1


def test_the_same_everywhere_is_no_distance_and_all_of_the_outline():
    mask = np.random.default_rng(0).integers(0, 4, (9, 9, 3)).astype(np.uint8)
    found = surfaces.compare(mask, mask, 4, spacing=(1.0, 1.0, 5.0), tolerance=0.0)
    assert np.array_equal(found, [[0.0] * 3, [1.0] * 3])


@pytest.mark.parametrize("there", ["mask", "prediction"])
def test_a_class_that_only_one_of_both_has_is_as_wrong_as_can_be(there):
    one, other = plane((2, 5), height=30, width=40), plane(height=30, width=40)
    called, mask = (other, one) if there == "mask" else (one, other)
    found = surfaces.compare(called, mask, 2, spacing=(1.0, 1.0), tolerance=2.0)
    assert found == pytest.approx(np.array([[50.0], [0.0]]))


def test_a_class_that_neither_has_is_undefined():
    found = surfaces.compare(plane((2, 5)), plane((2, 5)), 3, spacing=(1.0, 1.0), tolerance=2.0)
    np.testing.assert_array_equal(found, [[0.0, NAN], [1.0, NAN]])


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="they must agree"):
        surfaces.compare(plane(), plane(width=11), 2, spacing=(1.0, 1.0), tolerance=1.0)


def scored(groups):
    counts = np.tile(np.array([[[4, 1, 1, 10], [10, 1, 1, 4], [0, 0, 0, 16]]]), (len(groups), 1, 1))
    scores = ImageScores(np.arange(len(groups)), counts, np.full(len(groups), NAN))
    return evaluation.evaluation(scores, groups, ("background", "a", "b"), multilabel=False)


def test_an_evaluation_gains_means_over_volumes_and_intervals_over_groups():
    outlines = [
        ("p1", np.array([[2.0, NAN], [0.5, NAN]])),
        ("p1", np.array([[4.0, 8.0], [0.7, 0.2]])),
        ("p2", np.array([[6.0, NAN], [0.9, NAN]])),
    ]
    before = scored(["p1", "p1", "p2"])
    found = surfaces.add(before, outlines, ("background", "a", "b"), unit="mm", tolerance=2.0)
    assert found.metrics["hd95_a"] == pytest.approx(4.0)
    assert found.metrics["hd95_b"] == pytest.approx(8.0)
    assert found.metrics["mean_hd95"] == pytest.approx(6.0)
    assert found.metrics["mean_nsd"] == pytest.approx((0.7 + 0.2) / 2)
    assert found.groups["p1"]["hd95_a"] == pytest.approx(3.0)
    assert found.groups["p2"]["hd95_b"] is None
    assert found.groups["p2"]["mean_hd95"] == pytest.approx(6.0)
    assert set(found.resamples["hd95_a"]) == {3.0, 4.0, 6.0}, "both of p1, one of each, both of p2"
    assert found.intervals["hd95_a"] == (3.0, 6.0)
    assert "hd95_b" not in found.resamples, "where p2 is drawn twice it is undefined"
    told = found.details["conventions"]
    assert told["hd95_a"]["one_empty"] == "diagonal" and told["hd95_a"]["unit"] == "mm"
    assert told["mean_nsd"] == {
        **{"pooling": "volume", "background": "out", "empty": "nan", "one_empty": "zero", "unit": "share"},
        "tolerance": "2 mm",
    }
    assert {name: found.metrics[name] for name in before.metrics} == before.metrics


def test_replicates_draw_the_groups_that_those_of_other_scores_draw():
    """Accuracy and distance are both the group's number here, so that both means tell who was drawn."""
    groups = ["p1", "p2", "p3"]
    tables = np.zeros((3, 3, 3), np.int64)
    tables[:, 0, 0], tables[:, 0, 1] = [1, 2, 3], [9, 8, 7]
    scores = ImageScores(np.arange(3), metrics.counts_from_confusion(tables), np.full(3, NAN))
    before = evaluation.evaluation(scores, groups, ("background", "a", "b"), multilabel=False)
    outlines = [(name, np.full((2, 2), place)) for place, name in enumerate(groups, start=1)]
    found = surfaces.add(before, outlines, ("background", "a", "b"), unit="mm", tolerance=1.0)
    assert found.resamples["hd95_a"] == pytest.approx([10 * share for share in before.resamples["accuracy"]])
