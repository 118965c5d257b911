"""Processes of their own that are quick to start: imports, which take each of them seconds, are done once for all."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

IMPORTED = (
    *("tune", "search.executor", "workloads.__main__", "segmentation.training", "segmentation.evaluation"),
    *("timm", "pyarrow", "plotly.graph_objects"),
)
"""What is not installed is passed over."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def ranks(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call a function of a module in several processes, with the number of each before the arguments."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method=_context.get_start_method())


def command(
    module: str, arguments: Sequence[str], out: Path, err: Path, environment: Mapping[str, str], timeout_s: float
) -> int:
    """Run a module's `main` as its command line does; return its exit code as `subprocess` does.

    Args:
        module: its name.
        arguments: of the command line.
        out: a file to which its results are added.
        err: the same for all else; it may be the same file.
        environment: all its variables.
        timeout_s: longest time.
    """
    process = _context.Process(target=_main, args=(module, list(arguments), out, err, dict(environment)))
    process.start()
    try:
        process.join(timeout_s)
        if process.exitcode is None:
            raise TimeoutError(f"{module} {' '.join(arguments)}: {err.read_text()}")
        return process.exitcode
    finally:
        process.kill()


def _main(module: str, arguments: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main(arguments))
