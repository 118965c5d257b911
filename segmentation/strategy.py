"""How the steps of a training are carried out: by one process, or by several that keep the same weights.

The loop in `training` is written once, against these few verbs: forward, backward, step, agree, state, load. Each rank
works on its share of a batch; a share is weighed by its images, so that uneven ones change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segmentation import ranks

Name = Literal["auto", "single", "ddp"]


class Single:
    """One process on one device."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        self.model, self.optimizer, self.scaler, self.clip_norm = model, optimizer, scaler, clip_norm
        self.rank, self.world = ranks.place()

    def forward(self, image: Tensor) -> Any:
        """Return what the network says of images (B, C, H, W)."""
        return self.model(image)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients; `last` ends a batch that was worked on in parts."""
        torch.autograd.backward(self.scaler.scale(loss))

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def agree(self, model: nn.Module) -> None:
        """Give all ranks the same buffers, such as running statistics, before they score parts of one set."""
        ranks.broadcast(model.buffers())

    def relearn(self) -> None:
        """Take note that other parameters of the network learn than before."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, Any]:
        """Return what the next process needs to go on, whatever its strategy; every rank has to ask."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def release(self) -> None:
        """Free what is held on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


class DDP(Single):
    """Several processes of the group that is up: gradients are averaged over them. Source: torch's DDP."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        super().__init__(model, optimizer, scaler, clip_norm)
        self.parallel = DistributedDataParallel(model)

    def forward(self, image: Tensor) -> Any:
        """Return what the network says of this rank's images."""
        return self.parallel(image)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients; only the last part of a batch makes the ranks wait for each other."""
        with contextlib.nullcontext() if last else self.parallel.no_sync():
            super().backward(loss, last=last)

    def relearn(self) -> None:
        """Wait for the gradients of those that learn now; DDP looks which these are only once."""
        del self.parallel
        self.parallel = DistributedDataParallel(self.model)

    def release(self) -> None:
        """Free what is held on the device; the process group stays."""
        super().release()
        del self.parallel


def build(
    name: Name,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
) -> Single:
    """Return the strategy: `auto` is ddp where several processes are up.

    Raises:
        ValueError: if the strategy does not fit the number of processes.
    """
    world = ranks.place()[1]
    chosen = ("ddp" if world > 1 else "single") if name == "auto" else name
    if chosen == "single" and world > 1:
        raise ValueError(f"strategy: got single, but {world} processes train together; write ddp or auto")
    kind = DDP if chosen == "ddp" and world > 1 else Single
    return kind(model, optimizer, scaler, clip_norm)
