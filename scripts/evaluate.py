"""Score a checkpoint on satellite tiles, told by the ESD project's flags; all goes to data/predictions/MODEL_TYPE."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

# As `python scripts/evaluate.py` the search path begins in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads.__main__ import main as run
from workloads._esd import original
from workloads._esd.original import EvalConfig


def main(flags: list[str] | None = None) -> int:
    """Evaluate, and return the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            told = original.parse(EvalConfig, sys.argv[1:] if flags is None else flags, "scripts.evaluate")
            checkpoint = _folder(told.checkpoint, Path(scratch))
        except (ValueError, OSError) as error:
            print(f"scripts.evaluate: {error}", file=sys.stderr)
            return 2
        values = {
            **original.folders(told),
            "evaluation_batch": told.batch_size,
            "loader_workers": told.num_workers,
            "device": "cpu" if told.accelerator == "cpu" else "auto",
        }
        changes = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return run(["evaluate", "esd", str(checkpoint), "--split", told.split, "--out", str(told.results), *changes])


def _folder(checkpoint: Path, scratch: Path) -> Path:
    """Return a checkpoint folder, made in `scratch` of a file of Lightning's."""
    if checkpoint.suffix != ".ckpt":
        return checkpoint
    from workloads._esd.lightning import to_folder

    return to_folder(checkpoint, scratch / checkpoint.stem)


if __name__ == "__main__":
    sys.exit(main())
