"""Time a pruned network against its parent on the CPU: fewer multiplications are not as much less time.

A UNet is trained on generated hearts, pruned to half of its multiply-accumulates and tuned. Both are timed in turns,
one slice at a time, one thread, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _hearts
from segmentation.deployment.measure import in_turns
from segmentation.networks import cost
from workloads import acdc

TINY = {"epochs": 1, "tuned": 1, "size": 48, "rounds": 2}


def measure(
    epochs: int = 6, tuned: int = 3, size: int = 96, timed: int = 256, macs: float = 0.5, rounds: int = 15
) -> dict[str, Any]:
    """Return the ratios of the pruned network to its parent, and the milliseconds of both.

    timed: side of the slice that is timed, in pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        both = _hearts.family(Path(folder), epochs=epochs, tuned=tuned, size=size, macs=macs)
        whole, small = (acdc.load(path)[1] for path in (both.parent, both.pruned))
    parent_ms, pruned_ms = in_turns((whole, small), 1, timed, timed, threads=1, rounds=rounds)
    counted = [cost.macs(model, 1, timed, timed) for model in (whole, small)]
    return {
        "latency_ratio": round(pruned_ms / parent_ms, 4),
        "macs_ratio": round(counted[1] / counted[0], 4),
        "parent_ms": round(parent_ms, 2),
        "pruned_ms": round(pruned_ms, 2),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    return [
        (
            f"CPU latency of a UNet pruned to {result['macs_ratio']:.2f} of its MACs, one slice of 256x256, one thread",
            f"{result['latency_ratio']:.2f} of its parent's",
            f"{result['pruned_ms']:.0f} ms against {result['parent_ms']:.0f} ms; aim: less",
        )
    ]
