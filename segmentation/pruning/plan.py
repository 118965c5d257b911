"""A plan: which channels of each convolution stay. Plain data, kept as JSON, for any weights of the same network.

pruning_masks.json    {"encoders.0.net.0": {"kept": [0, 2, 5], "total": 8}, ...}, every convolution in it
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import durable
from segmentation.epoch import DataError
from segmentation.pruning import channels as graph
from segmentation.pruning.channels import Channels

FILE = "pruning_masks.json"


class PlanError(DataError):
    """A plan that cannot be made, or does not fit the network; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Which channels stay."""

    kept: Mapping[str, tuple[int, ...]]
    """Of each convolution, in ascending order."""
    total: Mapping[str, int]
    """How many there were."""

    @property
    def widths(self) -> dict[str, int]:
        """Return how many channels each convolution keeps."""
        return {layer: len(kept) for layer, kept in self.kept.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as it stands in a file."""
        return {layer: {"kept": list(kept), "total": self.total[layer]} for layer, kept in self.kept.items()}


def of(channels: Channels, kept: Mapping[str, Iterable[int]]) -> Plan:
    """Return the plan by which each origin keeps these channels, and those left out keep all."""
    sizes = channels.widths()
    stay = {origin: tuple(sorted(places)) for origin, places in kept.items()}
    return Plan({name: stay.get(channels.origin(name), tuple(range(count))) for name, count in sizes.items()}, sizes)


def apply(model: nn.Module, channels: Channels, plan: Plan) -> nn.Module:
    """Return the smaller network that a plan makes of this one, with the weights that stay.

    Raises:
        PlanError: if the plan is of another network, or drops what cannot go.
    """
    return graph.cut(model, channels, origins(channels, plan))


def origins(channels: Channels, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return what each origin keeps by a plan.

    Raises:
        PlanError: as `apply`.
    """
    sizes = channels.widths()
    _refuse_other(sizes, plan)
    found: dict[str, tuple[int, ...]] = {}
    for name, kept in plan.kept.items():
        origin = channels.origin(name)
        if found.setdefault(origin, kept) != kept:
            raise PlanError(f"{name}: keeps other channels than {origin}, which it is added to; give both the same")
        if origin in channels.frozen and len(kept) < sizes[name]:
            raise PlanError(f"{name}: its channels cannot go, they are the image's, the logits' or read as a whole")
    return found


def counts(channels: Channels, plan: Plan) -> dict[str, int]:
    """Return how many channels each origin keeps by a plan; raises as `apply`."""
    return {origin: len(kept) for origin, kept in origins(channels, plan).items()}


def shrunk(model: nn.Module, channels: Channels, widths: Mapping[str, int]) -> nn.Module:
    """Return a network of these widths, for weights that are loaded into it afterwards.

    Raises:
        PlanError: if the widths are of another network.
    """
    first = {name: tuple(range(width)) for name, width in widths.items()}
    return apply(model, channels, Plan(first, channels.widths()))


def write(path: Path, plan: Plan) -> None:
    """Write a plan as JSON."""
    durable.write_json(path, plan.to_dict())


def read(path: Path) -> Plan:
    """Return the plan of a file.

    Raises:
        PlanError: if the file is missing or holds no plan.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: tuple(entry["kept"]) for name, entry in content.items()}
        total = {name: int(entry["total"]) for name, entry in content.items()}
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such plan; a pruned checkpoint folder has one, named {FILE}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PlanError(f"{path}: no plan of the form {{layer: {{kept: [0, 2], total: 3}}}} ({error!r})") from error
    for name, places in kept.items():
        _check_places(path, name, places, total[name])
    return Plan(kept, total)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the names that are meant, in words."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(names)}"


def _check_places(path: Path, name: str, places: Sequence[Any], total: int) -> None:
    if not places:
        raise PlanError(f"{path}: {name} keeps no channel at all; a layer needs one")
    if any(type(place) is not int or not 0 <= place < total for place in places) or sorted(set(places)) != list(places):
        raise PlanError(f"{path}: {name} keeps {list(places)[:5]}; expected ascending numbers from 0 to {total - 1}")


def _refuse_other(sizes: Mapping[str, int], plan: Plan) -> None:
    problems = [f"no layer {name}; {nearest(name, sizes)}" for name in plan.kept if name not in sizes]
    problems += [f"nothing about {name}" for name in sizes if name not in plan.kept]
    problems += [
        f"{name} has {sizes[name]} channels, not {total}"
        for name, total in plan.total.items()
        if name in sizes and total != sizes[name]
    ]
    problems += [
        f"{name} keeps {len(kept)} of {sizes[name]}"
        for name, kept in plan.kept.items()
        if name in sizes and len(kept) > sizes[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PlanError(f"a plan of another network: {'; '.join(problems[:3])}{more}")
