"""The original's run log: one CSV row for each finished run, safe when runs finish together."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segmentation.epoch import DataError

HEAD = (
    "run_id",
    "timestamp",
    "epochs",
    "batch_size",
    "num_workers",
    "dataset_size",
    "train_loss",
    "val_loss",
    "best_val_iou",
)
TAIL = ("pixel_acc", "gpu_used", "train_time_hms")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "noEL": (*HEAD, "iou_cosmic", "iou_pointsrc", *TAIL),
    "withEL": (*HEAD, "iou_cr", "iou_ps", "iou_el", *TAIL),
}
FILES: Mapping[str, str] = {
    "noEL": "run_log_multilabel_noEL.csv",
    "withEL": "checkpoints_multilabel_withEL.csv",
}


def append(path: Path, variant: str, values: Mapping[str, Any]) -> int:
    """Append one run and return its `run_id`: the number of lines the file had, header included, or 1.

    The file is locked while its lines are counted and the row is written, so concurrent runs get different ids and
    whole lines, and the header is there once. `values` are all columns but `run_id`; None is written as nothing.

    Raises:
        ValueError: naming columns that are missing or not the variant's.
        DataError: if the file has another header.
    """
    columns = COLUMNS[variant]
    if wrong := set(columns[1:]) ^ set(values):
        raise ValueError(f"{path.name}: got or lacks {', '.join(sorted(wrong))}; expected {', '.join(columns[1:])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read().decode()
        lines = text.splitlines()
        _check_header(path, lines, columns)
        run_id = max(len(lines), 1)
        rows = [] if lines else [list(columns)]
        whole = b"" if not text or text.endswith("\n") else b"\n"  # the last writer died within its line
        os.write(file.fileno(), whole + _text([*rows, [run_id, *(values[column] for column in columns[1:])]]))
        os.fsync(file.fileno())
    return run_id


def hms(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _check_header(path: Path, lines: list[str], columns: tuple[str, ...]) -> None:
    if lines and tuple(next(csv.reader(lines[:1]))) != columns:
        raise DataError(f"{path}: header {lines[0]!r}; expected {','.join(columns)!r}; move the file away")


def _text(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue().encode()
