"""Somebody else's predictions for strips, such as SAM2's masks, to be scored by the rules of a checkpoint.

    FOLDER/NAME.png, NAME_mask.png or NAME.jpg.png   for each strip NAME.jpg: 0 and 1, or 0 to 255 for no to yes; .npy
                                                     holds probabilities. With four classes: their numbers, 0 for none.
    FILE.csv                                         run lengths as Kaggle's: a strip that has no row has no defect

They are of the strips' own size. In a folder every strip of the split has its picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from segmentation.epoch import DataError
from segmentation.evaluation import ImageScores
from segmentation.images import list_images, read_image
from segmentation.samples import Samples
from workloads._listing import listed
from workloads._severstal import dataset, reader
from workloads._severstal.annotations import TITLES, decode_runs
from workloads._severstal.dataset import Data, Task
from workloads._severstal.reader import Row
from workloads._severstal.scoring import Found, Seen

Array = npt.NDArray[Any]
SUFFIX = "_mask"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Where the prediction of each strip is."""

    source: Path
    task: Task
    pictures: Mapping[str, Path] | None
    """By the strip's name without its suffix; None: they are in a table."""
    rows: Mapping[str, Sequence[Row]]

    def grades(self, samples: Samples, indices: Iterable[int]) -> bool:
        """Return whether each of some strips has a picture, so that a threshold can be learnt; tables are cut."""
        return self.pictures is not None and all(Path(samples.names[index]).stem in self.pictures for index in indices)

    def read(self, name: str, size: tuple[int, int]) -> Array:
        """Return the probabilities (K, H, W) of a strip, float32.

        Raises:
            DataError: naming the file that cannot be used, and why.
        """
        if self.pictures is None:
            return self._of_rows(name, size)
        path = self.pictures[Path(name).stem]
        picture = read_image(path)
        if picture.ndim == 3 and (picture == picture[..., :1]).all():
            picture = picture[..., 0]
        if picture.shape != size:
            raise DataError(
                f"{path}: is of shape {picture.shape}; {name} is of {size}, and so has to be its prediction"
            )
        return _classes(path, picture) if self.task == "multiclass4" else _probabilities(path, picture)[None]

    def _of_rows(self, name: str, size: tuple[int, int]) -> Array:
        planes = np.zeros((len(TITLES), *size), np.float32)
        for row in self.rows.get(name, ()):
            where = f"{self.source}: line {row.line} ({name}, class {row.class_id})"
            planes[row.class_id - 1] = decode_runs(row.text, size, where)
        return planes if self.task == "multiclass4" else planes.max(axis=0, keepdims=True)


def find(source: Path, task: Task) -> Predictions:
    """Return where predictions are; none of them is read.

    Raises:
        DataError: if there is no such file or folder, it holds none, or two pictures are of one strip.
    """
    if source.is_file():
        return Predictions(source=source, task=task, pictures=None, rows=reader.table_rows(source))
    pictures: dict[str, Path] = {}
    for path in list_images(source):
        name = Path(path.stem).stem if Path(path.stem).suffix in reader.PICTURE_SUFFIXES else path.stem
        if (other := pictures.setdefault(name.removesuffix(SUFFIX), path)) != path:
            raise DataError(f"{source}: {other.name} and {path.name} are of one strip; keep one of them")
    return Predictions(source=source, task=task, pictures=pictures, rows={})


def look(data: Data, samples: Samples, indices: Sequence[int], given: Predictions) -> Found:
    """Return what predictions find on some strips.

    Raises:
        DataError: naming the strips that have none.
    """
    _refuse_missing(samples, indices, given)
    channels = len(dataset.classes(data.task))
    seen = Seen(channels)
    for index in indices:
        mask = dataset.native_mask(samples, index)
        probability = given.read(samples.names[index], (mask.shape[1], mask.shape[2]))
        number = torch.tensor([index])
        seen.add_probabilities(torch.from_numpy(probability)[None], torch.from_numpy(mask)[None], number)
    unknown = np.full(len(indices), np.nan)
    order = np.sort(np.asarray(indices, np.int64))
    return seen.found(ImageScores(order, np.zeros((len(order), channels, 4), np.int64), unknown))


def _refuse_missing(samples: Samples, indices: Sequence[int], given: Predictions) -> None:
    names = [samples.names[index] for index in indices]
    if given.pictures is None:
        if given.rows.keys().isdisjoint(names):
            raise DataError(
                f"{given.source}: names none of the {len(names)} strips of the split, such as {names[0]}; "
                "write their file names into its column of images"
            )
        return
    if missing := sorted(name for name in names if Path(name).stem not in given.pictures):
        raise DataError(
            f"{given.source}: lacks predictions of {len(missing)} of {len(names)} strips: {listed(missing)}; add a "
            "picture for each, black where nothing was found"
        )


def _probabilities(path: Path, picture: Array) -> Array:
    """Return (H, W) from 0 to 1."""
    if picture.ndim != 2:
        raise DataError(f"{path}: is in colours; expected grey values, or 0 and 1")
    most = 255 if picture.dtype == np.uint8 else 65535
    if picture.dtype == np.float32:
        if picture.min() < 0 or picture.max() > 1:
            raise DataError(f"{path}: holds {picture.min():g} to {picture.max():g}; expected probabilities from 0 to 1")
        return picture
    if 1 < picture.max() <= len(TITLES):
        raise DataError(
            f"{path}: holds {picture.max()} at the most, which may be a class or a faint grey; write 0 and 1, or 0 to "
            f"{most}, or set data.task=multiclass4"
        )
    return (picture / np.float32(1 if picture.max() <= 1 else most)).astype(np.float32)


def _classes(path: Path, picture: Array) -> Array:
    """Return a plane (K, H, W) of 0 and 1 for each class."""
    if picture.ndim != 2 or picture.max() > len(TITLES) or picture.min() < 0 or (picture != np.floor(picture)).any():
        raise DataError(f"{path}: expected a class from 1 to {len(TITLES)}, or 0, for each pixel")
    return np.stack([picture == number + 1 for number in range(len(TITLES))]).astype(np.float32)
