"""Shared by all tests: where the development data lies, and the one Ray cluster of a session."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Ray reads these once, when it is first imported: nothing listens beyond loopback, the token is this session's own
# instead of a file in the home folder, and no usage figures are sent. Tests that start `ray` themselves inherit them;
# `ray start` wants the first one unset.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
if "RAY_AUTH_MODE" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of development data; it is no part of the repository, and absent on most machines."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development data in {folder}; set SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded data out of the home folder, and for one file of tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGMENTATION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def sigterm_as_before() -> Iterator[None]:
    """Put back what a command does with SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start one Ray with two CPUs, reachable from this machine only, and stop it when the session ends."""
    import ray

    ray.init(
        "local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=150_000_000,
    )
    yield
    ray.shutdown()
