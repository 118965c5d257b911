"""A function trainable whose process imports torch and timm; prints when each trial's first and last step ran."""

from __future__ import annotations

import argparse
import json
from typing import Any

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch


def train(config: dict[str, Any]) -> None:
    """Train one trial."""
    from benchmarks import _training

    for reported in _training.steps(config["lr"], 2, config["epoch_s"], 0):
        del reported["model"]
        tune.report(reported)


def main() -> None:
    """Search, in one slot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epoch-s", type=float, default=0.25)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    ray.init("local", num_cpus=1, include_dashboard=False)
    results = tune.Tuner(
        train,
        param_space={"lr": tune.loguniform(0.01, 1.0), "epoch_s": given.epoch_s},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", search_alg=OptunaSearch(seed=0), num_samples=given.trials
        ),
        run_config=tune.RunConfig(storage_path=given.folder),
    ).fit()
    ray.shutdown()
    found = [results[index].metrics for index in range(len(results))]
    print(json.dumps({"trials": [(metrics["first_step"], metrics["last_step"]) for metrics in found if metrics]}))


if __name__ == "__main__":
    main()
