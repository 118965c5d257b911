"""What is wrong with a cluster file, found without a cluster: its schema first, then what schemas miss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cluster import fit, kuberay, launcher, shell, slurm
from cluster.files import ClusterFile, mapping
from cluster.problem import Problem
from search import growth
from search.errors import BadInput

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
RULES = {"cloud": launcher.cloud, "hosts": launcher.hosts, "kuberay": kuberay.rules, "slurm": slurm.rules}
SECRET_FORMS = {
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password in a URL": re.compile(r"\w+://[^\s:/@$]*:[^\s:/@${]+@"),
    "a token": re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|ya29\.[\w-]{20,})"),
    "a secret": re.compile(
        r"\b\w*(TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY)=[\"']?(?![\"']?[$/~<]|[\"']?\s)[^\s\"']{4,}"
    ),
}
SECRET_KEY = re.compile(r"(password|secret_?key|secret|token|api_?key|access_?key|credentials)$", re.I)


def problems(file: ClusterFile, crds: Mapping[str, Any] | None = None) -> list[Problem]:
    """Return what is wrong with a file, notes last; none where it is fine.

    crds: KubeRay's schemas by kind, where they are at hand.
    """
    found = [*RULES[file.kind](file, ray_version()), *_secrets(file), *shell.job_flags(file.text)]
    if file.kind == "kuberay" and (schema := (crds or {}).get(str(file.content["kind"]))):
        found += kuberay.schema_problems(file.content, schema)
    found += [*_growth(file), *_placeholders(file.text)]
    return sorted(dict.fromkeys(found), key=lambda each: each.note)


def ray_version() -> str:
    """Return the version of Ray that was tested."""
    if LOCK.is_file() and (locked := re.search(r"^ray==(\S+)", LOCK.read_text(encoding="utf-8"), re.M)):
        return locked[1]
    return metadata.version("ray")


def read_crds(paths: Iterable[Path]) -> dict[str, Any]:
    """Return schemas by the kind they describe: of custom resource definitions, or bare ones.

    Raises:
        BadInput: if a file holds none of KubeRay's.
    """
    found = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise BadInput(f"{path}: neither JSON nor YAML: {error}") from error
        kind, schema = _schema(mapping(content))
        if kind is None:
            raise BadInput(
                f"{path}: no schema of a RayCluster or RayJob; expected KubeRay's custom resource definition"
            )
        found[kind] = schema
    return found


def _schema(content: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    versions = mapping(content.get("spec")).get("versions")
    if isinstance(versions, list):
        served = next((mapping(each) for each in versions if mapping(each).get("name") == "v1"), {})
        content = mapping(mapping(served.get("schema")).get("openAPIV3Schema"))
    spec = mapping(mapping(mapping(content.get("properties")).get("spec")).get("properties"))
    if "rayClusterSpec" in spec:
        return "RayJob", content
    return ("RayCluster" if "headGroupSpec" in spec else None), content


def _secrets(file: ClusterFile) -> Iterator[Problem]:
    remedy = "keep it out of the file: a mounted file, the cloud's secret store or a Kubernetes secret"
    for number, line in enumerate(file.text.splitlines(), 1):
        for what, form in SECRET_FORMS.items():
            if form.search(line):
                yield Problem(f"line {number}", f"{what} in clear; {remedy}")
    for content in (file.content, *file.beside):
        for key in _told(content, is_secret=content.get("kind") == "Secret"):
            yield Problem(key, f"a secret in clear; {remedy}")


def _told(content: Any, key: str = "", named: str = "", *, is_secret: bool = False) -> Iterator[str]:
    """Yield where a text stands under a name that promises a secret; named: what it is a value of."""
    if isinstance(content, list):
        for index, inner in enumerate(content):
            yield from _told(inner, f"{key}[{index}]", named)
    if not isinstance(content, Mapping):
        return
    for name, inner in content.items():
        path, last = f"{key}.{name}".lstrip("."), str(content.get("name", named)) if name == "value" else str(name)
        if name == "file_mounts":
            continue
        if (is_secret and name in ("data", "stringData") and inner) or (
            isinstance(inner, str) and inner and not inner.startswith(("/", "~", "$")) and SECRET_KEY.search(last)
        ):
            yield path
        else:
            yield from _told(inner, path, str(name))


def _growth(file: ClusterFile) -> Iterator[Problem]:
    """KubeRay's file stays outside its pods, so how far the cluster can grow is told to the head."""
    if file.kind != "kuberay" or file.ray.get("enableInTreeAutoscaling") is not True:
        return
    told = kuberay.environment(mapping(file.ray.get("headGroupSpec"))).get(growth.VARIABLE)
    if told != (most := growth.written(fit.largest(file))):
        key = f"{file.ray_key}.headGroupSpec.template.spec.containers[0].env"
        came = f"{growth.VARIABLE} is {told}" if told else f"no {growth.VARIABLE}, so `slots: auto` is what is there"
        yield Problem(key, f"{came}; the groups come to {most}: write that", note=told is None)


def _placeholders(text: str) -> Iterator[Problem]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if "CHANGE-ME" in line and not line.startswith("#"):
            yield Problem(f"line {number}", f"{line.strip()}; write your own there", note=True)
