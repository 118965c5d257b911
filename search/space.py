"""Parameters of a search space as Optuna's distributions, and the arithmetic of constraints."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from search.spec import Parameter

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
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
    if parameter.type == "int":
        step = 1 if parameter.step is None else int(parameter.step)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


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
    """Return the value of the parameter that is nearest to a default that may lie outside its range."""
    if parameter.type == "categorical":
        options = [encode(choice) for choice in parameter.choices]
        wanted = encode(default)
        return decode(parameter, wanted if wanted in options else options[0])
    assert parameter.low is not None and parameter.high is not None
    value = min(max(float(default), parameter.low), parameter.high)
    if parameter.step is not None:
        value = parameter.low + round((value - parameter.low) / parameter.step) * parameter.step
        value = value if value <= parameter.high else value - parameter.step
    return round(value) if parameter.type == "int" else value


def grid_values(parameter: Parameter) -> list[Any] | None:
    """Return all values of a parameter, or None where they cannot be counted."""
    if parameter.type == "categorical":
        return [encode(choice) for choice in parameter.choices]
    assert parameter.low is not None and parameter.high is not None
    step = (
        parameter.step if parameter.step is not None else (1 if parameter.type == "int" and not parameter.log else None)
    )
    if step is None:
        return None
    count = math.floor((parameter.high - parameter.low) / step + 1e-9) + 1
    values = [parameter.low + index * step for index in range(count)]
    return [round(value) for value in values] if parameter.type == "int" else values


def holds(constraint: str, values: Mapping[str, Any]) -> bool:
    """Return whether simple arithmetic over dotted names is true, such as `network.depth * 2 <= data.tile`.

    Raises:
        ValueError: for anything but arithmetic, comparisons, and/or/not, min, max, abs, len, sum and known names.
    """
    try:
        tree = ast.parse(constraint, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read {constraint!r}: {error.msg}") from error
    return bool(_value(tree, values, constraint))


def _value(node: ast.AST, values: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name() | ast.Attribute():
            return _lookup(node, values, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, values, text), _value(right, values, text))
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


def _lookup(node: ast.AST, values: Mapping[str, Any], text: str) -> Any:
    name = ast.unparse(node)
    if name not in values:
        raise ValueError(f"{text!r}: no value is called {name!r}")
    return values[name]
