"""Synthetic steel strips in Kaggle's and Supervisely's form on disk, for whoever has no data of their own.

A strip is rolled steel: streaks along it, grain, a lamp's glow across it, and on every fifth the dark gap beside the
plate. Four classes of defects, as on Severstal's strips: 1 clusters of pits, 2 thin cracks across, 3 scratches along,
4 rough patches. Each fades in and out, takes its brightness from a range that the clean steel has too, and no pixel has
two classes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from workloads import _synthetic
from workloads._severstal.annotations import TITLES, Mask, annotation, encode_runs
from workloads._severstal.reader import COLUMNS, PICTURES, TABLE

Plane = npt.NDArray[np.float64]
Slices = tuple[slice, slice]
Drawn = tuple[Plane, Plane]
"""How a defect changes grey values, and what it covers, more than half, in a window about its middle."""

VERSION = 1
"""Raise when the strips change, so that folders made before are not mistaken for them."""
QUALITY, OTHER_QUALITY = 92, 80
COLOURS = ("#3355ff", "#66abfe", "#9a01fd", "#fd9a01")


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What the generated strips are like; used only where `data.root` is not given."""

    samples: int = 80
    """Strips to make, duplicates included."""
    width: int = 1600
    """Width in pixels."""
    height: int = 256
    """Height in pixels."""
    clean: float = 0.5
    """Share of strips without a defect."""
    contrast: float = 1.0
    """How much the defects stand out: half of it is hard to see."""
    duplicates: int = 0
    """How many of the strips show again what the first ones do: every second with the same bytes, the others
    compressed anew."""
    form: Literal["supervisely", "kaggle", "both"] = "supervisely"
    """How they are written; both: the same strips twice below one folder, for comparing readers."""
    seed: int = 0
    """Seed of the strips."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("width", 64), ("height", 32), ("duplicates", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least {least}")
        if self.duplicates > self.samples // 2:
            raise ValueError(f"duplicates: got {self.duplicates}; expected at most half of samples={self.samples}")
        if not 0 <= self.clean < 1:
            raise ValueError(f"clean: got {self.clean}; expected 0 or more, and less than 1")
        if self.contrast <= 0:
            raise ValueError(f"contrast: got {self.contrast}; expected more than 0")


@dataclass(frozen=True)
class Strip:
    """One generated strip."""

    image: npt.NDArray[np.uint8]
    """(H, W)"""
    mask: Mask
    """(4, H, W) of 0 and 1, never two in one pixel"""


def folder(config: Synthetic, cache: Path) -> Path:
    """Return where the strips of a configuration lie in a cache folder."""
    return _synthetic.folder("severstal", VERSION, config, cache)


def ensure(config: Synthetic, cache: Path) -> Path:
    """Return the folder with the strips, made first if it is not there; raises like `_synthetic.ensure`."""
    return _synthetic.ensure(folder(config, cache), lambda root: write(config, root))


def write(config: Synthetic, root: Path) -> None:
    """Write train.csv and train_images/, or supervisely/ with meta.json, img/ and ann/, or both."""
    kaggle, supervisely = config.form in ("kaggle", "both"), config.form in ("supervisely", "both")
    rows: list[tuple[str, int, str]] = []
    for number in range(config.samples):
        # A duplicate of an odd number is compressed anew.
        shown = origin(config, number)
        made, name = strip(config, shown), name_of(number)
        quality = OTHER_QUALITY if shown != number and shown % 2 else QUALITY
        if kaggle:
            _save(made.image, root / PICTURES / name, quality)
            rows += [(name, index + 1, encode_runs(one)) for index, one in enumerate(made.mask) if one.any()]
        if supervisely:
            _save(made.image, root / "supervisely" / "img" / name, quality)
            _write_json(annotation(made.mask), root / "supervisely" / "ann" / f"{name}.json")
    if kaggle:
        with (root / TABLE).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    if supervisely:
        _write_json(_meta(), root / "supervisely" / "meta.json")


def name_of(number: int) -> str:
    """Return a strip's file name."""
    return f"strip_{number:05d}.jpg"


def origin(config: Synthetic, number: int) -> int:
    """Return the number of the strip that this one shows: its own, or that which it is a duplicate of."""
    first = config.samples - config.duplicates
    return number - first if number >= first else number


def is_clean(config: Synthetic, number: int) -> bool:
    """Say whether a strip has no defect; the clean ones are spread evenly over the numbers."""
    return int((number + 1) * config.clean) > int(number * config.clean)


def strip(config: Synthetic, number: int) -> Strip:
    """Return one strip, which depends only on the seed and its own number: defects of one class, or of two.

    The classes go round with the number, so that a dozen strips hold each.
    """
    rng = np.random.default_rng([config.seed, number])
    height, width = config.height, config.width
    steel, plate = _steel(rng, height, width, gap=number % 5 == 4)
    mask = np.zeros((len(TITLES), height, width), np.uint8)
    if is_clean(config, number):
        return Strip(_grey(steel * plate), mask)
    turn = number - int(number * config.clean)  # how many strips with defects come before
    classes = {turn % 4} if turn % 3 else {turn % 4, (turn + 1) % 4}
    taken = plate < 1
    for index in sorted(classes):
        for _ in range(_COUNTS[index]):
            change, shape = _DEFECTS[index](rng, height)
            place, own = _place(rng, shape, plate)
            free = ~taken[place]
            steel[place] += change[own] * free * config.contrast
            found = (shape[own] > 0.5) & free
            mask[index][place] |= found
            taken[place] |= found
    return Strip(_grey(steel * plate), mask)


def _steel(rng: np.random.Generator, height: int, width: int, *, gap: bool) -> tuple[Plane, Plane]:
    """Return clean steel in grey values, and where it is: 1 on the plate, 0 in the gap beside it."""
    scale = height / 256
    streaks = _smooth(rng, (height, width), 0.8 * scale, 60 * scale) * rng.uniform(4, 9)
    grain = _smooth(rng, (height, width), 1.2 * scale, 1.5 * scale) * rng.uniform(3, 6)
    clouds = _smooth(rng, (height, width), 25 * scale, 60 * scale) * rng.uniform(4, 10)
    rows, columns = np.mgrid[:height, :width]
    glow = rng.uniform(0, 25) * np.cos(np.pi * (rows / height - rng.uniform(0.3, 0.7)))
    slope = rng.uniform(-20, 20) * (columns / width - 0.5)
    plate = np.ones((height, width))
    if gap:
        edge = width * rng.uniform(0.05, 0.3) + _smooth(rng, (height, 1), 12 * scale, 1) * 6 * scale
        beside = columns < edge if rng.uniform() < 0.5 else columns >= width - edge
        plate[beside] = 0.05
    return rng.uniform(85, 135) + glow + slope + clouds + streaks + grain, plate


def _pits(rng: np.random.Generator, height: int) -> Drawn:
    """Return a cluster of small dark spots."""
    rows, columns = _window(height, 0.5, 0.7)
    shape = np.zeros_like(rows)
    for _ in range(int(rng.integers(6, 16))):
        down, right = rng.normal(0, 0.1, 2) * height
        half = height * rng.uniform(0.012, 0.035, 2)
        shape = np.maximum(shape, _bump(np.hypot((rows - down) / half[0], (columns - 1.6 * right) / half[1])))
    return -rng.uniform(22, 50) * shape * _uneven(rng, height, shape), shape


def _crack(rng: np.random.Generator, height: int) -> Drawn:
    """Return a thin wavering line across the strip, dark beside a bright rim."""
    rows, columns = _window(height, 0.3, 0.15)
    length, thick = height * rng.uniform(0.2, 0.45), max(1.0, height * rng.uniform(0.008, 0.016))
    waver = _smooth(rng, (len(rows), 1), 0.05 * height, 1) * 0.02 * height
    right = columns - waver - rows * rng.uniform(-0.2, 0.2)
    beyond = np.maximum(np.abs(rows) - length / 2, 0)
    shape, rim = (_bump(np.hypot(right - step * thick, beyond) / thick) for step in (0, 2))
    return -rng.uniform(28, 55) * shape * _uneven(rng, height, shape) + rng.uniform(5, 15) * rim, shape


def _scratch(rng: np.random.Generator, height: int) -> Drawn:
    """Return a long streak along the strip, darker or brighter than the steel."""
    rows, columns = _window(height, 0.3, 1.5)
    half_height, half_width = height * rng.uniform(0.015, 0.04), height * rng.uniform(0.35, 1.1)
    across, along = _turned(rows, columns, rng.uniform(-0.12, 0.12))
    shape = _bump(np.hypot(across / half_height, along / half_width))
    sign = 1 if rng.uniform() < 0.5 else -1
    return sign * rng.uniform(20, 45) * shape * _uneven(rng, height, shape), shape


def _patch(rng: np.random.Generator, height: int) -> Drawn:
    """Return a large ragged patch of rough steel, which differs in its texture more than in its brightness."""
    rows, columns = _window(height, 0.7, 0.8)
    across, along = _turned(rows, columns, rng.uniform(-0.6, 0.6))
    half_height, half_width = height * rng.uniform(0.14, 0.3, 2) * np.array([1.0, 1.4])
    ragged = np.clip(1 + 0.25 * _smooth(rng, rows.shape, 0.03 * height, 0.03 * height), 0.5, 1.5)
    shape = _bump(np.hypot(across / half_height, along / half_width) * ragged)
    rough = _smooth(rng, rows.shape, 0.015 * height, 0.008 * height) * rng.uniform(16, 28)
    return shape * (rough + rng.uniform(-14, 14)), shape


_DEFECTS: tuple[Callable[[np.random.Generator, int], Drawn], ...] = (_pits, _crack, _scratch, _patch)
# How many of each a strip gets, so that no class is drowned by the large patches.
_COUNTS = (3, 4, 3, 1)


def _place(rng: np.random.Generator, drawn: Plane, plate: Plane) -> tuple[Slices, Slices]:
    """Return where on the plate a defect comes, and which part of its window lies on the strip."""
    height, width = plate.shape
    on_plate = np.flatnonzero(plate.min(axis=0) == 1)
    columns = on_plate[(on_plate > 0.06 * width) & (on_plate < 0.94 * width)]
    middles = int(height * rng.uniform(0.15, 0.85)), int(rng.choice(columns))
    spans = []
    for middle, length, limit in zip(middles, drawn.shape, plate.shape, strict=True):
        first = middle - length // 2
        low, high = max(first, 0), min(first + length, limit)
        spans.append((slice(low, high), slice(low - first, high - first)))
    (rows, own_rows), (across, own_across) = spans
    return (rows, across), (own_rows, own_across)


def _window(height: int, down: float, right: float) -> tuple[Plane, Plane]:
    """Return how far each pixel of a window is from its middle; it reaches so many strip's heights each way."""
    reach_down, reach_right = int(down * height), int(right * height)
    rows, columns = np.mgrid[-reach_down : reach_down + 1, -reach_right : reach_right + 1]
    return rows.astype(float), columns.astype(float)


def _turned(rows: Plane, columns: Plane, angle: float) -> tuple[Plane, Plane]:
    return rows * np.cos(angle) - columns * np.sin(angle), columns * np.cos(angle) + rows * np.sin(angle)


def _bump(distance: Plane) -> Plane:
    """Return 1 in the middle and 0.5 at a distance of 1."""
    return np.asarray(1 / (1 + np.minimum(distance, 30) ** 6))


def _uneven(rng: np.random.Generator, height: int, shape: Plane) -> Plane:
    """Return factors about 1, so that no defect has one grey value."""
    return np.asarray(np.clip(1 + 0.35 * _smooth(rng, shape.shape, 0.02 * height, 0.04 * height), 0.2, 2))


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], down: float, right: float) -> Plane:
    """Return noise of standard deviation 1 that is alike over so many pixels down and right."""
    from PIL import Image

    # Drawn on a coarser grid, as far as the filter leaves nothing that this grid could not show.
    steps = [max(1, int(reach / 2)) for reach in (down, right)]
    coarse = [-(-length // step) for length, step in zip(shape, steps, strict=True)]
    reaches = [reach / step for reach, step in zip((down, right), steps, strict=True)]
    noise = ndimage.gaussian_filter(rng.normal(size=coarse), reaches, mode="wrap")
    if coarse != [*shape]:
        small = Image.fromarray(noise.astype(np.float32))
        noise = np.asarray(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC), float)
    return np.asarray(noise / max(float(noise.std()), 1e-9))


def _grey(steel: Plane) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(steel), 0, 255).astype(np.uint8)


def _meta() -> dict[str, object]:
    classes = [
        {"title": title, "shape": "bitmap", "color": colour, "geometry_config": {}, "id": number + 1, "hotkey": ""}
        for number, (title, colour) in enumerate(zip(TITLES, COLOURS, strict=True))
    ]
    return {"classes": classes, "tags": [], "projectType": "images"}


def _write_json(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _save(grey: npt.NDArray[np.uint8], path: Path, quality: int) -> None:
    """Write a strip as JPEG in colour, as Severstal's are, though they are grey."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).convert("RGB").save(path, quality=quality)
