"""Synthetic spacecraft in SPARK's layout on disk, for whoever has no data of their own.

A picture is a body with two panels, seen from some side and lit from another, before stars and, in every third, the
Earth's limb. Each satellite has proportions and colours of its own. Masks are JPEG files, as SPARK's are.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import _synthetic
from workloads._spark.classes import BODY, PANELS, SATELLITES, paint
from workloads._spark.reader import COLUMNS, Part

Plane = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

TEST_FOLDER = "test"
VERSION = 1
"""Raise when the pictures change, so that folders made before are not mistaken for them."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What the generated pictures are like; used only where `data.root` is not given."""

    samples: int = 120
    """Pictures with masks; every fourth is in val.csv, the others in train.csv. The satellites take turns."""
    test_images: int = 10
    """Pictures without masks, in the folder `test`."""
    size: int = 128
    """Height and width in pixels."""
    mask_quality: int = 75
    """JPEG quality of the masks."""
    seed: int = 0
    """Seed of the pictures."""

    def __post_init__(self) -> None:
        for name, smallest in (("samples", 8), ("test_images", 0), ("size", 32)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least {smallest}")
        if not 1 <= self.mask_quality <= 95:
            raise ValueError(f"mask_quality: got {self.mask_quality}; expected 1 to 95")


@dataclass(frozen=True)
class Picture:
    """One generated picture."""

    satellite: str
    image: Pixels
    """(H, W, 3)"""
    mask: Pixels
    """(H, W) class ids, before JPEG"""


def folder(config: Synthetic, cache: Path) -> Path:
    """Return where the pictures of a configuration lie in a cache folder."""
    return _synthetic.folder("spark", VERSION, config, cache)


def ensure(config: Synthetic, cache: Path) -> Path:
    """Return the folder with the pictures, made first if it is not there; raises like `_synthetic.ensure`."""
    return _synthetic.ensure(folder(config, cache), lambda root: write(config, root))


def write(config: Synthetic, root: Path) -> None:
    """Write train.csv, val.csv, images/, mask/ and the test folder."""
    rows: dict[Part, list[tuple[str, str, str]]] = {"train": [], "val": []}
    for number in range(config.samples):
        made = picture(config, number)
        part = part_of(number)
        names = f"img_{number:05d}_img.jpg", f"img_{number:05d}_layer.jpg"
        _save(made.image, root / "images" / made.satellite / part / names[0], quality=95)
        _save(paint(made.mask), root / "mask" / made.satellite / part / names[1], quality=config.mask_quality)
        rows[part].append((made.satellite, *names))
    (root / TEST_FOLDER).mkdir(parents=True, exist_ok=True)
    for number in range(config.test_images):
        made = picture(config, config.samples + number)
        _save(made.image, root / TEST_FOLDER / f"test_{number:05d}_img.jpg", quality=95)
    for part, listed in rows.items():
        with (root / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *listed])


def part_of(number: int) -> Part:
    """Return which CSV a picture stands in; the turn moves on, so that every satellite comes into both."""
    return "val" if (number + number // len(SATELLITES)) % 4 == 0 else "train"


def picture(config: Synthetic, number: int) -> Picture:
    """Return one picture; it depends only on the seed and its own number."""
    rng = np.random.default_rng([config.seed, number])
    which = number % len(SATELLITES)
    across, along = _turned(rng, config.size)
    body, panels = _shape(which, across, along)
    light = _light(rng, across, along)
    # The look of a satellite is the same whatever the seed.
    metal, glass = _look(which)
    image = _sky(rng, config.size, limb=number % 3 == 0)
    image[panels] = (light * _cells(across, along))[panels][:, None] * glass
    image[body] = light[body][:, None] * metal
    image += rng.normal(0, 3, image.shape)
    mask = np.zeros((config.size, config.size), np.uint8)
    mask[panels], mask[body] = PANELS, BODY
    return Picture(SATELLITES[which], np.clip(np.rint(image), 0, 255).astype(np.uint8), mask)


def _turned(rng: np.random.Generator, size: int) -> tuple[Plane, Plane]:
    """Return the coordinates of each pixel in the spacecraft's own plane: 1 is about the end of its panels."""
    rows, columns = (plane.astype(float) for plane in np.mgrid[:size, :size])
    reach = size * rng.uniform(0.32, 0.46)
    row, column = size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    angle, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1)
    right, down = (columns - column) / reach, (rows - row) / reach
    across = right * np.cos(angle) + down * np.sin(angle)
    along = (down * np.cos(angle) - right * np.sin(angle)) / tilt
    return across, along


def _shape(which: int, across: Plane, along: Plane) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return where body and panels are: a polygon of 4 to 8 corners, and two rectangles at its sides."""
    corners, width, height = 4 + which % 5, 0.24 + 0.02 * (which % 4), 0.26 + 0.03 * (which % 3)
    turns = 2 * np.pi * (np.arange(corners) + 0.5 * (which % 2)) / corners
    sides = [across / width * np.cos(turn) + along / height * np.sin(turn) for turn in turns]
    body = np.max(sides, axis=0) < 1
    depth, gap = 0.16 + 0.02 * (which % 6), 0.05
    panels = (np.abs(along) < depth) & (np.abs(across) > width + gap) & (np.abs(across) < 1)
    return body, panels & ~body


def _look(which: int) -> tuple[Plane, Plane]:
    """Return the colours (3,) of body and panels."""
    rng = np.random.default_rng([which, 2024])
    gold, grey = np.array([235.0, 190, 110]), np.array([205.0, 205, 215])
    mix = rng.uniform()
    return mix * gold + (1 - mix) * grey, np.array([60.0, 75, 130]) + rng.uniform(-15, 35, 3)


def _light(rng: np.random.Generator, across: Plane, along: Plane) -> Plane:
    """Return how bright each pixel of the spacecraft is: the sun stands to one side."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(np.clip(0.75 + 0.35 * (across * np.cos(angle) + along * np.sin(angle)), 0.3, 1.1))


def _cells(across: Plane, along: Plane) -> Plane:
    """Return the pattern of solar cells: dark lines between them."""
    return np.where((np.abs(across) * 9 % 1 < 0.15) | ((along + 2) * 9 % 1 < 0.15), 0.6, 1.0)


def _sky(rng: np.random.Generator, size: int, *, limb: bool) -> Plane:
    """Return (size, size, 3) of stars, and the Earth with its blue rim where asked for."""
    sky = np.full((size, size, 3), 6.0)
    stars = rng.integers(0, size, (size * size // 400, 2))
    sky[stars[:, 0], stars[:, 1]] = rng.uniform(40, 250, (len(stars), 1))
    if limb:
        rows, columns = np.mgrid[:size, :size] / size
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 1.5)
        away = radius + rng.uniform(0.2, 0.45)
        height = np.hypot(rows - 0.5 - away * np.sin(angle), columns - 0.5 - away * np.cos(angle)) - radius
        clouds = 0.85 + 0.15 * np.sin(25 * rows + 9 * np.sin(17 * columns))
        sky = np.where((height < 0)[..., None], clouds[..., None] * np.array([70.0, 105, 150]), sky)
        sky += (np.exp(-np.maximum(height, 0) / 0.03) * (height >= 0))[..., None] * np.array([60.0, 110, 180])
    return np.asarray(sky)


def _save(pixels: Pixels, path: Path, quality: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=quality)
