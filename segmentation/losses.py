"""Losses as plain functions of logits and a target, and their weighted sum.

Each function returns one number an image, (B,), so that a sum over images does not depend on how they were batched; a
loss for training is the mean. Ignored pixels count for nothing, in every loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.outputs import Outputs

IGNORE_INDEX = 255
LEGACY_EPSILON = 1e-6
# Wang et al. 2003: weight of each scale, finest first, and side and width of the Gaussian window.
SSIM_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
SSIM_LEAST = 1e-4


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
    iou: float = 0.0
    """Weight of the soft IoU (Jaccard) loss."""
    ms_ssim: float = 0.0
    """Weight of the multi-scale structural similarity loss, which looks at outlines."""
    aux_weight: float = 0.4
    """Weight of the mean loss of a network's auxiliary logits (network.deep_supervision)."""
    aux_decay: bool = False
    """Whether in that mean each level weighs half of the next finer one."""
    presence: float = 1.0
    """Weight of the binary cross-entropy of which classes an image has (network.guided)."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in ce, bce and focal; empty: all 1."""
    dice_empty: Literal["smooth", "legacy"] = "smooth"
    """smooth: a class that is neither there nor predicted costs 0. legacy: an absent class costs 1 whatever comes."""
    dice_smooth: float = 1.0
    """Pixels added above and below the line in dice, tversky and iou (not in legacy)."""
    dice_pooling: Literal["image", "batch"] = "image"
    """Whether dice, tversky and iou are taken of each image or of the batch as one."""
    dice_background: bool = True
    """Whether class 0 counts in dice, tversky, lovasz, iou and ms_ssim (classes that exclude each other)."""
    focal_gamma: float = 2.0
    """How much less a pixel counts that is already right."""
    focal_alpha: float = 1.0
    """What the focal loss is multiplied by, all classes alike."""
    tversky_alpha: float = 0.3
    """Weight of false positives."""
    tversky_beta: float = 0.7
    """Weight of false negatives."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in LOSSES}
        for name in (*weights, "focal_gamma", "focal_alpha", "tversky_alpha", "tversky_beta", "aux_weight", "presence"):
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


def build(
    config: Loss, *, multilabel: bool, ignore_index: int = IGNORE_INDEX
) -> Callable[[Tensor | Outputs, Tensor], Tensor]:
    """Return the weighted loss of a batch, a scalar: the mean of `build_per_image`.

    Raises:
        ValueError: for cross-entropy between classes that do not exclude each other.
    """
    per_image = build_per_image(config, multilabel=multilabel, ignore_index=ignore_index)

    def loss(output: Tensor | Outputs, mask: Tensor) -> Tensor:
        return per_image(output, mask).mean()

    return loss


def build_per_image(
    config: Loss, *, multilabel: bool, ignore_index: int = IGNORE_INDEX
) -> Callable[[Tensor | Outputs, Tensor], Tensor]:
    """Return the weighted loss of each image, (B,).

    It reads logits (B, K, H, W), or Outputs of which each part has its own term, and a mask (B, H, W) or (B, K, H, W).
    """
    if multilabel and config.ce:
        raise ValueError("ce: cross-entropy needs classes that exclude each other; set ce=0 and give bce a weight")
    terms = [(getattr(config, name), function) for name, function in LOSSES.items() if getattr(config, name)]

    def of_logits(logits: Tensor, target: Target) -> Tensor:
        values = [weight * function(logits.float(), target, config) for weight, function in terms]
        return torch.stack(values).sum(0)

    def loss(output: Tensor | Outputs, mask: Tensor) -> Tensor:
        output = output if isinstance(output, Outputs) else Outputs(output)
        target = read_target(mask, output.logits, multilabel=multilabel, ignore_index=ignore_index)
        value = of_logits(output.logits, target)
        # At weight 0 too: processes that train together expect a gradient of every parameter.
        if output.auxiliary:
            found = torch.stack([of_logits(logits, target) for logits in output.auxiliary])
            value = value + config.aux_weight * (auxiliary_shares(config, len(found)).to(found)[:, None] * found).sum(0)
        if output.presence is not None:
            value = value + config.presence * presence(output.presence.float(), target)
        return value

    return loss


def auxiliary_shares(config: Loss, count: int) -> Tensor:
    """Return the share of each level's auxiliary loss in their mean, (count,), finest first."""
    weights = torch.tensor([0.5**level if config.aux_decay else 1.0 for level in range(count)])
    return weights / weights.sum()


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
        return config.focal_alpha * _mean_over_pixels(_weighted(surprise, config).sum(1, keepdim=True), target.valid)
    log_right = F.logsigmoid(torch.where(target.onehot > 0, logits, -logits))
    surprise = -((1 - log_right.exp()) ** config.focal_gamma) * log_right
    return config.focal_alpha * _mean_over_pixels(_weighted(surprise, config), target.valid)


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


def iou(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return one minus the mean soft IoU over classes, (B,)."""
    overlap, predicted, true = _soft_counts(logits, target, config)
    smooth = config.dice_smooth
    return (1 - (overlap + smooth) / (predicted + true - overlap + smooth)).mean(1)


def ms_ssim(logits: Tensor, target: Target, config: Loss) -> Tensor:
    """Return one minus the mean over classes of the structural similarity of probabilities and mask, (B,).

    Windows end at the image's edge and at ignored pixels, as if these were outside; five scales, fewer where a side
    would become shorter than the window.
    Source: Wang, Simoncelli, Bovik 2003, Multi-scale structural similarity; in a hybrid loss, arXiv:2004.08790.
    """
    probability, onehot = _of_interest(_probability(logits, target), target.onehot, target, config)
    valid = target.valid[:, : onehot.shape[1]].expand_as(onehot)
    present = valid.amax((2, 3))  # (B, K)
    weights = _scale_weights(min(onehot.shape[2:]))
    similarity = torch.ones_like(present)
    for scale, weight in enumerate(weights):
        luminance, structure = _similarity(probability, onehot, valid)
        last = scale == len(weights) - 1
        found = _weighted_mean(luminance * structure if last else structure, valid)
        # A power below 1 of a number near 0 or less has no gradient to go by.
        similarity = similarity * (found if len(weights) == 1 else found.clamp(min=SSIM_LEAST) ** weight)
        if not last:
            probability, onehot, valid = _halved(probability, onehot, valid)
    return ((1 - similarity) * present).mean(1)


def presence(logits: Tensor, target: Target) -> Tensor:
    """Return the mean over classes of the binary cross-entropy of whether they occur in the image, (B,).

    logits: (B, K).
    """
    occurs = target.onehot.amax((2, 3))
    surprise = F.binary_cross_entropy_with_logits(logits, occurs, reduction="none")
    return (surprise * target.valid.amax((2, 3))).mean(1)


LOSSES: dict[str, Callable[[Tensor, Target, Loss], Tensor]] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "dice": dice,
    "focal": focal,
    "tversky": tversky,
    "lovasz": lovasz,
    "iou": iou,
    "ms_ssim": ms_ssim,
}


def named(name: str) -> Loss:
    """Return one of the losses of the basic_UNet system by its name, such as ce_dice.

    Its Dice is that of softmax, without background, of the batch as one.

    Raises:
        ValueError: for a name that is none of `NAMED`.
    """
    if name not in NAMED:
        raise ValueError(f"got {name!r}; expected one of {', '.join(NAMED)}")
    ce, dice, focal = NAMED[name]
    return Loss(
        ce=ce,
        dice=dice,
        focal=focal,
        dice_background=False,
        dice_pooling="batch",
        dice_smooth=1e-6,
        focal_gamma=2.0,
        focal_alpha=0.25,
    )


NAMED: dict[str, tuple[float, float, float]] = {
    "ce": (1.0, 0.0, 0.0),
    "dice": (0.0, 1.0, 0.0),
    "ce_dice": (0.7, 0.3, 0.0),
    "focal": (0.0, 0.0, 1.0),
    "dice_focal": (0.0, 0.5, 0.5),
}
"""What ce, dice and focal weigh in each of them."""


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


def _scale_weights(side: int) -> list[float]:
    """Return the weight of each scale whose images are not smaller than the window, of one at least; their sum is 1."""
    count = max(1, sum(side >> scale >= SSIM_WINDOW for scale in range(len(SSIM_SCALES))))
    used = SSIM_SCALES[:count]
    return [weight / sum(used) for weight in used]


def _similarity(first: Tensor, second: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return luminance, and contrast times structure, around each pixel; all are (B, K, H, W)."""
    maps = torch.stack([first, second, first * first, second * second, first * second]) * valid
    mass = _blurred(valid).clamp(min=1e-6)
    mean_1, mean_2, square_1, square_2, product = (_blurred(each) / mass for each in maps)
    variances = square_1 - mean_1**2 + square_2 - mean_2**2
    luminance = (2 * mean_1 * mean_2 + SSIM_C1) / (mean_1**2 + mean_2**2 + SSIM_C1)
    structure = (2 * (product - mean_1 * mean_2) + SSIM_C2) / (variances + SSIM_C2)
    return luminance, structure


def _blurred(maps: Tensor) -> Tensor:
    """Return the weighted sum of (..., H, W) under the window around each pixel, with nothing outside the image.

    By shifted sums: as a convolution it would be rounded (autocast, TF32) more than variances bear.
    """
    half = SSIM_WINDOW // 2
    heights = [math.exp(-(distance**2) / (2 * SSIM_SIGMA**2)) for distance in range(-half, half + 1)]
    for axis, pad in ((-2, (0, 0, half, half)), (-1, (half, half))):
        padded, size = F.pad(maps, pad), maps.shape[axis]
        shifted = (height / sum(heights) * padded.narrow(axis, at, size) for at, height in enumerate(heights))
        maps = sum(shifted, maps.new_zeros(()))
    return maps


def _halved(first: Tensor, second: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both at half the resolution, averaged over what is valid, and how much of each new pixel that is."""
    share = F.avg_pool2d(valid, 2, ceil_mode=True)
    halves = [F.avg_pool2d(each * valid, 2, ceil_mode=True) / share.clamp(min=1e-6) for each in (first, second)]
    return halves[0], halves[1], share


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of (B, K, H, W) over pixels, (B, K)."""
    return (values * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
