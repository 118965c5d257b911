"""Decoded samples: one at a time in memory, or thousands memory-mapped from an Arrow file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from segmentation.epoch import DataError
from segmentation.splits import TestSplitError, test_split_is_open

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_TYPES = ("uint8", "uint16", "float16", "float32")
BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Sample:
    """One image and its mask, decoded."""

    name: str
    """Unique among the samples of a set."""
    group: str
    """What must not be torn apart by a split: a patient, a scene, an image cut into tiles."""
    image: np.ndarray[Any, Any]
    """(C, H, W), uint8, uint16, float16 or float32, values as stored."""
    mask: np.ndarray[Any, Any]
    """(H, W) uint8 class ids, or (K, H, W) uint8 of 0 and 1 where several classes may share a pixel."""
    extra: dict[str, str] = field(default_factory=dict)
    """Whatever else a workload wants back: where a tile was cut, how many pixels each class has."""
    cell: int = 1
    """Pixels of the image along the side of one of the mask's, where the mask is coarser."""

    def __post_init__(self) -> None:
        """Refuse arrays that the cache could not give back as they are."""
        if self.image.dtype.name not in IMAGE_TYPES or self.image.ndim != 3:
            came = f"{self.image.dtype} {self.image.shape}"
            raise DataError(f"{self.name}: image is {came}; expected (C, H, W) of {', '.join(IMAGE_TYPES)}")
        if self.mask.dtype != np.uint8 or self.mask.ndim not in (2, 3):
            raise DataError(f"{self.name}: mask is {self.mask.dtype} {self.mask.shape}; expected (H, W) of uint8")
        if tuple(side * self.cell for side in self.mask.shape[-2:]) != self.image.shape[-2:]:
            raise DataError(f"{self.name}: image is {size_text(self.image)}, mask is {size_text(self.mask)}")


class Samples:
    """Samples of one Arrow file, mapped into memory: opening is quick, and pixels are read when they are asked for."""

    def __init__(self, path: Path, sealed: frozenset[int] = frozenset()) -> None:
        import pyarrow as pa

        self.path = path
        self.sealed = sealed
        with pa.memory_map(str(path)) as source:
            self._table = pa.ipc.open_file(source).read_all()
        self.names: tuple[str, ...] = tuple(self._table.column("name").to_pylist())
        self.groups: tuple[str, ...] = tuple(self._table.column("group").to_pylist())
        self._bytes = {name: _views(self._table.column(name)) for name in ("image", "mask")}
        self.memory: dict[Any, Any] = {}
        """What `loading` keeps of these samples as tensors, so that it goes when they go."""

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[type[Samples], tuple[Path, frozenset[int]]]:
        """Travel to another process as a path, which maps the same pages again."""
        return Samples, (self.path, self.sealed)

    def image(self, index: int) -> np.ndarray[Any, Any]:
        """Return (C, H, W) as a read-only view of the file.

        Raises:
            TestSplitError: if the sample is sealed and the test split is not open.
        """
        self.refuse_sealed(index)
        kind = self._table.column("image_type")[index].as_py()
        return self._array("image", index, np.dtype(kind))

    def mask(self, index: int) -> np.ndarray[Any, Any]:
        """Return (H, W) or (K, H, W) uint8 as a read-only view of the file; raises like `image`."""
        self.refuse_sealed(index)
        return self._array("mask", index, np.dtype(np.uint8))

    def extra(self, index: int) -> dict[str, str]:
        """Return what the workload noted when it decoded the sample."""
        noted: dict[str, str] = json.loads(self._table.column("extra")[index].as_py())
        return noted

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the (C, H, W) of an image without reading a pixel."""
        return tuple(self._table.column("image_shape")[index].as_py())

    def seal(self, indices: Iterable[int]) -> Samples:
        """Return the same samples with these kept shut outside `with test_split_open()`.

        The last ones asked for are kept: a process that trains one trial after another finds them in memory.
        """
        state = self.path.stat()
        return _sealed(self.path, frozenset(indices), state.st_ino, state.st_mtime_ns)

    def refuse_sealed(self, index: int) -> None:
        """Raise TestSplitError if the sample belongs to a test split that is not open."""
        if index in self.sealed and not test_split_is_open():
            raise TestSplitError(f"sample {self.names[index]!r} is in the test split, which only evaluation opens")

    def _array(self, column: str, index: int, kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
        shape = self._table.column(f"{column}_shape")[index].as_py()
        return self._bytes[column][index].view(kind).reshape(shape)


@functools.lru_cache(maxsize=1)
def _sealed(path: Path, indices: frozenset[int], inode: int, changed_ns: int) -> Samples:
    return Samples(path, indices)


def write(samples: Iterable[Sample], stream: IO[bytes]) -> int:
    """Write samples as an Arrow IPC file, some megabytes at a time; return how many there were.

    Raises:
        DataError: if two samples have one name.
    """
    import pyarrow as pa

    seen: set[str] = set()
    with pa.ipc.new_file(stream, _schema()) as writer:
        for batch in _record_batches(samples):
            names = [*seen, *batch.column("name").to_pylist()]
            if len(set(names)) < len(names):
                twice = sorted({b for a, b in pairwise(sorted(names)) if a == b})
                raise DataError(f"{len(twice)} sample names occur twice: {', '.join(twice[:5])}")
            seen.update(names)
            writer.write_batch(batch)
    return len(seen)


def size_text(array: np.ndarray[Any, Any]) -> str:
    """Return a size as people say it: width x height."""
    return f"{array.shape[-1]}x{array.shape[-2]}"


def _views(column: pa.ChunkedArray) -> list[np.ndarray[Any, Any]]:
    """Return the bytes of each row as a view of the mapped file; a row's own `as_buffer` would copy them."""
    views = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        whole = np.frombuffer(data, np.uint8)
        views += [whole[start:end] for start, end in pairwise(ends.tolist())]
    return views


def _schema() -> pa.Schema:
    import pyarrow as pa

    shape = pa.list_(pa.int32())
    columns = {"name": pa.string(), "group": pa.string(), "extra": pa.string(), "image_type": pa.string()}
    arrays = {"image_shape": shape, "image": pa.large_binary(), "mask_shape": shape, "mask": pa.large_binary()}
    return pa.schema(list({**columns, **arrays}.items()))


def _record_batches(samples: Iterable[Sample]) -> Iterator[pa.RecordBatch]:
    """Yield rows in groups; one type of pixel a group, so that every array starts at a multiple of its item size."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        row = _row(sample)
        if rows and (size >= BATCH_BYTES or row["image_type"] != rows[0]["image_type"]):
            yield pa.RecordBatch.from_pylist(rows, schema=_schema())
            rows, size = [], 0
        rows.append(row)
        size += sample.image.nbytes + sample.mask.nbytes
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=_schema())


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.name,
        "group": sample.group,
        "extra": json.dumps(sample.extra),
        "image_type": sample.image.dtype.name,
        "image_shape": list(sample.image.shape),
        "image": sample.image.tobytes(),
        "mask_shape": list(sample.mask.shape),
        "mask": sample.mask.tobytes(),
    }
