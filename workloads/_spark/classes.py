"""What the pixels of a SPARK 2024 mask mean: the one place where classes and their colours stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from segmentation.figures import Colour, class_map

BACKGROUND, BODY, PANELS = range(3)
CLASSES = ("background", "body", "panels")
COLOURS: tuple[Colour, ...] = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
SATELLITES = (
    "Cheops",
    "LisaPathfinder",
    "ObservationSat1",
    "Proba2",
    "Proba3",
    "Proba3ocs",
    "Smart1",
    "Soho",
    "VenusExpress",
    "XMM Newton",
)
"""Those of SPARK 2024, for generated data; a reader takes whatever the CSV names."""

FAR = 100
"""Distance in RGB beyond which a pixel is of no class's colour."""


def nearest_class(colours: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], float]:
    """Return (H, W) class ids of colours (H, W, 3), and the share of pixels that are of no class's colour.

    JPEG mixes the colours along an edge, over two pixels; so a pixel counts as stray only if its eight neighbours are
    farther than FAR from every colour too. Of two colours equally near, the first counts.
    """
    planes = [plane.astype(np.int32) for plane in np.moveaxis(colours, -1, 0)]
    found = np.zeros(colours.shape[:2], np.uint8)
    least = _squared_distance(planes, COLOURS[0])
    for number, colour in enumerate(COLOURS[1:], start=1):
        distance = _squared_distance(planes, colour)
        found[distance < least] = number
        np.minimum(least, distance, out=least)
    return found, float(_inner(least > FAR**2).mean())


def paint(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return (H, W, 3) of class ids in their colours."""
    return class_map(mask, COLOURS)


def _squared_distance(planes: Sequence[npt.NDArray[np.int32]], colour: Colour) -> npt.NDArray[np.int32]:
    red, green, blue = ((plane - value) ** 2 for plane, value in zip(planes, colour, strict=True))
    return red + green + blue


def _inner(where: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels all of whose neighbours are marked too; those beyond the border count as marked."""
    padded = np.pad(where, 1, constant_values=True)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return np.asarray(rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:])
