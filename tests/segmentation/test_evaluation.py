"""Scores of images, however they were dealt, and evaluations whose every number has its convention."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from segmentation import bootstrap, losses, metrics
from segmentation.evaluation import ImageScores, evaluation, gather, merge, score_batches, summary
from segmentation.losses import Loss
from segmentation.metrics import Convention
from tests import processes

torch.set_num_threads(1)
NAMES = ("background", "interior", "boundary")


def seven_images():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(7, 3, 6, 6, generator=generator)
    return image, torch.randint(0, 3, (7, 6, 6), generator=generator)


def score(indices, batch_size=3):
    image, mask = seven_images()
    parts = torch.as_tensor(indices).split(batch_size)
    loss = losses.build_per_image(Loss(), multilabel=False)
    batches = ((image[part], mask[part], part) for part in parts)
    return score_batches(nn.Identity(), batches, 3, multilabel=False, loss=loss)


def assert_same(first, second):
    np.testing.assert_array_equal(first.index, second.index)
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-6)


@pytest.mark.row("X9")
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_and_shards_change_nothing(batch_size):
    whole = score(range(7))
    assert_same(score(range(7), batch_size), whole)
    assert_same(merge([score([4, 0, 2, 6]), score([1, 3, 5, 0])]), whole)


@pytest.mark.row("X9")
def test_images_repeated_by_a_sampler_count_once():
    padded = merge([score([0, 2, 4, 6]), score([1, 3, 5, 0])])
    np.testing.assert_array_equal(padded.counts.sum(0), score(range(7)).counts.sum(0))


def rank(number, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    shards = [[0, 2, 4, 6], [1, 3, 5, 0]]  # DistributedSampler repeats an image to fill up
    both = gather(score(shards[number]))
    torch.save({"index": both.index.tolist(), "counts": both.counts.tolist(), "losses": both.losses.tolist()},
               f"{results}/{number}.pt")  # fmt: skip
    torch.distributed.destroy_process_group()


@pytest.mark.row("X9")
def test_two_processes_score_the_same_as_one(tmp_path):
    processes.ranks(rank, str(tmp_path / "store"), str(tmp_path))
    whole = score(range(7))
    for number in range(2):
        saved = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert_same(ImageScores(*(np.array(saved[key]) for key in ("index", "counts", "losses"))), whole)


def test_one_process_gathers_nothing():
    whole = score(range(7))
    assert gather(whole) is whole


def test_no_batches_give_no_scores():
    nothing = score_batches(nn.Identity(), [], 3, multilabel=False)
    assert nothing.counts.shape == (0, 3, 4)


def test_the_loss_of_images_is_that_of_the_whole():
    image, mask = seven_images()
    expected = losses.build(Loss(), multilabel=False)(image, mask)
    assert score(range(7)).losses.mean() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.row("A18")
def test_a_summary_has_the_loss_each_class_and_the_means():
    found = summary(score(range(7)), NAMES, multilabel=False, prefix="val_")
    counts = score(range(7)).counts.sum(0)
    assert found["val_iou_interior"] == pytest.approx(metrics.iou(counts)[1])
    assert found["val_mean_iou"] == pytest.approx(metrics.iou(counts).mean())
    assert found["val_mean_iou_no_bg"] == pytest.approx(metrics.iou(counts)[1:].mean())
    assert found["val_accuracy"] == pytest.approx(counts[:, 0].sum() / (7 * 36))
    assert found["val_loss"] == pytest.approx(score(range(7)).losses.mean())
    assert all(isinstance(value, float) for value in found.values())


def test_a_summary_leaves_out_what_is_undefined():
    scores = ImageScores(np.arange(1), np.array([[[5, 0, 0, 0], [0, 0, 0, 5]]]), np.full(1, np.nan))
    found = summary(scores, ("background", "absent"), multilabel=False)
    assert "iou_absent" not in found
    assert "mean_iou_no_bg" not in found
    assert "loss" not in found
    assert found["mean_iou"] == 1


def test_an_evaluation_can_be_written_as_json_and_carries_every_convention():
    found = evaluation(score(range(7)), list("aabbccc"), NAMES, multilabel=False, replicates=50)
    json.dumps(asdict(found), allow_nan=False)
    assert set(found.metrics) == set(found.details["conventions"])
    assert found.details["conventions"]["mean_iou"] == {"pooling": "pixel", "background": "in", "empty": "nan"}
    assert found.details["conventions"]["mean_iou_no_bg"]["background"] == "out"
    assert set(found.groups) == {"a", "b", "c"}
    assert len(found.resamples["mean_iou"]) == 50
    low, high = found.intervals["mean_iou"]
    assert low <= found.metrics["mean_iou"] <= high


def test_groups_score_by_their_own_images():
    scores = score(range(7))
    found = evaluation(scores, list("aabbccc"), NAMES, multilabel=False, replicates=10)
    expected = metrics.iou(scores.counts[4:].sum(0))
    assert found.groups["c"]["iou_boundary"] == pytest.approx(expected[2])
    assert found.groups["c"]["mean_iou"] == pytest.approx(expected.mean())


def test_replicates_are_those_of_the_groups_counts():
    scores = score(range(7))
    found = evaluation(scores, list("abcdefg"), NAMES, multilabel=False, replicates=20, seed=4)
    drawn = bootstrap.resample_sums(scores.counts, replicates=20, seed=4)
    np.testing.assert_allclose(found.resamples["iou_interior"], metrics.iou(drawn)[:, 1])


@pytest.mark.parametrize("empty", ["nan", "one", "zero"])
def test_pooled_by_image_scores_are_means_over_images(empty):
    scores = score(range(7))
    scores.counts[:3, 1] = [0, 0, 0, 36]
    convention = Convention(pooling="image", empty=empty)
    found = evaluation(scores, list("aabbccc"), NAMES, multilabel=False, convention=convention, replicates=10)
    for family in ("iou", "recall"):
        expected = metrics.per_class(family, scores.counts, convention)
        assert found.metrics[f"{family}_interior"] == pytest.approx(expected[1])
        assert found.metrics[f"mean_{family}"] == pytest.approx(np.nanmean(expected))


@pytest.mark.row("A41")
def test_accuracy_stands_beside_that_of_calling_all_background():
    found = evaluation(score(range(7)), list("abcdefg"), NAMES, multilabel=False, replicates=10)
    mask = seven_images()[1]
    assert found.metrics["accuracy_background"] == pytest.approx((mask == 0).float().mean().item())
    assert found.details["class_shares"]["boundary"] == pytest.approx((mask == 2).float().mean().item())


def test_calling_everything_the_majority_stands_beside_scores_where_asked():
    found = evaluation(score(range(7)), list("aabbccc"), NAMES, multilabel=False, replicates=10, majority=2)
    mask = seven_images()[1]
    share = (mask == 2).float().mean().item()
    assert found.metrics["accuracy_majority"] == pytest.approx(share)
    assert found.metrics["mean_iou_majority"] == pytest.approx(share / 3)
    assert found.groups["b"]["accuracy_majority"] == pytest.approx((mask[2:4] == 2).float().mean().item())
    assert found.details["majority"] == "boundary"
    assert set(found.metrics) == set(found.details["conventions"])
    low, high = found.intervals["mean_iou_majority"]
    assert low <= found.metrics["mean_iou_majority"] <= high
    plain = evaluation(score(range(7)), list("aabbccc"), NAMES, multilabel=False, replicates=10)
    assert {name: value for name, value in found.metrics.items() if not name.endswith("_majority")} == plain.metrics
    assert "majority" not in plain.details


def test_calling_everything_the_majority_is_what_a_network_that_does_so_scores():
    mask = seven_images()[1]
    logits = torch.nn.functional.one_hot(torch.full_like(mask, 1), 3).movedim(-1, 1).float()
    for pooling in ("pixel", "image"):
        convention = Convention(pooling=pooling)
        blind = score_batches(nn.Identity(), [(logits, mask, torch.arange(7))], 3, multilabel=False)
        constant = evaluation(blind, list("aabbccc"), NAMES, multilabel=False, convention=convention, replicates=10)
        found = evaluation(
            score(range(7)), list("aabbccc"), NAMES, multilabel=False, convention=convention, replicates=10, majority=1
        )
        for name in ("mean_iou", "accuracy"):
            assert found.metrics[f"{name}_majority"] == constant.metrics[name]
            assert found.resamples[f"{name}_majority"] == constant.resamples[name]


def test_labels_that_overlap_have_no_majority():
    with pytest.raises(ValueError, match="majority: labels may overlap"):
        evaluation(score(range(7)), list("aabbccc"), NAMES, multilabel=True, majority=0)


def test_an_excluded_class_is_none_and_stays_out_of_means():
    generator = torch.Generator().manual_seed(1)
    logits, mask = torch.randn(4, 3, 5, 5, generator=generator), torch.randint(0, 2, (4, 3, 5, 5), generator=generator)
    scores = score_batches(nn.Identity(), [(logits, mask, torch.arange(4))], 3, multilabel=True)
    names = ("cr", "ps", "none")
    found = evaluation(scores, list("abcd"), names, multilabel=True, excluded=("none",), replicates=10)
    iou = metrics.iou(scores.counts.sum(0))
    assert found.metrics["iou_none"] is None
    assert found.metrics["mean_iou"] == pytest.approx(iou[:2].mean())
    assert found.metrics["accuracy"] == pytest.approx(
        metrics.pixel_accuracy(scores.counts[:, :2].sum(0), multilabel=True).item()
    )
    assert "mean_iou_no_bg" not in found.metrics
    assert found.details["excluded"] == ["none"]


def test_a_class_that_never_occurs_is_none():
    scores = ImageScores(np.arange(2), np.array([[[5, 0, 0, 0], [0, 0, 0, 5]]] * 2), np.zeros(2))
    found = evaluation(scores, ["a", "b"], ("background", "absent"), multilabel=False, replicates=5)
    assert found.metrics["iou_absent"] is None
    assert "iou_absent" not in found.intervals
    assert "iou_absent" not in found.resamples
    assert found.groups["a"]["iou_absent"] is None


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="3 classes and 2 names"):
        summary(score(range(7)), ("a", "b"), multilabel=False)
    with pytest.raises(ValueError, match="no class edge"):
        summary(score(range(7)), NAMES, multilabel=False, excluded=("edge",))


def test_labels_have_no_background_to_leave_out():
    with pytest.raises(ValueError, match="background"):
        summary(score(range(7)), NAMES, multilabel=True, convention=Convention(background="out"))
