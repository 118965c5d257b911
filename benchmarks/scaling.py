"""How training time falls with more processes: the same images shared out (strong), and as many for each (weak).

UNet 3+ on generated images through the workload `pairs`, in processes of one thread that keep the same weights by DDP
over gloo, on the CPUs of this machine. The time is that of an epoch, validation included, the median of those after
the first. Efficiency is 1 where n processes take 1/n of the time (strong), or the same time for n times the images
(weak). There is no aim: it tells what this machine's memory and cores allow.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from PIL import Image

from benchmarks import _searches

TINY = {"processes": (1, 2), "images": 12, "size": 32, "batch_size": 4, "epochs": 2, "repetitions": 1}
KINDS = ("strong", "weak")


def measure(
    processes: tuple[int, ...] = (),
    images: int = 48,
    size: int = 64,
    batch_size: int = 8,
    epochs: int = 4,
    repetitions: int = 2,
) -> dict[str, Any]:
    """Return seconds of an epoch and efficiency for each number of processes.

    processes: how many at a time; where none is given: 1, 2, 4 ... up to the CPUs.
    images, batch_size: of one process alone; in strong scaling both are shared out, in weak each process has as many.
    """
    processes = processes or tuple(_doubled(min(len(os.sched_getaffinity(0)), batch_size)))
    if indivisible := [count for count in processes if batch_size % count]:
        raise ValueError(f"batch_size: got {batch_size}; expected a multiple of {indivisible[0]} processes")
    found: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0))}
    for kind in KINDS:
        seconds = {}
        for count in processes:
            taken = [_epoch_s(kind, count, images, size, batch_size, epochs) for _ in range(repetitions)]
            seconds[count] = min(taken)
            _searches.say(f"{kind} scaling, {count} processes: {seconds[count]:.2f} s an epoch")
        for count, share in efficiencies(kind, seconds).items():
            found[f"{kind}_{count}_s"] = round(seconds[count], 3)
            found[f"{kind}_{count}_efficiency"] = round(share, 3)
    return found


def efficiencies(kind: str, seconds: dict[int, float]) -> dict[int, float]:
    """Return how much of n processes is of use, by the seconds of each n; the smallest n counts as 1."""
    first = min(seconds)
    return {
        count: seconds[first] / taken * (first / count if kind == "strong" else 1) for count, taken in seconds.items()
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    return [_row(kind, count, result) for kind in KINDS for count in _counts(result)[1:]]


def _row(kind: str, count: int, result: dict[str, Any]) -> tuple[str, str, str]:
    first = _counts(result)[0]
    images = "the same images" if kind == "strong" else f"{count // first} times the images"
    seconds, share = result[f"{kind}_{count}_s"], result[f"{kind}_{count}_efficiency"]
    return (
        f"an epoch of UNet 3+ on {count} processes of one thread, {images} ({kind} scaling)",
        f"{seconds:.2f} s, efficiency {share:.2f}",
        f"{result[f'{kind}_{first}_s']:.2f} s on {first}; report",
    )


def _counts(result: dict[str, Any]) -> list[int]:
    return sorted(int(key.split("_")[1]) for key in result if key.startswith("strong_") and key.endswith("_s"))


def _doubled(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2


def _epoch_s(kind: str, processes: int, images: int, size: int, batch_size: int, epochs: int) -> float:
    """Train in so many processes and return the median seconds of an epoch, the first left out."""
    if kind == "weak":
        images *= processes
    else:
        batch_size //= processes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _draw(folder, images, size)
        torch.multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            _rank, (processes, str(folder), batch_size, size, epochs), nprocs=processes
        )
        marks: list[float] = json.loads((folder / "marks.json").read_text())
    return statistics.median([after - before for before, after in pairwise(marks)])


def _draw(folder: Path, images: int, size: int) -> None:
    """Write images of noise in which a bright square is class 1 and a dark one class 2."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / "data" / kind).mkdir(parents=True)
    for number in range(images):
        image, mask = rng.integers(64, 192, (size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
        for label, value in ((1, 255), (2, 0)):
            y, x = rng.integers(0, size // 2, 2)
            image[y : y + size // 3, x : x + size // 3] = value
            mask[y : y + size // 3, x : x + size // 3] = label
        Image.fromarray(image).save(folder / "data" / "images" / f"{number:04}.png")
        Image.fromarray(mask).save(folder / "data" / "masks" / f"{number:04}.png")


def _rank(rank: int, processes: int, folder: str, batch_size: int, size: int, epochs: int) -> None:
    """Train as one of several; the first notes when each epoch ended. Runs in a process of its own."""
    os.environ["SEGMENTATION_CACHE"] = f"{folder}/cache{rank}"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from segmentation.networks import Network
    from workloads import pairs
    from workloads._pairs.dataset import Data

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        config = pairs.Config(
            data=Data(root=f"{folder}/data", classes=3, tile=size),
            network=Network(name="unet3plus", encoder="resnet10t", cat_channels=16),
            epochs=epochs,
            batch_size=batch_size,
            threads=1,
            device="cpu",
            precision="fp32",
        )
        marks = [time.monotonic() for _ in pairs.train(config)]
        if rank == 0:
            Path(folder, "marks.json").write_text(json.dumps(marks))
    finally:
        torch.distributed.destroy_process_group()
