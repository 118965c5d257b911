"""Dotted values to dataclasses and back: every mistake is named with its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

import configuration
from configuration import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    """How fast."""
    kind: Literal["a", "b"] = "a"
    """Which one."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int = 3
    """How large."""
    wide: tuple[int, ...] = ()
    """How wide,
    level by level."""
    name: str | None = None
    """What it is called."""
    on: bool = False
    """Whether."""
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))
    """What is inside."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: got {self.size}; expected at least 1")

    @classmethod
    def small(cls) -> Outer:
        return cls(size=1)


def test_fields_are_the_leaves_with_their_help_and_the_outer_defaults() -> None:
    known = configuration.fields(Outer)
    assert list(known) == ["size", "wide", "name", "on", "inner.rate", "inner.kind"]
    assert known["inner.rate"].default == 0.5
    assert known["wide"].help == "How wide,\nlevel by level."


def test_nested_and_dotted_values_are_the_same() -> None:
    dotted = configuration.build(Outer, {"inner.rate": 2, "size": 4})
    assert dotted == configuration.build(Outer, {"inner": {"rate": 2.0}, "size": 4})
    assert dotted == Outer(size=4, inner=Inner(rate=2.0))
    assert isinstance(dotted.inner.rate, float)


def test_plain_values_come_back_as_they_were() -> None:
    config = Outer(size=7, wide=(1, 2), name="x", on=True, inner=Inner(kind="b"))
    values = configuration.to_values(config)
    assert values == {"size": 7, "wide": [1, 2], "name": "x", "on": True, "inner.rate": 0.1, "inner.kind": "b"}
    assert configuration.build(Outer, values) == config


def test_a_preset_is_what_other_values_are_laid_over() -> None:
    assert configuration.build(Outer, {"preset": "small", "on": True}) == Outer(size=1, on=True)
    with pytest.raises(ConfigError, match="preset"):
        configuration.build(Outer, {"preset": "smal"})


@pytest.mark.parametrize(
    ("values", "key", "problem"),
    [
        ({"sise": 3}, "sise", "did you mean 'size'"),
        ({"rate": 3}, "rate", "'inner.rate'"),
        ({"size": "3"}, "size", "'3'"),
        ({"size": 2.5}, "size", "2.5"),
        ({"size": True}, "size", "True"),
        ({"size": 0}, "size", "expected at least 1"),
        ({"inner.rate": "1e-5"}, "inner.rate", "write 1.0e-5"),
        ({"inner.rate": None}, "inner.rate", "None"),
        ({"inner.rate": 10**400}, "inner.rate", "a whole number of 401 digits"),
        ({"inner.kind": "c"}, "inner.kind", "a"),
        ({"wide": [1, "x"]}, "wide", "'x'"),
        ({"on": "yes"}, "on", "'yes'"),
        ({"inner": 3}, "inner", "did you mean 'inner.rate'"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, object], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.build(Outer, values)
    assert caught.value.key.startswith(key)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=3e-4", "lr", 3e-4),
        ("lr=3.0e-4", "lr", 3e-4),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("name=x=y", "name", "x=y"),
        ("on=true", "on", True),
        ("name=null", "name", None),
        ("data.root=/a b/c", "data.root", "/a b/c"),
    ],
)
def test_assignments_are_read_as_yaml(text: str, key: str, value: object) -> None:
    assert configuration.parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["lr", "=3", "lr=[1, 2"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value|as YAML"):
        configuration.parse_assignment(text)


@dataclass(frozen=True, kw_only=True)
class Open:
    default: float = 0.0
    """Of all others."""
    global_: float = 0.0
    """Of all at once."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Of one by name."""

    def __post_init__(self) -> None:
        for name, value in {"global": self.global_, **self.blocks}.items():
            if value >= 1:
                raise ValueError(f"{name}: got {value}; expected less than 1")


@dataclass(frozen=True, kw_only=True)
class WithOpen:
    prune: Open = field(default_factory=Open)
    """What goes."""


def test_an_open_field_takes_every_name_that_no_other_has() -> None:
    config = configuration.build(WithOpen, {"prune": {"encoders": {"1": 0.3}, "default": 0.1, "bottleneck": 0}})
    assert config.prune == Open(default=0.1, blocks={"encoders.1": 0.3, "bottleneck": 0.0})
    values = {"prune.default": 0.1, "prune.global": 0.0, "prune.encoders.1": 0.3, "prune.bottleneck": 0.0}
    assert configuration.to_values(config) == values
    assert configuration.build(WithOpen, values) == config
    changed = configuration.replace(config, {"prune.encoders.1": 0.5})
    assert changed.prune.blocks == {"encoders.1": 0.5, "bottleneck": 0.0}


def test_a_key_that_is_a_word_of_python_has_no_underscore() -> None:
    assert configuration.build(WithOpen, {"prune.global": 0.2}).prune.global_ == 0.2
    assert list(configuration.fields(WithOpen)) == ["prune.default", "prune.global", "prune.*"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prune.encoders.1": "much"}, r"prune\.encoders\.1: got 'much'; expected number"),
        ({"prune.globl": "much"}, r"prune\.globl: .* did you mean 'prune.global'"),
        ({"prune.encoders.1": 1.5}, r"prune\.encoders\.1: got 1\.5; expected less than 1"),
        ({"prune.global": 2}, r"prune\.global: got 2\.0; expected less than 1"),
        ({"prunes.encoders": 0.1}, r"prunes\.encoders: unknown key"),
        ({"prune.*": 0.1}, r"prune\.\*: unknown key"),
    ],
)
def test_mistakes_below_an_open_field_are_named(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        configuration.build(WithOpen, values)
