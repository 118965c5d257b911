"""The spark workload: what it trains, what it leaves behind, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.exc import TorchDynamoException

import configuration
import tune
from configuration import ConfigError
from search import spec_file
from search.trial import TrialRun
from segmentation import checkpoints, losses, networks, splits
from segmentation.epoch import DataError
from segmentation.networks import Network
from segmentation.networks.cost import BACKBONES, macs, parameters
from segmentation.prediction import FlipAverage
from tests import processes
from tests.conftest import ROOT
from workloads import __main__ as command
from workloads import pairs, spark
from workloads._spark import (
    classes,
    dataset,
    evaluation_files,
    generator,
    inference,
    reader,
    submission,
    training_files,
)
from workloads._spark.generator import Synthetic

pytestmark = pytest.mark.usefixtures("own_cache")


torch.set_num_threads(1)
SMALL = Synthetic(samples=40, size=64, test_images=3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return generator.ensure(SMALL, tmp_path_factory.mktemp("generated"))


def debug(**values):
    changes = {name.replace("__", "."): value for name, value in values.items()}
    return configuration.replace(spark.Config.debug(), changes)


def pull(config, folder=None, resume=None):
    found = []
    for epoch in spark.train(config, resume):
        found.append((epoch.number, dict(epoch.metrics)))
        if folder is not None:
            epoch.save(folder / f"epoch-{epoch.number}")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the checkpoint folder of a run of eight epochs, which has learned a little."""
    folder = tmp_path_factory.mktemp("trained")
    config = debug(epochs=8, lr=1e-2, batch_size=4, network__cat_channels=8, validate_every=8)
    [(number, _)] = pull(config, folder)
    return folder / f"epoch-{number}"


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    return spark.evaluate(trained, "test", out), out


# Values


@pytest.mark.row("X4")
@pytest.mark.row("K12")
@pytest.mark.row("K15")
@pytest.mark.row("K16")
@pytest.mark.row("K20")
@pytest.mark.row("K21")
@pytest.mark.row("K22")
def test_reference_preset_is_the_originals_values():
    config = spark.Config.reference()
    expected = {
        "network.name": "unet3plus_simplified",
        "network.encoder": "convnext_tiny.fb_in22k_ft_in1k",
        "network.pretrained": True,
        "network.freeze_encoder": False,
        "network.cat_channels": 64,
        "network.deep_supervision": False,
        "loss.ce": 0.5,
        "loss.dice": 0.5,
        "loss.dice_background": True,
        "loss.dice_pooling": "image",
        "loss.aux_weight": 0.4,
        "epochs": 30,
        "batch_size": 8,
        "data.target_size": 512,
        "data.test": "from_train",
        "data.mask_resize": "rgb_first",
        "loader_workers": 7,
        "patience": 15,
        "patience_unit": "validations",
        "validate_every": 2,
        "early_stop_metric": "val_loss",
        "optimizer": "adamw",
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "lr_schedule": "warmup_linear",
        "lr_min": 0.0,
        "warmup_steps": 500,
        "clip_norm": 1.0,
        "precision": "fp32",
        "normalise.method": "imagenet",
        "augmentation.horizontal_flip": 0.5,
        "augmentation.vertical_flip": 0.5,
        "augmentation.rotate90": 0.5,
        "augmentation.brightness": 0.0,
        "augmentation.brightness_factor": 0.2,
        "augmentation.contrast": 0.2,
        "augmentation.colour_probability": 0.5,
        "upsample": "nearest",
        "submission": "bool",
        "evaluation_batch": 32,
        "examples": 20,
        "save_every": 10,
    }
    values = configuration.to_values(config)
    assert {name: values[name] for name in expected} == expected
    assert spark.Config().network.encoder == "convnext_tiny"


@pytest.mark.row("K13")
def test_pretrained_is_a_real_boolean_and_needs_its_weights(monkeypatch):
    assert not configuration.build(
        spark.Config, {"preset": "reference", "network.pretrained": False}
    ).network.pretrained
    with pytest.raises(ConfigError, match=r"network\.pretrained: got 'no'"):
        configuration.build(spark.Config, {"network.pretrained": "no"})

    def unreachable(*_, **options):
        assert options["pretrained"]
        raise OSError("no route to host")

    import timm

    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **o: unreachable(*a, **o) if o.get("pretrained") else real(*a, **o)
    )
    with pytest.raises(DataError, match=r"pretrained weights of 'resnet10t' cannot be loaded .*no route to host"):
        spark.prepare(debug(network__pretrained=True))
    assert spark.prepare(debug(network__pretrained=False))["synthetic"]


@pytest.mark.row("K6")
@pytest.mark.row("K15")
def test_deep_supervision_and_its_weight_change_training_alone():
    without, half, twice = (
        pull(debug(epochs=1, network__deep_supervision=on, loss__aux_weight=weight))[0][1]
        for on, weight in ((False, 0.4), (True, 0.4), (True, 0.8))
    )
    assert without["train_loss"] < half["train_loss"] < twice["train_loss"]
    assert without["gmacs"] == half["gmacs"]
    assert without["parameters"] < half["parameters"]


@pytest.mark.row("K9")
def test_every_figure_has_the_classes_colours_from_one_source(trained, tmp_path, monkeypatch):
    assert classes.COLOURS == ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    seen = []
    from segmentation import figures

    real = figures.legend
    monkeypatch.setattr(
        figures, "legend", lambda figure, names, colours, **rest: seen.append((tuple(names), colours)) or
        real(figure, names, colours, **rest)
    )  # fmt: skip
    spark.inspect(debug(), tmp_path)
    spark.evaluate(trained, "validation", tmp_path, {"examples": 1})
    assert len(seen) == 2
    assert set(seen) == {(classes.CLASSES, classes.COLOURS)}
    config = debug(epochs=1)
    run = spark.train(config)
    next(run).draw(tmp_path / "strips.png")
    with Image.open(tmp_path / "strips.png") as picture:
        colours = np.unique(np.asarray(picture).reshape(-1, 3), axis=0)
    # Red and blue are laid over a grey picture at one half.
    assert (colours[:, 0].astype(int) - colours[:, 1] > 60).any() and (
        colours[:, 2].astype(int) - colours[:, 1] > 60
    ).any()


# Training


def test_an_epoch_tells_the_price_of_the_network(trained):
    [(_, told)] = pull(debug(epochs=1))
    config = debug()
    model = networks.build(config.network, 3, 3)
    assert told["gmacs"] == macs(model, 3, 64, 64) / 1e9
    assert told["parameters"] == parameters(model)
    reported = spark.metrics(config)
    assert (reported["val_mean_iou_no_bg"], reported["gmacs"]) == ("max", "min")


@pytest.mark.row("X5")
def test_working_out_the_price_draws_no_random_number():
    def first_weights():
        torch.manual_seed(3)
        return spark.build_network(debug()).state_dict()

    spark._price.cache_clear()
    first, again = first_weights(), first_weights()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_scores_of_training_are_reported_where_asked_for():
    config = debug(epochs=1, train_scores=True)
    [(_, told)] = pull(config)
    assert told.keys() == spark.metrics(config).keys() > spark.metrics(debug()).keys()
    assert 0 <= told["train_mean_iou"] <= told["train_mean_dice"] <= 1


@pytest.mark.row("K14")
def test_the_backbone_rests_in_the_first_epochs_and_a_run_goes_on_across_the_boundary(tmp_path):
    config = debug(epochs=3, freeze_epochs=2)
    whole = pull(config, tmp_path)
    found = {number: _encoder(tmp_path / f"epoch-{number}") for number in (1, 2, 3)}
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1])
    changed = {name for name in found[1] if not torch.equal(found[2][name], found[3][name])}
    assert {"bn1.running_mean", "bn1.num_batches_tracked", "conv1.0.weight"} <= changed
    assert not found[2]["bn1.num_batches_tracked"].item()
    for at in (1, 2):
        assert pull(config, resume=tmp_path / f"epoch-{at}") == whole[at:]


@pytest.mark.row("K14")
def test_a_backbone_frozen_for_good_never_changes_whatever_freeze_epochs_says(tmp_path):
    pull(debug(freeze_epochs=1, network__freeze_encoder=True), tmp_path)
    first, second = (_encoder(tmp_path / f"epoch-{number}") for number in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    state = checkpoints.load_state(tmp_path / "epoch-2")["optimizer"]
    decoder = len(list(networks.build(debug().network, 3, 3).parameters())) - len(
        [name for name in first if "running" not in name and "num_batches" not in name]
    )
    assert len(state["param_groups"][0]["params"]) == decoder


def _encoder(checkpoint):
    weights = checkpoints.safetensors_weights(checkpoint / checkpoints.WEIGHTS_FILE)
    return {name.removeprefix("encoder."): each for name, each in weights.items() if name.startswith("encoder.")}


@pytest.mark.row("K17")
def test_epochs_between_validations_are_not_reported_and_numbers_stay_true():
    found = pull(debug(epochs=5, validate_every=2))
    assert [number for number, _ in found] == [2, 4, 5]
    assert all("val_mean_iou_no_bg" in told for _, told in found)


@pytest.mark.row("K17")
def test_a_trial_reports_validations_only(tmp_path):
    """What a step of a trial returns is what its process reports to Tune."""
    config = configuration.to_values(debug(epochs=5, validate_every=2))
    objectives = [{"metric": "val_mean_iou_no_bg", "mode": "max"}, {"metric": "gmacs", "mode": "min"}]
    order = {"number": 0, "workload": "spark", "config": config, "objectives": objectives, "tensorboard": False}
    run = TrialRun({**order, "folder": str(tmp_path)})
    steps = [run.step() for _ in range(3)]
    run.close()
    assert [number for number, _, _ in steps] == [2, 4, 5]
    outcome = steps[-1][2]
    assert (outcome.state, list(outcome.epochs)) == ("complete", [2, 4, 5])


@pytest.mark.row("K19")
def test_downsample_trains_on_a_share_of_every_satellite(tmp_path):
    config = debug(epochs=1, data__downsample=20)
    pull(config, tmp_path)
    made = splits.read(tmp_path / "epoch-1" / "splits.json")
    assert (len(made.train), len(made.validation), len(made.test)) == (20, 2, 2)
    assert len({made.names[index].partition("/")[0] for index in made.train}) == 10


@pytest.mark.row("K18")
def test_given_places_are_the_ones_that_are_read(tree, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved)
    (moved / "train.csv").rename(tmp_path / "a.csv")
    (moved / "val.csv").rename(tmp_path / "b.csv")
    given = {
        "data__root": str(moved),
        "data__train_csv": str(tmp_path / "a.csv"),
        "data__val_csv": str(tmp_path / "b.csv"),
    }
    config = debug(epochs=1, out=str(tmp_path / "out"), **given)
    manifest = spark.prepare(config)
    assert not manifest["synthetic"]
    assert sum(manifest["samples"].values()) == 40
    pull(config)
    assert (tmp_path / "out" / "unet3plus_final" / "unet3plus_model.pt").is_file()
    with pytest.raises(DataError, match=r"moved/train\.csv: no such file"):
        spark.prepare(debug(data__root=str(moved)))


@pytest.mark.row("K18")
def test_no_path_of_anybodys_machine_stands_in_the_code():
    for path in [ROOT / "workloads" / "spark.py", *(ROOT / "workloads" / "_spark").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [start for start in ('"/', "'/", "/home/", "/scratch/", "/project") if start in text], path.name


def test_a_process_lists_its_data_once(tree, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    calls = []
    real = reader.find
    monkeypatch.setattr(reader, "find", lambda *a: calls.append(a[0]) or real(*a))
    data = debug(data__root=str(root)).data
    first, again = dataset.load_once(data), dataset.load_once(data)
    assert calls == ["train", "val"]
    assert first[0] is again[0] and first[1] == again[1]
    rows = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(rows[:-4]) + "\n")
    assert len(dataset.load_once(data)[0]) == len(first[0]) - 4
    first[0].path.unlink()
    (root / "train.csv").write_text("\n".join(rows[:-3]) + "\n")
    assert len(dataset.load_once(data)[0]) == len(first[0]) - 3


def test_a_cache_that_was_emptied_is_filled_again(tree, tmp_path):
    data = debug(data__root=str(tree), data__cache=str(tmp_path / "cache")).data
    count = len(dataset.load_once(data)[0])
    shutil.rmtree(tmp_path / "cache")
    assert len(dataset.load_once(data)[0]) == count


def _rank(number: int, store: str, folder: str, cache_folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    config = _of_two(Path(folder), cache_folder, batch_size=2)
    told = pull(config, Path(folder) / "checkpoints")
    Path(folder, f"{number}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def _of_two(folder: Path, cache_folder: str, batch_size: int):
    return debug(
        epochs=3,
        freeze_epochs=1,
        validate_every=2,
        data__cache=cache_folder,
        network__deep_supervision=True,
        network__norm="group",
        network__encoder="convnext_atto",
        augmentation__horizontal_flip=0.0,
        augmentation__vertical_flip=0.0,
        augmentation__rotate90=0.0,
        augmentation__brightness=0.0,
        augmentation__contrast=0.0,
        batch_size=batch_size,
        optimizer="sgd",
        out=str(folder / "out"),
    )


@pytest.mark.row("K14")
@pytest.mark.row("K35")
def test_two_ranks_train_as_one_across_the_frozen_epochs(tmp_path):
    cache_folder = str(tmp_path / "cache")
    config = _of_two(tmp_path / "alone", cache_folder, batch_size=4)
    alone = pull(config, tmp_path / "alone")
    processes.ranks(_rank, str(tmp_path / "store"), str(tmp_path), cache_folder)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first == second
    assert [number for number, _ in first] == [number for number, _ in alone] == [2, 3]
    for (_, ours), (_, other) in zip(first, alone, strict=True):
        assert ours == pytest.approx(other, abs=1e-4)
    told = json.loads((tmp_path / "out" / "history.json").read_text())["epochs"]
    assert [row["epoch"] for row in told] == [1, 2, 3]
    report = (tmp_path / "out" / "training_report.txt").read_text()
    assert [line.split() for line in report.splitlines() if line.startswith(("world_size", "effective"))] == [
        ["world_size", "2"],
        ["effective_batch", "4"],
    ]


# The original's tree


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Return the folder of the original's files after a run of five epochs, validated every second."""
    out = tmp_path_factory.mktemp("left")
    config = debug(epochs=5, validate_every=2, save_every=3, out=str(out), network__name="unet3plus_simplified")
    return out, config, dict(pull(config))


@pytest.mark.row("K35")
@pytest.mark.row("K37")
def test_a_run_leaves_the_originals_tree_where_it_is_asked_to(left):
    out, _, _ = left
    names = {path.name for path in out.iterdir()}
    folders = {"unet3plus_best", "unet3plus_final", "unet3plus_epoch_3"}
    files = {"training_plots.png", "training_report.txt", "training_curves.npz", "history.json"}
    assert names == folders | files
    config = json.loads((out / "unet3plus_best" / "config.json").read_text())
    assert config == {
        "model_type": "unet3plus",
        "backbone_name": "resnet10t",
        "n_channels": 3,
        "n_classes": 3,
        "cat_channels": 4,
        "deep_supervision": False,
        "freeze_backbone": False,
    }


@pytest.mark.row("K36")
@pytest.mark.row("K37")
def test_values_of_validations_stand_at_their_own_epochs(left):
    out, _, told = left
    assert list(told) == [2, 4, 5]
    with np.load(out / "training_curves.npz") as curves:
        assert curves["train_loss_epochs"].tolist() == [1, 2, 3, 4, 5]
        assert curves["val_loss_epochs"].tolist() == [2, 4, 5]
        assert curves["val_loss"].tolist() == [told[number]["val_loss"] for number in (2, 4, 5)]


@pytest.mark.row("K35")
def test_the_best_folder_is_all_that_is_needed_to_use_the_network(left):
    out, config, told = left
    weights, architecture = training_files.load_model(out / "unet3plus_best")
    network = Network(
        name="unet3plus_simplified", encoder=architecture.backbone_name, cat_channels=architecture.cat_channels
    )
    model = networks.build(network, architecture.n_channels, architecture.n_classes)
    checkpoints.fill(model, weights, source="unet3plus_best")
    best = min(told, key=lambda number: told[number]["val_loss"])
    samples, made = dataset.load_once(config.data)
    score = spark._validator(config, samples, made, _normaliser(config, samples, made))(model.eval())
    assert score["val_loss"] == pytest.approx(told[best]["val_loss"], rel=1e-5)


def _normaliser(config, samples, made):
    from segmentation import normalisation

    return normalisation.build(config.normalise, samples, made.train)


def test_a_resumed_run_leaves_whole_curves(tmp_path, left):
    _, config, told = left
    config = configuration.replace(config, {"out": str(tmp_path / "out")})
    run = spark.train(config)
    next(run).save(tmp_path / "checkpoint")
    run.close()
    assert dict(pull(config, resume=tmp_path / "checkpoint")) == {number: told[number] for number in (4, 5)}
    rows = json.loads((tmp_path / "out" / "history.json").read_text())["epochs"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]


def test_the_originals_files_are_refused_for_another_network():
    with pytest.raises(ConfigError, match=r"out: its files are those of unet3plus and unet3plus_simplified; got unet"):
        debug(out="somewhere", network__name="unet")


def test_nothing_is_written_unless_out_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pull(debug(epochs=1))
    assert not list(tmp_path.iterdir())


# Evaluation


@pytest.mark.row("K24")
def test_evaluation_scores_are_those_of_metrics_json(evaluated):
    found, out = evaluated
    told = json.loads((out / "metrics.json").read_text())
    overall = told["overall"]
    for name in ("accuracy", "mean_iou", "mean_iou_no_bg", "mean_dice", "mean_dice_no_bg"):
        assert found.metrics[name] == pytest.approx(overall[name])
    for label in classes.CLASSES:
        assert found.metrics[f"recall_{label}"] == pytest.approx(overall["per_class"][label]["recall"])
    assert found.metrics["mean_iou_no_bg"] > 0.1
    assert found.details["images"] == told["images"] == 10


@pytest.mark.row("K25")
@pytest.mark.row("K26")
def test_evaluation_leaves_the_originals_files(evaluated):
    found, out = evaluated
    assert {"confusion_matrix.png", "evaluation_report.txt", "metrics.json"} <= set(found.figures)
    assert found.figures[0].endswith(".png")
    text = (out / "evaluation_report.txt").read_text()
    assert all(section in text for section in ("OVERALL", "PER CLASS", "PER SATELLITE", "CONFUSION MATRIX"))


@pytest.mark.row("K27")
def test_evaluation_draws_as_many_examples_as_asked_for(evaluated, trained, tmp_path):
    _, out = evaluated
    assert sorted(path.name for path in (out / "examples").iterdir()) == ["example_0.png", "example_1.png"]
    spark.evaluate(trained, "test", tmp_path, {"examples": 0})
    assert not list((tmp_path / "examples").iterdir())
    spark.evaluate(trained, "test", tmp_path, {"examples": 99})
    assert len(list((tmp_path / "examples").iterdir())) == 10


@pytest.mark.row("K28")
def test_every_satellite_has_its_scores_with_an_interval(evaluated):
    found, out = evaluated
    table = found.details["per_satellite"]
    assert table.keys() == json.loads((out / "metrics.json").read_text())["per_satellite"].keys()
    assert "XMM Newton" in table
    assert sum(row["images"] for row in table.values()) == 10
    for row in table.values():
        low, high = row["mean_iou_interval"]
        assert low <= row["mean_iou"] <= high


def test_the_interval_of_a_satellite_is_that_of_its_own_images():
    right, wrong = np.diag([10, 5, 5]), np.array([[10, 0, 0], [5, 0, 0], [5, 0, 0]])
    tables = np.stack([right, right, right, wrong])
    told = evaluation_files.satellite_table(tables, ["Soho", "Soho", "Soho", "Smart1"])
    assert told["Soho"]["mean_iou_interval"] == [1.0, 1.0]
    assert told["Smart1"]["mean_iou_interval"] == pytest.approx([10 / 20 / 3] * 2)
    mixed = evaluation_files.satellite_table(np.stack([right, wrong]), ["Soho", "Soho"])["Soho"]
    assert mixed["mean_iou_interval"] == pytest.approx([10 / 20 / 3, 1.0])


@pytest.mark.row("K23")
def test_every_setting_of_evaluation_reaches_it(trained, tree, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved)
    (moved / "images").rename(tmp_path / "pictures")
    (moved / "mask").rename(tmp_path / "masks")
    rows = list(csv.reader((moved / "val.csv").read_text().splitlines()))
    with (tmp_path / "few.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:5])
    seen = []
    real = inference.logits

    def look(model, image, **options):
        seen.append((tuple(image.shape), options["precision"], isinstance(model, FlipAverage)))
        return real(model, image, **options)

    monkeypatch.setattr(inference, "logits", look)
    values = {
        "data.root": moved, "data.val_csv": tmp_path / "few.csv", "data.image_root": tmp_path / "pictures",
        "data.mask_root": tmp_path / "masks", "data.target_size": 96, "evaluation_batch": 3, "examples": 1,
        "precision": "bf16", "flips": "true",
    }  # fmt: skip
    words = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    assert command.main(["evaluate", "spark", str(trained), "--out", str(out), *words]) == 0
    assert seen == [((3, 3, 96, 96), "bf16", True), ((1, 3, 96, 96), "bf16", True)]
    assert [path.name for path in (out / "examples").iterdir()] == ["example_0.png"]
    assert json.loads((out / "evaluation.json").read_text())["details"]["images"] == 4
    assert "mean_iou_no_bg" in capsys.readouterr().out


@pytest.mark.row("K23")
@pytest.mark.row("K43")
def test_half_precision_computes_in_half_and_answers_in_single(trained):
    config, model, normaliser = spark.load(trained)
    samples, made = dataset.load_once(config.data)
    image = normaliser(torch.from_numpy(samples.image(made.train[0]).copy())[None])
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    found = [inference.logits(model, image, precision=name) for name in ("fp32", "bf16")]
    assert seen == [torch.float32, torch.bfloat16]
    assert [each.dtype for each in found] == [torch.float32] * 2
    assert found[0].shape == (1, 3, 64, 64)
    assert set(found[0].argmax(1).unique().tolist()) <= {0, 1, 2}
    assert not torch.equal(*found)


def _compiler(monkeypatch, fail):
    """Replace the compiler by one that counts its calls, or that fails at the first of them."""
    calls = []

    def compiler(call):
        def compiled(*inputs):
            calls.append(tuple(inputs[0].shape))
            if fail:
                raise TorchDynamoException("no compiler was found")
            return call(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return calls


@pytest.mark.row("K23")
@pytest.mark.row("K41")
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("flips", [False, True])
def test_compiled_evaluation_and_prediction_are_the_same_with_or_without_a_compiler(
    trained, tree, evaluated, tmp_path, monkeypatch, caplog, fail, flips
):
    plain = spark.evaluate(trained, "test", tmp_path / "plain", {"flips": flips, "examples": 0})
    calls = _compiler(monkeypatch, fail)
    changes = {"compile": True, "flips": flips, "examples": 0}
    found = spark.evaluate(trained, "test", tmp_path / "compiled", changes)
    assert found.metrics == plain.metrics
    assert calls == [(10, 3, 64, 64)] * (1 if fail or not flips else 4)
    assert ("compile: the network cannot be compiled here and runs as it is (no compiler" in caplog.text) == fail
    calls.clear()
    source = next((tree / generator.TEST_FOLDER).iterdir())
    spark.predict(trained, source, tmp_path / "predicted", changes)
    assert calls == [(1, 3, 64, 64)] * (1 if fail or not flips else 4)


@pytest.mark.row("K41")
def test_weights_of_a_compiled_run_are_those_of_another(tmp_path, monkeypatch):
    pull(debug(epochs=1), tmp_path / "plain")
    calls = _compiler(monkeypatch, fail=False)
    config = debug(epochs=1, compile=True, out=str(tmp_path / "out"))
    pull(config, tmp_path / "compiled")
    assert calls
    plain, ours = (
        checkpoints.safetensors_weights(tmp_path / which / "epoch-1" / checkpoints.WEIGHTS_FILE)
        for which in ("plain", "compiled")
    )
    kept, _ = training_files.load_model(tmp_path / "out" / "unet3plus_final")
    assert plain.keys() == ours.keys() == kept.keys()
    assert all(torch.equal(plain[name], ours[name]) and torch.equal(ours[name], kept[name]) for name in plain)


@pytest.mark.row("K40")
@pytest.mark.parametrize("where", ["unet3plus_best/unet3plus_model.pt", "unet3plus_best", ""])
def test_a_model_of_the_originals_form_is_evaluated_and_predicted_with(left, tree, tmp_path, where, capsys, caplog):
    model = str(left[0] / where)
    words = ["--set", "data.target_size=64", "--set", "data.synthetic.samples=40", "--set", "data.synthetic.size=64"]
    assert command.main(["evaluate", "spark", model, "--out", str(tmp_path / "scores"), *words]) == 0
    assert "tells its network alone" in caplog.text
    found = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    trained = max(left[2], key=lambda number: -left[2][number]["val_loss"])
    assert found["metrics"]["parameters"] == left[2][trained]["parameters"]
    assert found["details"]["images"] == 10, "val.csv, which was not trained on"
    source = str(tree / generator.TEST_FOLDER)
    assert command.main(["predict", "spark", model, source, "--out", str(tmp_path / "layers"), *words]) == 0
    assert (tmp_path / "layers" / "submission.zip").is_file()
    capsys.readouterr()
    assert command.main(["evaluate", "spark", model, "--set", "network.cat_channels=8"]) == 2
    assert "network.cat_channels: cannot be another than in" in capsys.readouterr().err


@pytest.mark.row("K40")
def test_a_file_that_is_no_model_is_named(tmp_path, capsys):
    (tmp_path / "any.pt").write_bytes(b"no model")
    assert command.main(["evaluate", "spark", str(tmp_path / "any.pt")]) == 2
    assert f"{tmp_path}/any.pt: " in capsys.readouterr().err
    assert command.main(["evaluate", "pairs", str(tmp_path / "any.pt")]) == 2
    assert "any.pt: a file; expected a checkpoint folder" in capsys.readouterr().err


def test_a_change_that_does_not_exist_is_named(trained, capsys):
    assert command.main(["evaluate", "spark", str(trained), "--set", "evaluation_bacth=3"]) == 2
    assert "did you mean 'evaluation_batch'" in capsys.readouterr().err


def test_flips_make_the_prediction_of_a_mirrored_image_the_mirrored_prediction(trained):
    _, model, _ = spark.load(trained)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    turned = FlipAverage(model, multilabel=False)
    there, back = (inference.logits(turned, each, precision="fp32") for each in (image, image.flip(-1)))
    torch.testing.assert_close(back.flip(-1), there, atol=1e-4, rtol=1e-3)


# Prediction


@pytest.mark.row("K29")
@pytest.mark.row("K30")
@pytest.mark.row("K31")
def test_prediction_of_a_folder_is_a_submission(trained, tree, tmp_path):
    source = tree / generator.TEST_FOLDER
    written = spark.predict(trained, source, tmp_path)
    names = sorted(path.name for path in written)
    assert names == sorted(f"test_{n:05d}_{end}" for n in range(3) for end in ("layer.npz", "pred.png"))
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == [f"test_{number:05d}_layer.npz" for number in range(3)]
    layer = submission.load(tmp_path / "test_00000_layer.npz")
    assert (layer.shape, layer.dtype) == ((64, 64, 3), np.bool_)
    assert layer.any()
    with Image.open(tmp_path / "test_00000_pred.png") as picture:
        assert np.array_equal(np.asarray(picture), layer * np.uint8(255))


@pytest.mark.row("K29")
@pytest.mark.row("K30")
def test_every_setting_of_prediction_reaches_it(trained, tree, tmp_path, monkeypatch, capsys):
    source = tmp_path / "test"
    source.mkdir()
    pictures = sorted((tree / generator.TEST_FOLDER).iterdir())
    for name, path, size in zip(("a_1_img.JPG", "b_img.jpeg", "c_img.Png"), pictures, (64, 80, 50), strict=True):
        with Image.open(path) as picture:
            picture.resize((size, size + 6)).save(source / name, format="PNG" if "Png" in name else "JPEG")
    seen = []
    real = inference.logits

    def look(model, image, **options):
        seen.append((tuple(image.shape), options["precision"]))
        return real(model, image, **options)

    monkeypatch.setattr(inference, "logits", look)
    values = {
        "data.target_size": 96, "evaluation_batch": 2, "loader_workers": 2, "precision": "bf16", "pictures": "false",
        "submission": "uint8", "upsample": "nearest",
    }  # fmt: skip
    words = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    assert command.main(["predict", "spark", str(trained), str(source), "--out", str(out), *words]) == 0
    assert seen == [((2, 3, 96, 96), "bf16"), ((1, 3, 96, 96), "bf16")]
    names = ["a_1_layer.npz", "b_layer.npz", "c_layer.npz"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "submission.zip"]
    assert [submission.load(out / name).shape for name in names] == [(70, 64, 3), (86, 80, 3), (56, 50, 3)]
    assert {submission.load(out / name).dtype.name for name in names} == {"uint8"}
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]


def test_batches_do_not_change_a_prediction(trained, tree, tmp_path):
    source = tree / generator.TEST_FOLDER
    one, all_ = tmp_path / "one", tmp_path / "all"
    spark.predict(trained, source, one, {"evaluation_batch": 1})
    spark.predict(trained, source, all_, {"evaluation_batch": 8, "loader_workers": 2})
    for path in one.glob("*.npz"):
        different = submission.load(path) != submission.load(all_ / path.name)
        assert different.mean() < 1e-3


@pytest.mark.row("K30")
def test_a_folder_that_holds_others_predictions_becomes_no_submission(trained, tree, tmp_path):
    submission.save(tmp_path, "old_00000_img.jpg", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"1 problems, no submission\.zip written: 1 files belong to none of the 3"):
        spark.predict(trained, tree / generator.TEST_FOLDER, tmp_path)
    written = spark.predict(trained, tree / generator.TEST_FOLDER, tmp_path, {"submission_zip": False})
    assert len(written) == 6
    assert not (tmp_path / "submission.zip").exists()


@pytest.mark.row("K32")
def test_a_prediction_is_enlarged_before_the_class_is_chosen_unless_told_otherwise(trained, tree, tmp_path):
    source = tmp_path / "one_img.png"
    with Image.open(next((tree / generator.TEST_FOLDER).iterdir())) as picture:
        picture.resize((256, 256)).save(source)
    for how in ("logits", "nearest"):
        spark.predict(trained, source, tmp_path / how, {"upsample": how})
    smooth, stepped = (submission.load(tmp_path / how / "one_layer.npz") for how in ("logits", "nearest"))
    blocks = stepped.reshape(64, 4, 64, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    blocks = smooth.reshape(64, 4, 64, 4, 3)
    assert not (blocks == blocks[:, :1, :, :1]).all()


def test_predictions_of_shares_are_put_together_by_merge(trained, tree, tmp_path):
    source = tree / generator.TEST_FOLDER
    for path in spark.sources(source):
        spark.predict(trained, path, tmp_path)
    assert not (tmp_path / "submission.zip").exists()
    assert spark.merge(tmp_path, source) == [tmp_path / "submission.zip"]


# Bad input


def test_an_unknown_backbone_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"network\.encoder: timm has no model 'resnet43'; did you mean .*resnet"):
        spark.prepare(debug(network__encoder="resnet43"))


@pytest.mark.parametrize("encoder", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_a_transformer_of_one_image_size_is_refused_before_training(encoder):
    message = rf"network\.encoder: '{encoder}' cannot take images of 64x64 \(.*224.*\); choose one for any size"
    with pytest.raises(ValueError, match=message):
        spark.prepare(debug(network__encoder=encoder))


def test_an_image_size_below_the_backbones_stride_is_refused_with_both():
    message = r"data\.target_size: got 32; expected at least 64, twice the stride 32 of network\.encoder 'resnet10t'"
    with pytest.raises(ValueError, match=message):
        spark.prepare(debug(data__target_size=32))
    spark.build_network(debug(data__target_size=32, network__encoder_levels=4))


def test_bad_values_are_told_by_name_on_the_command_line(capsys):
    words = ["--set", "preset=debug", "--set", "data.target_size=32"]
    assert command.main(["train", "spark", *words, "--out", "nowhere"]) == 2
    assert "data.target_size: got 32" in capsys.readouterr().err
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation_batch": 0}, "evaluation_batch: got 0; expected 1 or more"),
        ({"examples": -1}, "examples: got -1; expected 0 or more"),
        ({"loss.class_weights": [1.0, 2.0]}, "class_weights: got 2; expected one for each of 3"),
        ({"submission": "float"}, "submission: got 'float'"),
    ],
)
def test_values_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        configuration.replace(spark.Config.debug(), values)


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("network.encoder", "resnet34,resnet43", "timm has no model 'resnet43'; did you mean 'resnet34'"),
        ("network.encoder", "resnet34,vit_tiny_patch16_224", "cannot take images of 64x64"),
        ("data.target_size", "64,8", "data.target_size: got 8; expected at least 32, twice the stride 16"),
    ],
)
def test_a_choice_of_a_search_that_cannot_be_trained_is_refused_before_it_starts(
    name, choices, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    words = ["--space", "unet3plus_debug", "--dry-run", "--runs", str(tmp_path / "runs")]
    assert tune.main([*words, "--set", f"parameters.{name}.choices=[{choices}]"]) == 2
    told = capsys.readouterr().err
    bad = choices.partition(",")[2]
    assert re.search(rf"parameters\.{name}: '?{bad}'? cannot be trained: .*{re.escape(message)}", told)
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "spark", "--set", "preset=debug"],
        ["evaluate", "spark", "CHECKPOINT"],
        ["predict", "spark", "CHECKPOINT", "IMAGES"],
    ],
)
def test_an_output_folder_that_cannot_be_written_is_named(words, trained, tree, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"CHECKPOINT": str(trained), "IMAGES": str(tree / generator.TEST_FOLDER)}
    words = [places.get(word, word) for word in words]
    assert command.main([*words, "--out", str(tmp_path / "file" / "inside")]) == 2
    assert capsys.readouterr().err.endswith(": Not a directory; write to another folder by --out\n")


@pytest.mark.row("K10")
def test_all_missing_files_are_listed_and_a_cut_picture_is_named_on_the_command_line(tree, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    pictures = sorted((root / "images").rglob("train/*.jpg"))
    for path in pictures[:9]:
        path.unlink()
    words = ["inspect", "spark", "--set", "preset=debug", "--set", f"data.root={root}", "--out", str(tmp_path / "o")]
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert "train.csv: 9 of 30 rows lack a file: " in told
    assert all(str(path) in told for path in pictures[:9])
    assert told.endswith("or remove the rows\n") and told.count("\n") == 1
    for path in pictures[:9]:
        shutil.copy(pictures[9], path)
    pictures[3].write_bytes(pictures[9].read_bytes()[:-200])
    assert command.main(words) == 2
    assert f"{pictures[3]}: unreadable or truncated" in capsys.readouterr().err


@pytest.mark.row("K10")
def test_preparing_lists_what_is_missing(tree, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    gone = sorted((root / "mask" / "XMM Newton").rglob("*.jpg"))
    for path in gone:
        path.unlink()
    with pytest.raises(DataError, match=r"rows lack a file: .*mask/XMM Newton/(train|val)/.*_layer\.jpg"):
        spark.prepare(debug(data__root=str(root)))


# Search spaces


@pytest.mark.row("K46")
@pytest.mark.parametrize("name", ["unet3plus", "unet3plus_debug"])
def test_search_space_asks_the_whole_question(name):
    spec = spec_file.load(name)
    asked = {parameter.name: parameter for parameter in spec.parameters}
    assert asked.keys() >= {
        "network.encoder", "network.cat_channels", "lr", "weight_decay", "warmup_steps", "network.deep_supervision",
        "loss.aux_weight", "loss.ce", "loss.dice", "freeze_epochs", "data.target_size", "batch_size",
    }  # fmt: skip
    assert asked["loss.aux_weight"].when == {"network.deep_supervision": (True,)}
    assert [(each.metric, each.mode) for each in spec.objectives] == [("val_mean_iou_no_bg", "max"), ("gmacs", "min")]
    encoders = asked["network.encoder"].choices
    assert encoders == (BACKBONES if name == "unet3plus" else ("resnet34", "efficientnet_b0"))
    config = configuration.build(spark.Config, spec.fixed)
    assert config.network.name == "unet3plus"
    assert losses.build(config.loss, multilabel=False)


def _folder(tree, root):
    """Write generated spacecraft as ordinary images and masks of class numbers, one size, PNG."""
    rows = list(csv.reader((tree / "train.csv").read_text().splitlines()))[1:13]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, (satellite, image, mask) in enumerate(rows):
        shutil.copy(tree / "images" / satellite / "train" / image, root / "images" / f"{number:02}.jpg")
        found = reader.read_mask(tree / "mask" / satellite / "train" / mask)
        Image.fromarray(found).save(root / "masks" / f"{number:02}.png")
    return root


def _pairs_of(root, **values):
    spec = spec_file.load("spacecraft_pairs", [f"data.root={root}"])
    names = {parameter.name for parameter in spec.parameters}
    assert names >= {"network.encoder", "network.cat_channels", "lr", "network.deep_supervision", "loss.aux_weight"}
    chosen = {"network.encoder": "resnet34", "network.cat_channels": 8, "network.deep_supervision": True}
    return configuration.build(pairs.Config, {**spec.fixed, **chosen, "epochs": 2, "lr": 3e-3, "threads": 1, **values})


@pytest.mark.slow
def test_spacecraft_in_ordinary_folders_train_through_pairs(tree, tmp_path):
    config = _pairs_of(_folder(tree, tmp_path / "mine"))
    assert config.network.name == "unet3plus"
    assert sum(pairs.prepare(config)["samples"].values()) == 12
    told = []
    for epoch in pairs.train(config):
        told.append(epoch.metrics)
        epoch.save(tmp_path / "checkpoint")
    assert told[1]["train_loss"] < told[0]["train_loss"]
    found = pairs.evaluate(tmp_path / "checkpoint", "test", tmp_path / "out")
    assert found.metrics["mean_iou_no_bg"] is not None


@pytest.mark.slow
@pytest.mark.shared_data
def test_shared_spacecraft_train_through_pairs(shared_data, tmp_path):
    config = _pairs_of(shared_data / "spark", epochs=1, **{"data.tile": 128, "data.cache": str(tmp_path)})
    manifest = pairs.prepare(config)
    assert not manifest["synthetic"]
    assert sum(manifest["samples"].values()) == 6 * 16
    [epoch] = pairs.train(config)
    assert 0 <= epoch.metrics["val_mean_iou_no_bg"] <= 1


@pytest.mark.row("K44")
def test_a_missing_timm_is_one_clear_line(monkeypatch, capsys):
    spark._price.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert command.main(["train", "spark", "--set", "preset=debug", "--out", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert "network.encoder: 'resnet10t' is one of timm, which is not installed; pip install timm" in told
    assert told.count("\n") == 1
