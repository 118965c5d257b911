"""Train a network on satellite tiles, told by the ESD project's flags; checkpoints go to models/MODEL_TYPE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# As `python scripts/train.py` the search path begins in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads.__main__ import main as run
from workloads._esd import original
from workloads._esd.original import ESDConfig
from workloads._run import RUN_FILE


def main(flags: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    try:
        told = original.parse(ESDConfig, sys.argv[1:] if flags is None else flags, "scripts.train")
        values = {**original.values(told), "trainer": "lightning"}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    _put_aside(told.models)
    changes = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return run(["train", "esd", "--out", str(told.models), *changes])


def _put_aside(folder: Path) -> None:
    """Rename the run that a folder holds: the project's script wrote over it, here nothing is lost."""
    if not (folder / RUN_FILE).exists():
        return
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(other)
    print(f"{folder}: the run that was there is now {other}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
