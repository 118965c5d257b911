"""PyTorch Lightning as a second way in: the same networks, data, losses and metrics, for a `Trainer` of one's own.

    module, data = TileModule(config), TileDataModule(config)
    trainer(config, Path("models/SegmentationCNN")).fit(module, data)

Everything is this project's own: what an epoch's batches are, when the learning rate changes, what is averaged, counted
and scored. A Trainer makes the steps, and decides about devices, precision and processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import configuration
from configuration import ConfigError
from segmentation import checkpoints, losses, normalisation, ranks, splits, training
from segmentation.checkpoints import CheckpointError
from segmentation.training import Batch, Loop, Outside, Progress, Steps
from workloads import _model, esd
from workloads._esd import dataset, scoring
from workloads._esd.scoring import Scorer
from workloads.esd import Config

try:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, ModelSummary
    from pytorch_lightning.loggers import Logger, WandbLogger
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} not installed; pip install 'segmentation-search[lightning]'", name=error.name
    ) from error

logger = logging.getLogger(__name__)

KEPT = "segmentation"
"""What a .ckpt of Lightning holds more, under this name: counters, averages, and what describes it."""
PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
SHOWN = ("train_loss", "val_mean_iou")
"""What a progress bar shows."""
LOGGERS = ("pytorch_lightning", "lightning_fabric")


class TileModule(LightningModule):
    """A network of the ESD, and how it learns; `load_from_checkpoint` gives it back with its weights, without data.

    Where a running average is configured it is validated and saved; a .ckpt holds what it takes to go on, too.
    """

    network: nn.Module

    def __init__(self, config: Config | Mapping[str, Any], in_channels: int = 0) -> None:
        """Build the network.

        config: a Config, or values of it under dotted or nested names.
        in_channels: of images; 0: as the data has, from which weights to start with are then also loaded.

        Raises:
            ConfigError, ValueError: for values that cannot be, or not with Lightning.
            DataError: if the data, or weights to start from, cannot be used.
        """
        super().__init__()
        self.config = configured(config)
        if in_channels:
            network = esd.without_weights(self.config, {"in_channels": in_channels})
        else:
            samples, _ = dataset.load_once(self.config.data)
            network, in_channels = esd.first_network(self.config, samples), samples.shape(0)[0]
        self.network = network.to(memory_format=training.layout(self.config, network))
        self.loss = losses.build(self.config.loss, multilabel=False)
        self.save_hyperparameters({"config": configuration.to_values(self.config), "in_channels": in_channels})
        self.resume: Path | None = None
        """A checkpoint folder to go on from; a Trainer's own way to go on is its ckpt_path."""
        self.loop: Loop | None = None
        """What is counted while it learns; made by configure_optimizers."""
        self.steps: Steps | None = None
        """Of the epoch that runs."""
        self.metrics: dict[str, float] = {}
        """What the last epoch reported."""
        self._scores: dict[str, float] = {}
        self._scorer: Scorer | None = None
        self._last_loss = torch.zeros(())
        self._loaded: dict[str, Any] = {}

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, h, w) of the cells of images (B, C, H, W), scaled as `TileDataModule` scales them."""
        logits: Tensor = self.network(image)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the configured optimiser; its learning rate is set before each step, by the configured schedule."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False) if scaler is None else scaler
        self.trainer.fit_loop.setup_data()  # or it is not known how many batches there are
        steps = self.trainer.num_training_batches
        self.loop = training.start(
            self.config,
            self.network,
            self.loss,
            int(steps) if math.isfinite(steps) else 0,
            self.resume,
            Outside(self.device, scaler),
        )
        if self._loaded:
            self.loop.progress, self.loop.rewind = Progress(**self._loaded["progress"]), self._loaded["rewind"]
            if raw := self._loaded["raw_weights"]:
                self.network.load_state_dict(raw)
            self._loaded = {}
        return self.loop.strategy.optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, by which the weights learn.

        Several processes average their gradients, so that each weighs its own by the images it has.
        """
        image, mask, index = batch
        logits = self(image)
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor = self.loss(logits.float(), mask)
        self._last_loss = loss.detach()
        if self.loop is None:
            return loss
        everywhere = training.images_everywhere(self.loop, len(index))
        return loss * (len(index) * self.loop.strategy.world / everywhere)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to what is scored when all have been seen."""
        assert self._scorer is not None
        image, mask, index = batch
        self._scorer.add(self._chosen()(image), mask, index)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do as `validation_step`."""
        self.validation_step(batch, batch_idx)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the configuration's clip_norm, or else as the Trainer was told."""
        if not self.config.clip_norm:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if gradient_clip_val:
            raise ValueError(
                f"gradient_clip_val: got {gradient_clip_val} in the Trainer and clip_norm {self.config.clip_norm}; "
                "give one of them"
            )
        assert self.loop is not None
        # Lightning leaves to optimisers that can what it does for all others.
        made = self.loop.strategy
        made.clip(scaled=getattr(made.optimizer, "_step_supports_amp_scaling", False))

    def on_fit_start(self) -> None:
        """Refuse a callback that monitors what is never logged."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if (monitor := getattr(callback, "monitor", None)) is not None:
                check_monitor(self.config, monitor, type(callback).__name__)

    def on_train_start(self) -> None:
        """End a run at once that had come to its end before."""
        assert self.loop is not None
        if training.stop_reason(self.config, self.loop.progress):
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Begin an epoch as the project's own loop does."""
        assert self.loop is not None
        training.begin_epoch(self.loop)
        self.loop.model.train()
        self.steps, self._scores = Steps(self.loop), {}
        if self.config.validate_every > 1:
            due = training.is_validated(self.config, self.loop.progress.epoch)
            # The Trainer validates where this divides the epoch's number, the last epoch's or not.
            self.trainer.check_val_every_n_epoch = 1 if due else self.trainer.current_epoch + 2

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate."""
        assert self.loop is not None
        training.set_lr(self.loop, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the step, and look whether its loss is a number."""
        assert self.loop is not None and self.steps is not None
        training.count_step(self.loop)
        self.steps.add(self._last_loss, len(batch[2]))
        if self.steps.due():
            self.steps.check()

    def on_validation_epoch_start(self) -> None:
        """Begin to score, all processes with the same buffers."""
        ranks.broadcast(self._chosen().buffers())
        self._scorer = Scorer(self.config.loss)

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all of an epoch, and end it where its steps are over."""
        assert self._scorer is not None
        if self.trainer.sanity_checking:
            return
        self._scores = scoring.epoch_scores(self._scorer.whole())
        self._log(self._scores)
        if self.steps is None or self.loop is None:
            return
        training.refuse_non_finite(self.loop, self._scores)
        if len(self.steps.sizes) >= self.trainer.num_training_batches:
            self._end_epoch()

    def on_train_epoch_end(self) -> None:
        """End an epoch that had no validation behind its last step."""
        if self.steps is not None:
            self._end_epoch()

    def on_train_end(self) -> None:
        """Say why a run is over."""
        assert self.loop is not None
        if self.metrics and (reason := training.stop_reason(self.config, self.loop.progress)):
            logger.info("stopped after epoch %d: %s", self.loop.progress.epoch, reason)

    def on_test_epoch_start(self) -> None:
        """Begin to score."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split as test_..."""
        assert self._scorer is not None
        self._log(scoring.epoch_scores(self._scorer.whole(), "test_"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to go on, and what describes the network; averaged weights where there are some."""
        if self.loop is None:
            return
        raw, average = None, self.loop.average
        if average is not None:
            raw = self.network.state_dict()
            checkpoint["state_dict"] = {f"network.{name}": tensor for name, tensor in average.state_dict().items()}
        kept = {"progress": dataclasses.asdict(self.loop.progress), "raw_weights": raw, "rewind": self.loop.rewind}
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TileDataModule):
            kept["record"] = training.record(self.loop, self.metrics, data.meta())
            kept["splits"] = dataclasses.asdict(data.splits)
        checkpoint[KEPT] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what it takes to go on, where a Trainer does."""
        if self._trainer is not None:
            self._loaded = checkpoint.get(KEPT, {})

    def _chosen(self) -> nn.Module:
        """Return the network to validate."""
        average = None if self.loop is None else self.loop.average
        return self.network if average is None else average.eval()

    def _end_epoch(self) -> None:
        """Count and log the epoch, and stop where it was the last."""
        assert self.loop is not None and self.steps is not None
        training.choose_network(self.loop)
        told = {**self.steps.scores(), **training.measured(self.loop)}
        self.metrics, self.steps = {**told, **self._scores}, None
        training.end_epoch(self.loop, self.metrics, validated=bool(self._scores))
        self._log(told)
        if training.stop_reason(self.config, self.loop.progress):
            self.trainer.should_stop = True

    def _log(self, values: Mapping[str, float]) -> None:
        """Log numbers that are the same in all processes, as Lightning cannot know."""
        for name, value in values.items():
            self.log(name, value, prog_bar=name in SHOWN, sync_dist=True)


class TileDataModule(LightningDataModule):
    """The subtiles of the ESD in the batches that the project's own loop has: by seed and epoch, a share a process."""

    def __init__(self, config: Config | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = configured(config)

    def prepare_data(self) -> None:
        """Process and decode the tiles, once for this machine; raises DataError naming what cannot be used."""
        dataset.load_once(self.config.data)

    def setup(self, stage: str | None = None) -> None:
        """Open the subtiles."""
        self.samples, self.splits = dataset.load_once(self.config.data)
        self.normaliser = normalisation.build(self.config.normalise, self.samples, self.splits.train)

    def train_dataloader(self) -> Loader:
        """Return the training batches, shuffled and augmented: image (B, C, H, W), mask (B, h, w), index."""
        config = dataclasses.replace(self.config, device=str(self._device()))
        of_epoch = _model.training_batches(config, self.samples, self.splits, self.normaliser)
        return Loader(lambda: of_epoch(self._epoch()), _model.steps_per_epoch(config, self.splits))

    def val_dataloader(self) -> Loader:
        """Return the validation batches, as they are."""
        return self._in_order(splits.indices(self.splits, "validation"))

    def test_dataloader(self) -> Loader:
        """Return the test batches; only inside `splits.test_split_open()`, or TestSplitError is raised."""
        return self._in_order(splits.indices(self.splits, "test"))

    def meta(self) -> dict[str, Any]:
        """Return what makes a checkpoint describe itself."""
        return esd.meta(self.config, self.samples, self.normaliser)

    def _in_order(self, indices: Sequence[int]) -> Loader:
        """Return batches of which every process has as many: Lightning's processes wait for each other in each."""
        size = self.config.evaluation_batch

        def batches() -> Iterator[Batch]:
            return _model.evaluation_batches(
                self.samples,
                indices,
                self.normaliser,
                batch_size=size,
                device=self._device(),
                loader_workers=self.config.loader_workers,
                place=ranks.place(),
            )

        return Loader(batches, -(-len(indices) // (size * ranks.place()[1])))

    def _device(self) -> torch.device:
        device: torch.device | None = None if self.trainer is None else self.trainer.strategy.root_device
        return training.resolve_device(self.config.device) if device is None else device

    def _epoch(self) -> int:
        return 1 if self.trainer is None else self.trainer.current_epoch + 1


class Loader:
    """Batches that are made anew each time they are asked for; how many there are is known."""

    def __init__(self, make: Callable[[], Iterator[Batch]], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        # Nothing is made before the first is taken: Lightning asks some loaders twice, the first time in vain.
        yield from self.make()


class Best(ModelCheckpoint):
    """Keeps the best of the epochs that were validated; what others show is the score of one before."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the epoch's metric."""
        if isinstance(pl_module, TileModule) and self.monitor in pl_module.metrics:
            super().on_train_epoch_end(trainer, pl_module)


def configured(config: Config | Mapping[str, Any]) -> Config:
    """Return the configuration of a run that Lightning makes; raises ConfigError or ValueError for what it cannot."""
    if not isinstance(config, Config):
        config = configuration.build(Config, configuration.without_retired(config))
    return dataclasses.replace(config, trainer="lightning")


def check_monitor(config: Config, monitor: str, what: str = "monitor") -> None:
    """Raise ConfigError for a metric that is never logged, naming those that are."""
    if monitor not in (known := esd.metrics(config)):
        raise ConfigError(what, f"monitors {monitor!r}, which is never logged; expected one of {', '.join(known)}")


def checkpointing(config: Config, folder: Path, monitor: str = "val_mean_iou") -> list[Callback]:
    """Return the callbacks that keep folder/best.ckpt, by a metric, and folder/last.ckpt; raises as `check_monitor`."""
    check_monitor(config, monitor)
    shared: dict[str, Any] = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False}
    mode = esd.metrics(config)[monitor]
    return [
        Best(filename="best", monitor=monitor, mode=mode, **shared),
        ModelCheckpoint(filename="last", **shared),
    ]


def trainer(
    config: Config | Mapping[str, Any],
    folder: Path,
    *,
    monitor: str = "val_mean_iou",
    logger: Logger | None = None,
    **options: Any,
) -> Trainer:
    """Return a Trainer for a configuration, with checkpoints, a summary and, for a logger, the learning rate.

    folder: where it writes.
    monitor: what the best epoch goes by.
    options: of the Trainer, such as devices=2; they replace those that follow from the configuration.

    Raises:
        ConfigError: if the monitor is never logged.
    """
    config = configured(config)
    callbacks = [*checkpointing(config, folder, monitor), ModelSummary(), *options.pop("callbacks", [])]
    if logger is not None:
        callbacks.append(LearningRateMonitor())
    chosen: dict[str, Any] = {
        **trainer_options(config, training.resolve_device(config.device)),
        "deterministic": "warn" if config.deterministic else None,
        "enable_progress_bar": sys.stderr.isatty(),
        "enable_model_summary": False,  # one is among the callbacks, which tells a log and not stdout
        "default_root_dir": folder,
        "logger": logger or False,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**chosen, **options}, callbacks=callbacks)


def trainer_options(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the options of a Trainer that follow from a configuration, on one device."""
    kind = {"cuda": "gpu"}.get(device.type, device.type)
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return {
        "accelerator": kind,
        "devices": 1 if kind != "gpu" else [index],
        "precision": PRECISIONS[training.resolve_precision(config.precision, device)],
        "max_epochs": config.epochs,
        "num_sanity_val_steps": 0,
    }


def wandb_logger(
    folder: Path, *, project: str, entity: str | None = None, mode: str = "offline", name: str | None = None
) -> WandbLogger:
    """Return a logger to Weights & Biases.

    folder: where its files are kept.
    entity: user or team; None: the account's own.
    mode: online or offline.
    name: of the run.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "wandb not installed; pip install 'segmentation-search[wandb]'", name="wandb"
        ) from error
    # W&B would also keep the command line, the git remote, packages and all output: any may hold a secret.
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        name=name, save_dir=folder, offline=mode != "online", project=project, entity=entity, settings=settings
    )


def to_folder(file: Path, folder: Path) -> Path:
    """Write a .ckpt of Lightning as a checkpoint folder, to evaluate, predict and go on from; return it.

    Raises:
        CheckpointError: if the file is missing, damaged, or was not saved in a run of TileModule and TileDataModule.
    """
    content = checkpoints.torch_file(file)
    kept = content.get(KEPT, {}) if isinstance(content, dict) else {}
    if "record" not in kept:
        raise CheckpointError(f"{file}: tells too little of itself; expected one of TileModule with TileDataModule")
    module = TileModule(**content["hyper_parameters"])
    weights = {name.removeprefix("network."): tensor for name, tensor in content["state_dict"].items()}
    checkpoints.fill(module.network, weights, source=str(file))
    state = {
        "progress": kept["progress"],
        "optimizer": content["optimizer_states"][0],
        "scaler": content.get("MixedPrecision", {}),
        **({"raw_weights": kept["raw_weights"]} if kept["raw_weights"] else {}),
    }
    checkpoints.save(folder, model=module.network, meta=kept["record"], state=state, rewind=kept["rewind"])
    splits.write(splits.Splits(**kept["splits"]), folder / _model.SPLITS)
    return folder


__all__ = [
    "TileDataModule",
    "TileModule",
    "check_monitor",
    "checkpointing",
    "to_folder",
    "trainer",
    "trainer_options",
    "wandb_logger",
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning warn, but not tell what it finds nor what it will have to change; put all back afterwards."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
