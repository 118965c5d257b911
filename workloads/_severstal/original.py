"""The command line of the original's training script, read as it is: `train severstal -- --encoder resnet50 --lr 1e-4`.

What the flags do not say is as in `severstal.Config.reference()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from configuration import PRESET
from segmentation.epoch import DataError
from workloads._severstal.reader import SPLITS

SAME = {
    "encoder": "network.encoder",
    "lr": "lr",
    "batch_size": "batch_size",
    "epochs": "epochs",
    "img_size": "data.image_size",
    "weight_decay": "weight_decay",
    "patience": "patience",
    "num_workers": "loader_workers",
    "seed": "seed",
    "run_name": "run_name",
}
"""Flags whose value stays as it is, and what they are called here."""
TRAIN, VALIDATION = (folder for folder, part in SPLITS.items() if part != "test")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the flags say."""

    values: dict[str, Any]
    """Of severstal's Config, by their dotted names."""
    out: Path | None
    """Where the run goes; None: where all runs go."""
    tracking: bool
    """Whether W&B was asked for."""


def from_flags(flags: Sequence[str]) -> Told:
    """Return what the original's flags say.

    Raises:
        DataError: for a flag that there is not, a value that it cannot have, or folders that are no such splits.
    """
    parser = _Parser(prog="--", add_help=False, allow_abbrev=False)
    for name, kind in {"encoder": str, "run_name": str, "train_path": Path, "val_path": Path, "save_dir": Path}.items():
        parser.add_argument(f"--{name}", type=kind)
    for name in ("lr", "weight_decay"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("batch_size", "epochs", "patience", "num_workers", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--img_size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    for name in ("unet_plus_plus", "use_wandb"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(list(flags))
    values = {key: value for flag, key in SAME.items() if (value := getattr(given, flag)) is not None}
    if given.unet_plus_plus:
        values["network.name"] = "smp_unetplusplus"
    if given.train_path or given.val_path:
        values["data.root"] = str(_root(given.train_path, given.val_path))
    return Told(values={PRESET: "reference", **values}, out=given.save_dir, tracking=given.use_wandb)


def _root(train: Path | None, validation: Path | None) -> Path:
    """Return the folder that the two of the original's splits lie in."""
    for flag, path, name in (("--train_path", train, TRAIN), ("--val_path", validation, VALIDATION)):
        if path is not None and path.name != name:
            raise DataError(
                f"{flag}: got {path}; expected a folder {name} with img/ and ann/, beside the others of "
                f"{', '.join(SPLITS)}; rename it, or leave both paths out and write --set data.root=FOLDER"
            )
    homes = {path.parent for path in (train, validation) if path is not None}
    if len(homes) > 1:
        raise DataError(f"--val_path: got {validation}; expected it beside {train}: put both into one folder")
    return homes.pop()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = " ".join(sorted(action.option_strings[0] for action in self._actions))
        raise DataError(f"--: {message}; the flags are {known}")
