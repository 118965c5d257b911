"""Masks of steel defects as text, in both codings, both ways.

Supervisely   a JSON file for each image; each object is base64(zlib(PNG)), and [x, y] of its top left corner
Kaggle        run lengths "start length start length": pixels counted from 1, down the columns, one column after another
"""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segmentation import images, limits
from segmentation.epoch import DataError

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""(H, W)"""

TITLES = ("defect_1", "defect_2", "defect_3", "defect_4")
"""The classes, as Supervisely's objects name them; Kaggle numbers them from 1."""
BLACK_AND_WHITE = [0, 0, 0, 255, 255, 255]
AGAIN = "export it again, or remove the object"
PIECE = 2**22
# More digits than any image has pixels are not worth a number.
_WHOLE = re.compile(r"[+-]?[0-9]{1,15}")


def read_annotation(path: Path, size: Size, titles: Sequence[str] = TITLES) -> Mask:
    """Return (K, H, W) of 0 and 1 from a Supervisely file: objects of a class are joined, and clipped to the image.

    size: (H, W) of the image, which the file must agree with.

    Raises:
        DataError: naming the file, and the object where it is one, for whatever is missing, broken, of another kind,
            or marks no pixel: never is an object left out.
    """
    content = _content(path)
    _refuse_other_size(path, content, size)
    mask = np.zeros((len(titles), *size), np.uint8)
    for index, item in enumerate(_objects(path, content)):
        where = _where(path, index, item)
        _draw(where, path, item, mask[_class_of(where, item, titles)])
    return mask


def classes_in(path: Path, titles: Sequence[str] = TITLES) -> frozenset[int]:
    """Return the numbers, from 0, of the classes whose objects a Supervisely file holds; no bitmap is decoded."""
    content = _content(path)
    return frozenset(
        _class_of(_where(path, index, item), item, titles) for index, item in enumerate(_objects(path, content))
    )


def annotation(mask: Array, titles: Sequence[str] = TITLES) -> dict[str, Any]:
    """Return what a Supervisely file says of a mask (K, H, W): an object for each class that has a pixel."""
    objects = [
        {
            "id": number + 1,
            "classId": number + 1,
            "classTitle": title,
            "description": "",
            "geometryType": "bitmap",
            "labelerLogin": "",
            "tags": [],
            "bitmap": encode_bitmap(channel),
        }
        for number, (title, channel) in enumerate(zip(titles, mask, strict=True))
        if channel.any()
    ]
    height, width = mask.shape[1:]
    return {"description": "", "tags": [], "size": {"height": height, "width": width}, "objects": objects}


def encode_bitmap(mask: Array) -> dict[str, Any]:
    """Return `data` and `origin` of a mask (H, W) with a pixel or more, cut to what is marked.

    The PNG has a palette of which entry 0 is transparent: readers that take the alpha channel, as Supervisely's own do,
    and those that take the first colour get the same.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    marked = (mask[top : rows[-1] + 1, left : columns[-1] + 1] > 0).astype(np.uint8)
    picture = Image.fromarray(marked)
    picture.putpalette(BLACK_AND_WHITE)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", transparency=0)
    return {"data": base64.b64encode(zlib.compress(stream.getvalue())).decode(), "origin": [left, top]}


def decode_runs(text: str, size: Size, where: str) -> Mask:
    """Return (H, W) of 0 and 1 from Kaggle's run lengths; no runs, no pixels. Runs may stand in any order.

    where: what an error begins with: the file, its line, the image.

    Raises:
        DataError: for what is no whole number, a start without a length, a run of no pixel, that begins before the
            first or ends beyond the last one, or overlaps another.
    """
    height, width = size
    starts, lengths = _pairs(text, where)
    ends = starts + lengths - 1
    if (out := np.flatnonzero((starts < 1) | (lengths < 1))).size:
        counted = "pixels and lengths are counted from 1: add 1 if yours begin at 0"
        raise DataError(f"{where}: got run {_run(starts, lengths, out[0])}; {counted}")
    if (out := np.flatnonzero(ends > height * width)).size:
        beyond = f"run {_run(starts, lengths, out[0])} ends at pixel {ends[out[0]]}"
        image = f"the image is {width}x{height}, {height * width} pixels"
        raise DataError(f"{where}: {beyond}; {image}: take the image that the runs were made for, or remove the row")
    order = np.argsort(starts)
    if (over := np.flatnonzero(ends[order][:-1] >= starts[order][1:])).size:
        first, second = (_run(starts, lengths, order[place]) for place in (over[0], over[0] + 1))
        raise DataError(f"{where}: runs {first} and {second} overlap; expected each pixel once: join them into one run")
    steps = np.zeros(height * width + 1, np.int8)
    # A run may begin where another ends.
    np.add.at(steps, starts - 1, 1)
    np.subtract.at(steps, ends, 1)
    marked = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
    return np.ascontiguousarray(marked.reshape(width, height).T)


def encode_runs(mask: Array) -> str:
    """Return Kaggle's run lengths of a mask (H, W), in order; empty where nothing is marked."""
    marked = np.concatenate([[False], (mask > 0).ravel(order="F"), [False]])
    changes = np.flatnonzero(marked[1:] != marked[:-1])
    starts, ends = changes[::2], changes[1::2]
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))


def _pairs(text: str, where: str) -> tuple[Array, Array]:
    parts = text.split()
    if odd := [part for part in parts if not _WHOLE.fullmatch(part)]:
        raise DataError(f"{where}: got {_short(odd[0])}; expected whole numbers: start length start length")
    if len(parts) % 2:
        came = f"got {len(parts)} numbers, an odd count, the last {parts[-1]}"
        raise DataError(f"{where}: {came}; expected a length for each start: the row may be cut short, take it anew")
    numbers = np.array([int(part) for part in parts], np.int64)
    return numbers[::2], numbers[1::2]


def _run(starts: Array, lengths: Array, place: int) -> str:
    return f"'{starts[place]} {lengths[place]}'"


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); export it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {_short(content)}; expected an object with size and objects: export it again")
    return content


def _refuse_other_size(path: Path, content: dict[str, Any], size: Size) -> None:
    told = _value(str(path), content, "size", dict, "export it again")
    height, width = (_value(f"{path}: size", told, key, int, "export it again") for key in ("height", "width"))
    if (height, width) != size:
        came = f"size is {width}x{height}, its image is {size[1]}x{size[0]}"
        raise DataError(f"{path}: {came}; they must be the same: take the image that was marked, or export it again")


def _objects(path: Path, content: dict[str, Any]) -> list[Any]:
    found: list[Any] = _value(str(path), content, "objects", list, "export it again")
    return found


def _where(path: Path, index: int, item: Any) -> str:
    """Return what an error about an object begins with; Supervisely shows ids, the file has places, from 0."""
    if not isinstance(item, dict):
        raise DataError(f"{path}: objects[{index}] is {_short(item)}; expected an object: {AGAIN}")
    return f"{path}: objects[{index}]" + (f" (id {_short(item['id'])})" if "id" in item else "")


def _class_of(where: str, item: dict[str, Any], titles: Sequence[str]) -> int:
    """Return the number of an object's class, from 0."""
    kind = _value(where, item, "geometryType", str)
    if kind != "bitmap":
        raise DataError(f"{where}: geometryType is {_short(kind)}; expected 'bitmap': convert it, or remove the object")
    title = _value(where, item, "classTitle", str)
    if title not in titles:
        known = ", ".join(titles)
        raise DataError(f"{where}: classTitle is {_short(title)}; expected one of {known}: declare it, or rename it")
    return list(titles).index(title)


def _draw(where: str, path: Path, item: dict[str, Any], channel: Mask) -> None:
    """Set an object's pixels, as far as they lie in the image, in a channel (H, W)."""
    bitmap = _value(where, item, "bitmap", dict)
    data, origin = _value(where, bitmap, "data", str), _value(where, bitmap, "origin", list)
    if len(origin) != 2 or any(type(step) is not int for step in origin):
        raise DataError(f"{where}: origin is {_short(origin)}; expected [x, y], whole numbers of pixels: {AGAIN}")
    left, top = origin
    marked = _bitmap(where, path, data, (-left, -top, channel.shape[1] - left, channel.shape[0] - top))
    if not marked.any():
        came = f"marks no pixel of the image, which is {channel.shape[1]}x{channel.shape[0]}; origin is {origin}"
        raise DataError(f"{where}: {came}: {AGAIN}")
    top, left = max(top, 0), max(left, 0)
    channel[top : top + marked.shape[0], left : left + marked.shape[1]] |= marked


def _bitmap(where: str, path: Path, data: str, window: tuple[int, int, int, int]) -> npt.NDArray[np.bool_]:
    """Return which pixels an object marks of those in a window (left, top, right, bottom) of its own plane."""
    png = _inflated(where, path, data)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, of which `limits` decides.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
                each = images.PIXEL_BYTES.get(picture.mode, images.MOST_PIXEL_BYTES)
                _refuse_bomb(where, path, picture.width * picture.height * each)
                left, top, right, bottom = window
                seen = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
                picture.load()
                if seen[0] >= seen[2] or seen[1] >= seen[3]:
                    return np.zeros((0, 0), np.bool_)
                return _marked(where, picture.crop(seen))
    except DataError:
        raise
    except (*images.BROKEN, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: data holds no PNG that can be read ({_problem(error)}); {AGAIN}") from error


def _marked(where: str, picture: Image.Image) -> npt.NDArray[np.bool_]:
    """Return where a picture is not wholly transparent, or not zero where it knows no transparency."""
    if picture.has_transparency_data:
        return np.asarray(picture.convert("RGBA").getchannel("A")) > 0
    if len(picture.getbands()) > 1:
        came = f"data is a PNG of mode {picture.mode}, colours without transparency"
        raise DataError(f"{where}: {came}; expected alpha, a palette, grey or 1 bit: {AGAIN}")
    return np.asarray(picture) > 0


def _inflated(where: str, path: Path, data: str) -> bytes:
    try:
        packed = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise DataError(f"{where}: data is no base64 ({_problem(error)}); {AGAIN}") from error
    unpacker, pieces, size, left = zlib.decompressobj(), [], 0, packed
    try:
        while not unpacker.eof:  # in pieces: a bomb is given up on the way
            pieces.append(unpacker.decompress(left, PIECE))
            left, size = unpacker.unconsumed_tail, size + len(pieces[-1])
            _refuse_bomb(where, path, size)
            if not (pieces[-1] or left):
                raise DataError(f"{where}: data ends too early, after {len(packed)} bytes; {AGAIN}")
    except (zlib.error, MemoryError) as error:
        raise DataError(f"{where}: data cannot be inflated ({_problem(error)}); {AGAIN}") from error
    return b"".join(pieces)


def _refuse_bomb(where: str, path: Path, size: int) -> None:
    if size > limits.allowed(path):
        swollen = f"data would take {-(-size // limits.MIB):,} MiB or more to read"
        raise DataError(f"{where}: {swollen}; {AGAIN}, or raise {limits.VARIABLE} if you know that it is no bomb")


def _value(where: str, holder: dict[str, Any], key: str, kind: type, remedy: str = AGAIN) -> Any:
    """Return the value of a key, of exactly this type: True is no number here."""
    if key not in holder:
        raise DataError(f"{where}: has no {key}; {remedy}")
    if type(holder[key]) is not kind:
        raise DataError(f"{where}: {key} is {_short(holder[key])}; expected {_NAMES[kind]}: {remedy}")
    return holder[key]


_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _problem(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
