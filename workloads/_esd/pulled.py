"""Lightning's `Trainer.fit` as a generator of epochs: whoever pulls it decides whether there is another.

A Trainer calls its callbacks and not the other way round. So it runs on a stack of its own (a greenlet), in the thread
of whoever pulls: at an epoch's end it is left, and goes on when the next is wanted. There is no second thread.
"""

from __future__ import annotations

import contextvars
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from torch import nn

from segmentation import ranks, training
from segmentation.epoch import Epoch
from segmentation.training import Loop
from workloads._esd import lightning
from workloads._esd.lightning import TileDataModule, TileModule
from workloads.esd import Config

T = TypeVar("T")


def fit(
    config: Config, *, meta: Mapping[str, Any], draw: Callable[[nn.Module, Path], None], resume: Path | None
) -> Iterator[Epoch]:
    """Yield each validated epoch that Lightning's Trainer makes; arguments and errors are those of `training.fit`.

    Where processes train together already, the Trainer joins them.
    """
    with training.settings(config):
        module = TileModule(config)
        module.resume = resume
        try:
            for ended in pull(functools.partial(_run, module)):
                yield training.ended_epoch(ended, module.metrics, meta, draw)
        finally:
            if module.loop is not None:
                training.release(module.loop)


def pull(work: Callable[[Callable[[T], object]], object]) -> Iterator[T]:
    """Yield what `work` gives to its argument; it rests at each gift until the next is wanted, and ends when none is.

    What it raises is raised here; where the generator is closed, GreenletExit is raised where it rests.
    """
    inner = greenlet(lambda: work(lambda value: inner.parent.switch((value,))))
    inner.gr_context = contextvars.copy_context()
    try:
        while True:
            inner.parent = getcurrent()
            with lightning.quiet():
                given = inner.switch()
            if inner.dead:
                return
            yield given[0]
    finally:
        if inner:  # begun, and not ended
            inner.parent = getcurrent()
            with lightning.quiet():
                inner.throw()


def _run(module: TileModule, ended: Callable[[Loop], object]) -> None:
    """Fit, and call `ended` with the loop at the end of each validated epoch."""
    device = training.resolve_device(module.config.device)
    alone = ranks.place()[1] == 1
    trainer = Trainer(
        **lightning.trainer_options(module.config, device),
        strategy="auto" if alone else Joined(device),
        plugins=[Here()],
        callbacks=[Handover(ended)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector = Deaf(trainer)
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, TileDataModule(module.config))
    except SystemExit as error:
        # Lightning makes an interrupt an end of the process, and hears no further one.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupted)
        raise error.__context__ from None


class Handover(Callback):
    """Hands each validated epoch out, and has a run go on behind its last one."""

    def __init__(self, ended: Callable[[Loop], object]) -> None:
        self.ended = ended

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on from the epoch of the checkpoint."""
        assert isinstance(pl_module, TileModule) and pl_module.loop is not None
        done = pl_module.loop.progress.epoch
        trainer.fit_loop.epoch_progress.current.processed = done  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave until the next epoch is wanted."""
        assert isinstance(pl_module, TileModule) and pl_module.loop is not None
        if pl_module.steps is None:  # it has ended, by its validation
            self.ended(pl_module.loop)


class Deaf(_SignalConnector):
    """Leaves signals to whoever pulls: Lightning would put off a SIGTERM, and talk to other ranks in its handler."""

    def register_signal_handlers(self) -> None:
        """Do nothing."""


class Here(ClusterEnvironment):
    """The processes that train together already, as torch.distributed knows them; else this one alone."""

    @property
    def creates_processes_externally(self) -> bool:
        """Return that Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Return what was used when they met."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Return what was used when they met."""
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        """Return that it is never chosen by itself."""
        return False

    def world_size(self) -> int:
        """Return how many there are."""
        return ranks.place()[1]

    def set_world_size(self, size: int) -> None:
        """Do nothing: it is known."""

    def global_rank(self) -> int:
        """Return which one this is."""
        return ranks.place()[0]

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: it is known."""

    def local_rank(self) -> int:
        """Return which one of this machine's it is."""
        return int(os.environ.get("LOCAL_RANK", 0))

    def node_rank(self) -> int:
        """Return which machine this is."""
        return int(os.environ.get("NODE_RANK", 0))


class Joined(DDPStrategy):
    """DDP in the process group that is up, each process on its device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    @property
    def root_device(self) -> torch.device:
        """Return this process's device."""
        return self.device
