"""The original's command line, its console and its report."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import configuration
from segmentation.epoch import DataError
from workloads import __main__ as command
from workloads import severstal
from workloads._severstal import generator, original, run_files, tfm_report
from workloads._severstal.generator import Synthetic

ROW = dict.fromkeys(run_files.COLUMNS, "0.5") | {"epoch": "1", "learning_rate": "0.001", "epoch_time": "2.5"}


@pytest.mark.row("S35")
@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--unet_plus_plus", "network.name", "smp_unetplusplus"),
        ("--encoder resnet50", "network.encoder", "resnet50"),
        ("--lr 1e-4", "lr", 1e-4),
        ("--seed 7", "seed", 7),
        ("--batch_size 2", "batch_size", 2),
        ("--epochs 3", "epochs", 3),
        ("--img_size 512 128", "data.image_size", [512, 128]),
        ("--weight_decay 1e-3", "weight_decay", 1e-3),
        ("--patience 9", "patience", 9),
        ("--num_workers 2", "loader_workers", 2),
        ("--run_name first", "run_name", "first"),
        ("--train_path data/train_split --val_path data/val_split", "data.root", "data"),
    ],
)
def test_each_flag_reaches_the_configuration(flags: str, key: str, value: Any) -> None:
    told = original.from_flags(flags.split())
    config = configuration.build(severstal.Config, told.values)
    assert configuration.to_values(config)[key] == value
    others = configuration.to_values(severstal.Config.reference()).items()
    assert {name for name, other in others if configuration.to_values(config)[name] != other} == {key}


@pytest.mark.row("S35")
def test_where_the_run_goes_and_whether_it_is_tracked_is_told() -> None:
    told = original.from_flags(["--save_dir", "models/first", "--use_wandb"])
    assert (told.out, told.tracking) == (Path("models/first"), True)
    assert original.from_flags([]).out is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--learning_rate 1", r"unrecognized arguments: --learning_rate 1; the flags are --batch_size"),
        ("--lr fast", r"argument --lr: invalid float value: 'fast'"),
        ("--img_size 512", r"argument --img_size: expected 2 arguments"),
        ("--train_path data/train", r"--train_path: got data/train; expected a folder train_split"),
        ("--train_path a/train_split --val_path b/val_split", r"--val_path: got b/val_split; expected it beside"),
    ],
)
def test_flags_that_cannot_be_are_named(flags: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        original.from_flags(flags.split())


@pytest.mark.row("S35")
@pytest.mark.row("S45")
@pytest.mark.usefixtures("sigterm_as_before")
def test_the_originals_command_trains_at_its_size_and_leaves_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    generator.write(Synthetic(samples=12, width=256, height=64), tmp_path / "all")
    home = tmp_path / "data"
    for number, picture in enumerate(sorted((tmp_path / "all/supervisely/img").iterdir())):
        folder = home / ("val_split" if number % 3 == 0 else "train_split")
        for kind, path in (("img", picture), ("ann", picture.parent.parent / "ann" / f"{picture.name}.json")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "models"
    flags = (
        f"--train_path {home}/train_split --val_path {home}/val_split --save_dir {out} --encoder resnet10t --epochs 1"
    )
    more = "--img_size 512 128 --batch_size 4 --num_workers 0 --use_wandb"
    cache = f"data.cache={tmp_path / 'cache'}"
    values = ["--set", "network.pretrained=false", "--set", cache, "--set", "network.decoder_widths=[16,8,8,8,8]"]
    assert command.main(["train", "severstal", *values, "--", *flags.split(), *more.split()]) == command.DONE
    assert "W&B follows searches" in caplog.text
    for word in (
        "Model",
        "UNet",
        "Encoder",
        "resnet10t",
        "Total parameters",
        "Image size",
        "512x128",
        "Patience",
        "Seed",
    ):
        assert word in caplog.text
    assert "Epoch 1/1" in caplog.text and "Recall@FP/image" in caplog.text
    args = json.loads((out / "args.json").read_text())["args"]
    assert (args["data.image_size"], args["data.root"]) == ([512, 128], str(home))
    assert len([*out.glob("best_*_seed42.pth")]) == 2 and (out / "best").is_dir()
    assert "there is no strip in split test" in caplog.text, "the original's script has no path of it"
    with pytest.raises(DataError, match="there is no strip in split test; score another by --split"):
        severstal.evaluate(out / "best", "test", tmp_path / "scored")
    assert json.loads((out / "run.json").read_text())["source"]["flags"][:2] == ["--train_path", f"{home}/train_split"]


@pytest.mark.row("S45")
def test_the_console_says_what_is_trained_and_ten_lines_of_each_epoch() -> None:
    told = run_files.banner(replace(severstal.Config.reference(), run_name="first"), 24_436_369)
    assert told.splitlines()[0] == "first"
    lines = dict(line.strip().split("  ", 1) for line in told.splitlines()[1:])
    assert {name: value.strip() for name, value in lines.items()} == {
        "Model": "UNet",
        "Encoder": "resnet34 (ImageNet)",
        "Total parameters": "24,436,369",
        "Learning rate": "0.001",
        "Batch size": "8",
        "Weight decay": "0.0001",
        "Image size": "1024x256",
        "Patience": "7",
        "Seed": "42",
    }
    block = run_files.block(1, 100, ROW).splitlines()
    assert block[0] == "Epoch 1/100" and len(block) == 11
    assert "undefined" in run_files.block(1, 100, {**ROW, "auprc": ""})


@pytest.mark.row("S51")
def test_the_report_ticks_what_the_run_does_and_crosses_what_it_does_not() -> None:
    asked = replace(severstal.Config.reference(), deterministic=True, sampler="balanced")
    whole = tfm_report.text(asked, [ROW])
    assert "- [ ]" not in whole
    for title in (
        "AdamW",
        "gradient clipping",
        "BCE + Dice",
        "AUPRC",
        "Recall@FP",
        "vertical flip",
        "ResNet34",
        "seed",
    ):
        assert title in whole
    assert "## Best epoch so far: 1" in whole
    other = tfm_report.text(replace(asked, lr=0.01, save_every=5, deterministic=False, patience=0), [])
    crossed = [line.split(":")[0].removeprefix("- [ ] ") for line in other.splitlines() if line.startswith("- [ ]")]
    assert {"learning rate 1e-3 or 1e-4", "checkpoints every 10 epochs", "deterministic", "early stopping"} <= {
        *crossed
    }
    assert "optimizer" not in crossed and "Best epoch" not in other


@pytest.mark.row("S51")
def test_a_run_keeps_its_report_up_to_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    debug = severstal.Config.debug()
    alone = replace(debug, data=replace(debug.data, cache=str(tmp_path / "cache")), out=str(tmp_path / "out"), epochs=1)
    with caplog.at_level(logging.INFO):
        run = severstal.train(alone)
        next(run)
        report = (tmp_path / "out" / tfm_report.FILE).read_text()
        run.close()
    assert "metrics_seed42.csv, 1 epochs so far" in report and "val_dice_opt" in report
