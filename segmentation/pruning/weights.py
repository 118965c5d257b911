"""What a pruned network begins with, and batch statistics that fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def draw(model: nn.Module, seed: int) -> dict[str, dict[str, list[float]]]:
    """Give every convolution and batch norm fresh weights, in place; return each convolution's mean and deviation.

    Kaiming's normal distribution by the outputs, biases 0; batch norm 1 and 0 with empty statistics.
    Source: He et al. 2015, arXiv:1502.01852; the rule is that of the basic_UNet pruning system.
    """
    before = statistics(model)
    # The state of the process's random numbers is not touched: what comes after is the same in every mode.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, _ConvNd):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, _BatchNorm):
                module.reset_parameters()
    after = statistics(model)
    return {name: {"before": before[name], "after": after[name]} for name in before}


def statistics(model: nn.Module) -> dict[str, list[float]]:
    """Return mean and standard deviation of the weights of each convolution."""
    weights = {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    return {name: [float(weight.mean()), float(weight.std(correction=0))] for name, weight in weights.items()}


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor], batches: int) -> int:
    """Take the statistics of every batch norm anew, as the plain mean over some batches; weights stay as they are.

    images: (B, C, H, W) as the network takes them, on its device.
    Returns how many batches there were; with none, or no batch norm, nothing changes.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms or not batches:
        return 0
    count = 0
    with _alone_in_training(model, norms):
        for image in islice(images, batches):
            if not count:
                for norm in norms:
                    norm.reset_running_stats()
            model(image)
            count += 1
    return count


@contextlib.contextmanager
def _alone_in_training(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let batch norms learn their statistics while all else, dropout say, is in evaluation."""
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # a plain mean over all batches
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
