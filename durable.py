"""Files that survive a kill: either the whole content under its name, or nothing."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHA256 = "sha256"
"""Key under which a committed file carries the hash of all the rest."""


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file's content so that a reader sees the old or the new one, even after a power cut; return path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _temporary(path, content).replace(path)
    _sync_folder(path.parent)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a value as JSON like `write`, in the form that any reader takes."""
    return write(path, json.dumps(plain(value), indent=1, sort_keys=True))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it and run the same command to make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; expected an object")
    return content


def plain(value: Any) -> Any:
    """Return plain data with NaN and infinities as None, which JSON does not know, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit(path: Path, value: Mapping[str, Any]) -> bool:
    """Write an object as JSON under a name not yet taken; return False, and change nothing, where it exists.

    The first writer wins: a process that outlived its driver cannot overwrite what its successor did.
    """
    if path.exists():
        return False
    temporary = _temporary(path, json.dumps({**value, SHA256: _sha256_of(value)}))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return True


def committed(path: Path) -> dict[str, Any] | None:
    """Return what was committed under a name; None where nothing was.

    Raises:
        ValueError: if the file is not as it was written.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}; expected an object")
    if value.pop(SHA256, None) != _sha256_of(value):
        raise ValueError("its content is not what its sha256 says")
    return value


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file, made where it is missing, among all processes; it goes when the process goes, however that ends.

    Where the file system knows no locks, as some network ones do, nothing is held.

    Raises:
        OSError: if it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s); going on without", path, error)
        yield


def put_aside(path: Path) -> Path:
    """Give a damaged file another name, so that it is kept and in nobody's way; return the name."""
    aside = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.damaged-{n}")).exists())
    return path.rename(aside)


def seal(folder: Path) -> str:
    """Write the manifest of a folder (name, size and sha256 of each file), last of all; return the folder's sha256."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    text = json.dumps(files, indent=1, sort_keys=True)
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(text)
    temporary.replace(folder / MANIFEST)
    return hashlib.sha256(text.encode()).hexdigest()


def seal_of(folder: Path) -> str | None:
    """Return the folder's sha256 as its manifest tells it, without reading the files; None where there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def sealed(folder: Path) -> str | None:
    """Return the folder's sha256 if every file is as its manifest says, else None.

    A manifest that names anything but plain files of the folder, as one that somebody else wrote may, vouches for none.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        whole = all(_is_as_told(below(folder, name), facts) for name, facts in json.loads(text).items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return hashlib.sha256(text.encode()).hexdigest() if whole else None


def below(folder: Path, name: object, *, links: bool = False) -> Path | None:
    """Return the path of a name that was read from a file, or None if it leads out of the folder on any system.

    It has one spelling, so that no check is passed by another: `a/b`, never `./a/b`, `a//b`, `a/../a/b` or `a\\b`.

    links: whether what lies on the way may be a symbolic link; the folder itself always may.
    """
    if not isinstance(name, str) or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return None
    pure = PurePosixPath(name)
    foreign = "\\" in name or PureWindowsPath(name).drive
    if foreign or pure.is_absolute() or not pure.parts or ".." in pure.parts or str(pure) != name:
        return None
    path = folder / name
    steps = [path, *path.parents[: len(pure.parts) - 1]]
    return path if links or not any(step.is_symlink() for step in steps) else None


def _is_as_told(path: Path | None, facts: Mapping[str, Any]) -> bool:
    # A pipe or a device would be read for ever.
    if path is None or not path.is_file():
        return False
    return bool(path.stat().st_size == facts["size"] and _sha256(path) == facts["sha256"])


def _temporary(path: Path, content: str | bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sha256_of(value: Mapping[str, Any]) -> str:
    # JSON that was read is written as it was: keys keep their order, and numbers their digits.
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
