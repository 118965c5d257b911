"""A learning curve in closed form: the whole service can be tried on it without data or GPU.

The score after epoch e is `asymptote(config) * (1 - exp(-rate * e))`. The asymptote peaks at lr = 1e-2 and width = 64;
the rate grows with lr, so that a search has something to find and a stopping rule something to weigh.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import configuration
from segmentation.epoch import DataError, Epoch, Evaluation, NonFiniteError

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set."""

    lr: float = 1e-3
    """Learning rate; 1e-2 is best."""
    width: int = 32
    """Channels; 64 is best, and each costs."""
    epochs: int = 5
    """Epochs of a whole trial."""
    seed: int = 0
    """Seed of the noise."""
    noise: float = 0.0
    """Standard deviation of the score's noise."""
    epoch_s: float = 0.0
    """Seconds that an epoch takes."""
    fail: Literal["never", "error", "nan", "exit", "memory", "device", "eat", "hang"] = "never"
    """How the trial ends at epoch `fail_epoch`, to see what a search makes of it."""
    fail_epoch: int = 2
    """The epoch at which `fail` happens."""
    fail_once: bool = False
    """Fail only where no checkpoint is resumed."""
    eat_gib: float = 1.0
    """Memory that `fail: eat` takes and keeps."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: got {self.epochs}; expected at least 1")
        if self.lr <= 0:
            raise ValueError(f"lr: got {self.lr}; expected more than 0")

    @classmethod
    def debug(cls) -> Config:
        """Return the smallest run."""
        return cls(epochs=2)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    return {"score": "max", "loss": "min", "cost": "min"}


def prepare(config: Config) -> dict[str, Any]:
    """Return the manifest of no data at all."""
    return {"sha256": "toy", "samples": {"train": 0, "validation": 0, "test": 0}, "synthetic": True, "warnings": []}


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield the points of the learning curve."""
    first = json.loads((resume / STATE_FILE).read_text())["epoch"] + 1 if resume else 1
    for number in range(first, config.epochs + 1):
        time.sleep(config.epoch_s)
        if number == config.fail_epoch and not (config.fail_once and resume):
            _fail(config)
        score = curve(config, number)
        yield Epoch(number, {"score": score, "loss": 1 - score, "cost": float(config.width)}, _saver(config, number))


def curve(config: Config, epoch: int) -> float:
    """Return the score after this many epochs, in [0, 1] when there is no noise."""
    distance = (math.log10(config.lr) + 2) ** 2 / 8 + (math.log2(config.width) - 6) ** 2 / 32
    rate = 0.5 * config.lr**0.25 / 0.01**0.25
    return math.exp(-distance) * (1 - math.exp(-rate * epoch)) + config.noise * _normal(config.seed, epoch)


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Return the score that the checkpoint was saved with, the same for five imaginary groups."""
    state = json.loads((checkpoint / STATE_FILE).read_text())
    score = curve(configuration.replace(Config(**state["config"]), changes or {}), state["epoch"])
    groups: dict[str, dict[str, float | None]] = {f"group{i}": {"score": score + (i - 2) / 100} for i in range(5)}
    resamples = [score + _normal(0, draw) / 100 for draw in range(200)]
    ordered = sorted(resamples)
    return Evaluation(
        metrics={"score": score, "loss": 1 - score},
        intervals={"score": (ordered[4], ordered[195])},
        resamples={"score": resamples},
        groups=groups,
        details={"split": split},
    )


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Refuse: there are no images here."""
    raise DataError("the toy workload has no images; nothing to predict")


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Write the learning curve as text."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "curve.csv"
    path.write_text("epoch,score\n" + "".join(f"{e},{curve(config, e)}\n" for e in range(1, config.epochs + 1)))
    return [path]


def _saver(config: Config, number: int) -> Any:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"epoch": number, "config": config.__dict__}
        (folder / STATE_FILE).write_text(json.dumps(state))

    return save


def _fail(config: Config) -> None:
    how = config.fail
    if how == "error":
        raise RuntimeError("the toy was told to fail")
    if how == "nan":
        raise NonFiniteError("loss is nan at epoch 2")
    if how == "memory":
        raise MemoryError("the toy was told to run out of memory")
    if how == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "eat":
        eat(config.eat_gib)
    if how == "hang":
        time.sleep(3600)
    if how == "exit":
        os._exit(17)


def eat(gib: float) -> None:
    """Take so much memory and keep it for an hour."""
    eaten = bytearray(int(gib * 2**30))
    eaten[:: mmap.PAGESIZE] = b"1" * len(eaten[:: mmap.PAGESIZE])
    time.sleep(3600)


def _normal(seed: int, draw: int) -> float:
    """Return a number that looks normal and depends on nothing but its arguments."""
    fraction = math.modf(math.sin(seed * 12.9898 + draw * 78.233) * 43758.5453)[0] % 1.0
    other = math.modf(math.sin(seed * 39.346 + draw * 11.135) * 24634.6345)[0] % 1.0
    return math.sqrt(-2 * math.log(max(fraction, 1e-12))) * math.cos(2 * math.pi * other)
