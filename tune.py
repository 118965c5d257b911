"""Search hyperparameters: flags in, leaderboard out."""

from __future__ import annotations

import argparse
import signal
import sys

from search import logs, spec_file
from search.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, BadInput, EvaluationError, SearchError
from search.record import StudyPaths
from search.storage import lease
from search.storage.store import place


def main(arguments: list[str] | None = None) -> int:
    """Run one search, or go on with it; return the exit code."""
    given = _parse(arguments)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the second is what Slurm can send some time before the end
        signal.signal(number, signal.default_int_handler)
    try:
        stream = logs.start(logs.kind(given.log))
        spec = spec_file.load(given.space, given.set, trains=given.workload)
        store = place(given.runs, given.study or spec.name)
        if not given.dry_run:
            lease.check(StudyPaths(store.folder))
        from search import planning, service  # with Ray: seconds that whoever is refused need not wait
        from search.results import summary

        plan = planning.make(spec, store.folder, store)
        logs.enter(study=plan.paths.folder.name)
        logs.say(sys.stdout if given.dry_run else stream, summary.plan_text(plan))
        if given.dry_run:
            return DONE
        rows = service.run(plan, stream)
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
    parser.add_argument("--space", required=True, help="YAML file, or a W&B sweep; a bare name is in search_spaces/")
    parser.add_argument("--workload", metavar="NAME", help="what trains, for a W&B sweep file, which does not say")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the file")
    parser.add_argument("--study", help="name of the study's folder (default: the file's name)")
    parser.add_argument("--runs", default="runs", help="folder of all studies, or s3://BUCKET/FOLDER (default: runs)")
    parser.add_argument("--log", choices=logs.KINDS, help=f"json: a line an event (default: ${logs.VARIABLE}, or text)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    return parser.parse_args(arguments)


def _fail(problem: object, code: int) -> int:
    logs.fail("tune.py", problem)
    return code


if __name__ == "__main__":
    sys.exit(main())
