"""Which trials end early: pure rules over what others reached, the same for any executor.

A rule sees the history, the objectives of every trial after each epoch, and answers with a verdict. It keeps no state
of its own, so that a resumed study decides as an unbroken one would. Several objectives are compared by Pareto rank
first and by the first objective within a rank.
Source of asha: Li et al. 2020, arXiv:1810.05934; of median: Golovin et al. 2017 (Google Vizier).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.spec import Objective, Stopping

History = Mapping[int, Mapping[int, tuple[float, ...]]]
"""Trial number -> epoch -> objectives."""


@dataclass(frozen=True)
class Verdict:
    """Whether a trial ends, and why in words."""

    stop: bool
    why: str = ""


GO_ON = Verdict(False)


def judge(rule: Stopping, objectives: Sequence[Objective], history: History, number: int, epoch: int) -> Verdict:
    """Return whether this trial ends after this epoch.

    Args:
        rule: which rule, and its numbers.
        objectives: metrics and modes; the history has their values in this order.
        history: all trials so far, this one and this epoch included.
        number: of the trial that is judged.
        epoch: the epoch it has just finished, from 1.
    """
    if rule.rule == "none" or epoch < rule.min_epochs:
        return GO_ON
    if not all(map(math.isfinite, history[number][epoch])):
        return Verdict(True, f"objective is not finite at epoch {epoch}")
    return {"asha": _asha, "median": _median}[rule.rule](rule, objectives, history, number, epoch)


def rungs(rule: Stopping, number: int, max_epochs: int) -> list[int]:
    """Return the epochs at which asha compares this trial with those of its bracket."""
    first = rule.min_epochs * rule.reduction ** (number % rule.brackets)
    ladder = []
    while first < max_epochs:
        ladder.append(first)
        first *= rule.reduction
    return ladder


def _asha(rule: Stopping, objectives: Sequence[Objective], history: History, number: int, epoch: int) -> Verdict:
    # A workload may validate every few epochs only: a rung in between is judged at the next report.
    before = max((other for other in history[number] if other < epoch), default=0)
    if not any(before < rung for rung in rungs(rule, number, epoch + 1)):
        return GO_ON
    reached = {
        other: _best_until(epochs, epoch, objectives)
        for other, epochs in history.items()
        if other % rule.brackets == number % rule.brackets and any(e >= epoch for e in epochs)
    }
    order = rank(reached, objectives)
    place, allowed = order.index(number) + 1, max(1, math.ceil(len(order) / rule.reduction))
    if place <= allowed:
        return GO_ON
    return Verdict(True, f"place {place} of {len(order)} at rung {epoch}, the best {allowed} go on")


def _median(rule: Stopping, objectives: Sequence[Objective], history: History, number: int, epoch: int) -> Verdict:
    sign = -1.0 if objectives[0].mode == "min" else 1.0
    others = [
        statistics.fmean(until)
        for other, epochs in history.items()
        if other != number and max(epochs, default=0) >= epoch and (until := _finite_until(epochs, epoch, sign))
    ]
    if len(others) < rule.min_trials:
        return GO_ON
    best, middle = sign * _best_until(history[number], epoch, objectives)[0], statistics.median(others)
    if best >= middle:
        return GO_ON
    return Verdict(
        True, f"best {sign * best:.4g} is worse than the median {sign * middle:.4g} of {len(others)} at epoch {epoch}"
    )


def _finite_until(epochs: Mapping[int, tuple[float, ...]], epoch: int, sign: float) -> list[float]:
    return [sign * value[0] for e, value in epochs.items() if e <= epoch and math.isfinite(value[0])]


def rank(values: Mapping[int, tuple[float, ...]], objectives: Sequence[Objective]) -> list[int]:
    """Return the trials from best to worst: by Pareto rank, then the first objective, then the number.

    Trials with a value that is not finite come last.
    """
    costs_of = {n: costs(vs, objectives) for n, vs in values.items() if all(map(math.isfinite, vs))}
    order: list[int] = []
    rest = dict(costs_of)
    while rest:
        front = (
            [n for n in rest if not any(dominates(rest[m], rest[n]) for m in rest)]
            if len(objectives) > 1
            else list(rest)
        )
        order += sorted(front, key=lambda n: (costs_of[n], n))
        for number in front:
            del rest[number]
    return order + sorted(n for n in values if n not in costs_of)


def costs(values: tuple[float, ...], objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Return the objectives turned so that less is better."""
    pairs = zip(values, objectives, strict=True)
    return tuple(-value if objective.mode == "max" else value for value, objective in pairs)


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Return whether costs `a` are nowhere above `b` and somewhere below."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def reached(history: History, first: Objective, target: float) -> bool:
    """Return whether any trial, at any epoch, has a first objective that is the target or better."""
    # In copies: another thread may ask while epochs come in.
    values = (values[0] for epochs in list(history.values()) for values in list(epochs.values()))
    return any(value >= target if first.mode == "max" else value <= target for value in values)


def best_epoch(epochs: Mapping[int, tuple[float, ...]], objectives: Sequence[Objective]) -> int | None:
    """Return the epoch with the best first objective, the earliest of equals; None where none is finite."""
    sign = -1.0 if objectives[0].mode == "max" else 1.0
    finite = [(sign * value[0], epoch) for epoch, value in epochs.items() if all(map(math.isfinite, value))]
    return min(finite)[1] if finite else None


def _best_until(
    epochs: Mapping[int, tuple[float, ...]], epoch: int, objectives: Sequence[Objective]
) -> tuple[float, ...]:
    until = {e: value for e, value in epochs.items() if e <= epoch}
    best = best_epoch(until, objectives)
    return until[best] if best is not None else tuple(math.nan for _ in objectives)
