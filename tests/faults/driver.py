"""`tune.py` in the Ray that the tests hold, so that it starts quickly: a study is broken and gone on with many times.

What is tested on the command itself, with a Ray of its own, are kills of the driver, signals, and the full disk.
"""

from __future__ import annotations

import os

import ray

import tune
from search import ray_session


def main(arguments: list[str]) -> int:
    """Connect, so that the search takes this Ray for its own and has no queue to wait in, and run it."""
    address = os.environ.pop("RAY_ADDRESS")
    ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=ray_session.runtime_env())
    return tune.main(arguments)
