"""From detectors to pictures and back: time-ordered data, focal-plane frames, hits for each detector.

A frame is drawn by linear interpolation in the triangles between detectors (Delaunay), so it is exact for a field that
is linear in the sky position; grid points outside the detectors' hull are invalid and hold zero.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]
Reduce = Literal["max", "sum", "mean"]

REDUCE: Mapping[str, Callable[..., Any]] = {"max": np.max, "sum": np.sum, "mean": np.mean}
HIT_COLUMNS = ("slice_from", "slice_to", "det_uid", "sky_x_rad", "sky_y_rad", "prob_*", "labels")
"""`prob_*` stands for one column a class."""


@dataclass(frozen=True)
class FocalPlane:
    """Where detectors are, and how a grid is read between them."""

    uid: tuple[str, ...]
    x: Array
    """(D,) radians"""
    y: Array
    """(D,) radians"""
    size: int
    corners: Array
    """(size*size, 3) detectors around each grid point"""
    weights: Array
    """(size*size, 3) barycentric weights; zero outside the hull"""

    @property
    def valid(self) -> Array:
        """Tell where the grid lies inside the detectors' hull, (size, size)."""
        return np.asarray(self.weights.sum(axis=1).reshape(self.size, self.size) > 0.5)


def focal_plane(uid: Sequence[str], x: Array, y: Array, *, size: int = 32) -> FocalPlane:
    """Return the focal plane of some detectors, gridded over their bounding box.

    Rows of a frame follow y upwards from its smallest value, columns follow x.

    Raises:
        DataError: for fewer than three detectors, detectors on one line, positions not finite, or doubled uids.
    """
    from scipy.spatial import Delaunay, QhullError

    positions = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)
    if len(set(uid)) != len(positions) or len(uid) != len(positions):
        raise DataError(
            f"focal plane: {len(set(uid))} different uids for {len(positions)} positions; expected one each"
        )
    if not np.isfinite(positions).all():
        raise DataError("focal plane: a detector position is not finite; leave such detectors out")
    scale = np.ptp(positions, axis=0)
    if len(positions) < 3 or not scale.all():
        raise DataError(
            f"focal plane: {len(positions)} detectors on one line; expected three or more that span an area"
        )
    unit = (positions - positions.min(axis=0)) / scale
    try:
        triangles = Delaunay(unit)
    except QhullError as error:
        raise DataError("focal plane: the detectors lie on one line; expected them to span an area") from error
    corners, weights = _barycentric(triangles, _grid(size))
    return FocalPlane(tuple(uid), positions[:, 0], positions[:, 1], size, corners, weights)


def frames(plane: FocalPlane, values: Array) -> Array:
    """Return a video (T, size, size) float32 of detector values (D, T)."""
    video = np.einsum("gc,gct->tg", plane.weights, np.asarray(values, float)[plane.corners])
    return np.asarray(video.reshape(-1, plane.size, plane.size), np.float32)


def slice_picture(video: Array, start: int, stop: int, how: Reduce = "max") -> Array:
    """Return one picture (H, W) of the frames `start:stop`.

    Raises:
        ValueError: if the slice is empty or leaves the video.
    """
    if not 0 <= start < stop <= len(video):
        raise ValueError(f"slice: got {start}:{stop}; expected it inside 0:{len(video)} and not empty")
    return np.asarray(REDUCE[how](video[start:stop], axis=0), np.float32)


def high_pass(values: Array, rate_hz: float, *, cut_hz: float = 2.0, order: int = 5) -> Array:
    """Return detector values (D, T) without what varies slower than `cut_hz` (Butterworth, second-order sections).

    Raises:
        ValueError: if the cut lies above half the sampling rate.
    """
    from scipy.signal import butter, sosfilt

    if not 0 < cut_hz < rate_hz / 2:
        raise ValueError(f"cut_hz: got {cut_hz}; expected between 0 and half of rate_hz={rate_hz}")
    sections = butter(order, cut_hz, btype="highpass", fs=rate_hz, output="sos")
    centred = values - values[:, :1]  # a filter at rest sees no step at its first sample
    return np.asarray(sosfilt(sections, centred, axis=1))


def at_detectors(plane: FocalPlane, maps: Array) -> Array:
    """Return maps (K, H, W) read bilinearly at each detector, (K, D).

    Grid points outside the hull say nothing; the nearest one inside stands in for each.
    """
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~plane.valid, return_distances=False, return_indices=True)
    filled = np.asarray(maps)[:, rows, columns]
    column, row = _position(plane.x, plane.size), _position(plane.y, plane.size)
    left, below = np.minimum(column.astype(int), plane.size - 2), np.minimum(row.astype(int), plane.size - 2)
    right_share, up_share = column - left, row - below
    lower = filled[:, below, left] * (1 - right_share) + filled[:, below, left + 1] * right_share
    upper = filled[:, below + 1, left] * (1 - right_share) + filled[:, below + 1, left + 1] * right_share
    return np.asarray(lower * (1 - up_share) + upper * up_share)


def hits(
    plane: FocalPlane,
    probabilities: Array,
    *,
    start: int,
    stop: int,
    classes: Sequence[str],
    thresholds: Sequence[float],
    every: bool = False,
) -> list[dict[str, Any]]:
    """Return a row for each detector where a class exceeds its threshold, in the columns of `HIT_COLUMNS`.

    `probabilities` are (K, H, W) on the plane's grid; `labels` joins the classes above their threshold with `|`.
    With `every`, detectors without a hit are returned too.
    """
    if not len(classes) == len(thresholds) == len(probabilities):
        raise ValueError(f"thresholds: got {len(thresholds)} for {len(probabilities)} maps and {len(classes)} classes")
    read = at_detectors(plane, probabilities)
    rows = []
    for detector, uid in enumerate(plane.uid):
        pairs = zip(classes, thresholds, read[:, detector], strict=True)
        labels = [name for name, threshold, value in pairs if value > threshold]
        if labels or every:
            rows.append(
                _row(plane, detector, uid, (start, stop), dict(zip(classes, read[:, detector], strict=True)), labels)
            )
    return rows


def write_hits(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], path: Path) -> None:
    """Write hits as CSV, its header also where there is no hit."""
    columns = [
        c for column in HIT_COLUMNS for c in ([f"prob_{n}" for n in classes] if column == "prob_*" else [column])
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _row(
    plane: FocalPlane, detector: int, uid: str, span: tuple[int, int], values: Mapping[str, float], labels: list[str]
) -> dict[str, Any]:
    return {
        "slice_from": span[0],
        "slice_to": span[1],
        "det_uid": uid,
        "sky_x_rad": float(plane.x[detector]),
        "sky_y_rad": float(plane.y[detector]),
        **{f"prob_{name}": float(value) for name, value in values.items()},
        "labels": "|".join(labels),
    }


def _grid(size: int) -> Array:
    """Return the (size*size, 2) points of a grid over the unit square, x fastest."""
    axis = np.linspace(0, 1, size)
    return np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1).reshape(-1, 2)


def _barycentric(triangles: Any, points: Array) -> tuple[Array, Array]:
    inside = triangles.find_simplex(points, tol=1e-9)
    transform = triangles.transform[inside]
    first = np.einsum("pij,pj->pi", transform[:, :2], points - transform[:, 2])
    weights = np.concatenate([first, 1 - first.sum(axis=1, keepdims=True)], axis=1)
    weights[(inside < 0) | ~np.isfinite(weights).all(axis=1)] = 0
    return triangles.simplices[inside], weights


def _position(values: Array, size: int) -> Array:
    return np.asarray((values - values.min()) / np.ptp(values) * (size - 1))
