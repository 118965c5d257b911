"""Batches of samples as tensors, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segmentation.epoch import DataError
from segmentation.samples import Samples
from segmentation.splits import test_split_is_open, test_split_open

logger = logging.getLogger(__name__)

Normaliser = Callable[[Tensor], Tensor]
Augmenter = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

# One entry for the training split, one for validation, and one to spare.
SETS_IN_MEMORY = 3


def batches(
    samples: Samples,
    indices: Sequence[int],
    *,
    batch_size: int,
    normalise: Normaliser,
    augment: Augmenter | None = None,
    shuffle: bool,
    seed: int,
    epoch: int,
    loader_workers: int = 0,
    device: torch.device | str = "cpu",
    drop_last: bool = False,
    memory_mib: int = 512,
    place: tuple[int, int] = (0, 1),
    weights: Sequence[float] = (),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield image (B, C, H, W) float32, mask (B, H, W) or (B, K, H, W) int64, and sample numbers (B,) int64.

    Order and augmentation depend on seed and epoch alone, and take nothing from PyTorch's global generator. A set that
    fits into `memory_mib` is kept as normalised tensors on the device, for which the same `normalise` must be given
    each time; a larger one is read by `loader_workers` processes while the last batches are worked on. Both ways, and
    with any number of workers, the batches are the same, because normalising and augmenting happen here.
    `normalise` takes (B, C, H, W) as stored and works on each sample by itself; `augment` gets a new generator for each
    batch.

    With `place`, rank and number of processes that train together, a batch is batch_size images of each, and these
    are the rank's own: every sample once, shares of the last batch uneven. A rank for which none is left gets one
    image to keep the others company, and no sample number.

    With `weights`, one for each of the indices, an epoch is as many draws with replacement, each sample's chance in
    proportion to its weight, instead of each sample once; shuffle is then implied.

    Raises:
        DataError: if samples differ in size or type and so cannot form a batch.
        TestSplitError: if a sample is sealed.
    """
    device = torch.device(device)
    workers = capped_workers(loader_workers)
    order = _drawn(weights, seed, epoch) if weights else _order(len(indices), shuffle, seed, epoch)
    rank, world = place
    whole = [order[start : start + batch_size * world] for start in range(0, len(order), batch_size * world)]
    if drop_last and whole and len(whole[-1]) < batch_size * world:
        whole.pop()
    shares = [chunk.tensor_split(world)[rank] for chunk in whole]
    chunks = [share if len(share) else chunk[:1] for share, chunk in zip(shares, whole, strict=True)]
    if _bytes(samples, indices) <= memory_mib * 2**20:
        made: Iterable[tuple[Tensor, Tensor]] = _from_memory(samples, tuple(indices), chunks, normalise, device)
    else:
        made = _from_disk(samples, indices, chunks, normalise, device, workers)
    numbers = torch.tensor(indices, dtype=torch.int64)
    for position, (image, mask) in enumerate(made):
        if augment is not None:
            image, mask = augment(image, mask, generator(seed, epoch, position, *[rank] * (rank > 0)))
        yield image, mask, numbers[shares[position]]


def generator(*seeds: int) -> torch.Generator:
    """Return a new CPU generator whose stream belongs to these whole numbers, such as seed, epoch and batch."""
    entropy = [seed % 2**32 for seed in seeds]
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)


@functools.cache
def capped_workers(requested: int) -> int:
    """Return as many processes as there are CPUs for them; say so once where more were asked for."""
    if requested < 0:
        raise ValueError(f"loader_workers: got {requested}; expected 0 or more")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if requested > available:
        logger.warning("loader_workers: %d asked for, %d CPUs here; using %d", requested, available, available)
    return min(requested, available)


def _order(count: int, shuffle: bool, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, epoch)) if shuffle else torch.arange(count)


def _drawn(weights: Sequence[float], seed: int, epoch: int) -> Tensor:
    chances = torch.tensor(weights, dtype=torch.float64)
    return torch.multinomial(chances, len(weights), replacement=True, generator=generator(seed, epoch))


def balanced(kinds: Sequence[Any]) -> list[float]:
    """Return weights for `batches` by which every kind is drawn as often as every other, however few it has."""
    counts = Counter(kinds)
    return [1 / counts[kind] for kind in kinds]


def _bytes(samples: Samples, indices: Sequence[int]) -> int:
    """Return the size of the set in memory: images in float32, masks of at most one plane for each class."""
    if not indices:
        return 0
    channels, height, width = samples.shape(indices[0])
    return len(indices) * height * width * (4 * channels + samples.mask(indices[0]).size // (height * width))


def _from_memory(
    samples: Samples, indices: tuple[int, ...], chunks: list[Tensor], normalise: Normaliser, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gather from tensors that live as long as the samples do."""
    if not chunks:
        return
    for index in indices if samples.sealed else ():
        samples.refuse_sealed(index)
    key = (indices, normalise, device)
    if key not in samples.memory:
        while len(samples.memory) >= SETS_IN_MEMORY:
            samples.memory.pop(next(iter(samples.memory)))
        samples.memory[key] = _load(samples, indices, normalise, device)
    image, mask = samples.memory[key]
    for chunk in chunks:
        chosen = chunk.to(device)
        yield image[chosen], mask[chosen].long()


def _load(
    samples: Samples, indices: Sequence[int], normalise: Normaliser, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the whole set normalised, some samples at a time so that the raw ones are never all there."""
    _refuse_mixed(samples, indices)
    parts = []
    for first, last in pairwise([*range(0, len(indices), 64), len(indices)]):
        image, mask = _stack(samples, indices[first:last])
        parts.append((_checked(normalise(image.to(device))), mask.to(device)))
    images, masks = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(masks)


def _from_disk(
    samples: Samples,
    indices: Sequence[int],
    chunks: list[Tensor],
    normalise: Normaliser,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read each batch from the mapped file; workers only read, so that their number changes no value."""
    reader = _Reader(samples, [[indices[position] for position in chunk.tolist()] for chunk in chunks])
    # Without its own generator the loader would draw from the global one, and dropout would depend on the loader.
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        reader,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )
    for image, mask in loader:
        image, mask = image.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        yield _checked(normalise(image)), mask.long()


class _Reader(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches by their number; keeps in a worker process whether the test split was open."""

    def __init__(self, samples: Samples, chunks: list[list[int]]) -> None:
        self.samples, self.chunks, self.test_is_open = samples, chunks, test_split_is_open()

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        with test_split_open() if self.test_is_open else nullcontext():
            return _stack(self.samples, self.chunks[position])


def _stack(samples: Samples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return images and masks as stored, copied out of the mapped file."""
    _refuse_mixed(samples, indices)
    image = np.stack([samples.image(index) for index in indices])
    mask = np.stack([samples.mask(index) for index in indices])
    return torch.from_numpy(image), torch.from_numpy(mask)


def _refuse_mixed(samples: Samples, indices: Sequence[int]) -> None:
    first = samples.image(indices[0])
    for index in indices:
        image = samples.image(index)
        if image.shape != first.shape or image.dtype != first.dtype:
            expected = f"{samples.names[indices[0]]} is {first.shape} {first.dtype}"
            raise DataError(
                f"{samples.names[index]} is {image.shape} {image.dtype}, {expected}; a batch needs one size"
            )


def _checked(image: Tensor) -> Tensor:
    if image.dtype != torch.float32:
        raise TypeError(f"normalise returned {image.dtype}; expected float32")
    return image
