"""The search for clouds as a person starts it, on real scenes of six bands; minutes, so it is slow."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search import spec_file
from tests.conftest import ROOT

MOST_S = 480
LEAST_ABOVE_MAJORITY = 0.25


def test_the_space_asks_how_rare_classes_are_weighed() -> None:
    space = spec_file.load("landsat_clouds.yaml")
    assert [objective.metric for objective in space.objectives] == ["val_mean_iou"]
    asked = {parameter.name for parameter in space.parameters}
    assert {"network.name", "network.base", "lr", "loss.class_weights", "loss.dice"} <= asked


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.shared_data
@pytest.mark.timeout(2 * MOST_S)
def test_real_scenes_are_searched_in_minutes_and_the_winner_beats_what_takes_no_looking(
    shared_data: Path, tmp_path: Path
) -> None:
    words = ["--space", "landsat_clouds.yaml", "--runs", str(tmp_path), "--set", f"data.root={shared_data / 'landsat'}"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "tune.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=2 * MOST_S, check=False
    )
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    study = tmp_path / "landsat_clouds"
    with (study / "leaderboard.csv").open(newline="") as file:
        best = next(csv.DictReader(file))
    scored = json.loads((study / "evaluation" / best["evaluation"] / "evaluation.json").read_text())
    metrics = scored["metrics"]
    print(f"{took_s:.0f} s, { ({name: metrics[name] for name in metrics if 'iou' in name}) }")
    assert took_s <= MOST_S
    assert metrics["mean_iou"] >= metrics["mean_iou_majority"] + LEAST_ABOVE_MAJORITY
    assert scored["details"]["majority"] == "land"
