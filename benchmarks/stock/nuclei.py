"""A search over the nuclei with function trainables, OptunaSearch and ASHA, and a training loop of its own.

Tiles, network and loss are those of our workload, so that the two searches differ in how they are run. Prints the
seconds of the search, the epochs trained, and how the best trial does on the test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import configuration
from search import space, spec_file
from search.spec import SearchSpec
from segmentation import losses, metrics, splits, training
from segmentation.samples import Samples
from workloads import pairs
from workloads._pairs import dataset

WEIGHTS = "weights.pt"


def train(values: dict[str, Any]) -> None:
    """Train one trial, and report the validation score and a checkpoint after each epoch."""
    config = configuration.build(pairs.Config, values)
    samples, made = dataset.load(config.data)
    validation = tiles(samples, made.validation)
    torch.manual_seed(config.seed)
    model = pairs.build_network(config, samples.shape(0)[0])
    loss = losses.build(config.loss, multilabel=False, ignore_index=config.data.ignore_index)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    averaging = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
    loader = DataLoader(TensorDataset(*tiles(samples, made.train)), batch_size=config.batch_size, shuffle=True)
    for epoch in range(config.epochs):
        model.train()
        for step, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"] = training.learning_rate(config, epoch + step / len(loader))
            image, mask = turned(*batch)
            optimizer.zero_grad()
            loss(model(image), mask).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if config.ema_decay:
                average.update_parameters(model)
        best = average.module if config.ema_decay else model
        report(best, mean_iou(best, *validation, config))


def report(model: nn.Module, score: float) -> None:
    """Hand score and weights to Ray Tune."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / WEIGHTS)
        tune.report({"val_mean_iou": score}, checkpoint=tune.Checkpoint.from_directory(folder))


def tiles(samples: Samples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) in [0, 1] and masks (N, H, W)."""
    image = np.stack([samples.image(index) for index in indices])
    mask = np.stack([samples.mask(index) for index in indices])
    return torch.from_numpy(image).float() / 255, torch.from_numpy(mask).long()


def turned(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch mirrored and turned at random, all its tiles alike."""
    for axis in (-1, -2):
        if torch.rand(()) < 0.5:
            image, mask = image.flip(axis), mask.flip(axis)
    if torch.rand(()) < 0.5:
        image, mask = image.rot90(1, (-2, -1)), mask.rot90(1, (-2, -1))
    return image, mask


@torch.no_grad()
def mean_iou(model: nn.Module, image: Tensor, mask: Tensor, config: pairs.Config) -> float:
    """Return the mean over classes of the IoU of all pixels."""
    model.eval()
    predicted = model(image).argmax(1)
    table = metrics.confusion(predicted, mask, config.data.classes, ignore_index=config.data.ignore_index).sum(0)
    hit = np.diagonal(table)
    return float(np.mean(hit / (table.sum(0) + table.sum(1) - hit)))


def suggest(spec: SearchSpec, trial: optuna.Trial) -> dict[str, Any]:
    """Ask for each parameter of the search space; return what is fixed beside them."""
    for parameter in spec.parameters:
        space.suggest(trial, parameter)
    return dict(spec.fixed)


def main() -> None:
    """Search; the start of Ray is not in the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", required=True)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    spec = spec_file.load(given.space)

    ray.init("local", include_dashboard=False)
    epochs = configuration.build(pairs.Config, spec.fixed).epochs
    questions = OptunaSearch(space=partial(suggest, spec), metric="val_mean_iou", mode="max", seed=spec.search.seed)
    tuner = tune.Tuner(
        train,
        tune_config=tune.TuneConfig(
            search_alg=questions,
            scheduler=ASHAScheduler(
                metric="val_mean_iou",
                mode="max",
                max_t=epochs,
                grace_period=spec.stopping.min_epochs,
                reduction_factor=spec.stopping.reduction,
            ),
            num_samples=spec.search.trials,
        ),
        run_config=tune.RunConfig(storage_path=given.folder),
    )
    began = time.monotonic()
    results = tuner.fit()
    wall_s = time.monotonic() - began
    ray.shutdown()
    best = results.get_best_result("val_mean_iou", "max", scope="all")
    reported = [results[index].metrics or {} for index in range(len(results))]
    trained = sum(metrics["training_iteration"] for metrics in reported)
    print(json.dumps({"wall_s": wall_s, "epochs": trained, "test_mean_iou": test_score(best)}))


def test_score(best: tune.Result) -> float:
    """Return the mean IoU of a trial's best checkpoint on the test split."""
    assert best.config is not None
    config = configuration.build(pairs.Config, best.config)
    samples, made = dataset.load(config.data)
    model = pairs.build_network(config, samples.shape(0)[0])
    checkpoint = best.get_best_checkpoint("val_mean_iou", "max")
    assert checkpoint is not None
    with checkpoint.as_directory() as folder:
        model.load_state_dict(torch.load(Path(folder) / WEIGHTS, weights_only=True))
    with splits.test_split_open():
        return mean_iou(model, *tiles(samples, made.test), config)


if __name__ == "__main__":
    main()
