"""Intervals cover what they say; replicates are paired."""

import numpy as np
import pytest

from segmentation.bootstrap import interval, paired_difference, resample_means, resample_sums


def test_replicates_depend_on_seed_and_number_of_groups_only():
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(12, 3, 4)), generator.normal(size=(12, 2))
    together = np.concatenate([first.reshape(12, -1), second], axis=1)
    drawn = resample_sums(together, replicates=50)
    np.testing.assert_allclose(resample_sums(first, replicates=50).reshape(50, -1), drawn[:, :12])
    np.testing.assert_allclose(resample_sums(second, replicates=20), drawn[:20, 12:])
    assert not np.allclose(resample_sums(first, replicates=50, seed=1), resample_sums(first, replicates=50))


def test_each_replicate_draws_as_many_groups_as_there_are():
    assert (resample_sums(np.ones(9), replicates=100) == 9).all()
    assert (resample_means(np.full((9, 2), 4.0), replicates=10) == 4).all()


def test_the_spread_of_means_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    assert resample_means(values, replicates=4000).std() == pytest.approx(values.std() / 20, rel=0.05)


def test_the_interval_leaves_two_and_a_half_percent_on_either_side():
    assert interval(np.arange(1001)) == pytest.approx((25, 975))
    assert interval([1.0, np.nan, 3.0], level=0.5) == pytest.approx((1.5, 2.5))


@pytest.mark.parametrize("groups", [60, 150])
def test_95_percent_intervals_of_a_mean_cover_the_truth_in_93_to_97_percent(groups):
    generator = np.random.default_rng(7)
    samples = generator.beta(8, 2, size=(groups, 3000))  # columns are studies, rows are groups with a Dice of 0.8
    low, high = np.percentile(resample_means(samples, replicates=1000), [2.5, 97.5], axis=0)
    covered = np.mean((low <= 0.8) & (high >= 0.8))
    assert 0.93 <= covered <= 0.97


def test_95_percent_intervals_of_a_pooled_iou_cover_the_truth_in_93_to_97_percent():
    generator = np.random.default_rng(11)
    studies, groups = 2000, 100
    # Each group (patient) has its own size and its own quality, so that its pixels are far from independent.
    union = generator.integers(200, 2000, size=(groups, studies))
    quality = generator.beta(12, 4, size=(groups, studies))
    overlap = generator.binomial(union, quality)
    drawn = resample_sums(np.stack([overlap, union], axis=-1), replicates=1000)
    low, high = np.percentile(drawn[..., 0] / drawn[..., 1], [2.5, 97.5], axis=0)
    covered = np.mean((low <= 0.75) & (high >= 0.75))
    assert 0.93 <= covered <= 0.97


def test_a_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(5)
    difficulty = generator.normal(0.8, 0.1, size=80)
    first, second = difficulty + 0.02 + generator.normal(0, 0.01, 80), difficulty
    one, other = resample_means(first), resample_means(second)
    assert interval(one)[0] < interval(other)[1]
    found = paired_difference(one, other)
    assert found.decided
    assert found.low < 0.02 < found.high
    assert found.share_better == 1.0


def test_equal_evaluations_are_not_told_apart():
    drawn = resample_means(np.random.default_rng(1).normal(size=30), replicates=100)
    found = paired_difference(drawn, drawn)
    assert (found.mean, found.low, found.high, found.share_better, found.decided) == (0, 0, 0, 0.5, False)


def test_evaluations_of_different_length_are_not_compared():
    with pytest.raises(ValueError, match="100 and 50 replicates"):
        paired_difference(np.zeros(100), np.zeros(50))
