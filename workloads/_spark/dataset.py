"""From CSV files and folders, or none, to cached samples, splits and a manifest."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation import cache, splits
from segmentation.epoch import DataError
from segmentation.images import image_size, read_rgb
from segmentation.samples import Sample, Samples, size_text
from segmentation.splits import Splits
from workloads._spark import generator, reader
from workloads._spark.classes import CLASSES
from workloads._spark.generator import Synthetic
from workloads._spark.reader import MaskResize, Part, Source

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise when decoding changes, so that samples cached before are not mistaken for new ones."""
Dealt = dict[str, list[Source]]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where SPARK's files lie, how masks are read, and who is trained on, who chooses and who reports."""

    root: str = ""
    """Folder with train.csv, val.csv, images/ and mask/; empty: synthetic spacecraft are generated, good for trying
    things out only."""
    train_csv: str = ""
    """Another place for train.csv; empty: in root."""
    val_csv: str = ""
    """Another place for val.csv; empty: in root."""
    image_root: str = ""
    """Another place for images/; empty: in root."""
    mask_root: str = ""
    """Another place for mask/; empty: in root."""
    test: Literal["val_csv", "from_train"] = "val_csv"
    """Where the test split comes from: nothing but the two CSV files has masks. val_csv: val.csv is the test split, and
    a part of train.csv chooses. from_train: a part of train.csv is the test split, and val.csv chooses, as in the
    original, which had no test split."""
    held_out: float = 0.15
    """Part of train.csv that is not trained on but chooses, or reports: see test."""
    split_seed: int = 0
    """Another number, other samples held out; not the seed of the training, so that trials meet one split."""
    downsample: int = 0
    """Train on this many samples and validate and test on a tenth each, satellites in proportion; 0: on all."""
    target_size: int = 512
    """Height and width that every image is resized to, in pixels."""
    mask_resize: MaskResize = "classes_first"
    """Whether colours become classes before a mask is resized, or after (rgb_first), as in the original. Resizing takes
    the nearest pixel, so both give the same classes."""
    max_stray: float = 0.01
    """Share of a mask's pixels that may be of no class's colour; edges blurred by JPEG do not count."""
    cache: str = ""
    """Folder for decoded and generated pictures; empty: $SEGMENTATION_CACHE, or one in the home's cache."""
    synthetic: Synthetic = field(default_factory=Synthetic)
    """The generated pictures."""

    def __post_init__(self) -> None:
        for name, least in (("target_size", 1), ("downsample", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected {least} or more")
        for name in ("held_out", "max_stray"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected more than 0, and less than 1")


def load(data: Data) -> tuple[Samples, Splits]:
    """Return the decoded samples, the test split's sealed, and the splits.

    Raises:
        DataError: see `reader.find`, `reader.read_mask` and `deal`.
    """
    return _load(data, deal(data))


def load_once(data: Data) -> tuple[Samples, Splits]:
    """Return what `load` does, without looking through the folders again while the CSV files stay as they are.

    A process that trains one trial after the other would list and hash all files for each of them.
    """
    folder = cache.cache_folder(data.cache)
    stamps = tuple(_stamp(table_path(data, part)) for part in ("train", "val"))
    path, made = _loaded(data, folder, stamps)
    if not path.is_file():
        _loaded.cache_clear()
        path, made = _loaded(data, folder, stamps)
    return Samples(path).seal(made.test), made


def deal(data: Data) -> Dealt:
    """Return the rows of each split, in order of name, only as many as `downsample` wants.

    Raises:
        DataError: see `reader.find`; or if train.csv has too few rows to hold some out.
    """
    trained, held = _hold_out(find(data, "train"), data)
    given = find(data, "val")
    validation, test = (held, given) if data.test == "val_csv" else (given, held)
    dealt = {"train": trained, "validation": validation, "test": test}
    if data.downsample:
        sizes = dict.fromkeys(splits.NAMES, max(1, data.downsample // 10)) | {"train": data.downsample}
        dealt = {name: in_proportion(sources, data.split_seed)[: sizes[name]] for name, sources in dealt.items()}
    return {name: sorted(sources, key=lambda source: source.name) for name, sources in dealt.items()}


def in_proportion(sources: Sequence[Source], seed: int) -> list[Source]:
    """Return the rows in an order of which every beginning has the satellites in proportion.

    Among the first n, each satellite has about n times its share of all, rounded. The order depends on seed and names
    alone, and a longer beginning holds the shorter ones. Rounding is Webster's, as of seats in a parliament.
    """
    of_satellite: dict[str, list[tuple[bytes, Source]]] = defaultdict(list)
    for source in sources:
        lot = hashlib.sha256(f"{seed}/{source.name}".encode()).digest()
        of_satellite[source.satellite].append((lot, source))
    placed = []
    for drawn in of_satellite.values():
        drawn.sort(key=lambda pair: pair[0])
        placed += [((rank + 0.5) / len(drawn), lot, source) for rank, (lot, source) in enumerate(drawn)]
    return [source for _, _, source in sorted(placed, key=lambda entry: entry[:2])]


def find(data: Data, part: Part) -> list[Source]:
    """Return the rows of one CSV file; synthetic pictures are made first where no folder is given."""
    base = root(data)
    image_root = Path(data.image_root).expanduser() if data.image_root else base / "images"
    mask_root = Path(data.mask_root).expanduser() if data.mask_root else base / "mask"
    return reader.find(part, table_path(data, part), image_root, mask_root)


def table_path(data: Data, part: Part) -> Path:
    """Return the path of a CSV file; synthetic pictures are made first where no folder is given."""
    given = {"train": data.train_csv, "val": data.val_csv}[part]
    return Path(given).expanduser() if given else root(data) / f"{part}.csv"


def root(data: Data) -> Path:
    """Return the data folder: the given one, or that of the synthetic pictures.

    Raises:
        DataError: if the given one is not there.
    """
    if not data.root:
        return generator.ensure(data.synthetic, cache.cache_folder(data.cache))
    given = Path(data.root).expanduser()
    if not given.is_dir():
        raise DataError(f"{given}: no such folder; data.root should hold train.csv, val.csv, images/ and mask/")
    return given


def decode(data: Data, sources: Sequence[Source]) -> Iterator[Sample]:
    """Yield the samples in order, some at a time read by as many threads as there are CPUs."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(sources), 4 * threads):
            yield from pool.map(lambda source: sample(data, source), sources[start : start + 4 * threads])


def sample(data: Data, source: Source) -> Sample:
    """Return one picture and its mask as squares of the target size.

    Raises:
        DataError: naming the file that cannot be used, or both where their sizes differ.
    """
    picture = read_rgb(source.image)
    mask = reader.read_mask(source.mask, data.target_size, order=data.mask_resize, max_stray=data.max_stray)
    _refuse_other_size(source, picture)
    square = reader.resize(picture, data.target_size, smooth=True)
    note = {
        "satellite": source.satellite,
        "part": source.part,
        "size": json.dumps(picture.shape[:2]),
        "pixels": json.dumps(np.bincount(mask.ravel(), minlength=len(CLASSES)).tolist()),
    }
    return Sample(source.name, source.name, np.ascontiguousarray(square.transpose(2, 0, 1)), mask, note)


def satellites(samples: Samples, indices: Sequence[int]) -> list[str]:
    """Return whose picture each sample is."""
    return [samples.extra(index)["satellite"] for index in indices]


def manifest(data: Data) -> dict[str, Any]:
    """Return what the data is, for a person to check before believing a score; no test picture is opened."""
    dealt = deal(data)
    samples, made = _load(data, dealt)
    notes = [samples.extra(index) for index in range(len(samples))]
    pixels = np.array([json.loads(note["pixels"]) for note in notes])  # (N, 3)
    sizes = np.array([json.loads(note["size"]) for note in notes])
    of_split = {name: pixels[list(made[name])].sum(axis=0) for name in splits.NAMES}
    known = sorted({note["satellite"] for note in notes})
    counts = {name: Counter(source.satellite for source in sources) for name, sources in dealt.items()}
    return {
        "sha256": cache.content_hash(_files(_all(dealt)), folder=cache.cache_folder(data.cache)),
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len(made[name]) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "test": data.test,
        "size_range": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()],
        "sample_shape": list(samples.shape(0)),
        "class_shares": {
            name: dict(zip(CLASSES, (found / found.sum()).tolist(), strict=True)) for name, found in of_split.items()
        },
        "satellites": {name: {label: counts[name][label] for label in known} for name in splits.NAMES},
        "synthetic": not data.root,
        "warnings": [
            *_synthetic_warning(data),
            *_few_warning(data, len(made.train)),
            *_warnings(of_split, counts, known, pixels),
        ],
    }


def warn_if_synthetic(data: Data) -> None:
    """Say loudly that scores mean nothing for real data."""
    for warning in _synthetic_warning(data):
        logger.warning("%s", warning)


@functools.lru_cache(maxsize=8)
def _loaded(data: Data, folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> tuple[Path, Splits]:
    """Return paths, not samples: those of one image size stay in memory, whatever sizes trials take turns with."""
    samples, made = load(data)
    return samples.path, made


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file does; None where there is none, which loading will tell."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _load(data: Data, dealt: Dealt) -> tuple[Samples, Splits]:
    sources = _all(dealt)
    samples = cache.cached(_key(sources, data), lambda: decode(data, sources), folder=cache.cache_folder(data.cache))
    number = {name: index for index, name in enumerate(samples.names)}
    members = {name: tuple(number[source.name] for source in dealt[name]) for name in splits.NAMES}
    made = Splits(**members, seed=data.split_seed, key="image", names=samples.names, groups=samples.groups)
    splits.check(made)
    return samples.seal(made.test), made


def _all(dealt: Dealt) -> list[Source]:
    """Return the rows of all splits in an order that does not depend on who has which."""
    return sorted((source for sources in dealt.values() for source in sources), key=lambda source: source.name)


def _hold_out(sources: Sequence[Source], data: Data) -> tuple[list[Source], list[Source]]:
    """Return who is trained on and who is not: of each satellite the part asked for, as near as whole samples allow."""
    count = max(1, round(data.held_out * len(sources)))
    if count >= len(sources):
        raise DataError(f"train.csv: {len(sources)} rows; expected at least 2, to train on one and hold one out")
    ordered = in_proportion(sources, data.split_seed)
    return ordered[count:], ordered[:count]


def _refuse_other_size(source: Source, picture: np.ndarray[Any, Any]) -> None:
    height, width = image_size(source.mask)
    if picture.shape[:2] != (height, width):
        here = f"is {size_text(picture[..., 0])}, its mask {source.mask} is {width}x{height}"
        raise DataError(f"{source.image}: {here}; they must have one size")


def _files(sources: Sequence[Source]) -> list[Path]:
    return [path for source in sources for path in (source.image, source.mask)]


def _key(sources: Sequence[Source], data: Data) -> str:
    """Return a name for what decoding gives; the splits are no part of it, unless they decide who is decoded."""
    settings = [VERSION, data.target_size, data.mask_resize, data.max_stray, [source.name for source in sources]]
    contents = cache.content_hash(_files(sources), extra=json.dumps(settings), folder=cache.cache_folder(data.cache))
    return f"spark-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


def _synthetic_warning(data: Data) -> Iterator[str]:
    if not data.root:
        made = f"{data.synthetic.samples} generated pictures in {root(data)} are used"
        remedy = "set data.root to a folder with train.csv, val.csv, images/ and mask/"
        yield f"SYNTHETIC DATA: data.root is not given, so {made}; scores say nothing about SPARK; {remedy}"


def _few_warning(data: Data, count: int) -> Iterator[str]:
    if count < data.downsample:
        yield f"data.downsample wants {data.downsample} samples to train on, and there are {count}"


def _warnings(
    of_split: dict[str, Any], counts: dict[str, Counter[str]], known: Sequence[str], pixels: np.ndarray[Any, Any]
) -> Iterator[str]:
    for name, found in of_split.items():
        if lacking := [label for label, count in zip(CLASSES, found, strict=True) if count == 0]:
            yield f"split {name} has no pixel of {', '.join(lacking)}; try another data.split_seed"
    for name, counted in counts.items():
        if absent := [label for label in known if not counted[label]]:
            yield f"split {name} has no picture of {', '.join(absent)}; their scores will be missing, or unlearned"
    if empty := int((pixels[:, 1:].sum(axis=1) == 0).sum()):
        yield f"{empty} masks show background only; look at some of them: SPARK's pictures all show a spacecraft"
