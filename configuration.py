"""Dotted values to frozen dataclasses and back, every value checked.

A workload's `Config` is a frozen dataclass whose fields may be frozen dataclasses in turn. People write
its leaves with dots (`loss.dice: 0.5`); this module is the one place where such text becomes typed values.
The string under a field is its help text, here and in every schema made from the class.

YAML from anywhere, a file or a command line, is read here and nowhere else: see `parse_yaml`.

A field whose name is a word of Python has an underscore behind it that no key has. A field of an inner dataclass that
is a mapping is open: it takes all that stands there under no other name, so that `prune.encoders.1: 0.3` is one of
`prune.blocks`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")

PRESET = "preset"

RETIRED = ("network.recompute",)
"""Keys that stored configurations may have from when they were made, and that none has now, since without them every
number is the same. network.recompute: computed the decoder of a UNet 3+ again to save memory, as checkpointing does for
all of any network.
"""

YAML_BYTES, YAML_DEPTH, YAML_VALUES, YAML_NUMBER = 2**20, 50, 20_000, 1000
"""What a configuration may have at most: bytes, levels, values, and characters of a number."""


class ConfigError(ValueError):
    """A value that a configuration refuses: which key, what came, what to write instead."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


class YamlError(ValueError):
    """Text that is no YAML, or that hides or swells what it says: what is wrong, and what to write."""


class YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain data only, and no key that stands twice; made for `parse_yaml`, which checks what this one does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice, or that is no plain value."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"{key_node.start_mark}: a key is {type(key).__name__}; expected text")
            if key in seen:
                raise yaml.YAMLError(f"{key_node.start_mark}: key {key!r} stands twice")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path, loader: type[YamlLoader] = YamlLoader) -> Any:
    """Return the plain data in a YAML file, of which no more is read than may be.

    Raises:
        YamlError: as `parse_yaml`.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:
        return parse_yaml(stream.read(YAML_BYTES + 1), loader)


def parse_yaml(content: str | bytes, loader: type[YamlLoader] = YamlLoader) -> Any:
    """Return the plain data that a YAML text says; raises as `parse_documents`."""
    documents = parse_documents(content, loader)
    if len(documents) > 1:
        raise YamlError(f"{len(documents)} documents; expected one, so remove the lines ---")
    return documents[0] if documents else None


def parse_documents(content: str | bytes, loader: type[YamlLoader] = YamlLoader) -> list[Any]:
    """Return the plain data of each document; nothing in them is run, and their size bounds what they become.

    Raises:
        YamlError: for what is no YAML or has a tag of its own, is too large or too deep, says a key twice, or has
            aliases, of which a few lines can mean gigabytes.
    """
    if len(content) > YAML_BYTES:
        raise YamlError("larger than 1 MiB; expected some pages of YAML")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        _check_events(text, loader)
        return list(yaml.load_all(text, Loader=loader))
    except YamlError:
        raise
    # What a constructor raises for !!timestamp x, !!bool x or a date of month 13 is none of YAML's own errors.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise YamlError(f"not YAML: {error}") from error


def _check_events(text: str, loader: type[YamlLoader]) -> None:
    """Read a text once without making anything of it, up to the first thing that nobody has to write."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"{event.start_mark}: aliases are not supported; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > YAML_DEPTH:
            raise YamlError(f"nested too deeply, more than {YAML_DEPTH} levels; a configuration has a few")
        if count > YAML_VALUES:
            raise YamlError(f"more than {YAML_VALUES:,} values; a configuration has some dozens")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > YAML_NUMBER and _numeric(event):
            raise YamlError(f"{event.start_mark}: a number of {len(event.value):,} characters; quote it if it is text")


def _numeric(event: yaml.ScalarEvent) -> bool:
    """Return whether a scalar may become a number, which takes time that grows with the square of its length."""
    return event.tag is not None or (bool(event.implicit[0]) and event.value[0] in "+-.0123456789")


@dataclass(frozen=True)
class Field:
    """One leaf of a configuration, as it is shown and checked."""

    name: str
    """Dotted; of an open one it ends in `.*`."""
    annotation: Any
    """Of an open one, that of each of its values."""
    default: Any
    help: str


OPEN = "*"


def fields(config_class: type) -> dict[str, Field]:
    """Return every leaf of a configuration class by its dotted name, in order of definition."""
    return {field.name: field for field in _leaves(config_class, "")}


def find(known: Mapping[str, Field], key: str) -> Field | None:
    """Return the leaf of a dotted name, which may be one of the names that an open one takes; None: there is none."""
    if key in known:
        return known[key] if not key.endswith(OPEN) else None
    parts = key.split(".")
    prefixes = (".".join([*parts[:count], OPEN]) for count in range(len(parts) - 1, 0, -1))
    return next((known[prefix] for prefix in prefixes if prefix in known), None)


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance made from dotted or nested values; what is not given keeps its default.

    A value `preset: NAME` starts from the class method of that name instead of the plain defaults.

    Raises:
        ConfigError: for an unknown key, a value of the wrong type, or one the class itself refuses.
    """
    flat = flatten(values)
    preset = flat.pop(PRESET, None)
    base = config_class() if preset is None else _preset(config_class, preset)
    return replace(base, flat)


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted values of a stored configuration without what is no key any more."""
    return {key: value for key, value in flatten(values).items() if key not in RETIRED}


def replace(config: T, values: Mapping[str, Any]) -> T:
    """Return a copy of a configuration with some dotted leaves changed, checked like `build`."""
    known = fields(type(config))
    checked = {key: _checked(known, key, value) for key, value in values.items()}
    changed: T = _replace(config, checked, "")
    return changed


def to_values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return all leaves of a configuration as plain values under dotted names; tuples become lists."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{_key(field)}"
        if dataclasses.is_dataclass(value):
            values |= to_values(value, f"{name}.")
        elif isinstance(value, Mapping):
            values |= {f"{prefix}{key}": _plain(item) for key, item in value.items()}
        else:
            values[name] = _plain(value)
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that does not exist, naming the nearest that do."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    close += [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2] and name not in close]
    hint = (
        f"did you mean {' or '.join(repr(name) for name in close[:3])}?" if close else f"known keys: {', '.join(names)}"
    )
    return ConfigError(key, f"unknown key; {hint}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `key=value` as typed on a command line; the value is read as YAML, and 3e-4 is a number.

    Raises:
        ConfigError: if there is no `=` or the value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(text, "expected key=value")
    try:
        parsed = parse_yaml(value)
    except YamlError as error:
        shown = value if len(value) <= 80 else f"{value[:77]}..."
        raise ConfigError(key, f"cannot read {shown!r} as YAML; quote it") from error
    if isinstance(parsed, str) and _number_as_text(parsed):
        parsed = float(parsed)
    return key.strip(), parsed


def check(annotation: Any, value: Any, key: str) -> Any:
    """Return the value if it fits the annotation, whole numbers widened to float and lists made tuples.

    Raises:
        ConfigError: naming what came and what was expected.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _check_choice(arguments, value, key)
    if origin in (Union, types.UnionType):
        return _check_union(arguments, value, key)
    if origin is tuple:
        return _check_tuple(arguments, value, key)
    if annotation is Any:
        return value
    return _check_scalar(annotation, value, key)


def type_name(annotation: Any) -> str:
    """Return an annotation as a person would say it."""
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    return names.get(annotation, str(annotation))


def _checked(known: Mapping[str, Field], key: str, value: Any) -> Any:
    field = find(known, key)
    if field is None:
        raise unknown_key(key, known)
    try:
        return check(field.annotation, value, key)
    except ConfigError as error:
        if field.name == key:
            raise
        hint = unknown_key(key, [name for name in known if not name.endswith(OPEN)]).problem
        raise ConfigError(key, f"{error.problem} ({hint})") from error


def _check_choice(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(key, f"got {value!r}; expected one of {', '.join(map(str, choices))}{hint}")


def _check_union(options: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    problems = []
    for option in options:
        try:
            return check(option, value, key)
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    raise ConfigError(key, f"got {value!r}; expected {' or '.join(type_name(option) for option in options)}")


def _check_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(key, f"got {value!r}; expected a list, such as [1, 2]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(check(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(key, f"got {len(value)} values; expected {len(arguments)}")
    return tuple(
        check(kind, item, f"{key}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _check_scalar(kind: Any, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise ConfigError(
                key, f"a whole number of {len(str(abs(value)))} digits; expected one up to 1e308"
            ) from error
    if kind in (int, float) and isinstance(value, str) and (number := _number_as_text(value)):
        raise ConfigError(key, f"got text {value!r}; write {number}")
    if type(value) is not kind:
        raise ConfigError(key, f"got {value!r}; expected {type_name(kind)}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(key, f"got {value!r}; expected a finite number")
    return value


def _number_as_text(text: str) -> str:
    """Return how YAML 1.1 wants this number written, or "" if the text is no number."""
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", text.strip()):
        return ""
    mantissa, mark, exponent = text.strip().lower().partition("e")
    if not mark:
        return text.strip()
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def presets(config_class: type) -> list[str]:
    """Return the names that `preset` may have: the public class methods of a configuration class."""
    members = vars(config_class).items()
    return [name for name, member in members if isinstance(member, classmethod) and not name.startswith("_")]


def _preset(config_class: type[T], name: Any) -> T:
    names = presets(config_class)
    if name not in names:
        raise ConfigError(PRESET, f"got {name!r}; this workload has {', '.join(names) or 'none'}")
    made: T = getattr(config_class, name)()
    return made


def _replace(config: Any, values: Mapping[str, Any], prefix: str) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, current = f"{prefix}{_key(field)}", getattr(config, field.name)
        if dataclasses.is_dataclass(current):
            changes[field.name] = _replace(current, values, f"{name}.")
        elif isinstance(current, Mapping):
            changes[field.name] = {**current, **_named_freely(config, values, prefix)}
        elif name in values:
            changes[field.name] = values[name]
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError:
        raise
    except ValueError as error:
        name, colon, problem = str(error).partition(": ")
        if colon and (name in map(_key, dataclasses.fields(config)) or f"{prefix}{name}" in values):
            raise ConfigError(f"{prefix}{name}", problem) from error
        raise ConfigError(prefix.rstrip("."), str(error)) from error


def _named_freely(config: Any, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values below a dataclass that none of its fields is named for."""
    own = [f"{prefix}{_key(field)}" for field in dataclasses.fields(config)]
    below = {key: value for key, value in values.items() if key.startswith(prefix)}
    named = (key for key in below if any(key == name or key.startswith(f"{name}.") for name in own))
    taken = set(named)
    return {key.removeprefix(prefix): value for key, value in below.items() if key not in taken}


def _key(field: dataclasses.Field[Any]) -> str:
    return field.name.rstrip("_")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _leaves(config_class: type, prefix: str, defaults: Any = None) -> Iterator[Field]:
    """Yield the leaves; `defaults` is what the class around this one holds where nothing is given."""
    annotations, texts = typing.get_type_hints(config_class), _field_texts(config_class)
    for field in dataclasses.fields(config_class):
        annotation = annotations[field.name]
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(annotation):
            yield from _leaves(typing.cast(type, annotation), f"{prefix}{_key(field)}.", default)
        elif prefix and typing.get_origin(annotation) is Mapping:
            yield Field(f"{prefix}{OPEN}", typing.get_args(annotation)[1], None, texts.get(field.name, ""))
        else:
            yield Field(f"{prefix}{_key(field)}", annotation, default, texts.get(field.name, ""))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@functools.cache
def _field_texts(config_class: type) -> dict[str, str]:
    """Return the string that stands under each field in the source of the class, base classes first."""
    texts: dict[str, str] = {}
    for member in reversed(config_class.__mro__[:-1]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(member))).body[0]).body
        for statement, following in pairwise(body):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                texts[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return texts
