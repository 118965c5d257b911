"""Driver and slot die at one point of a trial's way; the same command ends with what an unbroken run finds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.faulty import POINTS
from tests.faults.studies import FaultyStudy, Finished, MakeStudy
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]

TRIALS = 4
TIMES = {"ask": 2 * TRIALS, "mid": 3 * TRIALS, "before promotion": 1}
"""How often a run comes to a point; to all others once a trial."""


@pytest.fixture(scope="module", params=range(3))
def seed(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, ray_address: str, seed: int) -> Finished:
    """Return what a search finds that nothing happens to."""
    study = FaultyStudy(tmp_path_factory.mktemp("unbroken"), ray_address, seed)
    assert study.run() == 0, study.said()
    assert sorted(study.finished()) == list(range(TRIALS))
    return study.finished()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.row("F2")
def test_a_crash_at_any_point_changes_nothing(
    unbroken: Finished, make_study: MakeStudy, tell: Tell, point: str, seed: int
) -> None:
    study = make_study(seed=seed)
    time = random.Random(f"{point} {seed}").randint(1, TIMES.get(point, TRIALS))
    code = study.run(crash=f"{point} {time}")
    assert (code, study.has_crashed()) == (-9, True), study.said()
    before = study.committed()

    assert study.run() == 0, study.said()

    same = study.finished() == unbroken
    tell("crash at nine points", f"{point} {seed}", crashes=1, same=same)
    assert study.finished() == unbroken
    assert before.items() <= study.committed().items(), "what was committed was not run again"
    assert set(study.evaluated()) == {*study.promoted(), 0}
    assert _is_clean(study.paths.folder)


def _is_clean(folder: Path) -> bool:
    """Return whether no trial has an empty file under a name that is read."""
    return all(path.stat().st_size > 0 for path in folder.glob("trials/*/*.json"))
