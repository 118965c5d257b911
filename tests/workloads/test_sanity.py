"""`python -m workloads sanity`: every workload's debug preset passes; a new workload is found by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import workloads
from segmentation import splits
from workloads import __main__ as command

pytestmark = pytest.mark.row("E44")
DONE, FAILED, BAD_INPUT = 0, 1, 2
QUICK = ("pairs",)
# Of telescope's four debug channels it takes some hundred steps to tell one class from the other; how many, varies.
STEPS = {"telescope": 2000}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, caplog, sigterm_as_before):
    """Run each test in a folder of its own, and hear what is logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")


def of_time(name):
    return name if name in QUICK else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(600)])


@pytest.mark.parametrize("name", [of_time(name) for name in workloads.names() if name != "toy"])
def test_every_workload_climbs_the_ladder(name, monkeypatch, capsys):
    monkeypatch.setattr(splits, "test_split_open", lambda: pytest.fail("the test split was opened"))
    steps = str(STEPS.get(name, 1000))
    code = command.main(["sanity", name, "--set", "preset=debug", "--steps", steps, "--out", "checked"])
    lines = capsys.readouterr().out.splitlines()
    assert code == DONE, lines
    assert lines[0].split() == ["check", "measured", "expected"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["initial loss", "overfit one batch", "shuffled inputs"]
    record = json.loads(Path("checked/sanity.json").read_text())
    assert record["passed"] and record["workload"] == name
    assert record["config"] == command.durable.plain(
        command.configuration.to_values(workloads.load(name).Config.debug())
    )
    first, second, third = (rung["figures"] for rung in record["rungs"])
    assert first["loss_of_classes_exchanged"] == pytest.approx(first["loss_of_zero_logits"], rel=0.1)
    assert first["entropy_of_zero_logits"] in [math.log(classes) for classes in range(2, 10)]
    assert second["accuracy"] > second["least"] >= (1 + second["majority"]) / 2
    assert third["accuracy"] <= third["baseline"] + third["margin"]


def test_what_fails_ends_with_1_and_a_sentence_that_says_what_is_usually_wrong(capsys, caplog):
    values = ("--set", "preset=debug", "--set", "lr=1e-9")
    assert command.main(["sanity", "pairs", *values, "--steps", "5"]) == FAILED
    told = capsys.readouterr()
    assert [line.split()[3] for line in told.out.splitlines()[2:3]] == ["failed"]
    assert "pairs: overfit one batch failed; usually masks do not belong to their images" in told.err
    assert "initial loss failed" not in told.err
    assert "fewer than three images" in caplog.text
    assert not json.loads(Path("runs/pairs-sanity/sanity.json").read_text())["passed"]


def test_a_workload_without_a_network_says_so(capsys):
    assert command.main(["sanity", "toy"]) == BAD_INPUT
    assert "workload 'toy' has no network to check: it lacks parts and samples" in capsys.readouterr().err
    assert not Path("runs").exists()
    with pytest.raises(SystemExit, match="2"):
        command.main(["sanity", "pairs", "--steps", "4"])
