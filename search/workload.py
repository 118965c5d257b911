"""The one wire to what is trained: a workload, found by the name in the search space."""

from __future__ import annotations

import importlib
from types import ModuleType


def names() -> list[str]:
    """Return the workloads that come with this project."""
    found: list[str] = importlib.import_module("workloads").names()
    return found


def load(name: str) -> ModuleType:
    """Return the workload's module; see `workloads` for what it offers.

    Resolved at run time on purpose: nothing in `search` knows a tensor, and a user's own package works as well.
    """
    module: ModuleType = importlib.import_module("workloads").load(name)
    return module
