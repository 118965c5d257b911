"""Optuna's samplers by name, made again for every question so that a resumed study asks what an unbroken one would."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler

from search import space
from search.spec import Parameter, SearchSpec


def choose(spec: SearchSpec) -> tuple[str, str]:
    """Return the sampler's name and why: the one that the spec names, or the one that `auto` picks."""
    name = spec.search.sampler
    if name != "auto":
        return name, "as the search space says"
    size = grid_size(spec.parameters)
    if size is not None and size <= spec.search.trials:
        return "grid", f"the space has {size} points, and {spec.search.trials} trials cover it"
    if len(spec.objectives) > 1 and spec.search.trials >= 1000:
        return "nsga2", f"{len(spec.objectives)} objectives and {spec.search.trials} trials suit a population"
    return "tpe", "it copes with choices, conditions and early stops"


def grid_size(parameters: Sequence[Parameter]) -> int | None:
    """Return how many points the space has; None if they cannot be counted or some parameter is conditional."""
    counts = [space.grid_values(parameter) for parameter in parameters]
    if any(values is None for values in counts) or any(parameter.when for parameter in parameters):
        return None
    return math.prod(len(values) for values in counts if values is not None)


def make(spec: SearchSpec, number: int) -> BaseSampler:
    """Return the sampler that asks for this trial.

    Samplers that draw get a seed of their own for each trial: one made again with the same seed would propose the
    same points again. Grid and quasi-random sequences keep their place in the study and get one seed for all.
    """
    name, _ = choose(spec)
    drawn, constant = trial_seed(spec.search.seed, number), trial_seed(spec.search.seed, 0)
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
                return optuna.samplers.QMCSampler(seed=constant, scramble=True, warn_independent_sampling=False)
            case "grid":
                grid = {p.name: space.grid_values(p) or [] for p in spec.parameters}
                return optuna.samplers.GridSampler(grid, seed=constant)
            case _:
                return optuna.samplers.RandomSampler(seed=drawn)


def trial_seed(search_seed: int, number: int) -> int:
    """Return a seed in [0, 2**31) that depends on the search's seed and the trial's number only."""
    digest = hashlib.sha256(f"{search_seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
