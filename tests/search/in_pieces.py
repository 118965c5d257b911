"""A workload whose data are files to be copied one by one, for tests of preparation; a file says how it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import toy
from workloads.toy import evaluate, inspect, metrics, predict, train

__all__ = ["Config", "evaluate", "inspect", "metrics", "pieces", "predict", "prepare", "process", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(toy.Config):
    """The toy's, and where its pieces lie."""

    root: str = ""
    """Folder with told.json, and the pieces that are done."""


def pieces(config: Config) -> list[str]:
    told = json.loads((Path(config.root) / "told.json").read_text())
    if told.get("unreadable"):
        raise ValueError(f"{config.root}: no pieces")
    return [name for name in told["pieces"] if not (Path(config.root) / name).exists()]


def process(config: Config, names: Sequence[str]) -> list[str]:
    root = Path(config.root)
    for name in names:
        with (root / "calls.txt").open("a") as calls:
            calls.write(f"{name}\n")
        told = json.loads((root / "told.json").read_text())
        if name == told.get("refused"):
            raise ValueError(f"{told.get('where', name)}: no piece")
        if name == told.get("broken"):
            raise ZeroDivisionError("no length")
        if name == told.get("deadly") and (times := told["times"]):
            (root / "told.json").write_text(json.dumps({**told, "times": times - 1}))
            os.kill(os.getpid(), signal.SIGKILL)
        begun = root / f"{name}.begun"
        begun.touch()
        time.sleep(told.get("seconds", 0.0))
        most = len(list(root.glob("*.begun")))
        (root / name).write_text(f"{most}")
        begun.unlink()
    return list(names)


def prepare(config: Config) -> dict[str, Any]:
    told = json.loads((Path(config.root) / "told.json").read_text())
    if told.get("unusable"):
        raise ValueError(f"{config.root}: not usable")
    counts = {"train": sum((Path(config.root) / name).exists() for name in told["pieces"]), "validation": 0, "test": 0}
    return {"sha256": "0123", "samples": counts, "synthetic": True, "warnings": ["these are no data"]}
