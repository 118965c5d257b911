"""The sweeps and the experiment on ACDC expand to the grids that they name, and each trial's network can be cut so."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import configuration
from search import samplers, spec_file
from search.spec import SearchSpec
from segmentation import networks, pruning
from segmentation.pruning import blocks
from workloads import acdc
from workloads._acdc import original

BLOCKS = (
    "encoders.0",
    "encoders.1",
    "encoders.2",
    "encoders.3",
    "bottleneck",
    *(f"decoders.{i}" for i in (1, 3, 5, 7)),
)
GRIDS = {
    "acdc_sweep_layers": {"prune.where": BLOCKS, "prune.default": (0.25, 0.5, 0.75)},
    "acdc_sweep_parts": {"prune.where": ("encoder", "deep", "decoder"), "prune.default": (0.1, 0.25, 0.5, 0.75)},
    "acdc_sweep_global": {"prune.global": tuple(tenths / 10 for tenths in range(1, 9))},
    "acdc_full_experiment": {"prune.mode": ("none", "random", "rewind")},
}


def points(spec: SearchSpec) -> list[dict[str, Any]]:
    return [samplers.at(spec.parameters, point) for point in samplers.points(spec.parameters) or []]


def configured(spec: SearchSpec, point: dict[str, Any]) -> acdc.Config:
    return configuration.build(acdc.Config, {**spec.fixed, **point})


@pytest.mark.row("P50", "P27")
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_a_sweep_is_the_whole_grid_and_each_point_prunes_what_it_names(name: str) -> None:
    spec = spec_file.load(name)
    wanted = GRIDS[name]
    found = points(spec)
    assert found == [dict(zip(wanted, point, strict=True)) for point in itertools.product(*wanted.values())]
    assert samplers.choose(spec)[0] == "grid" and spec.search.trials == len(found)
    assert spec.parent.train.values and spec.stopping.rule == "none"
    with torch.device("meta"):
        model = networks.build(configured(spec, {}).network, 1, 4)
    graph = pruning.trace(model, 1)
    groups = blocks.of(model, graph)
    assert tuple(groups) == BLOCKS
    left = set()
    for point in found:
        prune = configured(spec, point).prune
        pruning.check(prune, model, graph)
        inside = blocks.part(groups, graph, prune.where)
        ratios = pruning.ratios(prune, graph, groups)
        gone = sum(math.floor(groups[block].total * ratio) for block, ratio in ratios.items())
        left.add((inside, gone, prune.mode, prune.global_))
    assert len(left) == len(found)  # no two points are one


@pytest.mark.row("P27", "P28")
def test_the_experiment_has_the_originals_ratios_and_its_trials_differ_in_the_mode_alone() -> None:
    spec = spec_file.load("acdc_full_experiment")
    prune = configured(spec, {"prune.mode": "rewind"}).prune
    assert original.suffix(prune, 4) == "l1_norm_0_10_20_30_30_30_30_20_10_rewind"
    assert spec.parent.train.values["rewind_epoch"] == original.SAVE_INTERVAL
    whole = [spec_file.config_values(spec, point) for point in points(spec)]
    assert all({key for key in one if one[key] != whole[0][key]} <= {"prune.mode"} for one in whole)
    assert [one["prune.mode"] for one in whole] == ["none", "random", "rewind"]
    assert spec.promotion.k == 3
