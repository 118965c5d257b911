"""A checkpoint of any workload made ready to use: what it costs, as ONNX, in int8, as an engine."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import configuration
from segmentation import checkpoints, losses, splits
from segmentation.deployment import measure, onnx, qat, quantise, require, tensorrt
from segmentation.deployment.measure import Cost
from segmentation.deployment.onnx import Description
from segmentation.networks.volume import Volumes
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Batch
from workloads import WorkloadError, _model

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
BATCH = 8
HOOKS = ("load", "samples")


@dataclass(frozen=True)
class Ready:
    """A checkpoint with its data."""

    config: Any
    model: nn.Module
    normaliser: Normaliser
    samples: Samples
    made: Splits
    checkpoint: Path
    description: Description

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        height, width = self.samples.shape(self.made.train[0])[1:]
        return height, width

    @property
    def multilabel(self) -> bool:
        """Whether classes may overlap."""
        return self.description.activation == "sigmoid"

    @property
    def ignore_index(self) -> int:
        """What pixels that count for nothing have in a mask."""
        return int(getattr(self.config.data, "ignore_index", losses.IGNORE_INDEX))

    def batches(self, indices: Any) -> Iterator[Batch]:
        """Yield some samples as they are, normalised, on the network's device."""
        device = next(self.model.parameters()).device
        return _model.evaluation_batches(self.samples, indices, self.normaliser, batch_size=BATCH, device=device)

    def calibration(self) -> Iterator[Tensor]:
        """Yield images of the training split, evenly spread."""
        return (image for image, _, _ in self.batches(_model.spread(self.made.train, CALIBRATION_IMAGES)))


def ready(name: str, workload: ModuleType, checkpoint: Path, changes: Mapping[str, Any]) -> Ready:
    """Return a checkpoint with its data and what a user of its network has to know.

    Raises:
        WorkloadError: for a workload that does not tell how.
        DataError: if the checkpoint or its data cannot be used.
    """
    _need(name, workload)
    config, model, normaliser = workload.load(checkpoint, configuration.flatten(changes))
    if isinstance(model, Volumes):
        raise WorkloadError(
            f"{checkpoint}: a network of volumes (network.dims 3); export takes networks of images only"
        )
    samples, made = workload.samples(config)
    record = checkpoints.read_meta(checkpoint)
    first = made.train[0]
    values: dict[str, Any] = {
        "workload": name,
        "classes": tuple(record["classes"]),
        "in_channels": samples.shape(first)[0],
        "normaliser": normaliser,
        "stored": samples.image(first).dtype.name,
        "value_range": _value_range(samples, made),
        "activation": "sigmoid" if samples.mask(first).ndim == 3 else "softmax",
        "checkpoint_sha256": checkpoints.digest(checkpoint),
    }
    told = workload.deployment(config) if hasattr(workload, "deployment") else {}
    return Ready(config, model, normaliser, samples, made, checkpoint, Description(**{**values, **told}))


def export(
    given: Ready, out: Path, *, int8: bool, qat_steps: int, engine: tensorrt.Precision | None, split: str
) -> list[Path]:
    """Write model.onnx and what else is asked for; return the paths.

    qat_steps: 0: no quantisation-aware training.

    Raises:
        DeploymentError: where something is not installed or not there, before anything is written.
    """
    require()
    if engine:
        tensorrt.check()
    height, width = given.size
    if not (int8 or qat_steps):
        onnx.export(given.model, out / "model.onnx", given.description, height=height, width=width)
        written = [out / "model.onnx", out / "model.json"]
    else:
        written = _quantised(given, out, qat_steps, split)
    return [*written, *(_engine(given, out, engine) if engine else [])]


def cost(
    name: str, workload: ModuleType, checkpoint: Path, changes: Mapping[str, Any], *, size: int | None, threads: int
) -> list[Cost]:
    """Return what a checkpoint's network costs on the CPU, and on the GPU where there is one.

    size: side of the image, of volumes of each slice; None: that of the workload's samples.

    Raises:
        WorkloadError: for a workload that does not tell how.
        DataError: if the checkpoint, or the data that tells the size, cannot be used.
    """
    _need(name, workload)
    config, model, _ = workload.load(checkpoint, configuration.flatten(changes))
    if size:
        channels = next(layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
        slices = model.slices if isinstance(model, Volumes) else 1
        shape = (channels, slices * size, size)
    else:
        samples, made = workload.samples(config)
        shape = samples.shape(made.train[0])
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    return [measure.measure(model, *shape, device=device, threads=threads) for device in devices]


def _quantised(given: Ready, out: Path, qat_steps: int, split: str) -> list[Path]:
    _model.refuse_seen(given.checkpoint, given.made)
    height, width = given.size
    tune = functools.partial(_tuned, given, qat_steps) if qat_steps else None
    with splits.test_split_open():
        indices = splits.indices(given.made, split)
        rows = quantise.compare(
            {"model": given.model},
            out,
            given.description,
            calibration=given.calibration,
            batches=lambda: given.batches(indices),
            height=height,
            width=width,
            ignore_index=given.ignore_index,
            tune=tune,
        )
    names = ["model", "model_int8", *["model_int8_qat"] * bool(qat_steps)]
    files = [out / f"{name}{suffix}" for name in names for suffix in (".onnx", ".json")]
    return [*files, *quantise.write_table(rows, out, scored_on=split)]


def _tuned(given: Ready, steps: int, model: nn.Module) -> nn.Module:
    of_epoch = _model.training_batches(given.config, given.samples, given.made, given.normaliser)
    endless = (batch for epoch in itertools.count(1) for batch in of_epoch(epoch))
    chosen = getattr(given.config, "loss_used", given.config.loss)
    loss = losses.build(chosen, multilabel=given.multilabel, ignore_index=given.ignore_index)
    logger.info("quantisation-aware training: %d steps", steps)
    return qat.finetune(model, endless, loss, steps=steps)


def _engine(given: Ready, out: Path, precision: tensorrt.Precision) -> list[Path]:
    source = out / "model.onnx"
    if precision == "int8":
        source = out / "model_int8_symmetric.onnx"
        quantise.quantise(out / "model.onnx", source, given.calibration(), symmetric=True)
    shapes = tensorrt.Shapes.around(*given.size, onnx.read(source)["size"])
    path = out / f"model_{precision}.engine"
    tensorrt.build(source, path, precision=precision, shapes=shapes)
    return [path, path.with_suffix(".json")]


def _need(name: str, workload: ModuleType) -> None:
    if missing := [hook for hook in HOOKS if not hasattr(workload, hook)]:
        raise WorkloadError(f"workload {name!r} has no network to deploy: it lacks {' and '.join(missing)}")


def _value_range(samples: Samples, made: Splits) -> tuple[float, float]:
    kind = samples.image(made.train[0]).dtype
    if kind.kind == "u":
        return 0, int(np.iinfo(kind).max)
    seen = [samples.image(index) for index in _model.spread(made.train, CALIBRATION_IMAGES)]
    return float(min(image.min() for image in seen)), float(max(image.max() for image in seen))
