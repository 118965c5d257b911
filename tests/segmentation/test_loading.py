import logging

import numpy as np
import pytest
import torch

from segmentation import augmentation, loading, samples, splits
from segmentation.epoch import DataError
from segmentation.normalisation import Normaliser
from segmentation.samples import Sample, Samples

UNIT = Normaliser(method="unit")
AUGMENT = augmentation.build(augmentation.Augmentation(rotate_degrees=20, noise=0.1))


def stored(path, count=11, size=(8, 8), kind="uint8", planes=()):
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        samples.write(
            [
                Sample(
                    f"s{i}",
                    "g",
                    (rng.random((2, *size)) * 250).astype(kind),
                    rng.integers(0, 2, (*planes, *size)).astype(np.uint8),
                )
                for i in range(count)
            ],
            stream,
        )
    return Samples(path)


@pytest.fixture
def data(tmp_path):
    return stored(tmp_path / "a.arrow")


def run(data, indices=range(11), **changed):
    options = {"batch_size": 4, "normalise": UNIT, "shuffle": True, "seed": 1, "epoch": 1, **changed}
    return list(loading.batches(data, list(indices), **options))


def same(first, second):
    assert len(first) == len(second)
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_batches_hold_the_samples_they_name(data):
    for image, mask, index in run(data):
        assert (image.dtype, mask.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
        for place, number in enumerate(index.tolist()):
            assert np.allclose(image[place], data.image(number) / 255, atol=1e-7)
            assert np.array_equal(mask[place], data.mask(number))


@pytest.mark.parametrize("memory_mib", [0, 512])
def test_every_sample_comes_once_and_the_last_batch_is_kept(data, memory_mib):
    seen = run(data, range(1, 11), memory_mib=memory_mib)
    assert [len(index) for *_, index in seen] == [4, 4, 2]
    assert sorted(torch.cat([index for *_, index in seen]).tolist()) == list(range(1, 11))
    assert [len(index) for *_, index in run(data, range(1, 11), memory_mib=memory_mib, drop_last=True)] == [4, 4]


@pytest.mark.row("S18")
def test_balanced_weights_draw_the_rare_as_often_as_the_common(tmp_path):
    data = stored(tmp_path / "many.arrow", count=1000, size=(2, 2))
    kinds = [number % 10 == 0 for number in range(1000)]
    weights = loading.balanced(kinds)
    drawn = [
        torch.cat([index for *_, index in run(data, range(1000), weights=weights, epoch=epoch)]) for epoch in (1, 2, 1)
    ]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    for numbers in drawn:
        assert len(numbers) == 1000
        assert np.mean([kinds[number] for number in numbers.tolist()]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.row("S18")
def test_processes_share_the_draws_of_weights(data):
    weights = loading.balanced([number == 0 for number in range(11)])
    shares = [run(data, weights=weights, batch_size=2, place=(rank, 2)) for rank in (0, 1)]
    alone = run(data, weights=weights)
    for first, second, (_, _, whole) in zip(*shares, alone, strict=True):
        assert first[2].tolist() + second[2].tolist() == whole.tolist()


def test_without_shuffling_the_order_is_the_given_one(data):
    assert torch.cat([index for *_, index in run(data, [5, 2, 9], shuffle=False)]).tolist() == [5, 2, 9]


@pytest.mark.row("X5")
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(data):
    first = run(data, augment=AUGMENT)
    torch.manual_seed(99)
    assert same(first, run(data, augment=AUGMENT))
    for changed in ({"seed": 2}, {"epoch": 2}):
        again = run(data, augment=AUGMENT, **changed)
        assert [i.tolist() for *_, i in first] != [i.tolist() for *_, i in again]
    fixed = {"shuffle": False, "augment": AUGMENT}
    assert not same(run(data, **fixed), run(data, epoch=2, **fixed))


@pytest.mark.row("X5")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_from_memory_from_disk_and_by_workers(data, workers, monkeypatch):
    monkeypatch.setattr(loading, "capped_workers", lambda requested: requested)
    before = torch.get_rng_state()
    read = run(data, augment=AUGMENT, memory_mib=0, loader_workers=workers)
    assert torch.equal(torch.get_rng_state(), before), "the loader drew from the global generator"
    assert same(read, run(data, augment=AUGMENT))


@pytest.mark.parametrize("memory_mib", [0, 512])
def test_16_bit_values_and_mask_planes_pass_through(tmp_path, memory_mib):
    data = stored(tmp_path / "a.arrow", 5, kind="uint16", planes=(3,))
    image, mask, index = run(data, range(5), batch_size=5, memory_mib=memory_mib, shuffle=False)[0]
    assert mask.shape == (5, 3, 8, 8)
    assert np.allclose(image[4], data.image(4) / 65535, atol=1e-9)
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_a_set_in_memory_is_normalised_once(data):
    calls = []

    def normalise(image):
        calls.append(len(image))
        return image.float()

    run(data, normalise=normalise)
    run(data, normalise=normalise, epoch=2)
    assert calls == [11]


def test_few_sets_are_kept_and_changing_a_batch_does_not_change_the_set(data):
    first = run(data)
    for image, mask, _ in run(data):
        image.zero_()
        mask.zero_()
    assert same(first, run(data))
    for start in range(8):
        run(data, range(start, 11))
    assert len(data.memory) <= loading.SETS_IN_MEMORY


@pytest.mark.row("X16")
def test_more_workers_than_cpus_are_capped_with_one_warning(monkeypatch, caplog):
    loading.capped_workers.cache_clear()
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    with caplog.at_level(logging.WARNING):
        assert [loading.capped_workers(32) for _ in range(3)] == [3, 3, 3]
    assert len(caplog.records) == 1
    assert caplog.records[0].message == "loader_workers: 32 asked for, 3 CPUs here; using 3"
    assert loading.capped_workers(2) == 2
    loading.capped_workers.cache_clear()


def test_a_negative_number_of_workers_is_refused(data):
    with pytest.raises(ValueError, match="loader_workers: got -1"):
        run(data, loader_workers=-1)


@pytest.mark.row("X7")
@pytest.mark.parametrize("memory_mib", [0, 512])
def test_a_batch_with_a_sealed_sample_is_refused_until_the_test_split_is_open(data, memory_mib):
    sealed = data.seal([3])
    run(sealed, [0, 1, 2], memory_mib=memory_mib)
    with pytest.raises(splits.TestSplitError, match="'s3' is in the test split"):
        run(sealed, memory_mib=memory_mib)
    with splits.test_split_open():
        run(sealed, memory_mib=memory_mib)
    with pytest.raises(splits.TestSplitError):
        run(sealed, memory_mib=memory_mib)


def test_samples_of_two_sizes_make_no_batch(tmp_path):
    small, large = (np.zeros((size, size), np.uint8) for size in (4, 6))
    with (tmp_path / "a.arrow").open("wb") as stream:
        samples.write([Sample("a", "g", small[None], small), Sample("b", "g", large[None], large)], stream)
    for memory_mib in (0, 512):
        with pytest.raises(DataError, match=r"[ab] is \(1, [46], [46]\) uint8, [ab] is"):
            run(Samples(tmp_path / "a.arrow"), [0, 1], memory_mib=memory_mib)


def test_an_empty_set_gives_no_batch(data):
    assert run(data, []) == []


def test_a_normaliser_that_forgets_float32_is_refused(data):
    with pytest.raises(TypeError, match=r"normalise returned torch\.float64"):
        run(data, normalise=lambda image: image.double())


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu(data):
    flips = augmentation.build(augmentation.Augmentation(noise=0.1))
    for memory_mib in (0, 512):
        moved = run(data, augment=flips, device="cuda", memory_mib=memory_mib)
        assert all(image.is_cuda and mask.is_cuda for image, mask, _ in moved)
        for there, here in zip(moved, run(data, augment=flips), strict=True):
            assert torch.allclose(there[0].cpu(), here[0], atol=1e-6)
            assert torch.equal(there[1].cpu(), here[1])
