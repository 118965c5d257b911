"""From volumes, or none, to cached slices, splits by patient and a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from segmentation import cache, normalisation, splits
from segmentation.epoch import DataError
from segmentation.losses import IGNORE_INDEX
from segmentation.nifti import Head
from segmentation.samples import Sample, Samples
from segmentation.splits import Splits
from segmentation.training import check_least
from workloads._acdc import generator, patches, reader
from workloads._acdc.generator import Synthetic
from workloads._acdc.reader import Volume
from workloads._pairs.dataset import with_channels

Array = np.ndarray[Any, Any]

HEART = ("background", "RV", "MYO", "LV")
"""Right ventricle, myocardium and left ventricle: the labels 1, 2 and 3 of ACDC."""
VERSION = 1
"""Raise when decoding changes, so that slices cached before are not mistaken for new ones."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where volumes or pictures lie, what their masks mean, and how slices are made of them and split."""

    root: str = ""
    """Folder of the data: ACDC as published, nnU-Net's raw layout, or images/ and masks/; which, is seen by looking.
    Empty: synthetic hearts are generated, good for trying things out only."""
    classes: int = 4
    """Classes, background included: masks hold 0 to one less."""
    names: tuple[str, ...] = ()
    """Name of each class; empty: background, RV, MYO, LV where there are four, else made up."""
    in_channels: int = 1
    """Channels of every image: 1 makes greys of colours, 3 repeats greys."""
    slices_per_volume: int | None = None
    """Only so many slices from the middle of each volume; null: all."""
    patch_slices: int = 0
    """Slices of the patches that a network of volumes (network.dims 3) learns from; shorter volumes are filled up by
    their last slice, longer ones cut. 0: a network of images learns slice by slice."""
    size: int = 256
    """Height and width that every slice is resized to, in pixels."""
    percentiles: tuple[float, float] = (1.0, 99.0)
    """Each channel of a slice is clipped to these percentiles of its own and stretched to 0..1, before resizing."""
    patient: str = r"patient\d+"
    """Pattern of what in a file's name is the patient, who stays in one split; where it is not found, what stands
    before _frame, or all of the name."""
    patients: int = 0
    """Use this many patients, the first by name; 0: all."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Parts of the slices for training, validation and test; imagesTs with labelsTs, or testing/, is the test split
    where it is there, and the first two share the rest."""
    split_seed: int = 0
    """Another number, other splits; not the seed of the training, so that trials meet one split."""
    cache: str = ""
    """Folder for decoded and generated slices; empty: $SEGMENTATION_CACHE, or one in the home's cache."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """The generated hearts."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= 255:
            raise ValueError(f"classes: got {self.classes}; expected 2 to 255, background included")
        if self.names and (len(self.names) != self.classes or len(set(self.names)) != self.classes):
            raise ValueError(
                f"names: got {list(self.names)}; expected {self.classes} different ones, one for each class"
            )
        check_least(self, 8, "size")
        check_least(self, 1, "in_channels")
        check_least(self, 0, "patients", "patch_slices")
        if self.slices_per_volume is not None and self.slices_per_volume < 1:
            raise ValueError(f"slices_per_volume: got {self.slices_per_volume}; expected 1 or more, or null for all")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles: got {list(self.percentiles)}; expected 0 <= low < high <= 100")
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: got {list(self.fractions)}; expected three positive numbers that sum to 1")
        try:
            re.compile(self.patient)
        except re.error as error:
            raise ValueError(f"patient: got {self.patient!r}, which is no pattern: {error}") from error


def load(data: Data) -> tuple[Samples, Splits]:
    """Return the slices, those of the test split sealed, and who has which.

    Raises:
        DataError: see `reader.find`, `reader.read` and `splits.split`.
    """
    volumes = find(data)
    samples = cache.cached(_key(volumes, data), lambda: decode(data, volumes), folder=cache.cache_folder(data.cache))
    testing = {volume.patient for volume in volumes if volume.test}
    made = splits.split(
        samples.names, samples.groups, fractions=data.fractions, seed=data.split_seed, key="patient", test=testing
    )
    return samples.seal(made.test), made


def class_names(data: Data) -> tuple[str, ...]:
    """Return the name of each class."""
    if data.names:
        return data.names
    return HEART if data.classes == len(HEART) else tuple(f"class{index}" for index in range(data.classes))


def root(data: Data) -> Path:
    """Return the data folder: the given one, or that of the synthetic hearts."""
    return (
        Path(data.root).expanduser() if data.root else generator.ensure(data.synthetic, cache.cache_folder(data.cache))
    )


def find(data: Data) -> list[Volume]:
    """Return the volumes of as many patients as are wanted, in order of name.

    Raises:
        DataError: see `reader.find`; or if a patient is both to train on and to test by.
    """
    volumes = reader.find(root(data), data.patient)
    both = {one.patient for one in volumes if one.test} & {one.patient for one in volumes if not one.test}
    if both:
        raise DataError(f"{root(data)}: {min(both)} is both for training and for testing; move all files of a patient")
    chosen = sorted({volume.patient for volume in volumes})[: data.patients or None]
    return [volume for volume in volumes if volume.patient in chosen]


def decode(data: Data, volumes: Sequence[Volume]) -> Iterator[Sample]:
    """Yield the slices of each volume, one volume in memory at a time."""
    reader.check_shapes(volumes)
    for volume in volumes:
        image, mask, head = reader.read(volume)
        _refuse_stray(mask, data, volume.mask)
        image = np.stack([with_channels(image[..., z], data.in_channels, volume.image) for z in range(image.shape[-1])])
        used = central(mask.shape[2], data.slices_per_volume)
        if data.patch_slices:
            yield from _patches(data, volume, used, image, mask, head)
        else:
            yield from (_sample(data, volume, z, image[z], mask[..., z], head) for z in used)


def central(count: int, wanted: int | None) -> range:
    """Return which slices of a volume are used: all, or so many around its middle."""
    if wanted is None or wanted >= count:
        return range(count)
    first = (count - wanted) // 2
    return range(first, first + wanted)


def scaled(image: Array, data: Data) -> Array:
    """Return an image (C, H, W) as it is stored in the cache: clipped, stretched to 0..1, and resized; float32."""
    values = torch.from_numpy(np.ascontiguousarray(image).astype(np.float32))
    stretched = normalisation.percentile(values[None], *data.percentiles)[0]
    size = [data.size, data.size]
    if list(stretched.shape[-2:]) != size:
        stretched = transforms.resize(stretched, size, InterpolationMode.BILINEAR, antialias=True)
    return stretched.contiguous().numpy()


def resized_mask(mask: Array, height: int, width: int) -> Array:
    """Return (H, W) class ids at another size, each that of the nearest pixel."""
    nearest = InterpolationMode.NEAREST_EXACT
    planes = torch.from_numpy(mask.astype(np.uint8))[None]
    return np.asarray(transforms.resize(planes, [height, width], nearest)[0])


def manifest(data: Data, samples: Samples, made: Splits) -> dict[str, Any]:
    """Return what the data is, from notes made while decoding: no test slice is opened."""
    notes = [samples.extra(index) for index in range(len(samples))]
    # Slices that a patch shows again count once.
    pixels = np.array([json.loads(note["pixels"]) for note in notes])  # (N, K)
    sizes = np.array([json.loads(note["size"]) for note in notes])
    names = class_names(data)
    of_split = {name: pixels[list(made[name])].sum(axis=0) for name in splits.NAMES}
    return {
        "sha256": cache.content_hash(_files(find(data)), folder=cache.cache_folder(data.cache)),
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len({made.groups[index] for index in made[name]}) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "layout": reader.layout_of(root(data)),
        "volumes": len({note["volume"] for note in notes}),
        "phases": {phase: len({n["volume"] for n in notes if n["phase"] == phase}) for phase in ("ED", "ES")},
        "size_range": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()],
        "sample_shape": list(samples.shape(0)),
        "class_shares": {
            name: dict(zip(names, (found / found.sum()).tolist(), strict=True)) for name, found in of_split.items()
        },
        "synthetic": not data.root,
        "warnings": list(_warnings(data, of_split)),
    }


def _sample(data: Data, volume: Volume, z: int, image: Array, mask: Array, head: Head) -> Sample:
    """Return a slice; image (C, H, W), mask (H, W)."""
    classes = resized_mask(mask, data.size, data.size)
    note = _note(data, volume, z, classes, mask.shape[0], mask.shape[1], head)
    return Sample(f"{volume.name}@{z:02d}", volume.patient, scaled(image, data), classes, note)


def _patches(data: Data, volume: Volume, used: range, image: Array, mask: Array, head: Head) -> Iterator[Sample]:
    """Yield the patches of a volume as tall images; image (Z, C, H, W), mask (H, W, Z)."""
    seen = {z: scaled(image[z], data) for z in used}
    classes = {z: resized_mask(mask[..., z], data.size, data.size) for z in used}
    for patch in patches.windows(len(used), data.patch_slices):
        shown = [used[place] for place in patch.places]
        tall = np.concatenate([seen[z] for z in shown], axis=1)  # (C, D * H, W)
        shapes = np.stack([classes[z] for z in shown])  # (D, H, W)
        new = np.array(patch.new)
        known = np.where(new[:, None, None], shapes, np.uint8(IGNORE_INDEX))
        note = _note(data, volume, shown[0], shapes[new], mask.shape[0], mask.shape[1], head)
        note["new"] = json.dumps(patch.new)
        yield Sample(f"{volume.name}@{shown[0]:02d}", volume.patient, tall, known.reshape(-1, data.size), note)


def _note(data: Data, volume: Volume, z: int, classes: Array, height: int, width: int, head: Head) -> dict[str, str]:
    """Return what is told of a sample; height and width are those that were stored."""
    steps = (head.spacing[0] * height / data.size, head.spacing[1] * width / data.size, *head.spacing[2:])
    return {
        "volume": volume.name,
        "slice": str(z),
        "phase": volume.phase,
        "spacing": json.dumps(steps),
        "size": json.dumps([height, width]),
        "pixels": json.dumps(np.bincount(classes.ravel(), minlength=data.classes).tolist()),
    }


def _refuse_stray(mask: Array, data: Data, path: Path) -> None:
    found = np.unique(mask)
    if stray := [int(value) for value in found if not 0 <= value < data.classes]:
        listed = ", ".join(map(str, stray[:5])) + (f" and {len(stray) - 5} more" if len(stray) > 5 else "")
        remedy = f"expected 0 to {data.classes - 1}; mend the mask, or set data.classes"
        raise DataError(f"{path}: labels {listed} are outside the {data.classes} classes; {remedy}")


def _files(volumes: Sequence[Volume]) -> list[Path]:
    told = {path for volume in volumes if (path := volume.image.parent / reader.INFO).is_file()}
    return [*(path for volume in volumes for path in (volume.image, volume.mask)), *sorted(told)]


def _key(volumes: Sequence[Volume], data: Data) -> str:
    """Return a name for what decoding gives: it depends on the files and on how they are read, not on the splits."""
    read = [data.classes, data.in_channels, data.slices_per_volume, data.size, data.percentiles, data.patient]
    # Only where it is used, so that slices cached before it was there are still found.
    read += [data.patch_slices] * (data.patch_slices > 0)
    extra = json.dumps([VERSION, read])
    contents = cache.content_hash(_files(volumes), extra=extra, folder=cache.cache_folder(data.cache))
    return f"acdc-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


def _warnings(data: Data, of_split: dict[str, Any]) -> Iterator[str]:
    """Yield what a person should know before believing a score."""
    if not data.root:
        made = f"{data.synthetic.patients} generated patients in {root(data)} are used"
        remedy = "set data.root to ACDC, or to a folder with images/ and masks/"
        yield f"SYNTHETIC DATA: data.root is not given, so {made}; scores say nothing about hearts; {remedy}"
    for name, pixels in of_split.items():
        if missing := [label for label, count in zip(class_names(data), pixels, strict=True) if count == 0]:
            yield f"split {name} has no pixel of {', '.join(missing)}; try another data.split_seed or data.fractions"
