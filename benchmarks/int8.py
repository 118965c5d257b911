"""Quantise a pruned UNet that finds generated hearts: what its int8 file saves, and what that costs.

The network is trained, pruned to half of its multiply-accumulates and tuned. Size is that of the file, Dice the mean
over foreground classes on the test split, latency that of one slice in onnxruntime with one thread. `dice_loss` is 0
where int8 scores higher.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _hearts
from workloads import _deploy, acdc

TINY = {"epochs": 1, "tuned": 1, "size": 48}


def measure(epochs: int = 16, tuned: int = 6, size: int = 96, macs: float = 0.5) -> dict[str, Any]:
    """Return how the int8 file of the pruned network compares with its fp32 one."""
    with tempfile.TemporaryDirectory() as folder:
        both = _hearts.family(Path(folder), epochs=epochs, tuned=tuned, size=size, macs=macs)
        out = Path(folder) / "export"
        ready = _deploy.ready("acdc", acdc, both.pruned, {})
        _deploy.export(ready, out, int8=True, qat_steps=0, engine=None, split="test")
        with (out / "quantisation.csv").open(newline="", encoding="utf-8") as file:
            plain, small = csv.DictReader(file)
    return {
        "parameters": int(plain["parameters"]),
        "size_ratio": round(float(small["size_ratio"]), 4),
        "dice_fp32": round(float(plain["dice"]), 4),
        "dice_int8": round(float(small["dice"]), 4),
        "dice_loss": round(max(0.0, float(small["dice_loss"])), 4),
        "p50_ms_fp32": round(float(plain["p50_ms"]), 3),
        "p50_ms_int8": round(float(small["p50_ms"]), 3),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    network = f"a pruned UNet of {result['parameters']:,} parameters"
    return [
        (f"int8 file of {network}, size", f"{result['size_ratio']:.2f} of fp32's", "aim: at most 0.3"),
        (
            "its foreground Dice on the test split",
            f"{result['dice_int8']:.3f}, {result['dice_loss']:.4f} lost",
            f"{result['dice_fp32']:.3f} in fp32; aim: at most 0.01 lost",
        ),
        (
            "its latency, one slice in onnxruntime, one thread, p50",
            f"{result['p50_ms_int8']:.2f} ms",
            f"{result['p50_ms_fp32']:.2f} ms in fp32; report",
        ),
    ]
