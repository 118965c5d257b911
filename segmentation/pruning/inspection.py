"""What the filters of a network are like, and which of them a plan drops: a table, pictures and a page about both.

    analysis/layers.csv            a line for each convolution
    analysis/histograms/NAME.png   L1 norms of the filters of each convolution, all on one y-axis
    analysis/l1_norms.png          the same side by side
    analysis/masks.png             which channels of each layer stay            } where there is a plan
    analysis/widths.png            channels of each block before and after      }
    analysis/pruning_masks.json    the plan itself, to be used as prune.plan    }
    analysis/report.html           all of it on one page that needs no other file
    analysis/report.md             the same as text, with links to the pictures

Columns of the table are those of the basic_UNet pruning system: Block Ratio is the share of filters that was asked for,
Post-Prune Ratio the share that goes, or went.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import durable
from segmentation import pruning
from segmentation.pruning import Channels, Plan, Prune, blocks, importance, pictures, plan
from segmentation.pruning import channels as graph

FOLDER = "analysis"
COLUMNS = (
    *("Layer", "Type", "Shape", "In Ch", "Out Ch", "Num Params"),
    *("Mean L1", "Min L1", "Max L1", "Std L1", "Block Ratio", "Post-Prune Ratio"),
)
FLOPS_PER_MAC = 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of its weights."""
    inputs: int
    outputs: int
    parameters: int
    norms: tuple[float, ...]
    """L1 norm of each filter."""
    ratio: float | None
    """What was asked for its block; None: nothing was, or its channels cannot go."""
    kept: tuple[int, ...]
    """By the plan."""
    total: int
    """Filters before the plan."""

    @property
    def gone(self) -> float:
        """Return the share of filters that the plan drops."""
        return 1 - len(self.kept) / self.total


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block."""

    name: str
    ratio: float | None
    by_default: bool
    """Whether the ratio is the default, rather than one of its own."""
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that there is to tell of a network."""

    title: str
    shape: tuple[int, int, int]
    """Channels, height and width of the image that MACs are counted for."""
    layers: tuple[Layer, ...]
    blocks: tuple[BlockRow, ...]
    prune: Prune
    plan: Plan | None = None
    """What goes, or went; None: nothing."""
    applied: bool = False
    """Whether the network is what the plan has left."""
    params: tuple[float, float] = (0, 0)
    """Before the plan and after it."""
    macs: tuple[float, float] = (0, 0)
    drawn: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Where weights were drawn anew: mean and deviation of each convolution's, before and after."""


def inspect(
    model: nn.Module,
    channels: Channels,
    prune: Prune,
    *,
    made: Plan | None = None,
    applied: Mapping[str, Any] | None = None,
    shape: tuple[int, int, int],
    title: str,
) -> Inspection:
    """Return what there is to tell of a network.

    channels: of the network, from `trace` at the size of `shape`.
    prune: what was asked for.
    made: the plan that it makes of this network, or that has made this network.
    applied: of a network that a plan has made, what its checkpoint tells: parent_params, parent_gmacs, perhaps drawn.
    """
    counts = {} if made is None or applied is not None else plan.counts(channels, made)
    params, macs = ((float(count()), float(count(counts))) for count in (channels.parameters, channels.macs))
    if applied is not None:
        params, macs = (applied["parent_params"], params[1]), (1e9 * applied["parent_gmacs"], macs[1])
    by_ratio = _by_ratio(prune, made)
    groups = pruning.blocks_of(prune, model, channels)
    asked = pruning.ratios(prune, channels, groups) if by_ratio else {}
    owner = {origin: name for name, block in groups.items() for origin in block.origins}
    ratio = {layer.name: asked.get(owner.get(layer.writes[0][0], "")) for layer in channels.convolutions()}
    layers = [_layer(layer, made, ratio[layer.name]) for layer in channels.convolutions()]
    by_name = {layer.name: layer for layer in layers}
    rows = [
        BlockRow(
            name=name,
            ratio=asked.get(name),
            by_default=asked.get(name) == prune.default and not any(blocks.within(name, own) for own in prune.blocks),
            before=by_name[block.ranked].total,
            after=len(by_name[block.ranked].kept),
        )
        for name, block in groups.items()
    ]
    return Inspection(
        title=title,
        shape=shape,
        layers=tuple(layers),
        blocks=tuple(rows),
        prune=prune,
        plan=made,
        applied=applied is not None,
        params=params,
        macs=macs,
        drawn=(applied or {}).get("drawn", {}),
    )


def _layer(layer: graph.Layer, made: Plan | None, ratio: float | None) -> Layer:
    module: Any = layer.module
    return Layer(
        name=layer.name,
        kind=type(module).__name__,
        shape=tuple(module.weight.shape),
        inputs=module.in_channels,
        outputs=module.out_channels,
        parameters=sum(tensor.numel() for tensor in module.parameters()),
        norms=tuple(importance.filter_norms(module, 1).tolist()),
        ratio=ratio,
        kept=tuple(range(module.out_channels)) if made is None else made.kept[layer.name],
        total=module.out_channels if made is None else made.total[layer.name],
    )


def write(folder: Path, seen: Inspection) -> list[Path]:
    """Write table, pictures and reports into folder/analysis; return their paths, single histograms left out."""
    folder = folder / FOLDER
    table = durable.write(folder / "layers.csv", _csv(seen.layers))
    drawn = {"L1 norms of all filters": pictures.norms(folder / "l1_norms.png", seen.layers)}
    files = [table]
    if seen.plan is not None:
        drawn = {
            "Channels of each block, before and after": pictures.widths(folder / "widths.png", seen.blocks),
            "Channels that stay and that go": pictures.masks(folder / "masks.png", seen.layers),
            **drawn,
        }
        plan.write(folder / plan.FILE, seen.plan)
        files.append(folder / plan.FILE)
    single = {layer.name: folder / "histograms" / f"{layer.name}.png" for layer in seen.layers}
    pictures.histograms(single, seen.layers)
    content = _content(seen)
    page = durable.write(folder / "report.html", _html(content, drawn, single))
    text = durable.write(folder / "report.md", _markdown(content, folder, drawn, single))
    return [page, text, *files, *drawn.values()]


def rows(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """Return the table: a line for each convolution, by `COLUMNS`."""
    return [dict(zip(COLUMNS, _line(layer), strict=True)) for layer in layers]


def _line(layer: Layer) -> tuple[Any, ...]:
    count = len(layer.norms)
    mean = sum(layer.norms) / count
    deviation = (sum((norm - mean) ** 2 for norm in layer.norms) / count) ** 0.5
    numbers = [f"{number:.6g}" for number in (mean, min(layer.norms), max(layer.norms), deviation)]
    ratio = "" if layer.ratio is None else f"{layer.ratio:g}"
    facts = (layer.name, layer.kind, str(layer.shape), layer.inputs, layer.outputs, layer.parameters)
    return (*facts, *numbers, ratio, f"{layer.gone:.6g}")


def _by_ratio(prune: Prune, made: Plan | None) -> bool:
    """Return whether each block has a ratio; not so where a budget, one share of all, or a given plan decides."""
    return made is not None and prune.way in ("", "ratios")


def _csv(layers: Iterable[Layer]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(layers))
    return text.getvalue()


def _content(seen: Inspection) -> dict[str, Any]:
    """Return what both reports say, as text and tables of text."""
    tables = [("Cost", _cost(seen), f"Of one image of {' x '.join(map(str, seen.shape))}; 1 MAC is 2 FLOPs.")]
    if seen.plan is not None:
        note = "Ratio: the share of filters asked for; default: of blocks without one of their own."
        tables.append(("Blocks", _blocks(seen), note if _by_ratio(seen.prune, seen.plan) else ""))
    after = [("Layers", rows(seen.layers), "L1: of the filters as they are in this network.")]
    if seen.drawn:
        note = "Weights drawn anew after the cut: mean and standard deviation of each convolution's, before and after."
        after.append(("Fresh weights", _drawn(seen.drawn), note))
    return {"title": seen.title, "summary": _summary(seen), "first": tables, "last": after}


def _summary(seen: Inspection) -> str:
    if seen.plan is None:
        return "Not pruned; give values of prune to see what would go."
    prune, verb = seen.prune, "went" if seen.applied else "would go"
    shares = {"global": prune.global_, "macs": prune.macs, "params": prune.params}
    if prune.way == "plan":
        how = f"by the plan {prune.plan}"
    elif prune.way in shares:
        how = f"{prune.way} {shares[prune.way]:g}"
    else:
        how = ", ".join([f"default {prune.default:g}", *(f"{name} {ratio:g}" for name, ratio in prune.blocks.items())])
    before, after = (sum(getattr(row, name) for row in seen.blocks) for name in ("before", "after"))
    told = f"where {prune.where}, importance {prune.importance}, mode {prune.mode}, backend {prune.backend}"
    return f"{before - after} of {before} channels of the blocks {verb}: {how}; {told}."


def _cost(seen: Inspection) -> list[dict[str, Any]]:
    flops = (FLOPS_PER_MAC * seen.macs[0], FLOPS_PER_MAC * seen.macs[1])
    found = []
    for name, (before, after) in {"params": seen.params, "MACs": seen.macs, "FLOPs": flops}.items():
        row = {"": name, "before": f"{before:,.0f}"}
        if seen.plan is not None:
            row |= {"after": f"{after:,.0f}", "less by": f"{100 * (1 - after / before):.2f} %"}
        found.append(row)
    return found


def _blocks(seen: Inspection) -> list[dict[str, Any]]:
    return [
        {
            "block": row.name,
            "ratio": "" if row.ratio is None else f"{row.ratio:g}{' (default)' if row.by_default else ''}",
            "before": row.before,
            "after": row.after,
            "gone": f"{100 * (1 - row.after / row.before):.1f} %",
        }
        for row in seen.blocks
    ]


def _drawn(drawn: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            **{
                f"{what} {when}": f"{told[when][place]:.4g}"
                for place, what in enumerate(("mean", "std"))
                for when in ("before", "after")
            },
        }
        for name, told in drawn.items()
    ]


def _html(content: Mapping[str, Any], drawn: Mapping[str, Path], single: Mapping[str, Path]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("inspection.html").read_text(encoding="utf-8"))
    return template.render(**content, figures=_embedded(drawn), histograms=_embedded(single))


def _embedded(pictures: Mapping[str, Path]) -> dict[str, str]:
    return {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}


def _markdown(content: Mapping[str, Any], folder: Path, drawn: Mapping[str, Path], single: Mapping[str, Path]) -> str:
    parts = [f"# {content['title']}", content["summary"], *map(_section, content["first"])]
    parts += [f"## {name}\n\n![{name}]({path.relative_to(folder)})" for name, path in drawn.items()]
    parts += map(_section, content["last"])
    parts += ["## Histograms", *(f"![{name}]({path.relative_to(folder)})" for name, path in single.items())]
    return "\n\n".join(parts) + "\n"


def _section(table: tuple[str, Sequence[Mapping[str, Any]], str]) -> str:
    title, lines, note = table
    columns = list(lines[0])
    cells = [columns, ["---"] * len(columns), *([line[column] for column in columns] for line in lines)]
    drawn = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)
    return "\n\n".join(part for part in (f"## {title}", note, drawn) if part)
