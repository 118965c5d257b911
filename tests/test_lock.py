"""requirements.lock is whole: every dependency pinned and hashed, and no address of anybody's index in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINNED = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", LOCK, re.M)}


def test_every_dependency_is_pinned_to_a_version_it_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    assert len(wanted) > 30
    for requirement in wanted:
        version = PINNED.get(canonicalize_name(requirement.name))
        assert version, f"{requirement} is not locked; run make lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} is not {version}; run make lock"
        )


@pytest.mark.row("P37")
def test_the_packaging_says_which_python_and_pytorch_are_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert project["requires-python"] == ">=3.11"
    assert PINNED["torch"] in wanted["torch"] and "1.13" not in wanted["torch"]


def test_every_pin_has_a_hash() -> None:
    blocks = re.split(r"^(?=[A-Za-z])", LOCK, flags=re.M)[1:]
    assert len(blocks) == len(PINNED)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_no_address_and_no_path_is_in_the_lock() -> None:
    assert not re.search(r"://|file:/|--\w*index|--find-links|--trusted-host|^\s*#.*/", LOCK, re.M)


def test_the_gpu_build_of_torch_is_locked() -> None:
    assert "+" not in PINNED["torch"]
    assert [name for name in PINNED if name.startswith("nvidia-cudnn")]
