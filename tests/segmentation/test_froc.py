"""FROC worked by hand, and against a count of every threshold on its own."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.ndimage import label as scipy_label

from segmentation import froc
from segmentation.epoch import NonFiniteError
from segmentation.froc import Rule

EIGHT = np.ones((3, 3))


def three_images():
    """Return probabilities and masks (3, 8, 8): three lesions, one of them missed, and four false positives.

    Scores: 0.95 false (third image, clean), 0.9 finds A, 0.8 false, 0.7 false, 0.6 finds C, 0.55 false; B is missed.
    """
    probability, mask = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 2, 2] = 1  # A, by its corners
    mask[0, 6:, 6:] = 1  # B
    probability[0, 2, 2], probability[0, 3, 3] = 0.9, 0.6
    probability[0, 7, 0:2] = 0.8
    mask[1, 4, 0:4] = 1  # C
    probability[1, 4, 3:6] = 0.6
    probability[1, 0, 0] = 0.7
    probability[1, 0, 7] = 0.55
    probability[2, 3, 3] = 0.95
    return probability, mask


def detect(indices=(0, 1, 2), **rule):
    probability, mask = three_images()
    place = torch.tensor(list(indices))
    return froc.detect(probability[place], mask[place], place, rule=Rule(**rule))


@pytest.mark.row("S15")
def test_three_images_by_hand():
    found = detect()
    assert found.lesions.tolist() == [2, 1, 0]
    curve = froc.curve(found)
    assert curve.score.tolist() == pytest.approx([0.95, 0.9, 0.8, 0.7, 0.6, 0.55])
    assert (curve.false_positives * 3).tolist() == pytest.approx([1, 1, 2, 3, 3, 4])
    assert (curve.recall * 3).tolist() == pytest.approx([0, 1, 1, 1, 2, 2])
    assert {budget: froc.recall_at(found, budget) for budget in froc.BUDGETS} == pytest.approx(
        {0.125: 0, 0.25: 0, 0.5: 1 / 3, 1: 2 / 3, 2: 2 / 3, 4: 2 / 3, 8: 2 / 3}
    )
    told = json.loads(json.dumps(froc.scores(found)))
    assert told["recall_fp_image"] == told["recall_fp_1"] == pytest.approx(2 / 3)
    assert told["froc"] == pytest.approx((1 / 3 + 4 * 2 / 3) / 7)
    assert froc.scores(found, budget=1 / 3)["recall_fp_image"] == pytest.approx(1 / 3)
    assert froc.scores(found, budget=0.3)["recall_fp_image"] == 0


@pytest.mark.row("S15")
def test_what_hits_can_be_asked_for():
    # A shares 1 of 4 pixels with its candidate, C 1 of 6.
    assert froc.recall_at(detect(min_iou=0.2), 8) == pytest.approx(1 / 3)
    assert froc.recall_at(detect(min_iou=0.25), 8) == pytest.approx(1 / 3)
    assert froc.recall_at(detect(min_iou=0.26), 8) == 0
    assert froc.curve(detect(min_iou=0.26)).false_positives[-1] == 2
    # The candidate of A has pixels of 0.9 and 0.6.
    assert froc.curve(detect(score="mean")).score.tolist() == pytest.approx([0.95, 0.8, 0.75, 0.7, 0.6, 0.55])
    # Above 0.6 the second pixel and C's candidate are none.
    assert froc.curve(detect(cut=0.6)).score.tolist() == pytest.approx([0.95, 0.9, 0.8, 0.7])


@pytest.mark.row("S15")
def test_a_lesion_counts_once_and_a_candidate_may_hit_several():
    mask, probability = torch.zeros(1, 3, 9), torch.zeros(1, 3, 9)
    mask[0, 1] = torch.tensor([1, 1, 1, 1, 0, 1, 0, 0, 1])
    probability[0, 1] = torch.tensor([0.6, 0, 0.7, 0.8, 0.8, 0.8, 0, 0.0, 0])
    found = froc.detect(probability, mask, torch.zeros(1, dtype=torch.int64))
    np.testing.assert_allclose(found.candidates, [[0.8, 2, 0], [0.6, 0, 0]], rtol=1e-6)
    assert froc.recall_at(found, 0) == pytest.approx(2 / 3)


def random_images(count=6):
    generator = np.random.default_rng(1)
    fields = np.stack([gaussian_filter(generator.normal(size=(40, 48)), 2) for _ in range(count)])
    noise = np.stack([gaussian_filter(generator.normal(size=(40, 48)), 1.5) for _ in range(count)])
    mask = fields > 0.2
    return torch.from_numpy(1 / (1 + np.exp(-6 * fields - 4 * noise))).float(), torch.from_numpy(mask)


def counted_at(probability, mask, cut, score):
    """Return lesions found and false positives, candidate by candidate."""
    found = false = 0
    for values, truth in zip(probability.numpy(), mask.numpy(), strict=True):
        lesions = scipy_label(truth, EIGHT)[0]
        parts, candidates = scipy_label(values > cut, EIGHT)
        kept = [parts == part for part in range(1, candidates + 1) if values[parts == part].max() >= score]
        found += len({number for part in kept for number in lesions[part].tolist() if number})
        false += sum(not truth[part].any() for part in kept)
    return found, false


@pytest.mark.row("S15")
def test_every_point_of_the_curve_is_what_counting_gives():
    probability, mask = random_images()
    detections = froc.detect(probability, mask, torch.arange(6))
    curve = froc.curve(detections)
    assert len(curve.score) > 20 and curve.false_positives[-1] > 1
    for score, false_positives, recall in zip(curve.score, curve.false_positives, curve.recall, strict=True):
        found, false = counted_at(probability, mask, 0.5, np.float32(score))
        assert false_positives == pytest.approx(false / 6)
        assert recall == pytest.approx(found / detections.lesions.sum())


@pytest.mark.row("S15")
@pytest.mark.row("S49")
def test_candidates_beyond_the_bound_never_help():
    probability, mask = random_images()
    whole = froc.detect(probability, mask, torch.arange(6))
    few = froc.detect(probability, mask, torch.arange(6), rule=Rule(most=3))
    assert whole.kept.max() > 4 == few.kept.max()
    assert few.candidates[:, 2].sum() >= whole.candidates[:, 2].sum()
    for budget in (0.5, 1, 2, 4, 100):
        assert froc.recall_at(few, budget) <= froc.recall_at(whole, budget)
    speckled = torch.zeros(1, 64, 64)
    speckled[0, ::2, ::2] = 0.9
    noisy = froc.detect(speckled, torch.zeros(1, 64, 64), torch.zeros(1))
    assert noisy.kept.tolist() == [101] and froc.curve(noisy).false_positives[-1] == 32 * 32


@pytest.mark.row("S15")
@pytest.mark.row("X9")
def test_parts_and_repeated_images_change_nothing():
    whole, parts = detect(), froc.merge([detect([2, 0]), detect([1, 0])])
    for name in ("index", "lesions", "kept", "candidates"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert parts.kept.tolist() == [2, 3, 1]
    assert set(froc.scores(froc.merge([froc.empty(), froc.empty()])).values()) == {None}
    assert froc.gather(whole) is whole


@pytest.mark.row("S15")
@pytest.mark.row("S47")
def test_images_without_lesions_or_candidates():
    probability, mask = three_images()
    clean = froc.detect(probability[2:], mask[2:], torch.tensor([2]))
    assert set(froc.scores(clean).values()) == {None}
    assert froc.curve(clean).false_positives.tolist() == [1]
    silent = froc.detect(torch.zeros(3, 8, 8), mask, torch.arange(3))
    assert set(froc.scores(silent).values()) == {0.0}
    full = froc.detect(torch.ones(1, 8, 8), torch.ones(1, 8, 8), torch.zeros(1))
    assert set(froc.scores(full).values()) == {1.0}
    ignored = mask.clone()
    ignored[0, 7, 0:2] = 255
    assert froc.detect(probability, ignored, torch.arange(3)).kept.tolist() == [1, 3, 1]
    assert set(froc.scores(froc.merge([clean, clean])).values()) == {None}


def test_what_does_not_fit_is_refused():
    probability, mask = three_images()
    with pytest.raises(NonFiniteError, match="64 pixels are NaN, in 1 images: sample 8"):
        froc.detect(probability[1:2] * float("nan"), mask[1:2], torch.tensor([8]))
    with pytest.raises(ValueError, match=r"masks \(2, 8, 8\), 3 numbers; expected \(N, H, W\), one channel"):
        froc.detect(probability, mask[:2], torch.arange(3))
    for wrong in ({"cut": 1.0}, {"most": 0}, {"min_iou": 2.0}):
        with pytest.raises(ValueError, match="FROC: got Rule"):
            Rule(**wrong)
