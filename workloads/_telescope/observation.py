"""Predict on raw observations: detector time streams in, hits for each detector out.

An observation is an .npz file with `tod` (D, T), `x` and `y` (D,) in radians, and, if known, `det_uid` (D,) and
`rate_hz`, without which slow drifts are not filtered out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmentation import limits
from segmentation.epoch import DataError
from workloads._telescope import focal_plane
from workloads._telescope.focal_plane import FocalPlane, Reduce

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """How time streams become pictures, for `predict` on .npz files."""

    size: int = 32
    """Height and width of a picture, in pixels."""
    slice_samples: int = 512
    """Time samples in a picture."""
    reduce: Reduce = "max"
    """How a slice becomes a picture."""
    high_pass_hz: float = 2.0
    """Slower changes are filtered out first (Butterworth, order 5); 0: none are."""
    thresholds: tuple[float, ...] = ()
    """Probability above which a detector is hit, for each class; empty: the training's threshold."""

    def __post_init__(self) -> None:
        for name in ("size", "slice_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 2")
        if self.high_pass_hz < 0:
            raise ValueError(f"high_pass_hz: got {self.high_pass_hz}; expected 0 or more")


def hits(
    path: Path, config: Observation, predict: Callable[[Array], Array], classes: tuple[str, ...], threshold: float
) -> list[dict[str, Any]]:
    """Return the hits of every slice of an observation; `predict` turns (H, W) into probabilities (K, H, W).

    Raises:
        DataError: naming the file and what it lacks.
    """
    plane, tod, rate = read(path, config.size)
    if config.high_pass_hz and rate:
        tod = focal_plane.high_pass(tod, rate, cut_hz=config.high_pass_hz)
    video = focal_plane.frames(plane, tod)
    thresholds = config.thresholds or (threshold,) * len(classes)
    found = []
    for start in range(0, len(video), config.slice_samples):
        stop = min(start + config.slice_samples, len(video))
        maps = predict(focal_plane.slice_picture(video, start, stop, config.reduce))[: len(classes)]
        found += focal_plane.hits(plane, maps, start=start, stop=stop, classes=classes, thresholds=thresholds)
    return found


def read(path: Path, size: int) -> tuple[FocalPlane, Array, float]:
    """Return the focal plane, the time streams (D, T), and their rate in Hz, 0 where it is not known."""
    content = limits.read_npz(path)
    if lacking := [name for name in ("tod", "x", "y") if name not in content]:
        raise DataError(f"{path}: lacks {', '.join(lacking)}; expected tod (D, T), x (D,) and y (D,) in radians")
    tod, x = np.asarray(content["tod"], float), content["x"]
    if tod.ndim != 2 or x.shape != (len(tod),) or content["y"].shape != x.shape:
        raise DataError(f"{path}: tod is {tod.shape}, x {x.shape}, y {content['y'].shape}; expected (D, T), (D,), (D,)")
    uid = [str(name) for name in content.get("det_uid", np.arange(len(tod)))]
    return focal_plane.focal_plane(uid, x, content["y"], size=size), tod, float(content.get("rate_hz", 0.0))
