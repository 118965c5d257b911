"""A workload of several ranks that trains a tiny network on noise and notes when: its epochs say when steps ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm  # noqa: F401 - as in `_training`: the networks of a real workload come from it
import torch
from torch import Tensor, nn

import configuration
from segmentation import checkpoints, networks, ranks, training
from segmentation.epoch import DataError, Epoch, Evaluation
from segmentation.networks import Network
from segmentation.training import TrainingConfig

IMAGES, SIDE = 16, 32


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Everything that can be set."""

    epoch_s: float = 0.0
    """Pause after each epoch, to make it as long as this."""

    @classmethod
    def debug(cls) -> Config:
        """Return the smallest run."""
        return cls(epochs=1, threads=1)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports; the times are seconds since 1970."""
    return {"val_loss": "min", "entered": "min", "first_step": "min", "last_step": "min"}


def prepare(config: Config) -> dict[str, Any]:
    """Return the manifest of made-up images."""
    return {"sha256": "noise", "samples": {"train": IMAGES, "validation": 0, "test": IMAGES}, "warnings": []}


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield epochs; `entered` is when this generator was first pulled, the steps are those of its own epochs."""
    times = {"entered": time.time()}
    image, mask = _noise()

    def loss(logits: Tensor, truth: Tensor) -> Tensor:
        times.setdefault("first_step", time.time())
        return nn.functional.cross_entropy(logits, truth)

    def validate(model: nn.Module) -> Mapping[str, float]:
        times["last_step"] = time.time()
        time.sleep(config.epoch_s)
        return {"val_loss": float(nn.functional.cross_entropy(model(image).float(), mask)), **times}

    training.seed_everything(config.seed)
    yield from training.fit(
        config,
        model=networks.build(Network(name="tinyunet", base=4), 1, 2),
        loss=loss,
        train_batches=_batches(config, image, mask),
        validate=validate,
        meta={"workload": __name__, "config": configuration.to_values(config)},
        resume=resume,
    )


def evaluate(checkpoint: Path, split: str, out_dir: Path) -> Evaluation:
    """Return the loss of the epoch that was saved."""
    loss = checkpoints.read_meta(checkpoint)["metrics"]["val_loss"]
    return Evaluation(metrics={"val_loss": loss}, intervals={}, resamples={}, groups={"noise": {"val_loss": loss}})


def predict(checkpoint: Path, source: Path, out_dir: Path) -> list[Path]:
    """Refuse: there are no images here."""
    raise DataError("the benchmark's workload has no images; nothing to predict")


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Refuse: there are no images here."""
    raise DataError("the benchmark's workload has no images; nothing to draw")


def _noise() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    image = torch.rand(IMAGES, 1, SIDE, SIDE, generator=drawn)
    return image, (nn.functional.avg_pool2d(image, 3, 1, 1) > 0.5)[:, 0].long()


def _batches(config: Config, image: Tensor, mask: Tensor) -> Callable[[int], Iterator[training.Batch]]:
    rank, world = ranks.place()

    def of_epoch(epoch: int) -> Iterator[training.Batch]:
        for chosen in torch.split(torch.arange(IMAGES), config.batch_size * world):
            mine = chosen.tensor_split(world)[rank]
            yield image[mine], mask[mine], mine

    return of_epoch
