"""Satellite tiles of the DFC2021 contest, track DSE: settlements without electricity, from many bands and dates.

    root/Tile1/{DNB_VNP46A1_*,S1A_IW_GRDH_*,L2A_*,LC08_L1TP_*}.tif, groundTruth.tif     raw, or below root/Train
    root/{Train,Val,Test}/{subtiles,metadata}                                         processed, or below root/4x4

A tile is 800 x 800 pixels of 99 channels over 16 x 16 cells, of which each has one of four classes. Differs from the
original where it had errors: all layers learn, logits are not activated, weights are loaded, augmentation is for
training alone, tiles are put together by place, and metrics of validation say so.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from segmentation import augmentation, checkpoints, losses, normalisation, ranks, splits, strategy, training
from segmentation import figures as drawing
from segmentation.augmentation import MOVES, Augmentation
from segmentation.epoch import DataError, Epoch, Evaluation
from segmentation.losses import Loss
from segmentation.metrics import majority
from segmentation.networks import coarse
from segmentation.networks.coarse import CoarseNetwork
from segmentation.normalisation import Normalise, Normaliser
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Batch, Parts, TrainingConfig
from workloads import _model
from workloads._esd import dataset, figures, forest, original, processed, reader, scoring, subtiles
from workloads._esd.dataset import Data
from workloads._esd.forest import Forest
from workloads._esd.generator import Synthetic
from workloads._esd.satellites import CLASSES
from workloads._esd.scoring import Found

__all__ = [
    "Config",
    "evaluate",
    "inspect",
    "metrics",
    "parts",
    "pieces",
    "predict",
    "prepare",
    "process",
    "sources",
    "train",
]

logger = logging.getLogger(__name__)

WORKLOAD = "esd"
SHOWN = 4
SWEEP_NAMES = original.SWEEP_NAMES
sweep_value = original.sweep_value
LIGHTNING = {"pytorch_lightning": "pytorch-lightning", "greenlet": "greenlet"}
"""The packages of the extra `lightning`, by what is imported."""


@dataclass(frozen=True, kw_only=True)
class TileAugmentation(Augmentation):
    """How training subtiles are varied. Labels are cells of 500 m: only what moves whole cells can move them too."""

    rotate_degrees: float = 0.0
    """Has to be 0, as have scale, translate, elastic, grid_distortion and optical_distortion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in MOVES:
            if getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}; cells of labels cannot be moved so: expected 0")


@dataclass(frozen=True, kw_only=True)
class CellLoss(Loss):
    """What is made small: the sum of the losses whose weight is not 0."""

    ce: float = 1.0
    """Weight of cross-entropy (classes that exclude each other)."""
    dice: float = 0.0
    """Weight of the soft Dice loss."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Everything that can be set."""

    data: Data = field(default_factory=Data)
    """Where tiles come from, how they are cut and split."""
    normalise: Normalise = field(default_factory=lambda: Normalise(method="none"))
    """How processed values, 0 to 1, are scaled."""
    augmentation: TileAugmentation = field(default_factory=TileAugmentation)
    """How training subtiles are varied."""
    network: CoarseNetwork = field(default_factory=CoarseNetwork)
    """Which network, and how large."""
    loss: CellLoss = field(default_factory=CellLoss)
    """What is made small."""
    loader_workers: int = 0
    """Processes that read a set too large for memory; more than there are CPUs are not started."""
    evaluation_batch: int = 8
    """Subtiles in one pass of validation, evaluate and predict."""
    forest: Forest = field(default_factory=Forest)
    """A random forest on the network's features, which evaluate scores beside it."""
    first_class: Literal[0, 1] = 1
    """What class 0 is in the rasters of predictions: 0, or 1 as in the contest's files."""
    trainer: Literal["loop", "lightning"] = "loop"
    """What makes the steps: this project's loop, or the Trainer of PyTorch Lightning (the extra lightning). Both give
    the same numbers and the same checkpoints, of which each can go on from the other's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 1, "evaluation_batch")
        training.check_least(self, 0, "loader_workers")
        _model.check_class_weights(self.loss.class_weights, len(CLASSES))
        if self.trainer == "lightning":
            _check_lightning(self)
        try:
            coarse.check(self.network, self.data.tile_size_gt)
        except ValueError as error:
            raise ValueError(f"network.{error}") from error

    @classmethod
    def reference(cls) -> Config:
        """Return the original's values."""
        return cls(epochs=2, lr=3e-4, seed=12378921, loader_workers=11, weight_decay=0.0)

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(
            data=Data(synthetic=Synthetic(tiles=6, pixels=4)),
            network=CoarseNetwork(embedding_size=8, pool_sizes=(2, 2), scale_factor=4),
            epochs=2,
            lr=3e-3,
            threads=1,
        )


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    highest = {f"val_{name}": "max" for name in scoring.names()}
    return {**highest, "val_loss": "min", **training.reported(config)}


def prepare(config: Config) -> dict[str, Any]:
    """Check the data, process and decode it once for this machine; build the network once; return the data's manifest.

    Raises:
        DataError: naming the tile and the file that cannot be used, or weights that cannot be had.
        ValueError: for a network made for cells of another size, or a strategy or trainer that is not installed.
    """
    strategy.check(config.strategy)
    forest.require(config.forest)
    _require(config)
    if config.data.processed:  # a folder that was asked for is filled, whatever is decoded already
        dataset.process(config.data, dataset.pieces(config.data))
    samples, _ = dataset.load_once(config.data)
    build_network(config, samples)
    return dataset.manifest(config.data)


def pieces(config: Config) -> list[str]:
    """Return the tiles that are still raw, each of which can be processed by itself."""
    return dataset.pieces(config.data)


def process(config: Config, names: Sequence[str]) -> list[str]:
    """Process some of the tiles; return those that were not done before."""
    return dataset.process(config.data, names)


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield one validated epoch of training after the other; `resume` is a checkpoint folder that one of them saved.

    Raises:
        DataError: if the data, or a checkpoint to start from, cannot be used.
        NonFiniteError: if a loss becomes nan or infinite.
    """
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    shared: dict[str, Any] = {
        "draw": functools.partial(_draw_strips, config, samples, made.validation, normaliser),
        "meta": meta(config, samples, normaliser),
        "resume": resume,
    }
    if config.trainer == "lightning":
        epochs = _fit_by_lightning(config, shared)
    else:
        epochs = training.fit(
            config,
            **vars(_parts(config, samples, made, normaliser)),
            validate=functools.partial(_validated, config, samples, made, normaliser),
            steps_per_epoch=_model.steps_per_epoch(config, made),
            **shared,
        )
    for epoch in epochs:
        yield _model.with_splits(epoch, made)


def parts(config: Config) -> Parts:
    """Return the network as it begins, its loss and its training batches."""
    samples, made = dataset.load_once(config.data)
    return _parts(config, samples, made, normalisation.build(config.normalise, samples, made.train))


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score a checkpoint folder on a split, with intervals over tiles, and write every tile's prediction.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    samples, made = dataset.load_once(config.data)
    _model.refuse_seen(checkpoint, made)
    with splits.test_split_open():
        indices = _filled(config, made, split)
        found = _look(config, samples, indices, normaliser, model)
        drawn = _save_tiles(config, samples, found, out_dir)
        grown = _grow(config, samples, made, indices, normaliser, model) if config.forest.trees else None
    details = {"split": split, "group_key": made.key, "synthetic": not config.data.root}
    tiles = [made.groups[index] for index in found.index]
    blind = majority(dataset.cells_of_class(samples, made.train))
    scored = scoring.evaluated(found, tiles, details, blind)
    if grown is not None:
        scored = forest.beside(scored, scoring.evaluated(grown, tiles, details, blind))
    names = [str(path.relative_to(out_dir)) for path in drawn]
    curves = _model.save_curves(out_dir / "curves.png", checkpoint, "val_mean_iou")
    return dataclasses.replace(scored, figures=tuple(sorted([*names, *curves], key=lambda name: name[-4:] != ".png")))


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write for each raw tile in a folder TILE_prediction.tif and its pictures; return the paths.

    TILE_prediction.tif is 16 x 16, uint8, of 1 to 4 (see `first_class`); TILE_contest.tif is 1 where a settlement has
    no electricity.

    Raises:
        DataError: if the checkpoint or a tile cannot be used, or has other channels.
    """
    config, model, normaliser = load(checkpoint, changes)
    wanted = checkpoints.read_meta(checkpoint)["in_channels"]
    written = []
    for folder in sources(source):
        tile = reader.find_tile(folder, labelled=False)
        arrays = processed.arrays(dataclasses.replace(tile, labels=None), config.data.storage)
        channels = dataset.channels(config.data, {name: len(stack) for name, stack in arrays.items()})
        if len(channels) != wanted:
            dates = ", ".join(f"{count} of {name}" for name, count in tile.dates().items())
            raise DataError(f"{folder}: {len(channels)} channels ({dates}); the network takes {wanted}")
        called = _predict_tile(config, model, normaliser, arrays, processed.metadata(tile), folder)
        seen = figures.visible(dataset.image_of(config.data, arrays), channels)
        written += figures.save_tile(out_dir, tile.name, called, None, seen, first_class=config.first_class)
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: the raw tiles' folders in a folder, or the folder of one tile.

    Raises:
        DataError: if there is none.
    """
    return reader.folders(source)


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw four training subtiles: to the eye, to radar, at night, their cells, and as augmented; return the path."""
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    shown = _model.with_most_classes(samples, splits.indices(made, "train"), SHOWN)
    augment = augmentation.build(config.augmentation, normaliser.black)
    channels = dataset.channels_of(config.data, samples)
    return [figures.save_samples(out_dir / "samples.png", samples, shown, channels, normaliser, augment)]


def build_network(config: Config, samples: Samples) -> nn.Module:
    """Return the network with its first weights.

    Raises:
        DataError: where pretrained weights are asked for and cannot be had.
        ValueError: for a network that is made for cells of another size.
    """
    pixels = dataset.scale(samples)
    if config.network.scale_factor != pixels:
        raise ValueError(
            f"network.scale_factor: got {config.network.scale_factor}, but a cell of {dataset.root(config.data)} has "
            f"{pixels} x {pixels} pixels; set it to {pixels}, and network.pool_sizes to sizes whose product that is"
        )
    return coarse.build(config.network, samples.shape(0)[0], len(CLASSES))


def load(checkpoint: Path, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        CheckpointError: if a file is missing or damaged.
        DataError: if it is another workload's.
    """
    return _model.restore(checkpoint, WORKLOAD, Config, without_weights, changes)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data and who has which, for the export of a network."""
    return dataset.load_once(config.data)


def first_network(config: Config, samples: Samples) -> nn.Module:
    """Return the network as training begins with it, which its seed decides; raises as `build_network`."""
    training.seed_everything(config.seed)
    return build_network(config, samples)


def without_weights(config: Config, record: Mapping[str, Any]) -> nn.Module:
    """Return the network of a checkpoint that says this, its weights still to be filled in."""
    return coarse.build(coarse.without_weights(config.network), record["in_channels"], len(CLASSES))


def meta(config: Config, samples: Samples, normaliser: Normaliser) -> dict[str, Any]:
    """Return what makes a checkpoint describe itself."""
    made = _model.meta(WORKLOAD, config, CLASSES, normaliser, synthetic=not config.data.root)
    return {**made, "in_channels": samples.shape(0)[0]}


def _check_lightning(config: Config) -> None:
    """Refuse what Lightning's Trainer does not do as this project's loop does."""
    lacking: dict[str, Any] = {"micro_batch": 0, "on_oom": "fail", "profile": False}
    for name, plain in lacking.items():
        if (value := getattr(config, name)) != plain:
            raise ValueError(f"{name}: got {value} with trainer lightning; write {name}: {plain}, or trainer: loop")
    if config.strategy not in ("auto", "single", "ddp"):
        raise ValueError(f"strategy: got {config.strategy} with trainer lightning; write ddp, or trainer: loop")


def _require(config: Config) -> None:
    """Raise ValueError, naming the extra, where the trainer is not installed."""
    missing = [package for name, package in LIGHTNING.items() if importlib.util.find_spec(name) is None]
    if config.trainer == "lightning" and missing:
        raise ValueError(
            f"trainer: got lightning, but {' and '.join(missing)} not installed; "
            "pip install 'segmentation-search[lightning]', or write trainer: loop"
        )


def _fit_by_lightning(config: Config, shared: Mapping[str, Any]) -> Iterator[Epoch]:
    _require(config)
    # Late, because it is an optional part, and builds on this module.
    from workloads._esd import pulled

    return pulled.fit(config, **shared)


def _parts(config: Config, samples: Samples, made: Splits, normaliser: Normaliser) -> Parts:
    return Parts(
        model=first_network(config, samples),
        loss=losses.build(config.loss, multilabel=False),
        train_batches=_model.training_batches(config, samples, made, normaliser),
    )


def _validated(
    config: Config, samples: Samples, made: Splits, normaliser: Normaliser, model: nn.Module
) -> dict[str, float]:
    mine = ranks.shard(splits.indices(made, "validation"))
    return scoring.epoch_scores(_look(config, samples, mine, normaliser, model))


def _look(config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser, model: nn.Module) -> Found:
    device = next(model.parameters()).device
    return scoring.look(model, _batches(config, samples, indices, normaliser, device), config.loss)


def _grow(
    config: Config,
    samples: Samples,
    made: Splits,
    indices: Sequence[int],
    normaliser: Normaliser,
    model: nn.Module,
) -> Found:
    """Return what a forest on the network's features, learnt on the training split, makes of some subtiles."""
    device = next(model.parameters()).device
    known, unknown = (_batches(config, samples, each, normaliser, device) for each in (made.train, indices))
    return forest.look(config.forest, model, known, unknown, config.loss, seed=config.seed)


def _batches(
    config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser, device: torch.device
) -> Iterator[Batch]:
    return _model.evaluation_batches(
        samples,
        indices,
        normaliser,
        batch_size=config.evaluation_batch,
        device=device,
        loader_workers=config.loader_workers,
    )


def _filled(config: Config, made: Splits, split: str) -> tuple[int, ...]:
    """Return the numbers of a split's subtiles; DataError where it has none."""
    if not (indices := splits.indices(made, split)):
        raise DataError(f"{dataset.root(config.data)}: there is no tile in split {split}; score another by --split")
    return indices


def _save_tiles(config: Config, samples: Samples, found: Found, out_dir: Path) -> list[Path]:
    """Write each tile of which subtiles were looked at, put together by their places."""
    channels = dataset.channels_of(config.data, samples)
    tiles: dict[str, list[int]] = {}
    for row, index in enumerate(found.index.tolist()):
        tiles.setdefault(samples.groups[index], []).append(row)
    written = []
    for tile, rows in tiles.items():
        at = {row: dataset.place_of(samples, int(found.index[row])) for row in rows}
        called, truth = (
            subtiles.join({at[row]: cells[row] for row in rows}) for cells in (found.called(), found.masks)
        )
        images = {at[row]: samples.image(int(found.index[row])) for row in rows}
        seen = figures.visible(subtiles.join(images), channels)
        written += figures.save_tile(out_dir, tile, called, truth, seen, first_class=config.first_class)
    return written


@torch.inference_mode()
def _predict_tile(
    config: Config,
    model: nn.Module,
    normaliser: Normaliser,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    about: subtiles.TileMetadata,
    folder: Path,
) -> np.ndarray[Any, Any]:
    """Return the likeliest class of each cell, (16, 16)."""
    device = next(model.parameters()).device
    called = {}
    for piece in subtiles.grid_slice(arrays, about, config.data.tile_size_gt):
        image = dataset.image_of(config.data, piece.arrays)
        if image.shape[1] != config.data.tile_size_gt * config.network.scale_factor:
            pixels = image.shape[1] // config.data.tile_size_gt
            raise DataError(f"{folder}: {pixels} pixels to a cell; the network takes {config.network.scale_factor}")
        logits = model(normaliser(torch.from_numpy(image)[None]).to(device))
        called[piece.x_gt, piece.y_gt] = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
    return subtiles.join(called)


@torch.inference_mode()
def _draw_strips(
    config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser, model: nn.Module, path: Path
) -> None:
    shown = _model.with_most_classes(samples, indices, SHOWN)
    channels = dataset.channels_of(config.data, samples)
    examples = [
        figures.strip_example(one.name, figures.visible(one.image, channels), one.probability, one.mask)
        for one in _model.examples(model, samples, shown, normaliser)
        if one.mask is not None
    ]
    drawing.strips(path, examples, multilabel=False, colours=figures.RGB)
