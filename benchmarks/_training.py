"""A workload that trains one convolution and notes when: its metrics say when its first and last step ran."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm  # noqa: F401 - the networks of a real workload come from it; its import is a part of starting a process
import torch
from torch import nn

from segmentation.epoch import DataError, Epoch, Evaluation

WEIGHTS = "weights.pt"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set."""

    lr: float = 0.1
    """Learning rate."""
    epochs: int = 2
    """Epochs of a whole trial."""
    epoch_s: float = 0.0
    """Pause after each step, to make an epoch as long as this."""
    seed: int = 0
    """Seed of the images and the first weights."""

    @classmethod
    def debug(cls) -> Config:
        """Return the smallest run."""
        return cls(epochs=1)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports; the times are seconds since 1970."""
    return {"loss": "min", "first_step": "min", "last_step": "min"}


def prepare(config: Config) -> dict[str, Any]:
    """Return the manifest of made-up images."""
    return {"sha256": "noise", "samples": {"train": 8, "validation": 0, "test": 8}, "synthetic": True, "warnings": []}


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield epochs of one step each; a step learns to blur noise. There is nothing to resume: a trial is short."""
    for number, reported in enumerate(steps(config.lr, config.epochs, config.epoch_s, config.seed), start=1):
        model = reported.pop("model")
        yield Epoch(number, reported, functools.partial(_save, model=model))


def steps(lr: float, epochs: int, epoch_s: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield loss, the model, and when the first and the last step of this trial ran; without anything of ours."""
    model, image, blurred = _start(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    first_step = time.time()
    for _ in range(epochs):
        loss = nn.functional.mse_loss(model(image), blurred)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        time.sleep(epoch_s)
        yield {"loss": loss.item(), "first_step": first_step, "last_step": time.time(), "model": model}


def evaluate(checkpoint: Path, split: str, out_dir: Path) -> Evaluation:
    """Return the loss on other noise."""
    model, image, blurred = _start(1)
    model.load_state_dict(torch.load(checkpoint / WEIGHTS, weights_only=True))
    with torch.no_grad():
        loss = nn.functional.mse_loss(model(image), blurred).item()
    return Evaluation(metrics={"loss": loss}, intervals={}, resamples={}, groups={"noise": {"loss": loss}})


def predict(checkpoint: Path, source: Path, out_dir: Path) -> list[Path]:
    """Refuse: there are no images here."""
    raise DataError("the benchmark's workload has no images; nothing to predict")


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Refuse: there are no images here."""
    raise DataError("the benchmark's workload has no images; nothing to draw")


def _start(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    image = torch.rand(8, 1, 64, 64)
    return nn.Conv2d(1, 1, 3, padding=1), image, nn.functional.avg_pool2d(image, 3, 1, 1)


def _save(folder: Path, model: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / WEIGHTS)
