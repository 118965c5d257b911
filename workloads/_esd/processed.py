"""Raw tiles to the folders of subtiles that the ESD project keeps, each tile once.

    <folder>/4x4/{Train,Val,Test}/{subtiles,metadata}/     see workloads._esd.subtiles
    <folder>/4x4/tiles/Tile1.json                          that Tile1 is done: of which files, and where it lies

A tile that is done is left alone, and one that was not finished is processed again. Sizes lie side by side. Where the
splits have changed since, a tile's files are moved.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import durable
from segmentation import cache, splits
from segmentation.epoch import DataError
from workloads._esd import preprocessing, reader, subtiles
from workloads._esd.reader import Tile
from workloads._esd.satellites import GT, MAXPROJ, SATELLITES, VIIRS
from workloads._esd.subtiles import METADATA, SUBTILES, SatelliteMetadata, TileMetadata

VERSION = 1
"""Raise where the same files are to become other arrays."""
FOLDERS: Mapping[str, str] = dict(zip(splits.NAMES, ("Train", "Val", "Test"), strict=True))
"""What the folder of each split is called."""
DONE = "tiles"
Storage = Literal["float16", "float32"]


def place(folder: Path, size: int) -> Path:
    """Return the folder of the subtiles of a size, such as 4x4, in a folder of several sizes or beside one of them."""
    home = folder.parent if re.fullmatch(r"(\d+)x\1", folder.name) else folder
    return home / f"{size}x{size}"


def is_processed(root: Path) -> bool:
    """Return whether a folder holds subtiles of processed tiles."""
    return any((root / name / SUBTILES).is_dir() for name in FOLDERS.values())


def tiles_in(root: Path) -> dict[str, str]:
    """Return the split of each tile whose subtiles lie in a processed folder.

    Raises:
        DataError: naming a tile that lies in two splits, or is not whole.
    """
    owner: dict[str, str] = {}
    counts: dict[str, set[tuple[int, int]]] = {}
    for split, name in FOLDERS.items():
        for stem in subtiles.stems(root / name):
            note = subtiles.load_metadata(root / name, stem)
            tile, size = note["parent_tile_id"], int(note["subtile_size"])
            if owner.setdefault(tile, split) != split:
                raise DataError(f"{root}: {tile} lies in {FOLDERS[owner[tile]]} and in {name}; remove it from one")
            counts.setdefault(tile, {(x, y) for x in range(16 // size) for y in range(16 // size)})
            counts[tile].discard((note["x_gt"], note["y_gt"]))
    if lacking := [tile for tile, left in counts.items() if left]:
        x, y = min(counts[lacking[0]])
        raise DataError(f"{root}: {subtiles.file_stem(lacking[0], x, y)} is missing; process {lacking[0]} again")
    return owner


def ensure(tiles: Sequence[Tile], owner: Mapping[str, str], folder: Path, size: int, storage: Storage) -> list[str]:
    """Process those of the tiles that are not done yet, and put all into the folders of their splits.

    owner: the split of each tile.
    folder: of this size, see `place`.

    Returns:
        The tiles that were processed now.

    Raises:
        DataError: naming a file that cannot be used, or if the folder cannot be written.
    """
    try:
        return [tile.name for tile in tiles if _ensure(tile, FOLDERS[owner[tile.name]], folder, size, storage)]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write subtiles ({error.strerror or error}); name another data.processed"
        ) from error


def arrays(tile: Tile, storage: Storage) -> dict[str, Any]:
    """Return the processed stacks of a tile, and its labels as GT (1, 1, 16, 16) where it has some."""
    found = preprocessing.preprocess(reader.read(tile), storage)
    return {**found, GT: reader.read_labels(tile)[None, None]} if tile.labels else found


def metadata(tile: Tile) -> TileMetadata:
    """Return what is kept beside a tile's arrays."""
    found = {}
    for source in tile.sources:
        files = [[path.name for path in row] for row in source.files]
        name = source.satellite.name
        found[name] = SatelliteMetadata(name, list(source.satellite.bands), list(source.dates), files)
    viirs = found[VIIRS.name]
    found[MAXPROJ] = SatelliteMetadata(MAXPROJ, viirs.bands, viirs.times[:1], viirs.original_filenames)
    if tile.labels:
        found[GT] = SatelliteMetadata(GT, ["0"], ["0"], [[tile.labels.name]])
    return TileMetadata(tile.name, found)


def mark_of(tile: Tile, size: int, storage: Storage) -> str:
    """Return the SHA-256 of a tile's files and of how they are processed."""
    extra = json.dumps([VERSION, size, storage, [satellite.name for satellite in SATELLITES]])
    return cache.content_hash(tile.files(), extra=extra)


def _ensure(tile: Tile, split: str, folder: Path, size: int, storage: Storage) -> bool:
    """Return whether the tile had to be processed."""
    note = folder / DONE / f"{tile.name}.json"
    wanted = {"sha256": mark_of(tile, size, storage), "split": split}
    known = _note(note)
    if known == wanted:
        return False
    note.unlink(missing_ok=True)  # until it is whole again
    again = known is None or known["sha256"] != wanted["sha256"]
    if again:
        _forget(tile, folder)
        subtiles.save(subtiles.grid_slice(arrays(tile, storage), metadata(tile), size), folder / split)
    else:
        assert known is not None
        _move(tile, folder / known["split"], folder / split)
    durable.write_json(note, wanted)
    return again


def _note(path: Path) -> dict[str, str] | None:
    """Return what is noted of a tile that is done; None: it is not."""
    try:
        content = durable.read_json(path)
        return {"sha256": content["sha256"], "split": content["split"]}
    except (OSError, ValueError, KeyError):
        return None


def _files(tile: Tile, folder: Path) -> list[Path]:
    """Return the files of a tile's subtiles in the folder of a split; those of Tile10 are not Tile1's."""
    found = [*(folder / SUBTILES).glob(f"{tile.name}_*.npz"), *(folder / METADATA).glob(f"{tile.name}_*.json")]
    return [path for path in found if path.stem.rsplit("_", 2)[0] == tile.name]


def _forget(tile: Tile, folder: Path) -> None:
    for name in FOLDERS.values():
        for path in _files(tile, folder / name):
            path.unlink()


def _move(tile: Tile, source: Path, target: Path) -> None:
    for path in _files(tile, source):
        moved = target / path.parent.name / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, moved)
