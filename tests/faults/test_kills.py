"""Processes are killed with SIGKILL at random moments: the driver, slots, and ranks of gangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _gangs, _searches, kills
from benchmarks.gang_stop import Killer
from search import epochs
from search.record import StudyPaths, TrialRecord
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.ray]


@pytest.fixture(scope="module")
def killed(ray_address: str) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Return what gives the counts of a seed's search: the first with a Ray of its own, beside it the others on one."""
    with ThreadPoolExecutor(1) as own, ThreadPoolExecutor(1) as shared:
        found = [own.submit(_killed, 0, ""), *(shared.submit(_killed, seed, ray_address) for seed in (1, 2))]
        yield lambda seed: found[seed].result()
        for one in found:
            one.cancel()


@pytest.mark.timeout(500)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.row("F1")
def test_a_killed_driver_loses_and_repeats_nothing(
    tell: Tell, killed: Callable[[int], dict[str, Any]], seed: int
) -> None:
    """With a Ray of its own that dies too, as on a laptop, and on one that goes on, as on a cluster."""
    counted = killed(seed)
    hit = counted.pop("while_running")
    tell("driver killed", f"seed {seed}", **counted)
    assert counted["kills"] == 10 and hit >= 3, "the search ended too soon, or was never hit at work"


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("who", "count"), [("slot", 5), ("rank", 5)])
@pytest.mark.row("F3")
def test_a_killed_slot_or_rank_costs_one_epoch_at_most(tell: Tell, tmp_path: Path, who: str, count: int) -> None:
    run, victims = {"slot": (_slots, _gangs.SLOT), "rank": (_ranks, _gangs.WORKER)}[who]
    killer = Killer(StudyPaths(tmp_path / "study"), count, seed=1, victims=victims)
    killer.start()
    try:
        paths, records = run(tmp_path)
    finally:
        killer.ended.set()
        killer.join()
    unfinished = sum(record.state != "complete" for record in records)
    redone = max(killer.redone, default=0)
    tell(
        f"{who} killed", f"{len(killer.gaps)} kills", kills=len(killer.gaps), unfinished=unfinished, most_redone=redone
    )
    for record in records:
        rows = epochs.read(paths.trial(record.number))
        assert [row.epoch for row in rows] == list(range(1, len(record.epochs) + 1)), "each epoch stands there once"
        assert record.attempts <= 1 + len(killer.gaps)


def _killed(seed: int, address: str) -> dict[str, Any]:
    return kills.measure(kills=10, trials=40, epoch_s=0.25, longest_s=3.0, seed=seed, at_work=0.6, address=address)


def _slots(folder: Path) -> tuple[StudyPaths, list[TrialRecord]]:
    content = {
        **_searches.TOY,
        "fixed": {"epochs": 10, "epoch_s": 0.4},
        "search": {"trials": 8, "sampler": "random"},
        "stopping": {"rule": "none"},
        "resources": {"slots": 1, "max_attempts": 6},
    }
    return _searches.search(folder, content)


def _ranks(folder: Path) -> tuple[StudyPaths, list[TrialRecord]]:
    return _searches.search(folder, _gangs.content(4, epochs=10, epoch_s=0.4, max_attempts=6))
