"""What a training run that stands alone leaves in its folder, under the original's names.

    args.json                           every resolved value, versions of packages, the commit, the data's hash
    metrics_seed42.csv                  a row for each epoch, appended when it ends
    best_dice_0.8234_seed42.pth         weights and full state of the epoch with the best validation Dice so far
    best_iou_0.7133_seed42.pth          the same by IoU
    checkpoint_epoch_10_seed42.pth      the same of every tenth epoch
    tfm_report.md                       what was asked of the original, and what this run did about it

The log tells what is trained at the start, and the scores of each epoch in its block of lines.

Off unless a folder is given: trials that run side by side must never share files.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import configuration
import durable
from segmentation import checkpoints, ranks
from segmentation.epoch import DataError, Epoch
from workloads import _model
from workloads._severstal import tfm_report

logger = logging.getLogger(__name__)

COLUMNS = (
    *("epoch", "train_loss", "val_loss", "val_iou_fixed", "val_dice_fixed", "val_iou_opt", "val_dice_opt"),
    *("opt_threshold_f1", "opt_threshold_dice", "iou_50", "iou_75", "iou_90", "auprc", "recall_fp_image"),
    *("learning_rate", "epoch_time"),
)
"""Of the CSV, in their order; what an epoch reports by these names, and three more."""
BEST = {"dice": "val_dice_opt", "iou": "val_iou_opt"}
"""What the best epochs are best by."""


class RunFolder:
    """The folder of one run: its rows so far, and the files that follow from them.

    Args:
        folder: made if missing.
        config: every value; of them `seed` is part of files' names, and `save_every` says which epochs are kept.
        parameters: of the network.
    """

    def __init__(self, folder: Path, config: Any, parameters: int) -> None:
        self.folder, self.config, self.parameters = folder, config, parameters
        self.seed, self.save_every, self.args = config.seed, config.save_every, configuration.to_values(config)
        self.rows: list[dict[str, str]] = []

    @property
    def table(self) -> Path:
        """Where the epochs' rows stand."""
        return self.folder / f"metrics_seed{self.seed}.csv"

    def begin(self, data_sha256: str, epochs_done: int) -> None:
        """Write args.json, and take up the rows of the epochs that a resumed run does not repeat.

        Raises:
            DataError: if the table is no such table.
        """
        if ranks.place()[0]:
            return
        if epochs_done and self.table.is_file():
            with self.table.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != list(COLUMNS):
                    raise DataError(f"{self.table}: is not the table of such a run; move it away, or name another out")
                self.rows = [row for row in reader if int(row["epoch"]) <= epochs_done]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        durable.write(self.table, text.getvalue())
        told = {
            "args": self.args,
            "versions": checkpoints.versions(),
            "commit": commit(),
            "data_sha256": data_sha256,
        }
        durable.write(self.folder / "args.json", json.dumps(told, indent=1) + "\n")
        durable.write(self.folder / tfm_report.FILE, tfm_report.text(self.config, self.rows))
        logger.info("%s", banner(self.config, self.parameters))

    def add(self, epoch: Epoch, seconds: float) -> None:
        """Append an epoch's row, and keep its checkpoint where it is the best so far, or every tenth."""
        content = self._checkpoint(epoch)
        if ranks.place()[0]:
            return
        more = {"epoch": epoch.number, "learning_rate": epoch.metrics["lr"], "epoch_time": round(seconds, 3)}
        values = {**epoch.metrics, **more}
        row = {column: str(values.get(column, "")) for column in COLUMNS}
        for kind, name in BEST.items():
            best = max((float(before[name]) for before in self.rows if before[name]), default=-1.0)
            if name in epoch.metrics and epoch.metrics[name] > best:
                self._keep_best(kind, epoch.metrics[name], content)
        if self.save_every and epoch.number % self.save_every == 0:
            _model.write_torch(content, self.folder / f"checkpoint_epoch_{epoch.number}_seed{self.seed}.pth")
        self.rows.append(row)
        with self.table.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
            file.flush()
            os.fsync(file.fileno())
        durable.write(self.folder / tfm_report.FILE, tfm_report.text(self.config, self.rows))
        logger.info("%s", block(epoch.number, self.config.epochs, row))

    def _keep_best(self, kind: str, score: float, content: Mapping[str, Any]) -> None:
        """Write the best checkpoint; the one before goes only when the new one is whole."""
        path = self.folder / f"best_{kind}_{score:.4f}_seed{self.seed}.pth"
        _model.write_torch(content, path)
        for other in self.folder.glob(f"best_{kind}_*_seed{self.seed}.pth"):
            if other != path:
                other.unlink()

    def _checkpoint(self, epoch: Epoch) -> dict[str, Any]:
        """Return what the original keeps of an epoch, and the state that it lacked."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            epoch.save(folder)
            if ranks.place()[0]:
                return {}
            state = checkpoints.load_state(folder)
            weights = checkpoints.safetensors_weights(folder / checkpoints.WEIGHTS_FILE)
        return {
            "epoch": epoch.number,
            "model_state_dict": weights,
            "optimizer_state_dict": state.pop("optimizer"),
            "scaler_state_dict": state.pop("scaler", None),
            "val_dice": epoch.metrics.get("val_dice_opt"),
            "val_iou": epoch.metrics.get("val_iou_opt"),
            "opt_threshold_f1": epoch.metrics.get("opt_threshold_f1"),
            "opt_threshold_dice": epoch.metrics.get("opt_threshold_dice"),
            "metrics": dict(epoch.metrics),
            "args": self.args,
            # Schedule and random numbers follow from these two, see segmentation.training.
            "scheduler_state_dict": {"last_epoch": epoch.number, "lr": epoch.metrics["lr"]},
            "rng": {"seed": self.seed, "epoch": epoch.number},
            "state": state,
        }


def banner(config: Any, parameters: int) -> str:
    """Return what is about to be trained, as the original's console says it."""
    width, height = config.data.image_size
    told = {
        "Model": "UNet++" if config.network.name == "smp_unetplusplus" else "UNet",
        "Encoder": f"{config.network.encoder}{' (ImageNet)' if config.network.pretrained else ''}",
        "Total parameters": f"{parameters:,}",
        "Learning rate": f"{config.lr:g}",
        "Batch size": config.batch_size,
        "Weight decay": f"{config.weight_decay:g}",
        "Image size": f"{width}x{height}",
        "Patience": config.patience,
        "Seed": config.seed,
    }
    return _lined(config.run_name or "severstal", told)


def block(number: int, of: int, row: Mapping[str, str]) -> str:
    """Return the scores of an epoch, a row of the table, as the original's console says them: ten lines."""

    def told(*columns: str) -> str:
        return " / ".join(f"{float(row[column]):.4f}" if row[column] else "undefined" for column in columns)

    lines = {
        "Train loss": told("train_loss"),
        "Val loss": told("val_loss"),
        "Val IoU (0.5 / optimal)": told("val_iou_fixed", "val_iou_opt"),
        "Val Dice (0.5 / optimal)": told("val_dice_fixed", "val_dice_opt"),
        "Optimal threshold (F1 / Dice)": told("opt_threshold_f1", "opt_threshold_dice"),
        "IoU@50 / @75 / @90": told("iou_50", "iou_75", "iou_90"),
        "AUPRC": told("auprc"),
        "Recall@FP/image": told("recall_fp_image"),
        "Learning rate": f"{float(row['learning_rate']):.2e}",
        "Time": f"{float(row['epoch_time']):.1f} s",
    }
    return _lined(f"Epoch {number}/{of}", lines)


def _lined(title: str, told: Mapping[str, object]) -> str:
    width = max(map(len, told))
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in told.items())])


def commit() -> str | None:
    """Return the commit of the code that runs, with "+" where files were changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
