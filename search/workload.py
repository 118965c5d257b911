"""The one wire to what is trained: a workload, found by the name in the search space.

A workload may also have

    def check(config) -> None                 raise ValueError where `train` could not begin whatever the data are;
                                              called for the choices of a search before it starts, so it should be quick
                                              (where they start from a parent that is still to be trained, its Config is
                                              given as well: check(config, training))
    FACTS, def facts(config) -> dict          numbers that constraints can speak of besides the config's values, known
                                              before a trial begins: their names, and their values
    def scan(config, searched, out_dir) -> dict
                                              look at a parent before a search: {"points": values of searched parameters
                                              to begin with, "score", "metric", "rows": a table, "figures": files}
    TABLE                                     metrics of an evaluation that tell what a network costs and scores beside
                                              its parent, and their headings
    UNINHERITED                               parts of the Config, such as "prune", that a parent is trained without
    SWEEP_NAMES                               what the W&B sweep files of the system that it comes from call values of
                                              its Config: {"max_epochs": "epochs"}; all other names are the Config's
    def sweep_value(name, value)              a value as such a file has it, under the file's name for it, as the Config
                                              takes it: "5,5,2" -> [5, 5, 2]; raise ValueError for what it never is

and for prediction by several workers (`search.inference`)

    def sources(source) -> list[Path]         the files of a folder that `predict` takes, in its order; without it: all
                                              that are not hidden
    def merge(out_dir, source) -> list[Path]  called once at the end, when out_dir holds the predictions of all shares:
                                              write what is about all images, such as an archive, and return its paths;
                                              what `predict` writes of that kind for a share is thrown away

and for preparation by several workers (`search.preparation`)

    def pieces(config) -> list[str]           parts of the data that are not processed yet, each of which can be by
                                              itself; empty: all are
    def process(config, names) -> list[str]   process some of them, in any order and several processes at once; those
                                              that are done are left alone, and what was done now is returned. It may be
                                              killed at any moment and is called again; `prepare` follows the last
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


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


def facts_of(module: ModuleType) -> tuple[str, ...]:
    """Return the names that constraints can speak of besides the config's values."""
    found: tuple[str, ...] = getattr(module, "FACTS", ())
    return found


def uninherited_by(module: ModuleType) -> tuple[str, ...]:
    """Return the parts of the Config that a parent is trained without."""
    found: tuple[str, ...] = getattr(module, "UNINHERITED", ())
    return found


def table_of(module: ModuleType) -> dict[str, str]:
    """Return the metrics of an evaluation to show beside those of a parent, and their headings."""
    found: dict[str, str] = getattr(module, "TABLE", {})
    return found


def sweep_names_of(module: ModuleType) -> Mapping[str, str]:
    """Return what W&B sweep files call values of the Config."""
    found: Mapping[str, str] = getattr(module, "SWEEP_NAMES", {})
    return found


def sweep_value_of(module: ModuleType) -> Callable[[str, Any], Any]:
    """Return what makes a value of the Config of one in a W&B sweep file, given the file's name for it."""
    found: Callable[[str, Any], Any] = getattr(module, "sweep_value", lambda name, value: value)
    return found


def checkpoint(path: Path) -> Path:
    """Return a checkpoint folder: the one given, or the best of the training run that it holds; ValueError if none."""
    found: Path = importlib.import_module("workloads._run").checkpoint(path)
    return found
