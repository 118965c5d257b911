"""What a trained network says: of samples, as confusion tables, and of pictures that nobody has marked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segmentation import metrics, training
from segmentation.images import read_rgb
from segmentation.loading import Normaliser, capped_workers
from segmentation.training import Batch
from workloads._spark import reader, submission
from workloads._spark.classes import CLASSES
from workloads._spark.submission import Upsample

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """What a network said of some samples, in the order they came."""

    index: npt.NDArray[np.int64]
    """(N,)"""
    tables: npt.NDArray[np.int64]
    """(N, K, K), rows true, columns predicted."""
    predicted: dict[int, Pixels]
    """Class ids (H, W) of the samples to keep."""


def logits(model: nn.Module, image: Tensor, *, precision: str) -> Tensor:
    """Return logits (B, K, H, W) in single precision of images (B, C, H, W), computed in the precision asked for."""
    with training.autocast(image.device, training.resolve_precision(precision, image.device)), torch.inference_mode():
        found: Tensor = model(image)
        return found.float()


def score(model: nn.Module, batches: Iterable[Batch], keep: Collection[int], *, precision: str) -> Found:
    """Return the confusion table of every sample, and the predictions of those to keep."""
    index, tables, predicted = [np.empty(0, np.int64)], [np.empty((0, len(CLASSES), len(CLASSES)), np.int64)], {}
    for image, mask, numbers in batches:
        classes = logits(model, image, precision=precision).argmax(1)
        index.append(numbers.numpy())
        tables.append(metrics.confusion(classes, mask, len(CLASSES)))
        for number, found in zip(numbers.tolist(), classes, strict=True):
            if number in keep:
                predicted[number] = found.to(torch.uint8).cpu().numpy()
    return Found(np.concatenate(index), np.concatenate(tables), predicted)


def predict(
    model: nn.Module,
    images: Sequence[Path],
    normalise: Normaliser,
    *,
    size: int,
    batch_size: int,
    loader_workers: int,
    upsample: Upsample,
    precision: str,
) -> Iterator[tuple[Path, Pixels]]:
    """Yield each picture's path with its class ids (H, W) at its own size; the network sees squares of `size` pixels.

    The next pictures are read by threads while the network works on these.

    Raises:
        DataError: naming a picture that cannot be read.
    """
    device = next(model.parameters()).device
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    with ThreadPoolExecutor(max(1, capped_workers(loader_workers))) as pool:
        coming = [pool.submit(_read, path, size) for path in groups[0]] if groups else []
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            squares, sizes = zip(*(each.result() for each in coming), strict=True)
            coming = [pool.submit(_read, path, size) for path in following]
            seen = normalise(torch.from_numpy(np.stack(squares)))
            found = logits(model, seen.to(device), precision=precision)
            for path, own, own_size in zip(group, found, sizes, strict=True):
                yield path, submission.to_classes(own, own_size, upsample)


def _read(path: Path, size: int) -> tuple[Pixels, tuple[int, int]]:
    """Return a picture as a square (3, size, size), and its own height and width."""
    picture = read_rgb(path)
    square = reader.resize(picture, size, smooth=True)
    return np.ascontiguousarray(square.transpose(2, 0, 1)), (picture.shape[0], picture.shape[1])
