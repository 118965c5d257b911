"""What a person looks at: strips as training sees them, and predictions beside the truth at the strips' own size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from segmentation import figures
from segmentation.augmentation import Augmenter
from segmentation.letterbox import Letterbox
from segmentation.loading import generator
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples
from workloads._severstal.learnt import Learnt

GAP = 4
"""Rows of white between the parts of a panel."""


class Pictures:
    """Writes masks/NAME_mask.png and panels/NAME.png of some strips as evaluation comes by them."""

    def __init__(self, folder: Path, samples: Samples, shown: Sequence[int], learnt: Learnt) -> None:
        self.folder, self.samples, self.shown, self.learnt = folder, samples, frozenset(shown), learnt
        self.names: list[str] = []

    def add(self, logits: Tensor, masks: Tensor, index: Tensor) -> None:
        """Write those that are to be shown of strips of one size, logits and masks (n, K, H, W)."""
        for row, number in enumerate(index.tolist()):
            if number not in self.shown:
                continue
            name = Path(self.samples.names[number]).stem
            written = save_mask(self.folder / "masks" / f"{name}_mask.png", logits[row], self.learnt)
            drawn = self._panel(name, logits[row], masks[row].numpy(), self.samples.image(number))
            self.names += [str(path.relative_to(self.folder)) for path in (written, drawn)]

    def _panel(self, name: str, logits: Tensor, mask: npt.NDArray[Any], laid: npt.NDArray[np.uint8]) -> Path:
        """Write the strip, the truth over it and the prediction over it, one below the other."""
        box = Letterbox((logits.shape[-2], logits.shape[-1]), (laid.shape[-2], laid.shape[-1]))
        back = box.back(torch.from_numpy(laid.copy())[None])[0].permute(1, 2, 0)
        picture = np.asarray(back.clamp(0, 255), np.uint8)
        called = self.learnt.called(logits).astype(np.float32)
        painted = [figures.composite_map(each) for each in (mask.astype(np.float32), called)]
        rows = [picture, *(figures.blend(picture, one) for one in painted)]
        white = np.full((GAP, picture.shape[1], 3), 255, np.uint8)
        path = self.folder / "panels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([rows[0], white, rows[1], white, rows[2]])).save(path)
        return path


def save_mask(path: Path, logits: Tensor, learnt: Learnt) -> Path:
    """Write the mask of one strip from logits (K, H, W) at its own size.

    0 and 255 where there is one class; else the number from 1 of the likeliest of those called, and 0 where none is.
    """
    called = learnt.called(logits)
    if len(called) == 1:
        mask = called[0] * np.uint8(255)
    else:
        likeliest = np.where(called, logits.numpy(), -np.inf).argmax(0) + 1
        mask = np.where(called.any(0), likeliest, 0).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def save_samples(path: Path, samples: Samples, shown: Sequence[int], normalise: Normaliser, augment: Augmenter) -> Path:
    """Write four rows for each of some strips: on the canvas, its mask over it, and both as training may see them."""
    image = torch.cat([normalise(torch.from_numpy(samples.image(index).copy())[None]) for index in shown])
    mask = torch.stack([torch.from_numpy(samples.mask(index).copy()).long() for index in shown])
    moved, moved_mask = augment(image, mask, generator(0))
    rows = []
    for row in range(len(shown)):
        for picture, planes in ((image[row], mask[row]), (moved[row], moved_mask[row])):
            plain = figures.as_picture(picture.numpy())
            rows += [plain, figures.blend(plain, figures.composite_map(planes.numpy().astype(np.float32)))]
    white = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([part for row in rows for part in (row, white)][:-1])).save(path)
    return path
