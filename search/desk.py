"""Who hears what happens in a search, and keeps the screen, TensorBoard, loggers and the disk up to date."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, TextIO

import configuration
from search import epochs, ranking, trial, workload
from search.errors import is_disk
from search.metrics import Figures
from search.progress import Progress
from search.queues import Alone, Turn
from search.record import TrialRecord
from search.results import leaderboard, tensorboard, tracking
from search.study import Study

logger = logging.getLogger(__name__)


class Desk:
    """The executor's listener. Lives in the driver."""

    def __init__(self, study: Study, stream: TextIO, turn: Alone | Turn) -> None:
        records = study.records()
        self.study, self.spec, self.turn = study, study.spec, turn
        self.figures = Figures(study.label, study.spec.workload)
        self.figures.states.update(record.state for record in records if record.finished is not None)
        self.progress = Progress(study.spec, stream, records)
        self.kept = {record.number: record for record in records if record.checkpoint is not None}
        promoted = leaderboard.read_promotion(study.paths)["promoted"]
        self.chosen = {item["trial"] for item in promoted if item.get("by") == "hand"}
        self.events = study.spec.tracking.tensorboard
        if self.events:
            module = workload.load(study.spec.workload)
            reported = module.metrics(configuration.build(module.Config, study.spec.fixed))
            tensorboard.experiment(study.paths.folder, study.spec, reported)

    def trial_started(self, number: int, params: dict[str, Any]) -> None:
        """Show the trial as running."""
        self.progress.trial_started(number, params)
        folder = self.study.trial_folder(number)
        self.figures.trial_started(number, trial.attempts(folder) if folder.exists() else 0)
        folder.mkdir(parents=True, exist_ok=True)
        if self.events:
            tensorboard.session_start(folder, number, params)

    def trial_placed(self, number: int) -> None:
        """Count it as running."""
        self.figures.trial_placed(number)

    def trial_retried(self, number: int, reason: str) -> None:
        """Count it as waiting again."""
        self.figures.trial_retried(number, reason)

    def trial_epoch(self, number: int, epoch: int, values: tuple[float, ...], metrics: dict[str, float]) -> None:
        """Show how far it is."""
        self.progress.trial_epoch(number, epoch, values, metrics)
        self.figures.trial_epoch()

    def trial_ended(self, record: TrialRecord) -> None:
        """Show how it ended, send it to the loggers, and hold the quota of checkpoints."""
        self.progress.trial_ended(record)
        self.figures.trial_ended(record)
        folder = self.study.trial_folder(record.number)
        if self.events:
            best = {o.metric: record.metrics[o.metric] for o in self.spec.objectives if o.metric in record.metrics}
            tensorboard.session_end(folder, record.state, best, record.best_epoch)
        self._log(record, folder)
        self._keep(record)
        self.study.paths.store.push(folder, skip=lambda name: not name.startswith("events."))

    def tick(self) -> None:
        """Draw the screen anew where it is time, and tell the cluster what is wanted and how it goes."""
        now = time.monotonic()
        self.progress.tick(now)
        self.turn.tick(lambda: len(self.progress.state.running) + self.study.left())
        self.figures.slots = self.turn.slots
        self.figures.tick(now)

    def close(self) -> None:
        """Give the terminal back."""
        self.progress.close()
        self.figures.flush(time.monotonic())

    def _log(self, record: TrialRecord, folder: Path) -> None:
        """Send a trial to the loggers; one that cannot be reached costs its entry, not the search."""
        try:
            tracking.log_trial(
                self.spec.tracking,
                self.spec,
                record,
                epochs.read(folder),
                [folder / "config.json", folder / epochs.FILE],
                folder=self.study.paths.folder / "wandb",
            )
        except Exception as error:
            if is_disk(error):
                raise
            logger.warning("trial %s is not in the logger: %s: %s", record.number, type(error).__name__, error)

    def _keep(self, record: TrialRecord) -> None:
        """Hold the study to its quota of checkpoints: the best few, the first trial's, and those chosen by hand."""
        self.kept[record.number] = record
        order = ranking.ranked(self.kept.values(), self.spec.objectives)
        quota = max(self.spec.evaluation.keep_checkpoints, self.spec.promotion.k)
        front = ranking.pareto(order, self.spec.objectives) if self.spec.promotion.rule == "pareto" else []
        incumbent = [kept for kept in self.kept.values() if kept.is_incumbent]
        wanted = {kept.number for kept in (*order[:quota], *front, *incumbent)} | self.chosen
        for number in self.kept.keys() - wanted:
            self.study.forget_checkpoint(number)
        self.kept = {number: kept for number, kept in self.kept.items() if number in wanted}
