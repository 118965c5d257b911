"""What every test relies on: a Ray that stays on this machine, and warnings that fail."""

from __future__ import annotations

import warnings
from pathlib import Path

import psutil
import pytest


@pytest.mark.ray
def test_ray_works_and_listens_on_loopback_only(ray_cluster: None) -> None:
    import ray

    assert ray.get(ray.remote(lambda: 3).remote()) == 3
    family = psutil.Process().children(recursive=True)
    listening = [
        connection.laddr.ip
        for process in family
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="as an error"):
        warnings.warn("seen as an error", stacklevel=1)


@pytest.mark.shared_data
def test_shared_data_is_the_documented_folder(shared_data: Path) -> None:
    assert (shared_data / "README.md").is_file()
