"""Tiles on disk, raw or processed, or generated ones, to cached subtiles, splits by tile and a manifest."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segmentation import cache, splits
from segmentation.epoch import DataError
from segmentation.samples import Sample, Samples
from segmentation.splits import Splits
from workloads._esd import generator, processed, reader, satellites, subtiles
from workloads._esd.generator import Synthetic
from workloads._esd.processed import Storage, Target
from workloads._esd.reader import Tile
from workloads._esd.satellites import CELLS, CLASSES, GT, Channel

VERSION = 1
"""Raise when decoding changes, so that samples cached before are not mistaken for new ones."""
DARK, OTHER = "with class 0", "without class 0"
"""Strata: whether a tile has a settlement without electricity."""


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Which bands become channels; all empty: all of them."""

    viirs: tuple[str, ...] = ()
    """Of 0."""
    sentinel1: tuple[str, ...] = ()
    """Of VH, VV."""
    sentinel2: tuple[str, ...] = ()
    """Of 01, 02, 03, 04, 05, 06, 07, 08, 09, 11, 12, 8A; in YAML as text, such as "04"."""
    landsat: tuple[str, ...] = ()
    """Of 1 to 11, as text."""
    viirs_maxproj: tuple[str, ...] = ()
    """Of 0."""

    def __post_init__(self) -> None:
        satellites.check_selected(self.selected())

    def selected(self) -> dict[str, tuple[str, ...]]:
        """Return the bands of each source that has some; empty: all bands of all sources."""
        return {name: bands for name in satellites.BANDS if (bands := getattr(self, name))}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where tiles lie, how they are cut, and who is trained on, who chooses and who reports."""

    root: str = ""
    """Folder of raw tiles (Tile1/, or Train/Tile1/), or of processed ones (Train/subtiles/); empty: synthetic tiles are
    generated, good for trying things out only."""
    processed: str = ""
    """Folder for the subtiles of raw tiles, which go to 4x4/{Train,Val,Test} in it; empty: one in the cache."""
    tile_size_gt: int = 4
    """Cells along a subtile's side: 1, 2, 4, 8 or 16. Cells are those of the ground truth, 16 along a tile's side."""
    selected_bands: Bands = field(default_factory=Bands)
    """Which bands become channels."""
    storage: Storage = "float16"
    """What processed values are kept in; float32 takes twice the room."""
    folders: bool = True
    """Whether Train/, Val/ and Test/ of processed tiles are the splits; else all are dealt."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Parts for training, validation and test, whole tiles each."""
    stratify: bool = True
    """Deal tiles with settlements without electricity by themselves, so that each split has its part of them."""
    split_seed: int = 0
    """Another number, other splits; not the seed of the training, so that trials meet one split."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """What generated tiles are like."""
    cache: str = ""
    """Folder for decoded samples; empty: $SEGMENTATION_CACHE, or ~/.cache/segmentation-search."""

    def __post_init__(self) -> None:
        subtiles.check_size(self.tile_size_gt)


def cache_folder(data: Data) -> Path:
    """Return where this machine keeps what is decoded."""
    return cache.cache_folder(data.cache)


def root(data: Data) -> Path:
    """Return the folder of the tiles; synthetic ones are made first where none is given."""
    if data.root:
        return Path(data.root).expanduser()
    return generator.ensure(data.synthetic, cache_folder(data))


def load(data: Data) -> tuple[Samples, Splits]:
    """Return the subtiles and who has which; those of the test split are sealed until evaluation opens them.

    Raises:
        DataError: naming the file that cannot be used, or if the splits cannot be made.
    """
    source = find(data)
    samples = cache.cached(_key(data, source), lambda: decode(data, source), folder=cache_folder(data))
    made = source.deal(data, samples)
    return samples.seal(made.test), made


def load_once(data: Data) -> tuple[Samples, Splits]:
    """Return the same from memory, if neither the settings nor the cache have changed: trials come one by one."""
    path, made = _loaded(data, cache_folder(data))
    if not path.exists():
        _loaded.cache_clear()
        path, made = _loaded(data, cache_folder(data))
    return Samples(path).seal(made.test), made


@dataclass(frozen=True)
class Raw:
    """Tiles as the contest gives them."""

    folder: Path
    tiles: tuple[Tile, ...]

    def files(self) -> list[Path]:
        """Return all that samples are made of."""
        return [path for tile in self.tiles for path in tile.files()]

    def names(self) -> list[str]:
        """Return the tiles' names in order."""
        return [tile.name for tile in self.tiles]

    def owner(self, data: Data) -> dict[str, str]:
        """Return the split of each tile."""
        strata = [_stratum(reader.read_labels(tile)) if data.stratify else "" for tile in self.tiles]
        made = _dealt(data, self.names(), self.names(), strata)
        return {made.groups[index]: split for split in splits.NAMES for index in made[split]}

    def subtiles_folder(self, data: Data) -> Path:
        """Return where its subtiles of this size go."""
        if data.processed:
            return processed.place(Path(data.processed).expanduser(), data.tile_size_gt)
        # As one folder knows one set of tiles, each set has its own.
        name = hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:12]
        return processed.place(cache_folder(data) / f"esd-{name}-{data.storage}", data.tile_size_gt)

    def target(self, data: Data) -> Target:
        """Return where its subtiles go, and what they are like."""
        return Target(self.subtiles_folder(data), data.tile_size_gt, data.storage, cache_folder(data))

    def left(self, data: Data) -> list[str]:
        """Return the tiles that are not done yet."""
        target, owner = self.target(data), self.owner(data)
        return [tile.name for tile in self.tiles if not processed.is_done(tile, owner[tile.name], target)]

    def process(self, data: Data, names: Sequence[str]) -> list[str]:
        """Write the subtiles of these tiles that are not there yet; return the tiles processed now."""
        chosen = [tile for tile in self.tiles if tile.name in names]
        return processed.ensure(chosen, self.owner(data), self.target(data))

    def decode(self, data: Data) -> Iterator[Sample]:
        """Yield each subtile, tile by tile; they are processed first where they are not yet."""
        target, owner = self.target(data), self.owner(data)
        for tile in self.tiles:
            split = owner[tile.name]
            with processed.held(tile, split, target):  # another split would move its files
                yield from _decode(data, target.folder / processed.FOLDERS[split], tile.name)

    def deal(self, data: Data, samples: Samples) -> Splits:
        """Return who has which subtile."""
        return _split(data, samples, self.owner(data))


@dataclass(frozen=True)
class Processed:
    """Subtiles in the folders of their splits."""

    folder: Path
    owners: Mapping[str, str]
    """The split of each tile, by the folder that it lies in."""

    def files(self) -> list[Path]:
        """Return all that samples are made of."""
        return sorted(
            path for name in processed.FOLDERS.values() for path in (self.folder / name).glob("*/*") if _is_seen(path)
        )

    def names(self) -> list[str]:
        """Return the tiles' names in order."""
        return sorted(self.owners, key=_natural)

    def decode(self, data: Data) -> Iterator[Sample]:
        """Yield each subtile, tile by tile."""
        for name in self.names():
            yield from _decode(data, self.folder / processed.FOLDERS[self.owners[name]], name)

    def deal(self, data: Data, samples: Samples) -> Splits:
        """Return who has which subtile."""
        if data.folders:
            return _split(data, samples, self.owners)
        strata = [samples.extra(index)["stratum"] if data.stratify else "" for index in range(len(samples))]
        return _dealt(data, samples.names, samples.groups, strata)


def find(data: Data) -> Raw | Processed:
    """Return the tiles on disk; raises DataError naming what cannot be used."""
    folder = root(data)
    # What lies beside the raw tiles that it is made of may not be whole yet.
    made = processed.place(Path(data.processed).expanduser(), data.tile_size_gt).resolve() if data.processed else None
    for place in (folder, processed.place(folder, data.tile_size_gt)):
        if processed.is_processed(place) and not (place.resolve() == made and reader.has_tiles(folder)):
            return Processed(place, processed.tiles_in(place))
    return Raw(folder, tuple(reader.find(folder)))


def decode(data: Data, source: Raw | Processed) -> Iterator[Sample]:
    """Yield the subtiles in the order of tile, row and column; DataError for tiles that are not of one size."""
    first: Sample | None = None
    for sample in source.decode(data):
        first = first or sample
        if sample.image.shape != first.image.shape:
            channels, side, _ = sample.image.shape
            wanted = f"those of {first.group} {first.image.shape[0]} channels of {first.image.shape[1]} pixels"
            raise DataError(
                f"{root(data)}: a subtile of {sample.group} has {channels} channels of {side} pixels, {wanted}; all "
                "tiles need one size and as many dates: remove those that differ, or make them alike"
            )
        yield sample


def image_of(data: Data, arrays: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the channels (C, H, W) of processed stacks."""
    chosen = channels(data, {name: len(stack) for name, stack in arrays.items() if name != GT})
    stacked = [arrays[one.source][one.date, satellites.BANDS[one.source].index(one.band)] for one in chosen]
    return np.stack(stacked).astype(data.storage, copy=False)


def channels(data: Data, dates: Mapping[str, int]) -> tuple[Channel, ...]:
    """Return what each channel is; dates: how many each source has."""
    return satellites.channels(dates, data.selected_bands.selected())


def scale(samples: Samples) -> int:
    """Return how many pixels a cell has along its side."""
    return int(samples.extra(0)["scale"])


def channels_of(data: Data, samples: Samples) -> tuple[Channel, ...]:
    """Return what each channel of some samples is."""
    dates: dict[str, int] = json.loads(samples.extra(0)["dates"])
    return channels(data, dates)


def place_of(samples: Samples, index: int) -> tuple[int, int]:
    """Return where a subtile lies in its tile: down the rows, and along them."""
    noted = samples.extra(index)
    return int(noted["x_gt"]), int(noted["y_gt"])


class TorchDataset(Dataset[tuple[Tensor, Tensor, dict[str, Any]]]):
    """Subtiles one by one, as the ESD project's own loops take them.

    An item is X (C, H, W) float32, y (1, h, w) int64 of 0 to 3, and what is noted of the subtile.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        index = self.indices[item]
        x, y = place_of(self.samples, index)
        note = {"parent_tile_id": self.samples.groups[index], "x_gt": x, "y_gt": y}
        image = torch.from_numpy(self.samples.image(index).astype(np.float32))
        return image, torch.from_numpy(self.samples.mask(index).astype(np.int64))[None], note


def collate(items: Sequence[tuple[Tensor, Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Return Xs (B, C, H, W), ys (B, 1, h, w) and a list of what is noted, for a DataLoader's collate_fn."""
    images, labels, notes = zip(*items, strict=True)
    return torch.stack(images), torch.stack(labels), list(notes)


def cells_of_class(samples: Samples, indices: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return how many cells of each class some subtiles have, (N, K), from what is noted of them."""
    return np.array([json.loads(samples.extra(index)["cells"]) for index in indices]).reshape(-1, len(CLASSES))


def pieces(data: Data) -> list[str]:
    """Return the raw tiles that are not processed yet, each of which can be by itself."""
    source = find(data)
    return source.left(data) if isinstance(source, Raw) else []


def process(data: Data, names: Sequence[str]) -> list[str]:
    """Process some of the tiles; return those that were not done before."""
    source = find(data)
    return source.process(data, names) if isinstance(source, Raw) else []


def manifest(data: Data) -> dict[str, Any]:
    """Return what the data is, for a person to check before believing a score; no test picture is opened."""
    source = find(data)
    samples, made = load_once(data)
    per_split = {name: cells_of_class(samples, made[name]).sum(axis=0) for name in splits.NAMES}
    return {
        "sha256": _content_hash(data, source),
        "form": type(source).__name__.lower(),
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len({samples.groups[index] for index in made[name]}) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "cells_of_class": {name: dict(zip(CLASSES, cells.tolist(), strict=True)) for name, cells in per_split.items()},
        "sample_shape": list(samples.shape(0)),
        "pixels_a_cell": scale(samples),
        "synthetic": not data.root,
        "warnings": [*_warnings(data, per_split, made)],
    }


@functools.lru_cache(maxsize=8)
def _loaded(data: Data, folder: Path) -> tuple[Path, Splits]:
    samples, made = load(data)
    return samples.path, made


def _decode(data: Data, folder: Path, tile: str) -> Iterator[Sample]:
    """Yield the subtiles of a tile; they must be of the size that is asked for."""
    count = CELLS // data.tile_size_gt
    for x, y in np.ndindex(count, count):
        stem = subtiles.file_stem(tile, x, y)
        note = subtiles.load_metadata(folder, stem)
        if note["subtile_size"] != data.tile_size_gt:
            raise DataError(
                f"{folder / subtiles.METADATA / stem}.json: subtiles of {note['subtile_size']} cells; set "
                f"data.tile_size_gt={note['subtile_size']}, or name the folder of another size"
            )
        arrays = subtiles.load_arrays(folder, stem, [*satellites.BANDS, GT])
        if problem := _oddity(arrays, data.tile_size_gt):
            raise DataError(f"{folder / subtiles.SUBTILES / stem}.npz: {problem}; remove it and process the tile again")
        labels = arrays[GT][0, 0]
        mask = (labels - 1).astype(np.uint8)  # 1 to 4 in files, 0 to 3 here
        image = image_of(data, arrays)
        noted = {
            "x_gt": str(x),
            "y_gt": str(y),
            "scale": str(image.shape[1] // len(mask)),
            "dates": json.dumps({name: len(arrays[name]) for name in satellites.BANDS}),
            "cells": json.dumps(np.bincount(mask.ravel(), minlength=len(CLASSES)).tolist()),
            "stratum": _stratum(labels),
        }
        yield Sample(stem, tile, image, mask, noted, cell=image.shape[1] // len(mask))


def _oddity(arrays: Mapping[str, np.ndarray[Any, Any]], size: int) -> str:
    """Return what is wrong with the arrays of a subtile of so many cells; "": nothing."""
    side = arrays[satellites.VIIRS.name].shape[-1:]
    for name, bands in satellites.BANDS.items():
        array = arrays[name]
        if array.ndim != 4 or array.shape[1:] != (len(bands), *side, *side) or not array.size or side[0] % size:
            wanted = f"(dates, {len(bands)}, H, H), H that of viirs and a multiple of {size}"
            return f"{name} is {array.shape}; expected {wanted}"
        if array.dtype.kind not in "uif" or not np.isfinite(array).all():
            return f"{name} holds other values than finite numbers"
    if arrays[GT].shape != (1, 1, size, size):
        return f"gt is {arrays[GT].shape}; expected {(1, 1, size, size)}"
    return "" if np.isin(arrays[GT], (1, 2, 3, 4)).all() else "gt holds other classes than 1, 2, 3 and 4"


def _stratum(labels: np.ndarray[Any, Any]) -> str:
    return DARK if (labels == 1).any() else OTHER


def _dealt(data: Data, names: Sequence[str], groups: Sequence[str], strata: Sequence[str]) -> Splits:
    return splits.split(names, groups, fractions=data.fractions, seed=data.split_seed, key="tile", strata=strata)


def _split(data: Data, samples: Samples, owner: Mapping[str, str]) -> Splits:
    members = {
        name: tuple(index for index, tile in enumerate(samples.groups) if owner[tile] == name) for name in splits.NAMES
    }
    made = Splits(**members, seed=data.split_seed, key="tile", names=samples.names, groups=samples.groups)
    splits.check(made, tested=False)
    return made


def _key(data: Data, source: Raw | Processed) -> str:
    """Return a name for what decoding gives; who has which is no part of it."""
    settings = [VERSION, processed.VERSION, data.tile_size_gt, data.selected_bands.selected(), data.storage]
    contents = _content_hash(data, source, json.dumps([*settings, source.names()]))
    return f"esd-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


def _content_hash(data: Data, source: Raw | Processed, extra: str = "") -> str:
    return cache.content_hash(source.files(), extra=extra, folder=cache_folder(data))


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)


def _is_seen(path: Path) -> bool:
    return path.suffix in (".npz", ".json") and not path.name.startswith(".")


def _warnings(data: Data, per_split: Mapping[str, np.ndarray[Any, Any]], made: Splits) -> Iterator[str]:
    if not data.root:
        made_of = f"{data.synthetic.tiles} generated tiles in {root(data)} are used"
        remedy = "set data.root to the contest's tiles, raw or processed"
        yield f"SYNTHETIC DATA: data.root is not given, so {made_of}; scores say nothing about the Earth; {remedy}"
    for name, cells in per_split.items():
        if not cells.any():
            yield f"there is no tile in split {name}: nothing that is trained can be tested; set data.folders=false"
        elif missing := [title for title, count in zip(CLASSES, cells, strict=True) if not count]:
            yield f"split {name} has no cell of {', '.join(missing)}; its scores are not defined there"
