"""Search hyperparameters: flags in, leaderboard out."""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from search import planning, ray_session, service, spec_file, summary
from search.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, BadInput, EvaluationError, SearchError
from search.store import place


def main(arguments: list[str] | None = None) -> int:
    """Run one search, or go on with it; return the exit code."""
    given = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if ray_session.submitted() and not given.runs.is_absolute():
            raise BadInput(f"--runs {given.runs}: a job has no folder to stay in; name one that all machines see")
        spec = spec_file.load(given.space, given.set)
        store = place(given.runs, given.study or spec.name)
        plan = planning.make(spec, store.folder, store)
        print(summary.plan_text(plan), file=sys.stdout if given.dry_run else sys.stderr, flush=True)
        if given.dry_run:
            return DONE
        rows = service.run(plan, sys.stderr)
        print(summary.result_text(plan, rows))
        return DONE if rows else FAILED
    except BadInput as error:
        return _fail(error, BAD_INPUT)
    except OSError as error:
        return _fail(f"{error.filename or given.runs}: {error.strerror}; --runs names another folder", BAD_INPUT)
    except (EvaluationError, SearchError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing is lost, the same command goes on from here", INTERRUPTED)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune.py", description=__doc__)
    parser.add_argument("--space", required=True, help="YAML file; a bare name is looked up in search_spaces/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the file")
    parser.add_argument("--study", help="name of the study's folder (default: the file's name)")
    parser.add_argument("--runs", default="runs", help="folder of all studies, or s3://BUCKET/FOLDER (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    return parser.parse_args(arguments)


def _fail(problem: object, code: int) -> int:
    print(f"tune.py: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
