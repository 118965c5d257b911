"""Optuna's samplers by name, made again for every question so that a resumed study asks what an unbroken one would."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search import space
from search.spec import Parameter, SearchSpec

LARGEST_GRID = 10_000
"""Points that are listed one by one for every question."""
INSISTING = 5
"""Times that a sampler is asked for another configuration before one is drawn from all that are left."""
MISSES = 1000
"""Draws at random from a space too large to list, nearly all of it tried, before a configuration is had twice."""


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


Point = tuple[Any, ...]
"""A configuration: for each parameter its value as Optuna stores it, or `...` where it does not exist."""


def points(parameters: Sequence[Parameter]) -> list[Point] | None:
    """Return every configuration of a small space; None: they are too many, or without number."""
    sizes = [space.count(parameter) for parameter in parameters]
    if None in sizes or max((size or 0 for size in sizes), default=0) > LARGEST_GRID:
        return None
    if not any(parameter.when for parameter in parameters):
        few = math.prod(size or 0 for size in sizes) <= LARGEST_GRID
        return list(itertools.product(*map(space.every, parameters))) if few else None
    found: list[Point] = [()]
    for parameter in parameters:
        options = [space.every(parameter) if _exists(parameter, parameters, point) else [...] for point in found]
        if sum(map(len, options)) > LARGEST_GRID:
            return None
        found = [(*point, value) for point, values in zip(found, options, strict=True) for value in values]
    return found


def at(parameters: Sequence[Parameter], point: Point) -> dict[str, Any]:
    """Return the values of a configuration, or of the first parameters of one, as Optuna stores them."""
    return {p.name: value for p, value in zip(parameters, point, strict=False) if value is not ...}


def point_of(parameters: Sequence[Parameter], stored: Mapping[str, Any]) -> Point:
    """Return the configuration that a trial's values are, as Optuna stores them."""
    return tuple(stored.get(parameter.name, ...) for parameter in parameters)


def _exists(parameter: Parameter, parameters: Sequence[Parameter], point: Point) -> bool:
    return space.applies(parameter, _decoded(parameters, at(parameters, point)))


def _decoded(parameters: Sequence[Parameter], stored: Mapping[str, Any]) -> dict[str, Any]:
    return {p.name: space.decode(p, stored[p.name]) for p in parameters if p.name in stored}


def make(spec: SearchSpec, number: int) -> BaseSampler:
    """Return the sampler that asks for this trial; where configurations can be counted, for none that has been tried.

    Samplers that draw get a seed of their own for each trial: one made again with the same seed would propose the
    same points again. Grid and quasi-random sequences keep their place in the study and get one seed for all.
    """
    sampler = _make(spec, number)
    countable = all(space.count(parameter) is not None for parameter in spec.parameters)
    if isinstance(sampler, GridSampler) or not (spec.parameters and countable):
        return sampler
    return UntriedSampler(sampler, spec.parameters, _entropy(spec.search.seed, number))


def _make(spec: SearchSpec, number: int) -> BaseSampler:
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
                    independent_sampler=RandomSampler(seed=drawn),
                )
            case "grid":
                return GridSampler(spec.parameters, constant)
            case _:
                return WeighingSampler(spec.parameters, drawn)


class WeighingSampler(RandomSampler):
    """Draws at random, choices by their probabilities where they have any."""

    def __init__(self, parameters: Sequence[Parameter], seed: Any) -> None:
        super().__init__(seed)
        self.probabilities = {p.name: p.probabilities for p in parameters if p.probabilities}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of one parameter."""
        chances = self.probabilities.get(param_name)
        if chances is None:
            return super().sample_independent(study, trial, param_name, param_distribution)
        assert isinstance(param_distribution, CategoricalDistribution)
        total = math.fsum(chances)
        index = self._rng.rng.choice(len(chances), p=[chance / total for chance in chances])
        return param_distribution.choices[index]


class UntriedSampler(BaseSampler):
    """Another sampler, asked again for as long as it says what a trial has had already, running or ended.

    One that insists, as a model does that has found its best, is overruled: the point is then drawn from all the rest.
    """

    def __init__(self, sampler: BaseSampler, parameters: Sequence[Parameter], seed: Any) -> None:
        self.sampler, self.parameters, self.seed = sampler, parameters, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all parameters: only a whole configuration can be told from others."""
        return {parameter.name: space.distribution(parameter) for parameter in self.parameters}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a configuration that no other trial has had, where there is one."""
        if "fixed_params" in trial.system_attrs:
            return {}
        tried = {point_of(self.parameters, params) for params in _others(study, trial)}
        for _ in range(INSISTING):
            values = self._draw(study, trial)
            if point_of(self.parameters, values) not in tried:
                return values
        left = [point for point in points(self.parameters) or [] if point not in tried]
        if left:
            return at(self.parameters, random.Random(str(self.seed)).choice(left))
        self.sampler = RandomSampler(self.seed)
        drawn = (self._draw(study, trial) for _ in range(MISSES))
        return next((values for values in drawn if point_of(self.parameters, values) not in tried), values)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return what the other sampler says."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the other sampler."""
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the other sampler."""
        self.sampler.after_trial(study, trial, state, values)

    def _draw(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return what the other sampler says of all the parameters that exist beside each other."""
        related = self.sampler.infer_relative_search_space(study, trial)
        relative = self.sampler.sample_relative(study, trial, related)
        stored: dict[str, Any] = {}
        for parameter in self.parameters:
            if not space.applies(parameter, _decoded(self.parameters, stored)):
                continue
            drawn = space.distribution(parameter)
            if drawn.single():
                (value,) = space.every(parameter)
            elif parameter.name in relative:
                value = relative[parameter.name]
            else:
                value = self.sampler.sample_independent(study, trial, parameter.name, drawn)
            # Of 0.1 and two steps of 0.1 Optuna makes 0.30000000000000004, which is 0.3.
            stored[parameter.name] = value if parameter.step is None else space.nearest(parameter, value)
        return stored


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
        every = points(self.parameters) or []
        tried = {point_of(self.parameters, params) for params in _others(study, trial)}
        left = [point for point in every if point not in tried]
        order = random.Random(self.seed).sample(left or every, len(left or every))
        return at(self.parameters, order[0 if left else trial.number % len(order)])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every parameter is part of the grid."""
        raise ValueError(f"{param_name} is not part of the grid")


def _others(study: Study, trial: FrozenTrial) -> Iterator[Mapping[str, Any]]:
    """Yield the values of all other trials that have been asked."""
    asked = [state for state in TrialState if state != TrialState.WAITING]
    others = study.get_trials(deepcopy=False, states=asked)
    return (other.params for other in others if other.number != trial.number)


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
