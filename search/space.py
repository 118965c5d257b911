"""Parameters of a search space as Optuna's distributions, and the arithmetic of constraints."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from search.spec import Parameter

# In floats a power too large is an error at once; in whole numbers it would be computed for hours.
ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: float(a) ** float(b),
}
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "len": len, "sum": sum}


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of one parameter."""
    if parameter.type == "categorical":
        return CategoricalDistribution([encode(choice) for choice in parameter.choices])
    assert parameter.low is not None and parameter.high is not None
    high = parameter.high
    if parameter.step is not None:
        high = _step(parameter, _steps(parameter))
    if parameter.type == "int":
        step = 1 if parameter.step is None else int(parameter.step)
        return IntDistribution(int(parameter.low), int(high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, high, log=parameter.log, step=parameter.step)


def suggest(trial: Trial, parameter: Parameter) -> Any:
    """Return what the study's sampler suggests for one parameter, as Optuna stores it."""
    chosen = distribution(parameter)
    if isinstance(chosen, CategoricalDistribution):
        return trial.suggest_categorical(parameter.name, chosen.choices)
    if isinstance(chosen, IntDistribution):
        return trial.suggest_int(parameter.name, chosen.low, chosen.high, step=chosen.step, log=chosen.log)
    assert isinstance(chosen, FloatDistribution)
    return trial.suggest_float(parameter.name, chosen.low, chosen.high, step=chosen.step, log=chosen.log)


def encode(choice: Any) -> Any:
    """Return a choice as Optuna stores it: lists as JSON text, plain values as they are."""
    return json.dumps(choice) if isinstance(choice, list | tuple) else choice


def decode(parameter: Parameter, stored: Any) -> Any:
    """Return the value that `encode` was given."""
    return next((c for c in parameter.choices if encode(c) == stored and type(encode(c)) is type(stored)), stored)


def applies(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Return whether a conditional parameter exists beside these values."""
    return all(name in values and values[name] in wanted for name, wanted in parameter.when.items())


def nearest(parameter: Parameter, default: Any) -> Any:
    """Return the value of the parameter that is nearest to a default that may lie outside its range, or be null."""
    if parameter.type == "categorical":
        options = [encode(choice) for choice in parameter.choices]
        wanted = encode(default)
        return decode(parameter, wanted if wanted in options else options[0])
    assert parameter.low is not None and parameter.high is not None
    if not isinstance(default, int | float):
        return parameter.low
    value = min(max(float(default), parameter.low), parameter.high)
    if parameter.step is not None:
        value = _step(parameter, min(round((value - parameter.low) / parameter.step), _steps(parameter)))
    return round(value) if parameter.type == "int" else value


def contains(parameter: Parameter, value: Any) -> bool:
    """Return whether the parameter can take a value; steps are not looked at."""
    if parameter.type == "categorical":
        return value in parameter.choices
    assert parameter.low is not None and parameter.high is not None
    return isinstance(value, int | float) and parameter.low <= value <= parameter.high


def count(parameter: Parameter) -> int | None:
    """Return how many values a parameter has, or None for a range of floats without steps."""
    if parameter.type == "categorical":
        return len(parameter.choices)
    if parameter.step is None and parameter.type == "float":
        return None
    return _steps(parameter) + 1


def grid_size(parameter: Parameter) -> int | None:
    """Return how many values a parameter has on a grid, or None where it has no place there."""
    return None if parameter.log else count(parameter)


def grid_values(parameter: Parameter) -> list[Any] | None:
    """Return all values of a parameter as Optuna stores them, or None where it has no place on a grid."""
    return None if grid_size(parameter) is None else every(parameter)


def every(parameter: Parameter) -> list[Any]:
    """Return all values of a parameter whose values can be counted, as Optuna stores them."""
    if parameter.type == "categorical":
        return [encode(choice) for choice in parameter.choices]
    values = [_step(parameter, index) for index in range(count(parameter) or 0)]
    return [round(value) for value in values] if parameter.type == "int" else values


def _steps(parameter: Parameter) -> int:
    """Return how many steps fit between low and high; in decimals, so that 0.1 to 0.3 by 0.1 are two."""
    low, high, step = _decimals(parameter)
    return int((high - low) // step)


def _step(parameter: Parameter, index: int) -> float:
    low, _, step = _decimals(parameter)
    return float(low + index * step)


def _decimals(parameter: Parameter) -> tuple[Decimal, Decimal, Decimal]:
    low, high, step = (Decimal(str(number)) for number in (parameter.low, parameter.high, parameter.step or 1))
    return low, high, step


def holds(constraint: str, values: Mapping[str, Any]) -> bool:
    """Return whether simple arithmetic over dotted names is true, such as `network.depth * 2 <= data.tile`.

    Raises:
        ValueError: for anything but arithmetic, comparisons, and/or/not, min, max, abs, len, sum and known names.
    """
    return bool(_value(_tree(constraint), values, constraint))


def spelled_out(constraint: str, facts: Sequence[str]) -> str:
    """Return a constraint in which `parent`, beside one fact in a comparison, is that fact of the parent.

    So `params <= 0.5 * parent` is `params <= 0.5 * parent.params`.

    Raises:
        ValueError: if it cannot be read.
    """
    tree = _tree(constraint)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Compare)):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & set(facts)
        if len(names) == 1:
            _Spelled(names.pop()).visit(node)
    return ast.unparse(tree)


class _Spelled(ast.NodeTransformer):
    def __init__(self, fact: str) -> None:
        self.fact = fact

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Leave dotted names, such as parent.macs, as they are."""
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Name the fact of the parent that is meant."""
        return ast.Attribute(node, self.fact, ast.Load()) if node.id == "parent" else node


def names(constraint: str) -> set[str]:
    """Return the dotted names that a constraint has."""
    parts = ast.walk(_tree(constraint))
    return {ast.unparse(part) for part in parts if isinstance(part, ast.Name | ast.Attribute)}


def check_names(constraint: str, known: Container[str]) -> None:
    """Refuse a name that is not known, also where `and` or `or` would not get that far.

    Raises:
        ValueError: naming it.
    """
    waiting: list[ast.AST] = [_tree(constraint)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name | ast.Attribute):
            if ast.unparse(node) not in known:
                raise ValueError(f"{constraint!r}: no value is called {ast.unparse(node)!r}")
        elif isinstance(node, ast.Call):
            waiting += node.args
        else:
            waiting += ast.iter_child_nodes(node)


def _tree(constraint: str) -> ast.AST:
    try:
        return ast.parse(constraint.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read {constraint!r}: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read {constraint[:40]!r}...: nested too deeply") from error


def _value(node: ast.AST, values: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return _lookup(node, values, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](_number(left, values, text), _number(right, values, text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, values, text)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, values, text))
        case ast.BoolOp(op=op, values=parts):
            decide = all if isinstance(op, ast.And) else any
            return decide(_value(part, values, text) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in OPERATORS for op in ops):
            sides = [_value(side, values, text) for side in (left, *others)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(argument, values, text) for argument in arguments))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, values, text) for item in items]
    raise ValueError(f"{text!r}: only arithmetic, comparisons, and, or, not, {', '.join(FUNCTIONS)} are allowed")


def _number(node: ast.AST, values: Mapping[str, Any], text: str) -> Any:
    value = _value(node, values, text)
    if not isinstance(value, int | float):
        raise ValueError(f"{text!r}: {ast.unparse(node)} is {value!r}; arithmetic needs numbers")
    return value


def _lookup(node: ast.AST, values: Mapping[str, Any], text: str) -> Any:
    name = ast.unparse(node)
    if name not in values:
        raise ValueError(f"{text!r}: no value is called {name!r}")
    return values[name]
