"""Your own images and masks: a folder of each, paired by name; by default the nuclei that come with this package.

    root/images/a.png    any size, 8-bit, 16-bit or float, any number of channels: pictures, rasters (GeoTIFF), arrays
    root/masks/a.png     a class id for each pixel

    root/a.npz           or both in one archive, whose arrays data.npz_keys names

Images larger than a tile are cut. Several images: no image is in two splits. One image or two: regions of it are, and
no tile overlaps another split's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from segmentation import (
    checkpoints,
    evaluation,
    images,
    losses,
    networks,
    normalisation,
    ranks,
    splits,
    strategy,
    surfaces,
    training,
)
from segmentation import figures as drawing
from segmentation.augmentation import Augmentation
from segmentation.epoch import Epoch, Evaluation
from segmentation.losses import Loss
from segmentation.metrics import Convention, majority
from segmentation.networks import Network
from segmentation.normalisation import Normalise, Normaliser
from segmentation.prediction import FlipAverage, predict_tiles
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Parts
from workloads import _filters, _model, _pruned, _sensitivity
from workloads._pairs import dataset, figures
from workloads._pairs.dataset import Data
from workloads._pruned import PrunableConfig

__all__ = [
    "FACTS",
    "TABLE",
    "UNINHERITED",
    "Config",
    "check",
    "evaluate",
    "facts",
    "filters",
    "inspect",
    "metrics",
    "parts",
    "predict",
    "prepare",
    "scan",
    "sources",
    "train",
]

WORKLOAD = "pairs"
UNINHERITED = _pruned.UNINHERITED
FACTS = _pruned.FACTS
TABLE = _pruned.TABLE
CONVENTION = Convention()
EVALUATION_BATCH = 64
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Config(PrunableConfig):
    """Everything that can be set."""

    data: Data = field(default_factory=Data)
    """What is learned from."""
    normalise: Normalise = field(default_factory=lambda: Normalise(method="standard"))
    """How pixel values are scaled."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How training samples are varied."""
    loss: Loss = field(default_factory=Loss)
    """What is made small."""
    loader_workers: int = 0
    """Processes that read a set too large for memory; more than there are CPUs are not started."""
    flips: bool = False
    """Average predictions over mirrored images in evaluate and predict; four times as slow."""
    overlap: float = 0.5
    """How much the tiles overlap from which predict makes an image, as a part of their side."""

    surfaces: bool = False
    """Whether evaluate scores outlines too, in pixels of each tile: HD95 and surface Dice."""
    surface_tolerance: float = 2.0
    """How far outlines may lie apart for the surface Dice, in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 0, "loader_workers", "surface_tolerance")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: got {self.overlap}; expected 0 or more, and less than 1")
        _model.check_class_weights(self.loss.class_weights, self.data.classes)

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(epochs=2, lr=1e-2, threads=1, network=Network(name="tinyunet", base=4))


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    scores = evaluation.conventions(dataset.class_names(config.data), CONVENTION, multilabel=False)
    return {
        **{f"val_{name}": "max" for name in scores},
        "val_loss": "min",
        **training.reported(config),
        **_pruned.reported(config),
    }


def prepare(config: Config) -> dict[str, Any]:
    """Check the data and decode it once for this machine; build the network once; return the data's manifest.

    Raises:
        DataError: naming the file that cannot be used, or pretrained weights that cannot be had.
        ValueError: for an encoder that timm lacks, or that cannot take images of this size, or a strategy
            that needs what is not installed.
    """
    strategy.check(config.strategy)
    config = _pruned.inherited(config, WORKLOAD)
    samples, made = dataset.load(config.data)
    blank = _blank(config, samples)
    _model.macs_of(blank.build(), *blank.shape, config.network)
    _pruned.check(config, blank)
    _pruned.refuse_seen(config, made)
    return dataset.manifest(config.data, samples, made)


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield one epoch of training after the other; `resume` is a checkpoint folder that one of them saved.

    Raises:
        DataError: if the data, or a checkpoint to start from, cannot be used.
        NonFiniteError: if a loss becomes nan or infinite.
    """
    config = _pruned.inherited(config, WORKLOAD, resume)
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    job = _job(config, samples, made, normaliser)
    begun = _pruned.start(config, job, resume)
    for epoch in training.fit(
        config,
        **vars(_parts(config, samples, made, normaliser, begun)),
        validate=_pruned.validator(job, begun),
        draw=_drawer(config, samples, made.validation, normaliser),
        meta={
            **_model.meta(WORKLOAD, config, dataset.class_names(config.data), normaliser, synthetic=False),
            "in_channels": samples.shape(0)[0],
            **begun.record,
        },
        resume=resume,
        steps_per_epoch=_model.steps_per_epoch(config, made),
    ):
        yield _model.with_splits(_pruned.with_plan(epoch, begun), made)


def parts(config: Config) -> Parts:
    """Return the network as it begins, its loss and its training batches."""
    config = _pruned.inherited(config, WORKLOAD)
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    begun = _pruned.start(config, _job(config, samples, made, normaliser))
    return _parts(config, samples, made, normaliser, begun)


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score a checkpoint folder on a split, with intervals over its groups, and draw some of its predictions.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    samples, made = dataset.load(config.data)
    _model.refuse_seen(checkpoint, made)
    names = dataset.class_names(config.data)
    network, model = model, FlipAverage(model, multilabel=False) if config.flips else model
    predicted: dict[int, Any] = {}
    with splits.test_split_open():
        indices = splits.indices(made, split)
        found = _score(config, model, samples, indices, normaliser, predicted if config.surfaces else None)
        drawn = _draw(config, model, samples, indices, normaliser, out_dir)
        tolerance, ignored = config.surface_tolerance, config.data.ignore_index
        outlines = _model.outlines(samples, predicted, config.data.classes, tolerance, ignored)
        told = _pruned.evaluated(checkpoint, config, network, _job(config, samples, made, normaliser), split)
    scored = evaluation.evaluation(
        found,
        [made.groups[index] for index in found.index],
        names,
        multilabel=False,
        convention=CONVENTION,
        details={"split": split, "group_key": made.key, "synthetic": False, "flips": config.flips},
        majority=majority(dataset.class_pixels(samples, made.train)),
    )
    if outlines:
        scored = surfaces.add(scored, outlines, names, unit="pixels", tolerance=tolerance)
    curves = _model.save_curves(out_dir / "curves.png", checkpoint, "val_mean_iou")
    return dataclasses.replace(scored, metrics={**scored.metrics, **told}, figures=(*drawn, *curves))


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write for each image in a file or folder NAME_mask.png, in the values of the data's masks, and NAME_overlay.png.

    Raises:
        DataError: if the checkpoint or an image cannot be used.
    """
    config, model, normaliser = load(checkpoint, changes)
    channels = checkpoints.read_meta(checkpoint)["in_channels"]
    dataset.check_rgb(config.data, channels)
    values = np.array(config.data.value_map or range(config.data.classes), dtype=np.uint8)
    written = []
    for path in sources(source):
        image = dataset.read_channels(config.data, path, channels)
        seen = normaliser(torch.from_numpy(image.copy())[None])[0]
        probability = predict_tiles(
            model,
            seen.to(next(model.parameters()).device),
            tile=config.data.tile or max(seen.shape),
            multilabel=False,
            overlap=config.overlap,
            flips=config.flips,
        )
        classes = probability.argmax(0).cpu().numpy()
        stem = path.relative_to(source).with_suffix("") if path != source else Path(path.stem)
        picture = drawing.three_bands(image, config.data.rgb)
        written += figures.write_prediction(out_dir / stem, picture, values[classes], classes)
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: a file, or the pictures below a folder, in order of name.

    Raises:
        DataError: if there is none, or two differ in nothing but their suffixes.
    """
    if source.is_file():
        return [source]
    found = images.list_images(source, dataset.SUFFIXES)
    _model.refuse_same_names(found)
    return found


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw four training samples: as stored, with their mask, and augmented; return the picture's path."""
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    shown = _model.spread(splits.indices(made, "train"), SHOWN)
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    names, ignored = dataset.class_names(config.data), config.data.ignore_index
    path, bands = out_dir / "samples.png", config.data.rgb
    return [figures.save_samples(path, samples, shown, normaliser, config.augmentation, names, ignored, bands=bands)]


def build_network(config: Config, in_channels: int) -> nn.Module:
    """Return the network with freshly drawn weights, or an encoder's pretrained ones."""
    return networks.build(config.network, in_channels, config.data.classes)


def load(checkpoint: Path, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        DataError: if a file is missing or damaged, or the checkpoint is another workload's.
    """
    return _model.restore(checkpoint, WORKLOAD, Config, _without_weights, changes)


def check(config: Config, training: Config | None = None) -> None:
    """Refuse what no training could change, such as a block to prune that the network lacks; raises ValueError.

    training: of a parent that is still to be trained.
    """
    config = _pruned.expected(config, WORKLOAD, training)
    _pruned.check(config, _blank(config, dataset.load(config.data)[0]))


def facts(config: Config) -> dict[str, float]:
    """Return params, macs and gmacs of the network that a training of this config would have, and of its parent's."""
    config = _pruned.inherited(config, WORKLOAD)
    return _pruned.facts(config, _blank(config, dataset.load(config.data)[0]))


def scan(config: Config, searched: Mapping[str, Sequence[float]], out_dir: Path) -> dict[str, Any]:
    """Try how far the parent can be pruned, one value at a time and without training; see workloads._sensitivity."""
    config = _pruned.inherited(config, WORKLOAD)
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    return _sensitivity.scan(config, _job(config, samples, made, normaliser), searched, out_dir)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data and who has which, for the export of a network."""
    return dataset.load(config.data)


def deployment(config: Config) -> dict[str, Any]:
    """Return how an exported network is used."""
    return {
        "tile": config.data.tile,
        "overlap": config.overlap,
        "flips": config.flips,
        "colours": drawing.class_colours(config.data.classes),
    }


def filters(checkpoint: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Look at a checkpoint's filters, and at those that values of `prune` would drop; see workloads._filters."""
    others, asked = _filters.split(changes)
    config, model, normaliser = load(checkpoint, others)
    samples, made = dataset.load(config.data)
    return _filters.write(checkpoint, config, model, _job(config, samples, made, normaliser), out_dir, asked)


def _without_weights(config: Config, record: Mapping[str, Any]) -> nn.Module:
    network = networks.without_weights(config.network)
    model = build_network(dataclasses.replace(config, network=network), record["in_channels"])
    return _pruned.restored(model, record, record["in_channels"])


def _blank(config: Config, samples: Samples) -> _pruned.Blank:
    """Return how the whole network is made, and for which images."""
    channels, height, width = samples.shape(0)
    return _pruned.Blank(functools.partial(build_network, config, channels), (channels, height, width))


def _job(config: Config, samples: Samples, made: Splits, normaliser: Normaliser) -> _pruned.Job:
    """Return what is pruned, looked at and scored."""

    def score(model: nn.Module, split: str) -> dict[str, float]:
        mine = ranks.shard(splits.indices(made, split))
        scores = evaluation.gather(_score(config, model, samples, mine, normaliser))
        names = dataset.class_names(config.data)
        return evaluation.summary(scores, names, multilabel=False, convention=CONVENTION)

    blank = _blank(config, samples)
    images = _model.first_images(config, samples, made, normaliser)
    return _pruned.Job(blank.build, blank.shape, images, score)


def _parts(config: Config, samples: Samples, made: Splits, normaliser: Normaliser, begun: _pruned.Begun) -> Parts:
    return Parts(
        model=begun.model,
        loss=losses.build(config.loss, multilabel=False, ignore_index=config.data.ignore_index),
        train_batches=_model.training_batches(config, samples, made, normaliser),
    )


def _score(
    config: Config,
    model: nn.Module,
    samples: Samples,
    indices: Sequence[int],
    normaliser: Normaliser,
    predicted: dict[int, Any] | None = None,
) -> evaluation.ImageScores:
    """Return the scores of some samples; their predictions, (H, W) class ids, are put into `predicted`."""
    found = _model.evaluation_batches(
        samples,
        indices,
        normaliser,
        batch_size=EVALUATION_BATCH,
        device=next(model.parameters()).device,
        loader_workers=config.loader_workers,
    )
    loss = losses.build_per_image(config.loss, multilabel=False, ignore_index=config.data.ignore_index)
    return evaluation.score_batches(
        model,
        found,
        config.data.classes,
        multilabel=False,
        ignore_index=config.data.ignore_index,
        loss=loss,
        watch=None if predicted is None else functools.partial(_model.keep_classes, predicted),
    )


def _drawer(
    config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser
) -> Callable[[nn.Module, Path], None]:
    """Return what draws the same few samples at any epoch."""

    def draw(model: nn.Module, path: Path) -> None:
        drawing.strips(path, _examples(config, model, samples, indices, normaliser), multilabel=False)

    return draw


def _draw(
    config: Config, model: nn.Module, samples: Samples, indices: Sequence[int], normaliser: Normaliser, out_dir: Path
) -> list[str]:
    examples = _examples(config, model, samples, indices, normaliser)
    names, colours = dataset.class_names(config.data), drawing.CLASS_COLOURS
    grid = drawing.prediction_grid(out_dir / "predictions.png", examples, names, multilabel=False)
    first = examples[0]
    painted = drawing.paint_prediction(first.probability, colours, multilabel=False)
    over = drawing.overlay(out_dir / "overlay.png", first.image, painted, names, colours, title=first.name)
    return [grid.name, over.name]


def _examples(
    config: Config, model: nn.Module, samples: Samples, indices: Sequence[int], normaliser: Normaliser
) -> list[drawing.Example]:
    """Return a few samples with predictions, spread over a split, those with most classes first."""
    found = _model.examples(model, samples, _model.with_most_classes(samples, indices, SHOWN), normaliser)
    return [dataclasses.replace(one, image=drawing.three_bands(one.image, config.data.rgb)) for one in found]
