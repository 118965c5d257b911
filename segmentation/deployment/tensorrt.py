"""A TensorRT engine of an exported network: for one kind of GPU and one version of TensorRT, built where it will run.

TensorRT takes precisions from the graph (strongly typed networks): fp16 is the file with its weights and sums in half
precision, int8 one that `quantise` wrote with symmetric activations.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import durable
from segmentation.deployment import DeploymentError, onnx, require

Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Batch, height and width that an engine takes: the least, what it is tuned for, and the most."""

    least: tuple[int, int, int]
    usual: tuple[int, int, int]
    most: tuple[int, int, int]

    @classmethod
    def around(cls, height: int, width: int, size: list[int] | None, batch: int = 8) -> Shapes:
        """Return shapes from a quarter to twice a size, or that size alone where the network takes no other."""
        if size:
            return cls(least=(1, size[0], size[1]), usual=(1, size[0], size[1]), most=(batch, size[0], size[1]))
        least = (1, max(1, height // 4), max(1, width // 4))
        return cls(least=least, usual=(1, height, width), most=(batch, 2 * height, 2 * width))


def check() -> None:
    """Raise DeploymentError, saying in one sentence what is missing, where no engine can be built."""
    if importlib.util.find_spec("tensorrt") is None:
        raise DeploymentError("TensorRT is not installed; pip install tensorrt on the machine whose GPU will run it")
    if not torch.cuda.is_available():
        raise DeploymentError("an engine is built on the GPU that will run it, and PyTorch finds none here")


def build(
    source: Path, path: Path, *, precision: Precision, shapes: Shapes, workspace_mib: int = 1024
) -> dict[str, Any]:
    """Write the engine of an exported file as path, and what was built as .json; return what that says.

    Raises:
        DeploymentError: where none can be built, or for a file that is not of this precision.
    """
    check()
    content = typed(source, precision)
    import tensorrt as trt

    record = onnx.read(source)
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(content):
        problems = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise DeploymentError(f"{source}: TensorRT {trt.__version__} cannot read it ({problems})")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib * 2**20)
    profile = builder.create_optimization_profile()
    least, usual, most = (
        (batch, record["in_channels"], height, width)
        for batch, height, width in (shapes.least, shapes.usual, shapes.most)
    )
    profile.set_shape(onnx.INPUT, least, usual, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DeploymentError(f"{source}: TensorRT {trt.__version__} built no engine; its log above says why")
    durable.write(path, bytes(engine))
    told = {
        **{name: value for name, value in record.items() if name not in ("sha256", "largest_difference")},
        "precision": precision,
        "engine_mb": path.stat().st_size / 1e6,
        "shapes": dataclasses.asdict(shapes),
        "source_sha256": record.get("sha256"),
        "tensorrt": str(trt.__version__),
        "gpu": torch.cuda.get_device_name(),
    }
    durable.write_json(path.with_suffix(".json"), told)
    return told


def typed(source: Path, precision: Precision) -> bytes:
    """Return an exported file's graph in the precision that the engine is to have.

    Raises:
        DeploymentError: if it is in int8 already and fp is asked for, or the other way round.
    """
    require()
    from onnx import load as load_graph

    record = onnx.read(source)
    symmetric = record.get("calibration", {}).get("symmetric_activations", False)
    if precision == "int8" and not symmetric:
        raise DeploymentError(f"{source}: is no int8 file with symmetric activations; quantise(..., symmetric=True)")
    if precision != "int8" and record["precision"] != "fp32":
        raise DeploymentError(f"{source}: is in {record['precision']}; an engine in {precision} needs the fp32 file")
    if precision != "fp16":
        return source.read_bytes()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half: bytes = convert_float_to_float16(load_graph(source), keep_io_types=True).SerializeToString()
    return half
