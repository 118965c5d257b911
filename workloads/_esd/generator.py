"""Synthetic satellite tiles in the contest's files, with every satellite, for whoever has no data of their own.

Each tile has settlements, some of them lit at night, and lit land without houses, in blobs over 16 x 16 cells. Houses
are bright to radar, grey to optical bands and warm; lamps are seen by VIIRS alone, a value a cell. Dates differ in
light, clouds hide part of the optical ones, and radar speckles and is 0 along one side of some tiles. Files are
compressed without loss (deflate), as GDAL is often told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from workloads import _synthetic
from workloads._esd.reader import RAW
from workloads._esd.satellites import CELLS, GROUND_TRUTH, LANDSAT, SATELLITES, SENTINEL1, SENTINEL2, VIIRS

Plane = npt.NDArray[np.float64]

VERSION = 1
"""Raise when the tiles change, so that folders made before are not mistaken for them."""
FIRST_DAY = date(2020, 7, 30)
SETTLED, LIT_SETTLED, LIT_WILD = (0.15, 0.45), (0.4, 0.7), (0.1, 0.3)
"""Between what and what: the share of cells that are settled; of settled and of other cells, that which is lit."""
VEGETATION = {"01": 4, "02": 5, "03": 8, "04": 6, "05": 12, "06": 24, "07": 28, "08": 30, "8A": 32, "09": 31, "11": 18}
HOUSES = {"01": 12, "02": 14, "03": 16, "04": 19, "05": 21, "06": 22, "07": 23, "08": 24, "8A": 24, "09": 24, "11": 29}
"""Reflectance in percent, of Sentinel-2's bands."""
SAME_LIGHT = {"1": "01", "2": "02", "3": "03", "4": "04", "5": "8A", "6": "11", "7": "12", "8": "03", "9": "09"}
"""The band of Sentinel-2 that sees what a band of Landsat does; 10 and 11 see warmth."""
WARM = ("10", "11")


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What the generated tiles are like; used only where `data.root` is not given."""

    tiles: int = 12
    """Tiles to make."""
    pixels: int = 50
    """Pixels along a cell's side; 50 is the contest's."""
    contrast: float = 1.0
    """How much houses and lamps stand out: half of it is hard to see."""
    clouds: float = 0.08
    """Share of each optical picture that clouds hide."""
    seed: int = 0
    """Seed of the tiles."""

    def __post_init__(self) -> None:
        for name, least in (("tiles", 3), ("pixels", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least {least}")
        if self.contrast <= 0:
            raise ValueError(f"contrast: got {self.contrast}; expected more than 0")
        if not 0 <= self.clouds < 1:
            raise ValueError(f"clouds: got {self.clouds}; expected 0 or more, and less than 1")


@dataclass(frozen=True)
class Land:
    """What a tile shows, before any satellite looks."""

    labels: npt.NDArray[np.uint8]
    """(16, 16) of 1 to 4."""
    lamps: Plane
    """(16, 16), light at night."""
    houses: Plane
    """(H, W), 0 to 1."""
    growth: Plane
    """(H, W), how green it is, about 1."""


def ensure(config: Synthetic, cache: Path) -> Path:
    """Return the folder with the tiles, made first if it is not there; raises like `_synthetic.ensure`."""
    folder = _synthetic.folder("esd", VERSION, config, cache)
    return _synthetic.ensure(folder, lambda root: write(config, root))


def write(config: Synthetic, root: Path) -> None:
    """Write Train/Tile1, Train/Tile2 and so on."""
    for number in range(1, config.tiles + 1):
        write_tile(config, number, root / RAW / f"Tile{number}")


def write_tile(config: Synthetic, number: int, folder: Path) -> None:
    """Write the files of one tile."""
    import tifffile

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng((config.seed, number))
    land = make_land(config, random)
    for name, values in pictures(config, land, random):
        stored = values.round().clip(0, 2**16 - 1).astype(np.uint16)
        tifffile.imwrite(folder / name, stored, compression="deflate", predictor=True)
    tifffile.imwrite(folder / GROUND_TRUTH, land.labels)


def make_land(config: Synthetic, random: np.random.Generator) -> Land:
    """Return what one tile shows; all four classes are in it."""
    settled = _highest(_blobs(random, CELLS, 2.0), random.uniform(*SETTLED))
    light = _blobs(random, CELLS, 2.0)
    lit = np.zeros_like(settled)
    for where, shares in ((settled, LIT_SETTLED), (~settled, LIT_WILD)):
        lit[where] = _highest(light[where], random.uniform(*shares))
    labels = np.where(settled, np.where(lit, 3, 1), np.where(lit, 4, 2)).astype(np.uint8)
    side = CELLS * config.pixels
    density = ndimage.zoom(settled * random.uniform(0.2, 0.5, settled.shape), config.pixels, order=0)
    plots = _blobs(random, side, max(config.pixels / 25, 0.6))
    houses = np.clip(4 * (density - _rank(plots)), 0, 1) * config.contrast
    growth = 1 + 0.15 * _blobs(random, side, config.pixels / 3) + 0.05 * random.standard_normal((side, side))
    lamps = lit * np.where(settled, 1.0, 0.6) * random.uniform(0.6, 1.4, lit.shape) * config.contrast
    return Land(labels, lamps, houses, growth)


def pictures(config: Synthetic, land: Land, random: np.random.Generator) -> Iterator[tuple[str, Plane]]:
    """Yield the name and the values (H, W) of each file, satellite by satellite."""
    side = CELLS * config.pixels
    for satellite in SATELLITES:
        for number in range(satellite.dates):
            day = FIRST_DAY + timedelta(days=8 * number)
            sun = random.uniform(0.85, 1.15)
            cloud = _highest(_blobs(random, side, config.pixels), config.clouds)
            for band in satellite.bands:
                if satellite is VIIRS:
                    values = _night(config, land, random, sun)
                elif satellite is SENTINEL1:
                    values = _radar(land, random, band, cut=number == 0)
                elif satellite is SENTINEL2:
                    values = np.where(cloud, 9000, 100 * _reflectance(land, band) * sun) + 40 * _grain(land, random)
                elif band in WARM:
                    warmth = 27000 + 900 * land.houses - 600 * (land.growth - 1)
                    values = np.where(cloud, 21000, warmth * sun) + 60 * _grain(land, random)
                else:
                    seen = ndimage.uniform_filter(_reflectance(land, SAME_LIGHT[band]), 3)  # pixels of 30 m
                    values = np.where(cloud, 45000, 6000 + 280 * seen * sun) + 120 * _grain(land, random)
                yield satellite.file(_written(satellite.name, day), band), values


def _night(config: Synthetic, land: Land, random: np.random.Generator, moon: float) -> Plane:
    """Return VIIRS' light, one value a cell; lamps glow into the cells beside them."""
    glow = ndimage.gaussian_filter(land.lamps, 0.5) + 0.05 * moon
    cells = 900 * glow * random.lognormal(0, 0.15, glow.shape)
    return np.kron(cells, np.ones((config.pixels, config.pixels)))


def _radar(land: Land, random: np.random.Generator, band: str, *, cut: bool) -> Plane:
    strength = (60 if band == "VH" else 130) * (land.growth + 3 * land.houses)
    values = strength * random.gamma(4, 0.25, land.houses.shape)  # speckle of four looks
    if cut and random.random() < 0.5:
        values[:, : max(1, values.shape[1] // 200)] = 0
    return np.asarray(values)


def _reflectance(land: Land, band: str) -> Plane:
    green, grey = VEGETATION.get(band, 12) * land.growth, HOUSES.get(band, 27)
    return np.asarray(green + (grey - green) * land.houses)


def _grain(land: Land, random: np.random.Generator) -> Plane:
    return random.standard_normal(land.houses.shape)


def _written(name: str, day: date) -> str:
    """Return a date as a satellite's files write it."""
    return day.strftime({VIIRS.name: "A%Y%j", LANDSAT.name: "%Y-%m-%d"}.get(name, "%Y%m%d"))


def _blobs(random: np.random.Generator, side: int, width: float) -> Plane:
    """Return smooth noise (side, side) of zero mean and unit deviation."""
    # What is smooth needs no more points than it has bumps.
    step = max(1, int(width / 4))
    points = -(-side // step)
    rough = ndimage.gaussian_filter(random.standard_normal((points, points)), width / step, mode="wrap")
    found = rough if step == 1 else ndimage.zoom(rough, side / points, order=1)
    return np.asarray((found - found.mean()) / found.std())


def _highest(values: Plane, share: float) -> npt.NDArray[np.bool_]:
    """Return which values belong to the highest share of them; neither all nor none of several."""
    count = min(max(round(share * values.size), int(share > 0)), values.size - 1)
    found = np.zeros(values.size, bool)
    found[np.argsort(values, axis=None)[values.size - count :]] = True
    return found.reshape(values.shape)


def _rank(values: Plane) -> Plane:
    """Return what share of the values is lower than each."""
    ranks = np.empty(values.size)
    ranks[np.argsort(values, axis=None)] = np.linspace(0, 1, values.size)
    return ranks.reshape(values.shape)
