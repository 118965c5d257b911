"""One pass over batches, and the numbers that an epoch reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from segmentation import metrics, ranks
from segmentation.metrics import Convention, Counts

Batch = tuple[Tensor, Tensor, Tensor]
BatchLoss = Callable[[Tensor, Tensor], Tensor]

CONVENTION = Convention(pooling="pixel", background="in", empty="zero")
"""torchmetrics' and so the original's: counts summed over all pixels, a class neither there nor predicted scores 0."""


def run_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: BatchLoss,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    train: bool = False,
    threshold: float = 0.5,
    classes: int | None = None,
) -> tuple[float, float, float, list[float], list[float]]:
    """Go once over the batches; return avg_loss, mean_iou, mean_acc, per_class_iou, per_class_acc.

    With `train`, each batch is a step of the optimiser; without, the weights stay as they are. Means are taken over the
    first `classes` channels, all by default; the lists hold every channel.

    Raises:
        ValueError: if `train` is asked for without an optimiser, or there is no batch.
    """
    value, counts = one_pass(model, batches, loss, optimizer, train=train, threshold=threshold)
    iou, accuracy = metrics.per_class("iou", counts, CONVENTION), metrics.per_class("accuracy", counts, CONVENTION)
    means = float(iou[:classes].mean()), float(accuracy[:classes].mean())
    return value, *means, iou.tolist(), accuracy.tolist()


def one_pass(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: BatchLoss,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    train: bool = False,
    threshold: float = 0.5,
) -> tuple[float, Counts]:
    """Return the mean loss over images and the counts (N, K, 4) of one pass; see `run_epoch`."""
    if train and optimizer is None:
        raise ValueError("optimizer: got None with train=True; expected the optimiser whose steps to take")
    model.train(train)
    losses, sizes, counts = [], [], []
    with torch.set_grad_enabled(train):
        for image, mask, _ in batches:
            logits = model(image)  # (B, 3, H, W)
            value = loss(logits.float(), mask)
            if train and optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(value)
                optimizer.step()
            losses.append(value.detach())
            sizes.append(len(image))
            counts.append(metrics.count(logits.detach(), mask, multilabel=True, threshold=threshold))
    if not sizes:
        raise ValueError("batches: got none; expected at least one")
    mean = float(np.average(torch.stack(losses).double().cpu().numpy(), weights=sizes))
    return mean, np.concatenate(counts)


def of_all_ranks(loss: float, counts: Counts) -> tuple[float, Counts]:
    """Return mean loss and counts (N, K, 4) of the passes of all ranks, each over a part of the images."""
    parts = ranks.gather((loss * len(counts), counts))
    everything = np.concatenate([part for _, part in parts])
    return sum(added for added, _ in parts) / len(everything), everything


def report(loss: float, counts: Counts, names: Mapping[str, int]) -> dict[str, float]:
    """Return what an epoch reports of a validation pass, its means over the channels that have a name.

    `acc_all_zero` is the accuracy of predicting nothing: `acc` says something only by how much it is more.
    """
    channels = list(names.values())
    each = {family: metrics.per_class(family, counts, CONVENTION) for family in ("iou", "dice", "precision", "recall")}
    real = counts[:, channels]
    return {
        "val_loss": loss,
        **{f"iou_{name}": float(each["iou"][channel]) for name, channel in names.items()},
        **{f"mean_{family}": float(scores[channels].mean()) for family, scores in each.items()},
        "acc": float(metrics.pixel_accuracy(real.sum(0), multilabel=True)),
        "acc_all_zero": float(metrics.background_accuracy(real.sum(0), multilabel=True)),
    }
