"""SPARK 2024 on disk: train.csv and val.csv, pictures and JPEG masks in a folder for each satellite.

    train.csv, val.csv                     columns Class, Image name, Mask name
    images/{Class}/{train,val}/{Image name}
    mask/{Class}/{train,val}/{Mask name}   `mask`, not `masks`; a Class may hold a space

The test set is a flat folder of pictures without masks.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import durable
from segmentation.epoch import DataError
from segmentation.images import read_image, read_rgb
from workloads._listing import listed
from workloads._spark.classes import COLOURS, FAR, nearest_class

Array = npt.NDArray[Any]
Part = Literal["train", "val"]
MaskResize = Literal["classes_first", "rgb_first"]

COLUMNS = ("Class", "Image name", "Mask name")
TEST_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Source:
    """One row of a CSV file: a picture and its mask, still on disk."""

    name: str
    """Unique: Class/part/Image name."""
    satellite: str
    part: Part
    """The CSV it stands in."""
    image: Path
    mask: Path


def find(part: Part, table: Path, image_root: Path, mask_root: Path) -> list[Source]:
    """Return the rows of a CSV file, in its order.

    Raises:
        DataError: for a CSV that is missing, unreadable, empty or lacks columns; a row that stands there twice or has
            an empty cell; or rows whose files are missing: all of them are counted and listed.
    """
    sources = [_source(table, part, row, image_root, mask_root) for row in _rows(table)]
    if twice := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise DataError(f"{table}: {len(twice)} pictures stand in it twice: {listed(twice)}; keep one row of each")
    _refuse_missing(table, sources)
    return sources


def test_images(source: Path) -> list[Path]:
    """Return the pictures to predict: those directly in a folder in order of name, or the one file.

    Raises:
        DataError: if there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder; expected pictures such as test_00000_img.jpg")
    found = [path for path in sorted(source.iterdir()) if path.suffix.lower() in TEST_SUFFIXES]
    found = [path for path in found if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise DataError(f"{source}: holds no {', '.join(TEST_SUFFIXES)} file; expected test_00000_img.jpg and so on")
    return found


# pytest would take it for a test, wherever it is imported.
test_images.__test__ = False  # type: ignore[attr-defined]


def read_mask(
    path: Path, size: int = 0, *, order: MaskResize = "classes_first", max_stray: float = 0.01
) -> npt.NDArray[np.uint8]:
    """Return class ids (size, size) of a coloured mask, each pixel that of the nearest class's colour.

    size: 0: as stored.
    order: whether colours become classes before the mask is resized, or after, as in the original.
    max_stray: share of pixels that may be of no class's colour.

    Raises:
        DataError: naming the file, if it cannot be read, holds no colours, or too many of none of the classes.
    """
    colours = _read_colours(path)
    if size and order == "rgb_first":
        colours = resize(colours, size, smooth=False)
    classes, stray = nearest_class(colours)
    if stray > max_stray:
        known = ", ".join(map(str, COLOURS))
        problem = f"{stray:.1%} of its pixels are more than {FAR} away from each of {known}"
        raise DataError(
            f"{path}: {problem}; expected at most {max_stray:.1%}: draw it in these, or raise data.max_stray"
        )
    return resize(classes, size, smooth=False) if size and order == "classes_first" else classes


def resize(array: npt.NDArray[np.uint8], size: int, *, smooth: bool) -> npt.NDArray[np.uint8]:
    """Return (H, W) or (H, W, C) as a square of this many pixels: bilinear where smooth, else nearest."""
    from PIL import Image

    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array).resize((size, size), how), np.uint8)


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        # Spreadsheets put a byte order mark before the first column's name.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there, rows = reader.fieldnames or [], list(reader)
    except FileNotFoundError as error:
        raise DataError(f"{table}: no such file; expected columns {', '.join(COLUMNS)}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as CSV ({error}); save it as CSV in UTF-8") from error
    if missing := [column for column in COLUMNS if column not in there]:
        raise DataError(
            f"{table}: no column {', '.join(missing)}; it has {', '.join(there) or 'none'}; name them in its first line"
        )
    if not rows:
        raise DataError(f"{table}: holds no row; expected one for each picture")
    if empty := [str(line) for line, row in enumerate(rows, start=2) if not all(row[column] for column in COLUMNS)]:
        raise DataError(f"{table}: {len(empty)} rows with an empty cell, in lines {listed(empty)}; fill or remove them")
    return rows


def _source(table: Path, part: Part, row: dict[str, str], image_root: Path, mask_root: Path) -> Source:
    satellite, image, mask = (row[column] for column in COLUMNS)
    if leading := [cell for cell in (satellite, image, mask) if durable.below(image_root, cell, links=True) is None]:
        raise DataError(f"{table}: {leading[0]!r} is no name below a folder; write names such as img_001.jpg")
    name = f"{satellite}/{part}/{image}"
    return Source(name, satellite, part, image_root / satellite / part / image, mask_root / satellite / part / mask)


def _refuse_missing(table: Path, sources: Sequence[Source]) -> None:
    exists = _existing(path.parent for source in sources for path in (source.image, source.mask))
    missing = [(source.image, source.mask) for source in sources if not (exists(source.image) and exists(source.mask))]
    if missing:
        gone = ", ".join(str(path) for pair in missing for path in pair if not exists(path))
        remedy = "put them there, name other folders by data.image_root and data.mask_root, or remove the rows"
        raise DataError(f"{table}: {len(missing)} of {len(sources)} rows lack a file: {gone}; {remedy}")


def _existing(folders: Iterable[Path]) -> Callable[[Path], bool]:
    """Return a test for files that lists each folder once: asking for 160,000 files one by one takes minutes on NFS."""
    names = {folder: {path.name for path in folder.iterdir()} if folder.is_dir() else set() for folder in set(folders)}

    def exists(path: Path) -> bool:
        # A name may hold folders of its own.
        return path.name in names[path.parent]

    return exists


def _read_colours(path: Path) -> npt.NDArray[np.uint8]:
    array = read_image(path)
    # Greys are class ids far more often than colours; black is black in both.
    if (array.ndim == 2 or array.shape[2] < 3) and array.any():
        hint = "for grey masks of class ids use the workload pairs"
        raise DataError(
            f"{path}: is grey, up to {array.max()}; expected the colours {', '.join(map(str, COLOURS))}; {hint}"
        )
    return read_rgb(path)
