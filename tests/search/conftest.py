"""Toy searches as people write them: a dictionary in, a checked spec out, and a trial run without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import spec_file
from search.record import StudyPaths
from search.spec import SearchSpec
from search.study import Outcome, Study, Task

# For the local S3 server of test_store.py; slots inherit them from the session's Ray.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}

LR = {"type": "float", "low": 1.0e-5, "high": 1.0, "log": True}
WIDTH = {"type": "int", "low": 8, "high": 256, "log": True}
SPACE: dict[str, Any] = {
    "workload": "toy",
    "objective": {"metric": "score", "mode": "max"},
    "parameters": {"lr": LR, "width": WIDTH},
}


class _Dumper(yaml.SafeDumper):
    """Writes every value out: search spaces know no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Load = Callable[..., SearchSpec]
Open = Callable[[SearchSpec], Study]
Drive = Callable[[Study, Task], Outcome]


@pytest.fixture
def toy(tmp_path: Path) -> Load:
    """Return a function that loads the toy search space with some sections replaced, or a text as it is."""

    def load(*assignments: str, text: str = "", name: str = "toy", **sections: Any) -> SearchSpec:
        content = {key: value for key, value in {**SPACE, **sections}.items() if value is not ...}
        path = tmp_path / f"{name}.yaml"
        path.write_text(text or yaml.dump(content, Dumper=_Dumper, sort_keys=False))
        return spec_file.load(str(path), assignments)

    return load


@pytest.fixture
def open_study(tmp_path: Path) -> Open:
    """Return a function that opens the study of a spec, always in the same folder."""

    def opened(spec: SearchSpec) -> Study:
        folder = tmp_path / "runs" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        return Study(StudyPaths(folder), spec)

    return opened


@pytest.fixture
def drive() -> Drive:
    """Return a function that runs a trial to its end in this process, as a slot would, and tells the study."""

    def run(study: Study, task: Task) -> Outcome:
        from search.trial import TrialRun

        trial = TrialRun(order(study, task))
        for _ in range(task.config["epochs"] + 1):
            _, _, outcome = trial.step()
            if outcome is not None:
                break
        assert outcome is not None
        trial.close()
        study.tell(task.number, outcome)
        return outcome

    return run


def order(study: Study, task: Task) -> dict[str, Any]:
    return {
        "number": task.number,
        "workload": study.spec.workload,
        "config": dict(task.config),
        "objectives": [asdict(objective) for objective in study.spec.objectives],
        "folder": str(study.trial_folder(task.number)),
        "resources": asdict(study.spec.resources),
        "tensorboard": False,
    }
