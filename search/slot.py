"""A slot: the warm process in which trials of one worker run, one after another.

It pulls the workload's epochs one by one inside Ray Tune's `step`, so that a stop is simply not pulling any more:
there is no thread, and nothing trains on. What it learns it writes to the trial's folder first and reports second.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from typing import Any

from ray import tune

from search.errors import DiskError
from search.trial import TrialRun


class Slot(tune.Trainable):
    """Ray Tune's view of a slot. Runs in the slot's process; reused for one trial after another."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self.run = TrialRun(config)
        # What is imported by now stays: collecting it again between trials would take longer than a small trial.
        gc.freeze()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let go of the last trial and take the next."""
        self.run.close()
        self.run = TrialRun(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Pull one epoch."""
        try:
            epoch, metrics, outcome = self.run.step()
        except DiskError as error:
            return {"trial": self.run.number, "halt": str(error)}
        result: dict[str, Any] = {"trial": self.run.number, "epoch": epoch, "metrics_json": json.dumps(metrics)}
        if outcome is not None:
            self.run.close()
            result.update(outcome_json=json.dumps(asdict(outcome)))
        return result

    def cleanup(self) -> None:
        """Let go of the last trial."""
        self.run.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: trials keep their checkpoints themselves."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: a trial resumes from its folder."""
