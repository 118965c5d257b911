"""A cluster file as data: which of the kinds it is, and what it holds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import configuration
from search.errors import BadInput

Kind = Literal["cloud", "hosts", "kuberay", "slurm"]
RAY_KINDS = ("RayCluster", "RayJob")
SHORT_FLAGS = {
    "-A": "account",
    "-C": "constraint",
    "-G": "gpus",
    "-J": "job-name",
    "-N": "nodes",
    "-c": "cpus-per-task",
    "-e": "error",
    "-n": "ntasks",
    "-o": "output",
    "-p": "partition",
    "-q": "qos",
    "-t": "time",
    "-w": "nodelist",
}


@dataclass(frozen=True)
class ClusterFile:
    """One file, read."""

    path: Path
    kind: Kind
    text: str
    content: Mapping[str, Any]
    """cloud, hosts: the YAML. kuberay: its RayCluster or RayJob. slurm: the options of its #SBATCH lines."""
    beside: tuple[Mapping[str, Any], ...] = ()
    """kuberay: the other objects in the file."""

    @property
    def provider(self) -> str:
        """Where the launcher gets machines."""
        return str(mapping(self.content.get("provider")).get("type"))

    @property
    def ray(self) -> Mapping[str, Any]:
        """kuberay: what describes the Ray cluster, whether of a RayCluster or of a RayJob."""
        spec = mapping(self.content.get("spec"))
        return mapping(spec.get("rayClusterSpec")) if self.content.get("kind") == "RayJob" else spec

    @property
    def ray_key(self) -> str:
        """kuberay: where that stands."""
        return "spec.rayClusterSpec" if self.content.get("kind") == "RayJob" else "spec"


def read(path: Path) -> ClusterFile:
    """Return what a file holds.

    Raises:
        BadInput: if it is none of the kinds.
    """
    if path.stat().st_size > configuration.YAML_BYTES:
        raise BadInput(f"{path}: larger than 1 MiB; a cluster file is a page")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not text: {error}") from error
    if text.startswith("#!") or re.search(r"^#SBATCH", text, re.M):
        return ClusterFile(path, "slurm", text, sbatch_options(text))
    found = _documents(path, text)
    ray = [each for each in found if each.get("kind") in RAY_KINDS]
    if len(ray) == 1:
        return ClusterFile(path, "kuberay", text, ray[0], tuple(each for each in found if each is not ray[0]))
    if len(found) == 1 and "provider" in found[0]:
        provider = mapping(found[0]["provider"]).get("type")
        return ClusterFile(path, "hosts" if provider == "local" else "cloud", text, found[0])
    raise BadInput(
        f"{path}: no cluster file; expected one of Ray's launcher (with a key provider), one RayCluster or RayJob, "
        "or a script of #SBATCH lines"
    )


def _documents(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        found = [each for each in configuration.parse_documents(text) if each is not None]
    except configuration.YamlError as error:
        raise BadInput(f"{path}: {error}") from error
    if not all(isinstance(each, dict) for each in found):
        raise BadInput(f"{path}: expected keys and values; got {type(found[0]).__name__}")
    return found


def sbatch_options(text: str) -> dict[str, str]:
    """Return the options that Slurm reads: those before the first command."""
    options = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            for name, value in _flags(_words(line[len("#SBATCH") :])):
                options[name] = value
    return options


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that does not close: the shell will say so
        return line.split()


def _flags(words: list[str]) -> Iterator[tuple[str, str]]:
    index = 0
    while index < len(words):
        word = words[index]
        name, equals, value = word.partition("=")
        if not equals and index + 1 < len(words) and not words[index + 1].startswith("-"):
            index += 1
            value = words[index]
        yield SHORT_FLAGS.get(name, name.lstrip("-")), value
        index += 1


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a shell text; continued lines are one."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines if not line.lstrip().startswith("#") and (words := _words(line))]


def flag(words: list[str], name: str) -> str | None:
    """Return the value of a flag among the words of a command, given as `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        if word == name:
            return words[index + 1] if index + 1 < len(words) else ""
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, empty where something else came: what is wrong with it the schema says."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> list[Any]:
    """Return a list, empty where something else came."""
    return list(value) if isinstance(value, list | tuple) else []


def number(text: str | None, otherwise: float) -> float:
    """Return the number that a flag gives, or another where it gives none, or a shell's variable."""
    try:
        return float(text or "")
    except ValueError:
        return otherwise


def whole(value: Any, otherwise: int = 0) -> int:
    """Return a whole number, also where it is written as text."""
    if isinstance(value, bool):
        return otherwise
    try:
        return int(value)
    except (TypeError, ValueError):
        return otherwise
