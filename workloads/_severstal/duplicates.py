"""Which strips are the same picture, so that no split tears them apart: by their bytes, and by what they look like.

Looks are compared by a difference hash of three values: on a coarse grid each cell is brighter than its left neighbour,
darker, or about as bright. Of two hashes the share that agrees, less the share that differs, says whether they are one
picture: near 1 for one compressed anew, near 0 for two of the same steel.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segmentation.images import read_rgb
from workloads._severstal.reader import Source

Hash = npt.NDArray[np.int8]
"""(CELLS,) of -1, 0 and 1"""

GRID = (16, 100)
"""Rows and columns of cells: 16x16 pixels each, on Severstal's strips."""
STEP = 1.0
"""Grey values by which a cell must differ from its neighbour to count: less is noise of the compression."""
ALIKE = 0.5
"""How much two hashes must agree, from -1 to 1, to be one picture.

A strip that was compressed anew at JPEG quality 50, made brighter or half as large agrees with itself by 0.9, one of
64 rows still by 0.5, but not one that was moved by a cell; different strips of the same steel agree by 0.1.
"""
LEAST_CELLS = 200
"""A picture in which fewer cells differ from their neighbours is too plain to be told by its look: two in a hundred
million pairs would agree by chance."""
BLOCK = 512


@dataclass(frozen=True)
class Groups:
    """Which strips belong together."""

    names: tuple[str, ...]
    """For each strip, in the order given, the name of the first one that shows the same."""
    same_bytes: int
    """Strips beyond the first of their bytes."""
    same_look: int
    """Strips beyond those that look like another of other bytes."""


def group(sources: Sequence[Source]) -> Groups:
    """Return the groups of strips that show the same; reads each picture once, some at a time.

    Raises:
        DataError: naming a picture that cannot be read.
    """
    owner = _by_bytes([source.image for source in sources])
    firsts = sorted(set(owner))
    looks = _by_look([sources[first].image for first in firsts])
    place = {first: firsts[look] for first, look in zip(firsts, looks, strict=True)}
    names = tuple(sources[place[first]].name for first in owner)
    return Groups(names, len(owner) - len(firsts), len(firsts) - len(set(looks)))


def difference_hash(path: Path) -> Hash:
    """Return what a picture looks like; raises like `images.read_rgb`."""
    small = _small(path)
    # What a whole row or column has in common is the lamp, not the steel.
    small = small - np.median(small, axis=0)
    small -= np.median(small, axis=1, keepdims=True)
    steps = np.diff(small, axis=1)
    return np.asarray(np.sign(steps) * (np.abs(steps) >= STEP), np.int8).ravel()


def likeness(first: Hash, second: Hash) -> float:
    """Return how much two hashes agree, from -1 to 1; 0 where either is too plain."""
    return float(_likenesses(first[None], second[None])[0, 0])


def _small(path: Path) -> npt.NDArray[np.float64]:
    """Return the grey picture on the coarse grid, each cell the mean of its pixels."""
    grey = Image.fromarray(read_rgb(path)).convert("L").convert("F")
    return np.asarray(grey.resize((GRID[1] + 1, GRID[0]), Image.Resampling.BOX), float)


def _by_bytes(paths: Sequence[Path]) -> list[int]:
    """Return for each file the place of the first one with its bytes; only files of one size are read."""
    of_size: dict[int, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        of_size[path.stat().st_size].append(place)
    owner = list(range(len(paths)))
    for places in of_size.values():
        firsts: dict[str, int] = {}
        for place in places if len(places) > 1 else ():
            owner[place] = firsts.setdefault(hashlib.sha256(paths[place].read_bytes()).hexdigest(), place)
    return owner


def _by_look(paths: Sequence[Path]) -> list[int]:
    """Return for each picture the place of the first one that looks the same, or like one that does."""
    hashes = _hashes(paths)
    owner = list(range(len(paths)))
    for first, second in _alike(hashes):
        low, high = sorted((_root(owner, first), _root(owner, second)))
        owner[high] = low
    return [_root(owner, place) for place in range(len(paths))]


def _hashes(paths: Sequence[Path]) -> npt.NDArray[np.int8]:
    """Return (N, CELLS), some pictures at a time read by as many threads as there are CPUs."""
    threads = min(8, os.cpu_count() or 1)
    hashes = np.zeros((len(paths), GRID[0] * GRID[1]), np.int8)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), 4 * threads):
            for place, one in enumerate(pool.map(difference_hash, paths[start : start + 4 * threads]), start=start):
                hashes[place] = one
    return hashes


def _alike(hashes: npt.NDArray[np.int8]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of places whose hashes agree; whole blocks are compared at once."""
    starts = range(0, len(hashes), BLOCK)
    for top in starts:
        for left in range(top, len(hashes), BLOCK):
            found = _likenesses(hashes[top : top + BLOCK], hashes[left : left + BLOCK]) >= ALIKE
            for first, second in zip(*np.nonzero(found), strict=True):
                if top + first < left + second:
                    yield int(top + first), int(left + second)


def _likenesses(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (N, M) likenesses of hashes (N, CELLS) and (M, CELLS)."""
    counts = [np.count_nonzero(hashes, axis=1) for hashes in (first, second)]
    cells = np.sqrt(counts[0][:, None] * counts[1][None].astype(float))
    told = (counts[0][:, None] >= LEAST_CELLS) & (counts[1][None] >= LEAST_CELLS)
    agree = first.astype(np.float32) @ second.astype(np.float32).T
    return np.where(told, agree / np.maximum(cells, 1), 0.0)


def _root(owner: list[int], place: int) -> int:
    while owner[place] != place:
        owner[place] = owner[owner[place]]
        place = owner[place]
    return place
