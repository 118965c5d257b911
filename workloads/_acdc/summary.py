"""What a run and an evaluation leave behind under the original's names: metrics.json and run_summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import durable
from segmentation import checkpoints
from segmentation.epoch import Evaluation

Stage = Literal["train", "prune", "eval"]

SCHEMA_VERSION = 1
METRICS_FILE, SUMMARY_FILE = "metrics.json", "run_summary.json"
FAMILIES = ("dice", "iou", "precision", "recall", "hd95", "nsd")


def write_summary(
    folder: Path, stage: Stage, *, original: int, pruned: int | None = None, more: Mapping[str, Any] | None = None
) -> Path:
    """Write run_summary.json and return its path.

    Args:
        folder: made if missing.
        stage: what has ended.
        original: how many numbers the network has, or had before it was pruned.
        pruned: how many are left; None: it was not pruned.
        more: whatever else is worth telling, as plain data.
    """
    left = original if pruned is None else pruned
    reduction = 100 * (original - left) / original
    content = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "params": {"original": original, "pruned": pruned, "reduction_percent": round(reduction, 4)},
        **(more or {}),
    }
    return durable.write(folder / SUMMARY_FILE, json.dumps(durable.plain(content), indent=2))


def write_run_metrics(folder: Path, best: Path, last: Path) -> Path:
    """Write metrics.json of a run: its best epoch, and every epoch that led to its last checkpoint."""
    meta = checkpoints.read_meta(best)
    epochs = [{"epoch": number, **row} for number, row in enumerate(history(last), start=1)]
    content = {"best_epoch": meta["epoch"], "best": meta["metrics"], "epochs": epochs}
    return durable.write(folder / METRICS_FILE, json.dumps(durable.plain(content), indent=2))


def write_metrics(folder: Path, scored: Evaluation, names: Sequence[str]) -> Path:
    """Write metrics.json of an evaluation: means with and without background, each class's scores, intervals."""
    found = scored.metrics
    means = {name: value for name, value in found.items() if name.startswith("mean_")}
    content = {
        "split": scored.details["split"],
        "pixel_accuracy": found["accuracy"],
        "without_background": {
            name.removesuffix("_no_bg"): value
            for name, value in means.items()
            if name.endswith("_no_bg") or name in ("mean_hd95", "mean_nsd")
        },
        "with_background": {name: value for name, value in means.items() if f"{name}_no_bg" in means},
        "per_class": {
            label: {family: found[f"{family}_{label}"] for family in FAMILIES if f"{family}_{label}" in found}
            for label in names
        },
        "intervals": scored.intervals,
    }
    return durable.write(folder / METRICS_FILE, json.dumps(durable.plain(content), indent=2))


def history(checkpoint: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch that led to a checkpoint."""
    rows: list[dict[str, float]] = checkpoints.load_state(checkpoint)["progress"].get("history", [])
    return rows
