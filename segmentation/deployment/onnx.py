"""A network as an ONNX file with all that its user has to know, and a runner that knows it.

    model.onnx    image (B, C, H, W) float32, normalised; logits (B, K, H, W); any B, H and W
    model.json    the Description, the file's sha256, precision, versions; the file holds the same but its sha256

The graph pads an image to the size that the network needs and cuts the padding off the logits, as the network does, so
that its user need not. A network made for one size is exported for that size alone, any number at a time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import durable
from segmentation import checkpoints, normalisation, prediction
from segmentation.deployment import DeploymentError, require
from segmentation.normalisation import Normaliser
from segmentation.samples import IMAGE_TYPES

FORMAT = 1
KEY = "segmentation"
"""Under which the file holds its description."""
INPUT, OUTPUT = "image", "logits"
LARGEST_DIFFERENCE = 1e-4
"""Between the logits of onnxruntime and PyTorch, float32; of logits beyond 1, as a part of the largest."""
TRACED = (2, 64, 96)
"""Batch, height and width that a graph for any size is traced with."""
OTHER_SIZES = ((1, 64, 64), (3, 37, 91))
"""Batches, heights and widths at which such a graph is compared with its network, besides the size it is made for."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a user of the file has to know besides its graph: what goes in, and what comes out means."""

    workload: str
    classes: tuple[str, ...]
    in_channels: int
    normaliser: Normaliser
    """What makes an image as stored one for the graph, after percentiles and resize."""
    stored: str = "uint8"
    """Type of the stored pixels that the normaliser expects."""
    value_range: tuple[float, float] = (0, 255)
    """Of the stored pixels: the type's, or of float32 the training split's."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """What makes probabilities of logits; softmax: classes exclude each other, and the largest is the pixel's."""
    threshold: float | tuple[float, ...] = 0.5
    """sigmoid: probability above which a class is called."""
    percentiles: tuple[float, ...] = ()
    """Before all else each channel is clipped to these two of its own percentiles and stretched to 0..1, float32,
    whatever its type; empty: it is not."""
    resize: int = 0
    """Side of the square that a picture is resized to, bilinear; its logits are brought back to its size. 0: as is."""
    tile: int = 0
    """Side of the tiles that a picture is predicted by; 0: whole."""
    overlap: float = 0.5
    """How much tiles overlap, as a part of their side."""
    flips: bool = False
    """Whether probabilities are averaged over mirror images."""
    excluded: tuple[str, ...] = ()
    """Classes that stand for nothing: they have a channel, and count in no mean."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB of each class; empty: none in particular."""
    checkpoint_sha256: str | None = None
    """Of the weights that were exported."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        values: dict[str, Any] = durable.plain({**dataclasses.asdict(self), "normaliser": self.normaliser.to_dict()})
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """Return the description of plain values; others among them count for nothing."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        colours = tuple((red, green, blue) for red, green, blue in known.get("colours", ()))
        scaled = normalisation.from_dict(known["normaliser"])
        return cls(**{**known, **lists, "colours": colours, "normaliser": scaled})


def export(model: nn.Module, path: Path, description: Description, *, height: int, width: int) -> dict[str, Any]:
    """Write a network as path and the description beside it as .json; return what that says.

    height, width: what images mostly are; the only size, for a network that takes no other.

    Raises:
        DeploymentError: if a package is missing, or the graph differs from the network.
    """
    require()
    import onnx

    network = copy.deepcopy(model).cpu().eval()
    channels = description.in_channels
    graph, any_size = _graph(network, channels, height, width)
    shapes = [(2, channels, height, width), *((b, channels, h, w) for b, h, w in OTHER_SIZES if any_size)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.checker.check_model(graph, full_check=True)
    difference = parity(network, Session(graph.SerializeToString()), shapes)
    if not difference <= LARGEST_DIFFERENCE:
        raise DeploymentError(
            f"{path}: logits of onnxruntime and PyTorch differ by {difference:.2g}; expected at most "
            f"{LARGEST_DIFFERENCE:g}; is there an operation in the network that ONNX has otherwise?"
        )
    facts = {
        "precision": "fp32",
        "opset": graph.opset_import[0].version,
        "size": None if any_size else [height, width],
        "largest_difference": difference,
        "compared_at": [list(shape) for shape in shapes],
    }
    return write(graph, path, {**description.to_dict(), **facts})


def write(graph: Any, path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a graph with its record inside, and beside it with the file's sha256; return the latter."""
    import onnx

    told = {**record, "format": FORMAT, "versions": versions()}
    onnx.helper.set_model_props(graph, {KEY: json.dumps(told, sort_keys=True)})
    content = graph.SerializeToString()
    durable.write(path, content)
    told["sha256"] = hashlib.sha256(content).hexdigest()
    durable.write_json(path.with_suffix(".json"), told)
    return told


def read(path: Path) -> dict[str, Any]:
    """Return what is known of an ONNX file that `write` wrote: its .json, or without that what it holds itself.

    Raises:
        DeploymentError: if there is no such file, it is of another program, or its .json of another file.
    """
    require("onnx")
    import onnx

    if not path.is_file():
        raise DeploymentError(f"{path}: no such file; python -m workloads export writes one")
    beside = path.with_suffix(".json")
    if beside.is_file():
        told = durable.read_json(beside)
        if told.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
            raise DeploymentError(f"{beside}: is of another file than {path.name}; export both again")
        return told
    try:
        properties = {each.key: each.value for each in onnx.load(path, load_external_data=False).metadata_props}
    except Exception as error:  # protobuf has an exception of its own for each of its backends
        raise DeploymentError(f"{path}: not an ONNX file ({type(error).__name__}); export it again") from error
    if KEY not in properties:
        raise DeploymentError(f"{path}: tells neither classes nor scaling; export it by python -m workloads export")
    held: dict[str, Any] = json.loads(properties[KEY])
    return held


def versions() -> dict[str, str]:
    """Return what made the file."""
    import onnx
    import onnxruntime
    import onnxscript

    found = {module.__name__: str(module.__version__) for module in (onnx, onnxruntime, onnxscript)}
    return {**checkpoints.versions(), **found}


class Session(nn.Module):
    """An ONNX file where a network is asked for: images (B, C, H, W) to logits (B, K, H, W), on the CPU.

    threads: None: as many as onnxruntime likes.
    """

    def __init__(self, source: Path | bytes, threads: int | None = None) -> None:
        require("onnxruntime")
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        content = source if isinstance(source, bytes) else str(source)
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K, H, W) of images (B, C, H, W)."""
        (logits,) = self.session.run([OUTPUT], {INPUT: image.cpu().contiguous().numpy()})
        return torch.from_numpy(logits)


class Onnx:
    """A file that `export` or `quantise` wrote, ready to use: an image as stored in, probabilities out."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load it; raises DeploymentError like `read`."""
        self.record = read(path)
        self.description = Description.from_dict(self.record)
        self.network = Session(path, threads)

    def probabilities(self, image: Array) -> Array:
        """Return the probability of each class at each pixel, (K, H, W), of an image (C, H, W) as stored.

        Raises:
            DeploymentError: for another number of channels, type or size than the file is for.
        """
        told = self.description
        self._refuse(image)
        image = _stretched(image, told.percentiles)
        seen = told.normaliser(torch.from_numpy(_square(image, told.resize))[None])[0]
        multilabel = told.activation == "sigmoid"
        if told.resize:
            model = prediction.FlipAverage(self.network, multilabel=multilabel) if told.flips else self.network
            logits = interpolate(model(seen[None]), image.shape[1:], mode="bilinear", align_corners=False)[0]
            found = logits.sigmoid() if multilabel else logits.softmax(0)
        else:
            tile = told.tile or max(seen.shape)
            more: dict[str, Any] = {"overlap": told.overlap, "flips": told.flips, "multilabel": multilabel}
            found = prediction.predict_tiles(self.network, seen, tile=tile, **more)
        return np.asarray(found.numpy())

    def classes(self, image: Array) -> Array:
        """Return what each pixel is called: ids (H, W) uint8, or of classes that may overlap (K, H, W) bool."""
        found = self.probabilities(image)
        if self.description.activation == "softmax":
            return np.asarray(found.argmax(0), dtype=np.uint8)
        limit = np.broadcast_to(np.asarray(self.description.threshold), len(found))
        return np.asarray(found > limit[:, None, None])

    def _refuse(self, image: Array) -> None:
        told, size = self.description, self.record.get("size")
        came = f"{image.dtype} {image.shape}"
        # Percentiles stretch whatever there is; all other scalings are of the type that was learned from.
        kinds = IMAGE_TYPES if told.normaliser.method == "percentile" else (told.stored,)
        fits = image.dtype.kind in "iuf" if told.percentiles else image.dtype.name in kinds
        if image.ndim != 3 or len(image) != told.in_channels or not fits:
            types = "numbers" if told.percentiles else " or ".join(kinds)
            expected = f"{types} ({told.in_channels}, H, W), as stored"
            raise DeploymentError(f"image is {came}; expected {expected}")
        seen = [told.resize] * 2 if told.resize else [min(told.tile or side, side) for side in image.shape[1:]]
        if size and seen != size:
            raise DeploymentError(f"image is {came}; this network takes no other height and width than {size}")


def parity(model: nn.Module, session: nn.Module, shapes: Sequence[tuple[int, ...]]) -> float:
    """Return the largest difference of logits over random images, of logits beyond 1 as a part of the largest."""
    draw = torch.Generator().manual_seed(0)
    found = []
    with torch.inference_mode():
        for shape in shapes:
            image = torch.randn(shape, generator=draw)
            ours, theirs = model(image), session(image)
            found.append(float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1)))
    # nan is the largest of all.
    return float(np.max(found))


def _graph(network: nn.Module, channels: int, height: int, width: int) -> tuple[Any, bool]:
    """Return the graph, and whether it takes any size."""
    batch, rows, columns = TRACED
    try:
        return _traced(network, (batch, channels, rows, columns), any_size=True), True
    except Exception as error:  # the exporter, and what it is built of, raise many kinds
        first = error
    try:
        return _traced(network, (batch, channels, height, width), any_size=False), False
    except Exception as error:
        raise DeploymentError(
            f"{type(network).__name__}: cannot be exported ({_sentence(first)}), nor for images of "
            f"{width}x{height} alone ({_sentence(error)})"
        ) from error


def _traced(network: nn.Module, shape: tuple[int, ...], *, any_size: bool) -> Any:
    free = [0, 2, 3] if any_size else [0]
    dynamic = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (torch.randn(shape),),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _strip(graph)
    for value in (graph.graph.input[0], graph.graph.output[0]):
        for axis in free:
            value.type.tensor_type.shape.dim[axis].dim_param = ("batch", "", "height", "width")[axis]
    return graph


def _strip(graph: Any) -> None:
    """Take out the exporter's notes, stack traces of this machine among them, which can outweigh a small network."""
    del graph.metadata_props[:], graph.graph.metadata_props[:], graph.graph.value_info[:]
    for each in (*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        each.doc_string = ""
        del each.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice to itself; what it cannot do it raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _stretched(image: Array, percentiles: tuple[float, ...]) -> Array:
    """Return an image (C, H, W) with each channel clipped to its percentiles and stretched to 0..1, or as it is."""
    if not percentiles:
        return image
    low, high = percentiles
    return normalisation.percentile(torch.from_numpy(image.astype(np.float32))[None], low, high)[0].numpy()


def _square(image: Array, side: int) -> Array:
    """Return an image (C, H, W) as a square of this side, bilinear over all the pixels that one stands for."""
    if not side:
        return image.copy()
    if image.dtype != np.uint8:
        seen = torch.from_numpy(image.astype(np.float32))[None]
        smooth = interpolate(seen, (side, side), mode="bilinear", align_corners=False, antialias=True)[0].numpy()
        return np.asarray(smooth if image.dtype == np.float32 else smooth.round().astype(image.dtype))
    from PIL import Image

    planes = [Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR) for plane in image]
    return np.stack([np.asarray(plane, np.uint8) for plane in planes])


def _sentence(error: BaseException) -> str:
    """Return the first line that an exception's innermost cause says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
