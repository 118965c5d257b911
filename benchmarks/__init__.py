"""How fast, next to what you would use instead: each module here whose name has no underscore before it is a benchmark.

A benchmark is a module with

    measure(...) -> dict            measure, and return what the last line of output shows; sizes are arguments
    TINY: dict                      arguments of `measure` for some seconds, to see that it works
    figures(result) -> list         rows of the README's table: what was measured, the figure, what it stands against
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType


class BenchmarkError(ValueError):
    """No such benchmark, or one that could not be carried out."""


def names() -> list[str]:
    """Return all benchmarks."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_") and not module.ispkg
    )


def load(name: str) -> ModuleType:
    """Return a benchmark's module.

    Raises:
        BenchmarkError: naming the nearest benchmark.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"here are {', '.join(names())}"
        raise BenchmarkError(f"no benchmark {name!r}; {hint}")
    return importlib.import_module(f"{__name__}.{name}")


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring."""
    return str(load(name).__doc__).partition("\n")[0]
