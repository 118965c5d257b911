"""What the tests of faults share: the table of what was counted, and a study in which faults can be made to happen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults.studies import FaultyStudy, MakeStudy
from tests.faults.table import Table, Tell

TABLE = pytest.StashKey[Table]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Return a function that puts counts into a row of the table, and fails where they are worse than its bar."""
    return request.config.stash.setdefault(TABLE, Table()).tell


@pytest.fixture(scope="session")
def ray_address(ray_cluster: None) -> str:
    """Return where the tests' own Ray is."""
    import ray

    return ray.get_runtime_context().gcs_address


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where $FAULTS_OUT says."""
    table = config.stash.get(TABLE, None)
    if table is None or not table.counts:
        return
    terminalreporter.section("nothing lost")
    for line in table.lines():
        terminalreporter.write_line(line)
    if where := os.environ.get("FAULTS_OUT"):
        Path(where).write_text(json.dumps(table.plain(), indent=1) + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add to the table what one of several processes was told."""
    node.config.stash.setdefault(TABLE, Table()).add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of all tests where a row counted too little, such as too few kills; a worker hands its part on."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = session.config.stash.setdefault(TABLE, Table()).plain()
        return
    table, options = session.config.stash.get(TABLE, None), session.config.option
    part = options.keyword or any("::" in argument or argument.endswith(".py") for argument in session.config.args)
    if table is not None and not part and not table.holds() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def make_study(tmp_path: Path, ray_address: str) -> MakeStudy:
    """Return a function that makes a study in a folder of the test."""
    return lambda name="mine", **sections: FaultyStudy(tmp_path / name, ray_address, **sections)
