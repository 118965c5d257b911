"""Defects on steel strips of Severstal: UNet and UNet++, thresholds learnt on validation and frozen for the test.

    root/train.csv, root/train_images/                Kaggle's form
    root/{train_split,val_split,test_split}/{img,ann} Supervisely's, or one img/ and ann/

Strips are fitted into a canvas without being stretched, and scored at their own size. Differs from the original where
it had errors: all strips are trained on, gradients are clipped in true units, nested networks answer at full size, a
strip without defects that is left alone scores what `empty` says, and no annotation that cannot be read counts as none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from segmentation import (
    augmentation,
    checkpoints,
    loading,
    losses,
    networks,
    normalisation,
    operating_points,
    ranks,
    splits,
    strategy,
    training,
)
from segmentation import figures as drawing
from segmentation.augmentation import Augmentation
from segmentation.components import Choice
from segmentation.epoch import DataError, Epoch, Evaluation
from segmentation.images import list_images, read_rgb
from segmentation.losses import Loss
from segmentation.networks import Network, cost
from segmentation.normalisation import Normalise, Normaliser
from segmentation.operating_points import Empty
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Batch, Parts, TrainingConfig
from workloads import _model
from workloads._severstal import dataset, evaluating, figures, learnt, predictions, scoring
from workloads._severstal.dataset import Data
from workloads._severstal.generator import Synthetic
from workloads._severstal.learnt import Learnt
from workloads._severstal.run_files import RunFolder
from workloads._severstal.scoring import Clean

__all__ = ["Config", "evaluate", "external", "inspect", "metrics", "parts", "predict", "prepare", "sources", "train"]

logger = logging.getLogger(__name__)

CHANNELS = 3
SHOWN = 4
EXTERNAL = ("mean_dice", "mean_iou", "mean_precision", "mean_recall", *evaluating.POOLED, "auprc", "recall_fp_image")
"""What predictions of others are set beside a checkpoint by."""


@dataclass(frozen=True, kw_only=True)
class DefectLoss(Loss):
    """What is made small: the sum of the losses whose weight is not 0, of channels that may share a pixel."""

    ce: float = 0.0
    """Has to be 0: cross-entropy is for classes that exclude each other."""
    bce: float = 1.0
    """Weight of binary cross-entropy of each class."""
    dice: float = 1.0
    """Weight of the soft Dice loss."""
    dice_pooling: Literal["image", "batch"] = "batch"
    """Whether dice, tversky and iou are taken of each image or of the batch as one."""


@dataclass(frozen=True, kw_only=True)
class SteelAugmentation(Augmentation):
    """How training strips are varied. Top and bottom are never exchanged: the lamp and the rolls see one side."""

    vertical_flip: float = 0.0
    """Has to be 0."""
    rotate90: float = 0.0
    """Has to be 0: strips are longer than high."""
    rotate_degrees: float = 10.0
    """Largest rotation to either side, in degrees; at most 10."""
    scale: float = 0.1
    """Largest change of size, 0.2 for 1/1.2 to 1.2 times."""
    translate: float = 0.1
    """Largest shift, as a part of height and width."""
    grid_distortion: float = 0.1
    """Largest change of the width of the rows and columns of a grid of 5 x 5 cells, 0.2 for 0.8 to 1.2 times."""
    grid_distortion_probability: float = 0.3
    """Probability of the distorted grid."""
    optical_distortion: float = 0.1
    """Largest coefficient of a lens's distortion: a pixel comes from r * (1 + k * r * r) away from the middle, r being
    1 at the corners."""
    optical_distortion_probability: float = 0.3
    """Probability of the lens's distortion."""
    contrast: float = 0.1
    """Largest change of the distance from an image's mean, 0.2 for 0.8 to 1.2 times."""
    brightness_factor: float = 0.1
    """Largest change of all stored values, 0.2 for 0.8 to 1.2 times; black stays black."""
    gamma: float = 0.2
    """Largest change of the exponent, 0.2 for 1/1.2 to 1.2, between an image's smallest and largest value."""
    blur: float = 1.0
    """Largest standard deviation of a Gaussian blur, in pixels."""
    noise: float = 0.1
    """Largest standard deviation of Gaussian noise, in normalised values."""
    colour_probability: float = 0.3
    """Probability of each of brightness, brightness_factor, contrast, gamma, bias_field, blur, motion and noise, where
    they are not 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("vertical_flip", 0.0), ("rotate90", 0.0), ("rotate_degrees", 10.0)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}: got {getattr(self, name)}; strips have a top and a bottom: {most:g} at most")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Everything that can be set."""

    data: Data = field(default_factory=Data)
    """Where strips come from, and how they are split."""
    normalise: Normalise = field(default_factory=lambda: Normalise(method="imagenet"))
    """How pixel values are scaled."""
    augmentation: SteelAugmentation = field(default_factory=SteelAugmentation)
    """How training strips are varied."""
    network: Network = field(default_factory=lambda: Network(name="smp_unet", encoder="resnet34"))
    """Which network, and how large."""
    loss: DefectLoss = field(default_factory=DefectLoss)
    """What is made small."""
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: every strip once an epoch. balanced: as many draws, half of them defective."""
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adamw"
    """Optimiser."""
    lr_schedule: Literal[
        "none", "plateau", "cosine", "warmup_cosine", "warmup_linear", "onecycle", "restarts", "poly"
    ] = "restarts"
    """plateau: lower it when val_loss stalls. cosine: fall to lr_min over the run. warmup_cosine: rise first.
    warmup_linear: rise, then fall in a line. onecycle: rise for 30 % of the run, then fall to lr_min. restarts: cosine
    with warm restarts. poly: power 0.9."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: any."""
    patience: int = 7
    """Stop after this many epochs without improvement; 0: never."""
    early_stop_metric: str = "val_dice_opt"
    """What has to improve: fall if its name ends in loss, rise otherwise."""
    empty: Empty = "one"
    """What a strip scores on which there is nothing and nothing is called. one: 1, as on Kaggle. zero: 0. nan: it is
    left out of the mean."""
    false_positives: float = 1.0
    """False alarms a strip at which recall_fp_image tells the share of defects found."""
    loader_workers: int = 0
    """Processes that read a set too large for memory; more than there are CPUs are not started."""
    evaluation_batch: int = 8
    """Strips in one pass of validation, evaluate and predict."""
    calibrate: bool = False
    """Learn on validation what to divide logits by, so that probabilities mean what they say. Which pixels are called
    stays as it is."""
    clean: Clean = field(default_factory=Clean)
    """What is done to predictions at the strip's own size; with areas, validation looks at each strip twice."""
    examples: int = 8
    """Strips that evaluate draws beside their masks; -1: all."""
    run_name: str = ""
    """What a run is called in its report; empty: by its network and encoder."""
    out: str = ""
    """Folder for the original's own files (best_dice_..., metrics_seed42.csv, args.json); empty: none, as parallel
    trials need it."""
    save_every: int = 10
    """Keep a checkpoint of every so many epochs in `out`; 0: of none."""
    seed: int = 42
    """Seed of the first weights, the order of images, augmentation and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 1, "evaluation_batch")
        training.check_least(self, 0, "loader_workers", "false_positives", "save_every")
        training.check_least(self, -1, "examples")
        _model.check_class_weights(self.loss.class_weights, len(dataset.classes(self.data.task)))
        if self.loss.ce:
            raise ValueError(
                f"loss.ce: got {self.loss.ce}; channels may share a pixel, so set it to 0 and use loss.bce"
            )

    @classmethod
    def reference(cls) -> Config:
        """Return the original's values."""
        return cls(
            data=Data(test_images=2000, fractions=(0.64, 0.16, 0.2)),
            network=Network(name="smp_unet", encoder="resnet34", pretrained=True),
            loss=DefectLoss(dice_smooth=1e-6),
            epochs=100,
            batch_size=8,
            lr=1e-3,
            weight_decay=1e-4,
            loader_workers=4,
        )

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(
            data=Data(image_size=(128, 32), synthetic=Synthetic(samples=40, width=256, height=64)),
            network=Network(name="smp_unet", encoder="resnet10t", decoder_widths=(16, 16, 8, 8, 16)),
            epochs=2,
            lr=3e-3,
            examples=2,
            threads=1,
        )


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    best = ["val_dice_opt", "val_iou_opt", "val_f1_opt", "val_dice_fixed", "val_iou_fixed"]
    trivial = ["val_dice_all_empty", "val_dice_all_called"]
    cleaned = ["val_dice_clean"] if config.clean.areas else []
    calibrated = {"val_ece": "min", "val_ece_scaled": "min", "temperature": "min"} if config.calibrate else {}
    cuts = [f"iou_{round(100 * cut)}" for cut in operating_points.IOU_CUTS]
    told = ["opt_threshold_f1", "opt_threshold_dice", "auprc", "recall_fp_image", "recall_per_image"]
    highest = dict.fromkeys([*best, *cleaned, *trivial, *cuts, *told], "max")
    return {**highest, "val_loss": "min", **calibrated, **training.reported(config)}


def prepare(config: Config) -> dict[str, Any]:
    """Check the data and decode it once for this machine; build the network once; return the data's manifest.

    Raises:
        DataError: naming the file that cannot be used, or pretrained weights that cannot be had.
        ValueError: for an encoder that timm lacks, or a strategy that needs what is not installed.
    """
    strategy.check(config.strategy)
    build_network(config)
    manifest = dataset.manifest(config.data)
    for warning in manifest["warnings"]:
        logger.warning("%s", warning)
    return manifest


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield one validated epoch of training after the other; `resume` is a checkpoint folder that one of them saved.

    Raises:
        DataError: if the data, or a checkpoint to start from, cannot be used.
        NonFiniteError: if a loss becomes nan or infinite.
    """
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    validated = _Validation(config, samples, made, normaliser)
    made_parts = _parts(config, samples, made, normaliser)
    run = _run_folder(config, cost.parameters(made_parts.model), resume)
    begun = time.monotonic()
    for epoch in training.fit(
        config,
        **vars(made_parts),
        validate=validated,
        draw=functools.partial(_draw_strips, samples, made.validation, normaliser),
        meta=_model.meta(
            "severstal", config, dataset.classes(config.data.task), normaliser, synthetic=not config.data.root
        ),
        resume=resume,
        steps_per_epoch=0,  # the schedule steps with epochs, as in the original
    ):
        assert validated.learnt is not None
        kept = _model.with_file(epoch, validated.learnt.write)
        kept = _model.with_splits(kept, made)
        if run:
            run.add(kept, time.monotonic() - begun)
        begun = time.monotonic()
        yield kept


def parts(config: Config) -> Parts:
    """Return the network as it begins, its loss and its training batches."""
    samples, made = dataset.load_once(config.data)
    return _parts(config, samples, made, normalisation.build(config.normalise, samples, made.train))


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score a checkpoint folder on a split at the thresholds that it holds, which were learnt on validation.

    Scores are told at the frozen threshold with intervals over strips, at 0.5 beside it, and of calling nothing.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    taught = learnt.read(checkpoint)
    samples, made = dataset.load_once(config.data)
    _model.refuse_seen(checkpoint, made)
    loss = losses.build_per_image(config.loss, multilabel=True)
    device = next(model.parameters()).device
    with splits.test_split_open():
        indices = _filled(config, made, split)
        pictures = figures.Pictures(out_dir, samples, _shown(indices, config.examples), taught)
        cleaned = scoring.Called(taught) if taught.cleanings else None
        watch = [pictures.add, *([cleaned.add] if cleaned else [])]
        images = _batches(config, samples, indices, normaliser, device)
        calibrate = taught.temperature is not None
        found = scoring.look(config.data, samples, model, images, loss, watch, calibrate=calibrate)
        first, _, _ = next(iter(_batches(config, samples, indices[: config.evaluation_batch], normaliser, device)))
    scored = evaluating.evaluation(
        found,
        taught,
        [made.groups[index] for index in found.pixels.index],
        dataset.classes(config.data.task),
        budget=config.false_positives,
        cleaned=None if cleaned is None else cleaned.counts.whole(),
        details={**_told(config, split, made), "speed": evaluating.speed(model, first)},
    )
    curves = _model.save_curves(out_dir / "curves.png", checkpoint, "val_dice_opt")
    drawn = evaluating.draw_reliability(out_dir, found, taught, dataset.classes(config.data.task))
    return dataclasses.replace(scored, figures=(*pictures.names, *curves, *drawn))


def external(checkpoint: Path, split: str, source: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score somebody else's predictions as a checkpoint is scored: on its split, by its rules.

    source: a folder of pictures NAME.png or NAME_mask.png, 0 to 255 or 0 and 1, or a CSV file of run lengths, as
        Kaggle's. Where there are pictures of the validation strips too, thresholds are learnt on them; else 0.5.

    Raises:
        DataError: naming the file that cannot be used, or the strips that it lacks.
    """
    config, _, _ = load(checkpoint, changes)
    samples, made = dataset.load_once(config.data)
    given = predictions.find(source, config.data.task)
    with splits.test_split_open():
        found = predictions.look(config.data, samples, _filled(config, made, split), given)
        validation = splits.indices(made, "validation")
        thresholds = evaluating.fixed(len(dataset.classes(config.data.task)), config.empty)
        if given.grades(samples, validation):
            thresholds = scoring.learn(predictions.look(config.data, samples, validation, given), samples, config.empty)
    return evaluating.evaluation(
        found,
        Learnt(thresholds=thresholds),
        [made.groups[index] for index in found.pixels.index],
        dataset.classes(config.data.task),
        budget=config.false_positives,
        details={**_told(config, split, made), "source": str(source)},
    )


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write NAME_mask.png, of the picture's own size, for each picture in a file or folder; return the paths.

    A mask is 0 and 255 where there is one class, else the number of the class from 1 that is likeliest among those
    called, and 0 where none is.

    Raises:
        DataError: if the checkpoint or a picture cannot be used.
    """
    config, model, normaliser = load(checkpoint, changes)
    taught = learnt.read(checkpoint)
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sources(source):
        picture = np.ascontiguousarray(read_rgb(path).transpose(2, 0, 1))
        box = dataset.letterbox(config.data, picture.shape[1:])
        with torch.inference_mode():
            seen = normaliser(torch.from_numpy(box.image(picture))[None])
            logits = box.back(model(seen.to(next(model.parameters()).device)).float().cpu())[0]
        written.append(figures.save_mask(out_dir / f"{path.stem}_mask.png", logits, taught))
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: a file, or the pictures of a folder, in order of name.

    Raises:
        DataError: if there is none, or two pictures differ in nothing but their suffixes.
    """
    if source.is_file():
        return [source]
    found = list_images(source)
    _model.refuse_same_names(found)
    return found


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw four training strips: on the canvas, with their mask, and augmented; return the picture's path."""
    samples, made = dataset.load_once(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    defective = [index for index in made.train if dataset.is_defective(samples, index)]
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    augment = augmentation.build(config.augmentation, normaliser.black)
    shown = _model.spread(defective or made.train, SHOWN)
    return [figures.save_samples(out_dir / "samples.png", samples, shown, normaliser, augment)]


def build_network(config: Config) -> nn.Module:
    """Return the network with freshly drawn weights, or an encoder's pretrained ones.

    Raises:
        DataError: where pretrained weights are asked for and cannot be had.
        ValueError: for an encoder that timm lacks.
    """
    return networks.build(config.network, CHANNELS, len(dataset.classes(config.data.task)))


def load(checkpoint: Path, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        CheckpointError: if a file is missing or damaged.
        DataError: if it is another workload's.
    """
    return _model.restore(checkpoint, "severstal", Config, _without_weights, changes)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data and who has which, for the export of a network."""
    return dataset.load_once(config.data)


class _Validation:
    """Looks at the validation split after an epoch, and keeps what the last look taught."""

    def __init__(self, config: Config, samples: Samples, made: Splits, normaliser: Normaliser) -> None:
        self.config, self.samples, self.made, self.normaliser = config, samples, made, normaliser
        self.loss = losses.build_per_image(config.loss, multilabel=True)
        self.learnt: Learnt | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return what the epoch reports."""
        config, samples = self.config, self.samples
        found = scoring.look(config.data, samples, model, self._batches(), self.loss, calibrate=config.calibrate)
        found = scoring.gather(found)
        thresholds = scoring.learn(found, samples, config.empty)
        temperature = None if found.logits is None else scoring.temperature(found.logits, samples)
        cleanings: tuple[Choice, ...] = ()
        if config.clean.areas:
            again = self._batches()
            cleanings = scoring.cleanings(
                config.data, samples, model, again, thresholds.dice, config.clean, config.empty
            )
        self.learnt = Learnt(thresholds=thresholds, temperature=temperature, cleanings=cleanings)
        return {**scoring.epoch_scores(found, thresholds, config.false_positives), **self.learnt.scores()}

    def _batches(self) -> Iterator[Batch]:
        """Return this process's share of the validation split."""
        mine = ranks.shard(splits.indices(self.made, "validation"))
        device = training.resolve_device(self.config.device)
        return _batches(self.config, self.samples, mine, self.normaliser, device)


def _run_folder(config: Config, parameters: int, resume: Path | None) -> RunFolder | None:
    if not config.out:
        return None
    run = RunFolder(Path(config.out).expanduser(), config, parameters)
    run.begin(dataset.content_hash(config.data), checkpoints.read_meta(resume)["epoch"] if resume else 0)
    return run


def _parts(config: Config, samples: Samples, made: Splits, normaliser: Normaliser) -> Parts:
    training.seed_everything(config.seed)
    weights: Sequence[float] = ()
    if config.sampler == "balanced":
        weights = loading.balanced([dataset.is_defective(samples, index) for index in made.train])
    return Parts(
        model=build_network(config),
        loss=losses.build(config.loss, multilabel=True),
        train_batches=_model.training_batches(config, samples, made, normaliser, weights=weights),
    )


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


def _told(config: Config, split: str, made: Splits) -> dict[str, Any]:
    return {"split": split, "group_key": made.key, "synthetic": not config.data.root, "empty": config.empty}


def _filled(config: Config, made: Splits, split: str) -> tuple[int, ...]:
    """Return the numbers of a split's strips; DataError where it has none."""
    if not (indices := splits.indices(made, split)):
        raise DataError(f"{dataset.root(config.data)}: there is no strip in split {split}; score another by --split")
    return indices


def _shown(indices: Sequence[int], count: int) -> list[int]:
    return list(indices) if count < 0 else _model.spread(indices, count)


def _without_weights(config: Config, record: dict[str, Any]) -> nn.Module:
    return build_network(dataclasses.replace(config, network=networks.without_weights(config.network)))


def _draw_strips(
    samples: Samples, indices: Sequence[int], normaliser: Normaliser, model: nn.Module, path: Path
) -> None:
    shown = sorted(_model.spread(indices, 16), key=lambda index: not samples.mask(index).any())[:SHOWN]
    examples = _model.examples(model, samples, shown, normaliser, multilabel=True)
    drawing.strips(path, examples, multilabel=True)
