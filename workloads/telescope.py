"""Telescope pictures: cosmic rays, point sources and electronic glitches in maps of a microwave focal plane.

After the ACT glitch-segmentation notebooks: a TinyUNet with one output for each class, several of which may be true at
one pixel. `variant` selects what the third class folder is: `none` (noEL: the third channel is a placeholder, left out
of all means) or `electronic_glitch` (withEL). Differs from the original where it had errors: the splits are seeded,
disjoint and used, one picture in two class folders is one sample, and accuracy stands beside that of predicting
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from segmentation import checkpoints, evaluation, losses, normalisation, ranks, splits, strategy, training
from segmentation import figures as drawing
from segmentation.augmentation import Augmentation
from segmentation.epoch import DataError, Epoch, Evaluation
from segmentation.loading import capped_workers
from segmentation.losses import Loss
from segmentation.networks.tinyunet import TinyUNet
from segmentation.normalisation import Normalise
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Parts, TrainingConfig
from workloads import _model
from workloads._telescope import dataset, figures, focal_plane, observation, reader, runlog, scores, transfer
from workloads._telescope.dataset import Data
from workloads._telescope.generator import Synthetic
from workloads._telescope.observation import Observation
from workloads._telescope.outputs import RunFolder
from workloads._telescope.reader import Variant
from workloads._telescope.scores import run_epoch
from workloads._telescope.transfer import Finetune

__all__ = ["Config", "evaluate", "inspect", "metrics", "parts", "predict", "prepare", "run_epoch", "sources", "train"]

logger = logging.getLogger(__name__)

CHANNELS = 3
PLACEHOLDER = figures.PLACEHOLDER


@dataclass(frozen=True, kw_only=True)
class MultilabelLoss(Loss):
    """What is made small: the sum of the losses whose weight is not 0, of classes that may share a pixel."""

    ce: float = 0.0
    """Has to be 0: cross-entropy is for classes that exclude each other."""
    bce: float = 0.5
    """Weight of binary cross-entropy of each class."""


@dataclass(frozen=True, kw_only=True)
class PercentileClip(Normalise):
    """How grey values are scaled."""

    method: Literal["unit", "percentile", "standard", "imagenet", "none"] = "percentile"
    """percentile: clip each picture and stretch it to [0, 1]. unit: divide by the largest value of the stored type.
    standard: zero mean and unit deviation over the training split. imagenet: unit, then ImageNet's. none: as stored."""


@dataclass(frozen=True, kw_only=True)
class OptionalAugmentation(Augmentation):
    """How training pictures are varied; the original does not. A turn makes stripes of the scan look like glitches."""

    horizontal_flip: float = 0.0
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom."""
    rotate90: float = 0.0
    """Probability of a quarter turn."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Everything that can be set."""

    variant: Variant = "noEL"
    """noEL: the third class folder is `none`, its channel a placeholder. withEL: it is `electronic_glitch`."""
    data: Data = field(default_factory=Data)
    """Where pictures come from and how they are split."""
    normalise: PercentileClip = field(default_factory=PercentileClip)
    """How grey values are scaled."""
    augmentation: OptionalAugmentation = field(default_factory=OptionalAugmentation)
    """How training pictures are varied."""
    base_c: int = 32
    """Channels at full resolution; they double at each of the two levels below."""
    p_drop: float = 0.25
    """Probability that a channel of the decoder is dropped in training."""
    loss: MultilabelLoss = field(default_factory=MultilabelLoss)
    """What is made small."""
    threshold: float = 0.5
    """Probability above which a class is called."""
    overlay_threshold: float | None = None
    """The same for drawn composites, which print it; null: as in the metrics."""
    include_placeholder: bool = False
    """noEL: count the placeholder channel in all means, as the original did; its IoU is 0."""
    lr_schedule: Literal[
        "none", "plateau", "cosine", "warmup_cosine", "warmup_linear", "onecycle", "restarts", "poly"
    ] = "plateau"
    """plateau: lower it when val_loss stalls. cosine: fall to lr_min over the run. warmup_cosine: rise first.
    warmup_linear: rise, then fall in a line. onecycle: rise for 30 % of the run, then fall to lr_min. restarts: cosine
    with warm restarts. poly: power 0.9."""
    patience: int = 8
    """Stop after this many epochs without improvement; 0: never."""
    loader_workers: int = 0
    """Processes that read a set too large for memory; more than there are CPUs are not started."""
    train_iou: bool = False
    """Report train_mean_iou too; costs another pass over the training split each epoch."""
    finetune: Finetune = field(default_factory=Finetune)
    """Start from a trained network."""
    observation: Observation = field(default_factory=Observation)
    """How time streams become pictures, for predict."""
    out: str = ""
    """Folder for the original's own files (checkpoints, CSV row, curves); empty: none, as parallel trials need it."""
    keep_last: int = 1
    """`last` checkpoints that stay in `out`, with one `best`; 0: all of both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training.check_least(self, 1, "base_c")
        training.check_least(self, 0, "keep_last", "loader_workers")
        if not 0 <= self.p_drop < 1:
            raise ValueError(f"p_drop: got {self.p_drop}; expected 0 or more, and less than 1")
        for name in ("threshold", "overlay_threshold"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected between 0 and 1")
        if self.loss.ce:
            raise ValueError(f"loss.ce: got {self.loss.ce}; classes may share a pixel, so set it to 0 and use loss.bce")

    @classmethod
    def reference(cls) -> Config:
        """Return the original's values; its Dice, but for classes that are not there, to a millionth.

        Its known errors stay mended; `loss.dice_empty=legacy` and `include_placeholder=true` bring two of them back.
        """
        return cls(epochs=120, loss=MultilabelLoss(dice_smooth=1e-6), loader_workers=32, keep_last=0, precision="fp32")

    @classmethod
    def finetuning(cls) -> Config:
        """Return the original's second stage: ten epochs with a frozen encoder, then ten without."""
        return dataclasses.replace(cls.reference(), variant="withEL", epochs=20, patience=0)

    @classmethod
    def debug(cls) -> Config:
        """Return seconds on a CPU."""
        return cls(epochs=2, base_c=4, data=Data(synthetic=Synthetic(samples=40)), lr=1e-2, threads=1)


def metrics(config: Config) -> dict[str, str]:
    """Return what an epoch reports and which way is better; the placeholder has no IoU unless it is asked for."""
    means = ["mean_iou", "mean_dice", "mean_precision", "mean_recall", "acc", "acc_all_zero"]
    names = [f"iou_{name}" for name in counted(config)]
    trained = ["train_mean_iou"] * config.train_iou
    return {**dict.fromkeys([*means, *names, *trained], "max"), "val_loss": "min", **training.reported(config)}


def prepare(config: Config) -> dict[str, Any]:
    """Check the data and decode it once for this machine; return its manifest.

    Raises:
        DataError: naming the file or folder that cannot be used, or a checkpoint to fine-tune from that is not there.
        StrategyError: for one that needs what is not installed.
    """
    strategy.check(config.strategy)
    dataset.warn_if_synthetic(config.data)
    transfer.check(config.finetune, build_network(config))
    manifest = dataset.manifest(config.data, config.variant)
    for warning in manifest["warnings"][not config.data.root :]:
        logger.warning("%s", warning)
    return manifest


def train(config: Config, resume: Path | None = None) -> Iterator[Epoch]:
    """Yield one epoch of training after the other; `resume` is a checkpoint folder that one of them saved.

    Raises:
        DataError: if the data, or a checkpoint to start from, cannot be used.
        NonFiniteError: if a loss becomes nan or infinite.
    """
    _warn_once(config.data)
    begun = time.monotonic()
    samples, made = dataset.load(config.data, config.variant)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    run = _run_folder(config, made, resume)
    for epoch in training.fit(
        config,
        **vars(_parts(config, samples, made, normaliser)),
        validate=_validator(config, samples, made, normaliser),
        draw=functools.partial(_draw_strips, config, samples, made.validation, normaliser),
        meta=_model.meta("telescope", config, channel_names(config), normaliser, synthetic=not config.data.root),
        resume=resume,
        steps_per_epoch=_model.steps_per_epoch(config, made),
    ):
        kept = _model.with_splits(epoch, made)
        if run:
            run.add(kept)
        yield kept
    if run and run.epoch:
        run.finish(_csv_settings(config, made, time.monotonic() - begun))


def parts(config: Config) -> Parts:
    """Return the network as it begins, its loss and its training batches."""
    samples, made = dataset.load(config.data, config.variant)
    return _parts(config, samples, made, normalisation.build(config.normalise, samples, made.train))


def evaluate(checkpoint: Path, split: str, out_dir: Path, changes: Mapping[str, Any] | None = None) -> Evaluation:
    """Score a checkpoint folder on a split, with intervals over its groups, and draw some of its predictions.

    Raises:
        DataError: if the checkpoint is damaged, or samples of the test split were used in its training.
    """
    config, model, normaliser = load(checkpoint, changes)
    samples, made = dataset.load(config.data, config.variant)
    _model.refuse_seen(checkpoint, made)
    with splits.test_split_open():
        indices = splits.indices(made, split)
        found = _score(config, model, normaliser, samples, indices)
        drawn = _draw(config, model, normaliser, samples, indices, out_dir)
    real = config.variant == "withEL" or config.include_placeholder
    scored = evaluation.evaluation(
        found,
        [made.groups[index] for index in found.index],
        channel_names(config),
        multilabel=True,
        convention=scores.CONVENTION,
        excluded=[] if real else [PLACEHOLDER],
        details={
            "split": split,
            "threshold": config.threshold,
            "group_key": made.key,
            "synthetic": not config.data.root,
        },
    )
    curves = _model.save_curves(out_dir / "curves.png", checkpoint, "mean_iou")
    return dataclasses.replace(scored, figures=(*drawn, *curves))


def predict(checkpoint: Path, source: Path, out_dir: Path, changes: Mapping[str, Any] | None = None) -> list[Path]:
    """Write a prediction for each picture in a file or folder, and hits for each .npz observation; return the paths.

    For a picture: NAME_prob.npy, float32 probabilities (3, H, W), and NAME_composite.png. For an observation:
    NAME_hits.csv, a row for each detector that was hit.
    """
    config, model, normaliser = load(checkpoint, changes)
    written: list[Path] = []
    for path in sources(source):
        # Two pictures of one name in different folders stay two.
        folder = out_dir / path.parent.relative_to(source) if path != source else out_dir
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            written.append(_predict_observation(path, config, model, normaliser, folder))
        else:
            written += _predict_picture(path, config, model, normaliser, folder)
    return written


def sources(source: Path) -> list[Path]:
    """Return what predict takes: a file, or the pictures and observations below a folder, in order of name.

    Raises:
        DataError: if there is none, or two pictures differ in nothing but their suffixes.
    """
    if source.is_file():
        return [source]
    kinds = (*reader.SUFFIXES, ".npz")
    found = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in kinds and path.is_file()]
    if not found:
        raise DataError(f"{source}: nothing to predict; expected {', '.join(kinds)} files")
    _model.refuse_same_names(path for path in found if path.suffix.lower() in reader.SUFFIXES)
    _model.refuse_same_names(path for path in found if path.suffix.lower() not in reader.SUFFIXES)
    return found


def inspect(config: Config, out_dir: Path) -> list[Path]:
    """Draw one sample as stored and as the network sees it, log its smallest and largest values, return the picture."""
    samples, made = dataset.load(config.data, config.variant)
    normaliser = normalisation.build(config.normalise, samples, made.train)
    index = max(made.train, key=lambda index: int(samples.mask(index).sum()))
    raw = samples.image(index)
    seen = normaliser(torch.from_numpy(raw.copy())[None])[0].numpy()
    logger.info("%s: %s, raw %g to %g", samples.names[index], raw.dtype, raw.min(), raw.max())
    logger.info("%s: normalised %g to %g", samples.names[index], seen.min(), seen.max())
    out_dir.mkdir(parents=True, exist_ok=True)
    splits.write(made, out_dir / "splits.json")
    path = out_dir / "sample.png"
    name = samples.names[index]
    figures.save_raw_and_normalised(path, raw[0], seen[0], samples.mask(index), name=name, variant=config.variant)
    return [path]


def channel_names(config: Config) -> tuple[str, str, str]:
    """Return the channels' names in reports."""
    return ("cr", "ps", "el" if config.variant == "withEL" else PLACEHOLDER)


def counted(config: Config) -> dict[str, int]:
    """Return the channels that count, by their name in metrics; the placeholder only where it is asked for."""
    third = {"withEL": {"el": 2}, "noEL": {"none": 2} if config.include_placeholder else {}}
    return {"cr": 0, "ps": 1, **third[config.variant]}


def build_network(config: Config) -> TinyUNet:
    """Return the network with freshly drawn weights."""
    return TinyUNet(1, CHANNELS, config.base_c, config.p_drop)


def start_network(config: Config) -> TinyUNet:
    """Return the network that training begins with: the same for the same seed, or filled from another run."""
    training.seed_everything(config.seed)
    model = build_network(config)
    transfer.check(config.finetune, model)
    transfer.start(config.finetune, model)
    return model


def load(
    checkpoint: Path, changes: Mapping[str, Any] | None = None
) -> tuple[Config, nn.Module, normalisation.Normaliser]:
    """Return a checkpoint's configuration with its changes, its network on the configured device, and how it scales.

    Raises:
        CheckpointError: if a file is missing or damaged.
        DataError: if it is another workload's.
    """
    return _model.restore(checkpoint, "telescope", Config, lambda config, _: build_network(config), changes)


def samples(config: Config) -> tuple[Samples, Splits]:
    """Return the decoded data and who has which, for the export of a network."""
    return dataset.load(config.data, config.variant)


def deployment(config: Config) -> dict[str, Any]:
    """Return how an exported network is used."""
    unused = () if config.variant == "withEL" or config.include_placeholder else (PLACEHOLDER,)
    return {"threshold": config.threshold, "excluded": unused}


def _train_batches(
    config: Config, model: nn.Module, samples: Samples, made: Splits, normaliser: normalisation.Normaliser
) -> Any:
    of_epoch = _model.training_batches(config, samples, made, normaliser)

    def staged(epoch: int) -> Iterator[scores.Batch]:
        transfer.stage(config.finetune, model, epoch)
        return of_epoch(epoch)

    return staged


def _parts(config: Config, samples: Samples, made: Splits, normaliser: normalisation.Normaliser) -> Parts:
    model = start_network(config)
    return Parts(
        model=model,
        loss=losses.build(config.loss, multilabel=True),
        train_batches=_train_batches(config, model, samples, made, normaliser),
    )


def _validator(config: Config, samples: Samples, made: Splits, normaliser: normalisation.Normaliser) -> Any:
    loss, device = losses.build(config.loss, multilabel=True), training.resolve_device(config.device)

    def one_pass(model: nn.Module, split: str) -> tuple[float, Any]:
        mine = ranks.shard(splits.indices(made, split))
        found = _model.evaluation_batches(
            samples, mine, normaliser, batch_size=64, device=device, loader_workers=config.loader_workers
        )
        return scores.one_pass(model, found, loss, threshold=config.threshold)

    def validate(model: nn.Module) -> dict[str, float]:
        report = scores.report(*scores.of_all_ranks(*one_pass(model, "validation")), counted(config))
        if config.train_iou:
            found = scores.of_all_ranks(*one_pass(model, "train"))
            report["train_mean_iou"] = scores.report(*found, counted(config))["mean_iou"]
        return report

    return validate


def _run_folder(config: Config, made: Splits, resume: Path | None) -> RunFolder | None:
    if not config.out:
        return None
    run = RunFolder(Path(config.out).expanduser(), config.variant, config.keep_last)
    run.begin(made, checkpoints.read_meta(resume)["epoch"] if resume else 0)
    return run


def _csv_settings(config: Config, made: Splits, seconds: float) -> dict[str, Any]:
    return {
        "batch_size": config.batch_size,
        "num_workers": capped_workers(config.loader_workers),
        "dataset_size": len(made.names),
        "train_time_hms": runlog.hms(seconds),
    }


@functools.cache
def _warn_once(data: Data) -> None:
    """Warn of synthetic data once a process: a slot trains one trial after the other."""
    dataset.warn_if_synthetic(data)


def _score(
    config: Config,
    model: nn.Module,
    normaliser: normalisation.Normaliser,
    samples: Samples,
    indices: tuple[int, ...],
) -> evaluation.ImageScores:
    device = next(model.parameters()).device
    found = _model.evaluation_batches(samples, indices, normaliser, batch_size=64, device=device)
    return evaluation.score_batches(model, found, CHANNELS, multilabel=True, threshold=config.threshold)


def _draw(
    config: Config,
    model: nn.Module,
    normaliser: normalisation.Normaliser,
    samples: Samples,
    indices: tuple[int, ...],
    out_dir: Path,
) -> list[str]:
    """Draw a few samples, most of them with something to see."""
    examples = _examples(config, model, normaliser, samples, indices)
    names = figures.CLASS_NAMES[config.variant]
    grid, scatter = out_dir / "predictions.png", out_dir / "examples.png"
    threshold = config.overlay_threshold or config.threshold
    drawing.prediction_grid(grid, examples, names, multilabel=True, thr=threshold)
    figures.save_examples(scatter, examples, variant=config.variant, thr=threshold)
    return [grid.name, scatter.name]


def _draw_strips(
    config: Config,
    samples: Samples,
    indices: tuple[int, ...],
    normaliser: normalisation.Normaliser,
    model: nn.Module,
    path: Path,
) -> None:
    examples = _examples(config, model, normaliser, samples, indices)
    drawing.strips(path, examples, multilabel=True, thr=config.overlay_threshold or config.threshold)


def _examples(
    config: Config,
    model: nn.Module,
    normaliser: normalisation.Normaliser,
    samples: Samples,
    indices: tuple[int, ...],
) -> list[drawing.Example]:
    """Return a few samples chosen by the seed with their predictions, only those read."""
    rng = np.random.default_rng(config.seed)
    order = [int(index) for index in rng.permutation(indices)[:24]]
    examples = []
    for index in sorted(order, key=lambda index: not samples.mask(index).any())[:4]:
        seen, probability = _probabilities(model, normaliser, torch.from_numpy(samples.image(index).copy()))
        mask = samples.mask(index)
        examples.append(drawing.Example(name=samples.names[index], image=seen, probability=probability, mask=mask))
    return examples


def _probabilities(
    model: nn.Module, normaliser: normalisation.Normaliser, image: Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return an image (1, H, W) as the network sees it, and the probabilities (3, H, W)."""
    seen = normaliser(image[None])
    with torch.inference_mode():
        logits = model(seen.to(next(model.parameters()).device))
    return seen[0].numpy(), logits[0].float().sigmoid().cpu().numpy()


def _predict_picture(
    path: Path, config: Config, model: nn.Module, normaliser: normalisation.Normaliser, out_dir: Path
) -> list[Path]:
    from PIL import Image

    _, probability = _probabilities(model, normaliser, torch.from_numpy(reader.read_grey(path).copy())[None])
    array, picture = out_dir / f"{path.stem}_prob.npy", out_dir / f"{path.stem}_composite.png"
    np.save(array, probability)
    Image.fromarray(drawing.composite_map(probability, config.threshold)).save(picture)
    return [array, picture]


def _predict_observation(
    path: Path, config: Config, model: nn.Module, normaliser: normalisation.Normaliser, out_dir: Path
) -> Path:
    classes = tuple(counted(dataclasses.replace(config, include_placeholder=False)))

    def maps(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _probabilities(model, normaliser, torch.from_numpy(picture)[None])[1]

    rows: list[Mapping[str, Any]] = list(observation.hits(path, config.observation, maps, classes, config.threshold))
    written = out_dir / f"{path.stem}_hits.csv"
    focal_plane.write_hits(rows, classes, written)
    return written
