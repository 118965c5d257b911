"""Preparation of a workload's data by several Ray workers: each piece a task, and what is about all of them at the end.

A piece is what a workload names, such as a raw satellite tile. What is done stays done: a command that was killed goes
on when it is given again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TextIO

import configuration
from search import ray_session, tasks, workload
from search.errors import BadInput, disk_error, is_disk
from search.progress import duration
from search.ray_session import RaySession
from search.tasks import Workers


@dataclass(frozen=True, kw_only=True)
class Request(Workers):
    """What to prepare, and by how many."""

    workload: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of the workload's Config, by their dotted names."""


@dataclass(frozen=True)
class Prepared:
    """What has come of it."""

    processed: tuple[str, ...]
    """The pieces that were done now."""
    manifest: Mapping[str, Any]
    """What the workload's `prepare` returned."""


def run(request: Request, stream: TextIO) -> Prepared:
    """Do every piece that is not done yet, then prepare the whole in this process; progress goes to the stream.

    Raises:
        BadInput: for a workload, value or file that cannot be used, or more workers than ever fit.
        SearchError: if a piece failed, or lost its worker too often.
    """
    module = _load(request.workload)
    try:
        config = configuration.build(module.Config, request.values)
        names = list(module.pieces(config))
    except ValueError as error:  # the workload's own word for what cannot be used
        raise BadInput(str(error)) from error
    found = _process(request, names, stream) if names else []
    try:
        return Prepared(tuple(found), module.prepare(config))
    except ValueError as error:
        raise BadInput(str(error)) from error


def facts(prepared: Prepared) -> Iterator[str]:
    """Yield what was prepared, line by line: of a manifest what every workload says."""
    manifest = prepared.manifest
    lines = {
        "processed": f"{len(prepared.processed)} pieces now",
        "samples": ", ".join(f"{count} {split}" for split, count in manifest["samples"].items()),
        "data": f"{manifest['sha256']}{'; SYNTHETIC' if manifest.get('synthetic') else ''}",
    }
    width = max(map(len, lines))
    yield from (f"{name:{width}}  {value}" for name, value in lines.items())


def status(done: int, count: int, request: Request, seconds: float) -> str:
    """Return how far it is, in one line."""
    if not done:
        each = f"{request.cpus_per_worker:g} CPU"
        return f"prepare: the first of {count} pieces, by workers of {each}, {duration(seconds)}"
    return f"prepare: {done} of {count} pieces done, {duration(seconds)}"


def _load(name: str) -> ModuleType:
    try:
        module = workload.load(name)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not (hasattr(module, "pieces") and hasattr(module, "process")):
        raise BadInput(
            f"{name}: its data have no pieces to be done side by side, for it offers no `pieces(config)` and "
            f"`process(config, names)`; python -m workloads inspect {name} prepares them in one process"
        )
    return module


def _process(request: Request, names: list[str], stream: TextIO) -> list[str]:
    """Let Ray do every piece; return those that it had to do."""
    room = ray_session.room()
    tasks.check(request, room)
    with RaySession(room) as session:
        session.start()
        found = tasks.run(
            _piece,
            [(request.workload, dict(request.values), name) for name in names],
            request,
            title=lambda number: f"piece {names[number]}",
            status=lambda done, seconds: status(done, len(names), request, seconds),
            stream=stream,
        )
    return [name for part in found for name in part]


def _piece(workload_name: str, values: dict[str, Any], name: str) -> list[str]:
    """Do one piece and return it, or nothing if it was done. Runs in a Ray worker."""
    module = workload.load(workload_name)
    try:
        return list(module.process(configuration.build(module.Config, values), [name]))
    except ValueError as error:
        raise BadInput(str(error) if name in str(error) else f"{name}: {error}") from error
    except OSError as error:
        if is_disk(error):
            raise disk_error(error, name) from error
        raise
