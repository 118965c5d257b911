"""A network's layers as a table: what each gives, and how many numbers it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from segmentation.networks import cost

LEVELS = 2
"""How deep modules within modules are shown."""


def lines(model: nn.Module, channels: int, height: int, width: int) -> list[str]:
    """Return a line for each module of the top two levels, one for the image before them, the whole network last.

    Shapes are those of one image, C x H x W, in evaluation; lists of modules have none, and neither has what is not
    called then. The network is left as it is; nothing is computed.
    """
    shown = {name: module for name, module in model.named_modules() if name.count(".") < LEVELS}
    shapes = _shapes(shown, model, channels, height, width)
    rows = [("module", "kind", "output", "parameters"), ("image", "", f"{channels} x {height} x {width}", "")]
    for name, module in (*list(shown.items())[1:], ("total", model)):
        shape = shapes.get("" if module is model else name, "")
        rows.append((name, type(module).__name__, shape, f"{cost.parameters(module):,}"))
    first, second, third, fourth = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{a:{first}}  {b:{second}}  {c:{third}}  {d:>{fourth}}".rstrip() for a, b, c, d in rows]


def _shapes(shown: Mapping[str, nn.Module], model: nn.Module, channels: int, height: int, width: int) -> dict[str, str]:
    """Return the shapes that modules give, by their names; of one that is called more than once, the last."""
    found: dict[str, str] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = "; ".join(_text(tensor) for tensor in _tensors(output))

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in shown.items()]
    try:
        cost.shapes_alone(model, channels, height, width)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(output):
        yield output
    elif isinstance(output, Mapping | Sequence) and not isinstance(output, str):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _text(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape[1:]))
