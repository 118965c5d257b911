"""Quantisation-aware training: a few steps in which the network feels the rounding that int8 will do to it.

Weights of convolutions and linear layers are rounded as `quantise` rounds them (symmetric, one scale a channel), their
inputs to 256 steps of one scale a tensor between the smallest and largest value seen; gradients pass straight through.
Batch norm keeps its statistics: its factor is one a channel, so that rounding before it is rounding after it.
Source: Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segmentation.epoch import NonFiniteError
from segmentation.training import Batch

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
STEPS_UP = 127
LEVELS = 255


def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Tensor], Tensor],
    *,
    steps: int,
    lr: float = 1e-4,
) -> nn.Module:
    """Return a copy of the network after so many steps of Adam, or as many as there are batches, its weights rounded.

    The copy is a plain network again, on the same device and in evaluation: `onnx.export` and `quantise` take it, and
    its int8 weights are the very ones it was trained with.

    Raises:
        ValueError: for fewer than one step.
        NonFiniteError: if the loss becomes nan or infinite.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}; expected at least 1")
    tuned = copy.deepcopy(model).eval()  # in evaluation also while it learns: batch norm and dropout stay out of it
    layers = [module for module in tuned.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_pre_hook(_Input()) for layer in layers]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight(_channel_axis(layer)))
    optimiser = torch.optim.Adam([each for each in tuned.parameters() if each.requires_grad], lr=lr)
    device = next(tuned.parameters()).device
    for image, mask, _ in islice(batches, steps):
        found = loss(tuned(image.to(device)), mask.to(device))
        if not torch.isfinite(found):
            raise NonFiniteError(f"loss is {found.item()} in quantisation-aware training; lower its lr, now {lr:g}")
        optimiser.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for hook in hooks:
        hook.remove()
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return tuned


class RoundedWeight(nn.Module):
    """A weight on the grid of int8, one scale a channel of this axis; 0 stays 0."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight rounded; its gradient is the rounded one's."""
        rest = [axis for axis in range(weight.ndim) if axis != self.axis]
        scale = (weight.detach().abs().amax(rest) / STEPS_UP).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        found: Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -STEPS_UP, STEPS_UP)
        return found


class _Input:
    """What a layer is fed, on 256 steps between the smallest and largest values seen so far and 0."""

    def __init__(self) -> None:
        self.low = self.high = 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image, *rest = inputs
        low, high = image.detach().aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        scale = max((self.high - self.low) / LEVELS, torch.finfo(torch.float32).tiny)
        return (torch.fake_quantize_per_tensor_affine(image, scale, round(-self.low / scale), 0, LEVELS), *rest)


def _channel_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0
