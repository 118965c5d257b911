"""Folders of images and masks, or archives of both, to cached tiles, splits and a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmentation import images, splits, tiling
from segmentation.cache import cache_folder, cached, content_hash
from segmentation.epoch import DataError
from segmentation.samples import Sample, Samples, size_text
from segmentation.splits import Splits
from segmentation.tiling import Window
from workloads._listing import listed
from workloads._pairs import archives

Array = np.ndarray[Any, Any]
Pair = tuple[str, Path, Path]

SUFFIXES = (*images.SUFFIXES, archives.SUFFIX)
EMBEDDED = Path(__file__).parent.parent / "data" / "nuclei"
EMBEDDED_CLASSES = ("background", "interior", "boundary")
# Part of the cache's key: raise it where the same files and settings are to be decoded otherwise.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where images and masks lie, what the masks mean, and how they are cut and split."""

    root: str = ""
    """Folder of the data; empty: the nuclei that come with this package."""
    images: str = "images"
    """Folder of the images, below root."""
    masks: str = "masks"
    """Folder of the masks, below root; each has its image's name, whatever the suffix."""
    mask_suffix: str = ""
    """Text that follows the image's name in the name of its mask, such as _mask."""
    npz_keys: tuple[str, ...] = ()
    """Arrays of image and mask in archives root/*.npz that hold both, such as [img, msk]; empty: two folders, where an
    .npz file holds one array."""
    npz_channels: archives.Layout = "auto"
    """Which axis of an image in an .npz file is its channels; auto: the smaller of the first and the last."""
    classes: int = 3
    """Classes, background included."""
    class_names: tuple[str, ...] = ()
    """Name of each class; empty: made up."""
    value_map: tuple[int, ...] = ()
    """Mask value of each class, in order, such as [0, 255]; empty: 0, 1, 2, ..."""
    ignore_index: int = 255
    """Mask value of pixels that count for nothing, unless it is the value of a class."""
    tile: int = 64
    """Height and width of a tile, in pixels; 0: whole images."""
    stride: int = 0
    """Distance between tiles, in pixels; 0: as far as a tile is wide."""
    channels: Literal[0, 1, 3] = 0
    """Channels of every image: 1 makes greys of colours, 3 repeats greys; 0: as stored."""
    rgb: tuple[int, ...] = ()
    """Bands drawn as red, green and blue, counted from 0, such as [2, 1, 0], each stretched between percentiles; empty:
    the first three."""
    min_size: int = 8
    """Smallest height and width that an image may have, in pixels."""
    group: Literal["image", "region", "prefix"] = "image"
    """What stays in one split: an image, a region of an image, or all images whose names begin alike. With fewer than
    three images, regions stand for images."""
    prefix_end: str = "_"
    """prefix: what ends the common beginning of the names, at its first place."""
    region: int = 0
    """region: height and width of a region, in pixels; 0: one tile, or two where tiles overlap."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Parts of the samples for training, validation and test."""
    split_seed: int = 0
    """Another number, other splits."""
    cache: str = ""
    """Folder for decoded samples; empty: $SEGMENTATION_CACHE, or ~/.cache/segmentation-search."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        _check_classes(self)
        _check_cutting(self)
        _check_arrays(self)


def load(data: Data) -> tuple[Samples, Splits]:
    """Return the tiles and who has which; test tiles are sealed until evaluation opens them."""
    pairs = find_pairs(data)
    samples = cached(_key(data, pairs), lambda: decode(data, pairs), folder=cache_folder(data.cache))
    check_rgb(data, samples.shape(0)[0])
    key = "region" if _by_region(data, len(pairs)) else data.group
    made = splits.split(samples.names, samples.groups, fractions=data.fractions, seed=data.split_seed, key=key)
    return samples.seal(made.test), made


def class_names(data: Data) -> tuple[str, ...]:
    """Return the name of each class."""
    if data.class_names:
        return data.class_names
    if not data.root and data.classes == len(EMBEDDED_CLASSES):
        return EMBEDDED_CLASSES
    return tuple(f"class{index}" for index in range(data.classes))


def check_rgb(data: Data, channels: int) -> None:
    """Raise DataError if a band is to be drawn that images of so many channels lack."""
    if data.rgb and max(data.rgb) >= channels:
        raise DataError(f"data.rgb: got {list(data.rgb)}; images have {channels} channels, counted from 0")


def find_pairs(data: Data) -> list[Pair]:
    """Return name, image and mask of each pair, in order of name.

    An archive of both is named twice.

    Raises:
        DataError: for a missing or empty folder, two files of one name, and whatever lacks its other half.
    """
    root = Path(data.root).expanduser() if data.root else EMBEDDED
    if not root.is_dir():
        held = "archives *.npz" if data.npz_keys else f"{data.images}/ and {data.masks}/"
        raise DataError(f"{root}: no such folder; data.root should hold {held}")
    if data.npz_keys:
        found = images.list_images(root, (archives.SUFFIX,))
        return [(path.relative_to(root).with_suffix("").as_posix(), path, path) for path in found]
    if not (root / data.images).is_dir() and (found := sorted(root.glob(f"*{archives.SUFFIX}"))):
        named = f"name those of image and mask in data.npz_keys, such as [{archives.names(found[0])}]"
        raise DataError(f"{root}: holds archives of arrays, such as {found[0].name}; {named}")
    pictures = _by_name(root / data.images, "", data)
    masks = _by_name(root / data.masks, data.mask_suffix, data)
    lonely = {"image without mask": pictures.keys() - masks, "mask without image": masks.keys() - pictures}
    problems = [f"{len(names)} {what}: {listed(sorted(names))}" for what, names in lonely.items() if names]
    if problems:
        raise DataError(f"{root}: {'; '.join(problems)}; an image and its mask have the same name")
    return [(name, pictures[name], masks[name]) for name in sorted(pictures)]


def decode(data: Data, pairs: Sequence[Pair]) -> Iterator[Sample]:
    """Yield the tiles of each pair, one pair in memory at a time."""
    by_region = _by_region(data, len(pairs))
    common = _common_size(data, pairs) if data.tile == 0 else (0, 0)
    first: tuple[Path, Array] | None = None
    for name, image_path, mask_path in pairs:
        image, mask = _read_pair(data, image_path, mask_path)
        first = first or (image_path, image[:, :1, :1].copy())
        _refuse_other_kind(image_path, image, *first)
        yield from _cut(data, name, image, mask, common, by_region)


def to_classes(mask: Array, data: Data, path: Path) -> Array:
    """Return (H, W) uint8 class ids of stored mask values; `ignore_index` stays.

    Raises:
        DataError: naming the file and the values that belong to no class.
    """
    values = data.value_map or tuple(range(data.classes))
    found = np.unique(mask)
    if stray := sorted(set(found.tolist()) - {*values, data.ignore_index}):
        allowed = ", ".join(map(str, values))
        remedy = f"expected {allowed}, or {data.ignore_index} to ignore; list each class's value in data.value_map"
        raise DataError(f"{path}: values {listed(sorted(stray))} are outside the {data.classes} classes; {remedy}")
    classes = np.full(mask.shape, data.ignore_index, np.uint8)
    for index, value in enumerate(values):
        classes[mask == value] = index
    return classes


def manifest(data: Data, samples: Samples, made: Splits) -> dict[str, Any]:
    """Return what the data is, from notes made while decoding: no test sample is opened.

    Raises:
        DataError: if fewer than two classes occur.
    """
    notes = [samples.extra(index) for index in range(len(samples))]
    counts = class_pixels(samples, range(len(samples)))
    sizes = np.array([json.loads(note["size"]) for note in notes])
    _refuse_single_class(data, counts)
    per_split = {name: counts[list(made[name])].sum(axis=0) for name in splits.NAMES}
    names = class_names(data)
    return {
        "sha256": content_hash(_files(find_pairs(data)), folder=cache_folder(data.cache)),
        "samples": {name: len(made[name]) for name in splits.NAMES},
        "groups": {name: len({made.groups[index] for index in made[name]}) for name in splits.NAMES},
        "group_key": made.key,
        "split_seed": made.seed,
        "images": len({note["image"] for note in notes}),
        "size_range": [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()],
        "sample_shape": list(samples.shape(0)),
        "class_shares": {
            name: dict(zip(names, (pixels / max(pixels.sum(), 1)).tolist(), strict=True))
            for name, pixels in per_split.items()
        },
        "synthetic": False,
        "warnings": list(_warnings(data, made, per_split)),
    }


def class_pixels(samples: Samples, indices: Iterable[int]) -> Array:
    """Return how many pixels each class has in some samples, (N, K), from the notes made while decoding."""
    return np.array([json.loads(samples.extra(index)["pixels"]) for index in indices])


def _check_classes(data: Data) -> None:
    if not 2 <= data.classes <= 255:
        raise ValueError(f"classes: got {data.classes}; expected 2 to 255, background included")
    if not 0 <= data.ignore_index <= 255 or data.ignore_index < data.classes:
        raise ValueError(f"ignore_index: got {data.ignore_index}; expected {data.classes} to 255, which no class has")
    for name, given in (("class_names", data.class_names), ("value_map", data.value_map)):
        if given and (len(given) != data.classes or len(set(given)) != len(given)):
            raise ValueError(f"{name}: got {list(given)}; expected {data.classes} different ones, one for each class")


def _check_cutting(data: Data) -> None:
    for name in ("tile", "stride", "region", "min_size"):
        if getattr(data, name) < 0:
            raise ValueError(f"{name}: got {getattr(data, name)}; expected 0 or more pixels")
    if data.stride > data.tile:
        raise ValueError(f"stride: got {data.stride}; expected at most the tile of {data.tile}, or pixels are left out")
    if data.tile == 0 and data.group == "region":
        raise ValueError("group: got region with tile 0; whole images cannot be split by region")
    if 0 < data.region < data.tile:
        raise ValueError(f"region: got {data.region}; expected at least the tile of {data.tile}")
    if min(data.fractions) <= 0 or abs(sum(data.fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: got {list(data.fractions)}; expected three positive numbers that sum to 1")


def _check_arrays(data: Data) -> None:
    if data.npz_keys and (len(data.npz_keys) != 2 or len({*data.npz_keys, ""}) != 3):
        raise ValueError(f"npz_keys: got {list(data.npz_keys)}; expected two names, of image and mask")
    if data.rgb and (len(data.rgb) != 3 or min(data.rgb) < 0):
        raise ValueError(f"rgb: got {list(data.rgb)}; expected three bands, counted from 0, for red, green and blue")


def _by_region(data: Data, count: int) -> bool:
    return data.group == "region" or (data.group == "image" and count < len(splits.NAMES) and data.tile > 0)


def _by_name(folder: Path, suffix: str, data: Data) -> dict[str, Path]:
    """Return the pictures of a folder by their names without suffixes, folders below it included."""
    found: dict[str, Path] = {}
    for path in images.list_images(folder, SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        # One folder may hold both; then the suffix alone tells them apart.
        if not name.endswith(suffix) or (data.images == data.masks and name.endswith(data.mask_suffix) != bool(suffix)):
            continue
        name = name.removesuffix(suffix)
        if name in found:
            raise DataError(f"{folder}: {found[name].name} and {path.name} have one name; keep one of them")
        found[name] = path
    return found


def _files(pairs: Iterable[Pair]) -> list[Path]:
    return list(dict.fromkeys(path for _, *both in pairs for path in both))


def _key(data: Data, pairs: Sequence[Pair]) -> str:
    """Return a name for what decoding gives: it depends on the files and on how they are read, not on the splits."""
    settings = asdict(data)
    for name in ("root", "images", "masks", "class_names", "fractions", "split_seed", "cache", "rgb"):
        del settings[name]
    extra = json.dumps([VERSION, settings], sort_keys=True)
    contents = content_hash(_files(pairs), extra=extra, folder=cache_folder(data.cache))
    return f"pairs-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"


def _common_size(data: Data, pairs: Sequence[Pair]) -> tuple[int, int]:
    sizes = [
        _read_image(data, path).shape if path.suffix.lower() == archives.SUFFIX else images.image_size(path)
        for _, path, _ in pairs
    ]
    return max(height for height, *_ in sizes), max(width for _, width, *_ in sizes)


def _read_pair(data: Data, image_path: Path, mask_path: Path) -> tuple[Array, Array]:
    """Return image (C, H, W) and mask (H, W) of class ids."""
    image = with_channels(images.channels_first(_read_image(data, image_path)), data.channels, image_path)
    mask = _read_mask(data, mask_path)
    if image.shape[1:] != mask.shape:
        sizes = f"{image_path.name} is {size_text(image)}, its mask {mask_path} is {size_text(mask)}"
        remedy = "; data.npz_channels says where channels are" if image_path.suffix.lower() == archives.SUFFIX else ""
        raise DataError(f"{image_path.parent}: {sizes}; they must have one size{remedy}")
    if min(mask.shape) < max(data.min_size, 1):
        raise DataError(f"{image_path}: is {size_text(image)}; data.min_size wants at least {data.min_size} pixels")
    return image, to_classes(mask, data, mask_path)


def _read_image(data: Data, path: Path) -> Array:
    """Return (H, W) or (H, W, C)."""
    if path.suffix.lower() == archives.SUFFIX:
        return archives.read_image(path, data.npz_keys[0] if data.npz_keys else "", data.npz_channels)
    return images.read_image(path)


def _read_mask(data: Data, path: Path) -> Array:
    if path.suffix.lower() == archives.SUFFIX:
        return archives.read_mask(path, data.npz_keys[1] if data.npz_keys else "")
    return images.read_mask(path)


def read_channels(data: Data, path: Path, channels: int) -> Array:
    """Return an image (C, H, W) with just as many channels as a network was made for.

    Raises:
        DataError: naming the file, if it cannot be read or made so.
    """
    return np.ascontiguousarray(with_channels(images.channels_first(_read_image(data, path)), channels, path))


def with_channels(image: Array, channels: int, path: Path) -> Array:
    """Return the image with as many channels as are wanted; alpha is left out where it is not."""
    colours = image[: len(image) - 1] if len(image) in (2, 4) else image
    if channels in (0, len(image)):
        return image
    if channels == 1 and len(colours) == 3:
        grey = np.tensordot(np.array([0.299, 0.587, 0.114]), colours, axes=1)[None]
        return (np.rint(grey) if image.dtype.kind == "u" else grey).astype(image.dtype)
    if len(colours) in (1, channels):
        return np.repeat(colours, channels // len(colours), axis=0)
    raise DataError(f"{path}: has {len(image)} channels; data.channels wants {channels}, set it to 0 to keep them")


def _refuse_other_kind(path: Path, image: Array, first_path: Path, first: Array) -> None:
    if len(image) != len(first):
        came = f"{path} has {len(image)} channels, {first_path.name} has {len(first)}"
        raise DataError(f"{came}; set data.channels to 1 or 3")
    if image.dtype != first.dtype:
        came = f"{path} holds {image.dtype}, {first_path.name} holds {first.dtype}"
        raise DataError(f"{came}; write them as one type")


def _cut(
    data: Data, name: str, image: Array, mask: Array, common: tuple[int, int], by_region: bool
) -> Iterator[Sample]:
    """Yield the tiles of one image, or the whole of it padded to the common size."""
    height, width = mask.shape
    group = name.split(data.prefix_end, 1)[0] if data.group == "prefix" and data.prefix_end else name
    if data.tile == 0:
        yield _sample(data, name, group, image, mask, Window(0, 0, *common), name)
        return
    size = _region_size(data) if by_region else max(height, width)
    for area in tiling.regions(height, width, size):
        home = f"{name}@{area.top},{area.left}" if by_region else group
        for window in tiling.tiles(area, data.tile, data.stride or data.tile):
            yield _sample(data, f"{name}@{window.top},{window.left}", home, image, mask, window, name)


def _region_size(data: Data) -> int:
    """Return a tile's size, for most groups; twice that where tiles overlap, which they do within a region only."""
    return data.region or data.tile * (2 if 0 < data.stride < data.tile else 1)


def _sample(data: Data, name: str, group: str, image: Array, mask: Array, window: Window, source: str) -> Sample:
    picture, classes = tiling.cut(image, mask, window, data.ignore_index)
    pixels = np.bincount(classes.ravel(), minlength=256)[: data.classes]
    note = {
        "image": source,
        "top": str(window.top),
        "left": str(window.left),
        "size": json.dumps(mask.shape),
        "pixels": json.dumps(pixels.tolist()),
    }
    return Sample(name, group, picture, classes, note)


def _refuse_single_class(data: Data, counts: Array) -> None:
    """A mask of 0 and 255 read without a value map would train on one class, perfectly and in vain."""
    present = counts.sum(axis=0) > 0
    if present.sum() < 2:
        only = class_names(data)[int(present.argmax())] if present.any() else "none"
        ignored = f"if {data.ignore_index} is a class, say so in data.value_map, such as [0, {data.ignore_index}]"
        raise DataError(f"{data.root}: one class occurs in all masks ({only}); nothing to learn; {ignored}")


def _warnings(data: Data, made: Splits, per_split: dict[str, Array]) -> Iterator[str]:
    """Yield what a person should know before believing a score."""
    if made.key == "region" and data.group != "region":
        yield "fewer than three images: split by region, so that scores say little about other images"
    for name, pixels in per_split.items():
        if missing := [label for label, count in zip(class_names(data), pixels, strict=True) if count == 0]:
            remedy = "try another data.split_seed or data.fractions"
            yield f"split {name} has no pixel of {listed(sorted(missing))}; {remedy}"
