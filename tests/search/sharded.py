"""A workload that predicts the length of each file, for tests of shares; its checkpoint says how it goes wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from workloads.toy import Config, evaluate, inspect, metrics, prepare, train

__all__ = ["Config", "evaluate", "inspect", "metrics", "predict", "prepare", "train"]


def predict(checkpoint: Path, source: Path, out_dir: Path) -> list[Path]:
    """Write NAME.txt for each file and, where asked to, a summary of all of them."""
    told = json.loads((checkpoint / "told.json").read_text())
    files = sorted(path for path in source.rglob("*") if path.is_file())
    with (checkpoint / "calls.txt").open("a") as calls:
        calls.write(f"{os.getpid()} {len(files)}\n")
    written = []
    for path in files:
        name = path.relative_to(source)
        if str(name) == told.get("refused"):
            raise ValueError(f"{path}: no picture")
        if str(name) == told.get("broken"):
            raise ZeroDivisionError("no length")
        written.append(out_dir / name.with_suffix(".txt"))
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(f"{len(path.read_bytes())}\n")
        if str(name) == told.get("deadly") and (always := told["times"]):
            (checkpoint / "told.json").write_text(json.dumps({**told, "times": always - 1}))
            os.kill(os.getpid(), signal.SIGKILL)
    if told.get("summary"):
        written.append(out_dir / "summary.csv")
        written[-1].write_text("".join(f"{path.relative_to(source)}\n" for path in files))
    return written
