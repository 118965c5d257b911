"""Steel strips: who has which, what is learnt on validation and frozen, and predictions at the strips' own size."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import configuration
from configuration import ConfigError
from segmentation import augmentation, splits
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.images import image_size
from tests.conftest import ROOT
from workloads import severstal
from workloads._severstal import dataset, generator, learnt, scoring
from workloads._severstal.dataset import Data
from workloads._severstal.generator import Synthetic

SMALL = Synthetic(samples=40, width=256, height=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(cache: Path) -> severstal.Config:
    debug = severstal.Config.debug()
    return replace(debug, data=replace(debug.data, cache=str(cache)))


@pytest.fixture(scope="module")
def trained(config: severstal.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for an epoch; return its checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    run = severstal.train(config)
    next(run).save(folder)
    run.close()
    return folder


@pytest.mark.row("S17")
def test_clean_and_defective_strips_are_dealt_in_proportion(config: severstal.Config) -> None:
    samples, made = dataset.load(config.data)
    assert sorted(index for name in splits.NAMES for index in made[name]) == list(range(40)), "none is dropped"
    for name in splits.NAMES:
        here = [dataset.is_defective(samples, index) for index in made[name]]
        assert abs(sum(here) - len(here) / 2) < 1


@pytest.mark.row("S48")
def test_strips_that_show_the_same_stay_in_one_split_and_are_counted(cache: Path) -> None:
    data = Data(synthetic=Synthetic(samples=30, width=512, height=96, duplicates=8), cache=str(cache))
    samples, made = dataset.load(data)
    owner = {index: name for name in splits.NAMES for index in made[name]}
    twice = [group for group, count in Counter(samples.groups).items() if count > 1]
    assert len(twice) == 8
    assert all(len({owner[i] for i, group in enumerate(samples.groups) if group == same}) == 1 for same in twice)
    manifest = dataset.manifest(data)
    assert manifest["duplicates"] == 8
    assert any("8 strips show what others show" in warning for warning in manifest["warnings"])


def test_a_number_of_strips_is_held_out_half_of_them_defective(config: severstal.Config) -> None:
    samples, made = dataset.load(replace(config.data, test_images=12))
    assert len(made.test) == 12
    assert sum(dataset.is_defective(samples, index) for index in made.test) == 6
    with pytest.raises(DataError, match=r"data.test_images=60: 20 clean strips, and 30 are to be held out"):
        dataset.load(replace(config.data, test_images=60))


def test_the_folders_of_a_split_are_the_splits_unless_they_share_a_strip(tmp_path: Path, cache: Path) -> None:
    generator.write(replace(SMALL, samples=8), tmp_path / "all")
    pictures = sorted((tmp_path / "all/supervisely/img").iterdir())
    for number, picture in enumerate(pictures):
        home = tmp_path / "data" / ("train_split", "train_split", "val_split", "test_split")[number % 4]
        for kind, path in (("img", picture), ("ann", picture.parent.parent / "ann" / f"{picture.name}.json")):
            (home / kind).mkdir(parents=True, exist_ok=True)
            (home / kind / path.name).write_bytes(path.read_bytes())
    data = Data(root=str(tmp_path / "data"), image_size=(128, 32), cache=str(cache))
    made = dataset.load(data)[1]
    assert [len(made[name]) for name in splits.NAMES] == [4, 2, 2]

    shown_twice = tmp_path / "data/test_split/img" / pictures[3].name
    shown_twice.write_bytes((tmp_path / "data/train_split/img" / pictures[0].name).read_bytes())
    with pytest.raises(DataError, match=r"1 of the same strip in train and test: .*; set data.folders=false to deal"):
        dataset.load(data)
    assert len(dataset.load(replace(data, folders=False))[0]) == 8


@pytest.mark.row("S20")
def test_masks_of_the_own_size_are_those_on_disk(config: severstal.Config) -> None:
    samples, made = dataset.load(config.data)
    index = next(index for index in made.train if dataset.is_defective(samples, index))
    number = int(Path(samples.names[index]).stem.rpartition("_")[2])
    np.testing.assert_array_equal(
        dataset.native_mask(samples, index)[0],
        generator.strip(config.data.synthetic, number).mask.any(0),
    )
    with pytest.raises(splits.TestSplitError):
        dataset.native_mask(samples, made.test[0])


@pytest.mark.row("S23")
def test_four_classes_have_a_channel_each(config: severstal.Config) -> None:
    data = replace(config.data, task="multiclass4")
    samples, made = dataset.load(data)
    shown = np.stack([dataset.native_mask(samples, index).any(axis=(1, 2)) for index in made.train])
    assert shown.shape[1] == 4 and shown.any(axis=0).all()
    assert samples.mask(made.train[0]).shape == (4, 32, 128)


@pytest.mark.row("S24")
def test_what_is_on_top_stays_on_top() -> None:
    image = torch.zeros(64, 3, 64, 256)
    image[:, :, :16] = 1
    moved, _ = augmentation.build(severstal.SteelAugmentation(noise=0))(
        image, torch.zeros(64, 1, 64, 256, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    assert (moved[:, :, :24].mean((1, 2, 3)) > moved[:, :, -24:].mean((1, 2, 3))).all()


@pytest.mark.row("S25")
@pytest.mark.row("S26")
@pytest.mark.parametrize(("name", "value"), [("vertical_flip", 0.5), ("rotate90", 0.5), ("rotate_degrees", 12.0)])
def test_what_steel_does_not_do_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got {value}; strips have a top and a bottom"):
        configuration.build(severstal.Config, {f"augmentation.{name}": value})
    assert severstal.SteelAugmentation().elastic == 0


@pytest.mark.row("S27")
@pytest.mark.parametrize("name", ["contrast", "brightness_factor", "gamma", "blur", "noise"])
def test_changes_of_colour_leave_the_mask_as_it_is(name: str) -> None:
    default = severstal.SteelAugmentation()
    assert getattr(default, name) > 0
    alone = replace(augmentation.NONE, **{name: getattr(default, name)})
    mask = torch.randint(0, 2, (4, 1, 32, 64))
    _, same = augmentation.build(alone)(torch.rand(4, 3, 32, 64), mask, torch.Generator().manual_seed(0))
    assert torch.equal(mask, same)


@pytest.mark.row("S12")
def test_thresholds_are_learnt_on_validation_and_no_test_label_moves_them(
    config: severstal.Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = learnt.read(trained).thresholds
    found = severstal.evaluate(trained, "test", tmp_path / "a")
    assert found.details["thresholds"]["run"] == frozen.run
    assert found.metrics["opt_threshold_dice"] == frozen.dice[0]
    native = dataset.native_mask
    monkeypatch.setattr(scoring.dataset, "native_mask", lambda *arguments: 1 - native(*arguments))
    other = severstal.evaluate(trained, "test", tmp_path / "b")
    assert other.metrics["dice_opt"] != found.metrics["dice_opt"]
    assert other.details["thresholds"] == found.details["thresholds"]


@pytest.mark.row("S11")
@pytest.mark.row("S47")
def test_an_evaluation_tells_the_fixed_threshold_and_calling_nothing_beside_the_frozen_one(
    trained: Path, tmp_path: Path
) -> None:
    found = severstal.evaluate(trained, "validation", tmp_path)
    blocks = found.details["channels"]["defect"]
    assert {"fixed", "f1", "dice", "all_empty", "all_called"} <= blocks.keys()
    assert found.details["empty"] == "one"
    assert found.metrics["dice_all_empty"] == pytest.approx(0.5), "half of the strips are clean"
    assert 0 < found.metrics["dice_all_called"] < 0.5, "the other half scores what it covers"
    assert found.metrics["dice_opt"] >= found.metrics["dice_fixed"]


@pytest.mark.row("S28")
def test_validation_sees_strips_as_they_are(config: severstal.Config) -> None:
    def passes() -> list[torch.Tensor]:
        samples, made = dataset.load_once(config.data)
        normaliser = severstal.normalisation.build(config.normalise, samples, made.train)
        device = torch.device("cpu")
        return [image for image, *_ in severstal._batches(config, samples, made.validation, normaliser, device)]

    assert all(torch.equal(one, other) for one, other in zip(passes(), passes(), strict=True))


@pytest.mark.row("S20")
@pytest.mark.row("S33")
def test_predictions_and_panels_have_the_strips_own_size(
    config: severstal.Config, trained: Path, tmp_path: Path
) -> None:
    source = tmp_path / "strips"
    source.mkdir()
    for name, size in (("wide", (300, 50)), ("high", (40, 90))):
        Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(source / f"{name}.png")
    written = severstal.predict(trained, source, tmp_path / "out")
    assert {path.name: image_size(path) for path in written} == {"high_mask.png": (90, 40), "wide_mask.png": (50, 300)}
    found = severstal.evaluate(trained, "test", tmp_path / "scored", {"examples": -1})
    panels = [name for name in found.figures if name.startswith("panels/")]
    masks = [name for name in found.figures if name.startswith("masks/")]
    assert len(panels) == len(masks) == len(dataset.load(config.data)[1].test)
    assert {image_size(tmp_path / "scored" / name) for name in masks} == {(64, 256)}


def test_a_checkpoint_without_thresholds_says_so(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    for path in trained.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / learnt.THRESHOLDS).write_text(json.dumps({"f1": [0.5]}))
    with pytest.raises(CheckpointError, match=r"thresholds.json: what validation taught cannot be read"):
        severstal.evaluate(broken, "test", tmp_path / "out")


@pytest.mark.row("S30")
def test_an_evaluation_tells_the_time_of_an_image_and_how_it_was_taken(trained: Path, tmp_path: Path) -> None:
    speed = severstal.evaluate(trained, "validation", tmp_path).details["speed"]
    assert speed["ms_per_image"] > 0 and speed["warmup"] > 0 and speed["runs"] > 0
    assert (speed["batch"], speed["size"], speed["device"]) == (6, [3, 32, 128], "cpu"), "the split has six strips"


@pytest.mark.row("S1")
@pytest.mark.row("S46")
def test_data_and_networks_are_of_use_without_a_trainer_a_tracker_or_pandas() -> None:
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("wandb", "mlflow"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from segmentation import networks
from workloads._severstal import dataset
samples, made = dataset.load(dataset.Data(image_size=(64, 32)))
model = networks.build(networks.Network(name="smp_unet", encoder="resnet10t"), 3, 1)
assert "segmentation.training" not in sys.modules and len(made.train) > 0
import workloads.severstal
assert "segmentation.training" in sys.modules
print(sum(parameter.numel() for parameter in model.parameters()) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
    ours = [path for folder in ("segmentation", "search", "workloads") for path in (ROOT / folder).rglob("*.py")]
    assert ours and not [path for path in ours if re.search(r"^\s*(import|from) pandas\b", path.read_text(), re.M)]


@pytest.mark.row("S7")
@pytest.mark.parametrize("monitor", ["val_dice_opt", "val_iou_opt"])
def test_training_stops_by_the_score_that_is_monitored(config: severstal.Config, monitor: str, tmp_path: Path) -> None:
    """What is monitored rises for one epoch alone; the other rises on."""
    other = {"val_dice_opt": "val_iou_opt", "val_iou_opt": "val_dice_opt"}[monitor]
    told = iter([{monitor: 0.5, other: 0.1 * epoch} for epoch in range(1, 9)])
    asked = replace(config, epochs=8, patience=2, early_stop_metric=monitor, out=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        epoch_scores = scoring.epoch_scores
        patch.setattr(scoring, "epoch_scores", lambda *given: {**epoch_scores(*given), **next(told)})
        numbers = [epoch.number for epoch in severstal.train(asked)]
    assert numbers == [1, 2, 3]
    kinds = {path.name.split("_")[1]: path.name for path in (tmp_path / "out").glob("best_*.pth")}
    assert kinds == {
        {"val_dice_opt": "dice", "val_iou_opt": "iou"}[name]: f"best_{kind}_{score}_seed42.pth"
        for name, kind, score in (
            (monitor, monitor.split("_")[1], "0.5000"),
            (other, other.split("_")[1], "0.3000"),
        )
    }


@pytest.mark.row("S6")
def test_the_loss_is_bce_and_dice_over_the_batch_as_one() -> None:
    config = severstal.Config.reference()
    logits, mask = torch.randn(3, 1, 8, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1, 8, 16)
    mask[0, 0, 2:5, 3:9] = 1
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * mask).sum() + 1e-6) / (probability.sum() + mask.sum() + 1e-6)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask) + dice
    found = severstal.losses.build(config.loss, multilabel=True)(logits, mask.long())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("focal", "tversky", "lovasz"):
        other = severstal.losses.build(replace(config.loss, **{name: 1.0}), multilabel=True)(logits, mask.long())
        assert other.item() > found.item()


@pytest.mark.row("S29")
def test_the_same_seed_gives_the_same_run(config: severstal.Config) -> None:
    def scores() -> list[dict[str, float]]:
        found = []
        for epoch in severstal.train(replace(config, deterministic=True)):
            found.append(dict(epoch.metrics))
            assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        return found

    assert config.seed == 42
    assert scores() == scores()


@pytest.mark.row("S2", "S40", "S39")
def test_the_reference_values_are_the_originals() -> None:
    config = severstal.Config.reference()
    assert (config.lr, config.batch_size, config.epochs, config.weight_decay) == (1e-3, 8, 100, 1e-4)
    assert (config.optimizer, config.patience, config.early_stop_metric, config.seed) == (
        "adamw", 7, "val_dice_opt", 42,
    )  # fmt: skip
    assert (config.lr_schedule, config.restart_epochs, config.restart_factor) == ("restarts", 10, 2)
    assert (config.data.image_size, config.data.test_images, config.clip_norm) == ((1024, 256), 2000, 1.0)
    assert (config.network.encoder, config.network.pretrained) == ("resnet34", True)
    assert (config.loss.bce, config.loss.dice, config.loss.dice_pooling, config.loss.dice_smooth) == (
        1.0, 1.0, "batch", 1e-6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_alone(config: severstal.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for three epochs, broken off after the second and gone on with; return the folder of its own files."""
    folder = tmp_path_factory.mktemp("alone")
    alone = replace(config, epochs=3, save_every=2, out=str(folder / "out"))
    run = severstal.train(alone)
    for _ in range(2):
        next(run).save(folder / "checkpoint")
    run.close()
    with (folder / "out/metrics_seed42.csv").open("a") as table:
        table.write("3,torn")
    list(severstal.train(alone, resume=folder / "checkpoint"))
    return folder / "out"


@pytest.mark.row("S32")
@pytest.mark.row("S16")
def test_each_epoch_is_a_row_of_the_originals_table(run_alone: Path) -> None:
    with (run_alone / "metrics_seed42.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "epoch,train_loss,val_loss,val_iou_fixed,val_dice_fixed,val_iou_opt,val_dice_opt,opt_threshold_f1,"
        "opt_threshold_dice,iou_50,iou_75,iou_90,auprc,recall_fp_image,learning_rate,epoch_time"
    )
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(float(value) >= 0 for row in rows for value in row.values())


@pytest.mark.row("S8")
@pytest.mark.row("S9")
@pytest.mark.row("S42")
def test_the_best_and_every_so_many_epochs_are_kept_under_the_originals_names(run_alone: Path) -> None:
    names = sorted(path.name for path in run_alone.iterdir())
    assert [bool(re.fullmatch(r"best_(dice|iou)_\d\.\d{4}_seed42\.pth", name)) for name in names[1:3]] == [True, True]
    assert names == ["args.json", *names[1:3], "checkpoint_epoch_2_seed42.pth", "metrics_seed42.csv", "tfm_report.md"]
    with (run_alone / "metrics_seed42.csv").open(newline="") as file:
        best = max(float(row["val_dice_opt"]) for row in csv.DictReader(file))
    assert f"best_dice_{best:.4f}_seed42.pth" in names


@pytest.mark.row("S41")
def test_a_checkpoint_holds_all_that_going_on_needs(run_alone: Path) -> None:
    content = torch.load(run_alone / "checkpoint_epoch_2_seed42.pth", weights_only=True)
    assert {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "rng"} <= set(
        content
    )
    assert content["epoch"] == 2 and content["args"]["seed"] == 42
    assert 0 <= content["opt_threshold_f1"] <= 1 and content["val_dice"] == content["metrics"]["val_dice_opt"]
    model = severstal.build_network(severstal.Config.debug())
    model.load_state_dict(content["model_state_dict"])


@pytest.mark.row("S34")
def test_args_say_every_value_the_versions_the_commit_and_the_data(run_alone: Path, config: severstal.Config) -> None:
    told = json.loads((run_alone / "args.json").read_text())
    assert told["args"].keys() == configuration.to_values(config).keys()
    assert told["versions"]["torch"] == torch.__version__
    assert told["data_sha256"] == dataset.manifest(config.data)["sha256"]
    assert told["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", told["commit"])


def test_a_table_of_something_else_is_not_written_over(config: severstal.Config, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics_seed42.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"metrics_seed42.csv: is not the table of such a run; move it away"):
        next(iter(severstal.train(replace(config, out=str(tmp_path)), resume=trained)))
