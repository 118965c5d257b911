"""The scan of a parent: what it tries, the points it proposes by hand, and the files it leaves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import configuration
from tests import discs
from workloads import _sensitivity, pairs
from workloads._sensitivity import Row

pytestmark = pytest.mark.usefixtures("own_cache")


VALUES = {"network.name": "unet", "network.widths": [4, 8], "data.tile": 32, "data.classes": 2, "threads": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> pairs.Config:
    """Return the configuration of a child of a parent of two epochs."""
    folder = tmp_path_factory.mktemp("parent")
    values = {**VALUES, "data.root": str(discs.write(folder / "discs")), "batch_size": 3, "lr": 0.02}
    for epoch in pairs.train(configuration.build(pairs.Config, {**values, "epochs": 2})):
        epoch.save(folder / "checkpoint")
    return configuration.build(pairs.Config, {**values, "epochs": 1, "parent": str(folder / "checkpoint")})


def row(parameter: str, value: float, score: float) -> Row:
    return Row(parameter, value, score, params=1.0, gmacs=1.0)


@pytest.mark.row("P53")
def test_points_are_the_strongest_values_that_lose_no_more_than_is_allowed_by_hand() -> None:
    rows = [
        *(row("prune.a", ratio, score) for ratio, score in ((0.25, 0.80), (0.5, 0.78), (0.75, 0.5))),
        *(row("prune.b", ratio, score) for ratio, score in ((0.25, 0.73), (0.5, 0.2), (0.75, 0.1))),
    ]
    searched = {"prune.a": (0.0, 0.7), "prune.b": (0.1, 0.7)}
    # Of 0.8 may be lost: 1 % leaves 0.792, 3 % leaves 0.776, 10 % leaves 0.72.
    assert _sensitivity.points(rows, 0.8, searched) == [
        {"prune.a": 0.25, "prune.b": 0.1},
        {"prune.a": 0.5, "prune.b": 0.1},
        {"prune.a": 0.5, "prune.b": 0.25},
    ]


def test_points_stay_inside_the_ranges_and_none_stands_twice() -> None:
    rows = [row("prune.a", ratio, 0.8) for ratio in (0.25, 0.5, 0.75)]
    assert _sensitivity.points(rows, 0.8, {"prune.a": (0.3, 0.6)}) == [{"prune.a": 0.5}]
    assert _sensitivity.points(rows, 0.8, {"prune.a": (0.0, 0.1)}) == [{"prune.a": 0.0}]
    assert _sensitivity.points(rows, 0.8, {}) == []


def test_less_of_a_budget_prunes_more() -> None:
    rows = [row("prune.macs", part, score) for part, score in ((0.3, 0.1), (0.5, 0.795), (0.7, 0.8), (0.9, 0.8))]
    assert _sensitivity.points(rows, 0.8, {"prune.macs": (0.3, 0.9)}) == [{"prune.macs": 0.5}]
    assert _sensitivity.points(rows[:1], 0.8, {"prune.macs": (0.3, 0.9)}) == [{"prune.macs": 0.9}]


@pytest.mark.row("P53")
def test_every_block_and_every_searched_amount_is_tried_by_one_pass_each(
    config: pairs.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    real = pairs._score
    monkeypatch.setattr(pairs, "_score", lambda *given: scored.append("pass") or real(*given))
    searched: dict[str, Any] = {
        **{"prune.bottleneck": (0.0, 0.65), "prune.global": (0.1, 0.4), "prune.default": (0.0, 0.6)},
        **{"prune.macs": (0.5, 0.9), "prune.params": (1 / 3, 1.0)},
        # How, not how much: these say nothing alone.
        **{"prune.threshold": (0.1, 0.9), "prune.recalibrate": (0, 5), "prune.min_channels": (1, 4)},
    }
    found = pairs.scan(config, searched, tmp_path / "scan")
    tried = {(one["parameter"], one["value"]) for one in found["rows"]}
    blocks = {name for name, _ in tried} - set(searched)
    assert blocks == {f"prune.{name}" for name in ("encoders.0", "encoders.1", "decoders.1", "decoders.3")}
    assert {value for name, value in tried if name == "prune.encoders.0"} == {0.25, 0.5, 0.75}
    assert {value for name, value in tried if name == "prune.bottleneck"} == {0.25, 0.5, 0.65, 0.75}
    assert {value for name, value in tried if name == "prune.default"} == {0.0, 0.2, 0.4, 0.6}
    assert {value for name, value in tried if name == "prune.params"} == {1 / 3, 0.5556, 0.7778, 1.0}
    assert len(scored) == 1 + len(found["rows"]), "the whole network once, and each row once"
    assert found["points"] and all(
        point.keys() == {"prune.bottleneck", "prune.global", "prune.default", "prune.macs", "prune.params"}
        for point in found["points"]
    )
    by_value = {(one["parameter"], one["value"]): one for one in found["rows"]}
    whole = pairs.facts(config)
    assert by_value["prune.params", 1.0]["params"] == whole["params"]
    assert by_value["prune.bottleneck", 0.5]["params"] < by_value["prune.bottleneck", 0.25]["params"] < whole["params"]
    for amount in ("macs", "params"):
        for name, value in tried:
            if name == f"prune.{amount}":
                left = by_value[name, value]["params"] / whole["params"]
                left = by_value[name, value]["gmacs"] / whole["gmacs"] if amount == "macs" else left
                assert left <= value
    with (tmp_path / "scan" / "sensitivity.csv").open() as table:
        lines = list(csv.DictReader(table))
    assert [{name: float(value) for name, value in line.items() if name != "parameter"} for line in lines] == [
        {name: value for name, value in one.items() if name != "parameter"} for one in found["rows"]
    ]
    assert (tmp_path / "scan" / "sensitivity.png").stat().st_size > 1000 and found["figures"] == ["sensitivity.png"]


def test_the_parent_itself_is_not_changed_by_a_scan(config: pairs.Config, tmp_path: Path) -> None:
    first = pairs.scan(config, {"prune.bottleneck": (0.0, 0.5)}, tmp_path)
    assert pairs.scan(config, {"prune.bottleneck": (0.0, 0.5)}, tmp_path) == first
