"""The epoch loop: plain PyTorch, a generator that whoever pulls it may leave at any epoch.

Each epoch draws from its own seed, made of the config's seed and the epoch's number. Whatever the puller does between
epochs (evaluate, train another network) changes nothing, and a resumed run needs no state of random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from segmentation import checkpoints, economy, ranks, strategy
from segmentation.epoch import Epoch, NonFiniteError, OutOfMemoryError
from segmentation.networks.parts import EncoderNetwork
from segmentation.strategy import Single, StrategyError
from segmentation.timing import PARTS, Clock

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
NO_BATCH = "epoch {} has no training batch; lower batch_size or give more images"
# A look at the loss makes a GPU wait for the host; on the CPU it costs nothing.
STEPS_BETWEEN_CHECKS_ON_GPU = 50
PEAK = "peak_memory_mib"
"""Metric of an epoch on a GPU; a CPU has none."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained; every workload's Config has these fields."""

    epochs: int = 20
    """Epochs of a whole run."""
    batch_size: int = 8
    """Images in a step, of each process."""
    micro_batch: int = 0
    """Images in one pass of a process; gradients add up to those of batch_size. 0: all of them.
    Batch norm takes its statistics over a pass, so that a network with it learns a little differently."""
    on_oom: Literal["fail", "accumulate"] = "fail"
    """Where the device's memory does not hold a batch. fail: the run ends. accumulate: halve micro_batch and try again;
    what is said there of batch norm holds. One process and ddp (then slower by the exchange of gradients, which no
    longer goes on beside the backward pass) try the step again; fsdp, deepspeed and sync_batchnorm end, to be
    resumed."""
    strategy: strategy.Name = "auto"
    """How several processes train together. auto: ddp where there are several, else single. ddp: each has all.
    fsdp: each has a part of weights, gradients and the optimiser's state. deepspeed: see zero_stage."""
    zero_stage: int = 1
    """What deepspeed spreads over processes. 0: nothing. 1: the optimiser's state. 2: gradients too. 3: weights too."""
    sync_batchnorm: bool = False
    """Several processes: take batch statistics over all of them; on GPUs only."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 1e-4
    """Weight decay."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    """Optimiser."""
    momentum: float = 0.9
    """Momentum of sgd (Nesterov's) and rmsprop; the first beta of adam and adamw."""
    lr_schedule: Literal[
        "none", "plateau", "cosine", "warmup_cosine", "warmup_linear", "onecycle", "restarts", "poly"
    ] = "none"
    """plateau: lower it when val_loss stalls. cosine: fall to lr_min over the run. warmup_cosine: rise first.
    warmup_linear: rise, then fall in a line. onecycle: rise for 30 % of the run, then fall to lr_min. restarts: cosine
    with warm restarts. poly: power 0.9."""
    lr_min: float = 0.0
    """Lowest learning rate of the schedule."""
    plateau_patience: int = 3
    """Validations without improvement that plateau lets pass."""
    plateau_factor: float = 0.3
    """What plateau multiplies the learning rate with."""
    warmup_epochs: float = 1.0
    """Epochs over which warmup_cosine and warmup_linear rise."""
    warmup_steps: int = 0
    """The same in steps; 0: see warmup_epochs."""
    restart_epochs: int = 10
    """Epochs before the first of the restarts."""
    restart_factor: int = 2
    """How many times longer each cycle of restarts is than the one before."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0: any."""
    ema_decay: float = 0.0
    """Decay of a running average of the weights, which then is what is validated and saved; 0: off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that can, else fp32."""
    channels_last: bool = True
    """Keep the channels of a pixel side by side in memory: convolutions are two to three times faster, on CPUs too."""
    compile: bool = False
    """Compile the network by torch.compile; where that fails it runs as it is, with a notice."""
    checkpointing: bool = False
    """Compute the inside of encoder and decoder stages again in the backward pass: less memory, a third slower."""
    profile: bool = False
    """Report time_data, time_forward, time_backward, time_step and time_sync, percentages of an epoch's steps.
    A GPU then waits after each part, which makes it slower."""
    device: str = "auto"
    """auto: a GPU if there is one, else the CPU; or cpu, cuda, cuda:1, mps."""
    deterministic: bool = False
    """Refuse faster algorithms whose results vary from run to run."""
    seed: int = 0
    """Seed of the first weights, the order of images, augmentation and dropout."""
    rewind_epoch: int = 0
    """Keep the weights of this epoch in all later checkpoints, and its own in each earlier one: a network pruned
    afterwards may begin from them again. 0: none."""
    freeze_epochs: int = 0
    """First epochs in which the encoder stays as it is, batch statistics included (networks with a timm encoder, and
    unet3plus)."""
    validate_every: int = 1
    """Validate after every so many epochs, and after the last one; only those are reported."""
    patience: int = 0
    """Stop after this many epochs without improvement; 0: never."""
    patience_unit: Literal["epochs", "validations"] = "epochs"
    """What patience counts."""
    min_delta: float = 1e-5
    """What counts as improvement has to be larger than this."""
    early_stop_metric: str = "val_loss"
    """What has to improve: fall if its name ends in loss, rise otherwise."""
    threads: int = 0
    """CPU threads of PyTorch; 0: as they are."""

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "batch_size", "restart_epochs", "restart_factor", "validate_every")
        check_least(self, 0, "weight_decay", "lr_min", "plateau_patience", "warmup_epochs", "clip_norm", "ema_decay")
        check_least(self, 0, "patience", "min_delta", "threads", "momentum", "seed", "micro_batch")
        check_least(self, 0, "warmup_steps", "freeze_epochs", "rewind_epoch")
        if self.rewind_epoch > self.epochs:
            raise ValueError(f"rewind_epoch: got {self.rewind_epoch}; expected at most epochs, {self.epochs}")
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"zero_stage: got {self.zero_stage}; expected 0, 1, 2 or 3")
        if self.lr <= 0:
            raise ValueError(f"lr: got {self.lr}; expected more than 0")
        for name in ("ema_decay", "momentum", "plateau_factor"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected less than 1")
        if self.plateau_factor <= 0:
            raise ValueError(f"plateau_factor: got {self.plateau_factor}; expected more than 0")


def check_least(config: Any, least: int, *names: str) -> None:
    """Raise ValueError for the first of these values of a config that is less."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: got {getattr(config, name)}; expected {least} or more")


@dataclass(frozen=True)
class Parts:
    """What learns, from what: the arguments of `fit` that a single step needs."""

    model: nn.Module
    """With its first weights."""
    loss: Callable[[Any, Tensor], Tensor]
    train_batches: Callable[[int], Iterable[Batch]]
    """The batches of an epoch, by its number from 1: image, mask, index."""


@dataclass
class Progress:
    """What the loop counts, kept in every checkpoint."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    """Best value of the early-stop metric."""
    best_epoch: int = 0
    stalls: int = 0
    """Epochs, or validations, since the metric improved by more than min_delta."""
    plateau_best: float = math.inf
    plateau_stalls: int = 0
    plateau_scale: float = 1.0
    """What plateau has multiplied the learning rate with so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each epoch, so that a checkpoint alone can show its curves."""
    micro_batch: int = 0
    """What the memory was found to hold, where that is less than the configured one; 0: not looked for."""


@dataclass(frozen=True)
class Outside:
    """Another library that makes the steps of a run, averages gradients over processes and clips them."""

    device: torch.device
    """Where it has moved the network."""
    scaler: torch.amp.GradScaler
    """What it scales losses by; one that is not enabled: they stay as they are."""


@dataclass
class Loop:
    """Everything that one run holds."""

    config: TrainingConfig
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype
    strategy: Single
    average: nn.Module | None
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)
    frozen: bool = False
    """Whether the encoder rests until freeze_epochs are over."""
    closed: bool = False
    rewind: Mapping[str, Tensor] | None = None
    """Weights of rewind_epoch, once it is over."""
    best_model: nn.Module = field(init=False)
    """The network to validate and to save, of the epoch that has just ended."""

    @property
    def micro_batch(self) -> int:
        """Images in one pass."""
        return min(
            size for size in (self.config.batch_size, self.config.micro_batch, self.progress.micro_batch) if size
        )


def fit(
    config: TrainingConfig,
    *,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    train_batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[nn.Module], Mapping[str, float]],
    meta: Mapping[str, Any],
    draw: Callable[[nn.Module, Path], None] | None = None,
    resume: Path | None = None,
    steps_per_epoch: int = 0,
    watch: Callable[[Epoch], None] | None = None,
) -> Iterator[Epoch]:
    """Yield each validated epoch of training: its train_loss, what `validate` returns, and what `reported` names.

    model: with its first weights; it is moved to the config's device and trained in place.
    train_batches: the batches of an epoch, by its number from 1: image, mask, index.
    validate: scores of a network in evaluation mode.
    meta: plain data for the checkpoints; epoch, metrics and stop_reason are added.
    draw: write a picture of what a network predicts.
    resume: checkpoint folder of one of these epochs; the run goes on after it.
    steps_per_epoch: lets the learning rate change with every step; 0: with every epoch.
    watch: is shown every epoch, also those between validations, which have no scores.

    Raises:
        ValueError: if freeze_epochs or warmup_steps are asked for and cannot be had.
        NonFiniteError: if the loss of a step, or val_loss, is nan or infinite.
        CheckpointError: if `resume` is no checkpoint of this network.
        StrategyError: if the strategy does not fit the processes, the machine or the rest of the config.
        OutOfMemoryError: with on_oom accumulate, where the step cannot be tried again in this process; it says which
            micro_batch to go on with.
    """
    with settings(config):
        loop = start(config, model, loss, steps_per_epoch, resume)
        try:
            yield from _epochs(loop, train_batches, validate, meta, draw, watch)
        finally:
            release(loop)


def steps_at(config: TrainingConfig, parts: Parts, rates: Iterable[float]) -> Generator[float]:
    """Yield the loss of one step after the other, each made at the next of these learning rates.

    The loss is that before the step. The network is trained in place, by an optimiser that lives as long.
    """
    config = replace(config, lr_schedule="none", ema_decay=0.0)
    with settings(config):
        loop = start(config, parts.model, parts.loss, 0)
        try:
            seed_everything(config.seed, 1, loop.strategy.rank)
            loop.model.train()
            clock = Clock(loop.device, on=False)
            for rate, (image, mask, index) in zip(rates, _endless(parts.train_batches), strict=False):
                loop.strategy.set_lr(rate)
                yield float(_step(loop, _on(loop.device, image), _on(loop.device, mask), len(index), clock))
        finally:
            release(loop)


def _endless(train_batches: Callable[[int], Iterable[Batch]]) -> Iterator[Batch]:
    for epoch in itertools.count(1):
        empty = True
        for batch in train_batches(epoch):
            empty = False
            yield batch
        if empty:
            raise ValueError(NO_BATCH.format(epoch))


def _epochs(
    loop: Loop,
    train_batches: Callable[[int], Iterable[Batch]],
    validate: Callable[[nn.Module], Mapping[str, float]],
    meta: Mapping[str, Any],
    draw: Callable[[nn.Module, Path], None] | None,
    watch: Callable[[Epoch], None] | None,
) -> Iterator[Epoch]:
    progress = loop.progress
    while not stop_reason(loop.config, progress):
        begin_epoch(loop)
        clock = Clock(loop.device, on=loop.config.profile)
        trained = _train_pass(loop, train_batches(progress.epoch), clock)
        validated = is_validated(loop.config, progress.epoch)
        if validated or watch is not None or progress.epoch <= loop.config.rewind_epoch:
            choose_network(loop)
        scores = _validate(loop, validate) if validated else {}
        metrics = {**trained, **scores, **measured(loop), **clock.percentages()}
        if loop.config.on_oom == "accumulate":
            metrics["micro_batch"] = float(loop.micro_batch)
        end_epoch(loop, metrics, validated=validated)
        epoch = ended_epoch(loop, metrics, meta, draw)
        if watch is not None:
            watch(epoch)
        if validated:
            yield epoch
        if reason := stop_reason(loop.config, progress):
            logger.info("stopped after epoch %d: %s", progress.epoch, reason)


def begin_epoch(loop: Loop) -> None:
    """Make ready for the next epoch's steps."""
    loop.progress.epoch += 1
    seed_everything(loop.config.seed, loop.progress.epoch, loop.strategy.rank)
    loop.strategy.free_network()
    _freeze(loop)
    _forget_peak(loop)


def choose_network(loop: Loop) -> None:
    """Take note of the network to validate and to save, and of its weights where they are to be kept."""
    loop.best_model = loop.strategy.network() if loop.average is None else loop.average
    if loop.progress.epoch <= loop.config.rewind_epoch:
        weights = checkpoints.plain_weights(loop.best_model)
        loop.rewind = {name: tensor.clone() for name, tensor in weights.items()}


def measured(loop: Loop) -> dict[str, float]:
    """Return what an epoch reports besides losses and scores; every rank has to ask."""
    return {"lr": float(loop.strategy.optimizer.param_groups[0]["lr"]), **_peak(loop)}


def end_epoch(loop: Loop, metrics: dict[str, float], *, validated: bool) -> None:
    """Count what an epoch's metrics mean, and remember them; raises as `note`."""
    if validated:
        note(loop.config, loop.progress, metrics)
    loop.progress.history.append(metrics)


def ended_epoch(
    loop: Loop,
    metrics: Mapping[str, float],
    meta: Mapping[str, Any],
    draw: Callable[[nn.Module, Path], None] | None = None,
) -> Epoch:
    """Return the epoch that has just ended."""
    return Epoch(loop.progress.epoch, metrics, _saver(loop, record(loop, metrics, meta)), _drawer(loop, draw))


def record(loop: Loop, metrics: Mapping[str, float], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of the epoch that has just ended."""
    reason, epoch = stop_reason(loop.config, loop.progress), loop.progress.epoch
    return {**meta, "metrics": metrics, "stop_reason": reason, **_batch_record(loop), "epoch": epoch}


def reported(config: TrainingConfig) -> dict[str, str]:
    """Return what `fit` adds to the scores of an epoch, and which way is better."""
    shares = {f"time_{part}": "min" for part in PARTS} if config.profile else {}
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    memory = {PEAK: "min"} if on_gpu else {}
    clipped = {"grad_norm": "min"} if config.clip_norm else {}
    return {"train_loss": "min", "train_loss_std": "min", **clipped, "lr": "max", **memory, **shares}


def _forget_peak(loop: Loop) -> None:
    if loop.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loop.device)


def _peak(loop: Loop) -> dict[str, float]:
    """Return the most memory that PyTorch held on any rank's GPU in this epoch, validation included; else nothing."""
    if loop.device.type != "cuda":
        return {}
    held = torch.cuda.max_memory_allocated(loop.device) / 2**20
    return {PEAK: float(ranks.largest(held, loop.device))}


def is_validated(config: TrainingConfig, epoch: int) -> bool:
    """Return whether an epoch, counted from 1, ends with a validation."""
    return epoch % config.validate_every == 0 or epoch == config.epochs


def resolve_device(name: str) -> torch.device:
    """Return the device of a config: `auto` is a GPU if there is one; among several processes, the one of this rank.

    Raises:
        ValueError: if the device named is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.place()[1] > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}; expected auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, but there are {torch.cuda.device_count()} GPUs; write auto or cpu")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that a config computes in; fp16 needs a GPU and is fp32 elsewhere, with a notice."""
    if name == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else torch.float32
    if name == "fp16" and device.type == "cpu":
        logger.warning("precision: fp16 needs a GPU; this run computes in fp32")
        return torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a network computes in this type; nothing for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed torch, numpy and random with a number made of all three; epoch 0 is for the first weights."""
    mixed = int(np.random.SeedSequence((seed, epoch, rank) if rank else (seed, epoch)).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def build_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the configured optimiser over the parameters that learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.momentum > 0, **shared)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, momentum=config.momentum, **shared)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=(config.momentum, 0.999), fused=True, **shared)


def learning_rate(
    config: TrainingConfig, epochs_done: float, plateau_scale: float = 1.0, steps_per_epoch: int = 0
) -> float:
    """Return the learning rate after so many epochs, fractions included.

    plateau_scale: for plateau alone.
    steps_per_epoch: for warmup_steps alone.
    """
    share = min(epochs_done / config.epochs, 1.0)
    if config.lr_schedule == "plateau":
        return max(config.lr * plateau_scale, min(config.lr_min, config.lr))
    if config.lr_schedule == "cosine":
        return _between(config, _half_cosine(share))
    if config.lr_schedule in ("warmup_cosine", "warmup_linear"):
        warmup = config.warmup_steps / steps_per_epoch if config.warmup_steps else config.warmup_epochs
        return _warmed(config, epochs_done, warmup)
    if config.lr_schedule == "onecycle":
        return _warmed(config, epochs_done, 0.3 * config.epochs)
    if config.lr_schedule == "restarts":
        return _between(config, _half_cosine(_share_of_cycle(config, epochs_done)))
    if config.lr_schedule == "poly":
        return _between(config, (1 - share) ** 0.9)
    return config.lr


def _between(config: TrainingConfig, height: float) -> float:
    return config.lr_min + (config.lr - config.lr_min) * height


def _half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _warmed(config: TrainingConfig, epochs_done: float, warmup: float) -> float:
    """Rise in a line from a hundredth over the warm-up, then fall in a cosine, or a line, until the run ends."""
    if epochs_done < warmup:
        return config.lr * (0.01 + 0.99 * epochs_done / warmup)
    share = min((epochs_done - warmup) / max(config.epochs - warmup, 1e-9), 1.0)
    return _between(config, 1 - share if config.lr_schedule == "warmup_linear" else _half_cosine(share))


def _share_of_cycle(config: TrainingConfig, epochs_done: float) -> float:
    length = float(config.restart_epochs)
    while epochs_done >= length:
        epochs_done -= length
        length *= config.restart_factor
    return epochs_done / length


def note(config: TrainingConfig, progress: Progress, metrics: Mapping[str, float]) -> None:
    """Count what the metrics of a validated epoch mean for early stopping and for plateau.

    Raises:
        ValueError: if the early-stop metric is not among them.
    """
    if config.patience:
        _note_early_stop(config, progress, metrics)
    if config.lr_schedule == "plateau":
        _note_plateau(config, progress, metrics["val_loss"])


def _note_early_stop(config: TrainingConfig, progress: Progress, metrics: Mapping[str, float]) -> None:
    name = config.early_stop_metric
    if name not in metrics:
        raise ValueError(f"early_stop_metric: got {name!r}; this run reports {', '.join(metrics)}")
    sign = 1 if name.endswith("loss") else -1
    value = metrics[name]
    if progress.best is None or sign * value < sign * progress.best - config.min_delta:
        progress.best, progress.best_epoch, progress.stalls = value, progress.epoch, 0
    elif config.patience_unit == "validations":
        progress.stalls += 1
    else:
        progress.stalls = progress.epoch - progress.best_epoch


def _note_plateau(config: TrainingConfig, progress: Progress, value: float) -> None:
    """Follow torch's ReduceLROnPlateau(mode="min", threshold=1e-4): relative improvement, no cooldown."""
    if value < progress.plateau_best * (1 - 1e-4):
        progress.plateau_best, progress.plateau_stalls = value, 0
        return
    progress.plateau_stalls += 1
    if progress.plateau_stalls > config.plateau_patience:
        progress.plateau_scale *= config.plateau_factor
        progress.plateau_stalls = 0


def stop_reason(config: TrainingConfig, progress: Progress) -> str:
    """Return why the run is over, in words, or "" if it is not."""
    if config.patience and progress.stalls >= config.patience:
        return (
            f"early stop: {config.early_stop_metric} has not improved by more than {config.min_delta:g} "
            f"for {progress.stalls} {config.patience_unit}, best {progress.best:.6g} at epoch {progress.best_epoch}"
        )
    return f"finished: {progress.epoch} epochs" if progress.epoch >= config.epochs else ""


def start(
    config: TrainingConfig,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps_per_epoch: int,
    resume: Path | None = None,
    outside: Outside | None = None,
) -> Loop:
    """Return a run before its next epoch; see `fit`, which says what the arguments are and what is raised.

    outside: what makes the steps instead.
    """
    _check_start(config, model, steps_per_epoch)
    device = resolve_device(config.device) if outside is None else outside.device
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = resolve_precision(config.precision, device)
    _check_strategy(config)
    model.to(device=device, memory_format=layout(config, model))  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    # Before the strategy is made, which may cut the weights into parts.
    state = None if resume is None else _weights_and_state(resume, model, average)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16) if outside is None else outside.scaler
    if config.sync_batchnorm and ranks.place()[1] > 1:
        model = _with_sync_batchnorm(model, device)
    if config.checkpointing:
        economy.recompute_stages(model)
    made = strategy.build(
        config.strategy,
        model,
        build_optimizer(config, model),
        scaler,
        config.clip_norm,
        zero_stage=config.zero_stage,
        batch_size=config.batch_size,
        retry=config.on_oom == "accumulate" and not config.sync_batchnorm,
        outside=outside is not None,
    )
    if config.compile:
        _compile(config, model)
    loop = Loop(config, model, loss, device, dtype, made, average, steps_per_epoch)
    if state is not None:
        made.load(state)
        loop.progress = Progress(**state["progress"])
        if resume is not None and checkpoints.has_rewind(resume):
            loop.rewind = checkpoints.load_rewind(resume)
    return loop


def layout(config: TrainingConfig, model: nn.Module) -> torch.memory_format:
    """Return how weights lie in memory; those of volumes' networks stay as they are, PyTorch's name is for images."""
    images = all(parameter.dim() <= 4 for parameter in model.parameters())
    return torch.channels_last if config.channels_last and images else torch.preserve_format


def _check_strategy(config: TrainingConfig) -> None:
    """Refuse what the strategy's way of keeping weights does not allow."""
    if ranks.place()[1] == 1:
        return
    if config.ema_decay and (way := _cuts_weights(config)):
        raise StrategyError(
            f"ema_decay: got {config.ema_decay} with {way}, where no process has all the weights to average; "
            "write strategy: ddp, strategy: deepspeed with zero_stage: 2, or ema_decay: 0"
        )
    if config.freeze_epochs and config.strategy == "deepspeed" and config.zero_stage:
        raise StrategyError(
            f"freeze_epochs: got {config.freeze_epochs} with zero_stage {config.zero_stage}, which moves all weights "
            "in one row and with one count of steps, those that rest too; "
            "write zero_stage: 0, strategy: ddp or fsdp, or freeze_epochs: 0"
        )


def _cuts_weights(config: TrainingConfig) -> str:
    """Return what spreads the weights over processes; empty: nothing does."""
    if config.strategy == "deepspeed" and config.zero_stage == 3:
        return "zero_stage 3"
    return "strategy fsdp" if config.strategy == "fsdp" else ""


def _compile(config: TrainingConfig, model: nn.Module) -> None:
    if ranks.place()[1] > 1 and (way := _cuts_weights(config)):
        logger.warning("compile: not with %s, whose weights come and go; the network runs as it is", way)
        return
    economy.compile_network(model)


def _check_start(config: TrainingConfig, model: nn.Module, steps_per_epoch: int) -> None:
    if config.freeze_epochs and not isinstance(model, EncoderNetwork):
        raise ValueError(
            f"freeze_epochs: got {config.freeze_epochs}, but this network has no encoder that can rest; set it to 0"
        )
    if config.warmup_steps and config.lr_schedule in ("warmup_cosine", "warmup_linear"):
        if not steps_per_epoch:
            raise ValueError(f"warmup_steps: got {config.warmup_steps}, but how many steps an epoch has is not known")
        if (total := steps_per_epoch * config.epochs) <= config.warmup_steps:
            logger.warning("warmup_steps: %d of %d steps; lr never reaches its peak", config.warmup_steps, total)


def _freeze(loop: Loop) -> None:
    """Let the encoder rest in the first epochs and learn after them; the optimiser knows its weights all the time."""
    wanted = loop.progress.epoch <= loop.config.freeze_epochs
    if wanted == loop.frozen:
        return
    assert isinstance(loop.model, EncoderNetwork)
    loop.frozen = wanted
    loop.model.rest(wanted)
    loop.strategy.relearn()


def _with_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise ValueError(f"sync_batchnorm: got true on {device.type}; PyTorch has it for GPUs only, set it to false")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def _train_pass(loop: Loop, batches: Iterable[Batch], clock: Clock) -> dict[str, float]:
    """Run one epoch of steps; return what they came to."""
    loop.model.train()  # here, since whoever made the batches may have thawed a part of the network
    steps = Steps(loop)
    for image, mask, index in clock.waiting(batches, "data"):
        set_lr(loop, len(steps.sizes))
        with clock("data"):
            image, mask = _on(loop.device, image), _on(loop.device, mask)
        steps.add(_step(loop, image, mask, len(index), clock), len(index))
        if steps.due():
            with clock("sync"):
                steps.check()
    with clock("sync"):
        return steps.scores()


class Steps:
    """What the steps of one epoch come to."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.losses: list[Tensor] = []
        self.norms: list[Tensor | float] = []
        self.sizes: list[int] = []
        self.checked = 0

    def add(self, loss: Tensor, count: int) -> None:
        """Take note of a step that was made: the mean loss of its images, and how many there were."""
        self.losses.append(loss)
        self.sizes.append(count)
        if self.loop.strategy.grad_norm is not None:
            self.norms.append(self.loop.strategy.grad_norm)

    def due(self) -> bool:
        """Return whether it is time to look at the losses."""
        every = 1 if self.loop.device.type == "cpu" else STEPS_BETWEEN_CHECKS_ON_GPU
        return len(self.sizes) % every == 0

    def check(self) -> None:
        """Raise NonFiniteError, on every rank at once, if a loss that has not been looked at is no number."""
        if new := self.losses[self.checked :]:
            _check_finite(self.loop, new, len(self.sizes))
            self.checked = len(self.losses)

    def scores(self) -> dict[str, float]:
        """Return the loss's mean over images, its deviation over batches, and what is clipped.

        That is the gradient's mean norm over steps, before they were clipped; those that fp16 skipped are left out.

        Raises:
            ValueError: if there was no step.
            NonFiniteError: as `check`.
        """
        if not self.sizes:
            raise ValueError(NO_BATCH.format(self.loop.progress.epoch))
        self.check()
        values, weights = torch.stack(self.losses).double().cpu(), torch.tensor(self.sizes, dtype=torch.float64)
        # All ranks take the same steps: what they share is the sum, and the number of images, of each of them.
        added, images = ranks.total(torch.stack([values * weights, weights]).to(self.loop.device)).cpu()
        found = {
            "train_loss": float(added.sum() / images.sum()),
            "train_loss_std": float((added / images).std(correction=0)),
        }
        steady = [norm for norm in map(float, self.norms) if math.isfinite(norm)]
        return {**found, "grad_norm": sum(steady) / len(steady)} if steady else found


def _step(loop: Loop, image: Tensor, mask: Tensor, count: int, clock: Clock) -> Tensor:
    """Make the loss of one batch smaller; return it, the mean over this rank's images, still on the device.

    count: images that count; 0 where a rank has none left and only keeps the others company.
    """
    value = (_add_gradients if loop.config.on_oom == "fail" else _fit_gradients)(loop, image, mask, count, clock)
    with clock("step"):
        loop.strategy.step()
        count_step(loop)
    return value


def count_step(loop: Loop) -> None:
    """Count a step that was made, and let the running average follow."""
    loop.progress.step += 1
    _average(loop)


def _add_gradients(loop: Loop, image: Tensor, mask: Tensor, count: int, clock: Clock) -> Tensor:
    """Add up the gradients of a batch's parts; return its loss."""
    made, size = loop.strategy, loop.micro_batch
    parts = list(zip(torch.split(image, size), torch.split(mask, size), strict=True))
    with clock("sync"):
        everywhere = images_everywhere(loop, count)
        missing = int(ranks.largest(len(parts), loop.device)) - len(parts) if _uneven(loop) else 0
    value = torch.zeros((), device=loop.device)
    # A part more than there is counts for nothing: it keeps the others company.
    weights = [len(part) if count else 0 for part, _ in parts] + [0] * missing
    parts += parts[:1] * missing
    for number, ((part, truth), images) in enumerate(zip(parts, weights, strict=True), start=1):
        last = number == len(parts)
        with clock("forward"):
            with autocast(loop.device, loop.dtype):
                output = made.forward(part, last=last)  # logits (B, K, H, W), or Outputs
            loss = loop.loss(output.float(), truth)
        with clock("backward"):
            # Gradients are averaged over ranks, so that the weights of all parts of all ranks sum to their number.
            made.backward(loss * (images * made.world / everywhere), last=last)
        value = value + loss.detach() * (images / max(count, 1))
    return value


def images_everywhere(loop: Loop, count: int) -> Tensor | float:
    """Return how many images all ranks have in a step in which this one has so many."""
    return ranks.total(torch.tensor(float(count), device=loop.device)) if loop.strategy.world > 1 else float(count)


def _uneven(loop: Loop) -> bool:
    """Return whether ranks may cut their shares of a batch into different numbers of parts, and must not."""
    return loop.strategy.world > 1 and loop.strategy.lockstep and loop.micro_batch < loop.config.batch_size


def _fit_gradients(loop: Loop, image: Tensor, mask: Tensor, count: int, clock: Clock) -> Tensor:
    """Do as `_add_gradients`, in passes of half as many images each time that memory is short on any rank.

    Raises:
        OutOfMemoryError: if the ranks may be waiting for each other within a pass, so that it cannot be tried again.
        torch.OutOfMemoryError: if a pass of one image does not fit.
    """
    counted = [buffer.clone() for buffer in loop.model.buffers()]
    while True:
        value, short = None, None
        try:
            value = _add_gradients(loop, image, mask, count, clock)
        except torch.OutOfMemoryError as error:
            short = error.with_traceback(None)  # whose frames hold what has to be freed
        if short is not None and not (loop.strategy.local or loop.strategy.world == 1):
            raise OutOfMemoryError(_halved(loop, short), max(1, loop.micro_batch // 2)) from short
        if not ranks.largest(short is not None, loop.device):
            assert value is not None
            return value
        if loop.micro_batch == 1:
            raise torch.OutOfMemoryError(_halved(loop, short))
        logger.warning("%s", _halved(loop, short))
        loop.progress.micro_batch = loop.micro_batch // 2
        loop.strategy.forget()
        for buffer, before in zip(loop.model.buffers(), counted, strict=True):
            buffer.copy_(before)
        if loop.device.type == "cuda":
            torch.cuda.empty_cache()


def _halved(loop: Loop, short: BaseException | None) -> str:
    """Return in words what a lack of memory leads to."""
    where = f"epoch {loop.progress.epoch} step {loop.progress.step + 1}"
    told = str(short).partition(". ")[0] if short is not None else "another rank ran out of memory"
    if loop.micro_batch == 1:
        return f"{where}: micro_batch 1 does not fit, lower the size of images or of the network ({told})"
    return f"{where}: micro_batch {loop.micro_batch} does not fit, going on with {loop.micro_batch // 2} ({told})"


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, non_blocking=True)


def set_lr(loop: Loop, step: int) -> None:
    """Set the learning rate of a step, counted from 0, of the epoch that runs."""
    if step and not loop.steps_per_epoch:
        return
    share = min(step / loop.steps_per_epoch, 1.0) if loop.steps_per_epoch else 0.0
    epochs_done = loop.progress.epoch - 1 + share
    lr = learning_rate(loop.config, epochs_done, loop.progress.plateau_scale, loop.steps_per_epoch)
    loop.strategy.set_lr(lr)


def _average(loop: Loop) -> None:
    """Move the running average towards the weights; its decay grows to the configured one over the first steps."""
    if loop.average is None:
        return
    decay = min(loop.config.ema_decay, (1 + loop.progress.step) / (10 + loop.progress.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(loop.average.parameters()), list(loop.model.parameters()), 1 - decay)
        for own, other in zip(loop.average.buffers(), loop.model.buffers(), strict=True):
            own.copy_(other)


def _check_finite(loop: Loop, losses: list[Tensor], step: int) -> None:
    """Raise for the first loss that is no number, on every rank at once, naming epoch and step (from 1)."""
    values = torch.stack(losses).tolist()
    mine = not all(map(math.isfinite, values))
    if not ranks.total(torch.tensor(float(mine), device=losses[0].device)):
        return
    if not mine:
        raise NonFiniteError(f"epoch {loop.progress.epoch}: the loss of another rank is not finite")
    index = next(i for i, value in enumerate(values) if not math.isfinite(value))
    raise NonFiniteError(
        f"epoch {loop.progress.epoch} step {step - len(losses) + index + 1}: loss is {values[index]}; "
        "lower lr, set clip_norm, or use precision=fp32"
    )


def _validate(loop: Loop, validate: Callable[[nn.Module], Mapping[str, float]]) -> Mapping[str, float]:
    model = loop.best_model.eval()
    loop.strategy.agree(model)
    with torch.inference_mode(), autocast(loop.device, loop.dtype):
        metrics = validate(model)
    refuse_non_finite(loop, metrics)
    return metrics


def refuse_non_finite(loop: Loop, scores: Mapping[str, float]) -> None:
    """Raise NonFiniteError if the loss of a validation is no number."""
    if not math.isfinite(scores.get("val_loss", 0.0)):
        raise NonFiniteError(f"epoch {loop.progress.epoch}: val_loss is {scores['val_loss']}")


def _saver(loop: Loop, meta: Mapping[str, Any]) -> Callable[[Path], None]:
    epoch = loop.progress.epoch

    def save(folder: Path) -> None:
        if loop.closed or loop.progress.epoch != epoch:
            raise RuntimeError(f"epoch {epoch} is over; save it before the next is pulled and the run is closed")
        state = _state(loop)
        if loop.strategy.rank == 0:
            checkpoints.save(folder, model=loop.best_model, meta=meta, state=state, rewind=loop.rewind)

    return save


def _batch_record(loop: Loop) -> dict[str, int]:
    """Return how many images made a step: of each process, of all of them together, and of one pass."""
    size, world = loop.config.batch_size, loop.strategy.world
    return {
        "world_size": world,
        "batch_per_worker": size,
        "effective_batch": size * world,
        "micro_batch": loop.micro_batch,
    }


def _drawer(loop: Loop, draw: Callable[[nn.Module, Path], None] | None) -> Callable[[Path], None] | None:
    if draw is None:
        return None

    def drawn(path: Path) -> None:
        with torch.inference_mode(), autocast(loop.device, loop.dtype):
            draw(loop.best_model.eval(), path)

    return drawn


def _state(loop: Loop) -> dict[str, Any]:
    """Return all that the run needs to go on, besides the weights in use."""
    state: dict[str, Any] = {"progress": asdict(loop.progress), **loop.strategy.state()}
    if loop.average is not None:
        state["raw_weights"] = loop.model.state_dict()
    return state


def _weights_and_state(folder: Path, model: nn.Module, average: nn.Module | None) -> dict[str, Any]:
    """Fill the network, and its running average, with a checkpoint's weights; return what else it holds."""
    state = checkpoints.load_state(folder)
    checkpoints.load_weights(folder, model if average is None else average)
    if average is not None:
        # A run that averages from here on begins with the weights it was given.
        raw = state.get("raw_weights") or average.state_dict()
        checkpoints.fill(model, raw, source=str(folder))
    return state


@contextlib.contextmanager
def settings(config: TrainingConfig) -> Iterator[None]:
    """Set PyTorch's process-wide switches for the run, and set them back: the process may train others after it."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    benchmark, same = cudnn.benchmark, cudnn.deterministic
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = not config.deterministic, config.deterministic or same
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = benchmark, same


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give the network and the random states back as they were."""
    tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    learning = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            tensor.data = tensors[name]  # not copied, so that device and layout in memory are the old ones too
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learning[name][0]).grad = learning[name][1]
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def release(loop: Loop) -> None:
    """Free what a run holds on its device, for the next one in the process."""
    loop.closed = True
    loop.strategy.release()
    loop.average = None
    economy.drop_compiled(loop.model)
    economy.keep_stages(loop.model)
    if loop.device.type == "cuda":
        loop.model.cpu()
        torch.cuda.empty_cache()
