"""Spacecraft of SPARK 2024: body and solar panels, told from the background by UNet 3+ on a timm backbone.

    root/train.csv, root/val.csv    columns Class, Image name, Mask name
    root/images/, root/mask/        a folder for each satellite, in it train/ and val/

Without `data.root` spacecraft are generated in that layout. Differs from the original where it had errors: validation
counts at its true epoch, the learning rate falls over the steps there are, a frozen backbone keeps its batch
statistics, and nobody is chosen by the pictures that report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import configuration
from configuration import ConfigError
from segmentation import (
    checkpoints,
    economy,
    evaluation,
    losses,
    networks,
    normalisation,
    ranks,
    splits,
    strategy,
    training,
)
from segmentation import figures as drawing
from segmentation import metrics as counting
from segmentation.augmentation import Augmentation
from segmentation.epoch import Epoch, Evaluation
from segmentation.losses import Loss
from segmentation.metrics import Convention
from segmentation.networks import Network, cost
from segmentation.normalisation import Normalise, Normaliser
from segmentation.prediction import FlipAverage
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Parts, TrainingConfig
from workloads import _model
from workloads._pairs import figures
from workloads._spark import dataset, evaluation_files, inference, reader, submission, training_files
from workloads._spark.classes import CLASSES, COLOURS
from workloads._spark.dataset import Data
from workloads._spark.generator import Synthetic
from workloads._spark.training_files import Architecture, RunFolder

__all__ = [
    "Config",
    "check",
    "evaluate",
    "inspect",
    "merge",
    "metrics",
    "parts",
    "predict",
    "prepare",
    "sources",
    "train",
]

logger = logging.getLogger(__name__)

CHANNELS = 3
CONVENTION = Convention()
FAMILIES = ("unet3plus", "unet3plus_simplified")
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Everything that can be set."""

    data: Data = field(default_factory=Data)
    """Where pictures come from, and how they are split."""
    normalise: Normalise = field(default_factory=lambda: Normalise(method="imagenet"))
    """How pixel values are scaled."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(brightness=0.2, contrast=0.2))
    """How training samples are varied."""
    network: Network = field(default_factory=lambda: Network(name="unet3plus", encoder="convnext_tiny"))
    """Which network, and how large; its encoder is the backbone."""
    loss: Loss = field(default_factory=Loss)
    """What is made small."""
    lr: float = 1e-4
    """Learning rate."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adamw"
    """Optimiser."""
    loader_workers: int = 0
    """Processes that read a set too large for memory, and threads of predict; more than there are CPUs are not
    started."""
    train_scores: bool = False
    """Report train_mean_iou and train_mean_dice too; costs another pass over the training split."""
    evaluation_batch: int = 32
    """Images in one pass of validation, evaluate and predict."""
    flips: bool = False
    """Average predictions over mirrored images in evaluate and predict; four times as slow."""
    upsample: submission.Upsample = "logits"
    """How a prediction gets its picture's own size. logits: bilinear, then the largest. nearest: as in the original."""
    submission: submission.Kind = "bool"
    """Type of the submission's arrays: bool, or uint8 of 0 and 255."""
    submission_zip: bool = True
    """Whether predict of a folder ends with submission.zip, checked for every picture."""
    pictures: bool = True
    """Whether predict writes NAME_pred.png beside each array."""
    examples: int = 20
    """Pictures that evaluate draws."""
    out: str = ""
    """Folder for the original's own files (unet3plus_best and so on); empty: none, as parallel trials need it."""
    save_every: int = 10
    """Keep the weights of every so many epochs in `out`; 0: of none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 1, "evaluation_batch")
        training.check_least(self, 0, "examples", "save_every", "loader_workers")
        _model.check_class_weights(self.loss.class_weights, len(CLASSES))
        if self.out and self.network.name not in FAMILIES:
            raise ValueError(f"out: its files are those of {' and '.join(FAMILIES)}; got {self.network.name}")

    @classmethod
    def reference(cls) -> Config:
        """Return the original's values; its learning rate falls over the run's own steps instead of 10,000."""
        encoder = "convnext_tiny.fb_in22k_ft_in1k"
        return cls(
            data=Data(test="from_train", target_size=512, mask_resize="rgb_first"),
            network=Network(name="unet3plus_simplified", encoder=encoder, cat_channels=64, pretrained=True),
            augmentation=Augmentation(brightness_factor=0.2, contrast=0.2, colour_probability=0.5),
            loss=Loss(ce=0.5, dice=0.5, aux_weight=0.4),
            epochs=30,
            batch_size=8,
            loader_workers=7,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=1e-4,
            lr_schedule="warmup_linear",
            warmup_steps=500,
            clip_norm=1.0,
            precision="fp32",
            patience=15,
            patience_unit="validations",
            validate_every=2,
            upsample="nearest",
        )

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(
            data=Data(target_size=64, synthetic=Synthetic(samples=40, size=64, test_images=4)),
            network=Network(name="unet3plus", encoder="resnet10t", cat_channels=4),
            epochs=2,
            lr=3e-3,
            examples=2,
            threads=1,
        )


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    scores = {f"val_{name}": "max" for name in evaluation.conventions(CLASSES, CONVENTION, multilabel=False)}
    trained = dict.fromkeys(("train_mean_iou", "train_mean_dice"), "max") if config.train_scores else {}
    rest = {"val_loss": "min", **training.reported(config), "gmacs": "min", "parameters": "min"}
    return {"val_mean_iou_no_bg": "max", **scores, **trained, **rest}


def prepare(config: Config) -> dict[str, Any]:
    """Check the data and decode it once for this machine; build the network once; return the data's manifest.

    Raises:
        DataError: naming the file that cannot be used, or pretrained weights that cannot be had.
        ValueError: for a backbone that timm lacks, or that cannot take images of this size, or a strategy
            that needs what is not installed.
    """
    strategy.check(config.strategy)
    build_network(config)
    return dataset.manifest(config.data)


def check(config: Config) -> None:
    """Raise ValueError for a backbone that timm lacks, or that cannot take images of this size."""
    try:
        price_of(config)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("data.") else f"network.{text}") from error


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield one validated epoch of training after the other; `resume` is a checkpoint folder that one of them saved.

    Raises:
        DataError: if the data, or a checkpoint to start from, cannot be used.
        NonFiniteError: if a loss becomes nan or infinite.
    """
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    kept = _Kept(config, resume) if config.out else None
    for epoch in training.fit(
        config,
        **vars(_parts(config, samples, made, normaliser)),
        validate=_validator(config, samples, made, normaliser),
        draw=functools.partial(_draw_strips, samples, made.validation, normaliser),
        meta=_model.meta("spark", config, CLASSES, normaliser, synthetic=not config.data.root),
        resume=resume,
        steps_per_epoch=_model.steps_per_epoch(config, made),
        watch=kept.add if kept else None,
    ):
        yield _model.with_splits(epoch, made)
    if kept:
        kept.finish()


def parts(config: Config) -> Parts:
    """Return the network as it begins, its loss and its training batches."""
    samples, made = dataset.load_once(config.data)
    return _parts(config, samples, made, normalisation.build(config.normalise, samples, made.train))


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score a checkpoint folder on a split, with intervals, a table of satellites and the original's files.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    samples, made = dataset.load_once(config.data)
    _model.refuse_seen(checkpoint, made)
    with splits.test_split_open():
        indices = splits.indices(made, split)
        shown = _model.spread(indices, config.examples)
        images = _batches(config, samples, indices, normaliser, next(model.parameters()).device)
        with _answering(config, model) as asked:
            found = inference.score(asked, images, shown, precision=config.precision)
        flown = dataset.satellites(samples, found.index.tolist())
        examples = _marked_examples(samples, found, shown)
        files = evaluation_files.write(out_dir, found.tables, flown, examples, config.examples)
    price = price_of(config)
    scored = evaluation.evaluation(
        evaluation.ImageScores(
            found.index, counting.counts_from_confusion(found.tables), np.full(len(found.index), np.nan)
        ),
        [made.groups[index] for index in found.index],
        CLASSES,
        multilabel=False,
        convention=CONVENTION,
        details={
            "split": split,
            "group_key": made.key,
            "synthetic": not config.data.root,
            "flips": config.flips,
            "per_satellite": evaluation_files.satellite_table(found.tables, flown),
            **price,
        },
    )
    curves = _model.save_curves(out_dir / "curves.png", checkpoint, "val_mean_iou_no_bg")
    pictures = [name for name in files if name.endswith(".png")]
    rest = [name for name in files if name not in pictures]
    return dataclasses.replace(scored, metrics={**scored.metrics, **price}, figures=(*pictures, *curves, *rest))


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write for each picture in a file or folder NAME_layer.npz, as SPARK's scorer wants it, and NAME_pred.png.

    For a folder submission.zip follows, if all is as it should be.

    Raises:
        DataError: if the checkpoint or a picture cannot be used, or the folder of predictions holds others too.
    """
    config, model, normaliser = load(checkpoint, changes)
    pictures = sources(source)
    written: list[Path] = []
    with _answering(config, model) as asked:
        for path, classes in inference.predict(
            asked,
            pictures,
            normaliser,
            size=config.data.target_size,
            batch_size=config.evaluation_batch,
            loader_workers=config.loader_workers,
            upsample=config.upsample,
            precision=config.precision,
        ):
            written += submission.save(out_dir, path.name, classes, kind=config.submission, picture=config.pictures)
    if config.submission_zip and source.is_dir():
        merge(out_dir, source)
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: a file, or the pictures directly in a folder, in order of name.

    Raises:
        DataError: if there is none, or the predictions of two would have one name.
    """
    pictures = reader.test_images(source)
    submission.stems(pictures)
    return pictures


def merge(out_dir: Path, source: Path) -> list[Path]:
    """Check that every picture of a folder has its prediction, write submission.zip and return its path.

    Raises:
        DataError: naming what is missing, wrong or too many.
    """
    pictures = sources(source)
    path = submission.write_zip(out_dir, pictures)
    logger.info("%d predictions in %s", len(pictures), path)
    return [path]


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw four training samples: as stored, with their mask, and augmented; return the picture's path."""
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    shown = _model.spread(splits.indices(made, "train"), SHOWN)
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    path = out_dir / "samples.png"
    ignored = losses.IGNORE_INDEX
    return [figures.save_samples(path, samples, shown, normaliser, config.augmentation, CLASSES, ignored, COLOURS)]


def build_network(config: Config) -> nn.Module:
    """Return the network with freshly drawn weights, or a backbone's pretrained ones, checked for the image size.

    Raises:
        DataError: where pretrained weights are asked for and cannot be had.
        ValueError: for a backbone that timm lacks, or that cannot take images of this size.
    """
    check(config)
    return networks.build(config.network, CHANNELS, len(CLASSES))


def price_of(config: Config) -> dict[str, float]:
    """Return what a network costs: GMACs of one image, and how many numbers it has; raises like `build_network`."""
    return dict(_price(networks.without_weights(config.network), config.data.target_size))


def load(checkpoint: Path, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        DataError: if a file is missing or damaged, or the checkpoint is another workload's.
    """
    if path := training_files.found_at(checkpoint):
        return _load_original(path, changes or {})
    return _model.restore(checkpoint, "spark", Config, _without_weights, changes)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data and who has which, for the export of a network."""
    return dataset.load_once(config.data)


def deployment(config: Config) -> dict[str, Any]:
    """Return how an exported network is used."""
    return {"resize": config.data.target_size, "flips": config.flips, "colours": COLOURS}


def _load_original(path: Path, changes: Mapping[str, Any]) -> tuple[Config, nn.Module, Normaliser]:
    """Load a model that tells its network alone: the rest is the original's, but for the test split.

    Trained on all of train.csv, it is tested on val.csv, by which its best epoch was chosen.
    """
    model, network, architecture = training_files.load_network(path)
    if (architecture.n_channels, architecture.n_classes) != (CHANNELS, len(CLASSES)):
        raise checkpoints.CheckpointError(
            f"{path}: made for {architecture.n_channels} channels and {architecture.n_classes} classes; "
            f"expected {CHANNELS} and {len(CLASSES)}"
        )
    if refused := [name for name in changes if name.startswith("network.")]:
        raise ConfigError(refused[0], f"cannot be another than in {path}")
    config = Config.reference()
    data = dataclasses.replace(config.data, test="val_csv")
    config = configuration.replace(dataclasses.replace(config, network=network, data=data), changes)
    logger.warning("%s tells its network alone; the rest is the preset reference, or --set", path)
    mean, std = normalisation.imagenet(CHANNELS)
    normaliser = Normaliser(method="imagenet", mean=mean, std=std)
    return config, _model.to_use(model, config.device), normaliser


@contextlib.contextmanager
def _answering(config: Config, model: nn.Module) -> Iterator[nn.Module]:
    """Give the network as evaluate and predict ask it: compiled, and from four sides, where configured."""
    if config.compile:
        economy.compile_network(model)
    try:
        yield FlipAverage(model, multilabel=False) if config.flips else model
    finally:
        economy.drop_compiled(model)


class _Kept:
    """The original's own files of one run: rank 0 writes them, but every rank has to save."""

    def __init__(self, config: Config, resume: Path | None) -> None:
        self.config, self.weights, self.run = config, dict[str, Tensor](), None
        if ranks.place()[0] == 0:
            metric = config.early_stop_metric
            self.run = RunFolder(
                Path(config.out).expanduser(),
                _architecture(config.network),
                metric=metric,
                mode="min" if metric.endswith("loss") else "max",
                save_every=config.save_every,
            )
            self.run.begin(checkpoints.read_meta(resume)["epoch"] if resume else 0)

    def add(self, epoch: Epoch) -> None:
        """Keep an epoch, validated or not."""
        with tempfile.TemporaryDirectory() as folder:
            epoch.save(Path(folder))
            if self.run is not None:
                self.weights = checkpoints.safetensors_weights(Path(folder) / checkpoints.WEIGHTS_FILE)
                self.run.add(epoch.number, epoch.metrics, self.weights)

    def finish(self) -> None:
        """Write what follows from the whole run, unless it had ended before."""
        if self.run is None or not self.weights:
            return
        world = ranks.place()[1]
        size = self.config.batch_size
        settings = {**configuration.to_values(self.config), "world_size": world, "effective_batch": size * world}
        for path in self.run.finish(self.weights, settings):
            logger.info("%s", path)


@functools.cache
def _price(network: Network, size: int) -> dict[str, float]:
    """Build the network without weights, and run an image without pixels through it; no random number is drawn."""
    with torch.device("meta"):
        model = networks.build(network, CHANNELS, len(CLASSES))
    least = 2 * max(getattr(model, "strides", [1]))
    if size < least:
        raise ValueError(
            f"data.target_size: got {size}; expected at least {least}, twice the stride {least // 2} of "
            f"network.encoder {network.encoder!r}; take larger images, or fewer network.encoder_levels"
        )
    macs = _model.macs_of(model, CHANNELS, size, size, network)
    return {"gmacs": macs / 1e9, "parameters": float(cost.parameters(model))}


def _architecture(network: Network) -> Architecture:
    return Architecture(
        backbone_name=network.encoder.partition(".")[0],
        n_channels=CHANNELS,
        n_classes=len(CLASSES),
        cat_channels=network.cat_channels,
        deep_supervision=network.deep_supervision,
        freeze_backbone=network.freeze_encoder,
    )


def _without_weights(config: Config, record: Mapping[str, Any]) -> nn.Module:
    return build_network(dataclasses.replace(config, network=networks.without_weights(config.network)))


def _parts(config: Config, samples: Samples, made: Splits, normaliser: Normaliser) -> Parts:
    training.seed_everything(config.seed)
    return Parts(
        model=build_network(config),
        loss=losses.build(config.loss, multilabel=False),
        train_batches=_model.training_batches(config, samples, made, normaliser),
    )


def _validator(
    config: Config, samples: Samples, made: Splits, normaliser: Normaliser
) -> Callable[[nn.Module], dict[str, float]]:
    loss = losses.build_per_image(config.loss, multilabel=False)

    def scores_of(model: nn.Module, split: str) -> dict[str, float]:
        mine = ranks.shard(splits.indices(made, split))
        images = _batches(config, samples, mine, normaliser, next(model.parameters()).device)
        found = evaluation.score_batches(model, images, len(CLASSES), multilabel=False, loss=loss)
        return evaluation.summary(evaluation.gather(found), CLASSES, multilabel=False, convention=CONVENTION)

    def validate(model: nn.Module) -> dict[str, float]:
        told = {f"val_{name}": value for name, value in scores_of(model, "validation").items()}
        if config.train_scores:
            trained = scores_of(model, "train")
            told |= {f"train_{name}": trained[name] for name in ("mean_iou", "mean_dice")}
        return {**told, **price_of(config)}

    return validate


def _batches(
    config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser, device: torch.device
) -> Iterator[training.Batch]:
    return _model.evaluation_batches(
        samples,
        indices,
        normaliser,
        batch_size=config.evaluation_batch,
        device=device,
        loader_workers=config.loader_workers,
    )


def _marked_examples(
    samples: Samples, found: inference.Found, shown: Sequence[int]
) -> Iterator[evaluation_files.Example]:
    for index, satellite in zip(shown, dataset.satellites(samples, shown), strict=True):
        yield evaluation_files.Example(
            satellite, samples.names[index], samples.image(index), samples.mask(index), found.predicted[index]
        )


def _draw_strips(
    samples: Samples, indices: Sequence[int], normaliser: Normaliser, model: nn.Module, path: Path
) -> None:
    """Draw the same few samples at any epoch."""
    examples = _model.examples(model, samples, _model.spread(indices, SHOWN), normaliser)
    drawing.strips(path, examples, multilabel=False, colours=COLOURS)
