"""A slot: the warm process in which trials of one worker run, one after another.

It pulls the workload's epochs one by one inside Ray Tune's `step`, so that a stop is simply not pulling any more:
there is no thread, and nothing trains on. What it learns it writes to the trial's folder first and reports second.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray import tune

from search import watchdog
from search.drain import Notice
from search.errors import DiskError
from search.study import Outcome
from search.trial import TrialRun
from search.watchdog import Watchdog


class KeepsItself(tune.Trainable):
    """A Trainable whose trials keep their own checkpoints and go on from their own folders."""

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: trials keep their checkpoints themselves."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: a trial resumes from its folder."""


class Slot(KeepsItself):
    """Ray Tune's view of a slot. Runs in the slot's process; reused for one trial after another."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self.notice, self.node = Notice(), ray.get_runtime_context().get_node_id()
        self._take(config)
        # What is imported by now stays: collecting it again between trials would take longer than a small trial.
        gc.freeze()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let go of the last trial and take the next."""
        self.cleanup()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Pull one epoch, unless this machine is about to go."""
        self.notice.mind([self.node])
        try:
            with self.watchdog.watching(self.run.limit_s()):
                epoch, metrics, outcome = self.run.step()
        except DiskError as error:
            return {"trial": self.run.number, "halt": str(error)}
        if outcome is not None:
            self.run.close()
        return result(self.run.number, epoch, metrics, outcome)

    def cleanup(self) -> None:
        """Let go of the last trial."""
        self.run.close()
        self.watchdog.close()

    def _take(self, order: Mapping[str, Any]) -> None:
        self.run = TrialRun(order)
        self.watchdog = Watchdog(self.run.folder / watchdog.FILE, fatal=True)


def result(number: int, epoch: int, metrics: Mapping[str, float], outcome: Outcome | None) -> dict[str, Any]:
    """Return what Ray Tune is told of a step: flat, since Ray Tune flattens what is not."""
    told: dict[str, Any] = {"trial": number, "epoch": epoch, "metrics_json": json.dumps(metrics)}
    if outcome is not None:
        told["outcome_json"] = json.dumps(asdict(outcome))
    return told
