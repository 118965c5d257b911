"""Int8 for the CPU: an ONNX file quantised after training, and what that costs in Dice and gains in size and time.

Weights are symmetric, one scale a channel, those of transposed convolutions too; activations have one scale a tensor,
from the smallest and largest values seen on calibration images of the training split (QDQ format of onnxruntime).
The head stays in float32: of logits in 256 steps many are equal, and equal ones all go to the first class. So does
normalisation that is no part of a convolution (group, instance, layer): it has few weights.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import durable
from segmentation import evaluation
from segmentation.deployment import DeploymentError, measure, onnx, require
from segmentation.deployment.onnx import Description, Onnx, Session
from segmentation.networks import cost
from segmentation.training import Batch

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file of one network: how large, how fast, how good."""

    network: str
    precision: str
    parameters: int
    size_mb: float
    """Of the file, in 10^6 bytes."""
    size_ratio: float
    """To the same network's fp32 file."""
    p50_ms: float
    """Of one image in onnxruntime on the CPU."""
    p95_ms: float
    dice: float | None
    """Mean over foreground classes, pixels of all images pooled; None where undefined."""
    dice_with_background: float | None
    """Over all classes; None where classes may overlap, as then there is no background class."""
    dice_loss: float | None
    """How much lower `dice` is than that of the same network's fp32 file."""


def quantise(
    source: Path, path: Path, calibration: Iterable[Tensor], *, symmetric: bool = False, reduce_range: bool = False
) -> dict[str, Any]:
    """Write an exported network in int8 as path, and its description as .json; return what that says.

    source: what `onnx.export` wrote; calibration: normalised images (B, C, H, W).
    symmetric: activations too have their zero at 0, as a TensorRT engine needs it.
    reduce_range: weights of 7 bits, for CPUs without VNNI, whose sums of 8-bit products may overflow.

    Raises:
        DeploymentError: if a package is missing, there is no calibration image, or source is of another program.
    """
    require()
    from onnx import load as load_graph
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    record = onnx.read(source)
    reader = _reader(calibration)
    with tempfile.TemporaryDirectory() as folder:
        merged, made = Path(folder) / "merged.onnx", Path(folder) / "int8.onnx"
        # Batch norm becomes part of its convolution first. Sizes are free, and ranks are known without inference.
        quant_pre_process(source, merged, skip_symbolic_shape=True, skip_onnx_shape=True)
        quantization.quantize_static(
            merged,
            made,
            reader,
            op_types_to_quantize=[name for name in QDQRegistry if not name.endswith("Normalization")],
            nodes_to_exclude=_head(load_graph(merged).graph),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # CalibMaxIntermediateOutputs would forget all images but the last few (onnxruntime 1.31).
            extra_options={"ActivationSymmetric": symmetric},
        )
        graph = load_graph(made)
    del graph.graph.value_info[:]
    facts = {"images": reader.images, "range": "smallest and largest value", "symmetric_activations": symmetric}
    dropped = ("sha256", "largest_difference", "compared_at")
    kept = {name: value for name, value in record.items() if name not in dropped}
    return onnx.write(graph, path, {**kept, "precision": "int8", "calibration": facts})


def compare(
    networks: Mapping[str, nn.Module],
    folder: Path,
    description: Description,
    *,
    calibration: Callable[[], Iterable[Tensor]],
    batches: Callable[[], Iterable[Batch]],
    height: int,
    width: int,
    ignore_index: int = 255,
    threads: int = 1,
    runs: int = 30,
    tune: Callable[[nn.Module], nn.Module] | None = None,
) -> list[Row]:
    """Write NAME.onnx and NAME_int8.onnx of each network, with `tune` NAME_int8_qat.onnx too; return a row for each.

    networks: full or pruned, by name; height, width: of the one image that is timed.
    calibration gives normalised images of the training split; batches what Dice is measured on: image, mask and index.
    tune: quantisation-aware training, such as `qat.finetune` with all but its network.
    """
    rows: list[Row] = []
    for name, model in networks.items():
        plain, small = folder / f"{name}.onnx", folder / f"{name}_int8.onnx"
        onnx.export(model, plain, description, height=height, width=width)
        quantise(plain, small, calibration())
        files = {"fp32": plain, "int8": small}
        if tune is not None:
            files["int8 QAT"] = folder / f"{name}_int8_qat.onnx"
            _tuned(tune(model), files["int8 QAT"], description, calibration(), height, width)
        size = (description.in_channels, height, width)
        first: Row | None = None
        for precision, path in files.items():
            row = _row(
                name, precision, path, cost.parameters(model), first, batches(), ignore_index, size, threads, runs
            )
            first = first or row
            rows.append(row)
    return rows


def write_table(rows: Sequence[Row], folder: Path, *, scored_on: str) -> tuple[Path, Path]:
    """Write quantisation.csv and quantisation.md; return their paths."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    table = durable.write(folder / "quantisation.csv", text.getvalue())
    return table, durable.write(folder / "quantisation.md", markdown(rows, scored_on=scored_on))


def markdown(rows: Sequence[Row], *, scored_on: str) -> str:
    """Return the rows as a Markdown table, its conventions below."""
    lines = [
        "| network | precision | parameters | size MB | size | p50 ms | p95 ms | Dice | Dice with background | loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        scores = " | ".join(map(_score_text, (row.dice, row.dice_with_background, row.dice_loss)))
        sizes = f"{row.parameters:,} | {row.size_mb:.3f} | {row.size_ratio:.3f}"
        times = f"{row.p50_ms:.2f} | {row.p95_ms:.2f}"
        lines.append(f"| {row.network} | {row.precision} | {sizes} | {times} | {scores} |")
    note = (
        f"Dice: mean over foreground classes on the {scored_on} split, pixels pooled; loss: how much lower than fp32. "
        "Times: one image in onnxruntime on the CPU. Size: of the file, MB and as a part of fp32's. "
        "QAT: after some more steps of training, from which Dice gains as well."
    )
    return "\n".join([*lines, "", note, ""])


class _Reader:
    """Calibration images as onnxruntime asks for them, counted."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches, self.images = batches, 0

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by its input's name; None: there is no more."""
        image = next(self.batches, None)
        if image is None:
            return None
        self.images += len(image)
        return {onnx.INPUT: image.cpu().contiguous().numpy()}


def _reader(calibration: Iterable[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise DeploymentError("calibration: got no image; int8 needs some of the training split for its scales")

    def all_batches() -> Iterator[Tensor]:
        yield first
        yield from batches

    return type("Reader", (_Reader, CalibrationDataReader), {})(all_batches())


def _head(graph: Any) -> list[str]:
    """Return the names of the nodes between the last convolutions and the logits, those convolutions included."""
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[str, Any] = {}
    waiting = [each.name for each in graph.output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in found:
            continue
        found[node.name] = node
        if node.op_type not in WEIGHTED:
            waiting += node.input
    return list(found)


def _tuned(
    model: nn.Module, path: Path, description: Description, calibration: Iterable[Tensor], height: int, width: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "tuned.onnx"
        onnx.export(model, plain, description, height=height, width=width)
        quantise(plain, path, calibration)


def _row(
    name: str,
    precision: str,
    path: Path,
    parameters: int,
    first: Row | None,
    batches: Iterable[Batch],
    ignore_index: int,
    size: tuple[int, ...],
    threads: int,
    runs: int,
) -> Row:
    told, session = Onnx(path, threads).description, Session(path, threads)
    image = torch.zeros(1, *size)
    taken = measure.latency(lambda: session(image), runs=runs, warmup=max(2, runs // 5))
    dice, with_background = _dice(session, batches, told, ignore_index)
    size_mb = path.stat().st_size / 1e6
    lost = first.dice - dice if first and first.dice is not None and dice is not None else None
    return Row(
        network=name,
        precision=precision,
        parameters=parameters,
        size_mb=size_mb,
        size_ratio=size_mb / (first.size_mb if first else size_mb),
        p50_ms=taken.p50_ms,
        p95_ms=taken.p95_ms,
        dice=dice,
        dice_with_background=with_background,
        dice_loss=lost if first else 0.0,
    )


def _dice(
    session: nn.Module, batches: Iterable[Batch], told: Description, ignore_index: int
) -> tuple[float | None, float | None]:
    """Return the mean Dice over the foreground, and over all classes where there is a background."""
    multilabel = told.activation == "sigmoid"
    on_cpu = ((image.cpu(), mask.cpu(), index) for image, mask, index in batches)
    found = evaluation.score_batches(
        session,
        on_cpu,
        len(told.classes),
        multilabel=multilabel,
        threshold=told.threshold,
        ignore_index=ignore_index,
    )
    scores = evaluation.summary(found, told.classes, multilabel=multilabel, excluded=told.excluded)
    if multilabel:
        return scores.get("mean_dice"), None
    return scores.get("mean_dice_no_bg"), scores.get("mean_dice")


def _score_text(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"
