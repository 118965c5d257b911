"""A study as anyone may look at it while another process writes it: nothing is held, mended or told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

import durable
from search import ranking, study_spec
from search.errors import StudyError
from search.record import State, StudyPaths, TrialRecord
from search.results import leaderboard
from search.results.leaderboard import Row
from search.spec import SearchSpec
from search.storage import address, holder
from search.storage.holder import Holder
from search.study import Study

if TYPE_CHECKING:
    from search.storage.database import View

Standing = Literal["running here", "running elsewhere", "complete", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Glance:
    """All that is known of a study from its folder."""

    paths: StudyPaths
    spec: SearchSpec
    resolved: dict[str, Any]
    """spec.yaml: the spec and what else the study depends on."""
    records: list[TrialRecord]
    holder: Holder | None

    @property
    def counts(self) -> Counter[State]:
        """Return how many trials are in each state."""
        return Counter(record.state for record in self.records)

    @property
    def standing(self) -> Standing:
        """Say whether somebody works at it, or all is done."""
        if self.holder is not None:
            return "running here" if self.holder.is_here else "running elsewhere"
        open_ = self.counts["running"] + self.counts["waiting"]
        return "complete" if not open_ and self._decided() == len(self.records) else "interrupted"

    @property
    def best(self) -> TrialRecord | None:
        """Return the best trial that has finished."""
        return ranking.best(self.records, self.spec.objectives)

    @property
    def slot_hours(self) -> float:
        """Return how long slots have worked on its trials."""
        return sum(record.slot_s for record in self.records) / 3600

    @property
    def begun(self) -> float:
        """Return when its first trial started, or else its folder was made, in seconds since 1970."""
        started = [record.started.timestamp() for record in self.records if record.started is not None]
        return min(started, default=self.paths.spec.stat().st_mtime)

    def rows(self) -> list[Row]:
        """Return its leaderboard as it stands, also before the search has ended."""
        promoted = leaderboard.read_promotion(self.paths)
        numbers = {item["trial"] for item in promoted["promoted"]} | {promoted["incumbent"]}
        evaluations = [item for item in leaderboard.read_evaluations(self.paths) if item["trial"] in numbers]
        return leaderboard.rows(self.spec, self.records, promoted, evaluations)

    def _decided(self) -> int | None:
        """Return of how many trials the promoted were chosen when the search had ended."""
        found: int | None = leaderboard.read_promotion(self.paths).get("trials")
        return found


def at(paths: StudyPaths) -> Glance:
    """Return a study as it is now.

    Raises:
        StudyError: if there is none, or it cannot be read.
    """
    spec, resolved = study_spec.read(paths)
    view = _view(paths, spec)
    records = _Reader(paths, spec, view).records()
    return Glance(paths=paths, spec=spec, resolved=resolved, records=records, holder=_holder(paths, view))


def held_by(paths: StudyPaths) -> Holder | None:
    """Return who holds a study. Raises as `at` does."""
    return _holder(paths, _view(paths, study_spec.read(paths)[0]))


def all_below(runs: Path) -> list[StudyPaths]:
    """Return the studies of a folder, in order of their names."""
    return [StudyPaths(path.parent) for path in sorted(runs.glob(f"*/{StudyPaths(runs).spec.name}"))]


def _view(paths: StudyPaths, spec: SearchSpec) -> View | None:
    """Return the database that has the study's record; None: its folder has."""
    if not paths.identity.exists():
        return None
    url = address.resolve(spec.search.storage)
    if url is None:
        raise StudyError(f"{paths.folder}: its record is in a database; name it by {address.VARIABLE}")
    from search.storage.database import View

    return View(url, durable.read_json(paths.identity)["id"])


def _holder(paths: StudyPaths, view: View | None) -> Holder | None:
    return holder.of(paths) or (view.holder() if view is not None else None)


class _Reader(Study):
    """A study's records. Does none of what opening a study to write it does."""

    def __init__(self, paths: StudyPaths, spec: SearchSpec, view: View | None) -> None:
        self.paths, self.spec, self.name, self._folder = paths, spec, spec.name, "trials"
        storage = view.storage if view is not None else JournalStorage(_Lines(paths.journal))
        try:
            self.optuna = optuna.load_study(
                storage=storage, study_name=view.study_name(self.name) if view else self.name
            )
        except (KeyError, FileNotFoundError):  # nothing tried yet
            self.optuna = optuna.create_study(directions=["minimize"] * len(spec.objectives))
        except (ValueError, AssertionError) as error:
            problem = f"{paths.journal}: cannot be read ({error})"
            raise StudyError(f"{problem}; the search's own command mends it, or says what to do") from error


class _Lines(BaseJournalBackend):
    """A journal's whole lines; the last one may be half written while somebody reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the entries from a number on."""
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True)):
            if number >= log_number_from and line.endswith(b"\n"):
                yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse: whoever looks writes nothing."""
        raise AssertionError(f"{self._path}: opened to be read only")
