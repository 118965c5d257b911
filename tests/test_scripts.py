"""The ESD project's own commands, as its users type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import configuration
from scripts import evaluate, train, train_sweeps

pytestmark = pytest.mark.usefixtures("own_cache", "sigterm_as_before")

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted((ROOT / "scripts" / "sweeps").glob("*.yml"))
SMALL = [
    f"--set={value}"
    for value in (
        "data.synthetic.tiles=6",
        "data.synthetic.pixels=4",
        "fixed.network.scale_factor=4",
        "fixed.network.pool_sizes=[2,2]",
        "fixed.network.embedding_size=8",
    )
]


def test_all_three_sweeps_are_here() -> None:
    assert [path.stem for path in SWEEPS] == ["cnn", "sweeps", "unet"]


@pytest.mark.ray
@pytest.mark.row("E6")
@pytest.mark.row("E33")
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_the_project_runs(path, ray_cluster, tmp_path, capsys) -> None:
    folder = tmp_path / "runs"
    flags = [f"--sweep_file={path.name}", "--count=2", f"--runs={folder}", *SMALL]
    assert train_sweeps.main(flags) == 0
    told = capsys.readouterr()
    rows = (folder / path.stem / "leaderboard.csv").read_text().splitlines()
    assert len(rows) >= 2
    assert "Traceback" not in told.err
    assert train_sweeps.main([*flags, f"--raw_dir={tmp_path}/raw"]) == 2, "a folder that is named has to be there"
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.row("E7")
def test_a_metric_that_nothing_reports_ends_a_sweep_before_it_starts(tmp_path, capsys) -> None:
    path = tmp_path / "sweeps.yml"
    path.write_text(SWEEPS[0].read_text().replace("name: val_accuracy", "name: average ACC"))
    assert train_sweeps.main([f"--sweep_file={path}", f"--runs={tmp_path / 'runs'}"]) == 2
    told = capsys.readouterr().err
    assert "sweeps.yml: metric.name" in told and "'average ACC'" in told and "val_accuracy" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.row("E35")
def test_without_any_data_the_synthetic_tiles_are_evaluated(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = []
    monkeypatch.setattr(evaluate, "run", lambda words: told.extend(words) or 0)
    assert evaluate.main([f"--model_path={tmp_path}", "--accelerator=cpu"]) == 0
    values = dict(configuration.parse_assignment(word) for word in told if "=" in word)
    assert (values["data.root"], values["device"], values["evaluation_batch"]) == ("", "cpu", 8)
    assert told[: told.index("--set")][-4:] == ["--split", "validation", "--out", "data/predictions/SegmentationCNN"]


@pytest.mark.row("E30")
@pytest.mark.row("E34")
@pytest.mark.row("E14")
def test_train_and_evaluate_go_hand_in_hand(tmp_path, monkeypatch, capsys) -> None:
    from workloads import esd
    from workloads._esd import generator

    monkeypatch.chdir(tmp_path)
    generator.write(esd.Config.debug().data.synthetic, tmp_path / "data" / "raw")
    small = ["--scale_factor=4", "--pool_sizes=2,2", "--embedding_size=8", "--num_workers=0"]
    assert train.main(["--model_type=SegmentationCNN", "--max_epochs=2", *small]) == 0
    models = tmp_path / "models" / "SegmentationCNN"
    assert (models / "last.ckpt").is_file() and (models / "best.ckpt").is_file()
    assert len(list((tmp_path / "data/processed/4x4/Train/subtiles").glob("*.npz"))) == 64
    assert evaluate.main(["--model_type=SegmentationCNN"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert "calling everything no_settlement_without_electricity: mean_iou" in verdict
    results = tmp_path / "data" / "predictions" / "SegmentationCNN"
    scores = json.loads((results / "evaluation.json").read_text())
    assert scores["split"] == "validation" and "contest_f1" in scores["metrics"]
    assert list(results.glob("Tile*_prediction.tif")) and list(results.glob("Tile*/plot/restitched*.png"))
    assert evaluate.main([f"--model_path={models / 'best.ckpt'}", "--split=test", "--results_dir=again"]) == 0
    assert (tmp_path / "again" / "evaluation.json").is_file()
    assert train.main(["--max_epochs=1", *small]) == 0
    assert (tmp_path / "models" / "SegmentationCNN.1" / "last.ckpt").is_file(), "nothing is written over"
    assert train.main(["--max_epoch=1"]) == 2
    assert "unrecognized arguments: --max_epoch=1" in capsys.readouterr().err
    assert evaluate.main(["--model_path=models/UNet/last.ckpt"]) == 2
    assert "models/UNet/last.ckpt" in capsys.readouterr().err
