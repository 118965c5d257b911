"""Parts that are collected are those that are merged, in few blocks."""

import numpy as np
import pytest

from segmentation import evaluation
from segmentation.collecting import Collector
from segmentation.evaluation import ImageScores


def part(*indices):
    numbers = np.array(indices)
    return ImageScores(numbers, np.arange(4) + numbers[:, None, None], numbers / 2)


@pytest.mark.row("S49")
def test_what_is_collected_is_what_merging_gives():
    parts = [part(4, 2), part(7), part(0, 1, 3), part(2), part(6), part(5, 4)]
    collector = Collector(evaluation.merge, evaluation.empty(1))
    assert collector.whole().counts.shape == (0, 1, 4)
    for number, each in enumerate(parts, start=1):
        collector.add(each)
        found, expected = collector.whole(), evaluation.merge(parts[:number])
        for name in ("index", "counts", "losses"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.row("S49")
def test_many_parts_lie_in_few_blocks_and_are_copied_few_times():
    copied = []

    def merge(parts):
        copied.append(sum(len(each.index) for each in parts))
        return evaluation.merge(parts)

    collector = Collector(merge, evaluation.empty(1))
    for number in range(1000):
        collector.add(part(number))
        assert len(collector._blocks) <= 10
    assert sum(copied) <= 1000 * 10


@pytest.mark.row("X9")
def test_an_image_that_comes_twice_is_the_one_that_came_first():
    collector = Collector(evaluation.merge, evaluation.empty(1))
    for losses in (1.0, 2.0, 3.0):
        collector.add(ImageScores(np.zeros(1, np.int64), np.ones((1, 1, 4), np.int64), np.array([losses])))
    assert collector.whole().losses.tolist() == [1.0]
