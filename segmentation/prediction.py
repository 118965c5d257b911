"""Prediction on images of any size by tiles that overlap, and over mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""As it is, left for right, upside down, and both."""


def predict_tiles(
    model: nn.Module,
    image: Tensor,
    *,
    tile: int,
    multilabel: bool,
    overlap: float = 0.5,
    flips: bool = False,
    batch_size: int = 8,
) -> Tensor:
    """Return the probability of each class at each pixel, (K, H, W), for a normalised image (C, H, W).

    Tiles overlap by this share of their side; where they do, probabilities are averaged with a weight that falls off
    towards a tile's edge, so that no seam shows. With `flips`, each tile is also seen mirrored along both axes.
    Source: Isensee et al. 2021, nnU-Net, arXiv:1809.10486 (Gaussian importance, mirroring).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: got {overlap}; expected 0 or more, and less than 1")
    height, width = image.shape[-2:]
    rows, columns = min(tile, height), min(tile, width)
    weight = importance(rows, columns).to(image.device)
    places = list(product(starts(height, rows, overlap), starts(width, columns, overlap)))
    total, mass = None, torch.zeros(height, width, device=image.device)
    for group in _groups(places, batch_size):
        tiles = torch.stack([image[:, y : y + rows, x : x + columns] for y, x in group])
        for (y, x), probability in zip(group, predict(model, tiles, multilabel=multilabel, flips=flips), strict=True):
            total = image.new_zeros(len(probability), height, width) if total is None else total
            total[:, y : y + rows, x : x + columns] += probability * weight
            mass[y : y + rows, x : x + columns] += weight
    assert total is not None
    return total / mass


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor, *, multilabel: bool, flips: bool = False) -> Tensor:
    """Return probabilities (B, K, H, W) of images (B, C, H, W), averaged over mirror images where asked."""
    model.eval()
    return _mean(model, image, FLIPS if flips else FLIPS[:1], multilabel)


class FlipAverage(nn.Module):
    """A network seen from four sides, for whatever wants logits: a score, a loss, a resize.

    Its logits are those whose softmax (sigmoid, if multilabel) is the mean over the four mirror images; always finite.
    """

    def __init__(self, model: nn.Module, *, multilabel: bool) -> None:
        super().__init__()
        self.model, self.multilabel = model, multilabel

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of images (B, C, H, W)."""
        mean = _mean(self.model, image, FLIPS, self.multilabel)
        if self.multilabel:
            return mean.logit(eps=torch.finfo(mean.dtype).eps)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def starts(size: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles begin: the first at 0, the last flush with the end, evenly spread, overlapping enough."""
    room = size - tile
    if room == 0:
        return [0]
    count = -(-room // max(1, int(tile * (1 - overlap))))
    return [round(index * room / count) for index in range(count + 1)]


def importance(rows: int, columns: int) -> Tensor:
    """Return the weight of each pixel of a tile, a Gaussian of an eighth of the side, never less than 1e-3."""
    return torch.outer(_bell(rows), _bell(columns)).clamp(min=1e-3)


def _bell(size: int) -> Tensor:
    distance = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return torch.exp(-0.5 * (distance / (size / 8)) ** 2)


def _mean(model: nn.Module, image: Tensor, views: Sequence[tuple[int, ...]], multilabel: bool) -> Tensor:
    found = [_activate(model(image.flip(view)).float(), multilabel).flip(view) for view in views]
    return torch.stack(found).mean(0)


def _activate(logits: Tensor, multilabel: bool) -> Tensor:
    return logits.sigmoid() if multilabel else logits.softmax(1)


def _groups(places: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]
