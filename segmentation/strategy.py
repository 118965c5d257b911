"""How the steps of a training are carried out: by one process, or by several that keep the same weights.

The loop in `training` is written once, against these few verbs: forward, backward, step, network, agree, state, load.
Each rank works on its share of a batch; a share is weighed by its images, so that uneven ones change nothing. A state
has one form for all strategies and numbers of processes; whichever comes next can go on from it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segmentation import ranks

Name = Literal["auto", "single", "ddp", "fsdp", "deepspeed"]


class StrategyError(ValueError):
    """A strategy that the number of processes, this machine or the rest of the config does not allow."""


class Single:
    """One process on one device."""

    local: bool = True
    """Whether ranks wait for each other in `step` alone, so that one may try a batch again."""
    lockstep: bool = False
    """Whether all ranks have to work on a batch in equally many parts."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        self.model, self.optimizer, self.scaler, self.clip_norm = model, optimizer, scaler, clip_norm
        self.rank, self.world = ranks.place()
        self.grad_norm: Tensor | float | None = None
        """Of the last step, in true units, before it was clipped; None where nothing is clipped."""

    def forward(self, image: Tensor, *, last: bool = True) -> Any:
        """Return what the network says of images (B, C, H, W); `last` as in `backward`."""
        return self.model(image)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients; `last` ends a batch that was worked on in parts."""
        torch.autograd.backward(self.scaler.scale(loss))

    def clip(self, *, scaled: bool = True) -> None:
        """Clip the gradients, if they are to be; `scaled`: they still are as the scaler made them."""
        if self.clip_norm:
            if scaled:
                self.scaler.unscale_(self.optimizer)
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.forget()

    def forget(self) -> None:
        """Forget the gradients that were added so far."""
        self.optimizer.zero_grad(set_to_none=True)

    def network(self) -> nn.Module:
        """Return the network with all of its weights; every rank has to ask."""
        return self.model

    def free_network(self) -> None:
        """Free what `network` returned, where that was a copy."""

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
        # Fused optimisers walk through memory and expect a weight's state laid out as the weight is.
        for parameter, known in self.optimizer.state.items():
            for name, value in known.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    known[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])

    def release(self) -> None:
        """Free what is held on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


class DDP(Single):
    """Several processes of the group that is up: gradients are averaged over them. Source: torch's DDP."""

    local = False
    lockstep = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        super().__init__(model, optimizer, scaler, clip_norm)
        self.parallel = DistributedDataParallel(model)

    def forward(self, image: Tensor, *, last: bool = True) -> Any:
        """Return what the network says of this rank's images; only the last part of a batch is waited for."""
        with contextlib.nullcontext() if last else self.parallel.no_sync():
            return self.parallel(image)

    def relearn(self) -> None:
        """Wait for the gradients of those that learn now; DDP looks which these are only once."""
        del self.parallel
        self.parallel = DistributedDataParallel(self.model)

    def release(self) -> None:
        """Free what is held on the device; the process group stays."""
        super().release()
        del self.parallel


class Apart(Single):
    """Several processes that work on a batch without each other, then average their gradients.

    Slower than DDP, which averages while the backward pass goes on, but a rank that runs out of memory leaves no other
    waiting.
    """

    lockstep = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        super().__init__(model, optimizer, scaler, clip_norm)
        ranks.broadcast(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))

    def step(self) -> None:
        """Average the gradients, move the weights and forget the gradients."""
        _average(parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)
        super().step()


class Whole:
    """A copy of a network whose weights no rank has all of."""

    def __init__(self, model: nn.Module) -> None:
        self.network = copy.deepcopy(model).cpu().requires_grad_(False)

    @torch.no_grad()
    def filled(self, model: nn.Module, weights: Iterable[Tensor], device: torch.device) -> nn.Module:
        """Return the copy on a device, with these weights of the model and its buffers and mode."""
        whole = self.network.to(device)
        for parameter, weight in zip(whole.parameters(), weights, strict=True):
            parameter.copy_(weight)
        for ours, theirs in zip(whole.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        return whole.train(model.training)


def lay_in_a_row(model: nn.Module) -> torch.memory_format:
    """Lay each weight out as strategies cut it; return the layout that images then need for convolutions to go by."""
    weights: list[Tensor] = list(model.parameters())
    strided = any(not weight.is_contiguous() for weight in weights)
    for weight in weights:
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return torch.channels_last if strided else torch.preserve_format


@torch.no_grad()
def _average(gradients: Iterable[Tensor]) -> None:
    """Overwrite gradients by their mean over all ranks, in one exchange."""
    parts = list(gradients)
    mean = ranks.total(torch.cat([part.flatten() for part in parts])) / ranks.place()[1]
    for part, values in zip(parts, torch.split(mean, [part.numel() for part in parts]), strict=True):
        part.copy_(values.view_as(part))


def check(name: Name) -> None:
    """Refuse a strategy that needs what is not installed, before anything starts.

    Raises:
        StrategyError: naming what to install.
    """
    if name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise StrategyError(
            "strategy: got deepspeed, which is not installed; "
            'install it by pip install "segmentation-search[deepspeed]", or write ddp'
        )


def build(
    name: Name,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
    *,
    zero_stage: int = 1,
    batch_size: int = 1,
    retry: bool = False,
    outside: bool = False,
) -> Single:
    """Return the strategy: `auto` is ddp where several processes are up; one process is single by every name.

    retry: the ranks shall be able to try a batch again, one for all (not by deepspeed nor fsdp).
    outside: another library makes the steps and averages gradients; each process is then single, and knows its rank.

    Raises:
        StrategyError: if the strategy does not fit the number of processes, or needs what is not installed.
    """
    world = ranks.place()[1]
    chosen = ("ddp" if world > 1 else "single") if name == "auto" else name
    if chosen == "single" and world > 1:
        raise StrategyError(f"strategy: got single, but {world} processes train together; write ddp or auto")
    check(chosen)
    if world == 1 or outside:
        return Single(model, optimizer, scaler, clip_norm)
    # Late, because these take time to import, and DeepSpeed is an optional part.
    if chosen == "deepspeed":
        from segmentation import zero

        return zero.ZeRO(model, optimizer, scaler, clip_norm, stage=zero_stage, batch_size=batch_size)
    if chosen == "fsdp":
        from segmentation import fsdp

        return fsdp.FSDP(model, optimizer, scaler, clip_norm)
    return (Apart if retry else DDP)(model, optimizer, scaler, clip_norm)
