"""What workloads have in common: batches to learn from, a checkpoint that tells all, and the way back from it."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import configuration
from segmentation import augmentation, checkpoints, figures, normalisation, ranks, splits, surfaces, training
from segmentation.epoch import DataError, Epoch
from segmentation.loading import batches
from segmentation.networks import Network, cost
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples
from segmentation.splits import Splits
from segmentation.training import Batch, TrainingConfig

C = TypeVar("C", bound=TrainingConfig)

SPLITS = "splits.json"


def meta(
    workload: str, config: TrainingConfig, classes: Sequence[str], normaliser: Normaliser, *, synthetic: bool
) -> dict[str, Any]:
    """Return what makes a checkpoint describe itself."""
    return {
        "workload": workload,
        "config": configuration.to_values(config),
        "classes": list(classes),
        "normalise": normaliser.to_dict(),
        "synthetic": synthetic,
    }


def check_class_weights(weights: Sequence[float], classes: int) -> None:
    """Raise ValueError where there are weights, but not one for each class."""
    if weights and len(weights) != classes:
        raise ValueError(f"loss.class_weights: got {len(weights)}; expected one for each of {classes}")


def training_batches(
    config: Any,
    samples: Samples,
    made: Splits,
    normaliser: Normaliser,
    *,
    slices: int = 0,
    weights: Sequence[float] = (),
) -> Callable[[int], Iterator[Batch]]:
    """Return the batches of an epoch by its number; `config` is a TrainingConfig with augmentation, loader_workers.

    slices: of each sample, where samples are volumes.
    weights: of each training sample, by which it is drawn; empty: each comes once.
    """
    augment = augmentation.build(config.augmentation, normaliser.black, slices)

    def of_epoch(epoch: int) -> Iterator[Batch]:
        return batches(
            samples,
            splits.indices(made, "train"),
            batch_size=config.batch_size,
            normalise=normaliser,
            augment=augment,
            shuffle=True,
            seed=config.seed,
            epoch=epoch,
            loader_workers=config.loader_workers,
            device=training.resolve_device(config.device),
            place=ranks.place(),
            weights=weights,
        )

    return of_epoch


def evaluation_batches(
    samples: Samples,
    indices: Sequence[int],
    normaliser: Normaliser,
    *,
    batch_size: int,
    device: torch.device,
    loader_workers: int = 0,
    place: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yield some samples in their order, as they are; `place` as in `loading.batches`."""
    return batches(
        samples,
        indices,
        batch_size=batch_size,
        normalise=normaliser,
        shuffle=False,
        seed=0,
        epoch=0,
        loader_workers=loader_workers,
        device=device,
        place=place,
    )


def keep_classes(predicted: dict[int, Any], logits: Tensor, index: Tensor) -> None:
    """Put the class ids (H, W) of each image of a batch into a dictionary, by the sample's number."""
    classes = logits.argmax(1).to(torch.uint8).cpu().numpy()
    predicted.update(zip(index.tolist(), classes, strict=True))


def outlines(
    samples: Samples, predicted: Mapping[int, Any], classes: int, tolerance: float, ignore_index: int = 255
) -> list[tuple[str, Any]]:
    """Return the group of each predicted volume, and how far its outlines lie apart, see `surfaces.compare`.

    Samples whose notes name one volume are its slices, in order; others are each their own, measured in pixels. Ignored
    pixels count as background.
    """
    volumes: dict[str, list[int]] = defaultdict(list)
    for index in sorted(predicted):
        volumes[samples.extra(index).get("volume", samples.names[index])].append(index)
    found = []
    for slices in volumes.values():
        mask = np.stack([samples.mask(index) for index in slices], axis=-1)
        called = np.where(mask == ignore_index, 0, np.stack([predicted[index] for index in slices], axis=-1))
        steps = json.loads(samples.extra(slices[0]).get("spacing", "[1, 1]"))
        mask = np.where(mask == ignore_index, 0, mask)
        distances = surfaces.compare(called, mask, classes, spacing=(*steps, 1.0)[:3], tolerance=tolerance)
        found.append((samples.groups[slices[0]], distances))
    return found


def first_images(config: Any, samples: Samples, made: Splits, normaliser: Normaliser) -> Callable[[], Iterator[Tensor]]:
    """Return the images of some training batches as they are, the same on every rank; as many as are recalibrated on.

    config: with batch_size, prune, device and loader_workers.
    """
    count = max(config.prune.recalibrate, 1) * config.batch_size

    def images() -> Iterator[Tensor]:
        chosen = spread(splits.indices(made, "train"), count)
        cpu = torch.device("cpu")
        for image, _, _ in evaluation_batches(samples, chosen, normaliser, batch_size=config.batch_size, device=cpu):
            yield image

    return images


def spread(indices: Sequence[int], count: int) -> list[int]:
    """Return so many of the samples, or all, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)
    return [indices[place] for place in places]


def with_most_classes(samples: Samples, indices: Sequence[int], count: int) -> list[int]:
    """Return so many samples spread over a split, those with most classes first."""
    return sorted(spread(indices, 4 * count), key=lambda index: -len(np.unique(samples.mask(index))))[:count]


@torch.inference_mode()
def examples(
    model: nn.Module, samples: Samples, shown: Sequence[int], normaliser: Normaliser, *, multilabel: bool = False
) -> list[figures.Example]:
    """Return some samples, each with the classes' probabilities that a network gives its pixels.

    multilabel: classes may share a pixel.
    """
    image = torch.cat([normaliser(torch.from_numpy(samples.image(index).copy())[None]) for index in shown])
    logits = model(image.to(next(model.parameters()).device)).float()
    probability = (logits.sigmoid() if multilabel else logits.softmax(1)).cpu().numpy()
    return [
        figures.Example(
            name=samples.names[index], image=image[row].numpy(), probability=probability[row], mask=samples.mask(index)
        )
        for row, index in enumerate(shown)
    ]


def steps_per_epoch(config: TrainingConfig, made: Splits) -> int:
    """Return how many steps an epoch has, for all processes that train together."""
    return -(-len(made.train) // (config.batch_size * ranks.place()[1]))


def with_splits(epoch: Epoch, made: Splits) -> Epoch:
    """Return the epoch, its checkpoint also telling which sample was in which split."""
    return with_file(epoch, lambda folder: splits.write(made, folder / SPLITS))


def with_file(epoch: Epoch, write: Callable[[Path], object]) -> Epoch:
    """Return the epoch, its checkpoint with a file more, which one of its processes writes into the folder."""

    def save(folder: Path) -> None:
        epoch.save(folder)
        if ranks.place()[0] == 0:
            write(folder)

    return dataclasses.replace(epoch, save=save)


def macs_of(model: nn.Module, channels: int, height: int, width: int, network: Network) -> int:
    """Return the multiply-accumulates of one image's logits.

    Raises:
        ValueError: if the network cannot take images of this size, as most transformers, which are made for one.
    """
    try:
        return cost.macs(model, channels, height, width)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"encoder: {network.encoder!r} cannot take images of {width}x{height} ({str(error).rstrip('.')}); choose "
            "one for any size, such as resnet34 or convnext_tiny, or images of the size it was made for"
        ) from error


def restore(
    checkpoint: Path,
    workload: str,
    config_class: type[C],
    build: Callable[[C, dict[str, Any]], nn.Module],
    changes: Mapping[str, Any] | None = None,
) -> tuple[C, nn.Module, Normaliser]:
    """Return a checkpoint's configuration, its network on the configured device, and how images are scaled for it.

    Args:
        checkpoint: folder.
        workload: whose it has to be.
        config_class: of the workload.
        build: makes the network from the configuration and the checkpoint's own record.
        changes: dotted values of the configuration that are others now.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: for a change that the configuration refuses.
        DataError: if it is another workload's.
    """
    record = checkpoints.read_meta(checkpoint)
    if record.get("workload") != workload:
        raise DataError(f"{checkpoint}: made by workload {record.get('workload')!r}; expected {workload!r}")
    stored = configuration.without_retired(record["config"])
    config = configuration.replace(configuration.build(config_class, stored), changes or {})
    model = build(config, record)
    checkpoints.load_weights(checkpoint, model)
    return config, to_use(model, config.device), normalisation.from_dict(record["normalise"])


def to_use(model: nn.Module, device: str) -> nn.Module:
    """Return the network on the device of a config, or on the CPU where there is no GPU, ready to predict."""
    # A checkpoint made on a GPU has to be of use on a machine without.
    wanted = device if device == "auto" or torch.cuda.is_available() else "cpu"
    return model.to(training.resolve_device(wanted)).eval()


def refuse_seen(checkpoint: Path, made: Splits) -> None:
    """Raise DataError if a test sample of today was trained on or chosen by when the checkpoint was made."""
    path = checkpoint / SPLITS
    if not path.is_file():
        return
    then = splits.read(path)
    seen = {then.names[index] for name in ("train", "validation") for index in then[name]}
    if leaked := sorted(seen & {made.names[index] for index in made.test}):
        raise DataError(
            f"{path}: {len(leaked)} samples of the test split were used in training, such as {leaked[0]!r}; "
            "the data or its splits have changed since; train again"
        )


def refuse_same_names(pictures: Iterable[Path]) -> None:
    """Raise DataError if two pictures differ in nothing but their suffixes, so that their predictions would too."""
    found: dict[Path, Path] = {}
    for path in pictures:
        stem = path.with_name(path.name.removesuffix(".gz")).with_suffix("")
        if (other := found.setdefault(stem, path)) != path:
            both = f"{other.name} and {path.name}"
            raise DataError(f"{path.parent}: predictions of {both} would have one name; rename one of them")


def write_torch(content: Mapping[str, Any], path: Path) -> None:
    """Write a file of torch.save, which appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(dict(content), temporary)
    temporary.replace(path)


def save_curves(path: Path, checkpoint: Path, score: str) -> list[str]:
    """Draw losses and one score over the epochs that led to a checkpoint; return the file's name, if there are any."""
    if not (checkpoint / checkpoints.STATE_FILE).is_file():
        return []
    history = checkpoints.load_state(checkpoint)["progress"].get("history", [])
    series = {"train_loss": "training loss", "val_loss": "validation loss", score: score.replace("_", " ")}
    figures.curves(path, history, series, title=f"epochs 1 to {len(history)}", ylabel="loss, score")
    return [path.name] if history else []
