"""What is kept of each image, put together while images come: the parts of a long validation in little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Part(Protocol):
    """Scores, histograms or detections of some images."""

    @property
    def index(self) -> Any:
        """Return the sample numbers."""


P = TypeVar("P", bound=Part)


class Collector(Generic[P]):
    """Merge parts as they are added, so that what is kept lies in a few blocks of memory.

    A list of small arrays, each allocated between an image's large ones that are freed again, leaves holes that no
    large one fits into: the process grows by several times what the list holds.
    """

    def __init__(self, merge: Callable[[Sequence[P]], P], nothing: P) -> None:
        self._merge = merge
        self._nothing = nothing
        self._blocks: list[P] = []  # each of more images than the next

    def add(self, part: P) -> None:
        """Keep a part; it is copied soon, and each image some times for every doubling of how many there are."""
        self._blocks.append(part)
        while len(self._blocks) > 1 and len(self._blocks[-2].index) <= len(self._blocks[-1].index):
            self._blocks[-2:] = [self._merge(self._blocks[-2:])]

    def whole(self) -> P:
        """Return all that was added, merged."""
        return self._merge([self._nothing, *self._blocks])
