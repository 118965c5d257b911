"""The search on satellite tiles as a person starts it, on generated ones; minutes, so it is slow."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST_S = 480
LEAST_GAIN = 0.15


@pytest.mark.slow
@pytest.mark.timeout(2 * MOST_S)
@pytest.mark.row("E14")
@pytest.mark.row("E47")
def test_generated_tiles_are_searched_in_minutes_and_the_winner_beats_the_majority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    words = ["--space", "esd_debug.yaml", "--runs", str(tmp_path)]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "tune.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=2 * MOST_S, check=False
    )
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    study = tmp_path / "esd_debug"
    with (study / "leaderboard.csv").open(newline="") as file:
        best = next(csv.DictReader(file))
    scored = json.loads((study / "evaluation" / best["evaluation"] / "evaluation.json").read_text())["metrics"]
    print(f"{took_s:.0f} s, test mean_iou {scored['mean_iou']:.3f}, majority {scored['mean_iou_majority']:.3f}")
    assert took_s <= MOST_S
    assert scored["mean_iou"] >= scored["mean_iou_majority"] + LEAST_GAIN
    assert "calling everything no_settlement_without_electricity" in done.stdout
