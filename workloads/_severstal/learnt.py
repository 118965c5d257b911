"""What validation teaches and a checkpoint keeps: thresholds, and where asked for a temperature and a cleaning.

    thresholds.json    where each class is called, and the hash of the validation run
    temperature.json   what logits are divided by, for probabilities that mean what they say
    cleaning.json      the least area of a connected prediction, and what each candidate scored

They are frozen there: whatever is scored or predicted afterwards goes by them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import durable
from segmentation import components
from segmentation.calibration import Temperature
from segmentation.checkpoints import CheckpointError
from segmentation.components import Choice, Cleaning
from segmentation.operating_points import Thresholds

T = TypeVar("T")

THRESHOLDS, TEMPERATURE, CLEANING = "thresholds.json", "temperature.json", "cleaning.json"


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a checkpoint's validation has taught, for each class."""

    thresholds: Thresholds
    temperature: Temperature | None = None
    """None: probabilities are as the network gives them."""
    cleanings: tuple[Choice, ...] = ()
    """Empty: predictions are as they are called."""

    def called(self, logits: Tensor) -> npt.NDArray[np.bool_]:
        """Return which pixels of logits (K, H, W) of one strip, at its own size, are called, cleaned if so learnt."""
        cuts = torch.tensor(self.thresholds.dice, dtype=torch.float32).view(-1, 1, 1)
        found: npt.NDArray[np.bool_] = (logits.sigmoid() > cuts).numpy()
        if not self.cleanings:
            return found
        pairs = zip(found, self.cleanings, strict=True)
        return np.stack([components.clean(plane, choice.cleaning) for plane, choice in pairs])

    def scores(self) -> dict[str, float]:
        """Return what an epoch reports of the temperature and the cleaning, means over classes; else nothing."""
        found: dict[str, list[float]] = {}
        if self.temperature is not None:
            found["temperature"] = list(self.temperature.temperature)
            found["val_ece"], found["val_ece_scaled"] = list(self.temperature.ece), list(self.temperature.ece_scaled)
        if self.cleanings:
            best = [choice.dice[choice.cleaning.min_area] for choice in self.cleanings]
            found["val_dice_clean"] = [dice for dice in best if dice is not None]
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint folder."""
        _write(folder / THRESHOLDS, self.thresholds.record())
        if self.temperature is not None:
            _write(folder / TEMPERATURE, self.temperature.record())
        if self.cleanings:
            _write(folder / CLEANING, {"classes": [dataclasses.asdict(choice) for choice in self.cleanings]})


def read(checkpoint: Path) -> Learnt:
    """Return what a checkpoint has learnt.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    temperature, cleaning = checkpoint / TEMPERATURE, checkpoint / CLEANING
    return Learnt(
        thresholds=_read(checkpoint / THRESHOLDS, lambda content: Thresholds(**content)),
        temperature=_read(temperature, lambda content: Temperature(**content)) if temperature.is_file() else None,
        cleanings=_read(cleaning, _choices) if cleaning.is_file() else (),
    )


def _choices(content: Mapping[str, Any]) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            cleaning=Cleaning(**item["cleaning"]),
            dice={int(area): score for area, score in item["dice"].items()},  # JSON has texts for keys
        )
        for item in content["classes"]
    )


def _read(path: Path, made: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        return made(durable.read_json(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: what validation taught cannot be read ({error}); train again") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
