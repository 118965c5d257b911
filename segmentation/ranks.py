"""Which of several processes this one is, and how they put their results together; one alone is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: every item is in just one of them."""
    rank, world = place()
    return items[rank::world]


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, the same on each; the tensor itself is left as it is."""
    if place()[1] == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def largest(value: float, device: torch.device) -> float:
    """Return the largest of the numbers that the processes give, the same on each."""
    if place()[1] == 1:
        return value
    found = torch.tensor(float(value), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def gather(part: T) -> list[T]:
    """Return the part of every process, in order of rank, on each of them."""
    world = place()[1]
    if world == 1:
        return [part]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, part)
    return parts


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    if place()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
