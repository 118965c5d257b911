"""What a run that stands alone leaves in its folder, under the original's file names: checkpoints, CSV row, curves.

Off unless `out` is given: trials that run side by side must never share files.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import durable
from segmentation import checkpoints, figures, splits
from segmentation.epoch import Epoch
from segmentation.splits import Splits
from workloads import _model
from workloads._telescope import runlog
from workloads._telescope.figures import LINE_COLOURS, MEAN_COLOUR

logger = logging.getLogger(__name__)

Row = Mapping[str, float]


class RunFolder:
    """The folder of one run: its rows so far, and the files that follow from them."""

    def __init__(self, folder: Path, variant: str, keep_last: int) -> None:
        self.folder, self.variant, self.keep_last = folder, variant, keep_last
        self.rows: list[Row] = []
        self.epoch = 0
        """The last epoch added; 0: none was, as where a run is resumed that had ended."""
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def history(self) -> Path:
        """Every epoch's metrics, so that a resumed run draws whole curves and knows its best."""
        return self.folder / f"history_{self.variant}.json"

    def begin(self, made: Splits, epochs_done: int) -> None:
        """Write the splits, and take up the rows of the epochs that a resumed run does not repeat."""
        splits.write(made, self.folder / "splits.json")
        if epochs_done and self.history.is_file():
            self.rows = json.loads(self.history.read_text())[:epochs_done]

    def add(self, epoch: Epoch) -> None:
        """Keep an epoch: `last` always, `best` where mean validation IoU is more than ever before."""
        best = all(epoch.metrics["mean_iou"] > row["mean_iou"] for row in self.rows)
        self.rows.append(dict(epoch.metrics))
        self.epoch = epoch.number
        durable.write(self.history, json.dumps(self.rows))
        content = reference_checkpoint(epoch)
        for kind in ("last", "best") if best else ("last",):
            _model.write_torch(content, self.folder / checkpoint_name(self.variant, epoch.number, kind))
        if self.keep_last:
            prune(self.folder, self.variant, "last", self.keep_last)
            prune(self.folder, self.variant, "best", 1)

    def finish(self, values: Mapping[str, Any]) -> list[Path]:
        """Append the run's CSV row, draw its curves, and return the files."""
        path = self.folder / runlog.FILES[self.variant]
        run_id = runlog.append(
            path, self.variant, {**csv_scores(self.rows, self.variant), "epochs": self.epoch, **values}
        )
        logger.info("run %d: %d epochs, best mean IoU %.3f, logged in %s", run_id, self.epoch, _best(self.rows), path)
        return [path, *draw_curves(self.folder, self.rows, self.variant)]


def checkpoint_name(variant: str, epoch: int, kind: str) -> str:
    """Return the original's file name."""
    return f"unet_multilabel_{variant}_ep{epoch}_{kind}.pt"


def reference_checkpoint(epoch: Epoch) -> dict[str, Any]:
    """Return the original's checkpoint: epoch, model, optimizer; the metrics besides."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epoch.save(folder)
        return {
            "epoch": epoch.number,
            "model": checkpoints.safetensors_weights(folder / checkpoints.WEIGHTS_FILE),
            "optimizer": checkpoints.load_state(folder)["optimizer"],
            "metrics": dict(epoch.metrics),
        }


def prune(folder: Path, variant: str, kind: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of one kind."""
    prefix, suffix = f"unet_multilabel_{variant}_ep", f"_{kind}.pt"
    found = [path for path in folder.glob(f"{prefix}*{suffix}") if _epoch(path, prefix, suffix) is not None]
    for path in sorted(found, key=lambda path: _epoch(path, prefix, suffix) or 0)[:-keep]:
        path.unlink()


def csv_scores(rows: Sequence[Row], variant: str) -> dict[str, Any]:
    """Return the columns of the run log that follow from the epochs' metrics: those of the last, and the best IoU."""
    last = rows[-1]
    names = {"iou_cosmic": "iou_cr", "iou_pointsrc": "iou_ps"} if variant == "noEL" else {}
    names = names or {name: name for name in ("iou_cr", "iou_ps", "iou_el")}
    return {
        "timestamp": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "train_loss": last["train_loss"],
        "val_loss": last["val_loss"],
        "best_val_iou": _best(rows),
        **{column: last[name] for column, name in names.items()},
        "pixel_acc": last["acc"],
        "gpu_used": torch.cuda.current_device() if torch.cuda.is_available() else None,
    }


def draw_curves(folder: Path, rows: Sequence[Row], variant: str) -> list[Path]:
    """Write loss_curve.png, iou_per_class.png and accuracy.png, and train_iou.png where that was recorded."""
    channels = {"iou_cr": "CR", "iou_ps": "PS", **({"iou_el": "EL"} if variant == "withEL" else {})}
    colours = dict(zip(("iou_cr", "iou_ps", "iou_el"), LINE_COLOURS, strict=True)) | {"mean_iou": MEAN_COLOUR}
    loss = {"train_loss": "training", "val_loss": "validation"}
    # The accuracy of predicting nothing stands beside it, because background makes every accuracy look good.
    accuracy = {"acc": "validation", "acc_all_zero": "all zero"}
    plots = [
        ("loss_curve.png", loss, f"Loss, {variant}", "loss"),
        ("iou_per_class.png", {**channels, "mean_iou": "mean"}, f"Validation IoU, {variant}", "IoU"),
        ("accuracy.png", accuracy, f"Pixel accuracy, {'/'.join(channels.values())}", "accuracy"),
    ]
    if any("train_mean_iou" in row for row in rows):
        series = {"train_mean_iou": "training", "mean_iou": "validation"}
        plots.append(("train_iou.png", series, f"Mean IoU, {variant}", "IoU"))
    return [
        figures.curves(folder / name, rows, series, title=title, ylabel=ylabel, colours=colours)
        for name, series, title, ylabel in plots
    ]


def _best(rows: Sequence[Row]) -> float:
    return max(row["mean_iou"] for row in rows)


def _epoch(path: Path, prefix: str, suffix: str) -> int | None:
    digits = path.name.removeprefix(prefix).removesuffix(suffix)
    return int(digits) if digits.isdigit() else None
