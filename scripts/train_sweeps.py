"""Search what a W&B sweep file asks, on satellite tiles: `tune.py --space FILE --workload esd`.

Flags that are not listed here go to tune.py as they are, such as --set search.trials=40 or --runs FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# As `python scripts/train_sweeps.py` the search path begins in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tune
from workloads._esd import original
from workloads._esd.original import ESDConfig


def main(flags: list[str] | None = None) -> int:
    """Search, and return the exit code."""
    told, rest = _parse(sys.argv[1:] if flags is None else flags)
    data = original.folders(ESDConfig(raw_dir=told.raw_dir, processed_dir=told.processed_dir))
    values = {key: value for key, value in data.items() if value}
    if told.count is not None:
        values["search.trials"] = str(told.count)
    if told.time is not None:
        values["search.wall_time_s"] = str(told.time)
    changes = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return tune.main(["--space", str(_found(told.sweep_file)), "--workload", "esd", *changes, *rest])


def _found(file: Path) -> Path:
    """Return a sweep file, or the one of that name that comes with these scripts."""
    ours = Path(__file__).parent / "sweeps" / file
    return ours if not file.exists() and ours.exists() else file


def _parse(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="scripts.train_sweeps", description=__doc__)
    parser.add_argument(
        "--sweep_file", type=Path, default=Path("sweeps.yml"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--count", type=int, metavar="N", help="trials in all (default: the file's run_cap, or 32)")
    parser.add_argument("--time", type=float, metavar="S", help="start no trial after so many seconds")
    defaults = ESDConfig()
    for name in ("raw_dir", "processed_dir"):
        parser.add_argument(f"--{name}", type=Path, default=getattr(defaults, name), help="default: %(default)s")
    return parser.parse_known_args(flags)


if __name__ == "__main__":
    sys.exit(main())
