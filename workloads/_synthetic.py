"""Generated data for whoever has none: made once for each configuration, in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segmentation.epoch import DataError


def folder(workload: str, version: int, config: Any, cache: Path) -> Path:
    """Return where the data of a configuration, a dataclass, lies in a cache folder."""
    text = json.dumps({"version": version, **asdict(config)}, sort_keys=True)
    return cache / f"{workload}-synthetic-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def ensure(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder with the data, made first if it is not there.

    It appears under its name only when it is whole, so a killed or a concurrent maker leaves nothing half done.

    Raises:
        DataError: if the cache folder cannot be written.
    """
    if target.is_dir():
        return target
    making = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    try:
        make(making)
        making.rename(target)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        if not target.is_dir():
            remedy = "set data.root to your own pictures, or SEGMENTATION_CACHE to a folder that can be written"
            raise DataError(f"{target.parent}: cannot write the synthetic pictures ({error}); {remedy}") from error
    return target
