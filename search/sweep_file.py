"""W&B sweep files as search spaces of ours: what can be said exactly is translated, all else is refused by its name.

method           grid, random; bayes is the sampler tpe
metric           the objective, minimized where no goal is given; target is search.target
parameters       value is fixed, values are choices, min and max a range. Of the distributions: constant, categorical,
                 int_uniform, uniform, q_uniform (a step), log_uniform and inv_log_uniform (exponents of e),
                 log_uniform_values, inv_log_uniform_values, q_log_uniform_values by 1 (whole numbers, log), and for
                 method random categorical_w_probabilities; nested parameters have dotted names
early_terminate  hyperband is asha, each rung eta times the one before; without it no trial is stopped
run_cap          search.trials; without it a grid is tried whole, and another search has as many trials as any of ours
command          may start the program with the parameters, and do nothing else
program, project, entity, name, description, apiVersion, kind
                 say where W&B shows the sweep; nothing follows from them

What is not quite the same: a rounded range (q_) has its two ends half as often there, since rounding reaches them from
one side only. Hyperband there looks at each band now and then, and at the value in the band itself; asha looks as soon
as a trial is at the rung, at its best until then, lets ceil(n / eta) of n go on, and has rungs beyond max_iter for
trials that are longer. Iterations there are reported values, here epochs. A configuration is never tried twice here,
and the first trial has the workload's defaults.

Source: docs.wandb.ai, Sweep configuration options; github.com/wandb/sweeps for what these leave open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import configuration
from configuration import ConfigError
from search import space
from search.spec import Parameter

LABELS = ("program", "project", "entity", "name", "description", "apiVersion", "kind")
KEYS = ("method", "metric", "parameters", "early_terminate", "run_cap", "command", *LABELS)
METHODS = {"grid": "grid", "random": "random", "bayes": "tpe"}
MODES = {"maximize": "max", "minimize": "min"}
MACROS = ("env", "interpreter", "program", "args", "args_no_boolean_flags", "args_no_hyphens", "args_json")
SPREAD = ("normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta")
"""Distributions without bounds, or of a form that no sampler here has."""
RANGES = (
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform_values",
    "inv_log_uniform",
    "inv_log_uniform_values",
)
DISTRIBUTIONS = ("constant", "categorical", "categorical_w_probabilities", *RANGES)
ETA = 3
"""Where early_terminate does not say."""

Renamed = Mapping[str, str] | Callable[[str], str]
Value = Callable[[str, Any], Any]
UNCHANGED: Mapping[str, str] = {}

_ORIGINS = {
    "objective.metric": "metric.name",
    "objective.mode": "metric.goal",
    "search.sampler": "method",
    "search.trials": "run_cap",
    "search.target": "metric.target",
    "stopping.min_epochs": "early_terminate.min_iter",
    "stopping.reduction": "early_terminate.eta",
}
_ATTRIBUTES = {"type": "distribution", "low": "min", "high": "max", "step": "q", "choices": "values"}


def is_sweep(content: Any) -> bool:
    """Return whether plain data is a W&B sweep: with a method and parameters, without workload and objective."""
    if not isinstance(content, Mapping):
        return False
    return {"method", "parameters"} <= content.keys() and content.keys().isdisjoint({"workload", "objective"})


def translate(
    content: Mapping[str, Any],
    *,
    workload: str,
    name_of: Renamed = UNCHANGED,
    value_of: Value = lambda name, value: value,
) -> dict[str, Any]:
    """Return a sweep as the content of a search space, plain data as `spec_file` takes it.

    Args:
        content: of the sweep file.
        workload: that trains; the file names a program instead.
        name_of: what the workload's Config calls a parameter that the file has under this dotted name; others stay.
        value_of: makes a value of the Config of the file's name and a single value or choice.
    Raises:
        ConfigError: naming the file's own key, for what is unknown, wrong, or cannot be said of a search here.
    """
    for key in content:
        if key not in KEYS:
            raise configuration.unknown_key(str(key), KEYS)
    _check_labels(content)
    _check_command(content.get("command"), content.get("program"))
    method = configuration.check(Literal["grid", "random", "bayes"], content["method"], "method")
    fixed, parameters = _parameters(content["parameters"], method, name_of, value_of)
    if not parameters:
        raise ConfigError("parameters", "every one has a single value; a search needs one that has several")
    metric = _metric(content.get("metric"))
    search = {"sampler": METHODS[method], **_trials(content.get("run_cap"), method, parameters)}
    return {
        "workload": workload,
        "objective": {"metric": metric["name"], "mode": MODES[metric["goal"]]},
        "parameters": parameters,
        **({"fixed": fixed} if fixed else {}),
        "search": {**search, **({"target": metric["target"]} if "target" in metric else {})},
        "stopping": _stopping(content.get("early_terminate")),
    }


def origin(content: Mapping[str, Any], key: str, name_of: Renamed = UNCHANGED) -> str:
    """Return the key of a sweep file from which a key of its translation came; the key itself where none did."""
    found = _ORIGINS.get(key, key)
    if found != key:
        return found if _has(content, found) else key
    section, _, rest = key.partition(".")
    for theirs, entry in _entries(content["parameters"]):
        place, ours = _place(theirs), _renamed(theirs, name_of)
        if key == ours or (section == "fixed" and rest == ours):
            return f"{place}.value"
        attribute = rest.removeprefix(ours)
        if section == "parameters" and rest.startswith(ours) and attribute[:1] in ("", "."):
            name, bracket, index = attribute[1:].partition("[")
            name = _ATTRIBUTES.get(name, name)
            turned = entry.get("distribution") == "inv_log_uniform"  # its min is the high end
            return place if turned or name not in entry else f"{place}.{name}{bracket}{index}"
    return key


def _has(content: Mapping[str, Any], key: str) -> bool:
    section, _, rest = key.partition(".")
    below = content.get(section)
    return section in content and (not rest or (isinstance(below, Mapping) and rest in below))


def _check_labels(content: Mapping[str, Any]) -> None:
    for key in LABELS:
        if key in content and not isinstance(content[key], str | int | float | None):
            raise ConfigError(key, f"got {content[key]!r}; expected text")
    if content.get("kind", "sweep") != "sweep":
        raise ConfigError("kind", f"got {content['kind']!r}; expected sweep")


def _check_command(content: Any, program: Any) -> None:
    """Refuse what would make a run another one than its parameters say."""
    if content is None:
        return
    if not isinstance(content, list):
        raise ConfigError("command", f"got {content!r}; expected a list such as ['${{interpreter}}', '${{program}}']")
    harmless = {*(f"${{{macro}}}" for macro in MACROS), "/usr/bin/env", program}
    for index, word in enumerate(content):
        text = str(word)
        if text in harmless or re.fullmatch(r"(.*[/\\])?python[\d.]*(\.exe)?", text):
            continue
        problem = f"got {word!r}, which may change the run; remove it, and say it as a parameter: NAME: {{value: ...}}"
        raise ConfigError(f"command[{index}]", problem)


def _metric(content: Any) -> dict[str, Any]:
    if content is None:
        raise ConfigError("metric", "missing; trials are compared by it: {name: ..., goal: maximize or minimize}")
    known = ("name", "goal", "target")
    _check_keys(content, known, "metric")
    if "name" not in content:
        raise ConfigError("metric.name", "missing; it is what the workload reports")
    goal = configuration.check(Literal["maximize", "minimize"], content.get("goal", "minimize"), "metric.goal")
    target = {"target": _number(content["target"], "metric.target")} if "target" in content else {}
    return {"name": configuration.check(str, content["name"], "metric.name"), "goal": goal, **target}


def _trials(run_cap: Any, method: str, parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    if run_cap is not None:
        return {"trials": configuration.check(int, run_cap, "run_cap")}
    sizes = [space.grid_size(Parameter(name=name, **entry)) for name, entry in parameters.items()]
    if method != "grid" or None in sizes:
        return {}
    return {"trials": math.prod(size or 0 for size in sizes)}


def _stopping(content: Any) -> dict[str, Any]:
    if content is None:
        return {"rule": "none"}
    _check_keys(content, ("type", "min_iter", "max_iter", "s", "eta", "strict"), "early_terminate")
    configuration.check(Literal["hyperband"], content.get("type"), "early_terminate.type")
    if configuration.check(bool, content.get("strict", False), "early_terminate.strict"):
        raise ConfigError("early_terminate.strict", "got true; asha has one way of comparing trials, write false")
    eta = _number(content.get("eta", ETA), "early_terminate.eta")
    if eta != int(eta) or eta < 2:
        raise ConfigError("early_terminate.eta", f"got {eta:g}; asha takes a whole number of at least 2")
    return {"rule": "asha", "min_epochs": _first_band(content, int(eta)), "reduction": int(eta)}


def _first_band(content: Mapping[str, Any], eta: int) -> int:
    """Return the first epoch at which trials are compared: said as such, or by the last and how many come before it."""
    bands = [key for key in ("min_iter", "max_iter", "s") if key in content]
    given: dict[str, int] = {key: configuration.check(int, content[key], f"early_terminate.{key}") for key in bands}
    if "min_iter" in given:
        for key in ("max_iter", "s"):
            if key in given:
                raise ConfigError(f"early_terminate.{key}", "together with min_iter; keep one of the two")
        return given["min_iter"]
    for key in ("max_iter", "s"):
        if key not in given:
            other = "s" if key == "max_iter" else "max_iter"
            missing = f"missing beside {other}" if other in given else "missing"
            raise ConfigError(f"early_terminate.{key}", f"{missing}; give min_iter, or max_iter and s")
        if given[key] < 1:
            raise ConfigError(f"early_terminate.{key}", f"got {given[key]}; expected at least 1")
    band = given["max_iter"]
    for count in range(given["s"]):
        if band < eta and count:
            break  # W&B has no band below the first iteration
        if band % eta:
            problem = f"got {given['max_iter']}, and {eta} does not divide {band}; write min_iter, the first epoch"
            raise ConfigError("early_terminate.max_iter", problem)
        band //= eta
    return band


def _parameters(
    content: Any, method: str, name_of: Renamed, value_of: Value
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what is fixed, and what is searched."""
    fixed: dict[str, Any] = {}
    searched: dict[str, dict[str, Any]] = {}
    for theirs, entry in _entries(content):
        place = _place(theirs)
        ours = _located(place, _renamed, theirs, name_of)
        if ours in fixed or ours in searched:
            raise ConfigError(place, f"is {ours}, which another parameter is too; keep one")
        distribution = _distribution(entry, place)
        if distribution == "constant":
            value = _with_exponent(_known(entry, ("value",), place)["value"])
            fixed[ours] = _located(f"{place}.value", value_of, theirs, value)
        elif distribution in RANGES:
            found = _range(distribution, entry, place)
            if found["low"] == found["high"]:
                fixed[ours] = found["low"]
            else:
                searched[ours] = found
        else:
            searched[ours] = _choices(distribution, entry, place, method, theirs, value_of)
    return fixed, searched


def _entries(content: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each parameter of the file under its dotted name, nested ones too."""
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(_place(prefix.rstrip(".")) if prefix else "parameters", "expected at least one parameter")
    for key, entry in content.items():
        name = f"{prefix}{key}"
        if not isinstance(entry, Mapping):
            raise ConfigError(_place(name), f"got {entry!r}; expected {{value: ...}}, {{values: ...}} or {{min, max}}")
        if "parameters" not in entry:
            yield name, entry
            continue
        _known(entry, ("parameters",), _place(name))
        yield from _entries(entry["parameters"], f"{name}.")


def _place(name: str) -> str:
    return f"parameters.{name}"


def _renamed(name: str, name_of: Renamed) -> str:
    return name_of(name) if callable(name_of) else name_of.get(name, name)


def _distribution(entry: Mapping[str, Any], place: str) -> str:
    """Return the distribution that a parameter names, or that W&B takes where it names none."""
    named = entry.get("distribution")
    if named in SPREAD:
        problem = f"no sampler here draws from {named}; give a range: uniform or log_uniform_values, with min and max"
        raise ConfigError(f"{place}.distribution", problem)
    if named == "q_log_uniform":
        problem = "its ends are powers of e, which lie between multiples of q; write q_log_uniform_values"
        raise ConfigError(f"{place}.distribution", problem)
    if named is not None:
        if named not in DISTRIBUTIONS:
            hint = configuration.unknown_key(str(named), (*DISTRIBUTIONS, *SPREAD)).problem.partition("; ")[2]
            raise ConfigError(f"{place}.distribution", f"got {named!r}; {hint}")
        return str(named)
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "min" in entry or "max" in entry:
        whole = all(isinstance(entry.get(key), int) for key in ("min", "max"))
        return "int_uniform" if whole else "uniform"
    raise ConfigError(place, f"got {dict(entry)!r}; expected value, values, or min and max")


def _choices(
    distribution: str, entry: Mapping[str, Any], place: str, method: str, theirs: str, value_of: Value
) -> dict[str, Any]:
    weighed = distribution == "categorical_w_probabilities"
    keys = ("values", "probabilities") if weighed else ("values",)
    values = _known(entry, keys, place)["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{place}.values", f"got {values!r}; expected a list of at least one value")
    choices = [
        _located(f"{place}.values[{index}]", value_of, theirs, _with_exponent(value))
        for index, value in enumerate(values)
    ]
    if not weighed:
        return {"type": "categorical", "choices": choices}
    if method != "random":
        raise ConfigError(f"{place}.probabilities", f"method {method} does not draw by them; write method: random")
    probabilities = entry["probabilities"]
    if not isinstance(probabilities, list):
        raise ConfigError(f"{place}.probabilities", f"got {probabilities!r}; expected a number for each value")
    shares = [_number(share, f"{place}.probabilities[{index}]") for index, share in enumerate(probabilities)]
    return {"type": "categorical", "choices": choices, "probabilities": shares}


def _located(key: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may refuse its arguments, and say of which key of the file they are."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(key, error.problem) from error
    except ValueError as error:
        raise ConfigError(key, str(error)) from error


def _range(distribution: str, entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    rounded = distribution.startswith("q_")
    known = _known({**({"q": 1} if rounded else {}), **entry}, ("min", "max", *(["q"] if rounded else [])), place)
    low, high = (_number(known[key], f"{place}.{key}") for key in ("min", "max"))
    if distribution == "int_uniform":
        for key in ("min", "max"):
            configuration.check(int, known[key], f"{place}.{key}")
        return {"type": "int", "low": int(low), "high": int(high)}
    if distribution == "uniform":
        return {"type": "float", "low": low, "high": high}
    if rounded:
        return _rounded(distribution, low, high, _number(known["q"], f"{place}.q"), known["q"], place)
    if distribution == "log_uniform":
        low, high = _exp(low, f"{place}.min"), _exp(high, f"{place}.max")
    elif distribution == "inv_log_uniform":  # of 1 / x: its largest exponent is the smallest x
        low, high = _exp(-high, f"{place}.max"), _exp(-low, f"{place}.min")
    return {"type": "float", "low": low, "high": high, "log": True}


def _rounded(distribution: str, low: float, high: float, step: float, given: Any, place: str) -> dict[str, Any]:
    """Return multiples of q as a range with a step; `given` is q as the file has it, whole numbers where it is one."""
    if step <= 0:
        raise ConfigError(f"{place}.q", f"got {step:g}; expected more than 0")
    for key, end in (("min", low), ("max", high)):
        times = end / step
        if not math.isfinite(times) or not math.isclose(times, round(times), abs_tol=1e-9):
            raise ConfigError(f"{place}.{key}", f"got {end:g}, which is no multiple of q {step:g}; write one")
    whole = isinstance(given, int)
    kind, number = ("int", round) if whole else ("float", float)
    bounds = {"type": kind, "low": number(low), "high": number(high)}
    if distribution == "q_uniform":
        return {**bounds, "step": number(step)}
    if not whole or step != 1:
        raise ConfigError(f"{place}.q", f"got {given!r}; a logarithmic range has whole numbers, q 1, or none at all")
    return {**bounds, "log": True}


def _exp(exponent: float, key: str) -> float:
    try:
        found = math.exp(exponent)
    except OverflowError:
        found = math.inf
    if not 0 < found < math.inf:
        problem = f"e to the {exponent:g} is no number here; log_uniform_values takes the values themselves"
        raise ConfigError(key, problem)
    return found


def _number(value: Any, key: str) -> float:
    found: float = configuration.check(float, _with_exponent(value), key)
    return found


def _with_exponent(value: Any) -> Any:
    """Return 1e-5 as the number that W&B takes it for; for YAML 1.1 it is text."""
    if isinstance(value, list):
        return [_with_exponent(item) for item in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+", value)
    return float(value) if is_number else value


def _known(entry: Mapping[str, Any], keys: Sequence[str], place: str) -> Mapping[str, Any]:
    """Return a parameter that has these keys and, but for its distribution, no other."""
    _check_keys(entry, (*keys, "distribution"), place)
    for key in keys:
        if key not in entry:
            raise ConfigError(f"{place}.{key}", "missing")
    return entry


def _check_keys(content: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(place, f"got {content!r}; expected keys {', '.join(known)}")
    for key in content:
        if key not in known:
            raise ConfigError(f"{place}.{key}", configuration.unknown_key(str(key), known).problem)
