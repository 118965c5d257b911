"""Measure: without a name, list what can be measured; with names, print one JSON object for each."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

import benchmarks
import configuration
from benchmarks import _results

DONE, FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Measure what is named; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure")
    parser.add_argument(
        "--write", action="store_true", help="keep the results in benchmarks/results/ and in the README's table"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of what is measured, such as seeds=1",
    )
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in benchmarks.names()]
    try:
        for name in unknown:
            benchmarks.load(name)
        for name in given.names:
            _measure(name, given.write, dict(map(configuration.parse_assignment, given.set)))
    except (benchmarks.BenchmarkError, configuration.ConfigError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return BAD_INPUT if unknown else FAILED
    if given.write:
        _results.update_readme()
    elif not given.names:
        print("\n".join(f"{name:12}  {benchmarks.summary(name)}" for name in benchmarks.names()))
    return DONE


def _measure(name: str, write: bool, values: Mapping[str, Any]) -> None:
    state = _results.machine()
    measure = benchmarks.load(name).measure
    unknown = values.keys() - inspect.signature(measure).parameters.keys()
    if unknown:
        raise benchmarks.BenchmarkError(f"{name} has no {', '.join(sorted(unknown))}: {inspect.signature(measure)}")
    result = measure(**values)
    if write:
        _results.store(name, result, state)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
