"""Cut satellite tiles and put them together, and process one: errors of the way there and back, time, memory.

The way there and back is that of every stack of a tile, its labels and a prediction in which each cell is its own
number, cut to subtiles of 2, 4, 8 and 16 cells and taken in shuffled order: in memory, and through the files. Time is
that of reading and processing against reading alone, tifffile's imread of one file after another, all files in the page
cache, in turns, medians: for the files as generated, deflated, and for the same without compression. Memory is the most
that a fresh process ever held, Python and all, which processes the tile and writes its subtiles.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _memory
from workloads._esd import generator, preprocessing, processed, reader, subtiles
from workloads._esd.generator import Synthetic
from workloads._esd.reader import Tile
from workloads._esd.satellites import CELLS, GROUND_TRUTH, GT

TINY = {"pixels": 4, "repetitions": 1}
SIZES = (2, 4, 8, 16)
STORAGE: processed.Storage = "float16"
PREDICTION = "prediction"


def measure(pixels: int = 50, repetitions: int = 9) -> dict[str, Any]:
    """Return the number of arrays that came back otherwise, the ratios of time, and the peak of memory.

    pixels: along a cell's side; a tile has 16 cells to a side.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deflated, plain = _tiles(folder, pixels)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak_kib = pool.submit(_process, deflated, folder / "processed").result()
        errors, arrays = round_trip_errors(deflated, folder / "subtiles")
        alone, whole = _seconds((deflated, plain), repetitions)
    return {
        "round_trip_errors": errors,
        "round_trips": arrays,
        "preprocess_over_read": round(whole[0] / alone[0], 2),
        "read_s": round(alone[0], 3),
        "preprocess_s": round(whole[0], 3),
        "uncompressed_over_read": round(whole[1] / alone[1], 2),
        "uncompressed_read_s": round(alone[1], 3),
        "uncompressed_preprocess_s": round(whole[1], 3),
        "peak_gib": round(peak_kib / 2**20, 3),
        "size": f"{CELLS * pixels}x{CELLS * pixels}",
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    tile = f"a satellite tile of {result['size']}, 99 channels"
    deflated = f"{result['preprocess_s']:.2f} against {result['read_s']:.2f} s, deflated files"
    plain = f"{result['uncompressed_over_read']:.1f} x for uncompressed ones"
    return [
        (
            f"{tile}: arrays that differ once cut and put together again, of {result['round_trips']}",
            f"{result['round_trip_errors']}",
            "aim: 0",
        ),
        (
            f"{tile}: reading and processing over reading with tifffile",
            f"{result['preprocess_over_read']:.2f} x",
            f"{deflated}; {plain} ({result['uncompressed_preprocess_s']:.2f} against "
            f"{result['uncompressed_read_s']:.2f} s); aim: at most 2 x",
        ),
        (f"{tile}: peak memory of a process that processes it", f"{result['peak_gib']:.2f} GiB", "aim: at most 2 GiB"),
    ]


def round_trip_errors(tile: Tile, folder: Path) -> tuple[int, int]:
    """Return how many arrays of a tile come back otherwise than they were cut, and how many ways were gone."""
    cells = np.arange(CELLS * CELLS, dtype=np.uint8).reshape(1, 1, CELLS, CELLS)
    arrays = {**processed.arrays(tile, STORAGE), PREDICTION: cells}
    assert GT in arrays
    random = np.random.default_rng(0)
    back: list[bool] = []
    for size in SIZES:
        cut = subtiles.grid_slice(arrays, processed.metadata(tile), size)
        pieces = [cut[place] for place in random.permutation(len(cut))]
        subtiles.save(pieces, folder / str(size))
        whole = (0, CELLS // size)
        for name, array in arrays.items():
            in_memory = subtiles.join({(piece.x_gt, piece.y_gt): piece.arrays[name] for piece in pieces})
            in_files, _ = subtiles.restitch(folder / str(size), name, tile.name, whole, whole)
            back += [np.array_equal(found, array) and found.dtype == array.dtype for found in (in_memory, in_files)]
    return back.count(False), len(back)


def _tiles(folder: Path, pixels: int) -> tuple[Tile, Tile]:
    """Return a generated tile, and the same without compression."""
    import tifffile

    deflated, plain = folder / "deflated" / "Tile1", folder / "plain" / "Tile1"
    generator.write_tile(Synthetic(pixels=pixels), 1, deflated)
    plain.mkdir(parents=True)
    for path in deflated.iterdir():
        tifffile.imwrite(plain / path.name, tifffile.imread(path))
    return reader.find_tile(deflated), reader.find_tile(plain)


def _seconds(tiles: Sequence[Tile], repetitions: int) -> tuple[list[float], list[float]]:
    """Return how long each tile takes to be read by tifffile alone, and to be read and processed."""
    ways: Mapping[str, Callable[[Tile], object]] = {"alone": _read, "whole": _read_and_process}
    taken: dict[tuple[str, int], list[float]] = {(way, number): [] for way in ways for number in range(len(tiles))}
    for repetition in range(repetitions + 1):
        for (way, number), seconds in taken.items():
            began = time.perf_counter()
            ways[way](tiles[number])
            if repetition:  # the first finds files, memory and imports cold
                seconds.append(time.perf_counter() - began)
    alone, whole = ([statistics.median(taken[way, number]) for number in range(len(tiles))] for way in ways)
    return alone, whole


def _read(tile: Tile) -> None:
    import tifffile

    for path in tile.files():
        if path.name != GROUND_TRUTH:
            tifffile.imread(path)


def _read_and_process(tile: Tile) -> None:
    preprocessing.preprocess(reader.read(tile), STORAGE)


def _process(tile: Tile, folder: Path) -> int:
    """Process a tile in this process, and return the most memory that it ever held, in KiB."""
    processed.ensure([tile], {tile.name: "train"}, processed.Target(folder, 4, STORAGE, folder / "cache"))
    return _memory.kib("VmHWM")
