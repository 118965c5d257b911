"""Counts by hand and by torchmetrics; scores under every convention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAccuracy,
    MultilabelJaccardIndex,
)

from segmentation import metrics
from segmentation.metrics import SCORES, Convention, confusion, count, counts_from_confusion, counts_multilabel

torch.set_num_threads(1)


def exclusive(seed=0, images=3, classes=4, size=20):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, size, size, generator=generator)
    return logits, torch.randint(0, classes, (images, size, size), generator=generator)


def labels(seed=0, images=3, classes=3, size=20):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, size, size, generator=generator)
    return logits, torch.randint(0, 2, logits.shape, generator=generator)


def test_the_majority_is_the_class_with_most_pixels():
    assert metrics.majority([[5, 1, 9], [5, 8, 0]]) == 0
    assert metrics.majority([1, 7, 7]) == 1


def test_calling_everything_one_class_by_hand():
    counts = np.array([[3, 1, 0, 6], [2, 1, 2, 5], [1, 2, 2, 5]])  # classes of 3, 4 and 3 pixels
    assert metrics.counts_calling(1, counts).tolist() == [[0, 0, 3, 7], [4, 6, 0, 0], [0, 0, 3, 7]]


def test_counts_worked_by_hand():
    mask = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
    called = torch.tensor([[[0, 1, 1], [0, 2, 2]]])
    table = confusion(called, mask, 3)
    assert table.tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]
    counts = counts_from_confusion(table)
    assert counts.tolist() == [[[1, 1, 1, 2], [1, 1, 1, 2], [1, 0, 0, 4]]]
    assert counts.dtype == np.int64
    assert metrics.iou(counts[0]).tolist() == pytest.approx([1 / 3, 1 / 3, 1])
    assert metrics.dice(counts[0]).tolist() == pytest.approx([1 / 2, 1 / 2, 1])
    assert metrics.pixel_accuracy(counts[0], multilabel=False) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("iou", MulticlassJaccardIndex),
        ("f1", MulticlassF1Score),
        ("precision", MulticlassPrecision),
        ("recall", MulticlassRecall),
    ],
)
def test_scores_of_exclusive_classes_are_torchmetrics(name, reference):
    logits, mask = exclusive()
    mask[:, :4] = 255
    counts = count(logits, mask, multilabel=False)
    expected = reference(num_classes=4, average=None, ignore_index=255)(logits.argmax(1), mask)
    np.testing.assert_allclose(metrics.per_class(name, counts, Convention()), expected.numpy(), rtol=1e-6)


def test_pixel_accuracy_is_torchmetrics():
    logits, mask = exclusive()
    expected = MulticlassAccuracy(num_classes=4, average="micro")(logits.argmax(1), mask)
    counts = count(logits, mask, multilabel=False).sum(0)
    assert metrics.pixel_accuracy(counts, multilabel=False) == pytest.approx(expected.item())


@pytest.mark.row("A13")
def test_label_scores_and_their_means_are_torchmetrics():
    logits, mask = labels()
    counts = count(logits, mask, multilabel=True, threshold=0.5)
    iou, accuracy = metrics.per_class("iou", counts, Convention()), metrics.per_class("accuracy", counts, Convention())
    expected_iou = MultilabelJaccardIndex(num_labels=3, threshold=0.5, average=None)(logits.sigmoid(), mask)
    expected_accuracy = MultilabelAccuracy(num_labels=3, threshold=0.5, average=None)(logits.sigmoid(), mask)
    np.testing.assert_allclose(iou, expected_iou.numpy(), rtol=1e-6)
    np.testing.assert_allclose(accuracy, expected_accuracy.numpy(), rtol=1e-6)
    mean = MultilabelJaccardIndex(num_labels=3, threshold=0.5)(logits.sigmoid(), mask)
    assert metrics.mean_over_classes(iou, Convention()) == pytest.approx(mean.item())
    micro = MultilabelAccuracy(num_labels=3, average="micro")(logits.sigmoid(), mask)
    assert metrics.pixel_accuracy(counts.sum(0), multilabel=True) == pytest.approx(micro.item())


def test_each_label_can_have_its_own_threshold_and_the_cut_is_strict():
    logits = torch.tensor([0.3, 0.5, 0.7]).logit().view(1, 3, 1, 1)
    mask = torch.ones(1, 3, 1, 1, dtype=torch.long)
    called = count(logits, mask, multilabel=True, threshold=(0.2, 0.6, 0.9))[0, :, 0]
    assert called.tolist() == [1, 0, 0]
    assert count(torch.zeros(1, 3, 1, 1), mask, multilabel=True, threshold=0.5)[0, :, 0].tolist() == [0, 0, 0]


# One image each, two pixels: class 0 is wherever class 1 is not.
CASES = {"both empty": ((0, 0), (0, 0)), "truth empty": ((0, 0), (0, 1)), "prediction empty": ((0, 1), (0, 0))}


def counts_of(*names):
    mask, called = zip(*(CASES[name] for name in names), strict=True)
    return counts_from_confusion(confusion(torch.tensor(called)[:, None], torch.tensor(mask)[:, None], 2))


@pytest.mark.row("X8")
@pytest.mark.parametrize("score", ["iou", "dice", "f1", "precision", "recall"])
@pytest.mark.parametrize(("empty", "value"), [("nan", np.nan), ("one", 1.0), ("zero", 0.0)])
@pytest.mark.parametrize("pooling", ["pixel", "image"])
def test_a_class_neither_there_nor_called_scores_what_the_convention_says(score, empty, value, pooling):
    convention = Convention(pooling=pooling, empty=empty)
    np.testing.assert_equal(metrics.per_class(score, counts_of("both empty"), convention)[1], value)
    for name in ("truth empty", "prediction empty"):
        assert metrics.per_class(score, counts_of(name), convention)[1] == 0


@pytest.mark.row("X8")
@pytest.mark.parametrize(("empty", "value"), [("nan", 0.0), ("one", 1 / 3), ("zero", 0.0)])
def test_pooled_by_image_the_empty_policy_enters_the_mean(empty, value):
    counts = counts_of("both empty", "truth empty", "prediction empty")
    assert metrics.per_class("iou", counts, Convention(pooling="image", empty=empty))[1] == pytest.approx(value)
    pixel = metrics.per_class("iou", counts, Convention(pooling="pixel", empty=empty))
    assert pixel[1] == 0


@pytest.mark.row("X8")
def test_background_counts_or_does_not():
    counts = counts_of("truth empty")
    each = metrics.per_class("iou", counts, Convention())
    assert metrics.mean_over_classes(each, Convention(background="in")) == pytest.approx(0.25)
    assert metrics.mean_over_classes(each, Convention(background="out")) == 0
    assert Convention(background="out").record() == {"pooling": "pixel", "background": "out", "empty": "nan"}


@pytest.mark.row("X8")
def test_undefined_classes_stay_out_of_the_mean_and_a_mean_of_none_is_undefined():
    assert metrics.mean_over_classes(np.array([0.5, np.nan, 0.7]), Convention()) == pytest.approx(0.6)
    assert np.isnan(metrics.mean_over_classes(np.array([0.5, np.nan]), Convention(background="out")))


@pytest.mark.row("A41")
def test_calling_everything_background_is_the_baseline_of_accuracy():
    mask = torch.zeros(1, 10, 10, dtype=torch.long)
    mask[:, 0, :3] = 1
    logits = torch.zeros(1, 2, 10, 10)
    logits[:, 1] = 1.0
    counts = count(logits, mask, multilabel=False).sum(0)
    assert metrics.background_accuracy(counts, multilabel=False) == pytest.approx(0.97)
    assert metrics.pixel_accuracy(counts, multilabel=False) == pytest.approx(0.03)
    assert metrics.class_shares(counts).tolist() == pytest.approx([0.97, 0.03])
    two = torch.stack([mask, torch.zeros_like(mask)], 1)
    counts = counts_multilabel(torch.ones_like(two), two).sum(0)
    assert metrics.background_accuracy(counts, multilabel=True) == pytest.approx(1 - 3 / 200)


@pytest.mark.row("X9")
@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 7), seed=st.integers(0, 1000), multilabel=st.booleans())
def test_counts_of_two_shards_add_up_to_those_of_one(cut, seed, multilabel):
    logits, mask = (labels if multilabel else exclusive)(seed, images=7, size=6)
    whole = count(logits, mask, multilabel=multilabel)
    shards = [count(logits[part], mask[part], multilabel=multilabel) for part in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(whole.sum(0), sum(shard.sum(0) for shard in shards))
    np.testing.assert_array_equal(whole, np.concatenate(shards))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_pixel_is_counted_once_and_scores_lie_between_zero_and_one(seed):
    logits, mask = exclusive(seed, size=7)
    counts = count(logits, mask, multilabel=False)
    assert (counts.sum(-1) == 49).all()
    assert (counts >= 0).all()
    for score in SCORES.values():
        values = score(counts)
        assert (np.isnan(values) | ((values >= 0) & (values <= 1))).all()


def test_wholly_ignored_images_are_undefined_without_a_warning():
    logits, mask = exclusive()
    counts = count(logits, torch.full_like(mask, 255), multilabel=False)
    assert counts.sum() == 0
    assert np.isnan(metrics.pixel_accuracy(counts.sum(0), multilabel=False))
    assert np.isnan(metrics.per_class("iou", counts, Convention())).all()
