"""How the channels of a network hang together: found by running it once on the meta device and watching.

Each convolution makes channels of its own. Whatever follows carries them on: batch norm, ReLU, pooling and resizing as
they are, a concatenation side by side, an addition two of them as one. So each layer is known by the channels that it
reads and those that it writes, and to drop some is to cut every layer that touches them. An operation that is not known
here keeps all channels that it reads: never a wrong network, at most a larger one.

The idea is that of dependency graphs, Fang et al. 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

Segment = tuple[str, int]
"""Channels of one origin: the first layer that makes them, and how many."""
Layout = tuple[Segment, ...]

SIDE = 64
"""Of the image that runs through the network: large enough for the encoders of timm."""

# By name, since overloads and in-place forms differ in what follows the dot and the underscore only.
CARRIED = {
    *("relu", "leaky_relu", "elu", "gelu", "silu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
    *("softplus", "mish", "dropout", "native_dropout", "neg", "mean", "amax"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "replication_pad2d", "replication_pad3d"),
    *("reflection_pad2d", "constant_pad_nd", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
    *("slice", "clone", "detach", "_to_copy", "contiguous", "alias"),
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "_batch_norm_with_update"),
}
JOINED = {"add", "sub", "mul", "div"}
SHAPED = {"new_empty", "new_zeros", "new_ones", "empty_like", "zeros_like", "ones_like", "rand_like"}
"""What looks at a shape alone, as dropout does before it draws."""


@dataclass(frozen=True)
class Layer:
    """One module with weights, and the channels that it reads and writes."""

    name: str
    module: nn.Module
    reads: Layout
    writes: Layout
    places: int = 0
    """How often a kernel is applied to one image: pixels that a convolution writes, or that a transposed one reads."""


@dataclass(frozen=True)
class Channels:
    """What is known of a network's channels."""

    layers: Mapping[str, Layer]
    """Every convolution and batch norm that ran, in the order of running."""
    frozen: frozenset[str]
    """Origins whose channels cannot go: the image's, the logits', and those that an unknown operation reads."""
    others: int
    """Numbers learned besides those of the layers."""

    def sizes(self) -> dict[str, int]:
        """Return how many channels each origin makes, those that cannot go left out, in the order of running."""
        found = {origin: count for layer in self.convolutions() for origin, count in layer.writes}
        return {origin: count for origin, count in found.items() if origin not in self.frozen}

    def convolutions(self) -> Iterator[Layer]:
        """Yield the convolutions, those that transpose included."""
        return (layer for layer in self.layers.values() if isinstance(layer.module, _ConvNd))

    def widths(self) -> dict[str, int]:
        """Return how many channels each convolution writes."""
        return {layer.name: layer.writes[0][1] for layer in self.convolutions()}

    def origin(self, convolution: str) -> str:
        """Return whose channels a convolution writes: its own, or those that they are added to."""
        ((origin, _),) = self.layers[convolution].writes
        return origin

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """Return the multiply-accumulates of one image, where each origin keeps so many channels, or all."""
        kernels = ((layer, _kernel(layer, kept or {})) for layer in self.convolutions())
        return sum(layer.places * kernel for layer, kernel in kernels)

    def parameters(self, kept: Mapping[str, int] | None = None) -> int:
        """Return how many numbers the network learns, where each origin keeps so many channels, or all."""
        kept = kept or {}
        total = self.others
        for layer in self.layers.values():
            writes = _width(layer.writes, kept)
            if isinstance(layer.module, _ConvNd):
                total += _kernel(layer, kept) + (writes if layer.module.bias is not None else 0)
            else:
                total += writes * len(list(layer.module.parameters()))
        return total

    def norm_of(self, convolution: str) -> str | None:
        """Return the batch norm right behind a convolution, or None."""
        writes = self.layers[convolution].writes
        after = list(self.layers.values())[list(self.layers).index(convolution) + 1 :]
        return next(
            (layer.name for layer in after if isinstance(layer.module, _BatchNorm) and layer.reads == writes), None
        )


def _width(layout: Layout, kept: Mapping[str, int]) -> int:
    return sum(kept.get(origin, count) for origin, count in layout)


def _kernel(layer: Layer, kept: Mapping[str, int]) -> int:
    """Return how many weights a convolution has."""
    assert isinstance(layer.module, _ConvNd)
    reads, writes = _width(layer.reads, kept), _width(layer.writes, kept)
    groups = writes if layer.module.groups > 1 and layer.reads == layer.writes else layer.module.groups
    return math.prod(layer.module.kernel_size) * reads * writes // groups


def trace(model: nn.Module, in_channels: int, height: int = SIDE, width: int = SIDE) -> Channels:
    """Return how the channels of a network hang together; the network itself is not touched.

    in_channels, height, width: of the image that runs through; its size matters for `macs` alone.
    """
    twin = _on_meta(model).train()  # heads that only learn are part of the network as well
    watch = _Watch(twin)
    image = torch.empty(2, in_channels, height, width, device="meta")
    watch.mark(image, (("", in_channels),))
    with torch.no_grad(), watch:
        output = twin(image)
    for tensor in _tensors(output):
        watch.freeze(tensor)
    return watch.found(model)


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy without values: parameters and buffers have shapes only."""
    memo = {id(tensor): _empty(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape


@dataclass
class _Seen:
    """One layer while the network runs; the names of origins may still be joined."""

    name: str
    reads: Layout
    writes: Layout
    places: int


@dataclass
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the channels of every tensor through the operations of PyTorch."""

    model: nn.Module
    layouts: dict[int, tuple[Tensor, Layout]] = field(default_factory=dict)
    """By identity; the tensor is kept, so that no other takes its identity."""
    seen: list[_Seen] = field(default_factory=list)
    kept: set[str] = field(default_factory=lambda: {""})
    same: dict[str, str] = field(default_factory=dict)
    """Origin to one that it is added to: both drop the same channels."""

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants = {id(tensor) for tensor in [*self.model.parameters(), *self.model.buffers()]}
        self.owners = {id(tensor): name for name, tensor in _own_tensors(self.model)}

    def mark(self, tensor: Tensor, layout: Layout) -> None:
        """Note the channels of a tensor."""
        self.layouts[id(tensor)] = (tensor, layout)

    def layout(self, tensor: Any) -> Layout:
        """Return the channels of a tensor, empty where it has none that are followed."""
        return self.layouts[id(tensor)][1] if id(tensor) in self.layouts else ()

    def freeze(self, tensor: Any) -> None:
        """Note that no channel of a tensor can go."""
        self.kept |= {origin for origin, _ in self.layout(tensor)}

    def found(self, model: nn.Module) -> Channels:
        """Return what was seen, about the network itself."""
        modules = dict(model.named_modules())
        layers = {
            each.name: Layer(
                each.name, modules[each.name], self._joined(each.reads), self._joined(each.writes), each.places
            )
            for each in self.seen
        }
        inside = {id(weight) for layer in layers.values() for weight in layer.module.parameters()}
        others = sum(weight.numel() for weight in model.parameters() if id(weight) not in inside)
        return Channels(layers, frozenset(map(self._root, self.kept)), others)

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the channels of what it gives."""
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name == "convolution":
            self._convolution(args, output)
        elif name == "cat":
            self._concatenation(args, output)
        elif name in JOINED:
            self._join([arg for arg in args[:2] if isinstance(arg, Tensor)], output)
        elif name in CARRIED and self.layout(args[0]):
            self._carry(args, output)
        elif name not in SHAPED:
            for tensor in _tensors((args, kwargs)):
                self.freeze(tensor)
        return output

    def _convolution(self, args: Sequence[Any], output: Tensor) -> None:
        source, weight, groups = args[0], args[1], args[8]
        layer, reads = self.owners[id(weight)], self.layout(source) or (("", source.shape[1]),)
        if groups == 1:
            writes: Layout = ((layer, output.shape[1]),)
        elif groups == source.shape[1] == output.shape[1]:  # each channel by itself
            writes = reads
        else:
            writes = ((layer, output.shape[1]),)
            self.freeze(source)
            self.kept.add(layer)
        self._note(layer, reads, writes, math.prod((source if args[6] else output).shape[2:]))
        self.mark(output, writes)

    def _carry(self, args: Sequence[Any], output: Any) -> None:
        source, made = args[0], _tensors(output)[0]
        if made.ndim != source.ndim or made.shape[1] != source.shape[1]:
            self.freeze(source)
            return
        layout = self.layout(source)
        for tensor in args[1:]:
            if isinstance(tensor, Tensor) and id(tensor) in self.owners:
                self._note(self.owners[id(tensor)], layout, layout)
        self.mark(made, layout)

    def _concatenation(self, args: Sequence[Any], output: Tensor) -> None:
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        if dim in (1, 1 - output.ndim) and all(self.layout(tensor) for tensor in tensors):
            self.mark(output, tuple(segment for tensor in tensors for segment in self.layout(tensor)))
            return
        for tensor in tensors:
            self.freeze(tensor)

    def _join(self, tensors: Sequence[Tensor], output: Tensor) -> None:
        """Make one of the channels of two tensors; one without any, or with a single one for all, has no say."""
        wide = [tensor for tensor in tensors if self.layout(tensor) and tensor.shape[1] == output.shape[1]]
        if not wide:
            return
        if any(id(tensor) in self.constants for tensor in tensors):  # a scale of its own would have to be cut as well
            for tensor in wide:
                self.freeze(tensor)
        first = self._joined(self.layout(wide[0]))
        for other in wide[1:]:
            second = self._joined(self.layout(other))
            if [count for _, count in first] != [count for _, count in second]:
                self.freeze(wide[0])
                self.freeze(other)
                continue
            for (origin, _), (another, _) in zip(first, second, strict=True):
                self._unite(origin, another)
        self.mark(output, first)

    def _note(self, name: str, reads: Layout, writes: Layout, places: int = 0) -> None:
        """Note a layer; one that runs twice reads and writes the same channels both times."""
        before = next((each for each in self.seen if each.name == name), None)
        if before is None:
            self.seen.append(_Seen(name, reads, writes, places))
            return
        before.places += places
        for old, new in ((before.reads, reads), (before.writes, writes)):
            for (origin, _), (another, _) in zip(self._joined(old), self._joined(new), strict=True):
                self._unite(origin, another)

    def _unite(self, origin: str, other: str) -> None:
        first, second = self._root(origin), self._root(other)
        if first != second:
            self.same[second] = first

    def _root(self, origin: str) -> str:
        while origin in self.same:
            origin = self.same[origin]
        return origin

    def _joined(self, layout: Layout) -> Layout:
        return tuple((self._root(origin), count) for origin, count in layout)


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that tell a layer, each with the layer's name."""
    for name, module in model.named_modules():
        for tensor in (getattr(module, "weight", None), getattr(module, "running_mean", None)):
            if isinstance(tensor, Tensor):
                yield name, tensor


def _tensors(value: Any) -> list[Tensor]:
    """Return every tensor in a value of PyTorch's: itself, or those in a list, a mapping or a dataclass."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return _tensors(list(vars(value).values())) if hasattr(value, "__dataclass_fields__") else []


def cut(model: nn.Module, channels: Channels, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a smaller network: a copy in which every layer has the channels that are kept, with their weights.

    channels: of the network, from `trace`.
    kept: for each origin the channels that stay, in order; an origin that is left out keeps all.
    """
    places: Callable[[Layout], Tensor] = lambda layout: _places(layout, kept)  # noqa: E731
    untouched = {id(layer.module): layer.module for layer in channels.layers.values()}
    smaller = copy.deepcopy(model, dict(untouched))  # the layers' weights are copied once, by the cut
    for layer in channels.layers.values():
        smaller.set_submodule(layer.name, _cut_layer(layer, places(layer.reads), places(layer.writes)))
    return smaller


def silenced(model: nn.Module, channels: Channels, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy of full size in which the channels that are not kept are always zero: what `cut` has to equal."""
    same = copy.deepcopy(model)
    for layer in channels.layers.values():
        gone = torch.ones(sum(count for _, count in layer.writes), dtype=torch.bool)
        gone[_places(layer.writes, kept)] = False
        module: Any = same.get_submodule(layer.name)
        across = isinstance(module, _ConvTransposeNd) and module.groups == 1
        for name in ("weight", "bias", "running_mean"):
            if (tensor := getattr(module, name, None)) is not None:
                (tensor.data.transpose(0, 1) if across and name == "weight" else tensor.data)[gone] = 0
    return same


def _places(layout: Layout, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """Return the numbers of the channels that stay, counted over the whole layout."""
    found: list[int] = []
    start = 0
    for origin, count in layout:
        found += [start + place for place in kept.get(origin, range(count))]
        start += count
    return torch.tensor(found, dtype=torch.long)


def _cut_layer(layer: Layer, reads: Tensor, writes: Tensor) -> nn.Module:
    module = copy.copy(layer.module)
    module._parameters, module._buffers = dict(module._parameters), dict(module._buffers)
    if isinstance(module, _BatchNorm):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(module, name, [(0, writes)])
        _take(module, "num_batches_tracked", [])
        module.num_features = len(writes)
        return module
    assert isinstance(module, _ConvNd)
    across = isinstance(module, _ConvTransposeNd)
    _take(module, "bias", [(0, writes)])
    if module.groups > 1:
        _take(module, "weight", [(0, writes)])
        module.groups = len(writes) if layer.reads == layer.writes else module.groups
    else:
        _take(module, "weight", [(0, reads if across else writes), (1, writes if across else reads)])
    module.in_channels, module.out_channels = len(reads), len(writes)
    return module


def _take(module: nn.Module, name: str, places: Iterable[tuple[int, Tensor]]) -> None:
    """Give a module its own copy of a tensor, with these places of these dimensions."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    taken = tensor.detach().clone(memory_format=torch.preserve_format)
    for dim, index in places:
        taken = taken.index_select(dim, index.to(taken.device))
    setattr(module, name, nn.Parameter(taken, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else taken)
