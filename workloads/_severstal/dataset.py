"""Strips on disk, or generated ones, to cached samples on one canvas, splits and a manifest.

A sample's image and mask lie on the canvas that the network sees. The mask of the strip's own size, by which scores
and thresholds are made, goes with it as run lengths.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation import cache, splits
from segmentation.epoch import DataError
from segmentation.images import read_rgb
from segmentation.letterbox import Letterbox
from segmentation.samples import Sample, Samples
from segmentation.splits import Splits
from workloads._severstal import duplicates, generator, reader
from workloads._severstal.annotations import TITLES, Mask, decode_runs, encode_runs
from workloads._severstal.generator import Synthetic
from workloads._severstal.reader import Choice, Found, Source

VERSION = 1
"""Raise when decoding changes, so that samples cached before are not mistaken for new ones."""
CLEAN, DEFECTIVE = "clean", "defective"
TEST_FOLDER = next(folder for folder, part in reader.SPLITS.items() if part == "test")
Task = Literal["binary", "multiclass4"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where strips lie, what is looked for on them, and who is trained on, who chooses and who reports."""

    root: str = ""
    """Folder with train.csv and train_images/ (Kaggle), or img/ and ann/ in it or in train_split/, val_split/ and
    test_split/ (Supervisely); empty: synthetic strips are generated, good for trying things out only."""
    form: Choice = "auto"
    """Which form to read, where a folder holds both."""
    strict: bool = True
    """Whether a picture without annotation, or the other way round, is an error; else it is left out."""
    task: Task = "binary"
    """binary: defect or none. multiclass4: each of the four classes by itself."""
    image_size: tuple[int, int] = (1024, 256)
    """Width and height, in pixels, of the canvas that strips are fitted into without being stretched."""
    folders: bool = True
    """Whether train_split/, val_split/ and test_split/ are the splits where they are there; else all are dealt."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Parts for training, validation and test, clean and defective strips alike."""
    test_images: int = 0
    """Strips held out for the test split, half of them defective, as in the original; 0: by fractions. What is left is
    dealt to training and validation by their fractions."""
    duplicates: Literal["look", "ignore"] = "look"
    """look: strips that show the same, by bytes or by look, stay in one split. ignore: each strip is its own."""
    split_seed: int = 42
    """Another number, other splits; not the seed of the training, so that trials meet one split."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """What generated strips are like."""
    cache: str = ""
    """Folder for decoded samples; empty: $SEGMENTATION_CACHE, or ~/.cache/segmentation-search."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        if len(self.image_size) != 2 or min(self.image_size) < 32:
            raise ValueError(f"image_size: got {list(self.image_size)}; expected width and height of at least 32")
        if self.test_images < 0 or self.test_images % 2:
            raise ValueError(f"test_images: got {self.test_images}; expected an even number, or 0")


def classes(task: Task) -> tuple[str, ...]:
    """Return the name of each channel."""
    return ("defect",) if task == "binary" else TITLES


def root(data: Data) -> Path:
    """Return the folder of the strips; synthetic ones are made first where none is given."""
    if data.root:
        return Path(data.root).expanduser()
    return generator.ensure(data.synthetic, cache.cache_folder(data.cache))


def find(data: Data) -> Found:
    """Return the strips on disk; raises like `reader.find`."""
    return reader.find(root(data), data.form, strict=data.strict)


def load(data: Data) -> tuple[Samples, Splits]:
    """Return the samples and who has which; those of the test split are sealed until evaluation opens them.

    Raises:
        DataError: naming the file that cannot be used, or if the splits cannot be made.
    """
    return _load(data, find(data).sources)


def load_once(data: Data) -> tuple[Samples, Splits]:
    """Return the same from memory, if neither the settings nor the cache have changed: trials come one by one."""
    path, made = _loaded(data, cache.cache_folder(data.cache))
    if not path.exists():
        _loaded.cache_clear()
        path, made = _loaded(data, cache.cache_folder(data.cache))
    return Samples(path).seal(made.test), made


def decode(data: Data, sources: Sequence[Source]) -> Iterator[Sample]:
    """Yield each strip on its canvas, one at a time."""
    names = [source.name for source in sources]
    groups = duplicates.group(sources).names if data.duplicates == "look" else names
    for source, group in zip(sources, groups, strict=True):
        picture = np.ascontiguousarray(read_rgb(source.image).transpose(2, 0, 1))
        mask = reader.read_mask(source)
        box = letterbox(data, picture.shape[1:])
        native = mask if data.task == "multiclass4" else reader.merged(mask)[None]
        noted = {
            "size": json.dumps(list(picture.shape[1:])),
            "runs": json.dumps([encode_runs(plane) for plane in native]),
            "pixels": json.dumps(mask.sum(axis=(1, 2), dtype=np.int64).tolist()),
        }
        yield Sample(source.name, group, box.image(picture), box.mask(native), noted)


def letterbox(data: Data, size: Sequence[int]) -> Letterbox:
    """Return how strips of a size (height, width) lie on the canvas."""
    height, width = size
    return Letterbox((height, width), (data.image_size[1], data.image_size[0]))


def native_mask(samples: Samples, index: int) -> Mask:
    """Return a strip's mask (K, H, W) at its own size; raises like `Samples.mask`."""
    samples.refuse_sealed(index)
    noted = samples.extra(index)
    height, width = json.loads(noted["size"])
    return np.stack([decode_runs(text, (height, width), samples.names[index]) for text in json.loads(noted["runs"])])


def is_defective(samples: Samples, index: int) -> bool:
    """Return whether a strip shows a defect."""
    return any(json.loads(samples.extra(index)["pixels"]))


def deal(data: Data, samples: Samples, sources: Sequence[Source]) -> Splits:
    """Return who is trained on, who chooses and who reports.

    Raises:
        DataError: if strips that show the same are in two of the given folders, or there are too few to deal.
    """
    strata = [DEFECTIVE if is_defective(samples, index) else CLEAN for index in range(len(samples))]
    parts = [source.part for source in sources]
    if data.folders and any(parts):
        return _of_folders(data, samples, parts)
    return splits.split(
        samples.names,
        samples.groups,
        fractions=data.fractions,
        seed=data.split_seed,
        key="strip",
        test=_held_out(data, samples, strata),
        strata=strata,
    )


def content_hash(data: Data) -> str:
    """Return the SHA-256 of all files that strips are made of."""
    return _content_hash(data, find(data).sources)


def manifest(data: Data) -> dict[str, Any]:
    """Return what the data is, for a person to check before believing a score; no test picture is opened."""
    found = find(data)
    samples, made = _load(data, found.sources)
    notes = [samples.extra(index) for index in range(len(samples))]
    pixels = np.array([json.loads(note["pixels"]) for note in notes])  # (N, 4)
    sizes = np.array([json.loads(note["size"]) for note in notes])
    groups = Counter(samples.groups)
    return {
        "sha256": _content_hash(data, found.sources),
        "form": found.form,
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len({samples.groups[index] for index in made[name]}) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "defective": {name: int(pixels[list(made[name])].any(axis=1).sum()) for name in splits.NAMES},
        "strips_of_class": {
            name: dict(zip(TITLES, (pixels[list(made[name])] > 0).sum(axis=0).tolist(), strict=True))
            for name in splits.NAMES
        },
        "duplicates": sum(count - 1 for count in groups.values()),
        "missing": list(found.missing),
        "size_range": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()],
        "sample_shape": list(samples.shape(0)),
        "synthetic": not data.root,
        "warnings": [*_warnings(data, pixels, made, groups)],
    }


@functools.lru_cache(maxsize=8)
def _loaded(data: Data, folder: Path) -> tuple[Path, Splits]:
    samples, made = load(data)
    return samples.path, made


def _load(data: Data, sources: Sequence[Source]) -> tuple[Samples, Splits]:
    samples = cache.cached(_key(data, sources), lambda: decode(data, sources), folder=cache.cache_folder(data.cache))
    made = deal(data, samples, sources)
    return samples.seal(made.test), made


def _of_folders(data: Data, samples: Samples, parts: Sequence[str]) -> Splits:
    members = {name: tuple(index for index, part in enumerate(parts) if part == name) for name in splits.NAMES}
    made = Splits(**members, seed=data.split_seed, key="strip", names=samples.names, groups=samples.groups)
    try:
        splits.check(made, tested=False)
    except DataError as error:
        remedy = "set data.folders=false to deal all strips anew, or data.duplicates=ignore to leave it so"
        raise DataError(f"{root(data)}: its split folders cannot be used: {error}; {remedy}") from error
    return made


def _held_out(data: Data, samples: Samples, strata: Sequence[str]) -> set[str]:
    """Return the groups of the test split where a number of strips is held out: half defective, half clean."""
    if not data.test_images:
        return set()
    kinds: dict[str, str] = {}
    for group, stratum in zip(samples.groups, strata, strict=True):
        kinds[group] = max(stratum, kinds.get(group, stratum))
    sizes, chosen = Counter(samples.groups), set()
    for kind in (CLEAN, DEFECTIVE):
        left = data.test_images // 2
        for group in sorted(kinds, key=lambda name: hashlib.sha256(f"{data.split_seed}/{name}".encode()).digest()):
            if kinds[group] == kind and sizes[group] <= left:
                chosen.add(group)
                left -= sizes[group]
        if left:
            there = sum(sizes[group] for group in kinds if kinds[group] == kind)
            raise DataError(
                f"data.test_images={data.test_images}: {there} {kind} strips, and {data.test_images // 2} are to "
                "be held out; lower it, or set it to 0 to hold out by data.fractions"
            )
    return chosen


def _key(data: Data, sources: Sequence[Source]) -> str:
    """Return a name for what decoding gives; who has which is no part of it."""
    settings = [VERSION, data.task, data.image_size, data.duplicates, [source.name for source in sources]]
    contents = _content_hash(data, sources, json.dumps(settings))
    return f"severstal-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


def _content_hash(data: Data, sources: Sequence[Source], extra: str = "") -> str:
    return cache.content_hash(reader.files(sources), extra=extra, folder=cache.cache_folder(data.cache))


def _synthetic_warning(data: Data) -> Iterator[str]:
    if not data.root:
        made = f"{data.synthetic.samples} generated strips in {root(data)} are used"
        remedy = "set data.root to a folder of Severstal's strips, in Kaggle's or Supervisely's form"
        yield f"SYNTHETIC DATA: data.root is not given, so {made}; scores say nothing about steel; {remedy}"


def _warnings(data: Data, pixels: np.ndarray[Any, Any], made: Splits, groups: Counter[str]) -> Iterator[str]:
    yield from _synthetic_warning(data)
    for name in splits.NAMES:
        here = pixels[list(made[name])]
        if not here.size:
            yield f"there is no strip in split {name}: nothing that is trained can be tested; add {TEST_FOLDER}/"
        elif not here.any():
            yield f"split {name} has no defective strip: no score of defects can be made there"
        elif here.any(axis=1).all():
            yield f"split {name} has no clean strip: false alarms on clean steel go unseen"
    if again := sum(count - 1 for count in groups.values()):
        yield f"{again} strips show what others show; each such group is in one split"
