"""The report's pictures as plain Plotly figures: dicts of traces and layout, drawn by the reader's browser.

Each function takes records and gives None where there is nothing to draw. Colours carry one meaning on the whole
page: blue finished, grey stopped early, red failed, gold the best. They are readable on light and dark paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from search.ranking import best, pareto, ranked
from search.record import State, TrialRecord
from search.spec import Objective, Parameter, SearchSpec

Figure = dict[str, Any]

BEST = "#d99a0b"
COLOURS: Mapping[State, str] = {
    "complete": "#3b7dd8",
    "stopped": "#8d96a3",
    "failed": "#d64550",
    "running": "#3f9e6b",
    "waiting": "#8d96a3",
}
WORDS: Mapping[State, str] = {
    "complete": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "running",
    "waiting": "waiting",
}
SHADES = 8


def history(records: Sequence[TrialRecord], objectives: Sequence[Objective], index: int = 0) -> Figure | None:
    """Draw one objective over the trials' numbers, with the best so far as a line."""
    mode = objectives[index].mode
    finished = sorted(ranked(records, objectives), key=lambda record: record.number)
    stopped = [record for record in records if record.state == "stopped" and _last(record, index) is not None]
    if not finished and not stopped:
        return None
    better = max if mode == "max" else min
    traces = [
        _points(
            [r.number for r in stopped], [_last(r, index) for r in stopped], "stopped early, last value", "stopped"
        ),
        _points([r.number for r in finished], [_value(r, index) for r in finished], "finished", "complete"),
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [record.number for record in finished],
            "y": list(accumulate((_value(record, index) for record in finished), better)),
            "line": {"color": BEST, "width": 2, "shape": "hv"},
            "hoverinfo": "skip",
        },
    ]
    return _figure(traces, "trial", objectives[index].metric)


def importance(records: Sequence[TrialRecord], spec: SearchSpec) -> Figure | None:
    """Draw how much of the difference between finished trials each parameter explains (PED-ANOVA)."""
    shares = [importances(records, spec, index) for index in range(len(spec.objectives))]
    if not any(shares):
        return None
    total = {p.name: sum(share.get(p.name, 0.0) for share in shares) for p in spec.parameters}
    names = sorted((name for name in total if any(name in share for share in shares)), key=lambda name: total[name])
    palette = (COLOURS["complete"], BEST, COLOURS["running"], COLOURS["failed"])
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": objective.metric,
            "y": names,
            "x": [share.get(name, 0.0) for name in names],
            "text": [f"{share.get(name, 0.0):.0%}" for name in names],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {"color": palette[index % len(palette)]},
            "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
        }
        for index, (objective, share) in enumerate(zip(spec.objectives, shares, strict=True))
    ]
    figure = _figure(traces, "share of the explained variance", None)
    widest = max(max(share.values(), default=0.0) for share in shares)
    figure["layout"]["xaxis"] |= {"tickformat": ".0%", "range": [0, 1.12 * widest or 1]}
    figure["layout"]["yaxis"] |= {"automargin": True, "type": "category"}
    figure["layout"] |= {"height": 140 + 34 * len(names) * len(shares), "showlegend": len(shares) > 1}
    return figure


def importances(records: Sequence[TrialRecord], spec: SearchSpec, index: int = 0) -> dict[str, float]:
    """Return each parameter's share of the variance of one objective, in [0, 1]; empty if it cannot be known."""
    finished = ranked(records, spec.objectives)
    values = {_value(record, index) for record in finished}
    if len(finished) < 4 or len(values) < 2:
        return {}
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if spec.objectives[index].mode == "max" else "minimize")
        distributions = {parameter.name: _distribution(parameter, finished) for parameter in spec.parameters}
        varied = {name: found for name, found in distributions.items() if found is not None}
        study.add_trials([_optuna_trial(record, varied, index) for record in finished])
        if not varied:
            return {}
        shares = optuna.importance.get_param_importances(study)
    finally:
        optuna.logging.set_verbosity(before)
    return {name: share for name, share in shares.items() if math.isfinite(share)}


def slices(records: Sequence[TrialRecord], spec: SearchSpec) -> dict[str, Figure]:
    """Draw the first objective over each parameter by itself."""
    finished = ranked(records, spec.objectives)
    drawn = {parameter.name: _slice(finished, parameter, spec.objectives[0]) for parameter in spec.parameters}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def parallel(records: Sequence[TrialRecord], spec: SearchSpec) -> Figure | None:
    """Draw each finished trial as one line over all parameters and objectives; the better, the stronger.

    Plotly's own parallel coordinates need WebGL and drop trials without a conditional parameter; here such a
    trial passes below the axis.
    """
    finished = ranked(records, spec.objectives)
    if not finished:
        return None
    axes = [_axis(finished, parameter) for parameter in spec.parameters]
    axes += [_objective_axis(finished, objective, i) for i, objective in enumerate(spec.objectives)]
    traces = [_strokes(finished, axes, shade) for shade in reversed(range(SHADES))]
    traces = [trace for trace in traces if trace["x"]]
    traces += [_stroke(finished[0], axes), *_axis_marks(axes)]
    figure = _figure(traces, None, None)
    layout = figure["layout"]
    layout["xaxis"] |= {
        "tickvals": list(range(len(axes))),
        "ticktext": [_folded(axis["name"]) for axis in axes],
        "showgrid": False,
        "range": [-0.3, len(axes) - 0.5],
        "zeroline": False,
        "side": "top",
    }
    layout["yaxis"] |= {"visible": False, "range": [-0.2, 1.1]}
    layout |= {"showlegend": False, "hovermode": "closest"}
    figure["min_width"] = 105 * len(axes)
    return figure


def front(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> Figure | None:
    """Draw the first two objectives against each other, the trials that no other beats in gold."""
    finished = ranked(records, objectives)
    if len(objectives) < 2 or not finished:
        return None
    undominated = {record.number for record in pareto(records, objectives)}
    others = [record for record in finished if record.number not in undominated]
    chosen = sorted(
        (record for record in finished if record.number in undominated), key=lambda record: _value(record, 0)
    )
    traces = [
        _pairs(others, "beaten by another", COLOURS["complete"], "markers"),
        _pairs(chosen, "beaten by none", BEST, "lines+markers" if len(objectives) == 2 else "markers"),
    ]
    return _figure([trace for trace in traces if trace["x"]], objectives[0].metric, objectives[1].metric)


def curves(records: Sequence[TrialRecord], objectives: Sequence[Objective], promoted: Iterable[int]) -> Figure | None:
    """Draw the first objective over the epochs of every trial: stopped ones faint, the promoted strong."""
    strong = set(promoted)
    winner = best(records, objectives)
    groups: list[tuple[str, str, float, float, list[TrialRecord]]] = []
    usual = 0.45 if len(records) <= 100 else 0.25
    states: tuple[tuple[State, float], ...] = (
        ("stopped", 0.35),
        ("failed", 0.6),
        ("running", 0.6),
        ("complete", usual),
    )
    for state, opacity in states:
        chosen = [r for r in records if r.state == state and not (state == "complete" and r.number in strong)]
        groups.append((WORDS[state], COLOURS[state], opacity, 1.2, chosen))
    promoted_records = [record for record in records if record.number in strong and record is not winner]
    groups.append(("promoted", COLOURS["complete"], 1.0, 2.4, promoted_records))
    groups.append((f"best, trial {winner.number}" if winner else "best", BEST, 1.0, 3.0, [winner] if winner else []))
    traces = [_lines(*group) for group in groups]
    traces = [trace for trace in traces if trace["x"]]
    return _figure(traces, "epoch", objectives[0].metric) if traces else None


def timeline(records: Sequence[TrialRecord]) -> Figure | None:
    """Draw when which slot worked on which trial."""
    timed = sorted(
        (r for r in records if r.started and r.finished and r.finished >= r.started),
        key=lambda r: (r.started, r.number),
    )
    if not timed:
        return None
    lanes = lanes_of([(_seconds(record.started), _seconds(record.finished)) for record in timed])
    origin = _seconds(timed[0].started)
    end = max(_seconds(record.finished) for record in timed) - origin
    unit, size = ("hours", 3600.0) if end > 7200 else ("minutes", 60.0) if end > 180 else ("seconds", 1.0)
    traces = []
    for state in ("complete", "stopped", "failed"):
        chosen = [(record, lane) for record, lane in zip(timed, lanes, strict=True) if record.state == state]
        if chosen:
            traces.append(_bars(chosen, origin, size, unit, state))
    figure = _figure(traces, f"{unit} since the first trial began", "slot")
    figure["layout"] |= {"barmode": "overlay", "height": 170 + 26 * (max(lanes) + 1)}
    count = max(lanes) + 1
    figure["layout"]["yaxis"] |= {"tick0": 1, "dtick": max(1, count // 12), "range": [count + 0.6, 0.4]}
    figure["layout"]["yaxis"] |= {"zeroline": False, "showgrid": False}
    return figure


def lanes_of(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a lane for each (start, end) in order of start, as few lanes as hold them without overlap."""
    ends: list[float] = []
    lanes = []
    for start, end in spans:
        free = next((lane for lane, until in enumerate(ends) if until <= start), len(ends))
        ends[free : free + 1] = [end]
        lanes.append(free)
    return lanes


def show(value: Any) -> str:
    """Return a value for people: four significant digits, lists and None in JSON."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _figure(traces: Sequence[Figure], x_title: str | None, y_title: str | None) -> Figure:
    layout: Figure = {
        "height": 380,
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "xaxis": {"automargin": True, "title": _title(x_title)},
        "yaxis": {"automargin": True, "title": _title(y_title)},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }
    return {"data": [trace for trace in traces if trace], "layout": layout, "min_width": 0}


def _title(text: str | None) -> Figure:
    return {"text": text or "", "standoff": 10, "font": {"size": 13}}


def _points(numbers: Sequence[int], values: Sequence[float | None], name: str, state: State) -> Figure:
    return (
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": list(numbers),
            "y": list(values),
            "marker": {
                "color": COLOURS[state],
                "size": 8 if state == "complete" else 6,
                "opacity": 0.85 if state == "complete" else 0.5,
            },
            "hovertemplate": "trial %{x}: %{y:.4g}<extra></extra>",
        }
        if numbers
        else {}
    )


def _slice(finished: Sequence[TrialRecord], parameter: Parameter, objective: Objective) -> Figure | None:
    # The best is drawn last, on top of the others.
    used = [record for record in reversed(finished) if parameter.name in record.params]
    if not used:
        return None
    categorical = _is_categorical(used, parameter)
    values = [record.params[parameter.name] for record in used]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [show(value) for value in values] if categorical else values,
        "y": [_value(record, 0) for record in used],
        "text": [f"trial {record.number}" for record in used],
        "marker": {
            "color": [BEST if record is finished[0] else COLOURS["complete"] for record in used],
            "size": [11 if record is finished[0] else 7 for record in used],
            "opacity": 0.75,
            "line": {"width": 0},
        },
        "hovertemplate": "%{text}: %{x}, %{y:.4g}<extra></extra>",
    }
    figure = _figure([trace], parameter.name, objective.metric)
    figure["layout"] |= {"height": 260, "showlegend": False}
    if categorical:
        figure["layout"]["xaxis"]["type"] = "category"
    elif parameter.log and min(values) > 0:
        figure["layout"]["xaxis"] |= {"type": "log", "dtick": 1 if max(values) / min(values) >= 10 else "D1"}
        figure["layout"]["xaxis"]["exponentformat"] = "e"
    return figure


def _axis(finished: Sequence[TrialRecord], parameter: Parameter) -> Figure:
    """Return an axis: its name, where each trial crosses it (None where it does not apply), and marks at heights."""
    found = [record.params.get(parameter.name, _ABSENT) for record in finished]
    present = [value for value in found if value is not _ABSENT]
    if not present:
        return {"name": parameter.name, "places": [None] * len(found), "marks": []}
    if _is_categorical([r for r in finished if parameter.name in r.params], parameter):
        words = list(dict.fromkeys([*map(show, parameter.choices), *map(show, present)]))
        heights = {word: (i + 0.5) / len(words) for i, word in enumerate(words)}
        places = [None if value is _ABSENT else heights[show(value)] for value in found]
        return {"name": parameter.name, "places": places, "marks": [(h, word) for word, h in heights.items()]}
    scale = math.log if parameter.log and min(present) > 0 else float
    low, high = scale(min(present)), scale(max(present))
    places = [None if value is _ABSENT else _between(scale(value), low, high) for value in found]
    return {"name": parameter.name, "places": places, "marks": _ends(min(present), max(present))}


def _objective_axis(finished: Sequence[TrialRecord], objective: Objective, index: int) -> Figure:
    values = [_value(record, index) for record in finished]
    places = [_between(value, min(values), max(values)) for value in values]
    return {"name": objective.metric, "places": places, "marks": _ends(min(values), max(values))}


def _ends(low: float, high: float) -> list[tuple[float, str]]:
    return [(0.5, show(low))] if low == high else [(0.0, show(low)), (1.0, show(high))]


def _between(value: float, low: float, high: float) -> float:
    return 0.5 if low == high else (value - low) / (high - low)


def _strokes(finished: Sequence[TrialRecord], axes: Sequence[Figure], shade: int) -> Figure:
    """Return the trials of one shade as one trace; 0 holds the best."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for place, record in enumerate(finished):
        if place * SHADES // len(finished) != shade:
            continue
        x += [*range(len(axes)), None]
        y += [*(_height(axis, place) for axis in axes), None]
        text += [*(f"trial {record.number}, {axis['name']} {_crossing(record, axis)}" for axis in axes), ""]
    opacity = 0.75 * (1 - shade / SHADES) ** 2 + 0.08
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "text": text,
        "hoverinfo": "text",
        "opacity": opacity,
        "line": {"color": COLOURS["complete"], "width": 1.4},
    }


def _stroke(record: TrialRecord, axes: Sequence[Figure]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(range(len(axes))),
        "y": [_height(axis, 0) for axis in axes],
        "text": [f"best, trial {record.number}, {axis['name']} {_crossing(record, axis)}" for axis in axes],
        "hoverinfo": "text",
        "line": {"color": BEST, "width": 3.2},
    }


def _height(axis: Figure, place: int) -> float:
    height: float | None = axis["places"][place]
    return -0.13 if height is None else height


def _crossing(record: TrialRecord, axis: Figure) -> str:
    return show(record.params[axis["name"]]) if axis["name"] in record.params else ""


def _axis_marks(axes: Sequence[Figure]) -> list[Figure]:
    rails: list[tuple[float | None, float | None]] = []
    marks: list[tuple[float, float, str]] = []
    for i, axis in enumerate(axes):
        rails += [(i, 0.0), (i, 1.0), (None, None)]
        marks += [(i + 0.04, height, word) for height, word in axis["marks"]]
        if None in axis["places"]:
            marks.append((i + 0.04, -0.13, "not used"))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _ in rails],
            "y": [y for _, y in rails],
            "line": {"color": COLOURS["stopped"], "width": 1},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "text",
            "x": [x for x, _, _ in marks],
            "y": [y for _, y, _ in marks],
            "text": [_short(word) for _, _, word in marks],
            "textposition": "middle right",
            "cliponaxis": False,
            "hoverinfo": "skip",
        },
    ]


def _pairs(records: Sequence[TrialRecord], name: str, colour: str, mode: str) -> Figure:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [_value(record, 0) for record in records],
        "y": [_value(record, 1) for record in records],
        "text": [f"trial {record.number}" for record in records],
        "marker": {"color": colour, "size": 9, "opacity": 0.85},
        "line": {"color": colour, "width": 1.5, "dash": "dot"},
        "hovertemplate": "%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
    }


def _lines(name: str, colour: str, opacity: float, width: float, records: Sequence[TrialRecord]) -> Figure:
    """Return several curves as one trace with gaps between: hundreds of traces would be slow to draw."""
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        epochs = sorted(record.epochs)
        x += [*epochs, None] if epochs else []
        y += [*(_plain(record.epochs[epoch][0]) for epoch in epochs), None] if epochs else []
        text += [f"trial {record.number}"] * (len(epochs) + 1) if epochs else []
    single = all(len(record.epochs) <= 1 for record in records)
    return {
        "type": "scatter",
        "mode": "markers" if single else "lines",
        "name": name,
        "x": x,
        "y": y,
        "text": text,
        "opacity": opacity,
        "line": {"color": colour, "width": width},
        "marker": {"color": colour},
        "hovertemplate": "%{text} epoch %{x}: %{y:.4g}<extra></extra>",
    }


def _bars(chosen: Sequence[tuple[TrialRecord, int]], origin: float, size: float, unit: str, state: State) -> Figure:
    starts = [(_seconds(record.started) - origin) / size for record, _ in chosen]
    lengths = [(_seconds(record.finished) - _seconds(record.started)) / size for record, _ in chosen]
    return {
        "type": "bar",
        "orientation": "h",
        "name": WORDS[state],
        "y": [lane + 1 for _, lane in chosen],
        "base": starts,
        "x": lengths,
        "text": [f"trial {record.number}" for record, _ in chosen],
        "textposition": "none",
        "width": 0.7,
        "marker": {"color": COLOURS[state], "line": {"width": 0.5, "color": "rgba(127,127,127,0.5)"}},
        "hovertemplate": f"%{{text}}: %{{x:.3g}} {unit}<extra>{WORDS[state]}</extra>",
    }


def _distribution(parameter: Parameter, finished: Sequence[TrialRecord]) -> Any:
    """Return Optuna's distribution, widened to what was tried (defaults may lie outside); None if nothing varied."""
    from optuna import distributions

    used = [record for record in finished if parameter.name in record.params]
    values = [record.params[parameter.name] for record in used]
    if len({show(value) for value in values}) < 2:
        return None
    if _is_categorical(used, parameter):
        return distributions.CategoricalDistribution(tuple(dict.fromkeys(show(value) for value in values)))
    low = min([*values, *([] if parameter.low is None else [parameter.low])])
    high = max([*values, *([] if parameter.high is None else [parameter.high])])
    return distributions.FloatDistribution(low, high, log=parameter.log and low > 0)


def _optuna_trial(record: TrialRecord, varied: Mapping[str, Any], index: int) -> Any:
    import optuna

    used = {name: found for name, found in varied.items() if name in record.params}
    categorical = optuna.distributions.CategoricalDistribution
    params = {
        name: show(record.params[name]) if isinstance(found, categorical) else float(record.params[name])
        for name, found in used.items()
    }
    return optuna.trial.create_trial(value=_value(record, index), params=params, distributions=used)


_ABSENT: Any = object()


def _is_categorical(used: Sequence[TrialRecord], parameter: Parameter) -> bool:
    values = [record.params[parameter.name] for record in used]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return parameter.type == "categorical" or not numeric


def _value(record: TrialRecord, index: int) -> float:
    assert record.values is not None, "only finished trials are drawn by their value"
    return record.values[index]


def _last(record: TrialRecord, index: int) -> float | None:
    return _plain(record.epochs[max(record.epochs)][index]) if record.epochs else None


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds(moment: Any) -> float:
    return float(moment.timestamp())


def _short(word: str) -> str:
    return word if len(word) <= 14 else f"{word[:12]}…"


def _folded(name: str) -> str:
    return name.replace(".", ".<br>")
