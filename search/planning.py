"""What a search is about to do, known and checked before anything starts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import configuration
from configuration import ConfigError
from search import parent, ray_session, resources, samplers, space, spec_file, study_spec, workload
from search.errors import SpecError, StudyError
from search.record import StudyPaths
from search.resources import Room
from search.results import tracking
from search.spec import SearchSpec
from search.storage import address
from search.storage.lease import file_lease
from search.storage.store import Store


@dataclass(frozen=True)
class Plan:
    """A search, resolved."""

    spec: SearchSpec
    paths: StudyPaths
    config: Mapping[str, Any]
    """The workload's Config of the defaults, fixed values merged."""
    manifest: Mapping[str, Any]
    slots: int
    room: Room
    sampler: str
    incumbent: Mapping[str, Any]
    """Values of the first trial."""
    notes: tuple[str, ...]

    @property
    def compares(self) -> bool:
        """Whether trials are to be seen beside a parent, or are of no one order."""
        return self.spec.parent.wanted or len(self.spec.objectives) > 1


def make(spec: SearchSpec, folder: Path, store: Store | None = None) -> Plan:
    """Check a search against the machine and the data, and say what it would do; writes nothing but the data's cache.

    Args:
        spec: the search space.
        folder: of the study, on this machine.
        store: has the truth about the folder; None: it is in the folder itself.
    Raises:
        SpecError: if the resources are not there, the record's place cannot be known, or the workload refuses the data.
        TrackingError: if a logger is asked for and cannot be used.
    """
    paths = StudyPaths(folder, store or Store())
    if paths.store:
        with contextlib.suppress(StudyError), file_lease(paths):  # of a search that runs here, the copy is current
            paths.pull()
    tracking.check(spec.tracking)
    address.resolve(spec.search.storage)
    room = ray_session.room()
    minded = resources.notes(spec, room)
    spec = resources.resolved(spec, room)
    if paths.store and resources.is_gang(spec.resources):
        raise SpecError("--runs: the workers of one trial share its files; name a folder on a shared file system")
    slots = resources.slots(spec.resources, room)
    resources.check_evaluation(spec.evaluation, room)
    module = workload.load(spec.workload)
    config = configuration.build(module.Config, spec_file.fixed_values(spec))
    begun = parent.known(spec, paths)
    training = configuration.build(module.Config, spec_file.parent_values(spec)) if spec.parent.train.values else None
    started = configuration.replace(config, {"parent": str(begun)}) if begun else config
    try:
        manifest = module.prepare(started if training is None or begun else training)
    except ValueError as error:  # the workload's own word for data, or a parent, that cannot be used
        raise SpecError(str(error)) from error
    counts = manifest.get("samples", {})
    if counts.get("train") and not counts.get("test", 1):
        raise SpecError("data: there is no test split, so the promoted could not be evaluated; add one, or deal anew")
    incumbent, notes = defaults(spec, configuration.to_values(config))
    _check_choices(spec, module, started, incumbent, None if begun else training)
    name, why = samplers.choose(spec)
    return Plan(
        spec=spec,
        paths=paths,
        config=configuration.to_values(config),
        manifest=manifest,
        slots=slots,
        room=room,
        sampler=f"{name}: {why}",
        incumbent=incumbent,
        notes=(*minded, *_small(spec), *notes, *manifest.get("warnings", [])),
    )


def _small(spec: SearchSpec) -> list[str]:
    """Say where the space has fewer configurations than the search would have trials."""
    every = samplers.points(spec.parameters)
    if every is None or len(every) >= spec.search.trials:
        return []
    return [f"the space has {len(every)} configurations; none is tried twice, so that the search ends after them"]


def recorded(paths: StudyPaths) -> Plan:
    """Return the plan of a study as its folder tells it; nothing is checked, and what it ran on is not known.

    Raises:
        StudyError: if there is no study.
    """
    spec, content = study_spec.read(paths)
    incumbent, notes = defaults(spec, content["config"])
    name, why = samplers.choose(spec)
    manifest = content["manifest"]
    return Plan(
        spec=spec,
        paths=paths,
        config=content["config"],
        manifest=manifest,
        slots=spec.resources.slots if isinstance(spec.resources.slots, int) else 0,
        room=Room(0.0, 0.0, "a machine that is not known"),
        sampler=f"{name}: {why}",
        incumbent=incumbent,
        notes=(*notes, *manifest.get("warnings", [])),
    )


def _check_choices(
    spec: SearchSpec, module: ModuleType, config: Any, incumbent: Mapping[str, Any], training: Any | None
) -> None:
    """Let the workload refuse what can be chosen, one value at a time beside those of the first trial.

    training: the Config of a parent that is still to be trained.
    """
    if not hasattr(module, "check"):
        return
    given = () if training is None else (training,)
    try:
        module.check(configuration.replace(config, incumbent), *given)
    except ValueError as error:
        raise SpecError(f"parameters: {error}") from error
    for parameter in spec.parameters:
        for choice in parameter.choices or (() if parameter.name in incumbent else (parameter.low,)):
            try:
                chosen = configuration.replace(config, {**incumbent, parameter.name: choice})
            except ConfigError:  # two values that never meet, perhaps: a trial of both would be refused as well
                continue
            try:
                module.check(chosen, *given)
            except ValueError as error:
                raise SpecError(f"parameters.{parameter.name}: {choice!r} cannot be trained: {error}") from error


def defaults(spec: SearchSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the first trial, the workload's own where the space has them, and what had to give way."""
    values: dict[str, Any] = {}
    notes = []
    for parameter in spec.parameters:
        if not space.applies(parameter, values):
            continue
        default = config.get(parameter.name)  # one of those that an open field takes may have none
        value = space.nearest(parameter, default)
        values[parameter.name] = value
        if parameter.name in config and value != default:
            notes.append(f"first trial: {parameter.name} {default!r} is outside the space; {value!r} instead")
    whole = {**config, **values}
    facts = set(workload.facts_of(workload.load(spec.workload)))  # a parent that is still to be trained has none yet
    known = (text for text in spec.constraints if facts.isdisjoint(space.names(text)))
    broken = next((text for text in known if not _holds(text, whole)), None)
    if broken is not None:
        notes.append(f"first trial: these values break the constraint {broken}; it is left out")
    return values, notes


def _holds(constraint: str, values: Mapping[str, Any]) -> bool:
    try:
        return space.holds(constraint, values)
    except (ValueError, TypeError, ArithmeticError):
        return False
