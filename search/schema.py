"""A JSON schema of search spaces for editors, from the sources that check them; `python -m search.schema` writes it.

What it refuses, `spec_file.load` refuses too. The reverse does not hold: only the latter compares values with each
other, and knows what a workload of your own can be told.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, Union

import configuration
from configuration import OPEN, Field
from search import spec_file, workload
from search.spec import Objective, Parameter

FILE = spec_file.FOLDER / "schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
HELP = {
    "workload": "How one trial is trained: a workload of this project, or your own importable module.",
    "data": "Values of the workload's Config under `data`.",
    "objective": "What the search makes better, or a list of it.",
    "parameters": "What to search, by the dotted names of the workload's Config.",
    "constraints": "Arithmetic over values, such as `a.b * 2 <= c`; no trial starts where one is false.",
    "fixed": "What to hold, by the dotted names of the workload's Config.",
    "preset": "Values of the workload to start from instead of its defaults.",
}
Schema = dict[str, Any]


def schema() -> Schema:
    """Return the schema of all search spaces."""
    names = workload.names()
    modules = {name: workload.load(name) for name in names}
    return {
        "$schema": DIALECT,
        "title": "Search space",
        "type": "object",
        "required": ["workload", "objective", "parameters"],
        "additionalProperties": False,
        "properties": {
            "workload": _described({"anyOf": [{"enum": names}, _text(r"\.")]}, HELP["workload"]),
            "data": _described({"type": ["object", "null"]}, HELP["data"]),
            "objective": _described(_objectives({"type": "string"}), HELP["objective"]),
            "parameters": _described({"type": "object", "minProperties": 1}, HELP["parameters"]),
            "constraints": _described({"type": ["array", "null"], "items": {"type": "string"}}, HELP["constraints"]),
            "fixed": _described({"type": ["object", "null"]}, HELP["fixed"]),
            **{name: _section(name, kind) for name, kind in spec_file.SECTIONS.items()},
        },
        "allOf": [_for_workload(name, module) for name, module in modules.items()],
        "$defs": {
            "parameter": _shared(),
            "value": {name: _values(module.Config) for name, module in modules.items()},
            "search": {name: _searched(module.Config, name) for name, module in modules.items()},
        },
    }


def text() -> str:
    """Return the schema as it is kept on disk: what fits on a line is on one, so that a change is a line in a diff."""
    content = json.dumps(schema(), indent=1, ensure_ascii=False)
    # Inside of strings JSON has no line ends, so that these are all between values.
    innermost = r"[\[{]\n[^\[\]{}]{1,400}?\n *[\]}]"
    for _ in range(2):
        content = re.sub(innermost, lambda match: re.sub(r"\n *", "", match[0].replace(",\n", ", \n")), content)
    return f"{content}\n"


def main() -> int:
    """Write the schema."""
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
    return 0


def _for_workload(name: str, module: ModuleType) -> Schema:
    """Return what a search space of one workload has to keep besides."""
    known, free = _metrics(module)
    listed = {"properties": {"objective": _objectives({"enum": known})}}
    fields = configuration.fields(module.Config)
    fixed = {key: _reference("value", name, key) for key in (*fields, configuration.PRESET)}
    data = {key.removeprefix("data."): value for key, value in fixed.items() if key.startswith("data.")}
    then: Schema = {
        "properties": {
            "data": _nested(data, nullable=True),
            "fixed": _nested(fixed, nullable=True),
            "parameters": _nested({key: _reference("search", name, key) for key in fields}),
        },
        "allOf": [{"if": {"anyOf": [_is_set(key) for key in free]}, "else": listed} if free else listed],
    }
    return {"if": {"properties": {"workload": {"const": name}}, "required": ["workload"]}, "then": then}


def _values(config_class: type) -> dict[str, Schema]:
    """Return the schema of each value of a Config, by its dotted name."""
    fields = configuration.fields(config_class).items()
    preset = _described({"enum": configuration.presets(config_class)}, HELP[configuration.PRESET])
    found = {key: _described(_value(field.annotation), field.help, field.default) for key, field in fields}
    return {**found, configuration.PRESET: preset}


def _searched(config_class: type, name: str) -> dict[str, Schema]:
    """Return the schema of each value of a Config as a dimension of the search."""
    fields = configuration.fields(config_class)
    return {key: _parameter(field, _reference("value", name, key)) for key, field in fields.items()}


def _reference(*path: str) -> Schema:
    return {"$ref": "/".join(["#", "$defs", *path])}


def _nested(leaves: Mapping[str, Schema], *, nullable: bool = False) -> Schema:
    """Return an object with these dotted names and no others, however they are nested."""
    properties = dict(leaves)
    for prefix in dict.fromkeys(prefix for name in leaves for prefix in _prefixes(name)):
        below = {name[len(prefix) + 1 :]: leaf for name, leaf in leaves.items() if name.startswith(f"{prefix}.")}
        properties[prefix] = _nested(below)
    kind = ["object", "null"] if nullable else "object"
    free = {name: properties.pop(name) for name in leaves if name.endswith(OPEN)}
    patterns = {"patternProperties": {_pattern(name, properties): _free(leaf) for name, leaf in free.items()}}
    return {"type": kind, "properties": properties, **(patterns if free else {}), "additionalProperties": False}


def _pattern(name: str, taken: Iterable[str]) -> str:
    """Return the pattern of the names that an open value takes: those below its place that no other value has."""
    prefix = name.removesuffix(OPEN)
    others = [key.removeprefix(prefix) for key in taken if key.startswith(prefix)]
    return f"^{re.escape(prefix)}(?!({'|'.join(map(re.escape, others))})$)"


def _free(leaf: Schema) -> Schema:
    """Return the schema of an open value, or of more of them nested below a part of their name."""
    nested = {
        "type": "object",
        "not": {"anyOf": [{"required": ["type"]}, {"required": ["choices"]}]},
        "additionalProperties": {"anyOf": [leaf, {"type": "object"}]},
    }
    return {"anyOf": [leaf, nested]}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_set(name: str) -> Schema:
    """Return a schema of the search spaces that fix a value, wherever they write it."""
    section, _, rest = name.partition(".")
    places = [_has("fixed", _has_nested(name))]
    return {"anyOf": [*places, _has("data", _has_nested(rest))] if section == "data" else places}


def _has_nested(name: str) -> Schema:
    splits = [_has(prefix, _has_nested(name[len(prefix) + 1 :])) for prefix in _prefixes(name)]
    return {"anyOf": [{"required": [name]}, *splits]}


def _has(key: str, value: Schema) -> Schema:
    return {"required": [key], "properties": {key: value}}


def _value(annotation: Any) -> Schema:
    """Return the schema of what `configuration.check` accepts, widened where JSON knows no difference."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_value(argument) for argument in arguments]}
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return {"type": "array", "items": _value(arguments[0])}
    if origin is tuple:
        count = len(arguments)
        return {"type": "array", "prefixItems": list(map(_value, arguments)), "minItems": count, "maxItems": count}
    kinds = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
    return {"type": kinds[annotation]} if annotation in kinds else {}


def _section(name: str, kind: type) -> Schema:
    properties = {}
    for key, field in configuration.fields(kind).items():
        value = _value(field.annotation)
        if (least := spec_file.MINIMA.get(f"{name}.{key}")) is not None:
            value["minimum"] = least
        properties[key] = _described(value, field.help, field.default)
    return _described(_nested(properties, nullable=True), (kind.__doc__ or "").strip())


def _objectives(metric: Schema) -> Schema:
    fields = configuration.fields(Objective)
    properties = {
        "metric": _described(metric, fields["metric"].help),
        "mode": _described(_value(fields["mode"].annotation), fields["mode"].help),
    }
    one = {"type": "object", "required": ["metric"], "properties": properties, "additionalProperties": False}
    return {"if": {"type": "array"}, "then": {"minItems": 1, "items": one}, "else": one}


def _shared() -> dict[str, Schema]:
    """Return what the parameters have in common."""
    return {
        "integer": _numeric(["int"]),
        "number": _numeric(["float", "int"]),
        "choices": _entry(["categorical"], "choices", "probabilities", "when"),
    }


def _parameter(field: Field, value: Schema) -> Schema:
    """Return the schema of one dimension of the search; a value that is no number can only have choices."""
    choices = {"type": "array", "minItems": 1, "uniqueItems": True, "items": value}
    categorical = {**_reference("parameter", "choices"), "required": ["choices"], "properties": {"choices": choices}}
    if (kind := _number_kind(field.annotation)) is not None:
        numeric = _reference("parameter", kind)
        categorical = {"if": {"required": ["choices"]}, "then": categorical, "else": numeric}
    return _described(categorical, field.help)


def _number_kind(annotation: Any) -> str | None:
    """Return which numbers a value may be: `number`, `integer`, or None for none at all."""
    if typing.get_origin(annotation) is Literal:
        members: Iterable[Any] = map(type, typing.get_args(annotation))
    else:
        members = typing.get_args(annotation) if _is_union(annotation) else [annotation]
    found = set(members)
    return "number" if float in found else "integer" if int in found else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _numeric(kinds: Sequence[str]) -> Schema:
    entry = _entry(kinds, "low", "high", "log", "step", "when")
    logarithmic = {"required": ["log"], "properties": {"log": {"const": True}}}
    whole = {"required": ["type"], "properties": {"type": {"const": "int"}}}
    numbers = {key: {"type": "integer"} for key in ("low", "high")}
    return {
        **entry,
        "required": ["type", "low", "high"],
        "allOf": [
            {"if": logarithmic, "then": {"properties": {"low": {"exclusiveMinimum": 0}, "step": {"type": "null"}}}},
            {"if": whole, "then": {"properties": {**numbers, "step": {"type": ["integer", "null"]}}}},
        ],
    }


def _entry(kinds: Sequence[str], *attributes: str) -> Schema:
    """Return an object with a type and some of a parameter's attributes."""
    fields = configuration.fields(Parameter)
    values: dict[str, Schema] = {
        "type": {"enum": list(kinds)},
        "low": {"type": "number"},
        "high": {"type": "number"},
        "log": {"type": "boolean"},
        "step": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "choices": {"type": "array"},
        "probabilities": {"type": ["array", "null"], "items": {"type": "number", "exclusiveMinimum": 0}},
        "when": {"type": ["object", "null"]},
    }
    assert set(values) == set(spec_file.ATTRIBUTES)
    properties = {name: _described(values[name], fields[name].help) for name in ("type", *attributes)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _metrics(module: ModuleType) -> tuple[list[str], list[str]]:
    """Return what a workload can report, and the values of its Config that make it report what cannot be listed.

    Found by trying: names may depend on a choice (then those of every choice are listed), or on a value that can be
    anything, such as the number of classes.
    """
    base = dict(module.metrics(module.Config()))
    presets = [{configuration.PRESET: name} for name in configuration.presets(module.Config)]
    choices, free = [], []
    for name, field in configuration.fields(module.Config).items():
        if name.endswith(OPEN):
            continue
        others = [value for value in _others(field) if _names(module, {name: value}) not in (None, set(base))]
        if others and _is_choice(field.annotation):
            choices.append([{}, *({name: value} for value in others)])
        elif others:
            free.append(name)
    tried = [*presets, *({k: v for part in parts for k, v in part.items()} for parts in itertools.product(*choices))]
    found = (_names(module, values) or set() for values in tried)
    return list(dict.fromkeys([*base, *sorted(set().union(*found))])), free


def _names(module: ModuleType, values: Mapping[str, Any]) -> set[str] | None:
    """Return the metrics of a configuration, or None where the Config refuses it."""
    try:
        return set(module.metrics(configuration.build(module.Config, values)))
    except ValueError:
        return None


def _is_choice(annotation: Any) -> bool:
    return annotation is bool or typing.get_origin(annotation) is Literal


def _others(field: Field) -> Iterator[Any]:
    """Yield values other than the default; of what can be anything, a few."""
    annotation = field.annotation
    if annotation is bool:
        yield not field.default
    elif typing.get_origin(annotation) is Literal:
        yield from (value for value in typing.get_args(annotation) if value != field.default)
    elif annotation is str:
        yield "other"
    elif annotation in (int, float):
        yield from (annotation(field.default + 1), annotation(field.default / 2))
    elif typing.get_args(annotation)[:1] == (str,):
        yield from ([f"other{index}" for index in range(count)] for count in range(1, 5))


def _described(value: Schema, help_text: str, default: Any = None) -> Schema:
    described = {**value, "description": " ".join(help_text.split())}
    return described if default is None else {**described, "default": default}


def _text(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


if __name__ == "__main__":
    sys.exit(main())
