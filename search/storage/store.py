"""A study's folder in an object store: what each machine has of it is a copy, and the store is the truth.

Everything goes through pyarrow.fs, which knows s3://, gs://, abfs:// and hdfs://. A file appears there whole or not at
all, but nothing can be appended to, linked or locked. So the journal is a row of pieces, each written once under its
offset; a folder's manifest goes last; the driver alone says how a trial ended; and a lease that is renewed says which
process is the driver. The copies lie under the same path on every machine, so that paths mean the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import durable
from search import ray_session
from search.errors import SpecError, StoreError, StudyError, disk_error, held, is_disk

CACHE = "SEGMENTATION_CACHE"
LAST = (durable.MANIFEST, "evaluation.json")
"""Files that say that a folder is whole."""
LEASE = "lease.json"
JOURNAL = "journal"
PIECES = 64
"""Pieces of a journal above which it is made one when a driver starts."""
LEASE_S = 60.0
RENEW_S = 15.0
SETTLE_S = 1.0
"""Wait after a name is written that others may write as well: whose it is then, has it."""
THREADS = 8
CHUNK = 8 * 2**20
OBJECT_STORES = ("s3", "gcs", "abfs")

Skip = Callable[[str], bool]


class Store:
    """The store of one study; does nothing where there is none and the folder itself is the truth.

    Args:
        folder: the study's folder on this machine.
        uri: of the same folder in the store.
    """

    def __init__(self, folder: Path = Path(), uri: str | None = None) -> None:
        self.folder, self.uri = folder, uri
        self._pushed: dict[Path, tuple[int, int]] = {}
        self._journal_end = 0
        self._lease: _Lease | None = None

    def __bool__(self) -> bool:
        return self.uri is not None

    def push(self, path: Path, skip: Skip = lambda name: False) -> None:
        """Write a file or a folder to the store, what says that a folder is whole last of all.

        skip: by the name below the path; such files are left out.
        """
        if not self:
            return
        files = [path] if path.is_file() else sorted(_files(path))
        wanted = [file for file in files if not skip(file.relative_to(path).as_posix()) and self._is_new(file)]
        with self._reaching():
            _each(self._upload, [file for file in wanted if file.name not in LAST])
            for file in wanted:
                if file.name in LAST:
                    self._upload(file)

    def pull(self, path: Path, skip: Skip = lambda name: False) -> None:
        """Make a folder of this machine what it is in the store, in all but the names that `skip` says."""
        if not self:
            return
        with self._reaching():
            there = {name: info for name, info in self._list(path).items() if not skip(name)}
            here = {file.relative_to(path).as_posix(): file for file in _files(path)}
            for name, file in here.items():
                if name not in there and not skip(name):
                    file.unlink(missing_ok=True)
            _each(lambda name: self._download(path / name, there[name]), [n for n in there if n not in LAST])
            for name in there:
                if name in LAST:
                    self._download(path / name, there[name])

    def delete(self, folder: Path) -> None:
        """Delete a folder in the store; its manifest first, since the rest is not whole any more."""
        if not self:
            return
        with self._reaching():
            for name in sorted(self._list(folder), key=lambda name: name.rpartition("/")[2] not in LAST):
                self.delete_file(folder / name)

    def delete_file(self, path: Path) -> None:
        """Delete a file in the store, if it is there."""
        with self._reaching(), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._key(path))

    def read(self, path: Path) -> bytes | None:
        """Return what a file is in the store; None where it is not."""
        with self._reaching():
            try:
                with self._fs.open_input_stream(self._key(path)) as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def write(self, path: Path, content: bytes) -> None:
        """Write a file that is in the store only."""
        with self._reaching(), self._open(path) as stream:
            stream.write(content)

    def push_journal(self, journal: Path) -> None:
        """Add to the store's journal what has come to this one, up to its last whole line.

        Raises:
            StoreError: also if the lease is lost, and with it the right to write.
        """
        if not self:
            return
        self.check()
        with journal.open("rb") as file:
            file.seek(self._journal_end)
            content = file.read()
        if new := content[: content.rfind(b"\n") + 1]:
            self.write(self.folder / JOURNAL / f"{self._journal_end:015d}", new)
            self._journal_end += len(new)

    def pull_journal(self, journal: Path) -> None:
        """Make the journal of this machine what it is in the store; call it once, before anything is written."""
        if not self:
            return
        folder = self.folder / JOURNAL
        with self._reaching():
            names = sorted(self._list(folder))
        content = bytearray()
        for name, piece in zip(names, _each(lambda name: self.read(folder / name), names), strict=True):
            content[int(name) :] = max(content[int(name) :], piece or b"", key=len)
        durable.write(journal, bytes(content)) if names else journal.unlink(missing_ok=True)
        self._journal_end = len(content)
        if len(names) > PIECES:
            self.write(folder / names[0], bytes(content))
            _each(lambda name: self.delete_file(folder / name), names[1:])

    def has_journal(self) -> bool:
        """Return whether a journal is in the store."""
        return bool(self) and bool(self._list(self.folder / JOURNAL))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the study for this process, as long as the lease in the store can be renewed.

        Raises:
            StudyError: if another process holds it, saying who.
        """
        if not self:
            yield
            return
        self._lease = _Lease(self)
        try:
            yield
        finally:
            self._lease.close()

    def check(self) -> None:
        """Raise StoreError if the lease is lost."""
        if self._lease is not None:
            self._lease.check()

    def modified(self, path: Path) -> float | None:
        """Return when a file was written, in seconds of the store's own clock; None where it is not."""
        with self._reaching():
            info = self._fs.get_file_info(self._key(path))
        return info.mtime.timestamp() if info.is_file else None

    @functools.cached_property
    def _fs(self) -> Any:
        return _filesystem(str(self.uri))[0]

    @functools.cached_property
    def _root(self) -> str:
        return _filesystem(str(self.uri))[1]

    def _key(self, path: Path) -> str:
        below = path.relative_to(self.folder).as_posix()
        return self._root if below == "." else f"{self._root}/{below}"

    def _list(self, path: Path) -> dict[str, Any]:
        """Return the files below a path, by their names below it."""
        from pyarrow.fs import FileSelector

        base = self._key(path)
        infos = self._fs.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{base}/"): info for info in infos if info.is_file}

    def _is_new(self, file: Path) -> bool:
        return self._pushed.get(file) != _stamp(file)

    def _upload(self, file: Path) -> None:
        stamp = _stamp(file)
        with file.open("rb") as source, self._open(file) as target:
            shutil.copyfileobj(source, target, CHUNK)
        self._pushed[file] = stamp

    def _open(self, path: Path) -> Any:
        key = self._key(path)
        if self._fs.type_name not in OBJECT_STORES:
            self._fs.create_dir(key.rpartition("/")[0], recursive=True)
        return self._fs.open_output_stream(key)

    def _download(self, file: Path, info: Any) -> None:
        """Fetch a file, unless the one here has its size and time."""
        if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (info.size, info.mtime_ns):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with self._fs.open_input_stream(info.path) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
            os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._pushed[file] = _stamp(file)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            if error.filename is not None or is_disk(error):
                raise disk_error(error, error.filename or self.folder) from error
            said = " ".join(str(error).split())
            raise StoreError(
                f"{shown(str(self.uri))}: {said}; when it can be reached again, run the same command: "
                "it goes on from here"
            ) from error


class _Lease:
    """A file of the store that its holder renews. Its age is told by the store's clock, so that no other matters."""

    def __init__(self, store: Store) -> None:
        import psutil

        self.store, self.path, self.token = store, store.folder / LEASE, uuid.uuid4().hex
        self.who = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "started": psutil.Process().create_time(),
        }
        self.problem = ""
        self._take()
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise StoreError if another process may hold the study by now."""
        if self.problem or time.monotonic() - self.renewed > LEASE_S - RENEW_S:
            raise StoreError(
                f"{shown(str(self.store.uri))}: its lease is lost: "
                f"{self.problem or 'it could not be renewed in time'}; nothing is lost, the same command goes on"
            )

    def close(self) -> None:
        """Give the study back."""
        self._ended.set()
        self._renewer.join(RENEW_S)
        with contextlib.suppress(StoreError):
            if self._holder().get("token") == self.token:
                self.store.delete_file(self.path)

    def _take(self) -> None:
        left = self._left(self._holder())
        if left > 0:
            raise self._refusal(f"; if that process is gone, its lease runs out in {left:.0f} s")
        self._write()
        time.sleep(SETTLE_S)
        if self._holder().get("token") != self.token:
            raise self._refusal("")

    def _refusal(self, hint: str) -> StudyError:
        shown_holder = {key: value for key, value in self._holder().items() if key in ("pid", "host", "since")}
        return held(shown(str(self.store.uri)), json.dumps(shown_holder), hint)

    def _left(self, holder: dict[str, Any]) -> float:
        """Return for how many seconds another process may still think that it holds the study."""
        written = self.store.modified(self.path)
        if written is None or self._is_dead(holder):
            return 0.0
        probe = self.path.with_name(f"{LEASE}-{self.token}")
        self.store.write(probe, b"")
        now = self.store.modified(probe)
        self.store.delete_file(probe)
        return LEASE_S - (now - written) if now is not None else LEASE_S

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Return whether the holder was a process of this machine and is gone."""
        import psutil

        if holder.get("host") != self.who["host"]:
            return False
        try:
            return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1)
        except (psutil.Error, KeyError, TypeError):
            return True

    def _holder(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.store.read(self.path) or b"{}")
            return found
        except ValueError:
            return {}

    def _write(self) -> None:
        began = time.monotonic()
        self.store.write(self.path, json.dumps({**self.who, "token": self.token}).encode())
        self.renewed = began

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(StoreError):  # `check` says so if it lasts
                holder = self._holder()
                if holder.get("token") != self.token:
                    self.problem = f"another search took it ({holder.get('host')}, pid {holder.get('pid')})"
                    return
                self._write()


def place(runs: str, study: str) -> Store:
    """Return where a study lies: below a folder, which is the truth itself, or below the URI of a store.

    Raises:
        SpecError: if it is a URI that cannot be used, or a folder that would go with the job that this process is.
    """
    if ray_session.submitted() and "://" not in runs and not Path(runs).is_absolute():
        raise SpecError(f"--runs {runs}: a job's own folder is deleted after it; name one that all machines see")
    if not re.match(r"[a-z0-9+]+://", runs):
        return Store(Path(runs) / study)
    if runs.startswith("file://"):
        return Store(Path(unquote(urlsplit(runs).path)) / study)
    base, _, options = runs.partition("?")
    scheme, _, rest = base.rstrip("/").partition("://")
    if "@" in rest:
        raise SpecError("--runs: has a name or a password in it; give them as AWS_ACCESS_KEY_ID and the like")
    cache = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "segmentation-search")
    folder = (cache / "studies" / scheme / rest / study).absolute()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint and "endpoint_override" not in options:
        # Written out, so that it holds on all machines, and nobody asks Amazon where the bucket is.
        protocol, _, host = endpoint.rstrip("/").rpartition("://")
        options = "&".join(filter(None, [options, f"scheme={protocol or 'https'}", f"endpoint_override={host}"]))
    store = Store(folder, f"{scheme}://{rest}/{study}{'?' if options else ''}{options}")
    try:
        _filesystem(str(store.uri))
    except (OSError, ValueError, NotImplementedError) as error:
        raise SpecError(f"--runs: {' '.join(str(error).split())}; expected such as s3://BUCKET/FOLDER") from error
    return store


def shown(uri: str) -> str:
    """Return a URI as it may be shown: without options, which may hold secrets."""
    return uri.partition("?")[0]


@functools.lru_cache(maxsize=4)
def _filesystem(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    found: tuple[Any, str] = FileSystem.from_uri(uri)
    return found


def _files(path: Path) -> Iterator[Path]:
    """Return the files below a folder; links are another name of what is somewhere else."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if not (_is_temporary(name) or file.is_symlink()):
                yield file


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _each(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
