"""Read steel strips epoch after epoch: from the Arrow cache, against decoding their JPEG and JSON each time.

Both give normalised batches of strips on the canvas of 1024x256, one process, no augmentation. The cache is read from
its mapped file, as a set too large for memory is; its first epoch, which finds the file cold, does not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from segmentation import loading
from segmentation.normalisation import IMAGENET_MEAN, IMAGENET_STD, Normaliser
from segmentation.samples import Samples
from workloads._severstal import dataset
from workloads._severstal.dataset import Data
from workloads._severstal.generator import Synthetic

TINY = {"strips": 8, "rounds": 1}
BATCH = 8
NORMALISER = Normaliser(method="imagenet", mean=IMAGENET_MEAN, std=IMAGENET_STD)


def measure(strips: int = 80, rounds: int = 3) -> dict[str, Any]:
    """Return how many strips a second come from the cache and from decoding, and the ratio.

    rounds: epochs of each, in turns; the fastest counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Data(synthetic=Synthetic(samples=strips), cache=folder, duplicates="ignore")
        samples, _ = dataset.load(data)
        whole = Samples(samples.path)
        _seconds(_cached(whole))
        cached, decoded = [], []
        for _ in range(rounds):
            decoded.append(_seconds(_decoded(data)))
            cached.append(_seconds(_cached(whole)))
    return {
        "strips": strips,
        "cached_per_s": round(strips / min(cached), 1),
        "decoded_per_s": round(strips / min(decoded), 1),
        "cached_over_decoding": round(min(decoded) / min(cached), 2),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    rates = f"{result['cached_per_s']:.0f} against {result['decoded_per_s']:.0f} strips/s"
    return [
        (
            f"{result['strips']} steel strips from the Arrow cache against JPEG and JSON each time, one process",
            f"{result['cached_over_decoding']:.1f} x",
            f"{rates}; aim: at least 5 x",
        )
    ]


def _cached(samples: Samples) -> Iterator[tuple[torch.Tensor, ...]]:
    return loading.batches(
        samples,
        range(len(samples)),
        batch_size=BATCH,
        normalise=NORMALISER,
        shuffle=True,
        seed=0,
        epoch=1,
        memory_mib=0,
    )


def _decoded(data: Data) -> Iterator[tuple[torch.Tensor, ...]]:
    sources = dataset.find(data).sources
    for first in range(0, len(sources), BATCH):
        found = list(dataset.decode(data, sources[first : first + BATCH]))
        image = torch.from_numpy(np.stack([sample.image for sample in found]))
        mask = torch.from_numpy(np.stack([sample.mask for sample in found]))
        yield NORMALISER(image), mask.long()


def _seconds(batches: Iterator[tuple[torch.Tensor, ...]]) -> float:
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began
