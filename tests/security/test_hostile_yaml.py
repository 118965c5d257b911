"""YAML that runs code, swells, or takes for ever: refused by every reader at once, and nothing is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import configuration
from configuration import ConfigError, YamlError
from search import spec_file, study_spec
from search.errors import SpecError, StudyError
from search.record import StudyPaths
from tests.security.conftest import Within
from workloads._acdc import original

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "a call": "a: !!python/object/apply:os.mkdir [MARK]\n",
    "a call by another spelling": 'a: !<tag:yaml.org,2002:python/object/new:os.mkdir> ["MARK"]\n',
    "a call under a tag of its own": "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.mkdir [MARK]\n",
    "a module": "a: !!python/module:antigravity\n",
    "a name": "a: !!python/name:os.system\n",
    "a tag of its own": "a: !secret x\n",
    "a billion laughs": LAUGHS,
    "laughs by merging": LAUGHS.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace(": &b", ": &b ") + "<<: *b\n",
    "a list in itself": "a: &a [*a]\n",
    "a chain of aliases": "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(20_000)),
    "brackets without end": "[" * 900_000,
    "braces without end": "{a: " * 200_000,
    "brackets that end": "a: " + "[" * 2000 + "]" * 2000,
    "dashes": "- " * 400_000,
    "many keys, not too many": "".join(f"a{n}: 1\n" for n in range(9_900)),
    "many keys": "".join(f"a{n}: 1\n" for n in range(90_000)),
    "one key many times": "a: 1\n" * 9_900,
    "a long number": "a: " + "9" * 900_000,
    "a long number of base 60": "a: 1" + ":59" * 300_000,
    "a long number by its tag": "a: !!int " + "1" * 900_000,
    "a number that is none": "a: !!int x\n",
    "a time that is none": "a: !!timestamp x\n",
    "a day that is none": "a: 2024-13-41\n",
    "a truth that is none": "a: !!bool x\n",
    "a key that is a list": "? [a]\n: b\n",
    "a zero byte": "a: \x00\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "too large": "a: x\n" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.row("N2")
def test_hostile_yaml_is_refused_at_once_and_nothing_in_it_runs(tmp_path: Path, within: Within, name: str) -> None:
    path, mark = tmp_path / "space.yaml", tmp_path / "mark"
    path.write_text(HOSTILE[name].replace("MARK", str(mark)))
    with within(seconds=1, megabytes=200), pytest.raises(SpecError, match=r"^space\.yaml: ") as caught:
        spec_file.load(str(path))
    assert not mark.exists() and len(str(caught.value)) < 1000
    with within(seconds=1, megabytes=200), pytest.raises(ConfigError, match=r"space\.yaml: "):
        original.read(path)


@pytest.mark.parametrize("name", ["a call", "a billion laughs", "brackets that end", "a long number of base 60"])
def test_other_readers_refuse_it_too(tmp_path: Path, toy_spec: Any, within: Within, name: str) -> None:
    text, mark = HOSTILE[name].replace("MARK", str(tmp_path / "mark")), tmp_path / "mark"
    paths = StudyPaths(tmp_path)
    paths.spec.write_text(text)
    with within(seconds=1, megabytes=200):
        with pytest.raises(StudyError, match=r"(?s)spec\.yaml: .*--study NAME"):
            study_spec.write(paths, toy_spec, {}, {})
        with pytest.raises(ConfigError, match=r"^lr: cannot read .* as YAML; quote it") as caught:
            configuration.parse_assignment(f"lr={{{text}}}")
    assert not mark.exists() and len(str(caught.value)) < 200


def test_plain_yaml_is_read_as_ever() -> None:
    text = "a: 1\nb: [1.5, true, null, 'x']\nc: {d: 2024-01-02, e: 1.0e-3}\nt: '" + "9" * 5000 + "'\n"
    assert configuration.parse_yaml(text) == yaml.safe_load(text)
    assert configuration.parse_yaml("") is None
    written = yaml.safe_dump(json.loads(json.dumps({"a": {"b": [1, {"c": None}]}})))
    assert configuration.parse_yaml(written.encode()) == {"a": {"b": [1, {"c": None}]}}


def test_no_more_of_a_file_is_read_than_a_configuration_may_have(within: Within) -> None:
    with within(seconds=1, megabytes=50), pytest.raises(YamlError, match="larger than 1 MiB"):
        configuration.read_yaml(Path(os.devnull).with_name("zero"))


def test_no_other_code_reads_yaml() -> None:
    """A new reader that goes around the limits is found here."""
    root = Path(configuration.__file__).parent
    code = [path for part in ("search", "segmentation", "workloads") for path in (root / part).rglob("*.py")]
    found = [
        path.name
        for path in (*code, root / "tune.py")
        if "yaml.load" in (text := path.read_text()) or "safe_load" in text
    ]
    assert len(code) > 100 and found == []


@pytest.fixture
def toy_spec(tmp_path: Path) -> Any:
    path = tmp_path / "toy.yaml"
    path.write_text(
        "workload: toy\nobjective: {metric: score, mode: max}\nparameters: {lr: {type: float, low: 0.1, high: 1.0}}\n"
    )
    return spec_file.load(str(path))
