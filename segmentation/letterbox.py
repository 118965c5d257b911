"""Pictures of any shape on a canvas of one size: the longer side fits, the rest is padding, and back to their own size.

Width and height are enlarged or reduced alike, sizes are cut to whole pixels, and the content lies in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Letterbox:
    """How pictures of one size lie on the canvas; sizes are (height, width) in pixels."""

    size: tuple[int, int]
    """Of the picture."""
    canvas: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse what has no pixel, before or after."""
        if min(*self.size, *self.canvas) < 1:
            raise ValueError(f"sizes: got {self.size} on a canvas of {self.canvas}; expected at least 1 x 1")
        if min(self.content) < 1:
            (height, width), (rows, columns) = self.size, self.canvas
            raise ValueError(f"a picture of {width}x{height} has no pixel left on a canvas of {columns}x{rows}")

    @property
    def content(self) -> tuple[int, int]:
        """Height and width of the picture on the canvas."""
        (height, width), (rows, columns) = self.size, self.canvas
        # In whole numbers: a float's last digit could cost a pixel of the side that fits.
        if columns * height <= rows * width:
            return height * columns // width, columns
        return rows, width * rows // height

    @property
    def corner(self) -> tuple[int, int]:
        """The content's first row and column; where the padding is odd, there is more of it behind."""
        return (self.canvas[0] - self.content[0]) // 2, (self.canvas[1] - self.content[1]) // 2

    def image(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return (C, *canvas) of a picture (C, *size), 0 around it; where it shrinks, all its pixels count."""
        return self._laid(np.stack([_resized(plane, self.content) for plane in self._of_size(picture)]))

    def mask(self, mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return (K, *canvas) of 0 and 1 for a mask (K, *size) of 0 and 1: 1 where most of a pixel's place was 1."""
        planes = [_resized(plane * np.uint8(255), self.content) >= 128 for plane in self._of_size(mask)]
        return self._laid(np.stack(planes).astype(np.uint8))

    def back(self, maps: Tensor) -> Tensor:
        """Return (B, K, *size) of maps (B, K, *canvas), such as logits: the padding cut off, the rest bilinear."""
        if maps.ndim != 4 or tuple(maps.shape[-2:]) != self.canvas:
            raise ValueError(f"maps: got {tuple(maps.shape)}; expected (B, K, {self.canvas[0]}, {self.canvas[1]})")
        (top, left), (height, width) = self.corner, self.content
        content = maps[..., top : top + height, left : left + width]
        return functional.interpolate(content.float(), self.size, mode="bilinear", antialias=True)

    def _of_size(self, planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if planes.ndim != 3 or planes.shape[1:] != self.size:
            raise ValueError(f"got {planes.shape}; expected (C, {self.size[0]}, {self.size[1]})")
        return planes

    def _laid(self, content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        laid = np.zeros((len(content), *self.canvas), np.uint8)
        (top, left), (height, width) = self.corner, self.content
        laid[:, top : top + height, left : left + width] = content
        return laid


def _resized(plane: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[Any]:
    from PIL import Image

    if plane.shape == size:
        return plane
    return np.asarray(Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR))
