import io
import pickle

import numpy as np
import pytest

from segmentation import samples, splits
from segmentation.epoch import DataError
from segmentation.samples import Sample, Samples


def made(kind, shape=(2, 3, 5), planes=()):
    rng = np.random.default_rng(len(planes))
    image = (rng.random(shape) * 250).astype(kind)
    return Sample(
        f"s-{kind}-{planes}", "g", image, rng.integers(0, 3, (*planes, *shape[1:])).astype(np.uint8), {"a": "é"}
    )


@pytest.fixture
def stored(tmp_path):
    originals = [made("uint8"), made("float32"), made("uint16", (1, 7, 3)), made("uint8", (3, 4, 4), (6,))]
    with (tmp_path / "a.arrow").open("wb") as stream:
        assert samples.write(originals, stream) == 4
    return originals, Samples(tmp_path / "a.arrow")


def test_samples_come_back_as_they_were_written(stored):
    originals, read = stored
    assert len(read) == 4
    for index, sample in enumerate(originals):
        assert (read.names[index], read.groups[index], read.extra(index)) == (sample.name, "g", {"a": "é"})
        assert read.image(index).dtype == sample.image.dtype
        assert np.array_equal(read.image(index), sample.image)
        assert np.array_equal(read.mask(index), sample.mask)
        assert read.shape(index) == sample.image.shape


def test_arrays_are_read_only_views_that_share_memory(stored):
    image = stored[1].image(1)
    assert image.flags.aligned
    assert np.shares_memory(image, stored[1].image(1))
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_samples_travel_to_another_process_as_a_path(stored):
    sealed = stored[1].seal([2])
    copy = pickle.loads(pickle.dumps(sealed))
    assert len(pickle.dumps(sealed)) < 1000
    assert np.array_equal(copy.image(1), stored[0][1].image)
    assert copy.sealed == {2}


@pytest.mark.row("X7")
def test_a_sealed_sample_opens_only_where_the_test_split_is_open(stored):
    sealed = stored[1].seal([2])
    sealed.image(0)
    for read in (sealed.image, sealed.mask):
        with pytest.raises(splits.TestSplitError, match="'s-uint16-\\(\\)' is in the test split"):
            read(2)
    with splits.test_split_open():
        assert np.array_equal(sealed.image(2), stored[0][2].image)


def test_many_samples_are_written_in_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "BATCH_BYTES", 200)
    mask = np.zeros((4, 4), np.uint8)
    with (tmp_path / "a.arrow").open("wb") as stream:
        samples.write((Sample(f"{i}", "g", np.full((1, 4, 4), i, np.uint8), mask) for i in range(50)), stream)
    read = Samples(tmp_path / "a.arrow")
    assert [int(read.image(i)[0, 0, 0]) for i in range(50)] == list(range(50))


def test_two_samples_of_one_name_are_refused():
    with pytest.raises(DataError, match="1 sample names occur twice: s-uint8-"):
        samples.write([made("uint8"), made("uint8")], io.BytesIO())


@pytest.mark.parametrize(
    ("image", "mask", "problem"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), "image is uint8 .4, 4."),
        (np.zeros((1, 4, 4), np.float64), np.zeros((4, 4), np.uint8), "image is float64"),
        (np.zeros((1, 4, 4), np.uint8), np.zeros((4, 4), np.int64), "mask is int64"),
        (np.zeros((1, 4, 6), np.uint8), np.zeros((4, 4), np.uint8), "image is 6x4, mask is 4x4"),
    ],
)
def test_arrays_of_another_kind_are_refused_by_name(image, mask, problem):
    with pytest.raises(DataError, match=f"a: {problem}"):
        Sample("a", "g", image, mask)
