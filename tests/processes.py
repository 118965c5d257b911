"""Processes of their own that are quick to start: imports, which take each of them seconds, are done once for all."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

IMPORTED = ("tune", "workloads.__main__", "segmentation.training", "segmentation.evaluation", "timm", "pyarrow")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def ranks(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call a function of a module in several processes, with the number of each before the arguments."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method=_context.get_start_method())


def command(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a module's `main` as its command line does; return what it said.

    Args:
        module: its name.
        arguments: of the command line.
        folder: for what it says.
        environment: all its variables.
        timeout_s: longest time.
    """
    out, err = folder / "out.txt", folder / "err.txt"
    process = _context.Process(target=_main, args=(module, list(arguments), str(out), str(err), dict(environment)))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{module} {' '.join(arguments)}: {err.read_text()}")
    return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _main(module: str, arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main(arguments))
