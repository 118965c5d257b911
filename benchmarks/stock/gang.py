"""A Tune trial that builds a TorchTrainer of two workers; prints when steps ran, the wall clock, and memory."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.search.optuna import OptunaSearch

from benchmarks import _gangs


def train_rank(config: dict[str, Any]) -> dict[str, float]:
    """Train one trial and return its last metrics; runs in each worker."""
    from benchmarks import _parallel

    made = _parallel.Config(
        lr=config["lr"], epochs=config["epochs"], epoch_s=config["epoch_s"], batch_size=4, threads=1
    )
    metrics: dict[str, float] = {}
    for epoch in _parallel.train(made):
        metrics = dict(epoch.metrics)
        ray.train.report(metrics)
    return metrics


def train(config: dict[str, Any]) -> None:
    """Run one trial."""
    trainer: Any = TorchTrainer(
        train_rank,  # type: ignore[arg-type]
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": config["cpus"]}),
        run_config=ray.train.RunConfig(storage_path=config["folder"], name=f"trial-{time.time()}"),
    )
    tune.report(trainer.fit().return_value)


def main() -> None:
    """Search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--epoch-s", type=float, default=0.0)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    ray.init("local", num_cpus=2, resources={"trial_driver": given.concurrent}, include_dashboard=False)
    space = {
        "lr": tune.loguniform(1e-4, 1e-1),
        "epochs": given.epochs,
        "epoch_s": given.epoch_s,
        "folder": given.folder,
        "cpus": 1.0 / given.concurrent,
    }
    begun = time.time()
    with _gangs.Watch() as watch:
        results = tune.Tuner(
            tune.with_resources(train, {"CPU": 0, "trial_driver": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(seed=0, metric="val_loss", mode="min"),
                num_samples=given.trials,
                max_concurrent_trials=given.concurrent,
            ),
            run_config=tune.RunConfig(storage_path=given.folder),
        ).fit()
    wall = time.time() - begun
    ray.shutdown()
    found = [metrics for index in range(len(results)) if (metrics := results[index].metrics)]
    full = [control for _, control, _, ranks in watch.seen if ranks == given.concurrent * 2]
    print(
        json.dumps(
            {
                "trials": [(metrics["first_step"], metrics["last_step"]) for metrics in found],
                "wall_s": wall,
                "control_mib": statistics.median(full) if full else None,
            }
        )
    )


if __name__ == "__main__":
    main()
