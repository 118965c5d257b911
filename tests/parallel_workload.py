"""A workload whose ranks do things together, and that fails in the ways that real ones do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segmentation import ranks
from segmentation.epoch import Epoch, Evaluation, OutOfMemoryError
from workloads import toy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set."""

    lr: float = 0.1
    """Its score grows with it."""
    epochs: int = 3
    """Epochs of a whole run."""
    strategy: str = "auto"
    """How the ranks train together."""
    zero_stage: int = 0
    """What they share."""
    micro_batch: int = 8
    """Images in one pass; `short` fails above 2."""
    seed: int = 0
    """Of nothing."""
    epoch_s: float = 0.0
    """Length of an epoch."""
    fails: str = ""
    """raise, memory, eat, exit, hang or short: how one rank fails; short: of memory, above two images in a pass."""
    fails_rank: int = 1
    """Which."""
    fails_epoch: int = 2
    """When."""

    @classmethod
    def debug(cls) -> Config:
        """Return the smallest run."""
        return cls(epochs=1)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports."""
    return {"score": "max", "world": "max"}


def prepare(config: Config) -> dict[str, Any]:
    """Return the manifest of no data."""
    return {"sha256": "none", "samples": {"train": 1, "validation": 1, "test": 1}, "warnings": []}


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield epochs in which all ranks add up what they know."""
    rank, _ = ranks.place()
    first = json.loads((resume / "state.json").read_text())["epoch"] + 1 if resume else 1
    for number in range(first, config.epochs + 1):
        time.sleep(config.epoch_s)
        _fail(config, rank, number)
        world = float(ranks.total(torch.ones(())))
        pids = {f"pid{place}": float(pid) for place, pid in enumerate(ranks.gather(os.getpid()))}
        yield Epoch(
            number,
            {"score": number * config.lr, "world": world, "micro_batch": float(config.micro_batch), **pids},
            lambda folder, number=number: _save(folder, number),
        )


def evaluate(checkpoint: Path, split: str, out_dir: Path) -> Evaluation:
    """Return the epoch that was saved."""
    epoch = json.loads((checkpoint / "state.json").read_text())["epoch"]
    return Evaluation(metrics={"score": epoch}, intervals={}, resamples={}, groups={"all": {"score": epoch}})


def predict(checkpoint: Path, source: Path, out_dir: Path) -> list[Path]:
    """Do nothing."""
    return []


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Do nothing."""
    return []


def _save(folder: Path, number: int) -> None:
    parts = ranks.gather(number)
    if ranks.place()[0] == 0:
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"epoch": number, "parts": parts}))


def _fail(config: Config, rank: int, number: int) -> None:
    if not config.fails or (rank, number) != (config.fails_rank, config.fails_epoch):
        return
    if config.fails == "short":
        if config.micro_batch > 2:
            raise OutOfMemoryError("too little memory", config.micro_batch // 2)
        return
    if config.fails == "eat":
        toy.eat(6.0)  # as much as in tests/faults/test_hangs_and_memory.py
    if config.fails == "hang":
        time.sleep(600)
    if config.fails == "raise":
        raise ValueError("this rank cannot go on")
    if config.fails == "memory":
        raise torch.OutOfMemoryError("out of memory, on this rank only")
    assert config.fails == "exit"
    os._exit(9)
