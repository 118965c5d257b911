"""The same, with a summary that is made of all shares at the end."""

from __future__ import annotations

from pathlib import Path

from tests.search.sharded import Config, evaluate, inspect, metrics, predict, prepare, train

__all__ = ["Config", "evaluate", "inspect", "merge", "metrics", "predict", "prepare", "sources", "train"]


def sources(source: Path) -> list[Path]:
    """Return the pictures alone."""
    return sorted(path for path in source.rglob("*.png") if not path.name.startswith("."))


def merge(out_dir: Path, source: Path) -> list[Path]:
    """Write the summary of all pictures."""
    path = out_dir / "summary.csv"
    path.write_text("".join(f"{each.relative_to(source)}\n" for each in sources(source)))
    return [path]
