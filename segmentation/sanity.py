"""Three checks that tell, before any long training, whether data, network and loss are wired rightly.

A fresh network loses what one that knows nothing loses; it learns one batch by heart; and it learns nothing from images
that are dealt to other samples' masks.
Source: Karpathy 2019, A Recipe for Training Neural Networks, https://karpathy.github.io/2019/04/25/recipe/.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segmentation import losses, training
from segmentation.epoch import DataError
from segmentation.loading import generator
from segmentation.losses import Loss
from segmentation.outputs import Outputs
from segmentation.training import Batch, Parts, TrainingConfig

logger = logging.getLogger(__name__)

STEPS = 1000
"""On one batch, at most."""
SHUFFLED_SHARE = 5
"""Of so many of these steps, one is made on shuffled inputs."""
BATCHES = 4
"""Training batches of which the initial loss is the mean."""
TOLERANCE = 0.1
"""How far the initial loss may be from that of zero logits, as a part of it."""
ACCURACY = 0.95
"""What the network has to reach on one batch, at least."""
STANDARD_ERRORS = 3.0
MARGIN = 0.1
"""By which part of what the baseline gets wrong shuffled inputs may be better, at least."""

Accuracies = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """The samples behind the training batches, by their numbers."""

    as_they_are: Callable[[Sequence[int]], Iterable[Batch]]
    """Batches of some of them in their order: normalised, not augmented, on the config's device."""
    train: Sequence[int]
    validation: Sequence[int]
    groups: Sequence[str]
    """Group of each sample, by its number: no image is dealt to a mask of its own group."""
    ignore_index: int = losses.IGNORE_INDEX


@dataclass(frozen=True)
class Rung:
    """What one check found."""

    name: str
    measured: str
    expected: str
    passed: bool
    meaning: str
    """What is usually wrong where it is not passed."""
    figures: Mapping[str, float]
    """What was measured and expected, as numbers."""


def climb(config: TrainingConfig, parts: Parts, known: Known, *, steps: int = STEPS) -> list[Rung]:
    """Return what the three checks find, each begun with the network as it is given.

    Network, random states and PyTorch's switches are left as they were.

    steps: on one batch at most; a fifth of them are made on shuffled inputs.

    Raises:
        DataError: if no training batch has two classes, or no two training samples can be exchanged.
    """
    found = []
    with training.settings(config):
        for check in (initial_loss, overfit, shuffled):
            with training.restored(parts.model):
                found.append(check(config, parts, known, steps))
            logger.info("%s: %s", found[-1].name, found[-1].measured)
    return found


def initial_loss(config: TrainingConfig, parts: Parts, known: Known, steps: int = STEPS) -> Rung:
    """Compare the network's loss of the first training batches, as a step would see them, with that of zero logits.

    Which class a fresh network happens to favour is luck, and where classes are rare it moves the loss by a quarter. So
    the mean counts over all ways to exchange the classes in turn; where they may share a pixel, over logits and their
    opposites.
    """
    seen: list[tuple[float, ...]] = []
    name, count, squashed = "", 0, False

    def watch(loss: Tensor, output: Any, mask: Tensor) -> None:
        nonlocal name, count, squashed
        logits, multilabel = _logits(output), _multilabel(mask)
        name, count = ("binary cross-entropy", 2) if multilabel else ("cross-entropy", logits.shape[1])
        squashed = squashed or (not multilabel and _is_softmax(logits))
        turned = [parts.loss(other, mask) for other in _exchanged(output, multilabel)]
        blind = parts.loss(_changed(output, torch.zeros_like), mask)
        values = loss, torch.stack(turned).mean(), blind, _entropy(logits, mask, known.ignore_index)
        seen.append((*map(float, values), len(mask)))

    # At a rate of 0 a step is made as always, and moves nothing.
    for _ in training.steps_at(config, _watched(parts, watch), [0.0] * BATCHES):
        pass
    table = np.array(seen)
    loss, exchanged, blind, entropy = np.average(table[:, :4], axis=0, weights=table[:, 4]).tolist()
    ends = "; the logits are probabilities" if squashed else ""
    return Rung(
        name="initial loss",
        measured=f"loss {loss:.4f}, with classes exchanged {exchanged:.4f} ({name} {entropy:.4f}){ends}",
        expected=f"{blind:.4f} +- {TOLERANCE:.0%}, of zero logits ({name} ln {count} = {math.log(count):.4f})",
        passed=abs(exchanged - blind) <= TOLERANCE * blind and not squashed,
        meaning="the last layer begins with too large weights or a bias, the network ends in a softmax though the loss "
        "takes logits, images are not normalised, or the weights come from another training",
        figures={
            "loss": loss,
            "loss_of_classes_exchanged": exchanged,
            "loss_of_zero_logits": blind,
            "entropy": entropy,
            "entropy_of_zero_logits": math.log(count),
        },
    )


def overfit(config: TrainingConfig, parts: Parts, known: Known, steps: int = STEPS) -> Rung:
    """Train on one batch as it is, without dropout, until its pixels are called rightly, as training sees them."""
    batch, majority = _first_batch(parts, known)
    least = max(ACCURACY, (1 + majority) / 2)
    counted: list[tuple[int, int]] = []
    accuracies: list[float] = []
    loss = math.nan

    def watch(loss: Tensor, output: Any, mask: Tensor) -> None:
        right, of = _right(_called(_logits(output), mask), mask, known.ignore_index)
        counted.append((int(right.sum()), int(of.sum())))

    alone = replace(_watched(parts, watch), train_batches=lambda epoch: [batch])
    rates = [config.lr] * (steps + 1)  # each step tells of the network before it
    with _without_dropout(parts.model), contextlib.closing(training.steps_at(config, alone, rates)) as made:
        for loss in made:
            right, of = map(sum, zip(*counted, strict=True))
            accuracies.append(right / of)
            counted.clear()
            if accuracies[-1] > least or not math.isfinite(loss):
                break
    accuracy, made_steps = accuracies[-1], len(accuracies) - 1
    return Rung(
        name="overfit one batch",
        measured=f"accuracy {accuracy:.4f} after {made_steps} steps, loss {loss:.4f}",
        expected=f"more than {least:.4f} in {steps} steps; the most frequent class everywhere has {majority:.4f}",
        passed=accuracy > least,
        meaning="masks do not belong to their images, the loss is of another mask or ignores a class, nothing learns "
        "(frozen weights, a gradient that is cut off), lr is too low or too high, or steps are too few",
        figures={"accuracy": accuracy, "least": least, "majority": majority, "steps": made_steps, "loss": loss},
    )


def shuffled(config: TrainingConfig, parts: Parts, known: Known, steps: int = STEPS) -> Rung:
    """Train on images that are dealt to other samples' masks; score validation, whose pairs are true.

    What can be learned from masks alone is one class everywhere, or the most frequent class at each place. The margin
    is three standard errors of the mean difference over validation samples, each scored both ways; at least a tenth of
    what the baseline gets wrong, for a network may be smoother than what is counted over few masks.
    """
    steps = max(1, steps // SHUFFLED_SHARE)
    classes, loss = 0, math.nan

    def watch(loss: Tensor, output: Any, mask: Tensor) -> None:
        nonlocal classes
        classes = _logits(output).shape[1]

    dealt = replace(_watched(parts, watch), train_batches=dealt_batches(parts, known, config.seed))
    with contextlib.closing(training.steps_at(config, dealt, [config.lr] * steps)) as made:
        for loss in made:
            if not math.isfinite(loss):
                break
    device = training.resolve_device(config.device)
    model, votes = parts.model.to(device).eval(), _votes(known, classes)
    scored = _accuracies(_asked(config, model), known)
    blind = {
        "the most frequent class": _accuracies(_blind(votes.sum((-2, -1), keepdim=True).expand_as(votes)), known),
        "the most frequent class at each place": _accuracies(_blind(votes), known),
    }
    name = max(blind, key=lambda name: float(blind[name].mean()))
    accuracy, baseline = float(scored.mean()), float(blind[name].mean())
    error = float((scored - blind[name]).std(ddof=1)) / math.sqrt(len(scored)) if len(scored) > 1 else 0.0
    margin = max(STANDARD_ERRORS * error, MARGIN * (1 - baseline))
    return Rung(
        name="shuffled inputs",
        measured=f"validation accuracy {accuracy:.4f} after {steps} steps, loss {loss:.4f}",
        expected=f"at most {baseline:.4f} + {margin:.4f}, of {name}",
        passed=math.isfinite(loss) and accuracy <= baseline + margin,
        meaning="the answer reaches the network by another way than a sample's own image: samples that belong together "
        "count as different groups, masks are drawn into images, or the weights come from another training",
        figures={"accuracy": accuracy, "baseline": baseline, "margin": margin, "steps": steps, "loss": loss},
    )


def dealt_batches(parts: Parts, known: Known, seed: int) -> Callable[[int], Iterator[Batch]]:
    """Return training batches in which each image has the mask of another group's sample, dealt anew each epoch.

    Where one group has more than half of a batch, such as a batch of one, images of the batch before take their place.
    """
    group_of = known.groups
    if len({group_of[number] for number in known.train}) < 2:
        group_of = list(map(str, range(len(known.groups))))
    if len(known.train) < 2:
        raise DataError(f"{len(known.train)} training sample; shuffled inputs need two: give more images")

    def of_epoch(epoch: int) -> Iterator[Batch]:
        before: tuple[Tensor, list[str]] | None = None
        for position, (image, mask, index) in enumerate(parts.train_batches(epoch)):
            groups = [group_of[number] for number in index.tolist()]
            order, (images, owners) = derange(groups, generator(seed, epoch, position)), (image, groups)
            if not order and before is not None:
                order, (images, owners) = [row % len(before[1]) for row in range(len(groups))], before
            dealt = [(row, other) for row, other in enumerate(order) if owners[other] != groups[row]]
            if dealt:
                rows, others = map(list, zip(*dealt, strict=True))
                yield images[others], mask[rows], index[rows]
            before = image, groups

    return of_epoch


def derange(groups: Sequence[str], drawn: torch.Generator) -> list[int]:
    """Return for each row another one of another group; none where one group has more than half of the rows."""
    shuffled = torch.randperm(len(groups), generator=drawn).tolist()
    rank = {groups[row]: place for place, row in enumerate(shuffled)}
    together = sorted(shuffled, key=lambda row: rank[groups[row]])
    most = max(map(groups.count, groups))
    if 2 * most > len(groups):
        return []
    shift = int(torch.randint(most, len(groups) - most + 1, (), generator=drawn))
    found = dict(zip(together, together[shift:] + together[:shift], strict=True))
    return [found[row] for row in range(len(groups))]


def _first_batch(parts: Parts, known: Known) -> tuple[Batch, float]:
    """Return the first training batch that has two classes, its samples as they are, and what a single class reaches.

    Of channels that may share a pixel: calling each of them everywhere or nowhere.
    """
    for _, _, index in parts.train_batches(1):
        image, mask, numbers = (torch.cat(each) for each in zip(*known.as_they_are(index.tolist()), strict=True))
        majority = _majority(mask, known.ignore_index)
        if majority < 1:
            return (image, mask, numbers), majority
    raise DataError("no training batch has a pixel of a second class; look at the masks by `inspect`")


def _majority(mask: Tensor, ignore_index: int) -> float:
    """Return the accuracy of the most frequent class of a mask (B, H, W), or of each channel of (B, K, H, W)."""
    channels = mask.transpose(0, 1).flatten(1) if _multilabel(mask) else mask.flatten()[None]
    counts = [torch.bincount(channel[channel != ignore_index]) for channel in channels]
    most, of = sum(int(each.max()) for each in counts if len(each)), sum(int(each.sum()) for each in counts)
    return most / of if of else 1.0


def _votes(known: Known, classes: int) -> Tensor:
    """Return logits (K, H, W) that call what is most frequent at each place of the training masks."""
    votes = torch.zeros(())
    for _, mask, _ in known.as_they_are(known.train):
        shape = torch.empty(len(mask), classes, *mask.shape[-2:], device="meta")
        target = losses.read_target(mask, shape, multilabel=_multilabel(mask), ignore_index=known.ignore_index)
        # Of channels that may share a pixel, for or against; of classes that exclude each other, for.
        votes = votes + (target.onehot if target.exclusive else 2 * target.onehot - target.valid).sum(0)
    return votes


def _blind(votes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda image: votes.expand(len(image), *votes.shape)


def _asked(config: TrainingConfig, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the network as validation asks it."""
    device = training.resolve_device(config.device)
    dtype = training.resolve_precision(config.precision, device)

    def ask(image: Tensor) -> Tensor:
        with torch.inference_mode(), training.autocast(device, dtype):
            logits: Tensor = model(image)
            return logits

    return ask


def _accuracies(logits_of: Callable[[Tensor], Tensor], known: Known) -> Accuracies:
    """Return the share of pixels called rightly on each validation sample, (N,), without those all ignored."""
    found = []
    for image, mask, _ in known.as_they_are(known.validation):
        right, of = _right(_called(logits_of(image), mask), mask, known.ignore_index)
        found.append((right[of > 0] / of[of > 0]).double().cpu().numpy())
    return np.concatenate(found)


def _called(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the class of each pixel (B, H, W), or for each class whether it is called, (B, K, H, W)."""
    return (logits > 0).long() if _multilabel(mask) else logits.argmax(1)


def _right(called: Tensor, mask: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return how many pixels of each sample are called rightly, and of how many, (B,) each."""
    known = mask != ignore_index
    return ((called == mask) & known).flatten(1).sum(1), known.flatten(1).sum(1)


def _multilabel(mask: Tensor) -> bool:
    return mask.dim() == 4


def _entropy(logits: Tensor, mask: Tensor, ignore_index: int) -> Tensor:
    multilabel = _multilabel(mask)
    chosen = Loss(ce=float(not multilabel), bce=float(multilabel), dice=0)
    return losses.build(chosen, multilabel=multilabel, ignore_index=ignore_index)(logits, mask)


def _logits(output: Tensor | Outputs) -> Tensor:
    return output.logits if isinstance(output, Outputs) else output


def _changed(output: Tensor | Outputs, change: Callable[[Tensor], Tensor]) -> Tensor | Outputs:
    """Return an output of the same kind, of which each tensor is changed."""
    if not isinstance(output, Outputs):
        return change(output)
    presence = None if output.presence is None else change(output.presence)
    return Outputs(change(output.logits), tuple(map(change, output.auxiliary)), presence)


def _exchanged(output: Tensor | Outputs, multilabel: bool) -> list[Tensor | Outputs]:
    """Return an output as it is, and with what it says of each class said of every other (multilabel: its opposite)."""
    if multilabel:
        return [output, _changed(output, torch.neg)]
    classes = _logits(output).shape[1]
    return [_changed(output, functools.partial(torch.roll, shifts=turn, dims=1)) for turn in range(classes)]


def _is_softmax(logits: Tensor) -> bool:
    """Return whether logits (B, K, H, W) are probabilities already: at each pixel none below 0, and their sum 1."""
    return bool((logits >= 0).all()) and bool(torch.allclose(logits.sum(1), logits.new_ones(()), atol=1e-3))


def _watched(parts: Parts, watch: Callable[[Tensor, Any, Tensor], None]) -> Parts:
    """Return the same parts, whose loss shows what a step sees: the loss, the network's output, the mask."""

    def loss(output: Any, mask: Tensor) -> Tensor:
        value = parts.loss(output, mask)
        with torch.no_grad():
            watch(value, output, mask)
        return value

    return replace(parts, loss=loss)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Let nothing be dropped: no channels (PyTorch's dropout), no paths (timm's stochastic depth)."""
    kind = nn.modules.dropout._DropoutNd
    dropping = [(module, "p" if isinstance(module, kind) else "drop_prob") for module in model.modules()]
    dropping = [(module, name) for module, name in dropping if hasattr(module, name)]
    before = [getattr(module, name) for module, name in dropping]
    for module, name in dropping:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for (module, name), value in zip(dropping, before, strict=True):
            setattr(module, name, value)
