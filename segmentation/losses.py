"""Losses as plain functions of logits and a target, and their weighted sum.

Each function returns one number an image, (B,), so that a sum over images does not depend on how they were batched; a
loss for training is the mean. Ignored pixels count for nothing, in every loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = 255
LEGACY_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is made small: the sum of the losses whose weight is not 0."""

    ce: float = 0.5
    """Weight of cross-entropy (classes that exclude each other)."""
    bce: float = 0.0
    """Weight of binary cross-entropy of each class."""
    dice: float = 0.5
    """Weight of the soft Dice loss."""
    focal: float = 0.0
    """Weight of the focal loss."""
    tversky: float = 0.0
    """Weight of the Tversky loss: Dice with its own weights for false positives and false negatives."""
    lovasz: float = 0.0
    """Weight of the Lovasz loss, a surrogate of the IoU."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in ce, bce and focal; empty: all 1."""
    dice_empty: Literal["smooth", "legacy"] = "smooth"
    """smooth: a class that is neither there nor predicted costs 0. legacy: an absent class costs 1 whatever comes."""
    dice_smooth: float = 1.0
    """Pixels added above and below the line in dice and tversky (not in legacy)."""
    dice_pooling: Literal["image", "batch"] = "image"
    """Whether dice and tversky are taken of each image or of the batch as one."""
    dice_background: bool = True
    """Whether class 0 counts in dice, tversky and lovasz (classes that exclude each other)."""
    focal_gamma: float = 2.0
    """How much less a pixel counts that is already right."""
    tversky_alpha: float = 0.3
    """Weight of false positives."""
    tversky_beta: float = 0.7
    """Weight of false negatives."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in LOSSES}
        for name in (*weights, "focal_gamma", "tversky_alpha", "tversky_beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected 0 or more")
        if self.dice_smooth <= 0:
            raise ValueError(f"dice_smooth: got {self.dice_smooth}; expected more than 0")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)}: all are 0; give at least one of them a weight")
        if any(weight < 0 for weight in self.class_weights):
            raise ValueError(f"class_weights: got {list(self.class_weights)}; expected 0 or more")


@dataclass(frozen=True)
class Target:
    """A mask in the form that every loss reads."""

    onehot: Tensor
    """(B, K, H, W) float, 1 where the class is; 0 at ignored pixels."""
    valid: Tensor
    """(B, 1 or K, H, W) float, 0 at ignored pixels."""
    exclusive: bool
    """Whether a pixel has one class (softmax) or any number of them (sigmoid)."""


def build(config: Loss, *, multilabel: bool, ignore_index: int = IGNORE_INDEX) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the weighted loss of a batch, a scalar: the mean of `build_per_image`.

    Raises:
        ValueError: for cross-entropy between classes that do not exclude each other.
    """
    per_image = build_per_image(config, multilabel=multilabel, ignore_index=ignore_index)

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        return per_image(logits, mask).mean()

    return loss


def build_per_image(
    config: Loss, *, multilabel: bool, ignore_index: int = IGNORE_INDEX
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the weighted loss of each image: logits (B, K, H, W) and mask (B, H, W) or (B, K, H, W) to (B,)."""
    if multilabel and config.ce:
        raise ValueError("ce: cross-entropy needs classes that exclude each other; set ce=0 and give bce a weight")
    terms = [(getattr(config, name), function) for name, function in LOSSES.items() if getattr(config, name)]

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        target = read_target(mask, logits, multilabel=multilabel, ignore_index=ignore_index)
        values = [weight * function(logits.float(), target, config) for weight, function in terms]
        return torch.stack(values).sum(0)

    return loss


def read_target(mask: Tensor, logits: Tensor, *, multilabel: bool, ignore_index: int = IGNORE_INDEX) -> Target:
    """Return the target of a mask (B, H, W) of class ids, or (B, K, H, W) of zeros and ones.

    Raises:
        ValueError: if the mask's shape does not belong to the logits'.
    """
    expected = logits.shape if multilabel else (logits.shape[0], *logits.shape[2:])
    if mask.shape != expected:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; expected {tuple(expected)} for these logits")
    known = mask != ignore_index
    if multilabel:
        valid = known.float()
        return Target(mask.float() * valid, valid, exclusive=False)
    classes = torch.arange(logits.shape[1], device=mask.device).view(1, -1, 1, 1)
    return Target((mask.unsqueeze(1) == classes).float(), known.unsqueeze(1).float(), exclusive=True)


def cross_entropy(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return the mean over pixels of minus the logarithm of the right class's probability, (B,)."""
    surprise = -(target.onehot * F.log_softmax(logits, 1))
    return _mean_over_pixels(_weighted(surprise, config).sum(1, keepdim=True), target.valid)


def binary_cross_entropy(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return the mean over classes and pixels of the binary cross-entropy, (B,)."""
    surprise = F.binary_cross_entropy_with_logits(logits, target.onehot, reduction="none")
    return _mean_over_pixels(_weighted(surprise, config), target.valid)


def dice(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return one minus the mean soft Dice over classes, (B,).

    Source: Milletari et al. 2016, arXiv:1606.04797. The legacy form has its epsilon below the line only.
    """
    overlap, predicted, true = _soft_counts(logits, target, config)
    if config.dice_empty == "legacy":
        return (1 - 2 * overlap / (predicted + true + LEGACY_EPSILON)).mean(1)
    smooth = config.dice_smooth
    return (1 - (2 * overlap + smooth) / (predicted + true + smooth)).mean(1)


def tversky(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return one minus the mean soft Tversky index over classes, (B,).

    Source: Salehi et al. 2017, arXiv:1706.05721.
    """
    overlap, predicted, true = _soft_counts(logits, target, config)
    wrong = config.tversky_alpha * (predicted - overlap) + config.tversky_beta * (true - overlap)
    return (1 - (overlap + config.dice_smooth) / (overlap + wrong + config.dice_smooth)).mean(1)


def focal(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return cross-entropy (binary where classes do not exclude each other) that counts hard pixels more, (B,).

    Source: Lin et al. 2017, arXiv:1708.02002.
    """
    if target.exclusive:
        log_right = F.log_softmax(logits, 1)
        surprise = -(target.onehot * (1 - log_right.exp()) ** config.focal_gamma * log_right)
        return _mean_over_pixels(_weighted(surprise, config).sum(1, keepdim=True), target.valid)
    log_right = F.logsigmoid(torch.where(target.onehot > 0, logits, -logits))
    surprise = -((1 - log_right.exp()) ** config.focal_gamma) * log_right
    return _mean_over_pixels(_weighted(surprise, config), target.valid)


def lovasz(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return the mean over classes of the Lovasz extension of one minus the IoU, (B,).

    Classes that exclude each other count in the images they occur in; others count always.
    Source: Berman et al. 2018, arXiv:1705.08790.
    """
    probability, onehot = _of_interest(_probability(logits, target), target.onehot, target, config)
    truth = onehot.flatten(2)
    error = ((truth - probability.flatten(2)) * target.valid.flatten(2)[:, : truth.shape[1]]).abs()
    error, order = error.sort(dim=2, descending=True)
    cost = (error * _lovasz_gradient(truth.gather(2, order))).sum(2)  # (B, K)
    counts = (truth.amax(2) if target.exclusive else torch.ones_like(cost)).detach()
    return (cost * counts).sum(1) / counts.sum(1).clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Target, Loss], Tensor]] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "dice": dice,
    "focal": focal,
    "tversky": tversky,
    "lovasz": lovasz,
}


def _probability(logits: Tensor, target: Target) -> Tensor:
    return logits.softmax(1) if target.exclusive else logits.sigmoid()


def _weighted(values: Tensor, config: Loss) -> Tensor:
    """Multiply (B, K, H, W) by the weights of the classes."""
    if not config.class_weights:
        return values
    if len(config.class_weights) != values.shape[1]:
        raise ValueError(f"class_weights: got {len(config.class_weights)}; expected one for each of {values.shape[1]}")
    return values * values.new_tensor(config.class_weights).view(1, -1, 1, 1)


def _mean_over_pixels(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of (B, K, H, W) over all but ignored places, (B,); 0 where all are ignored."""
    return (values * valid).sum((1, 2, 3)) / valid.expand_as(values).sum((1, 2, 3)).clamp(min=1)


def _soft_counts(logits: Tensor, target: Target, config: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Return overlap, predicted and true area of each class, (B, K); of the whole batch in each row when pooled."""
    probability, onehot = _of_interest(_probability(logits, target) * target.valid, target.onehot, target, config)
    counts = ((probability * onehot).sum((2, 3)), probability.sum((2, 3)), onehot.sum((2, 3)))
    if config.dice_pooling == "image":
        return counts
    overlap, predicted, true = (count.sum(0, keepdim=True).expand_as(count) for count in counts)
    return overlap, predicted, true


def _of_interest(probability: Tensor, onehot: Tensor, target: Target, config: Loss) -> tuple[Tensor, Tensor]:
    """Leave out class 0 where it is background that shall not count."""
    if target.exclusive and not config.dice_background and onehot.shape[1] > 1:
        return probability[:, 1:], onehot[:, 1:]
    return probability, onehot


def _lovasz_gradient(truth: Tensor) -> Tensor:
    """Return by how much the IoU loss grows with each further error, for truth (B, K, P) sorted by falling error."""
    total = truth.sum(2, keepdim=True)
    loss = 1 - (total - truth.cumsum(2)) / (total + (1 - truth).cumsum(2))
    return torch.cat([loss[..., :1], loss[..., 1:] - loss[..., :-1]], 2)
