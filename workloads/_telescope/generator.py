"""Synthetic telescope pictures in the original's layout on disk, for whoever has no data of their own.

A picture is the maximum over a slice of time of what the detectors of a round focal plane saw:

* a cosmic ray heats one spot for an instant, so it stays a round blob where it struck;
* a point source crosses the focal plane with the scan, so it becomes a horizontal stripe one beam wide;
* an electronic glitch hits detectors that share a readout line, so it is a vertical line with hard edges.

Around them lie detector noise and the slow gradient of the atmosphere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workloads import _synthetic

Array = np.ndarray[Any, Any]

FOLDERS = ("cosmic_ray", "point_source", "electronic_glitch")
VERSION = 1
"""Raise when the pictures change, so that folders made before are not mistaken for them."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What the generated pictures are like; used only where `data.root` is not given."""

    samples: int = 320
    """Pictures to make; each falls into every class folder whose events it shows."""
    size: int = 32
    """Height and width in pixels."""
    noise: float = 4.0
    """Standard deviation of the detector noise, in grey values of 255."""
    seed: int = 0
    """Seed of the pictures."""

    def __post_init__(self) -> None:
        for name, smallest in (("samples", 12), ("size", 16)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least {smallest}")
        if self.noise < 0:
            raise ValueError(f"noise: got {self.noise}; expected 0 or more")


@dataclass(frozen=True)
class Picture:
    """One generated picture."""

    name: str
    image: Array
    """(H, W) uint8"""
    mask: Array
    """(3, H, W) bool: cosmic ray, point source, electronic glitch"""


def folder(config: Synthetic, cache: Path) -> Path:
    """Return where the pictures of a configuration lie in a cache folder."""
    return _synthetic.folder("telescope", VERSION, config, cache)


def ensure(config: Synthetic, cache: Path) -> Path:
    """Return the folder with the pictures, made first if it is not there; raises like `_synthetic.ensure`."""
    return _synthetic.ensure(folder(config, cache), lambda root: write(config, root))


def write(config: Synthetic, root: Path) -> None:
    """Write `images/` and `masks/` with a folder for every class.

    A picture with events of two classes lies in both folders. A class that a picture does not show has an empty mask
    for some pictures and none for others, as in the original.
    """
    for kind in ("images", "masks"):
        for name in (*FOLDERS, "none"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(config)):
        shown = [name for name, channel in zip(FOLDERS, picture.mask, strict=True) if channel.any()]
        for name in shown or ["none"]:
            _save(picture.image, root / "images" / name / picture.name)
        for name, channel in zip(FOLDERS, picture.mask, strict=True):
            if name in shown or number % 3 == 0:
                _save(channel.astype(np.uint8) * 255, root / "masks" / name / picture.name)


def pictures(config: Synthetic) -> list[Picture]:
    """Return all pictures; each depends only on the seed and its own number."""
    return [picture(config, number) for number in range(config.samples)]


def picture(config: Synthetic, number: int) -> Picture:
    """Return one picture: at the most two classes of events, every fifth has none.

    The classes go round with the number, so that a few dozen pictures hold enough of each.
    """
    rng = np.random.default_rng([config.seed, number])
    classes = ((0,), (1,), (2,), (0, 1), ()) if number % 10 < 5 else ((0, 2), (1, 2), (1,), (0,), ())
    plane = disc(config.size)
    signal, mask = np.zeros_like(plane), np.zeros((3, *plane.shape), bool)
    for channel in classes[number % 5]:
        for _ in range(int(rng.integers(1, 4))):
            event = (_blob, _stripe, _line)[channel](rng, config.size) * plane
            signal = np.maximum(signal, event)
            mask[channel] |= event > max(3 * config.noise, 0.3 * event.max())
    grey = np.clip(np.rint((signal + _sky(rng, config)) * plane), 0, 255).astype(np.uint8)
    return Picture(name(number), grey, mask)


def name(number: int) -> str:
    """Return a file name like the original's: eight slices of one observation follow each other."""
    observation, part = divmod(number, 8)
    begin = 1567419530 + 1130 * observation
    band = ("f090", "f150", "f220")[observation % 3]
    start = 400 + 640 * part
    return f"TOD_{begin}.{begin + 8871}.ar{4 + observation % 3}:{band}_converted_{start}-{start + 513}.png"


def disc(size: int) -> Array:
    """Return (size, size) ones where the focal plane has detectors, else zeros."""
    rows, columns = _grid(size)
    centre = (size - 1) / 2
    return np.asarray((rows - centre) ** 2 + (columns - centre) ** 2 <= (0.44 * size) ** 2, float)


def _blob(rng: np.random.Generator, size: int) -> Array:
    """Return a spot heated by a cosmic ray, (size, size), in grey values."""
    rows, columns = _grid(size)
    row, column = _inside(rng, size)
    width = size / 32 * rng.uniform(0.7, 2.2)
    return np.asarray(_amplitude(rng) * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * width**2)))


def _stripe(rng: np.random.Generator, size: int) -> Array:
    """Return the trace of a point source that crosses part of the focal plane along the scan."""
    rows, columns = _grid(size)
    row, middle = _inside(rng, size)
    half, beam = size * rng.uniform(0.12, 0.35), size / 32 * rng.uniform(0.8, 1.2)
    beyond = np.maximum(np.abs(columns - middle) - half, 0)
    return np.asarray(_amplitude(rng) * np.exp(-((rows - row) ** 2 + beyond**2) / (2 * beam**2)))


def _line(rng: np.random.Generator, size: int) -> Array:
    """Return detectors on one readout line that jumped together."""
    line = np.zeros((size, size))
    row, column = _inside(rng, size)
    half = size * rng.uniform(0.15, 0.4)
    first, last = max(0, int(row - half)), min(size, int(row + half) + 1)
    line[first:last, int(column)] = _amplitude(rng) * rng.uniform(0.8, 1.0, last - first)
    return line


def _sky(rng: np.random.Generator, config: Synthetic) -> Array:
    rows, columns = _grid(config.size)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 8)
    gradient = slope * ((rows * np.sin(angle) + columns * np.cos(angle)) / config.size + 1)
    return np.asarray(gradient + np.abs(rng.normal(0, config.noise, rows.shape)))


def _amplitude(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(25), np.log(240))))


def _inside(rng: np.random.Generator, size: int) -> tuple[float, float]:
    radius, angle = 0.4 * size * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    return (size - 1) / 2 + radius * np.sin(angle), (size - 1) / 2 + radius * np.cos(angle)


def _grid(size: int) -> tuple[Array, Array]:
    rows, columns = np.mgrid[:size, :size]
    return rows.astype(float), columns.astype(float)


def _save(pixels: Array, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)
