"""Decode once for each machine: samples in a memory-mapped Arrow file that any process may open."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import durable
from segmentation import samples as storage
from segmentation.epoch import DataError
from segmentation.samples import Sample, Samples

logger = logging.getLogger(__name__)

VARIABLE = "SEGMENTATION_CACHE"
# A file written this recently may change again without its time stamp showing it.
SETTLED_NS = 2_000_000_000


def cache_folder(given: str = "") -> Path:
    """Return where decoded samples lie: the folder given, $SEGMENTATION_CACHE, or one in the home's cache."""
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "segmentation-search")


def content_hash(files: Iterable[Path], *, extra: str = "", folder: Path | None = None) -> str:
    """Return the sha256 of names, relative to their common folder, and contents; order does not matter.

    Hashes of single files are kept in the cache folder by size and time of change, so that a second call is quick.
    `extra` is whatever else the result depends on, such as how images are cut.

    Raises:
        DataError: naming a file that cannot be read.
    """
    paths = sorted(path.absolute() for path in files)
    base = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    memo = (folder or cache_folder()) / "hashes" / f"{hashlib.sha256(str(base).encode()).hexdigest()[:16]}.json"
    known = _read_memo(memo)
    found = {str(path.relative_to(base)): _file_hash(path, known.get(str(path.relative_to(base)))) for path in paths}
    if any(known.get(name) != entry for name, entry in found.items()):
        _write_memo(memo, {**known, **found})
    total = hashlib.sha256(json.dumps(extra).encode())
    for name, entry in found.items():
        total.update(json.dumps([name, entry[0]]).encode())
    return total.hexdigest()


def cached(
    key: str, build: Callable[[], Iterable[Sample]], *, folder: Path | None = None, verify: bool = False
) -> Samples:
    """Return the samples of a key, decoded by `build` unless an intact file of that key is there already.

    One process builds; others that ask for the same key wait and use its file. A file that is damaged is built again.
    Samples are written as they come, so that no more than some megabytes of them are held in memory.
    The key becomes the file's name. Size and footer are always checked; `verify` compares the sha256 too, which reads
    the whole file.

    Raises:
        DataError: if the folder cannot be written, or whatever `build` refuses.
    """
    if not re.fullmatch(r"[\w.-]+", key):
        raise ValueError(f"key: got {key!r}; expected letters, digits, dots, dashes")
    folder = folder or cache_folder()
    path = folder / f"{key}.arrow"
    if _damage(path, verify) != "":
        with _locked(folder, key):
            damage = _damage(path, verify)
            if path.exists() and damage:
                logger.warning("cache: %s is damaged (%s); building it again", path, damage)
            if damage:
                _build(path, build)
    return Samples(path)


def local_copy(
    source: Path, key: str, names: Iterable[str], *, check: Callable[[Path], object], folder: Path | None = None
) -> Path:
    """Return a folder of this machine with those of a folder's files that are there, copied once under a key.

    Many processes can map them into memory together, and a network file system is read once for each machine.

    check: called with the copy before anyone else sees it; what it raises leaves none.

    Raises:
        DataError: if there is no room, or a file cannot be read.
    """
    place = (folder or cache_folder()) / "copies"
    target, begun = place / key, place / f".{key}-{uuid.uuid4().hex}"
    with _locked(place, key):
        if target.is_dir():
            return target
        try:
            with _explained(place):
                for stale in place.glob(f".{key}-*"):
                    shutil.rmtree(stale)
                begun.mkdir()
                for name in names:
                    _copy(source / name, begun / name)
            check(begun)
            with _explained(place):
                begun.rename(target)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    return target


def _copy(source: Path, target: Path) -> None:
    """Copy a file if it is there; one that cannot be read is no fault of the cache."""
    try:
        content = source.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    with content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def _damage(path: Path, verify: bool) -> str:
    """Return what is wrong with a cache file, or "" if nothing is."""
    import pyarrow as pa

    try:
        noted = json.loads(_note(path).read_text())
        if path.stat().st_size != noted["size"]:
            return f"{path.stat().st_size} bytes instead of {noted['size']}"
        if len(Samples(path)) != noted["samples"]:
            return f"not {noted['samples']} samples"
        if verify and _sha256(path) != noted["sha256"]:
            return "its sha256 is another"
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return str(error) or type(error).__name__
    return ""


def _build(path: Path, build: Callable[[], Iterable[Sample]]) -> None:
    """Write a whole file under a temporary name, then put it in its place, then note its size and hash."""
    start = time.monotonic()
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with _explained(path.parent):
        for stale in path.parent.glob(f"{path.name}.*.tmp"):
            stale.unlink()
        _note(path).unlink(missing_ok=True)
    try:
        count = _write_samples(temporary, build())
        with _explained(path.parent):
            size = temporary.stat().st_size
            note = json.dumps({"size": size, "samples": count, "sha256": _sha256(temporary)})
            temporary.replace(path)
            durable.write(_note(path), note)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info("cache: %d samples, %.1f MiB, %.1f s", count, size / 2**20, time.monotonic() - start)


def _write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Write and fsync; only failures of writing are explained as the cache's, not those of reading the data."""
    with _explained(path.parent), path.open("wb") as stream:
        count = storage.write(_own_errors(samples), stream)
        stream.flush()
        os.fsync(stream.fileno())
    return count


def _own_errors(samples: Iterable[Sample]) -> Iterator[Sample]:
    try:
        yield from samples
    except OSError as error:
        raise DataError(f"cannot read the data: {error}") from error


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn a failure to write into the one error that says where, and how to go elsewhere."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write the cache: {error.strerror or error}"
        raise DataError(f"{folder}: {problem}; set {VARIABLE} to a folder with room") from error


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """Hold the key's lock among all processes of this machine; it goes when the process goes, however that ends."""
    with ExitStack() as held:
        with _explained(folder):
            held.enter_context(durable.locked(folder / f"{key}.lock"))
        yield  # renaming is atomic: where there are no locks, two builders only waste time


def _file_hash(path: Path, known: list[str] | None) -> list[str]:
    """Return [sha256, size and times], the hash taken from the memo where size and times are the same."""
    try:
        state = path.stat()
        stamp = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        if known and known[1] == stamp:
            return known
        settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED_NS
        return [_sha256(path), stamp if settled else ""]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_memo(path: Path) -> dict[str, list[str]]:
    try:
        memo = json.loads(path.read_text())
        return {name: [digest, stamp] for name, (digest, stamp) in memo.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_memo(path: Path, memo: Mapping[str, list[str]]) -> None:
    """Keep the hashes for next time; a folder that cannot be written only costs that time."""
    try:
        durable.write(path, json.dumps(memo))
    except OSError as error:
        logger.debug("cache: hashes are not kept: %s", error)


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
