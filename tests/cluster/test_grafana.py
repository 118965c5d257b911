"""The dashboard asks for figures that exist, and is what Grafana takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from search.metrics import LABELS, METRICS

BOARD: dict[str, Any] = json.loads((Path(__file__).resolve().parents[2] / "cluster" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
ASKED = sorted(set(re.findall(r"ray_(search_\w+)", json.dumps(BOARD))))


@pytest.mark.row("C13")
def test_every_figure_that_it_shows_exists_and_all_are_shown() -> None:
    assert sorted(METRICS) == ASKED


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_question_suits_its_figures(expression: str) -> None:
    assert expression.count("(") == expression.count(")")
    for name in re.findall(r"ray_(search_\w+)", expression):
        changes = re.search(rf"(rate|increase)\(ray_{name}\{{[^}}]*\}}\[\d+[mh]\]\)", expression)
        assert bool(changes) == (METRICS[name].kind == "counter"), "a counter is read by its change, a gauge as it is"
        known = {*LABELS, *METRICS[name].labels}
        assert set(re.findall(r"(\w+)=~", expression)) <= known
        assert {label for group in re.findall(r"by \((\w+)\)", expression) for label in group.split(",")} <= known


def test_it_is_what_grafana_takes() -> None:
    assert BOARD["uid"] and len(BOARD["uid"]) <= 40 and BOARD["title"] and BOARD["schemaVersion"] >= 36
    assert "id" not in BOARD, "an id is its own Grafana's"
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    assert variables == {"datasource", "study"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) <= {*variables, "__all"}
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries") and panel["title"] and panel["targets"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken
        taken |= cells
