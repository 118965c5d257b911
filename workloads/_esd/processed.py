"""Raw tiles to the folders of subtiles that the ESD project keeps, each tile once.

    <folder>/4x4/{Train,Val,Test}/{subtiles,metadata}/     see workloads._esd.subtiles
    <folder>/4x4/tiles/Tile1.json                          that Tile1 is done: of which files, and where it lies
    <folder>/4x4/tiles/Tile1.lock                          held by the process that writes, moves or reads its subtiles

A tile that is done is left alone, and one that was not finished is processed again. Sizes lie side by side. Where the
splits have changed since, a tile's files are moved. Any number of processes may be at work in one folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import durable
from segmentation import cache, splits
from segmentation.epoch import DataError
from workloads._esd import preprocessing, reader, subtiles
from workloads._esd.reader import Tile
from workloads._esd.satellites import CELLS, GT, MAXPROJ, SATELLITES, VIIRS
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
            tile, count = note["parent_tile_id"], CELLS // note["subtile_size"]
            if owner.setdefault(tile, split) != split:
                raise DataError(f"{root}: {tile} lies in {FOLDERS[owner[tile]]} and in {name}; remove it from one")
            counts.setdefault(tile, set(np.ndindex(count, count)))
            counts[tile].discard((note["x_gt"], note["y_gt"]))
    if lacking := [tile for tile, left in counts.items() if left]:
        x, y = min(counts[lacking[0]])
        raise DataError(f"{root}: {subtiles.file_stem(lacking[0], x, y)} is missing; process {lacking[0]} again")
    return owner


@dataclass(frozen=True)
class Target:
    """Where subtiles go, and what they are like."""

    folder: Path
    """Of this size, see `place`."""
    size: int
    """Cells along a subtile's side."""
    storage: Storage
    cache: Path
    """Where the hashes of files are kept."""


def ensure(tiles: Sequence[Tile], owner: Mapping[str, str], target: Target) -> list[str]:
    """Process those of the tiles that are not done yet, and put all into the folders of their splits.

    owner: the split of each tile.

    Returns:
        The tiles that were processed now.

    Raises:
        DataError: naming a file that cannot be used, or if the folder cannot be written.
    """
    found = []
    for tile in tiles:
        with held(tile, owner[tile.name], target) as new:
            found += [tile.name] if new else []
    return found


@contextmanager
def held(tile: Tile, split: str, target: Target) -> Iterator[bool]:
    """Hold a tile whose subtiles lie in the folder of its split, processed first where they are not yet.

    Meanwhile no other process writes or moves them: one for the same tile waits, those for others do not.

    Yields:
        Whether it was processed now.

    Raises:
        DataError: as `ensure`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(durable.locked(target.folder / DONE / f"{tile.name}.lock"))
            new = _ensure(tile, FOLDERS[split], target)
        except OSError as error:
            raise DataError(
                f"{target.folder}: cannot write subtiles ({error.strerror or error}); name another data.processed"
            ) from error
        yield new


def is_done(tile: Tile, split: str, target: Target) -> bool:
    """Return whether a tile's subtiles lie in the folder of its split."""
    known = _note(tile, target)
    return known is not None and known == {"sha256": mark_of(tile, target), "split": FOLDERS[split]}


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


def mark_of(tile: Tile, target: Target) -> str:
    """Return the SHA-256 of a tile's files and of how they are processed."""
    extra = json.dumps([VERSION, target.size, target.storage, [satellite.name for satellite in SATELLITES]])
    return cache.content_hash(tile.files(), extra=extra, folder=target.cache)


def _ensure(tile: Tile, split: str, target: Target) -> bool:
    """Return whether the tile had to be processed."""
    wanted = {"sha256": mark_of(tile, target), "split": split}
    known = _note(tile, target)
    if known == wanted:
        return False
    _note_of(tile, target).unlink(missing_ok=True)  # until it is whole again
    again = known is None or known["sha256"] != wanted["sha256"]
    if again:
        for name in FOLDERS.values():
            for path in _files(tile, target.folder / name):
                path.unlink()
        pieces = subtiles.grid_slice(arrays(tile, target.storage), metadata(tile), target.size)
        subtiles.save(pieces, target.folder / split)
    else:
        assert known is not None
        _move(tile, target.folder / known["split"], target.folder / split)
    durable.write_json(_note_of(tile, target), wanted)
    return again


def _note_of(tile: Tile, target: Target) -> Path:
    return target.folder / DONE / f"{tile.name}.json"


def _note(tile: Tile, target: Target) -> dict[str, str] | None:
    """Return what is noted of a tile whose files are all there; None: it is not done."""
    try:
        content = durable.read_json(_note_of(tile, target))
        known = {"sha256": content["sha256"], "split": content["split"]}
    except (OSError, ValueError, KeyError):
        return None
    if known["split"] not in FOLDERS.values():
        return None
    there = {path.name for path in _files(tile, target.folder / known["split"])}
    count = CELLS // target.size
    stems = [subtiles.file_stem(tile.name, x, y) for x, y in np.ndindex(count, count)]
    return known if there >= {f"{stem}{suffix}" for stem in stems for suffix in (".npz", ".json")} else None


def _files(tile: Tile, folder: Path) -> list[Path]:
    """Return a tile's files in the folder of a split, those that were begun too."""
    mine = re.compile(rf"\.?{re.escape(tile.name)}_\d+_\d+\.(npz|json)(\.\w+\.tmp)?")
    return [path for name in (SUBTILES, METADATA) for path in (folder / name).glob("*") if mine.fullmatch(path.name)]


def _move(tile: Tile, source: Path, target: Path) -> None:
    for path in _files(tile, source):
        moved = target / path.parent.name / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, moved)
