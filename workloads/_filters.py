"""What the filters of a checkpoint are like, and which of them would go: what workloads with `prune` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import configuration
from segmentation import checkpoints, pruning
from segmentation.pruning import Prune, inspection, plan
from workloads._pruned import Job, PrunableConfig

PREFIX = "prune."


def split(changes: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is another value now, and what is asked of `prune`: it takes the place of all that was before."""
    changes = changes or {}
    asked = {key: value for key, value in changes.items() if key.startswith(PREFIX)}
    return {key: value for key, value in changes.items() if key not in asked}, asked


def write(
    checkpoint: Path,
    config: PrunableConfig,
    model: nn.Module,
    job: Job,
    out_dir: Path,
    asked: Mapping[str, Any],
) -> list[Path]:
    """Write table, pictures and report into out_dir/analysis; return their paths.

    config, model: of the checkpoint.
    asked: values below `prune` to look at what they would drop; empty: what was dropped to make this network, if so.

    Raises:
        ConfigError, PlanError: for values that cannot be, or fit no such network.
    """
    model = model.cpu()
    channels = pruning.trace(model, *job.shape)
    applied = None
    if asked:
        # Built beside the rest of the Config, so that an error names the key as it was typed.
        prune = configuration.build(type(config), asked).prune
        images, seed = job.images(), config.seed
        made = pruning.make_plan(prune, model, channels, images=images, seed=seed) if prune.active else None
    else:
        prune, applied = config.prune, checkpoints.read_meta(checkpoint).get("pruned")
        made = plan.read(checkpoint / plan.FILE) if applied is not None else None
    seen = inspection.inspect(
        model,
        channels,
        prune if made is not None else Prune(),
        made=made,
        applied=applied,
        shape=job.shape,
        title=f"Filters of {checkpoint}",
    )
    return inspection.write(out_dir, seen)
