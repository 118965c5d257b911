from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import space
from search.spec import Parameter


def choice(*choices: Any, **when: Any) -> Parameter:
    return Parameter(name="c", type="categorical", choices=choices, when=when)


def between(low: float, high: float, **more: Any) -> Parameter:
    return Parameter(name="x", type="float", low=low, high=high, **more)


def whole(low: int, high: int, **more: Any) -> Parameter:
    return Parameter(name="n", type="int", low=low, high=high, **more)


@pytest.mark.parametrize("value", [1, 1.0, True, None, "unet", [8, 16], [[1], []], "[8, 16]"])
def test_what_is_encoded_is_decoded(value: Any) -> None:
    others = [other for other in (0, "x", [1]) if other != value]
    found = space.decode(choice(*others, value), space.encode(value))
    assert found == value and type(found) is type(value)


def test_one_and_true_are_two_choices() -> None:
    parameter = choice(1, True)
    assert [space.decode(parameter, stored) for stored in (1, True)] == [1, True]
    assert space.decode(parameter, True) is True


def test_optuna_stores_lists_as_text() -> None:
    assert space.distribution(choice([8, 16], "a", None)) == optuna.distributions.CategoricalDistribution(
        ("[8, 16]", "a", None)
    )


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (between(0.0, 1.0), optuna.distributions.FloatDistribution(0.0, 1.0)),
        (between(0.1, 1.0, log=True), optuna.distributions.FloatDistribution(0.1, 1.0, log=True)),
        (between(0.1, 0.35, step=0.1), optuna.distributions.FloatDistribution(0.1, 0.3, step=0.1)),
        (between(0.1, 0.3, step=0.1), optuna.distributions.FloatDistribution(0.1, 0.3, step=0.1)),
        (whole(8, 20), optuna.distributions.IntDistribution(8, 20)),
        (whole(8, 20, step=5), optuna.distributions.IntDistribution(8, 18, step=5)),
        (whole(8, 20, log=True), optuna.distributions.IntDistribution(8, 20, log=True)),
    ],
)
def test_distributions_by_hand(parameter: Parameter, expected: optuna.distributions.BaseDistribution) -> None:
    """A step that does not fit the range ends at its last whole step, without a warning from Optuna."""
    assert space.distribution(parameter) == expected


def test_a_condition_holds_beside_one_of_its_values() -> None:
    parameter = Parameter(name="x", type="float", low=0, high=1, when={"a": (1, 2), "b": ("x",)})
    assert space.applies(parameter, {"a": 2, "b": "x"})
    assert not space.applies(parameter, {"a": 3, "b": "x"})
    assert not space.applies(parameter, {"a": 1})
    assert space.applies(between(0, 1), {})


@pytest.mark.parametrize(
    ("parameter", "default", "expected"),
    [
        (between(0.1, 0.5), 0.3, 0.3),
        (between(0.1, 0.5), 7, 0.5),
        (between(0.1, 0.5), -7, 0.1),
        (between(0.1, 0.5), None, 0.1),
        (between(0.1, 0.5), "auto", 0.1),
        (between(0.1, 0.3, step=0.1), 0.29, 0.3),
        (between(0.1, 0.3, step=0.1), 9.0, 0.3),
        (between(0.1, 0.35, step=0.1), 0.35, 0.3),
        (between(0.0, 1.0, step=0.25), 0.6, 0.5),
        (whole(8, 20, step=5), 19, 18),
        (whole(8, 20, step=5), 10, 8),
        (whole(8, 20), 12.4, 12),
        (choice(8, 16), 16, 16),
        (choice(8, 16), 32, 8),
        (choice([1, 2], [3]), [3], [3]),
        (choice("a", None), None, None),
    ],
)
def test_nearest_by_hand(parameter: Parameter, default: Any, expected: Any) -> None:
    found = space.nearest(parameter, default)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (between(0.1, 0.3, step=0.1), [0.1, 0.2, 0.3]),
        (between(0.0, 1.0, step=0.4), [0.0, 0.4, 0.8]),
        (whole(1, 3), [1, 2, 3]),
        (whole(8, 20, step=5), [8, 13, 18]),
        (choice([1], "a"), ["[1]", "a"]),
        (between(0.0, 1.0), None),
        (whole(1, 100, log=True), None),
        (between(0.1, 1.0, log=True), None),
    ],
)
def test_grid_by_hand(parameter: Parameter, expected: list[Any] | None) -> None:
    assert space.grid_values(parameter) == expected
    assert space.grid_size(parameter) == (None if expected is None else len(expected))


def test_a_huge_range_is_counted_without_being_listed() -> None:
    assert space.grid_size(whole(0, 2**31 - 1)) == 2**31


steps = st.tuples(
    st.decimals(-5, 5, places=2), st.decimals(min_value="0.01", max_value=3, places=2), st.integers(1, 20)
)


@settings(max_examples=100, deadline=None)
@given(steps, st.floats(-20, 20), st.floats(0, 0.9))
def test_every_value_on_a_grid_is_one_that_optuna_takes(
    made: tuple[Any, Any, int], default: float, beyond: float
) -> None:
    low, step, count = made
    high = float(low + count * step) + beyond * float(step) * 0.9
    parameter = between(float(low), high, step=float(step))
    values, taken = space.grid_values(parameter), space.distribution(parameter)
    assert values is not None and len(values) == count + 1
    assert all(taken._contains(value) for value in values)
    nearest = space.nearest(parameter, default)
    assert nearest in values
    assert abs(nearest - default) <= min(abs(value - default) for value in values) + 1e-9


VALUES = {"lr": 0.5, "network.depth": 3, "data.tile": 24, "kind": "unet", "widths": [8, 16], "on": True, "off": None}


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("network.depth * 2 <= data.tile", True),
        ("data.tile % 2 ** network.depth == 0", True),
        ("data.tile // 5 == 4 and data.tile / 5 == 4.8", True),
        ("-lr < 0 < lr <= 0.5", True),
        ("not (lr > 1 or kind != 'unet')", True),
        ("kind in ['unet', 'fpn']", True),
        ("len(widths) == 2 and sum(widths) == 24 and max(widths) - min(widths) == 8", True),
        ("abs(lr - 1) == 0.5", True),
        ("network.depth + 1 > 4", False),
        ("off == 3", False),
        ("on", True),
        ("  lr < 1 ", True),
        ("network.depth > 5 and 1 / 0 > 1", False),
        ("1 <= network.depth < 3", False),
    ],
)
def test_constraints_by_hand(constraint: str, expected: bool) -> None:
    space.check_names(constraint, VALUES)
    assert space.holds(constraint, VALUES) is expected


@pytest.mark.parametrize(
    "constraint",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "widths[0] == 8",
        "kind.upper() == 'UNET'",
        "(lambda: 1)()",
        "[x for x in widths] == []",
        "lr if on else 0",
        "f'{lr}' == ''",
        "(x := 3) > 2",
        "lr is None",
        "lr @ lr",
        "~network.depth == 1",
        "len(*widths) > 1",
        "min(widths, key=abs) > 1",
        "{1: 2} == {}",
        "",
        "lr = 3",
        "lr; lr",
    ],
)
def test_all_but_arithmetic_is_refused(constraint: str) -> None:
    with pytest.raises(ValueError, match=r"only arithmetic|no value is called|cannot read"):
        space.holds(constraint, VALUES)


@pytest.mark.parametrize("constraint", ["lr.__class__ == 1", "network == 1", "kind.upper == 1", "().__class__ == 1"])
def test_attributes_are_names_of_values_and_nothing_else(constraint: str) -> None:
    with pytest.raises(ValueError, match="no value is called"):
        space.holds(constraint, VALUES)
    with pytest.raises(ValueError, match="no value is called"):
        space.check_names(constraint, VALUES)


@pytest.mark.parametrize("constraint", ["kind * 1000000000 == ''", "widths * 1000000000 == []", "kind + kind == ''"])
def test_only_numbers_are_added_and_multiplied(constraint: str) -> None:
    with pytest.raises(ValueError, match="arithmetic needs numbers"):
        space.holds(constraint, VALUES)


def test_a_power_too_large_is_an_error_at_once() -> None:
    with pytest.raises(OverflowError):
        space.holds("9 ** 9 ** 9 > 1", VALUES)


@settings(max_examples=60, deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50), st.sampled_from(["+", "-", "*", "<", "<=", "==", "!="]))
def test_arithmetic_is_pythons(a: int, b: int, sign: str) -> None:
    assert space.holds(f"x {sign} y", {"x": a, "y": b}) is bool(eval(f"a {sign} b"))


def test_nan_fulfils_no_comparison() -> None:
    assert not space.holds("lr < 1", {"lr": math.nan})


FACTS = ("params", "macs", "parent.params", "parent.macs")


@pytest.mark.row("P53")
@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("params <= 0.5 * parent", "params <= 0.5 * parent.params"),
        ("0.3 * parent <= params <= 0.5 * parent", "0.3 * parent.params <= params <= 0.5 * parent.params"),
        ("params < parent and macs * 2 < parent", "params < parent.params and macs * 2 < parent.macs"),
        ("params <= 0.5 * parent.macs", "params <= 0.5 * parent.macs"),
        ("lr < 1", "lr < 1"),
        ("params + macs <= parent", "params + macs <= parent"),
        ("lr <= parent", "lr <= parent"),
    ],
)
def test_a_bare_parent_is_the_fact_that_it_is_compared_with(constraint, expected):
    assert space.spelled_out(constraint, FACTS) == expected


def test_the_names_of_a_constraint_are_dotted():
    assert {"params", "parent.params", "min"} >= space.names("min(params, 3) <= parent.params") - {"parent"}
    assert "prune.encoders" in space.names("prune.encoders < 1")


def test_a_parent_of_two_facts_is_refused():
    with pytest.raises(ValueError, match="no value is called 'parent'"):
        space.check_names(space.spelled_out("params + macs <= parent", FACTS), FACTS)
