"""The toy search with function trainables, OptunaSearch and the default loggers; prints the seconds that it took."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch


def train(config: dict[str, Any]) -> None:
    """Report a learning curve in closed form."""
    for epoch in range(1, config["epochs"] + 1):
        score = (1 - abs(math.log10(config["lr"]) + 2) / 10) * (1 - math.exp(-0.5 * epoch))
        tune.report({"score": score, "loss": 1 - score, "cost": float(config["width"])})


def main() -> None:
    """Search; the start of Ray is not in the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    ray.init("local", num_cpus=given.slots, include_dashboard=False)
    tuner = tune.Tuner(
        train,
        param_space={"lr": tune.loguniform(1e-5, 1.0), "width": tune.lograndint(8, 256), "epochs": given.epochs},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=OptunaSearch(seed=0),
            num_samples=given.trials,
            max_concurrent_trials=given.slots,
        ),
        run_config=tune.RunConfig(storage_path=given.folder),
    )
    began = time.monotonic()
    tuner.fit()
    wall_s = time.monotonic() - began
    ray.shutdown()
    print(json.dumps({"wall_s": wall_s}))


if __name__ == "__main__":
    main()
