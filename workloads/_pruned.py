"""Networks that start from a parent's weights and have fewer channels: what workloads with `prune` have in common.

A parent is a checkpoint of the same workload. Its network is taken over, cut by a plan made of its trained weights,
and begins with what `prune.mode` says; training then is fine-tuning. Without a parent the cut is made of fresh weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import configuration
import durable
from segmentation import cache, checkpoints, networks, pruning, training
from segmentation.deployment import measure
from segmentation.epoch import DataError, Epoch
from segmentation.networks import Network
from segmentation.pruning import Channels, Plan, PlanError, Prune, plan, weights
from segmentation.pruning.importance import REDUNDANCY
from segmentation.splits import Splits
from segmentation.training import TrainingConfig
from workloads import _model, _run

UNINHERITED = ("prune",)
"""What a parent is trained without."""
FACTS = tuple(f"{whose}{name}" for whose in ("", "parent.") for name in ("params", "macs", "gmacs"))
"""What constraints can speak of: of the network that is trained, and of the one before the cut."""
TABLE = {
    "params": "params",
    "gmacs": "GMACs",
    "latency_ms": "latency p50 (ms)",
    "latency_ratio": "share of parent latency",
    "mean_dice_no_bg_before": "Dice before training",
    "mean_dice_no_bg": "Dice",
    "mean_dice_before": "Dice with background before",
    "mean_dice": "Dice with background",
}
"""What an evaluation tells of a network beside its parent, and the headings; Dice is without background but where said.
"""
BEFORE = ("mean_dice", "mean_dice_no_bg")
"""Scores that are told of a network as it is before it is trained."""
NO_REWIND = "mode: rewind begins from a parent's early weights; set parent, or write none or random"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrunableConfig(TrainingConfig):
    """What a workload's Config has besides, where its networks can be pruned."""

    network: Network = field(default_factory=Network)
    """Which network, and how large. With a parent: the parent's, whatever stands here if it is not the default."""
    prune: Prune = field(default_factory=Prune)
    """Which channels go."""
    parent: str | None = None
    """Checkpoint, model or run folder whose network and weights training starts from."""
    parent_sha256: str | None = None
    """Hash that the parent's folder was sealed with; null: any."""
    latency: bool = False
    """Report latency_ms: the median time of one image's logits, measured before training."""


C = TypeVar("C", bound=PrunableConfig)


@dataclass(frozen=True)
class Blank:
    """How a workload makes its network, and for which images."""

    build: Callable[[], nn.Module]
    """Makes the whole network with fresh weights."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image; of a volume as the tall image that it travels as."""


@dataclass(frozen=True)
class Job(Blank):
    """What a workload does with a network, besides training it."""

    images: Callable[[], Iterable[Tensor]]
    """Some normalised training images (B, C, H, W) on the CPU, the same on every rank: for batch statistics, and for
    feature maps that are compared."""
    score: Callable[[nn.Module, str], Mapping[str, float]]
    """Scores of a network, on its own device, on a split."""


@dataclass(frozen=True)
class Begun:
    """A network ready to be trained."""

    model: nn.Module
    plan: Plan | None
    """None: nothing was cut."""
    record: Mapping[str, Any]
    """For the checkpoint: widths, what was pruned and how, the parent's digest."""
    costs: Mapping[str, float]
    """params and gmacs."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that others start from."""

    folder: Path
    record: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def inherited(config: C, workload: str, resume: Path | None = None) -> C:
    """Return the configuration with the network of its parent; or of the checkpoint that it goes on from.

    Raises:
        DataError: if there is no such parent, it is another one than its digest says, of another workload, or of
            another network than the configuration asks for.
    """
    if config.parent is None:
        return config
    if resume is not None:  # the parent may be gone
        return dataclasses.replace(config, network=_network(checkpoints.read_meta(resume)))
    found = parent_of(config)
    if found.record.get("workload") != workload:
        raise DataError(f"parent {config.parent}: of workload {found.record.get('workload')!r}; expected {workload!r}")
    return _with_network(config, _network(found.record), config.parent)


def expected(config: C, workload: str, training: C | None) -> C:
    """Return the configuration as `inherited` does, where the parent may still have to be trained.

    training: its configuration.

    Raises:
        DataError: as `inherited`, or where there will be no weights to rewind to.
    """
    if config.parent is not None:
        return inherited(config, workload)
    if config.prune.mode == "rewind" and training is None:
        raise PlanError(NO_REWIND)
    if config.prune.mode == "rewind" and training is not None and not training.rewind_epoch:
        raise DataError("mode: rewind begins from an early epoch of the parent; set parent.train.rewind_epoch")
    return config if training is None else _with_network(config, training.network, "still to be trained")


def _with_network(config: C, network: Network, source: str) -> C:
    """Return the configuration with a parent's network, refused if it asks for another; see `inherited`."""
    bare = networks.without_weights(network)
    if config.network not in (Network(), network, bare):
        both = [(item.name, getattr(config.network, item.name), getattr(bare, item.name)) for item in _FIELDS]
        differing = "; ".join(f"network.{name} {mine!r} is {its!r} there" for name, mine, its in both if mine != its)
        raise DataError(f"parent {source}: another network: {differing}; leave network out, or give its values")
    return dataclasses.replace(config, network=bare)


_FIELDS = dataclasses.fields(Network)


def parent_of(config: PrunableConfig) -> Parent:
    """Return the parent, read once in each process from this machine's own copy.

    Raises:
        DataError: as `inherited`.
    """
    assert config.parent is not None
    folder = _run.checkpoint(Path(config.parent))
    if config.parent_sha256 not in (None, durable.seal_of(folder)):
        raise DataError(
            f"parent {folder}: not the checkpoint that was asked for, whose hash begins {config.parent_sha256:.12}; "
            "put that one back, or start a study of its own"
        )
    return _read(str(folder), checkpoints.identity(folder))


@functools.lru_cache(maxsize=1)
def _read(given: str, identity: str) -> Parent:
    names = (checkpoints.META_FILE, checkpoints.WEIGHTS_FILE, checkpoints.REWIND_FILE)
    folder = cache.local_copy(Path(given), identity, names, check=functools.partial(_check_whole, given))
    return Parent(folder, checkpoints.read_meta(folder), checkpoints.load_tensors(folder))


def _check_whole(given: str, folder: Path) -> None:
    """Refuse the copy of a parent whose files are not those that were saved."""
    try:
        checkpoints.load_tensors(folder)
        if checkpoints.has_rewind(folder):
            checkpoints.load_rewind(folder)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(
            f"parent {given}: its weights are not those that {checkpoints.META_FILE} describes, damaged or half "
            "overwritten; put them back, or name another checkpoint"
        ) from error


def _network(record: Mapping[str, Any]) -> Network:
    """Return the network that a checkpoint's configuration names."""
    values = configuration.without_retired(record["config"])
    mine = {key.removeprefix("network."): value for key, value in values.items() if key.startswith("network.")}
    return configuration.build(Network, mine)


def refuse_seen(config: PrunableConfig, made: Splits) -> None:
    """Raise DataError if a parent has learned from a test sample of today, or was chosen by one."""
    if config.parent is not None:
        _model.refuse_seen(_run.checkpoint(Path(config.parent)), made)


def begin(config: PrunableConfig, job: Job) -> Begun:
    """Return the network that training starts with, on the CPU.

    config: with its parent's network, from `inherited`.

    Raises:
        PlanError: for a plan that cannot be made.
        CheckpointError: if the parent keeps no weights to rewind to, or is damaged.
    """
    whole = whole_network(config, job)
    channels = pruning.trace(whole, *job.shape)
    if not config.prune.active:
        return Begun(whole, None, _origin(config), costs(channels, {}))
    seen = list(job.images()) if config.prune.importance in REDUNDANCY or config.prune.recalibrate else []
    made = pruning.make_plan(config.prune, whole, channels, images=seen, seed=config.seed)
    smaller, told = _weighed(config, job.shape, whole, channels, made)
    if config.prune.mode != "random":
        told["recalibrated_batches"] = weights.recalibrate(smaller, seen, config.prune.recalibrate)
    told |= {f"parent_{name}": value for name, value in costs(channels, {}).items()}
    record = {**_origin(config), "widths": made.widths, "pruned": told}
    return Begun(smaller, made, record, costs(channels, plan.counts(channels, made)))


def resumed(folder: Path, blank: Blank) -> Begun:
    """Return the network of a run that goes on, whose weights are those of a checkpoint; its parent may be gone.

    Raises:
        CheckpointError, PlanError: if the checkpoint is damaged.
    """
    meta = checkpoints.read_meta(folder)
    model = restored(blank.build(), meta, *blank.shape)
    made = plan.read(folder / plan.FILE) if (folder / plan.FILE).is_file() else None
    record: dict[str, Any] = {key: meta[key] for key in ("parent", "widths", "pruned", "constants") if key in meta}
    return Begun(model, made, record, costs(pruning.trace(model, *blank.shape), {}))


def restored(model: nn.Module, record: Mapping[str, Any], *shape: int) -> nn.Module:
    """Return the network of a checkpoint from that of its configuration: of its widths, if it was pruned.

    shape: channels of an image, and its height and width where the network does not take any.
    """
    if not (widths := record.get("widths")):
        return model
    return plan.shrunk(model, pruning.trace(model, *shape), widths)


def facts(config: PrunableConfig, blank: Blank) -> dict[str, float]:
    """Return params, macs and gmacs of the network that `begin` would make, and of the one before the cut: parent.... .

    Where feature maps decide which filters go, l1 stands in for them: of a block as many go.

    Raises:
        PlanError: as `begin`.
    """
    whole = whole_network(config, blank)
    channels = pruning.trace(whole, *blank.shape)
    prune, widths = config.prune, dict[str, int]()
    if prune.active:
        prune = dataclasses.replace(prune, importance="l1") if prune.importance in REDUNDANCY else prune
        widths = plan.counts(channels, pruning.make_plan(prune, whole, channels, seed=config.seed))
    found = {"": costs(channels, widths), "parent.": costs(channels, {})}
    return {
        f"{whose}{name}": value
        for whose, values in found.items()
        for name, value in {**values, "macs": 1e9 * values["gmacs"]}.items()
    }


def check(config: PrunableConfig, blank: Blank) -> None:
    """Refuse a plan that no weights could save: an unknown block, a budget that cannot be met.

    Raises:
        PlanError: as `begin`.
        CheckpointError: if there is nothing to rewind to.
    """
    if config.prune.mode == "rewind" and config.parent is not None:
        checkpoints.check_rewind(_run.checkpoint(Path(config.parent)))
    if config.prune.active or config.prune.blocks or config.prune.where != Prune().where:
        with torch.device("meta"):
            model = blank.build()
        pruning.check(config.prune, model, pruning.trace(model, *blank.shape))


def start(config: PrunableConfig, job: Job, resume: Path | None = None) -> Begun:
    """Return the network that training starts with or goes on with, its record telling what does not change.

    Those `constants` are params, gmacs, latency_ms if asked for, and the scores of a network that does not begin from
    fresh weights as it is before the first step. Raises as `begin` and `resumed`.
    """
    training.seed_everything(config.seed)
    if resume is not None:
        return resumed(resume, job)
    begun = begin(config, job)
    constants = {**begun.costs, **(_latency(config, begun.model, job) if config.latency else {})}
    if config.parent is not None or begun.plan is not None:
        found = _scores_before(config, begun.model, job, "validation")
        constants |= {f"val_{name}": value for name, value in found.items()}
    return dataclasses.replace(begun, record={**begun.record, "constants": constants})


def validator(job: Job, begun: Begun) -> Callable[[nn.Module], dict[str, float]]:
    """Return what an epoch reports of a network: its scores on the validation split, and what does not change."""

    def validate(model: nn.Module) -> dict[str, float]:
        scores = {f"val_{name}": value for name, value in job.score(model, "validation").items()}
        return {**scores, **begun.record["constants"]}

    return validate


def with_plan(epoch: Epoch, begun: Begun) -> Epoch:
    """Return the epoch, its checkpoint with the plan beside it where there is one."""
    made = begun.plan
    return epoch if made is None else _model.with_file(epoch, lambda folder: plan.write(folder / plan.FILE, made))


def reported(config: PrunableConfig) -> dict[str, str]:
    """Return the metrics that do not change over epochs, and which way is better."""
    found = {"params": "min", "gmacs": "min", **({"latency_ms": "min"} if config.latency else {})}
    if config.parent is not None or config.prune.active:
        found |= {f"val_{name}_before": "max" for name in BEFORE}
    return found


def evaluated(checkpoint: Path, config: PrunableConfig, model: nn.Module, job: Job, split: str) -> dict[str, float]:
    """Return what an evaluation tells besides scores: params, gmacs, latency_ms, and of a pruned network more.

    That is what the network before the cut costs, how much of its latency is left, and the scores before training; the
    latter two need the parent, and are left out where it is gone.
    """
    record = checkpoints.read_meta(checkpoint)
    found = costs(pruning.trace(model, *job.shape), {})
    if "pruned" not in record:
        return found | _latency(config, model, job)
    found |= {key: record["pruned"][key] for key in ("parent_params", "parent_gmacs")}
    try:
        whole, before = whole_network(config, job), begin(config, job).model
    except DataError as error:
        logger.warning("%s: no scores from before training, since its parent is gone (%s)", checkpoint, error)
        return found | _latency(config, model, job)
    own, parents = measure.in_turns((model, whole), *job.shape, device=training.resolve_device(config.device))
    found |= {"latency_ms": own, "parent_latency_ms": parents, "latency_ratio": own / parents}
    return found | _scores_before(config, before, job, split)


def sizes(told: Mapping[str, Any]) -> dict[str, int]:
    """Return how many numbers the network had and has, from what an evaluation tells or from a checkpoint's record."""
    now = told["params"] if "params" in told else told["constants"]["params"]
    before = told.get("parent_params", told.get("pruned", {}).get("parent_params", now))
    return {"original": int(before), **({"pruned": int(now)} if before != now else {})}


def _scores_before(config: PrunableConfig, model: nn.Module, job: Job, split: str) -> dict[str, float]:
    """Return the mean Dice of a network before it is trained, with and without background, as NAME_before."""
    model = model.to(training.resolve_device(config.device)).eval()  # outside: what is moved inside never learns again
    with torch.inference_mode():
        found = job.score(model, split)
    return {f"{name}_before": found[name] for name in BEFORE if name in found}


def _latency(config: PrunableConfig, model: nn.Module, job: Job) -> dict[str, float]:
    (found,) = measure.in_turns((model,), *job.shape, device=training.resolve_device(config.device))
    return {"latency_ms": found}


def whole_network(config: PrunableConfig, blank: Blank) -> nn.Module:
    """Return the network before the cut: the parent's with its weights, or a fresh one."""
    if config.parent is None:
        return blank.build()
    found = parent_of(config)
    model = restored(blank.build(), found.record, *blank.shape)
    checkpoints.fill(model, found.weights, source=config.parent)
    return model


def _weighed(
    config: PrunableConfig, shape: tuple[int, int, int], whole: nn.Module, channels: Channels, made: Plan
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the cut network with the weights that the mode gives it, and what is to be told of them."""
    told: dict[str, Any] = {"mode": config.prune.mode, "importance": config.prune.importance}
    if config.prune.mode == "random":
        smaller = pruning.apply(whole, channels, made)
        return smaller, {**told, "drawn": weights.draw(smaller, config.seed)}
    if config.prune.mode == "rewind":
        if config.parent is None:
            raise PlanError(NO_REWIND)
        checkpoints.check_rewind(_run.checkpoint(Path(config.parent)))
        # The plan is that of the trained weights; the early ones are only cut by it.
        early = copy.deepcopy(whole)
        checkpoints.fill(early, checkpoints.load_rewind(parent_of(config).folder), source=f"{config.parent} rewind")
        return pruning.apply(early, pruning.trace(early, *shape), made), told
    return pruning.apply(whole, channels, made), told


def _origin(config: PrunableConfig) -> dict[str, Any]:
    if config.parent is None:
        return {}
    found = parent_of(config)
    widths = {"widths": found.record["widths"]} if "widths" in found.record else {}
    return {"parent": {"folder": config.parent, "sha256": checkpoints.digest(found.folder)}, **widths}


def costs(channels: Channels, kept: Mapping[str, int]) -> dict[str, float]:
    """Return params and gmacs where each origin keeps so many channels, or all."""
    return {"params": float(channels.parameters(kept)), "gmacs": channels.macs(kept) / 1e9}
