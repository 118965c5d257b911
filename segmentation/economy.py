"""Trade memory for time, and compiling once for faster steps; the network's weights keep their names."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


def recompute_stages(model: nn.Module) -> None:
    """Make the network's stages compute their inside again in the backward pass instead of keeping it."""
    found = list(stages(model))
    if not found:
        logger.warning("checkpointing: %s has no stages of several convolutions; nothing changes", type(model).__name__)
    for stage in found:
        stage.forward = functools.partial(_recomputed, stage, stage.forward)


def keep_stages(model: nn.Module) -> None:
    """Undo `recompute_stages`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), functools.partial):
            del module.forward


def stages(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost sequences and members of lists that hold two convolutions or more.

    A sequence of such sequences is none: timm's EfficientNet walks through its own without calling it.
    """
    for child in filter(_is_worth_it, module.children()):
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if isinstance(child, nn.Sequential):
            inner = list(filter(_is_worth_it, child))
            whole = not inner or not all(isinstance(one, nn.Sequential) for one in inner)
        else:
            whole = isinstance(module, nn.ModuleList) and not container
        if whole:
            yield child
        else:
            yield from stages(child)


def _is_worth_it(module: nn.Module) -> bool:
    return sum(isinstance(layer, _ConvNd) for layer in module.modules()) >= 2


def _recomputed(stage: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not (stage.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)
    contexts = lambda: (contextlib.nullcontext(), _untracked(stage))  # noqa: E731
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


@contextlib.contextmanager
def _untracked(module: nn.Module) -> Iterator[None]:
    """Keep batch norm from counting a batch a second time when it is computed again."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches


def compile_network(model: nn.Module) -> None:
    """Compile the network at its first batch; it goes on as it is, with a notice, where that fails."""
    try:
        compiled = torch.compile(model._call_impl)
    except RuntimeError as error:
        _notice(error)
        return
    model._compiled_call_impl = _Compiled(model._call_impl, compiled)


def drop_compiled(model: nn.Module) -> None:
    """Undo `compile_network`, and free what the compiler keeps for the process."""
    if isinstance(vars(model).get("_compiled_call_impl"), _Compiled):
        model._compiled_call_impl = None
        torch.compiler.reset()


class _Compiled:
    """The compiled call, until it fails."""

    def __init__(self, plain: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.plain, self.call = plain, call

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        try:
            return self.call(*inputs, **named)
        except TorchDynamoException as error:
            _notice(error)
            self.call = self.plain
            return self.call(*inputs, **named)


def _notice(error: Exception) -> None:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    logger.warning("compile: the network cannot be compiled here and runs as it is (%s)", reason)
