"""Score a checkpoint on satellite tiles, told by the ESD project's flags; all goes to data/predictions/MODEL_TYPE."""

from __future__ import annotations

import sys
from pathlib import Path

# As `python scripts/evaluate.py` the search path begins in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads.__main__ import main as run
from workloads._esd import original
from workloads._esd.original import EvalConfig


def main(flags: list[str] | None = None) -> int:
    """Evaluate, and return the exit code."""
    try:
        told = original.parse(EvalConfig, sys.argv[1:] if flags is None else flags, "scripts.evaluate")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    values = {**original.folders(told), "evaluation_batch": told.batch_size, "loader_workers": told.num_workers}
    values["device"] = "cpu" if told.accelerator == "cpu" else "auto"
    changes = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return run(
        ["evaluate", "esd", str(_folder(told.checkpoint)), "--split", told.split, "--out", str(told.results), *changes]
    )


def _folder(checkpoint: Path) -> Path:
    """Return the checkpoint folder that a path of the project, such as models/UNet/last.ckpt, stands for."""
    return checkpoint.with_suffix("") if checkpoint.suffix == ".ckpt" else checkpoint


if __name__ == "__main__":
    sys.exit(main())
