"""Look after searches, prepare data for them, and use what they have found.

Results go to stdout, logs and progress to stderr; the exit code is 0 when done, 1 when it failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import configuration
from search import commands as studies
from search.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, BadInput, EvaluationError, SearchError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        given.run(given)
        sys.stdout.flush()
        return DONE
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (BadInput, configuration.ConfigError) as error:
        return _fail(error, BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, BAD_INPUT)
    except (SearchError, EvaluationError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command begins again, and what is done stays", INTERRUPTED)


def predict(given: argparse.Namespace) -> None:
    """Write a prediction for each image of a folder, by several Ray workers at once, and print the paths."""
    from search import inference

    request = inference.Request(
        workload=given.name,
        checkpoint=given.checkpoint,
        source=given.source,
        out=given.out or Path("runs") / f"{given.name}-predict",
        workers=given.workers,
        cpus_per_worker=given.cpus_per_worker,
        gpus_per_worker=given.gpus_per_worker,
    )
    for path in inference.run(request, sys.stderr):
        print(path)


def prepare(given: argparse.Namespace) -> None:
    """Process a workload's data, such as raw satellite tiles, by several Ray workers at once, and print what it is.

    What is done already is not done again: a command that was killed goes on when it is given once more.
    """
    from search import preparation

    request = preparation.Request(
        workload=given.name,
        values=dict(map(configuration.parse_assignment, given.set)),
        workers=given.workers,
        cpus_per_worker=given.cpus_per_worker,
    )
    prepared = preparation.run(request, sys.stderr)
    for warning in prepared.manifest.get("warnings", ()):
        print(f"note: {warning}", file=sys.stderr)
    print("\n".join(preparation.facts(prepared)))


def token(given: argparse.Namespace) -> None:
    """Make the token that keeps others out of a cluster, where there is none, and print the path of its file."""
    from search import ray_token

    print(ray_token.make(os.environ))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m search", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_predict(commands)
    _add_prepare(commands)
    commands.add_parser("token", help=token.__doc__, description=token.__doc__).set_defaults(run=token)
    _add_studies(commands)
    return parser.parse_args(arguments)


def _add_studies(commands: Any) -> None:
    for name, run in studies.COMMANDS.items():
        command = commands.add_parser(name, help=(run.__doc__ or "").partition("\n")[0], description=run.__doc__)
        command.set_defaults(run=run)
        if name == "compare":
            command.add_argument("studies", metavar="STUDY", nargs="+", help=_STUDY)
        elif name != "list":
            command.add_argument("study", metavar="STUDY", help=_STUDY)
        command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all studies (default: runs)")
        if name in ("list", "show", "compare"):
            command.add_argument("--json", action="store_true", help="for programs: JSON on one line")
        if name == "show":
            command.add_argument("--trials", type=_count, default=5, metavar="N", help="best trials (default: 5)")
        if name == "stop":
            command.add_argument("--wait", type=_amount, default=60.0, metavar="S", help="seconds (default: 60)")
        if name == "promote":
            command.add_argument("--trial", type=int, action="append", default=[], metavar="N", help="a finished trial")
            command.add_argument("--k", type=_count, metavar="K", help="the best K instead (default: the study's own)")


_STUDY = "a study's folder, or its name below --runs"


def _add_predict(commands: Any) -> None:
    command = commands.add_parser("predict", help=predict.__doc__, description=predict.__doc__)
    command.set_defaults(run=predict)
    command.add_argument("name", metavar="WORKLOAD", help="workload; `python -m workloads list` shows them")
    command.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a checkpoint, a model or a run; all nodes see it"
    )
    command.add_argument("source", metavar="IMAGES", type=Path, help="a folder of images that all nodes see")
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="output folder (default: runs/WORKLOAD-predict); all nodes see it"
    )
    command.add_argument("--workers", type=_count, default=1, metavar="N", help="predict in N shares (default: 1)")
    command.add_argument("--cpus-per-worker", type=_amount, default=1.0, metavar="N", help="CPUs of each (default: 1)")
    command.add_argument("--gpus-per-worker", type=_amount, default=0.0, metavar="N", help="GPUs of each (default: 0)")


def _add_prepare(commands: Any) -> None:
    text = (prepare.__doc__ or "").partition("\n")[0]
    command = commands.add_parser("prepare", help=text, description=prepare.__doc__)
    command.set_defaults(run=prepare)
    command.add_argument("name", metavar="WORKLOAD", help="workload; `python -m workloads list` shows them")
    text = "a value of its configuration; once or more. Folders named so are seen by all nodes"
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    command.add_argument("--workers", type=_count, default=1, metavar="N", help="pieces at once (default: 1)")
    command.add_argument("--cpus-per-worker", type=_amount, default=1.0, metavar="N", help="CPUs of each (default: 1)")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, 0 or more")
    return value


def _fail(problem: object, code: int) -> int:
    print(f"python -m search: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
