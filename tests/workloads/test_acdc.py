"""The workload acdc: what a run reports, scores and leaves behind, and the original's values."""

import json
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import configuration
from segmentation import checkpoints, evaluation, losses, metrics, nifti, splits
from segmentation.augmentation import Augmentation
from segmentation.epoch import DataError
from segmentation.evaluation import ImageScores
from segmentation.networks import Network
from workloads import __main__ as command
from workloads import acdc, pairs
from workloads._acdc import dataset, summary
from workloads._acdc.generator import Synthetic

pytestmark = pytest.mark.usefixtures("own_cache")


HEARTS = Synthetic(patients=12, slices=3, size=48)
NAMES = ("background", "RV", "MYO", "LV")


def small(**changed):
    config = acdc.Config.debug()
    return configuration.replace(config, {"data.size": 48, "data.synthetic.size": 48, "batch_size": 4, **changed})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run as the command leaves it, its hearts learned in seconds."""
    folder = tmp_path_factory.mktemp("run") / "heart"
    values = ["preset=debug", "data.size=48", "data.synthetic.size=48", "batch_size=4", "epochs=14", "rewind_epoch=3"]
    flags = [part for value in [*values, "data.fractions=[0.5,0.25,0.25]"] for part in ("--set", value)]
    assert command.main(["train", "acdc", *flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return acdc.evaluate(run / "best", "test", out), out


@pytest.mark.row("P2", "P5", "P20", "P29")
def test_one_command_leaves_checkpoints_metrics_curves_and_predictions(run):
    told = json.loads((run / "metrics.json").read_text())
    assert [row["epoch"] for row in told["epochs"]] == list(range(1, 15))
    scores = [row["val_mean_dice_no_bg"] for row in told["epochs"]]
    assert told["best_epoch"] == scores.index(max(scores)) + 1
    assert told["best"]["val_mean_dice_no_bg"] == max(scores)
    for name in ("training_curves.png", "predictions.png"):
        with Image.open(run / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    kept = {path.name: checkpoints.read_meta(path)["epoch"] for path in run.iterdir() if path.is_dir()}
    assert kept == {"best": told["best_epoch"], "last": 14, "epoch_3": 3}


@pytest.mark.row("P54")
def test_a_run_and_an_evaluation_are_summed_up(run, evaluated):
    for folder, stage in ((run, "train"), (evaluated[1], "eval")):
        told = json.loads((folder / "run_summary.json").read_text())
        assert (told["schema_version"], told["stage"]) == (1, stage)
        assert datetime.fromisoformat(told["created_utc"]).utcoffset().total_seconds() == 0
        _, model, _ = acdc.load(run / "best")
        count = sum(parameter.numel() for parameter in model.parameters())
        assert told["params"] == {"original": count, "pruned": None, "reduction_percent": 0.0}


@pytest.mark.row("P54")
def test_a_summary_of_pruning_tells_the_share_that_is_gone(tmp_path):
    path = summary.write_summary(tmp_path, "prune", original=31_036_676, pruned=15_766_586, more={"mode": "rewind"})
    told = json.loads(path.read_text())
    assert told["params"] == {"original": 31_036_676, "pruned": 15_766_586, "reduction_percent": 49.2001}
    assert (told["stage"], told["mode"]) == ("prune", "rewind")


@pytest.mark.row("P2", "P3")
def test_generated_hearts_are_learned(run, evaluated):
    found, _ = evaluated
    assert found.metrics["mean_dice_no_bg"] > 0.6
    assert found.metrics["mean_dice"] > found.metrics["mean_dice_no_bg"], "background is easy"


@pytest.mark.row("P3", "P55")
def test_an_epoch_tells_loss_deviation_dice_and_iou_of_each_class_and_both_means(run):
    for line in (run / "metrics.jsonl").read_text().splitlines():
        told = json.loads(line)["metrics"]
        for family in ("dice", "iou"):
            each = [told[f"val_{family}_{name}"] for name in NAMES]
            assert told[f"val_mean_{family}"] == pytest.approx(np.mean(each))
            assert told[f"val_mean_{family}_no_bg"] == pytest.approx(np.mean(each[1:]))
        assert {"train_loss", "val_loss", "lr"} < told.keys()
        assert told["train_loss_std"] > 0 and told["val_loss_std"] > 0
        assert "peak_memory_mib" in told or not torch.cuda.is_available()


def test_what_the_network_costs_is_reported(run):
    told = json.loads((run / "metrics.json").read_text())["best"]
    assert told["params"] == sum(parameter.numel() for parameter in acdc.load(run / "best")[1].parameters())
    config = replace(acdc.Config(), network=Network(name="unet", widths=(64, 128, 256, 512), bottleneck=1024))
    assert acdc.facts(config)["macs"] == pytest.approx(48_104_472_576) and acdc.facts(config)["params"] == 31_036_676


@pytest.mark.row("P6")
def test_five_scores_of_a_picture_of_four_by_four_by_hand(tmp_path):
    mask = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]])
    called = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 3, 3], [2, 0, 2, 3]]])
    counts = metrics.counts_from_confusion(metrics.confusion(called, mask, 4))
    scored = evaluation.evaluation(
        ImageScores(np.zeros(1, np.int64), counts, np.full(1, np.nan)),
        ["p"],
        NAMES,
        multilabel=False,
        details={"split": "test"},
    )
    told = json.loads(summary.write_metrics(tmp_path, scored, NAMES).read_text())
    assert told["pixel_accuracy"] == 13 / 16
    assert told["per_class"] == {
        "background": {"dice": 3 / 4, "iou": 3 / 5, "precision": 3 / 4, "recall": 3 / 4},
        "RV": {"dice": 8 / 9, "iou": 4 / 5, "precision": 4 / 5, "recall": 1.0},
        "MYO": {"dice": 3 / 4, "iou": 3 / 5, "precision": 3 / 4, "recall": 3 / 4},
        "LV": {"dice": 6 / 7, "iou": 3 / 4, "precision": 1.0, "recall": 3 / 4},
    }
    assert told["with_background"]["mean_dice"] == pytest.approx((3 / 4 + 8 / 9 + 3 / 4 + 6 / 7) / 4)
    assert told["without_background"]["mean_dice"] == pytest.approx((8 / 9 + 3 / 4 + 6 / 7) / 3)


@pytest.mark.row("P6")
def test_an_evaluation_scores_patients_pixels_and_outlines(evaluated):
    found, out = evaluated
    assert found.details["group_key"] == "patient"
    assert set(found.groups) <= {f"patient{number:03d}" for number in range(1, 13)}
    assert found.details["volumes"] == 2 * len(found.groups)
    told = json.loads((out / "metrics.json").read_text())
    assert told["per_class"]["LV"].keys() == {"dice", "iou", "precision", "recall", "hd95", "nsd"}
    assert told["per_class"]["background"].keys() == {"dice", "iou", "precision", "recall"}
    for name in ("mean_hd95", "hd95_LV", "nsd_MYO", "mean_nsd"):
        low, high = found.intervals[name]
        assert low <= found.metrics[name] <= high
    assert found.details["conventions"]["hd95_RV"]["unit"] == "mm, of pictures pixels"


def test_outlines_of_a_volume_are_measured_in_space_by_its_own_spacing(run, tmp_path, monkeypatch):
    """Against MONAI's answer on the volumes as the network sees them, put together here."""
    from segmentation import surfaces

    seen = []
    real = surfaces.compare
    monkeypatch.setattr(surfaces, "compare", lambda *given, **more: seen.append((*given, more)) or real(*given, **more))
    acdc.evaluate(run / "best", "validation", tmp_path)
    config, _, _ = acdc.load(run / "best")
    samples, made = dataset.load(config.data)
    first = samples.extra(made.validation[0])["volume"]
    slices = [i for i in made.validation if samples.extra(i)["volume"] == first]
    predicted, mask, classes, more = seen[0]
    assert classes == 4 and predicted.shape == mask.shape == (48, 48, len(slices))
    assert np.array_equal(mask, np.stack([samples.mask(i) for i in slices], -1))
    [source] = [volume for volume in dataset.find(config.data) if volume.name == first]
    head = nifti.head(source.image)
    steps = [step * length / 48 for step, length in zip(head.spacing[:2], head.shape[:2], strict=True)]
    assert more["spacing"] == pytest.approx((*steps, 8.0))


def test_outlines_may_be_left_out(run, tmp_path):
    found = acdc.evaluate(run / "best", "test", tmp_path, {"surfaces": False})
    assert not [name for name in found.metrics if "hd95" in name or "nsd" in name]


def test_outlines_of_pairs_are_measured_in_pixels_where_asked_for(tmp_path):
    config = replace(pairs.Config.debug(), epochs=1)
    for epoch in pairs.train(config):
        epoch.save(tmp_path / "checkpoint")
    plain = pairs.evaluate(tmp_path / "checkpoint", "test", tmp_path / "plain")
    found = pairs.evaluate(tmp_path / "checkpoint", "test", tmp_path / "with", {"surfaces": True})
    assert not [name for name in plain.metrics if "hd95" in name]
    assert 0 <= found.metrics["hd95_interior"] <= 64 * 2**0.5
    assert found.details["conventions"]["nsd_interior"]["tolerance"] == "2 pixels"


@pytest.mark.row("P6")
def test_a_volume_is_predicted_at_its_own_size_and_place(run, tmp_path):
    config, _, _ = acdc.load(run / "best")
    source = dataset.root(config.data) / "patient003"
    written = acdc.predict(run / "best", source, tmp_path)
    assert sorted(path.name for path in written) == sorted(
        f"{nifti.stem(path)}_{end}" for path in source.glob("*frame??.nii.gz") for end in ("mask.nii.gz", "overlay.png")
    )
    mask, head = nifti.read(tmp_path / "patient003_frame01_mask.nii.gz")
    truth, own = nifti.read(source / "patient003_frame01_gt.nii.gz")
    assert head == own
    overlap = 2 * ((mask == 3) & (truth == 3)).sum() / ((mask == 3).sum() + (truth == 3).sum())
    assert overlap > 0.6


@pytest.mark.parametrize("damage", ["nothing", "folder", "text", "truncated", "nan", "film"])
def test_what_cannot_be_predicted_is_named(run, tmp_path, damage):
    """One sentence of the command, which ends with 2."""
    config, _, _ = acdc.load(run / "best")
    source = dataset.root(config.data) / "patient003" / "patient003_frame01.nii.gz"
    path = tmp_path / "in" / "a.nii.gz"
    path.parent.mkdir()
    expected = f"{path}: unreadable or truncated"
    if damage == "nothing":
        expected = f"{path}: "
    elif damage == "folder":
        path, expected = path.parent, f"{path.parent}: holds no image; expected .nii.gz"
    elif damage == "text":
        path.write_text("no volume")
    elif damage == "truncated":
        path.write_bytes(source.read_bytes()[:4000])
    else:
        values = nifti.read(source)[0].astype(np.float32)
        values[3, 3, 0] = np.nan
        values = values if damage == "nan" else np.zeros((8, 8, 2, 3), np.float32)
        expected = f"{path}: " + ("1 values are NaN" if damage == "nan" else "has shape (8, 8, 2, 3)")
        nifti.save(path, values, np.eye(4))
    with pytest.raises(DataError) as caught:
        acdc.predict(run / "best", path, tmp_path / "out")
    assert str(caught.value).startswith(expected)
    assert command.main(["predict", "acdc", str(run / "best"), str(path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.row("X3", "X4")
def test_the_reference_preset_has_the_values_of_the_original():
    config = configuration.build(acdc.Config, {"preset": "reference"})
    model = acdc.build_network(config, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_886_340
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 2 * 11
    expected = {
        **{"seed": 42, "deterministic": True, "batch_size": 32, "lr": 0.009, "epochs": 25, "rewind_epoch": 5},
        **{"loss_function": "ce_dice", "optimizer": "adam", "weight_decay": 0.0, "lr_schedule": "none"},
        **{"network.widths": [64, 128, 256, 512, 512], "network.bottleneck": 1024, "network.norm": "batch"},
        **{"data.size": 256, "data.percentiles": [1.0, 99.0], "data.slices_per_volume": None, "evaluation_batch": 1},
        **{"augmentation.horizontal_flip": 0.5, "augmentation.vertical_flip": 0.1, "augmentation.rotate90": 0.0},
        **{"augmentation.elastic_probability": 0.3, "augmentation.grid_distortion_probability": 0.3},
        **{"augmentation.grid_distortion": 0.2, "augmentation.gamma_probability": 0.4},
        **{"augmentation.bias_field_probability": 0.3, "augmentation.noise_probability": 0.25},
        **{"augmentation.blur_probability": 0.2, "augmentation.motion_probability": 0.15},
    }
    values = configuration.to_values(config)
    assert {name: list(value) if isinstance(value := values[name], tuple) else value for name in expected} == expected
    train, validation, _ = config.data.fractions
    assert validation / (train + validation) == pytest.approx(0.2)
    assert config.loss_used == losses.named("ce_dice")
    changed = configuration.build(acdc.Config, {"preset": "reference", "lr": 0.001, "data.size": 128})
    assert (changed.lr, changed.data.size, changed.epochs) == (0.001, 128, 25)


def test_the_augmentation_of_the_original_runs():
    from segmentation import augmentation
    from segmentation.loading import generator

    image, mask = torch.rand(16, 1, 32, 32), torch.randint(0, 4, (16, 32, 32))
    moved, moved_mask = augmentation.build(acdc.REFERENCE_AUGMENTATION)(image, mask, generator(0))
    assert moved.isfinite().all() and set(moved_mask.unique().tolist()) <= {0, 1, 2, 3}
    assert not torch.equal(moved, image)
    assert isinstance(acdc.REFERENCE_AUGMENTATION, Augmentation)


@pytest.mark.row("P52")
def test_a_loss_by_name_takes_the_place_of_the_one_given():
    config = small(loss_function="dice_focal", **{"loss.ce": 1.0})
    assert config.loss_used == losses.named("dice_focal")
    assert small(**{"loss.ce": 1.0}).loss_used.ce == 1.0
    told = [next(iter(acdc.train(replace(config, epochs=1, loss_function=name)))).metrics for name in ("ce", "focal")]
    assert told[0]["train_loss"] > 3 * told[1]["train_loss"], "a quarter of what is hard"


def test_checkpoints_of_generated_hearts_say_so(run):
    assert checkpoints.read_meta(run / "best")["synthetic"] is True
    warnings = acdc.prepare(small())["warnings"]
    assert warnings[0].startswith("SYNTHETIC DATA: data.root is not given, so 12 generated patients")


@pytest.mark.shared_data
@pytest.mark.row("P2", "P33")
def test_real_hearts_are_trained_on_and_scored(shared_data, tmp_path):
    config = small(**{"data.root": str(shared_data / "acdc"), "data.slices_per_volume": 4, "data.size": 64})
    for epoch in acdc.train(config):
        epoch.save(tmp_path / "checkpoint")
    assert epoch.metrics["train_loss"] < 1
    assert checkpoints.read_meta(tmp_path / "checkpoint")["synthetic"] is False
    found = acdc.evaluate(tmp_path / "checkpoint", "test", tmp_path / "out")
    with splits.test_split_open():
        samples, made = dataset.load(config.data)
    assert set(found.groups) == {samples.groups[index] for index in made.test}
    assert found.metrics["mean_hd95"] > 0
