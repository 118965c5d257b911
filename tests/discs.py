"""Bright discs on noise and their masks: a set that a tiny network learns in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write(root: Path, count: int = 12, size: int = 32) -> Path:
    """Write images/ and masks/ as the workload pairs reads them; return the folder."""
    drawn = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for number in range(count):
        y, x = drawn.uniform(size / 4, 3 * size / 4, 2)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < (size / 5) ** 2
        image = 60 + 120 * mask + drawn.normal(0, 15, mask.shape)
        for folder, picture in (("images", image), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / folder / f"{number:02d}.png")
    return root
