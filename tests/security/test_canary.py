"""A secret of whoever starts a search is in nothing that the search or its Ray leaves behind."""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAMES = ("AWS_SECRET_ACCESS_KEY", "TUNE_TEST_TOKEN", "WANDB_API_KEY", "DATABASE_PASSWORD", "RAY_AUTH_TOKEN")


@pytest.fixture
def short() -> Iterator[Path]:
    """Return a folder whose path is short enough for the sockets that Ray makes in it."""
    folder = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("fixed.fail=error", "fixed.fail_epoch=3", "resources.max_attempts=1"),
    ],
    ids=["trials", "trials that fail"],
)
@pytest.mark.row("N4")
def test_a_secret_of_the_environment_is_left_nowhere(tmp_path: Path, short: Path, changes: tuple[str, ...]) -> None:
    canary = f"canary{secrets.token_hex(16)}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= dict.fromkeys(NAMES, canary) | {"RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(short)}
    settings = [word for change in ("search.trials=6", *changes) for word in ("--set", change)]
    command = [sys.executable, "tune.py", "--space", "toy.yaml", "--runs", str(tmp_path / "runs"), *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=200, check=False)
    assert done.returncode == (1 if "fixed.fail=error" in changes else 0), done.stderr.decode()
    logs = list(short.rglob("*.log"))
    left = [path for path in (*short.rglob("*"), *(tmp_path / "runs").rglob("*")) if path.is_file()]
    assert len(logs) >= 3, "the logs of Ray's own processes were looked through"
    assert any(path.name.startswith("events.out.tfevents") for path in left)
    assert any(path.name == "study.journal" for path in left)
    assert [path for path in left if canary.encode() in _content(path)] == []
    assert canary.encode() not in done.stdout + done.stderr


@pytest.mark.row("N4")
def test_a_canary_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b"xx canary xx"))
    (tmp_path / "b").write_bytes(b"xx canary xx")
    assert all(b"canary" in _content(path) for path in tmp_path.iterdir())


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
