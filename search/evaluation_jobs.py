"""Evaluations as Ray jobs of their own: each is seen in the dashboard, and outlives the driver that submitted it.

The id of a job follows from the study and the checkpoint, and a cluster takes an id only once: however often a driver
is killed and started again, it finds the job that it had submitted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from search import ray_session
from search.errors import EvaluationError, SearchError
from search.evaluation import Candidate, arguments, missing
from search.record import StudyPaths
from search.spec import SearchSpec

LOOK_S = 1.0
"""How often the cluster is asked for the state of jobs."""
LINES = 5
"""Last lines of a failed job's output that are told."""


def run(paths: StudyPaths, spec: SearchSpec, candidates: Sequence[Candidate], finished: Callable[[str], None]) -> None:
    """Evaluate candidates side by side, each as a job; Ray must be up, on a cluster with a dashboard.

    Raises:
        EvaluationError: naming each that failed and why.
        SearchError: if the cluster takes no jobs.
    """
    client = _client()
    jobs = {_submit(client, paths, spec, candidate): candidate for candidate in candidates}
    problems = []
    while jobs:
        for job in [job for job in jobs if client.get_job_status(job).is_terminal()]:
            candidate = jobs.pop(job)
            paths.store.pull(paths.evaluation(candidate.name))
            if missing(paths, [candidate]):
                said = client.get_job_logs(job).splitlines()[-LINES:]
                problems.append(f"evaluation of trial {candidate.name}, job {job}: " + "\n".join(said))
            else:
                finished(candidate.name)
        if jobs:
            time.sleep(LOOK_S)
    if problems:
        raise EvaluationError("\n".join(problems))


def _client() -> Any:
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient()
    except Exception as error:  # whatever it is made of: no ray[default], no dashboard, no token
        raise SearchError(
            f"evaluation.run_as: the cluster takes no jobs ({error}); "
            "start it with a dashboard and install ray[default], or write tasks"
        ) from error


def _submit(client: Any, paths: StudyPaths, spec: SearchSpec, candidate: Candidate) -> str:
    """Return the id of the job that evaluates a candidate; submit it unless an earlier driver has.

    A job that an earlier driver saw fail, or whose result is gone, is followed by another.
    """
    for number in itertools.count(1):
        job = _name(paths, candidate, number)
        try:
            status = client.get_job_status(job)
        except RuntimeError:  # there is none
            return str(client.submit_job(submission_id=job, **_order(paths, spec, candidate)))
        if not status.is_terminal():
            return job
    raise AssertionError


def _name(paths: StudyPaths, candidate: Candidate, number: int) -> str:
    folder = hashlib.sha256(str(paths.folder.absolute()).encode()).hexdigest()[:8]
    return f"evaluate-{paths.folder.name}-{folder}-{candidate.name}-{candidate.sha256[:12]}-{number}"


def _order(paths: StudyPaths, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
    content = json.dumps(arguments(paths, spec, candidate))
    return {
        "entrypoint": f"{shlex.quote(sys.executable)} -m search.evaluation {shlex.quote(content)}",
        "entrypoint_num_cpus": spec.evaluation.cpus,
        "entrypoint_num_gpus": float(spec.evaluation.gpus),
        "runtime_env": _code(),
        "metadata": {"study": paths.folder.name, "trial": candidate.name},
    }


def _code() -> dict[str, Any]:
    """Return where a job finds this project: where this one does."""
    if not ray_session.submitted():
        return ray_session.runtime_env()
    environment = ray.get_runtime_context().runtime_env
    return {name: environment[name] for name in ("working_dir", "py_modules", "pip") if environment.get(name)}
