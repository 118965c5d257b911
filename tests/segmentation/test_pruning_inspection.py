"""The table, pictures and report of a network's filters, whole, about to be pruned and pruned."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import networks, pruning
from segmentation.networks import Network
from segmentation.pruning import Prune, channels, importance, inspection, pictures, plan, weights

SMALL = {
    "tinyunet": Network(name="tinyunet", base=4),
    "unet": Network(name="unet", widths=(4, 8)),
    "unetplusplus": Network(name="unetplusplus", widths=(4, 8), deep_supervision=True),
    "unet3plus": Network(name="unet3plus", encoder="plain", base=4, depth=2, cat_channels=4),
}
# The original's.
HEADER = "Layer,Type,Shape,In Ch,Out Ch,Num Params,Mean L1,Min L1,Max L1,Std L1,Block Ratio,Post-Prune Ratio"
SHAPE = (1, 32, 32)


def seen(name: str, prune: Prune) -> inspection.Inspection:
    torch.manual_seed(0)
    model = networks.build(SMALL[name], 1, 3)
    graph = channels.trace(model, *SHAPE)
    made = pruning.make_plan(prune, model, graph) if prune.active else None
    return inspection.inspect(model, graph, prune, made=made, shape=SHAPE, title="a <network>")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.row("P21", "P22", "P23", "P38")
@pytest.mark.parametrize("name", sorted(SMALL))
def test_any_network_gets_a_table_pictures_and_reports(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # what could open a window cannot be imported
    found = seen(name, Prune(default=0.4))
    paths = inspection.write(tmp_path, found)
    folder = tmp_path / "analysis"
    assert {path.name for path in paths} == {
        *("report.html", "report.md", "layers.csv", "pruning_masks.json"),
        *("l1_norms.png", "masks.png", "widths.png"),
    }
    convolutions = [layer.name for layer in found.layers]
    assert {path.stem for path in (folder / "histograms").iterdir()} == set(convolutions)
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 0
    assert (folder / "layers.csv").read_text().splitlines()[0] == HEADER
    assert [row["Layer"] for row in table(folder / "layers.csv")] == convolutions
    assert plan.read(folder / plan.FILE) == found.plan


@pytest.mark.row("P22")
def test_the_table_is_that_of_the_weights(tmp_path):
    model = networks.build(SMALL["unet"], 1, 3)
    graph = channels.trace(model, *SHAPE)
    prune = Prune(default=0.3, blocks={"encoders.1": 0.5})
    made = pruning.make_plan(prune, model, graph)
    found = inspection.inspect(model, graph, prune, made=made, shape=SHAPE, title="")
    rows = {row["Layer"]: row for row in inspection.rows(found.layers)}
    up, norms = rows["decoders.0"], importance.filter_norms(model.decoders[0], 1)
    assert [up[name] for name in ("Type", "Shape", "In Ch", "Out Ch")] == ["ConvTranspose2d", "(16, 8, 2, 2)", 16, 8]
    assert up["Num Params"] == 16 * 8 * 4 + 8
    assert [float(up[f"{what} L1"]) for what in ("Mean", "Min", "Max", "Std")] == pytest.approx(
        [float(value) for value in (norms.mean(), norms.min(), norms.max(), norms.std(correction=0))], rel=1e-5
    )
    assert (rows["encoders.1.net.0"]["Block Ratio"], rows["encoders.1.net.0"]["Post-Prune Ratio"]) == ("0.5", "0.5")
    assert (rows["encoders.0.net.3"]["Block Ratio"], rows["encoders.0.net.3"]["Post-Prune Ratio"]) == ("0.3", "0.25")
    assert (rows["final_conv"]["Block Ratio"], rows["final_conv"]["Post-Prune Ratio"]) == ("", "0")


@pytest.mark.row("P9", "P38")
def test_the_report_says_what_goes_and_what_it_saves_and_needs_no_other_file(tmp_path):
    found = seen("unet", Prune(default=0.25, blocks={"encoders.1": 0.5}))
    inspection.write(tmp_path, found)
    page = (tmp_path / "analysis" / "report.html").read_text()
    text = (tmp_path / "analysis" / "report.md").read_text()
    assert "a &lt;network&gt;" in page and "<network>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3 + len(found.layers)
    assert "| bottleneck | 0.25 (default) | 16 | 12 | 25.0 % |" in text
    assert "| encoders.1 | 0.5 | 8 | 4 | 50.0 % |" in text
    model = networks.build(SMALL["unet"], 1, 3)
    graph = channels.trace(model, *SHAPE)
    smaller = channels.trace(pruning.apply(model, graph, found.plan), *SHAPE)
    saved = 1 - smaller.macs() / graph.macs()
    assert f"| params | {graph.parameters():,} | {smaller.parameters():,} |" in text
    assert f"| FLOPs | {2 * graph.macs():,} | {2 * smaller.macs():,} | {100 * saved:.2f} % |" in text
    assert "1 MAC is 2 FLOPs" in text and "1 MAC is 2 FLOPs" in page
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / "analysis" / link).is_file()


@pytest.mark.parametrize(
    ("prune", "words"), [(Prune(), "Not pruned"), (Prune(global_=0.3, where="deep"), "global 0.3; where deep")]
)
def test_what_has_no_ratios_shows_none(prune, words, tmp_path):
    found = seen("unet", prune)
    inspection.write(tmp_path, found)
    assert words in (tmp_path / "analysis" / "report.md").read_text()
    assert {row["Block Ratio"] for row in table(tmp_path / "analysis" / "layers.csv")} == {""}
    assert (tmp_path / "analysis" / "masks.png").exists() == prune.active
    assert any(layer.gone for layer in found.layers) == prune.active


@pytest.mark.row("P18")
def test_of_a_network_with_fresh_weights_their_statistics_are_told_before_and_after(tmp_path):
    model = networks.build(SMALL["unet"], 1, 3)
    graph = channels.trace(model, *SHAPE)
    prune = Prune(default=0.5, mode="random")
    made = pruning.make_plan(prune, model, graph)
    smaller = pruning.apply(model, graph, made)
    told = {"drawn": weights.draw(smaller, 1), "parent_params": 9999.0, "parent_gmacs": 0.5}
    after = channels.trace(smaller, *SHAPE)
    found = inspection.inspect(smaller, after, prune, made=made, applied=told, shape=SHAPE, title="")
    inspection.write(tmp_path, found)
    text = (tmp_path / "analysis" / "report.md").read_text()
    first, second = told["drawn"]["bottleneck.net.0"].values()
    numbers = (first[0], second[0], first[1], second[1])
    assert f"| bottleneck.net.0 | {' | '.join(f'{number:.4g}' for number in numbers)} |" in text
    assert f"| params | 9,999 | {after.parameters():,} |" in text
    assert "| bottleneck | 0.5 (default) | 16 | 8 | 50.0 % |" in text
    assert {layer.shape[0] for layer in found.layers if layer.name == "bottleneck.net.3"} == {8}


@pytest.mark.row("P21")
def test_histograms_have_one_y_axis_of_shares(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure) or path)
    layers = seen("unet", Prune()).layers
    pictures.histograms({layer.name: tmp_path for layer in layers}, layers)
    pictures.norms(tmp_path, layers)
    *single, summary = figures
    limits = {figure.axes[0].get_ylim() for figure in single}
    assert len(single) == len(layers) and len(limits) == 1
    assert len({axis.get_ylim() for axis in summary.axes}) == 1
    for figure in single:
        (axis,) = figure.axes
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(100)
        assert max(bar.get_height() for bar in axis.patches) <= axis.get_ylim()[1]
