"""How much each filter of a layer matters: one number a filter, the smallest goes first.

Sources: l1 and l2 norms, Li et al. 2017, arXiv:1608.08710; batch-norm scale, Liu et al. 2017, arXiv:1708.06519;
redundancy by Pearson correlation or cosine of feature maps, as in the basic_UNet pruning system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from segmentation.pruning.channels import Channels
from segmentation.pruning.plan import PlanError

Importance = Literal["l1", "l2", "bn_scale", "pearson", "cosine", "random"]
REDUNDANCY = ("pearson", "cosine")


def scores(
    model: nn.Module,
    channels: Channels,
    layers: Sequence[str],
    importance: Importance,
    *,
    images: Iterable[Tensor] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return for each of these convolutions the score of its filters, (out_channels,) float64 on the CPU.

    images: (B, C, H, W) as the network takes them, for the methods that look at feature maps.

    Raises:
        PlanError: where a layer has no batch norm to look at, or there are no images.
    """
    if importance in REDUNDANCY:
        alike = similarities(model, layers, images, importance)
        norms = {layer: filter_norms(model.get_submodule(layer), 1) for layer in layers}
        return {layer: _redundancy(alike[layer], norms[layer]) for layer in layers}
    if importance == "bn_scale":
        return {layer: _scale(model, channels, layer) for layer in layers}
    if importance == "random":
        drawn = torch.Generator().manual_seed(seed)
        return {
            layer: torch.rand(channels.layers[layer].writes[0][1], generator=drawn, dtype=torch.float64)
            for layer in layers
        }
    return {layer: filter_norms(model.get_submodule(layer), {"l1": 1, "l2": 2}[importance]) for layer in layers}


def filter_norms(module: nn.Module, power: int) -> Tensor:
    """Return the norm of each filter of a convolution, (out_channels,) float64; bias left out.

    Filters lie along dimension 0 of the weights, and along dimension 1 where the convolution is transposed.
    """
    weight: Any = module.weight
    across = isinstance(module, _ConvTransposeNd) and module.groups == 1
    filters = (weight.transpose(0, 1) if across else weight).detach().double().cpu().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(filters, ord=power, dim=1)
    return norms


@torch.inference_mode()
def similarities(
    model: nn.Module, layers: Sequence[str], images: Iterable[Tensor], importance: str
) -> dict[str, Tensor]:
    """Return how alike the feature maps of each layer are, (n, n) in -1 to 1, the mean over images.

    importance: pearson takes the mean of a map off first, cosine does not.

    Raises:
        PlanError: if there are no images.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    was_training = model.training
    with _hooked(model.eval(), layers, lambda name, maps: _add(sums, name, _alike(maps, importance))):
        for image in images:
            model(image)
            count += len(image)
    model.train(was_training)
    if not count:
        raise PlanError(f"importance: {importance} looks at feature maps; give some images")
    return {name: total / count for name, total in sums.items()}


def _alike(maps: Tensor, importance: str) -> Tensor:
    """Return the sum over images of the similarity of channels, (n, n), of maps (B, n, ...)."""
    flat = maps.double().flatten(2)
    if importance == "pearson":
        flat = flat - flat.mean(2, keepdim=True)
    unit = flat / flat.norm(dim=2, keepdim=True).clamp_min(1e-12)
    total: Tensor = (unit @ unit.transpose(1, 2)).sum(0)
    return total.cpu()


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _redundancy(alike: Tensor, norms: Tensor) -> Tensor:
    """Return 1 minus the similarity at which each filter goes, if of the two most alike the weaker always goes next."""
    alike = alike.clone().fill_diagonal_(-torch.inf)
    found = torch.full_like(norms, 2.0)  # of the last one left: less redundant than any
    for _ in range(len(norms) - 1):
        row, column = divmod(int(alike.argmax()), len(norms))
        gone = row if norms[row] < norms[column] else column
        found[gone] = 1 - alike.max()
        alike[gone] = alike[:, gone] = -torch.inf
    return found


def _scale(model: nn.Module, channels: Channels, layer: str) -> Tensor:
    norm = channels.norm_of(layer)
    weight = getattr(model.get_submodule(norm), "weight", None) if norm else None
    if weight is None:
        raise PlanError(f"importance: bn_scale, but {layer} has no batch norm behind it; take l1 or l2")
    found: Tensor = weight.detach().double().abs().cpu()
    return found


@contextlib.contextmanager
def _hooked(model: nn.Module, layers: Sequence[str], seen: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, given, output: seen(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_block(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores that can be compared between layers: each divided by the mean of its layer."""
    return {layer: values / values.mean().clamp_min(1e-12) for layer, values in found.items()}
