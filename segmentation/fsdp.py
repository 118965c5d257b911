"""PyTorch's fully sharded data parallelism as a strategy: several processes that each keep a part of everything.

A state has the form that it has for one process: a checkpoint knows no strategy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import STATE_KEY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from segmentation import ranks
from segmentation.strategy import Single, Whole, lay_in_a_row


class FSDP(Single):
    """Several processes that each keep a part of every weight, gradient and optimiser state.

    A child of the network has whole weights only from its forward pass, or its backward pass, to the end of that.
    Parts of a batch each exchange their gradients, so that none has to be kept whole.
    Source: Zhao et al. 2023, arXiv:2304.11277.
    """

    local = False
    lockstep = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float
    ) -> None:
        super().__init__(model, optimizer, scaler, clip_norm)
        self.device = next(model.parameters()).device
        self._whole: Whole | None = Whole(model)
        self._layout = lay_in_a_row(model)
        ranks.broadcast(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
        before, self._classes = list(model.parameters()), []
        # Of the network's device; by itself it is a GPU's wherever there is one.
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*_callable_children(model), model):
            self._classes.append((module, type(module)))
            fully_shard(module, mesh=mesh)
        now = {id(old): new for old, new in zip(before, model.parameters(), strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [now[id(parameter)] for parameter in group["params"]]

    def forward(self, image: Tensor, *, last: bool = True) -> Any:
        """Return what the network says of this rank's images."""
        return self.model(image.to(memory_format=self._layout))

    def network(self) -> nn.Module:
        """Return a copy of the network with all of its weights, made now, on every rank."""
        assert self._whole is not None
        return self._whole.filled(self.model, (_full(parameter) for parameter in self.model.parameters()), self.device)

    def free_network(self) -> None:
        """Let the copy wait in the host's memory."""
        assert self._whole is not None
        self._whole.network.cpu()

    def step(self) -> None:
        """Move the weights and forget the gradients."""
        super().step()
        self.grad_norm = _full(self.grad_norm)

    def relearn(self) -> None:
        """Tell the whole weights, which stand in for their parts within a pass, which of them learn now."""
        learning = [parameter.requires_grad for parameter in self.model.parameters()]
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in parts:
            module.unshard()
        for parameter, learns in zip(self.model.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)
        for module in parts:
            module.reshard()

    def state(self) -> dict[str, Any]:
        """Return what the next process needs to go on, whatever its strategy; every rank has to ask."""
        optimizer = self.optimizer.state_dict()
        # In order of the weights, because ranks gather together.
        optimizer["state"] = {
            index: {key: _full(value) for key, value in optimizer["state"][index].items()}
            for index in sorted(optimizer["state"])
        }
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        known = {
            index: {key: _part(value, parameters[index]) for key, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        super().load({**state, "optimizer": {**state["optimizer"], "state": known}})

    def release(self) -> None:
        """Free what is held on the device, the network's weights too; the process group stays."""
        super().release()
        self.optimizer.param_groups.clear()
        self._whole = None
        for module, was in self._classes:
            module.__class__ = was
            vars(module).pop(STATE_KEY, None)
        self._classes.clear()
        for module in self.model.modules():
            for name, _ in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        # Parts, hooks and what gathers them hold each other.
        gc.collect()


def _callable_children(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a network's children that have weights, those of its lists in their stead."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable_children(child)
        elif any(True for _ in child.parameters()):
            yield child


@torch.no_grad()
def _full(value: Any) -> Any:
    """Return a tensor put together from the parts of all ranks; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, parameter: Tensor) -> Any:
    """Return this rank's part of a weight's state, cut as the weight is; counts stay as they are."""
    if not (torch.is_tensor(value) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    whole = value.to(parameter.device, parameter.dtype).contiguous()
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
