"""Hearts of ACDC, slice by slice or in 3D: right ventricle, myocardium and left ventricle, by a U-Net; or any 2D set.

    root/patient001/patient001_frame01.nii.gz, ..._gt.nii.gz      ACDC as published
    root/imagesTr/, labelsTr/ (imagesTs/, labelsTs/)              the same in nnU-Net's raw layout
    root/images/a.png, root/masks/a.png                           pictures, arrays or volumes, paired by name

With `network.dims: 3` and `data.patch_slices` in patches of so many slices, each of them scaled and resized as alone.
Without `data.root` hearts are generated. Differs from the original where it had errors: both frames of a patient are
in one split, scores are made of summed pixels, and means with and without background are told apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from segmentation import (
    checkpoints,
    evaluation,
    images,
    losses,
    networks,
    nifti,
    normalisation,
    ranks,
    splits,
    strategy,
    surfaces,
    training,
    volumes,
)
from segmentation import figures as drawing
from segmentation.augmentation import Augmentation
from segmentation.epoch import DataError, Epoch, Evaluation
from segmentation.losses import Loss
from segmentation.metrics import Convention
from segmentation.networks import Network
from segmentation.networks.volume import Volumes
from segmentation.normalisation import Normalise, Normaliser
from segmentation.prediction import FlipAverage
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Parts
from workloads import _filters, _model, _pruned, _sensitivity
from workloads._acdc import dataset, patches, reader, summary
from workloads._acdc.dataset import Data
from workloads._acdc.generator import Synthetic
from workloads._pairs import figures
from workloads._pairs.dataset import with_channels
from workloads._pruned import PrunableConfig

__all__ = [
    "FACTS",
    "TABLE",
    "UNINHERITED",
    "Config",
    "check",
    "deployment",
    "evaluate",
    "facts",
    "filters",
    "finish",
    "inspect",
    "metrics",
    "parts",
    "predict",
    "prepare",
    "samples",
    "scan",
    "sources",
    "train",
]

WORKLOAD = "acdc"
UNINHERITED = _pruned.UNINHERITED
FACTS = _pruned.FACTS
TABLE = _pruned.TABLE
CONVENTION = Convention()
SHOWN = 4
# Albumentations' elastic transform with alpha 8 and sigma 5 shifts pixels by 8 / sqrt(3) / (2 sqrt(pi) 5) = 0.26 of
# them; TorchIO's random gamma is exp(-0.3) to exp(0.3), and exp(0.3) = 1.35.
REFERENCE_AUGMENTATION = Augmentation(
    horizontal_flip=0.5,
    vertical_flip=0.1,
    rotate90=0.0,
    elastic=0.26,
    elastic_smoothness=10.0,
    elastic_probability=0.3,
    grid_distortion=0.2,
    grid_distortion_probability=0.3,
    gamma=0.35,
    gamma_probability=0.4,
    bias_field=0.5,
    bias_field_probability=0.3,
    noise=0.25,
    noise_probability=0.25,
    blur=2.0,
    blur_probability=0.2,
    motion=10.0,
    motion_probability=0.15,
)


@dataclass(frozen=True, kw_only=True)
class Config(PrunableConfig):
    """Everything that can be set."""

    data: Data = field(default_factory=Data)
    """What is learned from."""
    normalise: Normalise = field(default_factory=lambda: Normalise(method="none"))
    """How slices are scaled beyond data.percentiles."""
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(vertical_flip=0, rotate90=0, rotate_degrees=15, scale=0.15, gamma=0.2)
    )
    """How training samples are varied."""
    loss: Loss = field(default_factory=lambda: losses.named("ce_dice"))
    """What is made small; see loss_function."""
    loss_function: Literal["", "ce", "dice", "ce_dice", "focal", "dice_focal"] = ""
    """One of the original's losses by its name, which then takes the place of all of `loss`: ce_dice is 0.7 ce and 0.3
    dice, dice_focal half of each; dice without background, of a batch as one; focal with gamma 2 and alpha 0.25."""
    loader_workers: int = 0
    """Processes that read a set too large for memory; more than there are CPUs are not started."""
    evaluation_batch: int = 32
    """Slices, or patches of volumes, in one pass of validation, evaluate and predict."""
    flips: bool = False
    """Average predictions over mirrored images in evaluate and predict; four times as slow."""
    surfaces: bool = True
    """Whether evaluate scores outlines too, of each volume in mm (of a picture in its pixels): HD95, surface Dice."""
    surface_tolerance: float = 2.0
    """How far outlines may lie apart for the surface Dice, in mm or pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 0, "loader_workers", "surface_tolerance")
        training.check_least(self, 1, "evaluation_batch")
        _model.check_class_weights(self.loss_used.class_weights, self.data.classes)
        self._check_volumes()

    def _check_volumes(self) -> None:
        dims, slices = self.network.dims, self.data.patch_slices
        if dims == 3 and not slices:
            raise ValueError("data.patch_slices: got 0 for a network of volumes; write how many slices a patch has")
        # A parent's network takes the place of the one that is written here.
        if dims == 2 and slices and self.parent is None:
            raise ValueError(f"network.dims: got 2 with data.patch_slices {slices}; write 3, or 0 slices")
        if slices and self.normalise.method == "percentile":
            raise ValueError(
                "normalise.method: percentile would scale each patch otherwise; data.percentiles is of use"
            )
        if slices and self.loss_used.ms_ssim:
            raise ValueError("loss.ms_ssim: is of images, it would mix the slices of volumes; write 0")

    @property
    def loss_used(self) -> Loss:
        """Return the loss of loss_function, or the one that is given."""
        return losses.named(self.loss_function) if self.loss_function else self.loss

    @classmethod
    def reference(cls) -> Config:
        """Return the original's values; amounts of its augmentation that are not known are its libraries' defaults.

        A fifth of what is not for testing validates, as there; without imagesTs a fifth of all tests.
        """
        return cls(
            data=Data(fractions=(0.64, 0.16, 0.2), split_seed=42),
            network=Network(name="unet", widths=(64, 128, 256, 512, 512), bottleneck=1024),
            augmentation=REFERENCE_AUGMENTATION,
            loss_function="ce_dice",
            epochs=25,
            batch_size=32,
            evaluation_batch=1,
            optimizer="adam",
            lr=0.009,
            weight_decay=0.0,
            lr_schedule="none",
            precision="fp32",
            deterministic=True,
            seed=42,
            rewind_epoch=5,
        )

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(
            data=Data(size=64, synthetic=Synthetic(patients=12, slices=4, size=64)),
            network=Network(name="unet", widths=(4, 8), bottleneck=16),
            augmentation=Augmentation(vertical_flip=0, rotate90=0),
            epochs=2,
            lr=1e-2,
            threads=1,
        )


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better."""
    names = dataset.class_names(config.data)
    scores = {f"val_{name}": "max" for name in evaluation.conventions(names, CONVENTION, multilabel=False)}
    rest = {"val_loss": "min", "val_loss_std": "min", **training.reported(config), **_pruned.reported(config)}
    return {"val_mean_dice_no_bg": "max", **scores, **rest}


def prepare(config: Config) -> dict[str, Any]:
    """Check the data and decode it once for this machine; build the network once; return the data's manifest.

    Raises:
        DataError: naming the file that cannot be used, or pretrained weights that cannot be had.
        ValueError: for an encoder that timm lacks, or that cannot take images of this size, or a strategy
            that needs what is not installed.
    """
    strategy.check(config.strategy)
    config = _pruned.inherited(config, WORKLOAD)
    blank = _blank(config)
    _model.macs_of(blank.build(), *blank.shape, config.network)
    _pruned.check(config, blank)
    samples, made = dataset.load(config.data)
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
    names, synthetic = dataset.class_names(config.data), not config.data.root
    for epoch in training.fit(
        config,
        **vars(_parts(config, samples, made, normaliser, begun)),
        validate=_pruned.validator(job, begun),
        draw=functools.partial(_draw_strips, config, samples, made.validation, normaliser),
        meta={**_model.meta(WORKLOAD, config, names, normaliser, synthetic=synthetic), **begun.record},
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
    """Score a checkpoint folder on a split, with intervals over patients, and draw some of its predictions.

    Volumes are predicted as a whole; training's validation sees them patch by patch.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    samples, made = dataset.load(config.data)
    _model.refuse_seen(checkpoint, made)
    names = dataset.class_names(config.data)
    network, model = model, _mirrored(model) if config.flips else model
    with splits.test_split_open():
        indices = splits.indices(made, split)
        found, outlines = _score_whole(config, model, samples, indices, normaliser)
        drawn = _draw(config, model, samples, indices, normaliser, out_dir)
        job = _job(config, samples, made, normaliser, whole=True)
        price = _pruned.evaluated(checkpoint, config, network, job, split)
    scored = evaluation.evaluation(
        found,
        [made.groups[index] for index in found.index],
        names,
        multilabel=False,
        convention=CONVENTION,
        details={
            "split": split,
            "group_key": made.key,
            "synthetic": not config.data.root,
            "flips": config.flips,
        },
    )
    if outlines:
        unit = "mm, of pictures pixels"
        scored = surfaces.add(scored, outlines, names, unit=unit, tolerance=config.surface_tolerance)
    curves = _model.save_curves(out_dir / "training_curves.png", checkpoint, "val_mean_dice_no_bg")
    told = {"checkpoint": str(checkpoint), "metrics": scored.metrics}
    written = [
        summary.write_metrics(out_dir, scored, names),
        summary.write_summary(out_dir, "eval", **_pruned.sizes(price), more=told),
    ]
    files = (*drawn, *curves, *(path.name for path in written))
    return dataclasses.replace(scored, metrics={**scored.metrics, **price}, figures=files)


def finish(folder: Path) -> list[Path]:
    """Write what follows from a whole run, whose checkpoints are folder/best and folder/last; return the paths.

    metrics.json, training_curves.png, predictions.png of the best epoch on the validation split, run_summary.json.
    """
    best, last = folder / "best", folder / "last"
    config, model, normaliser = load(best)
    samples, made = dataset.load(config.data)
    drawn = _draw(config, model, samples, made.validation, normaliser, folder)
    curves = _model.save_curves(folder / "training_curves.png", last, "val_mean_dice_no_bg")
    meta = checkpoints.read_meta(best)
    told = {"checkpoint": str(best), "epoch": meta["epoch"], "metrics": meta["metrics"]}
    return [
        summary.write_run_metrics(folder, best, last),
        *(folder / name for name in (*curves, *drawn)),
        summary.write_summary(folder, "prune" if "pruned" in meta else "train", **_pruned.sizes(meta), more=told),
    ]


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write for each volume NAME_mask.nii.gz, for each picture NAME_mask.png, and for both NAME_overlay.png.

    A mask has the size of its image, class ids for values; a volume's overlay shows its middle slice.

    Raises:
        DataError: if the checkpoint or an image cannot be used.
    """
    config, model, normaliser = load(checkpoint, changes)
    model = _mirrored(model) if config.flips else model
    written = []
    for path in sources(source):
        stored, _ = reader.read_image(path)
        slices = [with_channels(stored[..., z], config.data.in_channels, path) for z in range(stored.shape[-1])]
        classes = _classes_of(config, model, normaliser, slices)  # (H, W, Z)
        folder = path.parent.relative_to(source) if path != source else Path()
        stem, middle = out_dir / folder / nifti.stem(path), len(slices) // 2
        if nifti.is_nifti(path):
            written += [nifti.write(stem.with_name(f"{stem.name}_mask.nii.gz"), classes, path)]
            written += [figures.write_overlay(stem, slices[middle], classes[..., middle])]
        else:
            written += figures.write_prediction(stem, slices[0], classes[..., 0], classes[..., 0])
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: a file, or the volumes and pictures below a folder, in order of name.

    Masks (_gt) and whole films (_4d) of ACDC are left alone.

    Raises:
        DataError: if there is none, or two differ in nothing but their suffixes.
    """
    if source.is_file():
        return [source]
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    volumes = [path for path in files if nifti.is_nifti(path) and not nifti.stem(path).endswith(("_gt", "_4d"))]
    found = [*volumes, *(path for path in files if path.suffix.lower() in images.SUFFIXES)]
    if not found:
        raise DataError(f"{source}: holds no image; expected .nii.gz, {', '.join(images.SUFFIXES)} files")
    _model.refuse_same_names(found)
    return sorted(found)


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw four training slices: as stored, with their mask, and augmented; return the picture's path."""
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    shown = _model.with_most_classes(samples, splits.indices(made, "train"), SHOWN)
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    names, path = dataset.class_names(config.data), out_dir / "samples.png"
    augment, slices = config.augmentation, config.data.patch_slices
    ignored = losses.IGNORE_INDEX
    return [figures.save_samples(path, samples, shown, normaliser, augment, names, ignored, slices=slices)]


def build_network(config: Config, in_channels: int) -> nn.Module:
    """Return the network with freshly drawn weights, or an encoder's pretrained ones."""
    return networks.build(config.network, in_channels, config.data.classes, slices=config.data.patch_slices)


def load(checkpoint: Path, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        DataError: if a file is missing or damaged, or the checkpoint is another workload's.
    """
    return _model.restore(checkpoint, WORKLOAD, Config, _without_weights, changes)


def _without_weights(config: Config, record: Mapping[str, Any]) -> nn.Module:
    network = networks.without_weights(config.network)
    model = build_network(dataclasses.replace(config, network=network), config.data.in_channels)
    return _pruned.restored(model, record, *_blank(config).shape)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data: what int8 is calibrated by and scored on."""
    return dataset.load(config.data)


def deployment(config: Config) -> dict[str, Any]:
    """Return how an exported network is used, slice by slice."""
    data = config.data
    return {
        "percentiles": data.percentiles,
        "resize": data.size,
        "flips": config.flips,
        "colours": drawing.class_colours(data.classes),
    }


def filters(checkpoint: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Look at a checkpoint's filters, and at those that values of `prune` would drop; see workloads._filters."""
    others, asked = _filters.split(changes)
    config, model, normaliser = load(checkpoint, others)
    samples, made = dataset.load(config.data)
    return _filters.write(checkpoint, config, model, _job(config, samples, made, normaliser), out_dir, asked)


def check(config: Config, training: Config | None = None) -> None:
    """Refuse what no training could change, such as a block to prune that the network lacks; raises ValueError.

    training: of a parent that is still to be trained.
    """
    config = _pruned.expected(config, WORKLOAD, training)
    _pruned.check(config, _blank(config))


def facts(config: Config) -> dict[str, float]:
    """Return params, macs and gmacs of the network that a training of this config would have, and of its parent's."""
    config = _pruned.inherited(config, WORKLOAD)
    return _pruned.facts(config, _blank(config))


def scan(config: Config, searched: Mapping[str, Sequence[float]], out_dir: Path) -> dict[str, Any]:
    """Try how far the parent can be pruned, one value at a time and without training; see workloads._sensitivity."""
    config = _pruned.inherited(config, WORKLOAD)
    samples, made = dataset.load(config.data)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    return _sensitivity.scan(config, _job(config, samples, made, normaliser), searched, out_dir)


def _blank(config: Config) -> _pruned.Blank:
    """Return how the whole network is made, and for which images."""
    data = config.data
    build = functools.partial(build_network, config, data.in_channels)
    return _pruned.Blank(build, (data.in_channels, max(data.patch_slices, 1) * data.size, data.size))


def _job(config: Config, samples: Samples, made: Splits, normaliser: Normaliser, *, whole: bool = False) -> _pruned.Job:
    """Return what is pruned, looked at and scored; whole: volumes are scored as a whole, not patch by patch."""
    names = dataset.class_names(config.data)

    def score(model: nn.Module, split: str) -> dict[str, float]:
        mine = ranks.shard(splits.indices(made, split))
        if whole:
            plain = dataclasses.replace(config, surfaces=False)
            scores, _ = _score_whole(plain, model, samples, mine, normaliser)
        else:
            scores = evaluation.gather(_score(config, model, samples, mine, normaliser))
        told = evaluation.summary(scores, names, multilabel=False, convention=CONVENTION)
        return {**told, "loss_std": float(scores.losses.std())}

    blank = _blank(config)
    images = _model.first_images(config, samples, made, normaliser)
    return _pruned.Job(blank.build, blank.shape, images, score)


def _parts(config: Config, samples: Samples, made: Splits, normaliser: Normaliser, begun: _pruned.Begun) -> Parts:
    return Parts(
        model=begun.model,
        loss=losses.build(config.loss_used, multilabel=False),
        train_batches=_model.training_batches(config, samples, made, normaliser, slices=config.data.patch_slices),
    )


def _score(
    config: Config,
    model: nn.Module,
    samples: Samples,
    indices: Sequence[int],
    normaliser: Normaliser,
    predicted: dict[int, np.ndarray[Any, Any]] | None = None,
) -> evaluation.ImageScores:
    """Return the scores of some samples; their predictions, (H, W) class ids, are put into `predicted`."""
    found = _model.evaluation_batches(
        samples,
        indices,
        normaliser,
        batch_size=config.evaluation_batch,
        device=next(model.parameters()).device,
        loader_workers=config.loader_workers,
    )
    return evaluation.score_batches(
        model,
        found,
        config.data.classes,
        multilabel=False,
        loss=losses.build_per_image(config.loss_used, multilabel=False),
        watch=None if predicted is None else functools.partial(_model.keep_classes, predicted),
    )


def _score_whole(
    config: Config, model: nn.Module, samples: Samples, indices: Sequence[int], normaliser: Normaliser
) -> tuple[evaluation.ImageScores, list[tuple[str, Any]]]:
    """Return the scores of slices or whole volumes and, if asked for, each volume's group and outlines."""
    classes, tolerance = config.data.classes, config.surface_tolerance
    if not config.data.patch_slices:
        predicted: dict[int, np.ndarray[Any, Any]] = {}
        found = _score(config, model, samples, indices, normaliser, predicted if config.surfaces else None)
        return found, _model.outlines(samples, predicted, classes, tolerance)
    outlines = []

    def compare(whole: patches.Whole, called: np.ndarray[Any, Any]) -> None:
        both = np.moveaxis(called, 0, -1), np.moveaxis(whole.mask, 0, -1)
        outlines.append((whole.group, surfaces.compare(*both, classes, spacing=whole.spacing, tolerance=tolerance)))

    slices = config.data.patch_slices
    found = patches.score(
        model,
        normaliser,
        patches.together(samples, indices, slices),
        classes,
        slices=slices,
        batch_size=config.evaluation_batch,
        loss=losses.build_per_image(config.loss_used, multilabel=False),
        watch=compare if config.surfaces else None,
    )
    return found, outlines


def _mirrored(model: nn.Module) -> nn.Module:
    """Return a network that averages over mirror images; a volume is mirrored in its slices' plane."""
    if isinstance(model, Volumes):
        return Volumes(FlipAverage(model.network, multilabel=False), model.slices)
    return FlipAverage(model, multilabel=False)


@torch.inference_mode()
def _classes_of(
    config: Config, model: nn.Module, normaliser: Normaliser, slices: Sequence[np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """Return the class ids (H, W, Z) of a volume's slices (C, H, W) at their own size."""
    device, (height, width) = next(model.parameters()).device, slices[0].shape[1:]
    if depth := config.data.patch_slices:
        volume = np.stack([dataset.scaled(one, config.data) for one in slices], axis=1)  # (C, Z, size, size)
        likely = patches.probability(model, normaliser, volume, depth, config.evaluation_batch).transpose(0, 1)
        own = nn.functional.interpolate(likely, (height, width), mode="bilinear", align_corners=False)
        return np.moveaxis(own.argmax(1).to(torch.uint8).cpu().numpy(), 0, -1)
    found = []
    for start in range(0, len(slices), config.evaluation_batch):
        chunk = slices[start : start + config.evaluation_batch]
        image = torch.from_numpy(np.stack([dataset.scaled(one, config.data) for one in chunk]))
        logits = model(normaliser(image).to(device)).float()
        own = nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        found.append(own.argmax(1).to(torch.uint8).cpu().numpy())
    return np.moveaxis(np.concatenate(found), 0, -1)


def _draw_strips(
    config: Config, samples: Samples, indices: Sequence[int], normaliser: Normaliser, model: nn.Module, path: Path
) -> None:
    """Draw the same few slices at any epoch."""
    examples = _examples(config, model, samples, indices, normaliser)
    drawing.strips(path, examples, multilabel=False)


def _draw(
    config: Config, model: nn.Module, samples: Samples, indices: Sequence[int], normaliser: Normaliser, out_dir: Path
) -> list[str]:
    examples = _examples(config, model, samples, indices, normaliser)
    names = dataset.class_names(config.data)
    return [drawing.prediction_grid(out_dir / "predictions.png", examples, names, multilabel=False).name]


def _examples(
    config: Config, model: nn.Module, samples: Samples, indices: Sequence[int], normaliser: Normaliser
) -> list[drawing.Example]:
    """Return a few slices with their predictions, of volumes those that show most."""
    found = _model.examples(model, samples, _model.with_most_classes(samples, indices, SHOWN), normaliser)
    return [_one_slice(one, config.data.patch_slices) for one in found] if config.data.patch_slices else found


def _one_slice(example: drawing.Example, slices: int) -> drawing.Example:
    assert example.mask is not None
    place = volumes.fullest(torch.from_numpy(example.mask.copy()), slices)
    tall = (example.image, example.probability, example.mask)
    image, probability, mask = (patches.apart(one, slices)[..., place, :, :] for one in tall)
    return dataclasses.replace(example, image=image, probability=probability, mask=mask)
