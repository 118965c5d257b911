"""Which filters go: pure functions of scores.

Of a block of n filters exactly floor(n x ratio) go, those with the smallest scores, and of equal scores the later ones
stay: the order is stable. A floor of channels stays in every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Kept = dict[str, tuple[int, ...]]


def by_ratio(scores: Tensor, ratio: float, *, least: int = 1, below: float = math.inf) -> tuple[int, ...]:
    """Return the places that stay, in ascending order.

    scores: (n,), the smallest go first.
    ratio: share of filters that go, in [0, 1).
    least: filters that stay whatever the ratio says.
    below: only filters with a smaller score can go.
    """
    count = min(math.floor(len(scores) * ratio), max(0, len(scores) - least))
    gone = [place for place in torch.argsort(scores, stable=True)[:count].tolist() if scores[place] < below]
    return _without(len(scores), gone)


def together(scores: Mapping[str, Tensor], count: int, *, least: int = 1, below: float = math.inf) -> Kept:
    """Return what stays of each block when the filters of all blocks stand in one row and the first `count` go.

    scores: of each block, (n,), to be compared with each other.
    """
    return _taken(scores, _row(scores, least, below)[:count])


def within(
    scores: Mapping[str, Tensor], fits: Callable[[Kept], bool], *, least: int = 1, below: float = math.inf
) -> Kept | None:
    """Return what stays when as few as possible go, in the order of `together`, that the rest fits; None: never.

    fits: whether a network of what stays is small enough; once true, it has to be so for every smaller one.
    """
    row = _row(scores, least, below)
    low, high = 0, len(row)
    if not fits(_taken(scores, row)):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(_taken(scores, row[:middle])):
            high = middle
        else:
            low = middle + 1
    return _taken(scores, row[:low])


def _row(scores: Mapping[str, Tensor], least: int, below: float) -> list[tuple[str, int]]:
    """Return every filter that can go, by block and place, in the order of going."""
    able = []
    for order, (block, values) in enumerate(scores.items()):
        first = torch.argsort(values, stable=True)[: max(0, len(values) - least)].tolist()
        able += [(float(values[place]), order, block, place) for place in first if values[place] < below]
    return [(block, place) for _, _, block, place in sorted(able, key=lambda entry: entry[:2])]


def _taken(scores: Mapping[str, Tensor], gone: list[tuple[str, int]]) -> Kept:
    places: dict[str, list[int]] = {block: [] for block in scores}
    for block, place in gone:
        places[block].append(place)
    return {block: _without(len(values), places[block]) for block, values in scores.items()}


def _without(total: int, gone: list[int]) -> tuple[int, ...]:
    left = set(range(total)) - set(gone)
    return tuple(sorted(left))
