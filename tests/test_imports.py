"""Imports run one way: tune -> search, workloads -> segmentation; what all may import imports nothing of ours."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("segmentation", "search", "workloads", "cluster")
OURS = {*PACKAGES, "benchmarks", "tests", "tune", "configuration", "durable"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import linter on a copy of the repository, or on the repository itself."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_the_repository_keeps_its_contracts() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("segmentation/epoch.py", "import ray", "segmentation is plain PyTorch"),
        ("segmentation/epoch.py", "from search.record import TrialRecord", "segmentation is plain PyTorch"),
        ("segmentation/epoch.py", "def late() -> None:\n    import optuna", "segmentation is plain PyTorch"),
        ("search/record.py", "import torch.nn", "search never names a tensor"),
        ("search/record.py", "import workloads", "search never names a tensor"),
        ("search/record.py", "from cluster import files", "search never names a tensor"),
        ("cluster/files.py", "import workloads.toy", "cluster knows search spaces, not what is trained"),
        ("workloads/toy.py", "from ray import tune", "workloads know nothing of the search"),
        ("workloads/toy.py", "from search import spec", "workloads know nothing of the search"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout


@pytest.mark.parametrize("module", ["configuration.py", "durable.py"])
def test_what_all_may_import_imports_nothing_of_ours(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & OURS
