"""A tile's folder of GeoTIFF files to stacks (date, band, H, W), in an order that only names decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmentation.epoch import DataError
from segmentation.rasters import read_raster
from workloads._esd.satellites import CELLS, GROUND_TRUTH, SATELLITES, Satellite

Array = np.ndarray[Any, Any]
RAW = "Train"
"""The folder in which the contest keeps the tiles that have labels."""
THREADS = 2
"""Files that are decoded at the same time; the decoders let go of Python's lock."""


@dataclass(frozen=True)
class Source:
    """The files of one satellite in one tile, a full grid of dates and bands."""

    satellite: Satellite
    dates: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    """Of each date, the file of each band."""


@dataclass(frozen=True)
class Tile:
    """One tile on disk; nothing of its pictures has been read."""

    name: str
    folder: Path
    sources: tuple[Source, ...]
    """In the order of SATELLITES."""
    labels: Path | None
    """Its ground truth, where it has one."""

    def files(self) -> list[Path]:
        """Return all files that its arrays are made of."""
        found = [file for source in self.sources for row in source.files for file in row]
        return [*found, *([self.labels] if self.labels else [])]

    def dates(self) -> dict[str, int]:
        """Return how many dates each satellite has."""
        return {source.satellite.name: len(source.dates) for source in self.sources}


def folders(root: Path) -> list[Path]:
    """Return the tiles' folders in a folder, or in its Train/, in order of name and number; or the folder itself.

    Raises:
        DataError: naming the folder, if there is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it should hold tiles, such as Tile1/{GROUND_TRUTH}")
    if found := _tiles_in(root):
        return found
    example = SATELLITES[2].file("20200816", "01")
    raise DataError(f"{root}: holds no tile; expected folders such as Tile1/ or {RAW}/Tile1/ with {example} in them")


def has_tiles(root: Path) -> bool:
    """Return whether a folder holds raw tiles where `folders` looks for them."""
    return bool(_tiles_in(root))


def is_tile(folder: Path) -> bool:
    """Return whether a folder holds files of a satellite."""
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    return any(satellite.parse(file.name) for file in folder.glob("*.tif") for satellite in SATELLITES)


def find(root: Path, *, labelled: bool = True) -> list[Tile]:
    """Return the tiles of a folder, complete and alike.

    labelled: whether each must have its ground truth.

    Raises:
        DataError: naming the tile and the file that is missing or odd.
    """
    tiles = [find_tile(folder, labelled=labelled) for folder in folders(root)]
    for tile in tiles:
        _refuse_other_dates(tile, tiles)
    return tiles


def find_tile(folder: Path, *, labelled: bool = True) -> Tile:
    """Return one tile; raises like `find`."""
    labels = folder / GROUND_TRUTH
    if labelled and not labels.is_file():
        raise DataError(f"{folder}: {GROUND_TRUTH} is missing; add it, or remove the tile")
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in (".tif", ".tiff"))
    sources = tuple(_source(folder, satellite, names) for satellite in SATELLITES)
    return Tile(folder.name, folder, sources, labels if labels.is_file() else None)


def read(tile: Tile) -> dict[str, Array]:
    """Return the stack (date, band, H, W) of each satellite as stored; all are square and of one size.

    Raises:
        DataError: naming the file that cannot be used, or whose size is not that of the others.
    """
    size: tuple[int, ...] = ()
    stacks = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for source in tile.sources:
            paths = [path for row in source.files for path in row]
            places = np.ndindex(len(source.dates), len(source.satellite.bands))
            stack: Array | None = None
            for path, place, raster in zip(paths, places, pool.map(read_raster, paths), strict=True):
                size = size or raster.shape
                _refuse_size(path, tile, raster, size)
                if stack is None or raster.dtype != stack.dtype:
                    stack = _room(stack, (len(source.dates), len(source.satellite.bands), *size[1:]), raster.dtype)
                stack[place] = raster[0]
            assert stack is not None
            stacks[source.satellite.name] = stack
    return stacks


def read_labels(tile: Tile) -> Array:
    """Return the ground truth (16, 16) as stored, uint8 of 1 to 4.

    Raises:
        DataError: naming the file, for another shape or another value.
    """
    assert tile.labels is not None
    raster = read_raster(tile.labels)
    if raster.shape != (1, CELLS, CELLS):
        bands, height, width = raster.shape
        raise DataError(
            f"{tile.labels}: {width}x{height} in {bands} bands; expected one band of {CELLS}x{CELLS} cells of 500 m"
        )
    if not np.isin(raster, (1, 2, 3, 4)).all():
        odd = sorted(set(np.unique(raster).tolist()) - {1, 2, 3, 4})
        raise DataError(f"{tile.labels}: holds {', '.join(map(str, odd[:5]))}; expected the classes 1, 2, 3 and 4")
    return np.asarray(raster[0], dtype=np.uint8)


def _tiles_in(root: Path) -> list[Path]:
    if is_tile(root):
        return [root]
    for place in (root, root / RAW):
        found = [folder for folder in place.iterdir() if is_tile(folder)] if place.is_dir() else []
        if found:
            return sorted(found, key=_natural)
    return []


def _source(folder: Path, satellite: Satellite, names: Sequence[str]) -> Source:
    found = {key: folder / name for name in names if (key := satellite.parse(name)) is not None}
    if not found:
        example = satellite.template.format(date="...", band="...")
        raise DataError(f"{folder}: no file of {satellite.name} ({example}); add them, or remove the tile")
    dates = tuple(sorted({date for date, _ in found}))
    if unknown := sorted({band for _, band in found} - set(satellite.bands)):
        path = next(path for (_, band), path in found.items() if band == unknown[0])
        raise DataError(f"{path}: {satellite.name} has no band {unknown[0]!r}; remove or rename the file")
    missing = [satellite.file(date, band) for date in dates for band in satellite.bands if (date, band) not in found]
    if missing:
        more = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise DataError(f"{folder}: {missing[0]}{more} missing; add it, remove that date's files, or remove the tile")
    return Source(satellite, dates, tuple(tuple(found[date, band] for band in satellite.bands) for date in dates))


def _refuse_other_dates(tile: Tile, tiles: Sequence[Tile]) -> None:
    """Raise DataError where a tile has another number of dates than most, so that it has other channels."""
    for source in tile.sources:
        name = source.satellite.name
        usual = Counter(other.dates()[name] for other in tiles).most_common(1)[0][0]
        if len(source.dates) != usual:
            like = next(other for other in tiles if other.dates()[name] == usual)
            example = source.satellite.file("...", source.satellite.bands[0])
            raise DataError(
                f"{tile.folder}: {len(source.dates)} dates of {name} ({example}: {', '.join(source.dates)}), where "
                f"{like.name} and most others have {usual}; add or remove files, or remove the tile"
            )


def _refuse_size(path: Path, tile: Tile, raster: Array, size: Sequence[int]) -> None:
    bands, height, width = raster.shape
    if bands != 1:
        raise DataError(f"{path}: holds {bands} bands; expected one file for each band")
    if tuple(raster.shape) != tuple(size):
        raise DataError(f"{path}: {width}x{height} pixels; the files of {tile.name} before it have {size[2]}x{size[1]}")
    if height != width or height % CELLS:
        raise DataError(f"{path}: {width}x{height} pixels; expected a square of which {CELLS} cells divide the side")
    if raster.dtype.kind not in "uif":
        raise DataError(f"{path}: holds {raster.dtype}; expected numbers")


def _room(stack: Array | None, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Return a stack that holds values of one more type, with what the one before it held."""
    if stack is None:
        return np.empty(shape, kind)
    return stack.astype(np.result_type(stack.dtype, kind))


def _natural(folder: Path) -> tuple[str, int]:
    """Return what sorts Tile2 before Tile10."""
    head = folder.name.rstrip("0123456789")
    return head, int(folder.name[len(head) :] or 0)
