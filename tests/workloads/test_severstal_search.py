"""The search for steel defects as a person starts it, on real strips; minutes, so it is slow."""

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
LEAST_DICE = 0.45


@pytest.mark.row("S50")
def test_the_space_asks_what_the_original_left_open() -> None:
    space = spec_file.load("severstal.yaml")
    assert [objective.metric for objective in space.objectives] == ["val_dice_opt"]
    asked = {parameter.name for parameter in space.parameters}
    assert {"network.encoder", "network.name", "lr", "weight_decay", "loss.bce", "loss.dice", "sampler"} <= asked
    assert {"restart_epochs", "restart_factor", "augmentation.colour_probability"} <= asked


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(2 * MOST_S)
@pytest.mark.row("S50")
def test_real_strips_are_searched_in_minutes_and_the_winner_beats_what_takes_no_looking(
    shared_data: Path, tmp_path: Path
) -> None:
    data = ("--set", f"data.root={shared_data / 'steel'}", "--set", "data.form=supervisely")
    words = ["--space", "severstal_debug.yaml", "--runs", str(tmp_path), *data]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "tune.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=2 * MOST_S, check=False
    )
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    study = tmp_path / "severstal_debug"
    with (study / "leaderboard.csv").open(newline="") as file:
        best = next(csv.DictReader(file))
    scored = json.loads((study / "evaluation" / best["evaluation"] / "evaluation.json").read_text())
    metrics = scored["metrics"]
    print(f"{took_s:.0f} s, { ({name: metrics[name] for name in metrics if 'dice' in name}) }")
    assert took_s <= MOST_S
    assert metrics["dice_opt"] > LEAST_DICE
    assert metrics["dice_opt"] > max(metrics["dice_all_empty"], metrics["dice_all_called"])
