"""Which satellites looked at a tile, in which bands, and what their files are called.

Names are those of the Data Fusion Contest's files and of the ESD project, which reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Name = Literal["viirs", "sentinel1", "sentinel2", "landsat", "viirs_maxproj"]


@dataclass(frozen=True)
class Satellite:
    """One source of bands in a tile's folder: a file for each date and band."""

    name: str
    bands: tuple[str, ...]
    """In the order in which they are stacked, that of text: 11 comes before 2."""
    pattern: str
    """What its files' names match; the groups are date and band, where it has several."""
    template: str
    """How a file is called, from `date` and `band`."""
    dates: int
    """How many a tile of the contest has."""

    def parse(self, file: str) -> tuple[str, str] | None:
        """Return the (date, band) of a file's name; None if it is not this satellite's."""
        if not (match := re.fullmatch(self.pattern, file)):
            return None
        return match["date"], match.groupdict().get("band", self.bands[0])

    def file(self, date: str, band: str) -> str:
        """Return the name of the file of a date and band."""
        return self.template.format(date=date, band=band)


VIIRS = Satellite("viirs", ("0",), r"DNB_VNP46A1_(?P<date>A\d{7})\.tif", "DNB_VNP46A1_{date}.tif", 9)
SENTINEL1 = Satellite(
    "sentinel1",
    ("VH", "VV"),
    r"S1A_IW_GRDH_(?P<date>\d{8})_(?P<band>\w+)\.tif",
    "S1A_IW_GRDH_{date}_{band}.tif",
    4,
)
SENTINEL2 = Satellite(
    "sentinel2",
    ("01", "02", "03", "04", "05", "06", "07", "08", "09", "11", "12", "8A"),
    r"L2A_(?P<date>\d{8})_B(?P<band>\w+)\.tif",
    "L2A_{date}_B{band}.tif",
    4,
)
LANDSAT = Satellite(
    "landsat",
    ("1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"),
    r"LC08_L1TP_(?P<date>\d{4}-\d\d-\d\d)_B(?P<band>\w+)\.tif",
    "LC08_L1TP_{date}_B{band}.tif",
    3,
)
SATELLITES = (VIIRS, SENTINEL1, SENTINEL2, LANDSAT)
MAXPROJ = "viirs_maxproj"
"""The largest value over all dates of VIIRS, a source of its own."""
BANDS: Mapping[str, tuple[str, ...]] = {
    **{satellite.name: satellite.bands for satellite in SATELLITES},
    MAXPROJ: VIIRS.bands,
}
"""The bands of each source, in the order in which sources are stacked into channels."""
GROUND_TRUTH, GT = "groundTruth.tif", "gt"
"""The file of the labels, and what they are called among arrays."""
CELLS = 16
"""Cells of the ground truth along a tile's side, of 500 m each."""
VISIBLE = ("sentinel2", ("04", "03", "02"))
"""Red, green and blue."""

TITLES = (
    "settlement without electricity",
    "no settlement without electricity",
    "settlement with electricity",
    "no settlement with electricity",
)
"""Of each class; class 0 is what the contest asks for. A file holds 1 to 4."""
CLASSES = tuple(title.replace(" ", "_") for title in TITLES)
"""The same as parts of metrics' names."""
COLOURS = ("#ff0000", "#0000ff", "#ffff00", "#b266ff")


@dataclass(frozen=True)
class Channel:
    """One channel of the network's input."""

    source: str
    band: str
    date: int
    """Which of the source's dates, from 0."""


def channels(dates: Mapping[str, int], selected: Mapping[str, Sequence[str]]) -> tuple[Channel, ...]:
    """Return the channels in their order: source by source, date by date, band by band as they are stacked.

    dates: how many each source has.
    selected: bands of each source; sources that are not in it are left out. Empty: all bands of all sources.
    """
    wanted = {name: set(selected.get(name, ())) for name in BANDS} if selected else BANDS
    return tuple(
        Channel(name, band, date)
        for name, bands in BANDS.items()
        for date in range(dates[name])
        for band in bands
        if band in wanted[name]
    )


def check_selected(selected: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a source or band that there is none of, or one that is named twice."""
    for name, bands in selected.items():
        if name not in BANDS:
            raise ValueError(f"selected_bands: no satellite {name!r}; here are {', '.join(BANDS)}")
        if unknown := [band for band in bands if band not in BANDS[name]]:
            raise ValueError(
                f"selected_bands: {name} has no band {unknown[0]!r}; its bands are {', '.join(BANDS[name])} (as text)"
            )
        if len(set(bands)) < len(bands) or not bands:
            raise ValueError(f"selected_bands: got {list(bands)} for {name}; expected each band once, and at least one")
