"""Synthetic hearts in ACDC's layout on disk, for whoever has no data of their own.

A short-axis slice shows the left ventricle as a bright disc, a dark ring of myocardium around it, and the right
ventricle as a bright crescent beside it, in a chest of blobs; the cavities shrink and the ring thickens from the end of
diastole to that of systole, and all shrinks towards the apex. Noise and a smooth bias lie over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segmentation import nifti
from workloads import _synthetic

Plane = npt.NDArray[np.float64]

VERSION = 1
"""Raise when the hearts change, so that folders made before are not mistaken for them."""
RV, MYO, LV = 1, 2, 3
BLOBS = 12


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What the generated hearts are like; used only where `data.root` is not given."""

    patients: int = 20
    """Patients, each with a frame at the end of diastole and one at that of systole."""
    slices: int = 6
    """Slices of a volume."""
    size: int = 96
    """Rows of a slice; it has an eighth fewer columns."""
    noise: float = 0.05
    """Deviation of the noise, as a part of the blood's brightness."""
    bias: float = 0.3
    """Largest change of brightness across a slice."""
    seed: int = 0
    """Seed of the hearts."""

    def __post_init__(self) -> None:
        for name, least in (("patients", 3), ("slices", 1), ("size", 32), ("noise", 0), ("bias", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True)
class Frame:
    """One generated volume."""

    image: npt.NDArray[np.int16]
    """(X, Y, Z)"""
    mask: npt.NDArray[np.uint8]
    """(X, Y, Z)"""
    spacing: tuple[float, float, float]
    """In mm."""


def ensure(config: Synthetic, cache: Path) -> Path:
    """Return the folder with the hearts, made first if it is not there; raises like `_synthetic.ensure`."""
    target = _synthetic.folder("acdc", VERSION, config, cache)
    return _synthetic.ensure(target, lambda root: write(config, root))


def write(config: Synthetic, root: Path) -> None:
    """Write a folder for each patient: two frames with their masks, and Info.cfg."""
    for number in range(1, config.patients + 1):
        name = f"patient{number:03d}"
        folder = root / name
        folder.mkdir(parents=True)
        last = 8 + number % 6
        (folder / "Info.cfg").write_text(f"ED: 1\nES: {last}\nNbFrame: {2 * last}\n", encoding="utf-8")
        for frame, systole in ((1, False), (last, True)):
            made = heart(config, number, systole=systole)
            for values, mark in ((made.image, ""), (made.mask, "_gt")):
                nifti.save(folder / f"{name}_frame{frame:02d}{mark}.nii.gz", values, np.diag([*made.spacing, 1.0]))


def heart(config: Synthetic, number: int, *, systole: bool) -> Frame:
    """Return one volume; shape and place depend only on the seed and the patient's number."""
    own, noise = (np.random.default_rng([config.seed, number, *extra]) for extra in ([], [1 + systole]))
    rows, columns = np.mgrid[: config.size, : config.size - config.size // 8] / config.size
    centre = own.uniform(0.42, 0.56), own.uniform(0.38, 0.5)
    radius, wall = own.uniform(0.11, 0.16), own.uniform(0.035, 0.05)
    angle, reach = own.uniform(-0.5, 0.5) + np.pi / 2, own.uniform(1.2, 1.5)
    squeeze = own.uniform(0.6, 0.75)
    squeeze = squeeze if systole else 1.0
    chest, bias = _chest(own, rows, columns), _bias(own, rows, columns, config.bias)
    spacing = round(own.uniform(1.3, 1.8), 2)
    pictures, masks = [], []
    for place in np.linspace(1.0, 0.45, config.slices):
        shape = _mask(rows - centre[0], columns - centre[1], place * radius, wall, squeeze, angle, reach)
        tissue = np.where(shape > 0, np.array([0.0, 0.85, 0.3, 1.0])[shape], chest)
        pictures.append(tissue * bias + noise.normal(0, config.noise, tissue.shape))
        masks.append(shape)
    image = np.rint(np.clip(np.stack(pictures, -1), 0, None) * 300).astype(np.int16)
    return Frame(image, np.stack(masks, -1).astype(np.uint8), (spacing, spacing, 8.0))


def _mask(
    down: Plane, right: Plane, radius: float, wall: float, squeeze: float, angle: float, reach: float
) -> npt.NDArray[np.int64]:
    """Return class ids around the left ventricle's centre; its outer wall moves less than the cavity shrinks."""
    away = np.hypot(down, right)
    outer, inner = radius + wall, radius * squeeze
    side = outer * 0.55
    beside = np.hypot(down - np.cos(angle) * side * -1, right + np.sin(angle) * side * 1.6)
    crescent = (beside < reach * radius * (0.5 + 0.5 * squeeze)) & (away >= outer)
    return np.select([away < inner, away < outer, crescent], [LV, MYO, RV], 0)


def _chest(rng: np.random.Generator, rows: Plane, columns: Plane) -> Plane:
    """Return tissue around the heart: dark lungs with brighter blobs, never as bright as blood."""
    chest = np.full(rows.shape, 0.12)
    for _ in range(BLOBS):
        at, width, height = rng.uniform(0, 1, 2), rng.uniform(0.04, 0.15), rng.uniform(0.1, 0.5)
        chest += height * np.exp(-((rows - at[0]) ** 2 + (columns - at[1]) ** 2) / (2 * width**2))
    return np.asarray(np.clip(chest, 0, 0.6))


def _bias(rng: np.random.Generator, rows: Plane, columns: Plane, amount: float) -> Plane:
    """Return a smooth factor around 1: brighter towards some side, as near a coil."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(1 + amount * ((rows - 0.5) * np.cos(angle) + (columns - 0.5) * np.sin(angle)))
