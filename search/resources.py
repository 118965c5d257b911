"""The arithmetic of what fits: slots, CPUs and GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from search.errors import SpecError
from search.spec import Evaluation, Resources


@dataclass(frozen=True)
class Room:
    """What a machine or cluster has."""

    cpus: float
    gpus: float
    where: str
    grows: bool = False
    """Whether more may come: an autoscaling cluster."""


def slots(resources: Resources, room: Room) -> int:
    """Return how many trials run at the same time.

    Raises:
        SpecError: if not even one fits, or more are asked for than ever fit, with the arithmetic.
    """
    fits = math.floor(room.cpus / resources.cpus_per_slot + 1e-9)
    if resources.gpus_per_slot:
        fits = min(fits, math.floor(room.gpus / resources.gpus_per_slot + 1e-9))
    wanted = 1 if resources.slots == "auto" else resources.slots
    if fits < wanted and not room.grows:
        raise SpecError(
            f"resources: {wanted} slots x ({resources.cpus_per_slot:g} CPU, {resources.gpus_per_slot:g} GPU) = "
            f"{wanted * resources.cpus_per_slot:g} CPU, {wanted * resources.gpus_per_slot:g} GPU, but {room.where} has "
            f"{room.cpus:g} CPU, {room.gpus:g} GPU; lower resources.slots or what each slot gets"
        )
    return max(1, fits) if resources.slots == "auto" else wanted


def check_evaluation(evaluation: Evaluation, room: Room) -> None:
    """Refuse an evaluation job that would wait for ever.

    Raises:
        SpecError: if it asks for more than there is.
    """
    if (evaluation.cpus > room.cpus or evaluation.gpus > room.gpus) and not room.grows:
        raise SpecError(
            f"evaluation: one job takes {evaluation.cpus:g} CPU, {evaluation.gpus:g} GPU, but {room.where} has "
            f"{room.cpus:g} CPU, {room.gpus:g} GPU; lower evaluation.cpus or evaluation.gpus"
        )
