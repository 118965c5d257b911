"""What a person reads before a search and after it, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import resources, rules
from search.record import StudyPaths
from search.results.leaderboard import Interval, Row, beside_majority, read_promotion
from search.results.plots import show
from search.spec import Objective, Parameter, SearchSpec
from search.storage import address, store
from search.study import RESULT

if TYPE_CHECKING:
    from search.planning import Plan

SHOWN_PARAMETERS = 6
_BETTER = {"max": "more", "min": "less"}


def plan_text(plan: Plan) -> str:
    """Return what a search would do: trials, slots, resources, what its budget buys, and where all of it goes."""
    spec = plan.spec
    samples = ", ".join(f"{count} {name}" for name, count in plan.manifest["samples"].items())
    lines = {
        "search": f"{spec.name}, workload {spec.workload}, in {_where(plan.paths)}{_ended(plan)}",
        "record": address.shown(url) if (url := address.resolve(spec.search.storage)) else "",
        "data": f"{samples}{'; SYNTHETIC' if plan.manifest.get('synthetic') else ''}",
        "parent": _parent(plan),
        "objective": ", ".join(map(_objective, spec.objectives)),
        "parameters": "",
        **{f"  {parameter.name}": _parameter(parameter) for parameter in spec.parameters},
        "first trial": ", ".join(f"{name} {show(value)}" for name, value in plan.incumbent.items()),
        "sampler": plan.sampler,
        "stopping": _stopping(spec, most_epochs(spec, plan.config)),
        "trials": _trials(plan),
        "slots": _slots(plan),
        "budget": _budget(spec, plan.slots),
        "promotion": _promotion(spec),
    }
    width = max(map(len, lines))
    text = [f"{name:{width}}  {value}".rstrip() for name, value in lines.items() if value or name == "parameters"]
    return "\n".join([*text, *(f"note: {note}" for note in plan.notes)])


def question(spec: SearchSpec, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a study asks, line by line under its headings; the config is that of the defaults."""
    return {
        "objective": ", ".join(map(_objective, spec.objectives)),
        "parameters": "",
        **{f"  {parameter.name}": _parameter(parameter) for parameter in spec.parameters},
        "stopping": _stopping(spec, most_epochs(spec, config)),
        "promotion": _promotion(spec),
    }


def result_text(plan: Plan, rows: Sequence[Row]) -> str:
    """Return the leaderboard, why each promoted trial was promoted, and where everything is."""
    why = [f"trial {item['trial']}: {item['why']}" for item in read_promotion(plan.paths)["promoted"]]
    why += [f"trial {row.name}: {told}" for row in rows[:1] if (told := beside_majority(plan.spec, row))]
    places: dict[str, Path | str] = {
        "report": plan.paths.report,
        "leaderboard": plan.paths.leaderboard,
        "models": plan.paths.model("best").parent,
        "TensorBoard": f"tensorboard --logdir {plan.paths.folder.parent}",
    }
    if plan.paths.pareto.is_file() and plan.compares:
        places["cost and score"] = plan.paths.pareto
    if plan.paths.store:
        places["all of it"] = _where(plan.paths)
    width = max(map(len, places)) + 1
    where = [f"{name:{width}} {_short(place)}" for name, place in places.items()]
    return "\n".join([*_table(plan.spec, rows), "", *why, "", *where])


def most_epochs(spec: SearchSpec, config: Mapping[str, Any]) -> int:
    """Return how many epochs the longest trial has, where the search is over them too."""
    searched = next((parameter for parameter in spec.parameters if parameter.name == "epochs"), None)
    if searched is None:
        return int(config["epochs"])
    return int(max(searched.choices or (searched.high or 0,)))


def expected_epochs(spec: SearchSpec, epochs: int) -> int:
    """Return how many epochs all trials take, if asha lets one in `reduction` go on at each rung."""
    trials = spec.search.trials
    if spec.stopping.rule != "asha":
        return trials * epochs
    total, before, left = 0, 0, trials
    for rung in rules.rungs(spec.stopping, 0, epochs):
        total, before = total + left * (rung - before), rung
        left = math.ceil(left / spec.stopping.reduction)
    return total + left * (epochs - before)


def _where(paths: StudyPaths) -> str:
    return store.shown(str(paths.store.uri)) if paths.store else str(paths.folder)


def _slots(plan: Plan) -> str:
    needs, room = plan.spec.resources, plan.room
    kind = ""
    if resources.is_gang(needs):
        strategy = plan.config["strategy"] if needs.strategy == "auto" else needs.strategy
        stage = f" at ZeRO stage {needs.zero_stage}" if strategy == "deepspeed" else ""
        kind = f", gangs that train by {'ddp' if strategy == 'auto' else strategy}{stage}"
    return f"{plan.slots} x {resources.each(needs)} of {room.cpus:g} CPU, {room.gpus:g} GPU on {room.where}{kind}"


def _ended(plan: Plan) -> str:
    count = sum(1 for _ in plan.paths.trial(0).parent.glob(f"*/{RESULT}"))
    return f" ({count} trials have ended there)" if count else ""


def _parent(plan: Plan) -> str:
    wanted = plan.spec.parent
    if not wanted.wanted:
        return ""
    values = ", ".join(f"{name} {show(value)}" for name, value in wanted.train.values.items())
    source = wanted.checkpoint or (f"the best of {wanted.study}" if wanted.study else f"trained first: {values}")
    return f"{source} (pinned)" if plan.paths.parent.is_dir() else source


def _objective(objective: Objective) -> str:
    return f"{objective.metric} {objective.mode}"


def _parameter(parameter: Parameter) -> str:
    when = "".join(f", when {name} is {' or '.join(map(show, wanted))}" for name, wanted in parameter.when.items())
    if parameter.choices:
        chances = [f" ({probability:.3g})" for probability in parameter.probabilities] or [""] * len(parameter.choices)
        shown = [f"{show(choice)}{chance}" for choice, chance in zip(parameter.choices, chances, strict=True)]
        return f"one of {', '.join(shown)}{when}"
    scale = ", log" if parameter.log else f", step {parameter.step:g}" if parameter.step is not None else ""
    return f"{parameter.type} {show(parameter.low)} to {show(parameter.high)}{scale}{when}"


def _stopping(spec: SearchSpec, epochs: int) -> str:
    rule = spec.stopping
    if rule.rule == "asha":
        ladder = ", ".join(map(str, rules.rungs(rule, 0, epochs))) or "none below the last epoch"
        return f"asha, rungs at epoch {ladder} of {epochs}; one in {rule.reduction} goes on"
    return f"{rule.rule}, {epochs} epochs"


def _trials(plan: Plan) -> str:
    """Say how much work the trials are, and how long that takes for each second that an epoch takes."""
    trials, epochs = plan.spec.search.trials, most_epochs(plan.spec, plan.config)
    most, likely = trials * epochs, expected_epochs(plan.spec, epochs)
    return (
        f"{trials} of at most {epochs} epochs: {most} epochs at the most, about {likely} with early stops; "
        f"at 1 s an epoch {likely / plan.slots:.0f} s on {plan.slots} slots"
    )


def _budget(spec: SearchSpec, slots: int) -> str:
    search, parts = spec.search, []
    if search.wall_time_s is not None:
        hours = slots * search.wall_time_s / 3600
        parts.append(f"no new trial after {search.wall_time_s:g} s = {hours:.2g} slot-hours")
    if search.slot_hours is not None:
        seconds = 3600 * search.slot_hours / slots
        parts.append(f"no new trial after {search.slot_hours:g} slot-hours = {seconds:.0f} s on {slots} slots")
    if search.target is not None:
        first = spec.objectives[0]
        parts.append(f"no new trial once {first.metric} is {search.target:g} or {_BETTER[first.mode]}")
    return "; ".join(parts)


def _promotion(spec: SearchSpec) -> str:
    rule = spec.promotion
    who = f"the best {rule.k}" if rule.rule == "top_k" else f"the Pareto set, at most {rule.k}"
    again = [f"for {rule.epochs} epochs"] * (rule.epochs is not None) + [f"with {rule.seeds} seeds"] * (rule.seeds > 1)
    trained = f"; trained again {' and '.join(again)}" if again else ""
    return f"{who}, and the first trial to compare with{trained}; evaluated on the test split"


def _table(spec: SearchSpec, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the leaderboard's lines, columns aligned."""
    names = [parameter.name for parameter in spec.parameters][:SHOWN_PARAMETERS]
    if not rows:
        yield "nothing was evaluated: no finished trial has a checkpoint"
        return
    scores = [*(o.metric for o in spec.objectives), f"test {rows[0].metric} [95 %]", "vs first trial [95 %]"]
    header = ["rank", "trial", "role", *scores]
    cells = [[*header, *names], *([*_cells(row, spec), *(show(row.params.get(n, "")) for n in names)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()


def _cells(row: Row, spec: SearchSpec) -> list[str]:
    validation = [_number(row.validation.get(objective.metric)) for objective in spec.objectives]
    rank = "-" if row.rank is None else str(row.rank)
    return [rank, row.name, row.role, *validation, _interval(row.test), _interval(row.difference, "+")]


def _interval(score: Interval, sign: str = "") -> str:
    if score.value is None:
        return ""
    around = f" [{score.low:{sign}.4f}, {score.high:{sign}.4f}]" if score.low is not None else ""
    return f"{score.value:{sign}.4f}{around}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _short(place: Path | str) -> str:
    """Return a path as a person would type it from here."""
    if isinstance(place, Path) and place.is_absolute() and place.is_relative_to(Path.cwd()):
        return str(place.relative_to(Path.cwd()))
    return str(place)
