"""Optuna's samplers by name, made again for every question so that a resumed study asks what an unbroken one would."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search import space
from search.spec import Parameter, SearchSpec

LARGEST_GRID = 10_000
"""Points that are listed one by one for every question."""


def choose(spec: SearchSpec) -> tuple[str, str]:
    """Return the sampler's name and why: the one that the spec names, or the one that `auto` picks."""
    name = spec.search.sampler
    if name != "auto":
        return name, "as the search space says"
    size = grid_size(spec.parameters)
    if size is not None and size <= min(spec.search.trials, LARGEST_GRID):
        return "grid", f"the space has {size} points, and {spec.search.trials} trials cover it"
    if len(spec.objectives) > 1 and spec.search.trials >= 1000:
        return "nsga2", f"{len(spec.objectives)} objectives and {spec.search.trials} trials suit a population"
    return "tpe", "it copes with choices, conditions and early stops"


def grid_size(parameters: Sequence[Parameter]) -> int | None:
    """Return how many points the space has; None if they cannot be counted or some parameter is conditional."""
    sizes = [space.grid_size(parameter) for parameter in parameters]
    if any(size is None for size in sizes) or any(parameter.when for parameter in parameters):
        return None
    return math.prod(size for size in sizes if size is not None)


def untried(spec: SearchSpec, tried: Iterable[Mapping[str, Any]]) -> float:
    """Return how many points of a grid no trial has had yet; infinity for every other sampler."""
    if choose(spec)[0] != "grid":
        return math.inf
    return len(_untried(_grid(spec.parameters), [parameter.name for parameter in spec.parameters], tried))


def make(spec: SearchSpec, number: int) -> BaseSampler:
    """Return the sampler that asks for this trial.

    Samplers that draw get a seed of their own for each trial: one made again with the same seed would propose the
    same points again. Grid and quasi-random sequences keep their place in the study and get one seed for all.
    """
    name, _ = choose(spec)
    drawn, constant = _entropy(spec.search.seed, number), trial_seed(spec.search.seed, 0)
    startup = max(4, min(10, spec.search.trials // 4))
    conditional = any(parameter.when for parameter in spec.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "tpe":
                return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=startup, group=conditional)
            case "gp":
                return optuna.samplers.GPSampler(seed=drawn, n_startup_trials=startup)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=drawn, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "nsga2":
                return optuna.samplers.NSGAIISampler(seed=drawn)
            case "qmc":
                # What lies outside the sequence, such as conditional parameters, is drawn anew for each trial.
                return optuna.samplers.QMCSampler(
                    seed=constant,
                    scramble=True,
                    warn_independent_sampling=False,
                    independent_sampler=optuna.samplers.RandomSampler(seed=drawn),
                )
            case "grid":
                return GridSampler(spec.parameters, constant)
            case _:
                return optuna.samplers.RandomSampler(seed=drawn)


class GridSampler(BaseSampler):
    """Every point once, in a seeded order, those of enqueued trials counted; then drawn from all.

    Optuna's own does not count enqueued trials, and at the last point it stops a loop that ask and tell do not have.
    """

    def __init__(self, parameters: Sequence[Parameter], seed: int) -> None:
        self.parameters, self.seed = parameters, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all parameters."""
        return {parameter.name: space.distribution(parameter) for parameter in self.parameters}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next point."""
        names = [parameter.name for parameter in self.parameters]
        points = _grid(self.parameters)
        others = study.get_trials(deepcopy=False, states=[s for s in TrialState if s != TrialState.WAITING])
        left = _untried(points, names, (other.params for other in others if other.number != trial.number))
        order = random.Random(self.seed).sample(left or points, len(left or points))
        return dict(zip(names, order[0 if left else trial.number % len(order)], strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every parameter is part of the grid."""
        raise ValueError(f"{param_name} is not part of the grid")


def _grid(parameters: Sequence[Parameter]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*(space.grid_values(parameter) or [] for parameter in parameters)))


def _untried(
    points: Sequence[tuple[Any, ...]], names: Sequence[str], tried: Iterable[Mapping[str, Any]]
) -> list[tuple[Any, ...]]:
    # 1 == True in Python, but not in a grid.
    found = {tuple((type(params.get(name)), params.get(name)) for name in names) for params in tried}
    return [point for point in points if tuple((type(value), value) for value in point) not in found]


def draw_again(trial: optuna.trial.Trial, parameter: Parameter) -> None:
    """Draw a value that a killed process has drawn and kept, so that the next one drawn is what it would have drawn."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    drawn = space.distribution(parameter)
    if drawn.single() or parameter.name in frozen.system_attrs.get("fixed_params", {}):
        return
    if parameter.name not in trial.relative_params:
        trial.study.sampler.sample_independent(trial.study, frozen, parameter.name, drawn)


def trial_seed(search_seed: int, number: int) -> int:
    """Return a seed in [0, 2**31) that depends on the search's seed and the trial's number only.

    Wide enough for training; of the trials of a long search two may share it (in 35,000 with odds of one in four).
    """
    return int.from_bytes(_digest(search_seed, number)[:4], "big") >> 1


def _entropy(search_seed: int, number: int) -> Any:
    # Optuna's samplers say that a seed is an int, and hand it to numpy's RandomState, which takes words too: with
    # 256 bits no two trials draw the same.
    digest = _digest(search_seed, number)
    return [int.from_bytes(digest[start : start + 4], "big") for start in range(0, len(digest), 4)]


def _digest(search_seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{search_seed}:{number}".encode()).digest()
