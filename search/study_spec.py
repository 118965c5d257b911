"""The spec as a study keeps it: every value and version, the data's manifest; and whether another is the same."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

import durable
from configuration import YamlError, flatten, read_yaml, without_retired
from search.errors import StudyError
from search.record import StudyPaths
from search.spec import Objective, Parameter, Parent, SearchSpec, Training
from search.spec_file import SECTIONS

FREE = (
    "search.trials",
    "search.wall_time_s",
    "search.slot_hours",
    "search.target",
    "search.storage",
    "parent.scan",
    "promotion",
    "evaluation",
    "tracking",
)
"""Parts that may change while a study goes on."""
FROZEN = (
    "name",
    "workload",
    "objectives",
    "parameters",
    "constraints",
    "fixed",
    "parent",
    "search",
    "stopping",
    "config",
    "data_sha256",
    "resources.workers",
)
"""Parts that may not: with more workers, a step learns from more images."""
PACKAGES = ("ray", "optuna", "torch", "torchvision", "timm", "numpy")
SHOWN_DIFFERENCES = 5


def write(paths: StudyPaths, spec: SearchSpec, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Write the resolved spec into the study's folder, the first time or with what may change.

    Raises:
        StudyError: if the folder belongs to another search, saying what differs and what to do.
    """
    content = resolved(spec, config, manifest)
    if paths.spec.exists():
        found = differences(_kept(paths), content)
        if found:
            shown = "; ".join(found[:SHOWN_DIFFERENCES])
            more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
            raise StudyError(
                f"{paths.folder}: made by another search: {shown}{more}; put the old values back, "
                "or give this search a folder of its own with --study NAME"
            )
    durable.write(paths.spec, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _kept(paths: StudyPaths) -> Mapping[str, Any]:
    """Return the spec that a study's folder holds."""
    try:
        kept = read_yaml(paths.spec)
    except YamlError as error:
        raise StudyError(f"{paths.spec}: {error}; put it back, or give this search another --study NAME") from error
    if not isinstance(kept, Mapping):
        raise StudyError(f"{paths.spec}: holds no spec; put it back, or give this search another --study NAME")
    return kept


def read(paths: StudyPaths) -> tuple[SearchSpec, dict[str, Any]]:
    """Return a study's spec, and all of spec.yaml.

    Raises:
        StudyError: if there is none, or another version of this program wrote it in words that are unknown here.
    """
    try:
        content = dict(_kept(paths))
        return _spec(content), content
    except FileNotFoundError as error:
        raise StudyError(f"{paths.folder}: no study is here: {paths.spec.name} is missing") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise StudyError(
            f"{paths.spec}: not understood ({error}); use the version of this program that wrote it, "
            "or run the search's own command, which writes it again"
        ) from error


def _spec(content: Mapping[str, Any]) -> SearchSpec:
    parent = content.get("parent", {})
    sections = {name: kind(**content[name]) for name, kind in SECTIONS.items() if name in content}
    sections["parent"] = Parent(**{**parent, "train": Training(**parent.get("train", {}))})
    return SearchSpec(
        name=content["name"],
        workload=content["workload"],
        objectives=tuple(Objective(**objective) for objective in content["objectives"]),
        parameters=tuple(_parameter(name, values) for name, values in content["parameters"].items()),
        constraints=tuple(content.get("constraints", ())),
        fixed=content.get("fixed", {}),
        **sections,
    )


def _parameter(name: str, values: Mapping[str, Any]) -> Parameter:
    when = {other: tuple(wanted) for other, wanted in values.get("when", {}).items()}
    several = {key: tuple(values.get(key, ())) for key in ("choices", "probabilities")}
    return Parameter(name=name, **{**values, **several, "when": when})


def resolved(spec: SearchSpec, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a search depends on, as plain data."""
    plain: dict[str, Any] = _plain(asdict(spec))
    plain["parameters"] = {parameter.pop("name"): parameter for parameter in plain["parameters"]}
    return {
        **plain,
        "config": _plain(dict(config)),
        "data_sha256": manifest.get("sha256"),
        "manifest": _plain(dict(manifest)),
        "versions": versions(),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what differs between two resolved specs in the parts that may not change, in words."""
    before, after = _frozen(_as_now(old)), _frozen(_as_now(new))
    # A value of the Config that came later than the study has its default, or stands in fixed or parameters too.
    keys = [key for key in dict.fromkeys([*before, *after]) if key in before or not _under(key, ("config",))]
    return [
        f"{key} was {before.get(key, 'absent')!r}, is now {after.get(key, 'absent')!r}"
        for key in keys
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def recorded_versions(paths: StudyPaths) -> dict[str, str]:
    """Return the versions that a study was last run with."""
    found: dict[str, str] = read(paths)[1]["versions"]
    return found


def _as_now(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved spec, perhaps of a study made before, with the parts and keys that there are now."""
    parts = {name: without_retired(old[name]) for name in ("config", "fixed") if name in old}
    parameters = {name: {"probabilities": [], **values} for name, values in old.get("parameters", {}).items()}
    return {"parent": _plain(asdict(Parent())), **old, **parts, "parameters": parameters}


def _frozen(content: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(dict(content))
    return {key: value for key, value in flat.items() if _under(key, FROZEN) and not _under(key, FREE)}


def _under(key: str, parts: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{part}.") for part in parts)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
