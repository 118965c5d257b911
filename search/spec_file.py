"""A YAML file to a checked `SearchSpec`, every key against the workload's Config, before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import configuration
from configuration import ConfigError, YamlError
from search import samplers, space, sweep_file, workload
from search.errors import SpecError
from search.spec import (
    Evaluation,
    Objective,
    Parameter,
    Parent,
    Promotion,
    Resources,
    Search,
    SearchSpec,
    Stopping,
    Tracking,
)
from search.storage import address

FOLDER = Path("search_spaces")
SECTIONS: dict[str, type] = {
    "parent": Parent,
    "search": Search,
    "stopping": Stopping,
    "resources": Resources,
    "promotion": Promotion,
    "evaluation": Evaluation,
    "tracking": Tracking,
}
KEYS = ("workload", "data", "objective", "parameters", "constraints", "fixed", *SECTIONS)
ATTRIBUTES = ("type", "low", "high", "log", "step", "choices", "probabilities", "when")
MINIMA = {
    "search.trials": 1,
    "stopping.min_epochs": 1,
    "stopping.reduction": 2,
    "stopping.brackets": 1,
    "stopping.min_trials": 1,
    "resources.slots": 1,
    "resources.workers": 1,
    "resources.max_attempts": 1,
    "promotion.k": 1,
    "promotion.epochs": 1,
    "promotion.seeds": 1,
    "evaluation.keep_checkpoints": 1,
}


def load(
    space_name: str, assignments: Iterable[str] = (), folder: Path = FOLDER, *, trains: str | None = None
) -> SearchSpec:
    """Return the checked search space of a file; a bare name is looked up in `search_spaces/`.

    Args:
        space_name: path of a YAML file, or a name such as `nuclei.yaml` or `nuclei`; or a sweep file of W&B.
        assignments: `key=value` texts that override the file, such as `search.trials=64`.
        folder: where bare names are looked up.
        trains: name of the workload, for a sweep file, which has none.
    Raises:
        SpecError: naming the file, the key and the remedy.
    """
    path = _find(space_name, folder)
    content, assignments = _read(path), list(assignments)
    sweep = content if sweep_file.is_sweep(content) else None
    try:
        if sweep is not None:
            content = _translated(sweep, trains)
        elif trains is not None:
            raise ConfigError("--workload", "is for the sweep files of W&B; this search space names its own workload")
        return _spec(path.stem, _override(content, assignments))
    except ConfigError as error:
        told = error if sweep is None else _in_words_of(sweep, trains, error, assignments)
        raise SpecError(f"{path.name}: {told}") from error


def _translated(sweep: Mapping[str, Any], trains: str | None) -> dict[str, Any]:
    """Return a sweep file as a search space of the workload that trains."""
    if trains is None:
        raise ConfigError("", "a sweep of W&B, which does not say what trains; name it with --workload NAME")
    try:
        module = workload.load(trains)
    except ValueError as error:
        raise ConfigError("--workload", str(error)) from error
    names, known = workload.sweep_names_of(module), configuration.fields(module.Config)

    def name_of(name: str) -> str:
        ours = names.get(name, name)
        if configuration.find(known, ours) is None and ours != configuration.PRESET:
            raise configuration.unknown_key(name, [*names, *known])
        return ours

    return sweep_file.translate(sweep, workload=trains, name_of=name_of, value_of=workload.sweep_value_of(module))


def _in_words_of(
    sweep: Mapping[str, Any], trains: str | None, error: ConfigError, assignments: Iterable[str]
) -> ConfigError:
    """Return an error with the sweep file's own key, unless an assignment has brought it about."""
    given = (text.partition("=")[0].strip() for text in assignments)
    if any(f"{error.key}.".startswith(f"{key}.") for key in given):
        return error
    try:
        names = workload.sweep_names_of(workload.load(trains or ""))
        return ConfigError(sweep_file.origin(sweep, error.key, names), error.problem)
    except ValueError:  # the error is about the workload, or about parameters that are none
        return error


def config_values(spec: SearchSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value of the workload's Config for one trial, fixed ones and defaults included.

    Raises:
        ConfigError: if the Config refuses the combination.
    """
    config_class = workload.load(spec.workload).Config
    return configuration.to_values(configuration.build(config_class, {**fixed_values(spec), **params}))


def fixed_values(spec: SearchSpec) -> dict[str, Any]:
    """Return the Config's values that every trial has: those that are fixed, and how its workers train together."""
    if spec.resources.strategy == "auto":
        return dict(spec.fixed)
    stage = {"zero_stage": spec.resources.zero_stage} if spec.resources.strategy == "deepspeed" else {}
    return {**spec.fixed, "strategy": spec.resources.strategy, **stage}


def parent_values(spec: SearchSpec) -> dict[str, Any]:
    """Return the Config's values that a parent is trained with, where the search trains it."""
    without = tuple(f"{part}." for part in workload.uninherited_by(workload.load(spec.workload)))
    fixed = {name: value for name, value in fixed_values(spec).items() if not name.startswith(without)}
    return {**fixed, **spec.parent.train.values}


def _find(name: str, folder: Path) -> Path:
    candidates = [Path(name), Path(f"{name}.yaml"), folder / name, folder / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.name for path in folder.glob("*.yaml"))
    raise SpecError(f"{name}: no such search space; here are {', '.join(known) or 'none'} (in {folder}/)")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = configuration.read_yaml(path)
    except YamlError as error:
        raise SpecError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path.name}: expected keys {', '.join(KEYS)}; got {type(content).__name__}")
    return content


def _override(content: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    content = dict(content)
    for text in assignments:
        key, value = configuration.parse_assignment(text)
        section, _, rest = key.partition(".")
        if section not in KEYS:
            raise ConfigError(
                key, f"no such section; known: {', '.join(KEYS)}. Values of the workload: fixed.{key}=..."
            )
        if not rest:
            content[section] = value
        elif section in ("data", "fixed", "parameters", *SECTIONS, "objective"):
            content[section] = _merged(section, content.get(section) or {}, rest, value)
        else:
            raise ConfigError(key, f"{section} has no keys of its own; write {section}=[...]")
    return content


def _merged(section: str, content: Any, key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a section with one dotted key set and all below it replaced, however the file nested it."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{section}.{key}", f"{section} has no keys of its own in the file; write {section}=...")
    merged: dict[str, Any] = {}
    for name, item in _flat(section, content).items():
        # In its old place: a parameter must stay above those that depend on it.
        merged.update({key: value} if f"{name}.".startswith(f"{key}.") else {name: item})
    return {**merged, key: value}


def _flat(section: str, content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a section's values by their dotted names; refuse one that is written both nested and with dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        found = configuration.flatten({key: value}, prefix)
        twice = next((name for name in found if name in flat), None)
        if twice is not None:
            raise ConfigError(f"{section}.{twice.removeprefix(prefix)}", "stands twice, nested and with dots; keep one")
        flat.update(found)
    return flat


def _spec(name: str, content: dict[str, Any]) -> SearchSpec:
    for key in content:
        if key not in KEYS:
            raise configuration.unknown_key(str(key), KEYS)
    for key in ("workload", "objective", "parameters"):
        if key not in content:
            raise ConfigError(key, "missing; every search space names it")
    if str(content["workload"]).startswith("."):
        raise ConfigError("workload", f"got {content['workload']!r}; expected a name, or a whole one as package.module")
    try:
        module = workload.load(str(content["workload"]))
    except ValueError as error:
        raise ConfigError("workload", str(error)) from error
    fixed = _fixed(content)
    config = _located("fixed", configuration.build, module.Config, fixed)
    parameters = tuple(_parameters(content["parameters"], module.Config, config, fixed))
    spec = SearchSpec(
        name=name,
        workload=str(content["workload"]),
        objectives=tuple(_objectives(content["objective"], module.metrics(config))),
        parameters=parameters,
        constraints=_constraints(
            content.get("constraints"), configuration.to_values(config), parameters, workload.facts_of(module)
        ),
        fixed=fixed,
        **{key: _section(key, content.get(key)) for key in SECTIONS},
    )
    _check_numbers(spec)
    address.check(spec.search.storage)
    _check_workers(spec, module.Config)
    _check_parent(spec, content.get("parent") or {}, module.Config)
    return spec


def _check_parent(spec: SearchSpec, content: Mapping[str, Any], config_class: type[Any]) -> None:
    parent = spec.parent
    if not parent.wanted:
        if content:
            raise ConfigError("parent", "names none; give checkpoint, study or train: {epochs: ...}, or leave it out")
        return
    given = [("checkpoint", parent.checkpoint), ("study", parent.study), ("train", parent.train.values)]
    chosen = [name for name, value in given if value]
    if len(chosen) > 1:
        raise ConfigError(f"parent.{chosen[0]}", f"together with parent.{chosen[1]}; there is one parent, keep one")
    if "parent" not in configuration.fields(config_class):
        raise ConfigError("parent", f"{spec.workload} starts from no parent, its Config has none; remove this section")
    elsewhere = [f"fixed.{name}" for name in spec.fixed] + [f"parameters.{item.name}" for item in spec.parameters]
    for key in elsewhere:
        if key.partition(".")[2] in ("parent", "parent_sha256"):
            raise ConfigError(key, "given twice; the section parent says what trials start from, remove this")
    if parent.train.values:
        _located("parent.train", configuration.build, config_class, parent_values(spec))


def _check_workers(spec: SearchSpec, config_class: type[Any]) -> None:
    resources = spec.resources
    known = configuration.fields(config_class)
    if (resources.workers > 1 or resources.strategy not in ("auto", "single")) and "strategy" not in known:
        key = "resources.workers" if resources.workers > 1 else "resources.strategy"
        got = resources.workers if resources.workers > 1 else resources.strategy
        raise ConfigError(key, f"got {got}; workload {spec.workload} trains in one process only")
    if resources.strategy == "single" and resources.workers > 1:
        raise ConfigError("resources.strategy", f"got single for {resources.workers} workers; write auto or ddp")
    elsewhere = [*spec.fixed, *(parameter.name for parameter in spec.parameters)]
    if resources.strategy != "auto" and "strategy" in elsewhere:
        raise ConfigError("resources.strategy", "stands under fixed or parameters too; keep one")


def _fixed(content: Mapping[str, Any]) -> dict[str, Any]:
    fixed: dict[str, Any] = {}
    for key, prefix in (("fixed", ""), ("data", "data.")):
        section = content.get(key) or {}
        if not isinstance(section, Mapping):
            raise ConfigError(key, f"expected keys of the workload's Config; got {section!r}")
        found = _flat(key, section, prefix)
        if twice := next((name for name in found if name in fixed), None):
            raise ConfigError(twice, "stands under fixed and under data; keep one")
        fixed.update(found)
    return fixed


def _located(prefix: str, function: Any, *arguments: Any) -> Any:
    """Call a function and put the section's name before the key that it complains about."""
    try:
        return function(*arguments)
    except ConfigError as error:
        key = error.key if error.key.startswith("data.") and prefix == "fixed" else f"{prefix}.{error.key}".rstrip(".")
        raise ConfigError(key, error.problem) from error


def _section(key: str, content: Any) -> Any:
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(key, f"expected keys {', '.join(configuration.fields(SECTIONS[key]))}; got {content!r}")
    return _located(key, configuration.build, SECTIONS[key], content or {})


def _objectives(content: Any, reported: Mapping[str, str]) -> Iterator[Objective]:
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ConfigError("objective", "empty; name a metric and a mode")
    seen = set[str]()
    for entry in entries:
        if not isinstance(entry, Mapping) or "metric" not in entry or set(entry) - {"metric", "mode"}:
            raise ConfigError("objective", f"expected {{metric: NAME, mode: max or min}}; got {entry!r}")
        metric = str(entry["metric"])
        if metric not in reported:
            hint = configuration.unknown_key(metric, reported).problem.partition("; ")[2]
            near = f"{hint} It" if hint.startswith("did you mean") else "it"
            problem = f"the workload does not report {metric!r}; {near} reports {', '.join(reported)}"
            raise ConfigError("objective.metric", problem)
        if metric in seen:
            raise ConfigError("objective.metric", f"{metric!r} stands twice")
        seen.add(metric)
        mode = configuration.check(Literal["max", "min"], entry.get("mode", reported[metric]), "objective.mode")
        yield Objective(metric=metric, mode=mode)


def _parameters(content: Any, config_class: type, config: Any, fixed: Mapping[str, Any]) -> Iterator[Parameter]:
    known = configuration.fields(config_class)
    if not isinstance(content, Mapping) or not content:
        raise ConfigError("parameters", "expected at least one `name: {type: float, low: ..., high: ...}`")
    entries = _parameter_entries(content, known)
    above: dict[str, Parameter] = {}
    for name, entry in entries.items():
        field = configuration.find(known, name)
        if field is None:
            raise _located("parameters", _raise, configuration.unknown_key(name, known))
        if name in fixed:
            raise ConfigError(f"parameters.{name}", "searched and fixed at once; remove one of the two")
        parameter = _located(f"parameters.{name}", _parameter, name, entry, field)
        _check_when(parameter, entries, above)
        above[name] = parameter
    for parameter in above.values():
        _try_values(parameter, config, list(above.values()))
        yield parameter


def _raise(error: Exception) -> None:
    raise error


def _parameter_entries(content: Mapping[str, Any], known: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the entry of each parameter by its dotted name, whether the file nests names or writes dots."""
    names, entries = set(known), dict[str, dict[str, Any]]()
    for key, value in _flat("parameters", content).items():
        name, attribute = _split_attribute(key, names)
        entry = entries.setdefault(name, {})
        if not attribute:
            raise ConfigError(f"parameters.{name}", f"expected {{type, low, high}} or {{type, choices}}; got {value!r}")
        if attribute.startswith("when."):
            entry.setdefault("when", {})[attribute.removeprefix("when.")] = value
        else:
            entry[attribute] = value
    return entries


def _split_attribute(key: str, names: set[str]) -> tuple[str, str]:
    """Split `loss.dice.low` into the parameter and its attribute."""
    parts = key.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    name = next((prefix for prefix in prefixes if prefix in names), None)
    if name is None:
        match = re.match(rf"(.+?)\.({'|'.join(ATTRIBUTES)})(\.|$)", key)
        name = match[1] if match else key.rpartition(".")[0] or key
    return name, key[len(name) + 1 :]


def _parameter(name: str, entry: Mapping[str, Any], field: configuration.Field) -> Parameter:
    known = configuration.fields(Parameter)
    for key in entry:
        if key not in ATTRIBUTES:
            raise configuration.unknown_key(str(key), ATTRIBUTES)
    entry = dict(entry)
    when = entry.pop("when", None) or {}
    kind = configuration.check(known["type"].annotation, entry.get("type", _guess(entry)), "type")
    if kind == "categorical":
        return _categorical(name, entry, field, when)
    return _numeric(name, kind, entry, field, when)


def _guess(entry: Mapping[str, Any]) -> str | None:
    return "categorical" if "choices" in entry else None


def _categorical(name: str, entry: Mapping[str, Any], field: configuration.Field, when: Any) -> Parameter:
    for key in ("low", "high", "log", "step"):
        if key in entry:
            raise ConfigError(key, "belongs to float and int; a categorical has choices")
    choices = entry.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ConfigError("choices", f"got {choices!r}; expected a list of at least one value")
    checked = [
        configuration.check(field.annotation, choice, f"choices[{index}]") for index, choice in enumerate(choices)
    ]
    plain = tuple(list(choice) if isinstance(choice, tuple) else choice for choice in checked)
    if len({space.encode(choice) for choice in plain}) < len(plain):
        raise ConfigError("choices", "a value stands twice")
    probabilities = _probabilities(entry.get("probabilities"), len(plain))
    return Parameter(name=name, type="categorical", choices=plain, probabilities=probabilities, when=_when(when))


def _probabilities(content: Any, count: int) -> tuple[float, ...]:
    if content is None:
        return ()
    found: tuple[float, ...] = configuration.check(tuple[float, ...], content, "probabilities")
    if len(found) != count:
        raise ConfigError("probabilities", f"got {len(found)} for {count} choices; expected one for each")
    for index, probability in enumerate(found):
        if probability <= 0:
            problem = f"got {probability}; expected more than 0, so leave out a choice that is never to be drawn"
            raise ConfigError(f"probabilities[{index}]", problem)
    if not math.isclose(total := math.fsum(found), 1.0, abs_tol=1e-6):
        raise ConfigError("probabilities", f"add up to {total:g}; expected 1")
    return found


def _numeric(name: str, kind: Any, entry: Mapping[str, Any], field: configuration.Field, when: Any) -> Parameter:
    for key in ("choices", "probabilities"):
        if key in entry:
            raise ConfigError(key, f"belongs to type categorical; this one is {kind}")
    number = int if kind == "int" else float
    for key in ("low", "high"):
        if entry.get(key) is None:
            raise ConfigError(key, "missing; float and int have low and high")
    low, high = (configuration.check(number, entry[key], key) for key in ("low", "high"))
    for key, value in (("low", low), ("high", high)):
        try:
            configuration.check(field.annotation, value, key)
        except ConfigError as error:
            wanted = configuration.type_name(field.annotation)
            raise ConfigError("type", f"got {kind}; {name} takes {wanted}") from error
    log = configuration.check(bool, entry.get("log", False), "log")
    step = configuration.check(number, entry["step"], "step") if entry.get("step") is not None else None
    _check_range(low, high, log, step)
    return Parameter(name=name, type=kind, low=low, high=high, log=log, step=step, when=_when(when))


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ConfigError("low", f"{low} is above high {high}; swap them")
    if low == high:
        raise ConfigError("low", f"the range from {low} to {high} has one value; put it under fixed")
    if log and low <= 0:
        raise ConfigError("low", f"got {low}; a logarithmic scale needs more than 0")
    if log and step is not None:
        raise ConfigError("step", "not together with log")
    if step is not None and (step <= 0 or step > high - low):
        raise ConfigError("step", f"got {step}; expected more than 0 and at most {high - low}")


def _when(when: Any) -> dict[str, Any]:
    if not isinstance(when, Mapping):
        raise ConfigError("when", f"expected {{parameter: value or list of values}}; got {when!r}")
    flat = configuration.flatten(when)
    return {name: tuple(wanted) if isinstance(wanted, list) else (wanted,) for name, wanted in flat.items()}


def _check_when(parameter: Parameter, entries: Mapping[str, Any], above: Mapping[str, Parameter]) -> None:
    for parent, wanted in parameter.when.items():
        key = f"parameters.{parameter.name}.when"
        if parent not in entries:
            raise _located(key, _raise, configuration.unknown_key(parent, entries))
        if parent not in above:
            raise ConfigError(key, f"{parent!r} must stand above {parameter.name!r}")
        for value in wanted:
            if not space.contains(above[parent], value):
                raise ConfigError(f"{key}.{parent}", f"got {value!r}, which {parent} never is; {_range(above[parent])}")


def _range(parameter: Parameter) -> str:
    if parameter.choices:
        return f"it is one of {', '.join(map(str, parameter.choices))}"
    return f"it is from {parameter.low} to {parameter.high}"


def _try_values(parameter: Parameter, config: Any, searched: Sequence[Parameter]) -> None:
    """Refuse a bound or choice that the Config itself refuses, beside the defaults and any other value searched."""
    keys = [f"choices[{index}]" for index in range(len(parameter.choices))] or ["low", "high"]
    others = [{other.name: end} for other in searched if other is not parameter for end in _ends(other)]
    for key, value in zip(keys, _ends(parameter), strict=True):
        try:
            configuration.replace(config, {parameter.name: value})
        except ConfigError as error:
            # Beside another value it may be fine; that is what constraints and refused trials are for.
            if not any(_fits(config, {**other, parameter.name: value}) for other in others):
                raise ConfigError(f"parameters.{parameter.name}.{key}", error.problem) from error


def _ends(parameter: Parameter) -> tuple[Any, ...]:
    return parameter.choices or (parameter.low, parameter.high)


def _fits(config: Any, values: Mapping[str, Any]) -> bool:
    try:
        configuration.replace(config, values)
    except ConfigError:
        return False
    return True


def _constraints(
    content: Any, config: Mapping[str, Any], parameters: tuple[Parameter, ...], facts: Sequence[str]
) -> tuple[str, ...]:
    """Return the constraints as they will be computed; `facts` are what the workload knows of a config besides."""
    constraints = content or []
    if not isinstance(constraints, list) or not all(isinstance(item, str) for item in constraints):
        raise ConfigError("constraints", f"expected a list of texts such as 'a.b * 2 <= c'; got {content!r}")
    values = {**config, **{parameter.name: (parameter.choices or (parameter.low,))[0] for parameter in parameters}}
    values |= dict.fromkeys(facts, 1.0)
    found = []
    for index, constraint in enumerate(constraints):
        try:
            found.append(space.spelled_out(constraint, facts))
            space.check_names(found[-1], values)
            space.holds(found[-1], values)
        except ValueError as error:
            raise ConfigError(f"constraints[{index}]", str(error)) from error
        except (TypeError, ArithmeticError) as error:
            raise ConfigError(f"constraints[{index}]", f"{constraint!r}: {error.args[-1]}") from error
    return tuple(found)


def _check_numbers(spec: SearchSpec) -> None:
    search = spec.search
    for key, least in MINIMA.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(spec, section), name)
        if isinstance(value, int) and value < least:
            raise ConfigError(key, f"got {value}; expected at least {least}")
    for key, amount in (("search.wall_time_s", search.wall_time_s), ("search.slot_hours", search.slot_hours)):
        if amount is not None and amount <= 0:
            raise ConfigError(key, f"got {amount}; expected more than 0, or null for no limit")
    if spec.resources.hung_after_s != "auto" and spec.resources.hung_after_s <= 0:
        raise ConfigError("resources.hung_after_s", f"got {spec.resources.hung_after_s}; expected more than 0, or auto")
    if spec.evaluation.cpus < 0:
        raise ConfigError("evaluation.cpus", f"got {spec.evaluation.cpus}; expected at least 0")
    for key, gpus in (
        ("resources.gpus_per_worker", spec.resources.gpus_per_worker),
        ("evaluation.gpus", spec.evaluation.gpus),
    ):
        if gpus != "auto" and gpus < 0:
            raise ConfigError(key, f"got {gpus}; expected at least 0")
        if gpus != "auto" and gpus > 1 and gpus != int(gpus):
            raise ConfigError(key, f"got {gpus}; above one GPU it must be a whole number")
    if len(spec.objectives) > 1 and search.sampler == "cmaes":
        raise ConfigError("search.sampler", "cmaes knows one objective; use tpe, gp or nsga2")
    if search.sampler != "random" and (weighed := next((p.name for p in spec.parameters if p.probabilities), None)):
        problem = f"known to the sampler random only; this search's is {search.sampler}"
        raise ConfigError(f"parameters.{weighed}.probabilities", problem)
    if search.sampler == "grid" and (endless := [p.name for p in spec.parameters if space.grid_size(p) is None]):
        raise ConfigError("search.sampler", f"grid needs choices or a step for {', '.join(endless)}")
    if search.sampler == "grid" and (conditional := [p.name for p in spec.parameters if p.when]):
        raise ConfigError("search.sampler", f"grid knows no conditional parameters ({', '.join(conditional)}); use tpe")
    if search.sampler == "grid" and (size := samplers.grid_size(spec.parameters)) and size > samplers.LARGEST_GRID:
        raise ConfigError("search.sampler", f"the grid has {size} points; use random, qmc or tpe")
    if spec.resources.cpus_per_worker <= 0:
        raise ConfigError("resources.cpus_per_worker", f"got {spec.resources.cpus_per_worker}; expected more than 0")
