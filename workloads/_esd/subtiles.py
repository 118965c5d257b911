"""A tile cut into subtiles and put together again, in the ESD project's files.

    <folder>/subtiles/Tile1_0_2.npz     viirs, sentinel1, sentinel2, landsat, viirs_maxproj, gt: (date, band, H, W) each
    <folder>/metadata/Tile1_0_2.json    parent_tile_id, x_gt, y_gt, subtile_size, satellites

x counts subtiles down the rows and y along them, from 0. A subtile's size is that of its ground truth in cells: 4 cuts
a tile of 16 x 16 cells into 16 subtiles. All pieces are found by their place, never by their order.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import durable
from segmentation.epoch import DataError
from segmentation.limits import read_npz
from workloads._esd.satellites import CELLS

Array = np.ndarray[Any, Any]
SUBTILES, METADATA = "subtiles", "metadata"
SIZES = tuple(size for size in range(1, CELLS + 1) if CELLS % size == 0)
"""Cells along a subtile's side that divide a tile's."""


@dataclass(frozen=True)
class SatelliteMetadata:
    """Where a stack comes from."""

    satellite_type: str
    bands: list[str]
    times: list[str]
    """Dates, as in the files' names."""
    original_filenames: list[list[str]]
    """Of each date, that of each band."""


@dataclass(frozen=True)
class TileMetadata:
    """What is known of a whole tile, to be kept with each of its subtiles."""

    parent_tile_id: str
    satellites: Mapping[str, SatelliteMetadata]


@dataclass(frozen=True)
class Subtile:
    """One piece of a tile."""

    arrays: Mapping[str, Array]
    """By satellite, and GT where there is one: (date, band, H, W)."""
    tile: TileMetadata
    x_gt: int
    """Which one down the rows."""
    y_gt: int
    """Which one along them."""
    subtile_size: int
    """Cells along its side."""

    @property
    def name(self) -> str:
        """Return what its files are called."""
        return file_stem(self.tile.parent_tile_id, self.x_gt, self.y_gt)


def file_stem(tile: str, x: int, y: int) -> str:
    """Return what the files of a subtile are called."""
    return f"{tile}_{x}_{y}"


def check_size(size: int) -> None:
    """Raise ValueError for a size that does not divide a tile's cells."""
    if size not in SIZES:
        raise ValueError(f"tile_size_gt: got {size}; expected 1, 2, 4, 8 or 16 cells, which divide {CELLS}")


def grid_slice(stacks: Mapping[str, Array], tile: TileMetadata, tile_size_gt: int) -> list[Subtile]:
    """Return the subtiles of a tile, row by row.

    stacks: of each satellite (date, band, H, W), and of GT (1, 1, 16, 16).
    tile_size_gt: cells along a subtile's side.

    Raises:
        ValueError: for a size that does not divide 16, or a stack that 16 cells do not divide.
    """
    check_size(tile_size_gt)
    for name, stack in stacks.items():
        if stack.ndim != 4 or stack.shape[2] % CELLS or stack.shape[3] % CELLS:
            raise ValueError(
                f"{tile.parent_tile_id}: {name} is {stack.shape}; expected (date, band, H, W), 16 to a side"
            )
    count = CELLS // tile_size_gt
    return [
        Subtile({name: _cut(stack, count, x, y) for name, stack in stacks.items()}, tile, x, y, tile_size_gt)
        for x in range(count)
        for y in range(count)
    ]


def join(pieces: Mapping[tuple[int, int], Array]) -> Array:
    """Return the array (..., H, W) of which these are the pieces, by their place (x, y); any rectangle of places.

    Raises:
        ValueError: naming a place of the rectangle that has no piece.
    """
    rows, columns = (sorted({place[axis] for place in pieces}) for axis in (0, 1))
    whole = [(x, y) for x in range(rows[0], rows[-1] + 1) for y in range(columns[0], columns[-1] + 1)]
    if missing := [place for place in whole if place not in pieces]:
        raise ValueError(f"no piece at {missing[0]}, of {len(whole)} places {len(missing)} are empty")
    bands = [np.concatenate([pieces[x, y] for y in columns], axis=-1) for x in rows]
    return np.concatenate(bands, axis=-2)


def restitch(
    folder: Path, satellite: str, tile: str, x_range: tuple[int, int], y_range: tuple[int, int]
) -> tuple[Array, list[list[dict[str, Any]]]]:
    """Return a satellite's stack (date, band, H, W) over some subtiles of a tile, and the metadata of each by row.

    folder: with subtiles/ and metadata/ in it.
    satellite: one of the names in the files, gt included.
    x_range, y_range: first place and the one behind the last.

    Raises:
        DataError: naming the file that is missing or damaged.
    """
    places = [[(x, y) for y in range(*y_range)] for x in range(*x_range)]
    pieces = {
        place: load_arrays(folder, file_stem(tile, *place), [satellite])[satellite] for row in places for place in row
    }
    return join(pieces), [[load_metadata(folder, file_stem(tile, *place)) for place in row] for row in places]


def save(subtiles: Iterable[Subtile], folder: Path) -> None:
    """Write the files of subtiles; each appears under its name only when it is whole, the arrays last."""
    for subtile in subtiles:
        head = {"parent_tile_id": subtile.tile.parent_tile_id, "x_gt": subtile.x_gt, "y_gt": subtile.y_gt}
        satellites = {name: asdict(each) for name, each in subtile.tile.satellites.items()}
        content = {**head, "subtile_size": subtile.subtile_size, "satellites": satellites}
        durable.write_json(folder / METADATA / f"{subtile.name}.json", content)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **subtile.arrays)
        durable.write(folder / SUBTILES / f"{subtile.name}.npz", stream.getvalue())


def load_arrays(folder: Path, stem: str, names: Iterable[str]) -> dict[str, Array]:
    """Return some arrays of a subtile's file.

    Raises:
        DataError: naming the file that is missing or damaged, or the array that it lacks.
    """
    path = folder / SUBTILES / f"{stem}.npz"
    arrays = read_npz(path)
    if lacking := [name for name in names if name not in arrays]:
        raise DataError(f"{path}: has no {lacking[0]!r}, only {', '.join(sorted(arrays))}; process the tile again")
    return {name: arrays[name] for name in names}


def load_metadata(folder: Path, stem: str) -> dict[str, Any]:
    """Return what is noted of a subtile.

    Raises:
        DataError: naming the file that is missing or damaged, or tells of another subtile than its name does.
    """
    path = folder / METADATA / f"{stem}.json"
    try:
        content = durable.read_json(path)
        tile, x, y = content["parent_tile_id"], content["x_gt"], content["y_gt"]
        if not isinstance(tile, str) or file_stem(tile, x, y) != stem:
            raise ValueError(f"it tells of {file_stem(tile, x, y)}"[:200])
        if (size := content["subtile_size"]) not in SIZES or not {x, y} <= set(range(CELLS // size)):
            raise ValueError(f"there is no subtile of {size} cells at {x}, {y}"[:200])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; process the tile again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: damaged ({problem}); remove it and process the tile again") from error
    return content


def stems(folder: Path) -> Iterator[str]:
    """Yield the names of the subtiles that lie in a folder, in order."""
    yield from sorted(path.stem for path in (folder / SUBTILES).glob("*.npz") if not path.name.startswith("."))


def _cut(stack: Array, count: int, x: int, y: int) -> Array:
    height, width = stack.shape[2] // count, stack.shape[3] // count
    return stack[:, :, x * height : (x + 1) * height, y * width : (y + 1) * width]
