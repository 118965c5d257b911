"""A network trained on generated hearts, and a pruned one tuned from it: what the benchmarks of pruning measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configuration
from workloads import acdc


@dataclass(frozen=True)
class Family:
    """Two checkpoints."""

    parent: Path
    pruned: Path


def family(folder: Path, *, epochs: int, tuned: int, size: int, macs: float) -> Family:
    """Train a parent, and a child of it that has at most this part of its multiply-accumulates.

    epochs, tuned: of the parent and of the child.
    size: side of the slices, in pixels.
    """
    values: dict[str, Any] = {
        "data.size": size,
        "data.cache": f"{folder}/cache",
        "network.name": "unet",
        "network.widths": [16, 32, 64],
        "batch_size": 8,
        "lr": 5e-3,
        "lr_schedule": "onecycle",
        "threads": 1,
        "device": "cpu",
    }
    parent = _trained(folder / "parent", {**values, "epochs": epochs})
    child = {**values, "epochs": tuned, "lr": 2e-3, "parent": str(parent), "prune.macs": macs}
    return Family(parent, _trained(folder / "pruned", child))


def _trained(folder: Path, values: dict[str, Any]) -> Path:
    """Return the checkpoint of the epoch with the best validation score."""
    best = -1.0
    for epoch in acdc.train(configuration.build(acdc.Config, values)):
        score = epoch.metrics.get("val_mean_dice_no_bg", 0.0)
        if score > best:
            best = score
            epoch.save(folder)
    return folder
