"""`python -m workloads filters`: what a checkpoint's filters are like, and what would go."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from segmentation import checkpoints
from segmentation.pruning import plan
from workloads import __main__ as command
from workloads import pairs

pytestmark = pytest.mark.usefixtures("sigterm_as_before")
SMALL = ("network.name=unet", "network.base=4", "network.depth=2", "epochs=1", "threads=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, own_cache):
    """Return the run folders of a network, and of the same pruned and drawn anew."""
    folder = tmp_path_factory.mktemp("filters")
    whole, pruned = folder / "whole", folder / "pruned"
    assert run("train", "pairs", out=whole, values=SMALL) == 0
    values = ("epochs=1", "threads=1", f"parent={whole}", "prune.default=0.5", "prune.mode=random")
    assert run("train", "pairs", out=pruned, values=values) == 0
    return whole, pruned


def run(*words, out, values=()):
    return command.main([*words, "--out", str(out), *(word for value in values for word in ("--set", value))])


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "analysis" / "layers.csv").open(newline="") as file:
        return {row["Layer"]: row for row in csv.DictReader(file)}


@pytest.mark.row("P22", "P38")
def test_values_of_prune_show_what_would_go_and_leave_the_checkpoint_alone(trained, tmp_path, capsys):
    whole, _ = trained
    before = checkpoints.digest(whole / "best")
    assert run("filters", "pairs", str(whole), out=tmp_path, values=("prune.default=0.25", "prune.encoders.1=0.5")) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == str(tmp_path / "analysis" / "report.html") and all(Path(path).is_file() for path in printed)
    rows = table(tmp_path)
    assert (rows["encoders.1.net.3"]["Block Ratio"], rows["bottleneck.net.0"]["Block Ratio"]) == ("0.5", "0.25")
    assert rows["bottleneck.net.0"]["Out Ch"] == "16"
    assert checkpoints.digest(whole / "best") == before
    made = plan.read(tmp_path / "analysis" / plan.FILE)
    assert len(made.kept["encoders.1.net.3"]) == 4
    # The plan can be used as it is.
    again = pairs.filters(whole / "best", tmp_path / "again", {"prune.plan": str(tmp_path / "analysis" / plan.FILE)})
    assert plan.read(tmp_path / "again" / "analysis" / plan.FILE) == made and again


@pytest.mark.row("P18", "P38")
def test_a_pruned_checkpoint_tells_what_went_and_how_its_weights_began(trained, tmp_path):
    _, pruned = trained
    assert run("filters", "pairs", str(pruned), out=tmp_path) == 0
    rows = table(tmp_path)
    assert {row["Post-Prune Ratio"] for row in rows.values()} == {"0.5", "0"}
    assert rows["bottleneck.net.0"]["Out Ch"] == "8"
    record = checkpoints.read_meta(pruned / "best")["pruned"]
    text = (tmp_path / "analysis" / "report.md").read_text()
    assert f"{record['drawn']['bottleneck.net.0']['before'][1]:.4g}" in text
    assert f"{record['parent_params']:,.0f}" in text and "mode random" in text


@pytest.mark.row("P49")
def test_a_pruned_checkpoint_can_be_asked_what_would_go_next(trained, tmp_path):
    _, pruned = trained
    values = ("prune.global=0.3", "prune.where=decoder", "prune.importance=pearson")
    assert run("filters", "pairs", str(pruned), out=tmp_path, values=values) == 0
    gone = {name for name, row in table(tmp_path).items() if float(row["Post-Prune Ratio"])}
    assert gone and {name.partition(".")[0] for name in gone} == {"decoders"}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("pairs", "prune.decoder.1=0.3", "decoder.1: no block of this network; did you mean 'decoders.1'"),
        ("pairs", "prune.default=1.3", "prune.default: got 1.3"),
        ("pairs", "prune.defalt=a", "prune.defalt"),
        ("toy", "seed=1", "toy: its networks cannot be pruned"),
    ],
)
def test_what_cannot_be_is_refused(trained, tmp_path, capsys, name, value, problem):
    assert run("filters", name, str(trained[0]), out=tmp_path, values=(value,)) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()
