"""Prediction by several Ray workers: each takes a share of a folder's files, and together they write what one would.

    OUT/.shares/3/<attempt>/in/     links to the files of share 3, under their own relative paths
    OUT/.shares/3/<attempt>/out/    what the workload's `predict` wrote for them

A share is one call of `predict`, so that a worker loads the checkpoint once. A share whose worker died is done again in
a folder of its own; what is finished is moved to OUT, and the folder of shares goes.
"""

from __future__ import annotations

import filecmp
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TextIO

from search import ray_session, tasks, workload
from search.errors import BadInput, SearchError, disk_error, is_disk
from search.progress import duration
from search.ray_session import RaySession
from search.tasks import Workers

SHARES = ".shares"


@dataclass(frozen=True, kw_only=True)
class Request(Workers):
    """What to predict, and by how many."""

    workload: str
    checkpoint: Path
    source: Path
    out: Path


def run(request: Request, stream: TextIO) -> list[Path]:
    """Predict every file of a folder and return what was written, in order of name; progress goes to the stream.

    Raises:
        BadInput: for a workload, checkpoint, folder or file that cannot be used, or more workers than ever fit.
        SearchError: if a share failed, or lost its worker too often.
    """
    try:
        module = workload.load(request.workload)
        checkpoint = workload.checkpoint(request.checkpoint).absolute()
        files = find(module, request.source)
    except ValueError as error:  # the workload's own word for what cannot be used
        raise BadInput(str(error)) from error
    room = ray_session.room()
    tasks.check(request, room)
    folder = request.out.absolute() / SHARES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with RaySession(room) as session:
            session.start()
            done = _predict(request, checkpoint, shares(files, request.workers), folder, stream)
        written = gather(done, request.out, merges=hasattr(module, "merge"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return sorted({*written, *_merged(module, request)})


def find(module: ModuleType, source: Path) -> list[str]:
    """Return the files that a workload would predict, relative to their folder, in order.

    Raises:
        BadInput: if there is no such folder, or nothing in it.
    """
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder; for a single file there is python -m workloads predict")
    found: list[Path] = module.sources(source) if hasattr(module, "sources") else _visible(source)
    if not found:
        raise BadInput(f"{source}: holds no files; expected the images to predict")
    return [str(path.relative_to(source)) for path in found]


def shares(files: Sequence[str], workers: int) -> list[list[str]]:
    """Return the files dealt out evenly, one part for each worker and none empty."""
    count = min(workers, len(files))
    return [list(files[number::count]) for number in range(count)]


def gather(folders: Sequence[Path], out: Path, *, merges: bool) -> list[Path]:
    """Move what the shares wrote into one folder and return the paths there.

    What several shares wrote differently is about all images: it is left to the workload's `merge`.

    Raises:
        SearchError: if there is none.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.setdefault(str(path.relative_to(folder)), []).append(path)
    differing = [name for name, paths in found.items() if not _equal(paths)]
    if differing and not merges:
        raise SearchError(
            f"{out}: each share wrote its own {differing[0]}; give the workload a function merge(out_dir, source) that "
            "makes one of them all, or predict with --workers 1"
        )
    written = []
    for name in sorted(found.keys() - differing):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        written.append(found[name][0].replace(target))
    return written


def status(done: int, count: int, folder: Path, request: Request, seconds: float) -> str:
    """Return how far the shares are, in one line."""
    begun = list(folder.glob("*/*")) if folder.is_dir() else []
    if not (begun or done):
        each = f"{request.cpus_per_worker:g} CPU, {request.gpus_per_worker:g} GPU"
        return f"predict: waiting for workers of {each}, {duration(seconds)}"
    files = sum(path.is_file() for attempt in begun for path in (attempt / "out").rglob("*"))
    return f"predict: {done} of {count} shares done, {files} files written, {duration(seconds)}"


def _merged(module: ModuleType, request: Request) -> list[Path]:
    """Let the workload write what is about all images, where it does."""
    try:
        return list(module.merge(request.out, request.source)) if hasattr(module, "merge") else []
    except ValueError as error:
        raise BadInput(str(error)) from error


def _predict(
    request: Request, checkpoint: Path, parts: Sequence[Sequence[str]], folder: Path, stream: TextIO
) -> list[Path]:
    """Let Ray do every share; return the folders that they wrote to, in order of share.

    Where one fails, the folder of shares goes, without which none of those left begins.
    """
    source, calls = str(request.source.absolute()), []
    for number, part in enumerate(parts):
        (folder / str(number)).mkdir()
        calls.append((request.workload, str(checkpoint), source, list(part), str(folder / str(number))))
    found = tasks.run(
        _share,
        calls,
        request,
        title=lambda number: f"a share of {len(parts[number])} files",
        status=lambda done, seconds: status(done, len(parts), folder, request, seconds),
        stream=stream,
    )
    return [Path(place) for place in found]


def _share(workload_name: str, checkpoint: str, source: str, files: list[str], folder: str) -> str:
    """Predict some files of a folder and return where the results lie. Runs in a Ray worker."""
    # Its own for each attempt: one that only seemed dead may still write.
    attempt = Path(folder) / uuid.uuid4().hex[:8]
    inside, outside = attempt / "in", attempt / "out"
    try:
        attempt.mkdir()
        outside.mkdir()
        for name in files:
            link = inside / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(source) / name)
        workload.load(workload_name).predict(Path(checkpoint), inside, outside)
    except ValueError as error:
        raise BadInput(str(error).replace(str(inside), source)) from error
    except OSError as error:
        if is_disk(error):
            raise disk_error(error, Path(folder).parent.parent) from error
        raise
    return str(outside)


def _equal(paths: Sequence[Path]) -> bool:
    return all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:])


def _visible(source: Path) -> list[Path]:
    """Return all files but hidden ones, of one kind after the other, so that every share gets some of each."""
    found = [path for path in source.rglob("*") if path.is_file()]
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    return sorted(shown, key=lambda path: (path.suffix, path))
