"""Time a pruned network against its parent on the CPU: fewer multiplications are not as much less time.

A UNet is trained on generated hearts, pruned to half of its multiply-accumulates and tuned. Both are timed in turns,
one slice at a time, one thread, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _hearts
from segmentation.deployment.measure import latency
from segmentation.networks import cost
from workloads import acdc

TINY = {"epochs": 1, "tuned": 1, "size": 48, "rounds": 2}


def measure(
    epochs: int = 6, tuned: int = 3, size: int = 96, timed: int = 256, macs: float = 0.5, rounds: int = 15
) -> dict[str, Any]:
    """Return the ratios of the pruned network to its parent, and the milliseconds of both.

    timed: side of the slice that is timed, in pixels.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        both = _hearts.family(Path(folder), epochs=epochs, tuned=tuned, size=size, macs=macs)
        whole, small = (acdc.load(path)[1] for path in (both.parent, both.pruned))
    image = torch.rand(1, 1, timed, timed)
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            rows = [[_p50_ms(model, image) for model in (whole, small)] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    counted = [cost.macs(model, 1, timed, timed) for model in (whole, small)]
    parent_ms, pruned_ms = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "latency_ratio": round(statistics.median(pruned / parent for parent, pruned in rows), 4),
        "macs_ratio": round(counted[1] / counted[0], 4),
        "parent_ms": round(parent_ms, 2),
        "pruned_ms": round(pruned_ms, 2),
    }


def _p50_ms(model: nn.Module, image: Tensor) -> float:
    return latency(lambda: model(image), runs=5, warmup=1).p50_ms


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    return [
        (
            f"CPU latency of a UNet pruned to {result['macs_ratio']:.2f} of its MACs, one slice of 256x256, one thread",
            f"{result['latency_ratio']:.2f} of its parent's",
            f"{result['pruned_ms']:.0f} ms against {result['parent_ms']:.0f} ms; aim: less",
        )
    ]
