"""requirements.lock is whole: every dependency pinned and hashed, and no address of anybody's index in it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
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


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("none", ""),
        ("a digit of the hash in the lock", "do not match the hashes"),
        ("a byte of the package", "do not match the hashes"),
        ("no hash", "hashes are required in --require-hashes mode"),
    ],
)
@pytest.mark.row("N5")
def test_a_tampered_hash_stops_the_installation(tmp_path: Path, change: str, problem: str) -> None:
    """With the flags of the Makefile, on a package made here, so that no index is asked."""
    wheel, target = _wheel(tmp_path), tmp_path / "target"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if change == "a byte of the package":
        wheel.write_bytes(wheel.read_bytes() + b"x")
    if change == "a digit of the hash in the lock":
        digest = ("1" if digest[0] == "0" else "0") + digest[1:]
    lock = tmp_path / "requirements.lock"
    lock.write_text("tiny==1.0\n" if change == "no hash" else f"tiny==1.0 \\\n    --hash=sha256:{digest}\n")
    (flags,) = re.findall(r"pip (install .*) -r requirements\.lock", (ROOT / "Makefile").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pip", *flags.split(), "-r", str(lock), "--target", str(target)]
    command += ["--no-index", "--no-cache-dir", "--find-links", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert problem in " ".join(done.stderr.lower().split())
    assert (done.returncode == 0) == (target / "tiny.py").exists() == (change == "none"), done.stderr


def _wheel(folder: Path) -> Path:
    path, notes = folder / "tiny-1.0-py3-none-any.whl", "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr(f"{notes}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{notes}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{notes}/RECORD", f"tiny.py,,\n{notes}/METADATA,,\n{notes}/WHEEL,,\n{notes}/RECORD,,\n")
    return path
