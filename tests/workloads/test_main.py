"""`python -m workloads`: one configuration, trained, scored and used without a search."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import workloads
from configuration import fields
from search import spec_file
from segmentation import networks
from segmentation.networks import cost
from tests.conftest import ROOT
from workloads import __main__ as command
from workloads import toy

DONE, FAILED, BAD_INPUT = 0, 1, 2


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, caplog, sigterm_as_before):
    """Run each test in a folder of its own, and hear what is logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")


def start(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "workloads", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*words):
    process = start(*words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def rows(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def epoch_of(checkpoint):
    return json.loads(Path(checkpoint, toy.STATE_FILE).read_text())["epoch"]


def test_list_names_every_workload_in_one_sentence(capsys):
    assert command.main(["list"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == workloads.names()
    for line, name in zip(lines, workloads.names(), strict=True):
        assert line.endswith(workloads.load(name).__doc__.splitlines()[0])


@pytest.mark.row("X3")
@pytest.mark.parametrize("name", workloads.names())
def test_list_shows_every_value_and_metric(name, capsys):
    assert command.main(["list", name]) == DONE
    out = capsys.readouterr().out
    module = workloads.load(name)
    for field in command.configuration.fields(module.Config).values():
        assert f"  {field.name}{'  (' if field.name.endswith(command.configuration.OPEN) else ' = '}" in out
        assert field.help.splitlines()[0] in out
    for metric, mode in module.metrics(module.Config()).items():
        assert [metric, mode] in [line.split() for line in out.splitlines()]


def test_list_shows_a_preset_beside_the_defaults(capsys):
    assert command.main(["list", "toy", "--set", "preset=debug"]) == DONE
    assert "  epochs = 2  (whole number; default 5)\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.row("K2")
def test_backbones_counts_the_ten_and_those_named(capsys):
    assert command.main(["backbones", "resnet10t", "--size", "64"]) == DONE
    _, *lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split() for line in lines}
    assert list(found) == [*cost.BACKBONES, "resnet10t"]
    for name, (_, own, whole, macs, *levels) in found.items():
        encoder = networks.build(networks.Network(name="timm_unet", encoder=name), 3, 3).encoder
        assert int(own.replace(",", "")) == cost.parameters(encoder) < int(whole.replace(",", ""))
        assert float(macs) > 0
        shown = " ".join(levels).split(" / ")
        assert [list(map(int, part.split())) for part in shown] == [
            encoder.feature_info.channels(),
            encoder.feature_info.reduction(),
        ]


def test_train_prints_the_best_checkpoint_and_a_line_an_epoch(capsys, caplog):
    assert command.main(["train", "toy", "--set", "epochs=3", "--set", "lr=1e-2"]) == DONE
    assert capsys.readouterr().out == "runs/toy-train/best\n"
    lines = [record.message for record in caplog.records if record.message.startswith("epoch ")]
    assert len(lines) == 3
    assert lines[-1].startswith(f"epoch 3 of 3 score {toy.curve(toy.Config(lr=1e-2), 3):.4g} loss ")
    assert [row["epoch"] for row in rows("runs/toy-train")] == [1, 2, 3]
    assert [path.name for path in sorted(Path("runs/toy-train").iterdir())] == [
        "best",
        "last",
        "metrics.jsonl",
        "run.json",
    ]
    assert json.loads(Path("runs/toy-train/run.json").read_text())["config"]["lr"] == 1e-2


def test_best_and_last_differ_where_the_score_fell(monkeypatch):
    scores = {1: 0.1, 2: 0.9, 3: 0.3}
    monkeypatch.setattr(toy, "curve", lambda config, epoch: scores[epoch])
    assert command.main(["train", "toy", "--set", "epochs=3"]) == DONE
    assert (epoch_of("runs/toy-train/best"), epoch_of("runs/toy-train/last")) == (2, 3)


def test_another_metric_chooses_in_its_own_direction(monkeypatch):
    scores = {1: 0.1, 2: 0.9, 3: 0.3}
    monkeypatch.setattr(toy, "curve", lambda config, epoch: scores[epoch])
    assert command.main(["train", "toy", "--set", "epochs=3", "--metric", "loss"]) == DONE
    assert epoch_of("runs/toy-train/best") == 2
    monkeypatch.setattr(toy, "metrics", lambda config: {"score": "max", "loss": "max", "cost": "min"})
    assert command.main(["train", "toy", "--set", "epochs=3", "--metric", "loss", "--out", "other"]) == DONE
    assert epoch_of("other/best") == 1


def test_a_score_that_is_no_number_is_never_best(monkeypatch):
    scores = {1: float("nan"), 2: 0.2, 3: float("nan")}
    monkeypatch.setattr(toy, "curve", lambda config, epoch: scores[epoch])
    assert command.main(["train", "toy", "--set", "epochs=3"]) == DONE
    assert epoch_of("runs/toy-train/best") == 2
    assert rows("runs/toy-train")[0]["metrics"]["score"] is None
    monkeypatch.setattr(toy, "curve", lambda config, epoch: float("nan"))
    assert command.main(["train", "toy", "--out", "never"]) == FAILED


@pytest.mark.row("X10")
def test_resume_goes_on_from_the_last_epoch(capsys):
    command.main(["train", "toy", "--set", "epochs=6", "--out", "unbroken"])
    assert command.main(["train", "toy", "--set", "epochs=6", "--set", "fail=nan", "--set", "fail_epoch=4"]) == FAILED
    assert command.main(["train", "toy", "--resume", "--set", "fail=never"]) == DONE
    assert [row["metrics"] for row in rows("runs/toy-train")] == [row["metrics"] for row in rows("unbroken")]
    assert epoch_of("runs/toy-train/best") == 6


def test_resume_of_a_finished_run_trains_nothing_unless_made_longer(caplog, capsys):
    command.main(["train", "toy", "--set", "epochs=2"])
    assert command.main(["train", "toy", "--resume"]) == DONE
    assert "nothing was left to train; for more than 2 epochs: --set epochs=" in caplog.text
    assert command.main(["train", "toy", "--resume", "--set", "epochs=3"]) == DONE
    assert len(rows("runs/toy-train")) == 3
    assert capsys.readouterr().out.splitlines() == ["runs/toy-train/best"] * 3


def test_an_epoch_done_again_after_a_kill_stands_once_and_the_best_is_remembered(monkeypatch):
    scores = {1: 0.9, 2: 0.3, 3: 0.5}
    monkeypatch.setattr(toy, "curve", lambda config, epoch: scores[epoch])
    command.main(["train", "toy", "--set", "epochs=2"])
    # As a kill leaves it between the line of epoch 3 and its checkpoint.
    with Path("runs/toy-train/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "seconds": 0.0, "metrics": {"score": 1.0, "loss": 0.0, "cost": 1.0}}\n')
    assert command.main(["train", "toy", "--resume", "--set", "epochs=3"]) == DONE
    assert [(row["epoch"], row["metrics"]["score"]) for row in rows("runs/toy-train")] == list(scores.items())
    assert epoch_of("runs/toy-train/best") == 1


def test_a_checkpoint_whose_exchange_was_interrupted_is_put_back():
    command.main(["train", "toy", "--set", "epochs=2"])
    Path("runs/toy-train/last").rename("runs/toy-train/.last.old")
    assert command.main(["train", "toy"]) == BAD_INPUT
    assert command.main(["train", "toy", "--resume", "--set", "epochs=3"]) == DONE
    assert [row["epoch"] for row in rows("runs/toy-train")] == [1, 2, 3]


@pytest.mark.row("X10")
def test_a_killed_run_goes_on():
    process = start("train", "toy", "--set", "epochs=200", "--set", "epoch_s=0.02")
    for _ in range(500):
        if Path("runs/toy-train/last").exists():
            break
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.communicate(timeout=60)
    done = len(rows("runs/toy-train"))
    assert 0 < done < 200
    assert command.main(["train", "toy", "--resume", "--set", f"epochs={done + 2}", "--set", "epoch_s=0"]) == DONE
    assert [row["epoch"] for row in rows("runs/toy-train")] == list(range(1, done + 3))


def test_evaluate_prints_a_table_of_the_test_split(capsys):
    command.main(["train", "toy"])
    capsys.readouterr()
    assert command.main(["evaluate", "toy", "runs/toy-train/best"]) == DONE
    head, first, second = capsys.readouterr().out.splitlines()
    score = toy.curve(toy.Config(), 5)
    assert head.split() == ["metric", "score", "95", "%", "interval"]
    assert first.split()[:2] == ["score", f"{score:.4f}"] and " to " in first
    assert second.split() == ["loss", f"{1 - score:.4f}"]
    written = json.loads(Path("runs/toy-evaluate/evaluation.json").read_text())
    assert (written["split"], written["metrics"]["score"]) == ("test", score)
    assert command.main(["evaluate", "toy", "runs/toy-train", "--split", "validation", "--out", "v"]) == DONE
    assert json.loads(Path("v/evaluation.json").read_text())["checkpoint"] == "runs/toy-train/best"


def test_pairs_from_training_to_a_prediction(capsys, tmp_path):
    """The README's four commands, on the image that comes with the code."""
    assert command.main(["inspect", "pairs", "--set", "preset=debug"]) == DONE
    assert command.main(["train", "pairs", "--set", "preset=debug"]) == DONE
    *pictures, checkpoint = capsys.readouterr().out.splitlines()
    assert all(Path(picture).is_file() for picture in pictures)
    assert command.main(["evaluate", "pairs", checkpoint]) == DONE
    assert capsys.readouterr().out.splitlines()[1].startswith("mean_iou")
    assert Path("runs/pairs-evaluate/predictions.png").is_file()
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.full((70, 90), 128, np.uint8)).save(folder / "a.png")
    assert command.main(["predict", "pairs", checkpoint, str(folder)]) == DONE
    written = capsys.readouterr().out.splitlines()
    assert written == ["runs/pairs-predict/a_mask.png", "runs/pairs-predict/a_overlay.png"]
    with Image.open(written[0]) as mask:
        assert mask.size == (90, 70)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "toyy"], "workload 'toyy' not found; did you mean 'toy'?"),
        (["list", "toyy"], "did you mean 'toy'?"),
        (["train", "toy", "--set", "lrr=1"], "lrr: unknown key; did you mean 'lr'?"),
        (["train", "toy", "--set", "lr"], "lr: expected key=value"),
        (["train", "toy", "--set", "lr=fast"], "lr: got 'fast'; expected number"),
        (["train", "toy", "--set", "epochs=0"], "epochs: got 0; expected at least 1"),
        (["train", "toy", "--set", "preset=tiny"], "preset: got 'tiny'; this workload has debug"),
        (["train", "toy", "--metric", "scor"], "--metric: unknown metric; did you mean 'score'"),
        (["backbones", "convnext_tinny"], "no model 'convnext_tinny'; did you mean 'convnext_tiny'"),
        (["train", "toy", "--resume"], "runs/toy-train: no run to go on with; leave --resume out"),
        (["train", "pairs", "--set", "data.root=nowhere"], "nowhere: no such folder; data.root should hold"),
        (["train", "pairs", "--set", "device=cuda:99"], "device: got 'cuda:99', but there are"),
        (["train", "pairs", "--set", "network.dims=3"], "dims: got 3, but the samples here are images; write 2"),
        (["evaluate", "toy", "nowhere"], "nowhere: no such checkpoint folder"),
        (["evaluate", "toy", "."], "state.json: No such file or directory"),
        (["predict", "pairs", ".", "nowhere"], "nowhere: no such file or folder"),
        (["predict", "pairs", ".", "."], ".: no checkpoint here, checkpoint.json is missing"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do_and_writes_nothing(words, message, capsys):
    assert command.main(words) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("python -m workloads: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds a run; go on with it by --resume, or give this one its own folder by --out"),
        (["--resume", "--set", "preset=debug"], "preset: cannot change in a run that goes on"),
        (["--resume", "--set", "lrr=1"], "lrr: unknown key; did you mean 'lr'?"),
        (["--resume", "--metric", "loss"], "its best epoch goes by score; leave --metric out"),
    ],
)
def test_a_run_is_not_overwritten_or_bent(words, message, capsys):
    command.main(["train", "toy"])
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert command.main(["train", "toy", *words]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_run_of_other_data_or_another_workload_is_not_gone_on_with(monkeypatch, capsys):
    command.main(["train", "toy"])
    assert command.main(["train", "pairs", "--resume", "--out", "runs/toy-train"]) == BAD_INPUT
    assert "a run of toy; expected one of pairs" in capsys.readouterr().err
    manifest = toy.prepare(toy.Config())
    monkeypatch.setattr(toy, "prepare", lambda config: {**manifest, "sha256": "other"})
    assert command.main(["train", "toy", "--resume"]) == BAD_INPUT
    assert "its data has changed since" in capsys.readouterr().err


@pytest.mark.row("X11")
def test_a_loss_that_is_no_number_fails_and_keeps_what_was_there(capsys):
    assert command.main(["train", "toy", "--set", "fail=nan", "--set", "fail_epoch=3"]) == FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("python -m workloads: loss is nan")
    assert epoch_of("runs/toy-train/last") == 2


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    def broken(config, resume=None):
        raise ValueError("shapes differ")
        yield

    monkeypatch.setattr(toy, "train", broken)
    with pytest.raises(ValueError, match="shapes differ"):
        command.main(["train", "toy"])


def test_results_go_to_stdout_logs_to_stderr_and_the_exit_code_tells():
    code, out, err = run("train", "toy", "--set", "epochs=2")
    assert (code, out) == (DONE, "runs/toy-train/best\n")
    assert [line.split(" score")[0] for line in err.splitlines()] == ["epoch 1 of 2", "epoch 2 of 2"]
    code, out, err = run("train", "toy", "--set", "epochs=two", "--out", "other")
    assert (code, out, err) == (BAD_INPUT, "", "python -m workloads: epochs: got 'two'; expected whole number\n")


def test_a_warning_is_said_once():
    """The telescope logs that its data is synthetic, and its manifest lists it too."""
    code, out, err = run("inspect", "telescope", "--set", "preset=debug", "--out", "seen")
    assert (code, out) == (DONE, "seen/sample.png\n")
    assert err.count("SYNTHETIC DATA") == 1


def test_an_interrupted_run_says_how_it_goes_on():
    process = start("train", "toy", "--set", "epochs=500", "--set", "epoch_s=0.02")
    for _ in range(500):
        if Path("runs/toy-train/last").exists():
            break
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED
    assert "--resume" in err and "Traceback" not in err


def test_a_reader_that_has_seen_enough_is_no_error():
    process = start("list", "toy")
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=60), err) == (DONE, "")
    process.stderr.close()


@pytest.mark.row("X3")
def test_an_encoder_that_cannot_be_used_is_told_in_one_line(capsys):
    for encoder, told in (
        ("resnet43", "encoder: timm has no model 'resnet43'; did you mean"),
        ("vit_tiny_patch16_224", "encoder: 'vit_tiny_patch16_224' cannot take images of 64x64"),
    ):
        words = ["--set", "network.name=unet3plus", "--set", f"network.encoder={encoder}"]
        assert command.main(["train", "pairs", *words]) == BAD_INPUT
        assert told in capsys.readouterr().err


def test_evaluate_and_predict_take_other_values_than_training(capsys):
    assert command.main(["train", "toy", "--set", "epochs=1", "--set", "lr=1e-2"]) == DONE
    capsys.readouterr()
    for words, lr in (([], 1e-2), (["--set", "lr=1e-4"], 1e-4)):
        assert command.main(["evaluate", "toy", "runs/toy-train", *words]) == DONE
        score = json.loads(Path("runs/toy-evaluate/evaluation.json").read_text())["metrics"]["score"]
        assert score == pytest.approx(toy.curve(toy.Config(lr=lr), 1))
    assert command.main(["predict", "toy", "runs/toy-train", ".", "--set", "lrr=1"]) == BAD_INPUT


@pytest.mark.row("K44")
@pytest.mark.parametrize(
    "name", [name for name in workloads.names() if "strategy" in fields(workloads.load(name).Config)]
)
def test_a_strategy_that_is_not_installed_is_refused_before_anything_starts(name, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda part, *rest: (part != "deepspeed" and find(part, *rest)) or None
    )
    assert command.main(["train", name, "--set", "strategy=deepspeed"]) == BAD_INPUT
    assert "strategy: got deepspeed, which is not installed; install it by pip install" in capsys.readouterr().err
    assert not list(Path().rglob("checkpoint.json"))


@pytest.mark.row("P42")
@pytest.mark.parametrize("name", ["attention_unet", "unetplusplus"])
def test_kinds_of_unet_are_chosen_by_name_searched_and_trained(name, tmp_path):
    space = tmp_path / "kinds.yaml"
    space.write_text(
        "workload: pairs\nobjective: {metric: val_mean_iou, mode: max}\n"
        f"parameters: {{network.name: {{type: categorical, choices: [unet, {name}]}}}}\n"
    )
    assert spec_file.load(str(space)).parameters[0].choices == ("unet", name)
    values = ["preset=debug", f"network.name={name}", "network.depth=2", "epochs=3", "network.deep_supervision=true"]
    assert command.main(["train", "pairs", *(word for value in values for word in ("--set", value))]) == DONE
    losses = [row["metrics"]["train_loss"] for row in rows("runs/pairs-train")]
    assert losses[-1] < losses[0]


@pytest.mark.row("P40")
@pytest.mark.parametrize("name", [name for name in workloads.names() if hasattr(workloads.load(name), "parts")])
def test_lr_prints_bounds_that_a_search_space_takes(name, capsys, caplog):
    assert command.main(["lr", name, "--set", "preset=debug", "--steps", "20", "--out", "swept"]) == DONE
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    metric = next(iter(workloads.load(name).metrics(workloads.load(name).Config.debug())))
    Path("space.yaml").write_text(f"workload: {name}\nobjective: {{metric: {metric}}}\nparameters:\n  {line}")
    found = spec_file.load("space.yaml").parameters[0]
    assert 1e-8 <= found.low < found.high <= 1 and found.log
    assert Path("swept/lr.png").is_file()
    assert "steepest fall at" in caplog.text


@pytest.mark.row("E39")
@pytest.mark.parametrize("name", [name for name in workloads.names() if hasattr(workloads.load(name), "parts")])
def test_describe_shows_each_layer_and_the_whole_network(name, capsys):
    assert command.main(["describe", name, "--set", "preset=debug"]) == DONE
    heading, image, *layers, total = capsys.readouterr().out.splitlines()
    assert heading.split() == ["module", "kind", "output", "parameters"]
    parts = workloads.load(name).parts(workloads.load(name).Config.debug())
    shape = next(iter(parts.train_batches(1)))[0].shape[1:]
    assert image.split() == ["image", *" x ".join(map(str, shape)).split()]
    shown = {line.split()[0] for line in layers}
    assert {key for key, _ in parts.model.named_children()} < shown
    assert all(key.count(".") < 2 for key in shown)
    assert total.split()[:2] == ["total", type(parts.model).__name__]
    assert total.split()[-1] == f"{cost.parameters(parts.model):,}"
    assert not Path("runs").exists()


def test_describe_needs_a_workload_with_parts(capsys):
    assert command.main(["describe", "toy"]) == BAD_INPUT
    assert "toy: its network cannot be described, for it offers no `parts(config)`" in capsys.readouterr().err


@pytest.mark.row("P40")
def test_lr_sweeps_what_train_trains(monkeypatch):
    """The sweep's first loss is that of a training of one step at no rate at all."""
    from segmentation import training
    from workloads import pairs

    config = pairs.Config(**{**vars(pairs.Config.debug()), "epochs": 1, "lr": 1e-12, "batch_size": 10_000})
    swept = next(training.steps_at(config, pairs.parts(config), [1e-7]))
    assert swept == pytest.approx(next(iter(pairs.train(config))).metrics["train_loss"], rel=1e-6)


def test_lr_needs_a_workload_with_parts_and_a_loss_that_falls(monkeypatch, capsys):
    assert command.main(["lr", "toy"]) == BAD_INPUT
    assert "toy: its learning rate cannot be swept, for it offers no `parts(config)`" in capsys.readouterr().err
    monkeypatch.setattr("segmentation.training._step", lambda *_: 1.0)
    assert command.main(["lr", "pairs", "--set", "preset=debug"]) == FAILED
    assert "the loss falls at no learning rate, in 100 steps" in capsys.readouterr().err
    assert not Path("runs").exists()
    with pytest.raises(SystemExit, match="2"):
        command.main(["lr", "pairs", "--steps", "5"])
