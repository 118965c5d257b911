"""Which strips a folder holds, and their masks, in either of two forms.

Kaggle        root/train.csv with ImageId,ClassId,EncodedPixels, or ImageId_ClassId,EncodedPixels; root/train_images/
              A strip without a row, or with empty cells alone, is a clean one.
Supervisely   {train_split,val_split,test_split}/{img,ann}, or img/ and ann/; in root, or root/supervisely; or
              root/raw/severstal/{img,ann}. The annotation of img/a.jpg is ann/a.jpg.json.

Where splits are, raw/severstal is left alone: the splits are made from it.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from segmentation.epoch import DataError
from segmentation.images import SUFFIXES, image_size
from workloads._listing import listed
from workloads._severstal.annotations import TITLES, Mask, classes_in, decode_runs, read_annotation

logger = logging.getLogger(__name__)

Form = Literal["kaggle", "supervisely"]
Choice = Literal["auto", "kaggle", "supervisely"]
Part = Literal["", "train", "validation", "test"]

TABLE, PICTURES = "train.csv", "train_images"
COLUMNS, OLDER_COLUMNS = ("ImageId", "ClassId", "EncodedPixels"), ("ImageId_ClassId", "EncodedPixels")
SPLITS: dict[str, Part] = {"train_split": "train", "val_split": "validation", "test_split": "test"}
RAW = "raw/severstal"
LAYOUTS = f"{TABLE} and {PICTURES}/, or img/ and ann/, or {', '.join(SPLITS)} with img/ and ann/ in each"
PICTURE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".npy")
CELL = 2**23
"""The longest cell of a CSV file, in letters: csv's own limit is what some masks take."""


@dataclass(frozen=True)
class Bitmaps:
    """A mask in a Supervisely file."""

    path: Path


@dataclass(frozen=True)
class Row:
    """One class of one strip in Kaggle's table."""

    line: int
    class_id: int
    """From 1."""
    text: str
    """Run lengths."""


@dataclass(frozen=True)
class Runs:
    """A mask in Kaggle's table: the rows of one strip, none for a clean one."""

    table: Path
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Source:
    """One strip and its mask, neither of them decoded."""

    name: str
    """Unique: the picture's file name."""
    image: Path
    part: Part
    """The split that the folder says, or empty."""
    mask: Bitmaps | Runs


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    form: Form
    sources: tuple[Source, ...]
    """In order of name."""
    missing: tuple[str, ...]
    """Files whose other half is there, but not they; empty where that is refused."""


def find(root: Path, form: Choice = "auto", *, strict: bool = True, titles: Sequence[str] = TITLES) -> Found:
    """Return the strips below a folder; no pixel is read.

    strict: whether a picture or a mask without its other half is an error; else it is left out with a warning.

    Raises:
        DataError: if there are none, or in both forms, or several places of one and nobody chose; for a table that is
            no such table; for missing files, all of them listed; for a name that two strips have.
    """
    found_form = _form(root, form)
    sources, missing, total = _kaggle(root, titles) if found_form == "kaggle" else _supervisely(root)
    _refuse_twice(root, sources)
    if missing:
        told = f"{root}: {len(missing)} files are missing, whose other halves are there: {', '.join(missing)}"
        if strict or len(missing) == total:
            raise DataError(f"{told}; add them, or move their other halves away")
        logger.warning("%s; their other halves are left out", told)
    if not sources:
        raise DataError(f"{root}: holds no strip; expected {LAYOUTS}")
    return Found(found_form, tuple(sorted(sources, key=lambda source: source.name)), tuple(missing))


def read_mask(source: Source, titles: Sequence[str] = TITLES) -> Mask:
    """Return (K, H, W) of 0 and 1, a channel for each class.

    Raises:
        DataError: see `annotations.read_annotation` and `annotations.decode_runs`.
    """
    size = image_size(source.image)
    if isinstance(source.mask, Bitmaps):
        return read_annotation(source.mask.path, size, titles)
    mask = np.zeros((len(titles), *size), np.uint8)
    for row in source.mask.rows:
        where = f"{source.mask.table}: line {row.line} ({source.name}, class {row.class_id})"
        mask[row.class_id - 1] = decode_runs(row.text, size, where)
    return mask


def merged(mask: npt.NDArray[Any]) -> Mask:
    """Return (H, W) of 0 and 1 from (K, H, W): whether a pixel is of any class."""
    return np.asarray(mask.any(axis=0), np.uint8)


def classes_of(source: Source, titles: Sequence[str] = TITLES) -> frozenset[int]:
    """Return the numbers, from 0, of the classes that a strip shows; none: it is clean. No mask is decoded."""
    if isinstance(source.mask, Bitmaps):
        return classes_in(source.mask.path, titles)
    return frozenset(row.class_id - 1 for row in source.mask.rows)


def files(sources: Iterable[Source]) -> list[Path]:
    """Return the files that strips are made of, each once."""
    paths = {source.image for source in sources}
    paths |= {source.mask.path if isinstance(source.mask, Bitmaps) else source.mask.table for source in sources}
    return sorted(paths)


def _form(root: Path, form: Choice) -> Form:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root should hold {LAYOUTS}")
    there: dict[Form, str] = {}
    if shown := [name for name in (TABLE, PICTURES) if (root / name).exists()]:
        there["kaggle"] = shown[0]
    if places := _places(root):
        there["supervisely"] = next(iter(places))
    if form != "auto":
        if form not in there:
            raise DataError(f"{root}: holds nothing in the form {form!r}, which was chosen; expected {LAYOUTS}")
        return form
    if len(there) > 1:
        both = f"holds strips in both forms, kaggle ({there['kaggle']}) and supervisely ({there['supervisely']})"
        raise DataError(f"{root}: {both}; set data.form to one of them")
    if not there:
        raise DataError(f"{root}: holds none of the known layouts; expected {LAYOUTS}")
    return next(iter(there))


def _kaggle(root: Path, titles: Sequence[str]) -> tuple[list[Source], list[str], int]:
    """Return strips, the missing pictures, and how many strips the table names."""
    table = root / TABLE
    pictures, rows = _pictures(root / PICTURES), table_rows(table, titles)
    sources = [
        Source(name, path, "", Runs(table, tuple(row for row in rows.get(name, ()) if row.text)))
        for name, path in pictures.items()
    ]
    return sources, [f"{PICTURES}/{name}" for name in sorted(rows.keys() - pictures.keys())], len(rows)


def _supervisely(root: Path) -> tuple[list[Source], list[str], int]:
    """Return strips, the missing files, and how many names there are."""
    places = _places(root)
    if len(places) > 1:
        raise DataError(f"{root}: holds strips in {' and in '.join(places)}; set data.root so that it holds one")
    sources, missing, total = [], [], 0
    for part, home in next(iter(places.values())):
        pictures, marked = _pictures(home / "img"), _annotations(home / "ann")
        here = home.relative_to(root)
        missing += [str(here / "ann" / f"{name}.json") for name in sorted(pictures.keys() - marked.keys())]
        missing += [str(here / "img" / name) for name in sorted(marked.keys() - pictures.keys())]
        total += len(pictures.keys() | marked.keys())
        both = pictures.keys() & marked.keys()
        sources += [Source(name, pictures[name], part, Bitmaps(marked[name])) for name in both]
    return sources, missing, total


def _places(root: Path) -> dict[str, list[tuple[Part, Path]]]:
    """Return where Supervisely's folders are: the splits of one place together, or a single one without splits."""
    places: dict[str, list[tuple[Part, Path]]] = {}
    for base in ("", "supervisely", RAW):
        home = root / base
        split = [(part, home / folder) for folder, part in SPLITS.items() if _has_folders(home / folder)]
        if split and base != RAW:
            places[str(Path(base) / split[0][1].name)] = split
        if _has_folders(home) and not (base == RAW and places):
            places[str(Path(base) / "img")] = [("", home)]
    return places


def _has_folders(home: Path) -> bool:
    return (home / "img").is_dir() or (home / "ann").is_dir()


def _pictures(folder: Path) -> dict[str, Path]:
    return _listing(folder, "the strips", PICTURE_SUFFIXES)


def _annotations(folder: Path) -> dict[str, Path]:
    """Return the annotations by their pictures' names."""
    found = _listing(folder, "an annotation such as a.jpg.json for each strip", (".json",))
    return {name[: -len(".json")]: path for name, path in found.items()}


def _listing(folder: Path, what: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold {what}")
    found = [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(suffixes)]
    return {path.name: path for path in found if not path.name.startswith(".")}


def _refuse_twice(root: Path, sources: Sequence[Source]) -> None:
    counts = Counter(source.name for source in sources)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise DataError(
            f"{root}: {len(twice)} strips stand in two splits: {listed(twice)}; keep each in one, or rename it"
        )


def table_rows(table: Path, titles: Sequence[str] = TITLES) -> Mapping[str, Sequence[Row]]:
    """Return the rows of each strip that a table names.

    Raises:
        DataError: naming the line that cannot be used, or a class that a strip has twice.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    seen: dict[tuple[str, int], int] = {}
    for line, cells in _lines(table):
        where = f"{table}: line {line}"
        name, class_id = _key(where, cells, titles)
        if (first := seen.setdefault((name, class_id), line)) != line:
            raise DataError(f"{where}: {name} has class {class_id} in line {first} too; join them into one row")
        rows[name].append(Row(line, class_id, (cells["EncodedPixels"] or "").strip()))
    return rows


def _lines(table: Path) -> list[tuple[int, dict[str, str]]]:
    # Raised, never lowered: the limit is one for the whole process.
    csv.field_size_limit(max(CELL, csv.field_size_limit()))
    try:
        # Spreadsheets put a byte order mark before the first column's name.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there = reader.fieldnames or []
            lines = [(reader.line_num, cells) for cells in reader]
    except FileNotFoundError as error:
        raise DataError(f"{table}: no such file; expected columns {', '.join(COLUMNS)}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as CSV ({error}); save it as CSV in UTF-8") from error
    if not any(set(columns) <= set(there) for columns in (COLUMNS, OLDER_COLUMNS)):
        expected = f"expected {', '.join(COLUMNS)}, or {', '.join(OLDER_COLUMNS)}"
        raise DataError(f"{table}: has columns {', '.join(there) or 'none'}; {expected}: name them in its first line")
    if not lines:
        raise DataError(f"{table}: holds no row; expected one for each class that a strip shows")
    return lines


def _key(where: str, cells: Mapping[str, str], titles: Sequence[str]) -> tuple[str, int]:
    """Return a row's image name and class, from 1."""
    if "ImageId_ClassId" in cells:
        name, _, class_text = (cells["ImageId_ClassId"] or "").rpartition("_")
        column = "ImageId_ClassId"
    else:
        name, class_text, column = cells["ImageId"] or "", cells["ClassId"] or "", "ClassId"
    if not name:
        raise DataError(f"{where}: names no image; write its file name, or remove the row")
    known = [str(number + 1) for number in range(len(titles))]
    if class_text not in known:
        expected = f"expected a class from 1 to {len(titles)}"
        raise DataError(f"{where}: {column} of {name} says {class_text!r}; {expected}: declare it, or remove the row")
    return name, int(class_text)
