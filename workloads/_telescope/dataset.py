"""From a folder, or none, to cached samples, splits and a manifest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segmentation import cache, splits
from segmentation.samples import Samples
from segmentation.splits import Splits
from workloads._telescope import generator, reader
from workloads._telescope.generator import Synthetic
from workloads._telescope.reader import Group, Layout, Source, Variant

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise when decoding changes, so that samples cached before are not mistaken for new ones."""
CHANNELS = ("cosmic_ray", "point_source", "electronic_glitch")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where pictures come from and how they are split."""

    root: str = ""
    """Folder with images/ and masks/; empty: synthetic pictures are generated, good for trying things out only."""
    layout: Layout = "auto"
    """folders: a folder for each class, as the original has it. simulated: img_#####.png with coloured masks."""
    group: Group = "image"
    """What stays in one split: image, or tod (all slices of one observation, or all pictures of one simulation)."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Parts of the samples for train, validation and test."""
    split_seed: int = 0
    """Seed of the splits; not that of the training, so that trials with different seeds are compared on one split."""
    cache: str = ""
    """Folder for decoded and generated pictures; empty: $SEGMENTATION_CACHE, or one in the home's cache."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """The generated pictures."""

    def __post_init__(self) -> None:
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: got {list(self.fractions)}; expected three positive numbers that sum to 1")


def load(data: Data, variant: Variant) -> tuple[Samples, Splits]:
    """Return the decoded samples, the test split's sealed, and the splits; the same for both variants but for the data.

    Raises:
        DataError: see `reader.find` and `reader.read`; or for fewer than three groups.
    """
    sources = find(data, variant)
    samples = cache.cached(
        _key(sources, data, variant), lambda: reader.read(sources), folder=cache.cache_folder(data.cache)
    )
    made = splits.split(samples.names, samples.groups, fractions=data.fractions, seed=data.split_seed, key=data.group)
    return samples.seal(made.test), made


def find(data: Data, variant: Variant) -> list[Source]:
    """Return what there is to decode; synthetic pictures are made first where no folder is given."""
    return reader.find(root(data), variant=variant, layout=data.layout, group=data.group)


def root(data: Data) -> Path:
    """Return the data folder: the given one, or that of the synthetic pictures."""
    return (
        Path(data.root).expanduser() if data.root else generator.ensure(data.synthetic, cache.cache_folder(data.cache))
    )


def manifest(data: Data, variant: Variant) -> dict[str, Any]:
    """Return what the data is, for a person to check before believing a score; no test picture is opened.

    `class_shares` are the positive pixels of each channel as a share of all, which is why a high pixel accuracy says
    little: `all_zero_accuracy` is that of predicting nothing.
    """
    sources = find(data, variant)
    samples, made = load(data, variant)
    notes = [samples.extra(index) for index in range(len(samples))]
    pixels = np.array([json.loads(note["pixels"]) for note in notes], float)  # (N, 3)
    shares = {name: _shares(pixels[list(made[name])], samples) for name in splits.NAMES}
    real = slice(0, 2 if variant == "noEL" else 3)
    return {
        "sha256": cache.content_hash(reader.files(sources), folder=cache.cache_folder(data.cache)),
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len({made.groups[index] for index in made[name]}) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "sample_shape": list(samples.shape(0)),
        "class_folders": list(reader.class_folders(variant)),
        "class_shares": {name: dict(zip(CHANNELS, values.tolist(), strict=True)) for name, values in shares.items()},
        "all_zero_accuracy": {name: float(1 - values[real].mean()) for name, values in shares.items()},
        "in_several_folders": sum(len(note["folders"].split()) > 1 for note in notes),
        "missing_masks": reader.missing_masks(sources, variant),
        "synthetic": not data.root,
        "warnings": list(_warnings(data, variant, sources, shares)),
    }


def warn_if_synthetic(data: Data) -> None:
    """Say loudly that scores mean nothing for real data."""
    if not data.root:
        logger.warning("%s", _synthetic(data))


def _synthetic(data: Data) -> str:
    return (
        f"SYNTHETIC DATA: data.root is not given, so {data.synthetic.samples} generated pictures in {root(data)} are "
        "used; scores say nothing about real observations; set data.root to a folder with images/ and masks/"
    )


def _warnings(
    data: Data, variant: Variant, sources: Sequence[Source], shares: dict[str, np.ndarray[Any, Any]]
) -> Iterator[str]:
    if not data.root:
        yield _synthetic(data)
    for name, count in reader.missing_masks(sources, variant).items():
        yield f"{count} pictures of images/{name} have no mask in masks/{name} and count as empty there"
    real = CHANNELS[: 2 if variant == "noEL" else 3]
    for split, values in shares.items():
        if lacking := [name for name, share in zip(real, values, strict=False) if share == 0]:
            yield f"split {split} has no pixel of {', '.join(lacking)}; try another data.split_seed or data.fractions"
    twice = [source for source in sources if "/" in source.name]
    if twice:
        yield f"{len(twice)} pictures share a name but differ, such as {twice[0].name}; they stay in one split"


def _shares(pixels: np.ndarray[Any, Any], samples: Samples) -> np.ndarray[Any, Any]:
    _, height, width = samples.shape(0)
    return np.asarray(pixels.sum(axis=0) / (len(pixels) * height * width))


def _key(sources: Sequence[Source], data: Data, variant: Variant) -> str:
    extra = json.dumps([VERSION, variant, data.layout, data.group])
    contents = cache.content_hash(reader.files(sources), extra=extra, folder=cache.cache_folder(data.cache))
    return f"telescope-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"
