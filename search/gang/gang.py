"""A gang as Ray Tune sees it: a slot whose trials run in several workers at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

from search import epochs, logs, trial, watchdog
from search.drain import Notice
from search.errors import DiskError
from search.gang.crew import Crew, Hung, RankDied, TrialError
from search.resources import worker
from search.slot import KeepsItself, result
from search.spec import Objective, Resources
from search.study import Outcome, outcome_from, read_outcome

logger = logging.getLogger(__name__)


class Gang(KeepsItself):
    """Ray Tune's view of a gang. Its process starts the workers once and gives them one trial after another."""

    deaths: int

    def setup(self, config: dict[str, Any]) -> None:
        """Start the workers, and take the first trial."""
        self.notice = Notice()
        resources = Resources(**config["resources"])
        wanted = {name: amount for name, amount in worker(resources).items() if amount}
        self.crew = Crew(resources.workers, wanted, get_node_ip_address(), Path(config["scratch"]))  # type: ignore[no-untyped-call]
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Let go of the last trial and take the next; the workers stay."""
        self.crew.close_trial()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Have all workers pull one epoch, unless one of their machines is about to go."""
        self.notice.mind(self.crew.nodes)
        if self.outcome is not None:
            time.sleep(trial.POLL_S)
            return self._ended(self.outcome)
        while True:
            try:
                return self._step()
            except RankDied as death:
                self.begun, self.deaths = False, self.deaths + 1
                if death.memory:
                    return self._failed(f"out of memory: {death}, killed by Ray before its machine ran out of it", "")
                if self.deaths == self.order["resources"]["max_attempts"]:
                    return self._failed(f"{death}, the last of {self.deaths} times", "")
            except Hung as error:
                logger.warning("trial %s: %s", self.number, error)
                return self._failed(f"{watchdog.reason(self._limit_s())}; {error}", watchdog.stacks(self.folder))
            except TrialError as error:
                if error.told["superseded"]:
                    raise
                if error.told["micro_batch"]:
                    logger.warning("trial %s: %s", self.number, error.told["reason"])
                    trial.change(self.folder, {"micro_batch": error.told["micro_batch"]})
                    self.begun = False
                    continue
                self.crew.close_trial()
                return self._failed(error.told["reason"], error.told["trace"])
            except DiskError as error:
                return {"trial": self.number, "halt": str(error)}

    def cleanup(self) -> None:
        """End the workers."""
        self.crew.quit()

    def _take(self, order: Mapping[str, Any]) -> None:
        logs.in_worker(order, rank=None)
        self.order = dict(order)
        self.number: int = order["number"]
        self.folder = Path(order["folder"])
        self.outcome = read_outcome(self.folder)
        self.begun, self.deaths = False, 0
        self.epochs_s = [row.seconds for row in epochs.read(self.folder)]

    def _step(self) -> dict[str, Any]:
        if not self.begun:
            self.crew.begin(self.order)
            self.begun = True
        began = time.monotonic()
        told = self.crew.step(self._limit_s())
        self.epochs_s.append(time.monotonic() - began)
        if told["outcome"] is not None:
            self.outcome = outcome_from(told["outcome"])
            self.crew.close_trial()
        return result(self.number, told["epoch"], told["metrics"], self.outcome)

    def _limit_s(self) -> float:
        return watchdog.limit_s(self.order["resources"]["hung_after_s"], self.epochs_s)

    def _failed(self, reason: str, trace: str) -> dict[str, Any]:
        objectives = [Objective(**objective) for objective in self.order["objectives"]]
        self.outcome = trial.fail(self.folder, objectives, reason, trace)
        return self._ended(self.outcome)

    def _ended(self, outcome: Outcome) -> dict[str, Any]:
        return result(self.number, trial.last_epoch(outcome), {}, outcome)
