"""Check files for clusters before they cost money.

Results go to stdout; the exit code is 0 where all is well, 2 where something is to be mended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from search.errors import BAD_INPUT, DONE, BadInput


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = _parse(arguments)
    try:
        code: int = given.run(given)
        return code
    except BadInput as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error)


def lint(given: argparse.Namespace) -> int:
    """Print what is wrong with cluster files, a line each: file, key, what came and what to do."""
    from cluster import files, lint

    crds = lint.read_crds(given.crd)
    found = [(path, lint.problems(files.read(path), crds)) for path in given.files]
    for path, problems in found:
        for each in problems:
            print(each.line(path))
        if all(each.note for each in problems):
            print(f"{path}: fine")
    return DONE if all(each.note for _, problems in found for each in problems) else BAD_INPUT


def fit(given: argparse.Namespace) -> int:
    """Print how many trials of a search space run on a cluster at once: at the start, at the most, and never."""
    from cluster import files, fit
    from search import spec_file

    spec = spec_file.load(given.space, given.set, trains=given.workload)
    print(fit.text(spec, files.read(given.file)))
    return DONE


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("lint", help=lint.__doc__, description=lint.__doc__)
    command.set_defaults(run=lint)
    command.add_argument("files", metavar="FILE", nargs="+", type=Path, help="Ray launcher, KubeRay or Slurm file")
    command.add_argument(
        "--crd",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="KubeRay's schema, JSON or YAML; repeatable",
    )
    command = commands.add_parser("fit", help=fit.__doc__, description=fit.__doc__)
    command.set_defaults(run=fit)
    command.add_argument("space", metavar="SPACE", help="search space; a bare name is looked up in search_spaces/")
    command.add_argument("file", metavar="FILE", type=Path, help="Ray launcher, KubeRay or Slurm file")
    command.add_argument("--workload", metavar="NAME", help="what trains, for a W&B sweep file, which does not say")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the space"
    )
    return parser.parse_args(arguments)


def _fail(problem: object) -> int:
    print(f"python -m cluster: {problem}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
