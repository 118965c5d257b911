"""A small study of the faulty workload: run, broken, run again, and looked at."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from search import spec_file
from search.record import StudyPaths, TrialRecord
from search.study import RESULT, Study
from tests import processes

Finished = dict[int, tuple[str, dict[str, Any], tuple[float, ...] | None]]


class FaultyStudy:
    """One study in `folder/runs/study`, of few and short trials.

    The sampler draws by the trial's number alone, and nothing is stopped early: what the study finds does not depend
    on when its trials run, so that one that was broken can be held against one that was not. All run in one Ray, at
    the address `ray`.
    """

    def __init__(self, folder: Path, ray: str, seed: int = 0, **sections: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ray = folder, ray
        self.paths, self.space, self.log = StudyPaths(folder / "runs/study"), folder / "study.yaml", folder / "log.txt"
        content = {
            "workload": "tests.faults.faulty",
            "objective": {"metric": "score", "mode": "max"},
            "parameters": {
                "lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
                "width": {"type": "int", "low": 8, "high": 256, "log": True},
            },
            "search": {"sampler": "random", "trials": 4, "seed": seed},
            "stopping": {"rule": "none"},
            "promotion": {"k": 2},
            "resources": {"slots": 1},
            "evaluation": {"cpus": 2},  # one after another, in one process
            "tracking": {"tensorboard": False},
            **sections,
            "fixed": {"epochs": 3, "faults": str(folder), **sections.get("fixed", {})},
        }
        self.space.write_text(yaml.safe_dump(content))

    def run(self, crash: str = "") -> int:
        """Run the search, to its end or until it crashes at the n-th time of a point; return the exit code."""
        if crash:
            (self.folder / "crash").write_text(crash)
        arguments = ["--space", str(self.space), "--runs", str(self.folder / "runs")]
        environment = {**os.environ, "RAY_ADDRESS": self.ray}
        return processes.command("tests.faults.driver", arguments, self.log, self.log, environment, timeout_s=200)

    def said(self) -> str:
        """Return the end of what all runs printed."""
        return self.log.read_text()[-3000:]

    def records(self) -> list[TrialRecord]:
        return Study(self.paths, spec_file.load(str(self.space))).records()

    def finished(self) -> Finished:
        """Return what each trial that has ended gave, by its number."""
        ended = [record for record in self.records() if record.state in ("complete", "stopped", "failed")]
        return {record.number: (record.state, dict(record.params), record.values) for record in ended}

    def committed(self) -> dict[str, tuple[int, bytes]]:
        """Return each result file, and when it was written."""
        files = self.paths.trial(0).parent.glob(f"*/{RESULT}")
        return {file.parent.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    def begun(self) -> Counter[tuple[int, int]]:
        """Return how often each epoch of each trial was begun, by the trial's number."""
        numbers = {record.seed: record.number for record in self.records()}
        lines = [line.split() for line in self.noted("begun")]
        return Counter((numbers[int(seed)], int(epoch)) for seed, epoch, _ in lines)

    def noted(self, name: str) -> list[str]:
        """Return the lines that the workload wrote about something."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def evaluated(self) -> Counter[int]:
        """Return how often each trial was evaluated."""
        return Counter(int(Path(line).parent.parent.name) for line in self.noted("evaluated"))

    def promoted(self) -> list[int]:
        content = json.loads(self.paths.promotion.read_text())
        return [item["trial"] for item in content["promoted"]]

    def has_crashed(self) -> bool:
        """Return whether the crash that `run` asked for has happened, and make room for the next."""
        crashed = self.folder / "crashed"
        if not crashed.exists():
            return False
        crashed.unlink()
        return True


MakeStudy = Callable[..., FaultyStudy]
