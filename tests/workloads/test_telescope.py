"""The telescope workload: network, loss, metrics, training, the original's files, evaluation."""

import csv
import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MultilabelAccuracy, MultilabelJaccardIndex

import configuration
from search import spec_file
from segmentation import checkpoints, figures, loading, losses, metrics, normalisation, splits, training
from segmentation import samples as storage
from segmentation.epoch import DataError, Epoch
from segmentation.images import image_size, read_image
from segmentation.samples import Samples
from segmentation.splits import TestSplitError
from workloads import telescope
from workloads._telescope import dataset, outputs, runlog, scores, transfer
from workloads._telescope import figures as telescope_figures
from workloads.telescope import Config

TINY = {"data.synthetic.samples": 40, "base_c": 4, "epochs": 3, "lr": 1e-2, "threads": 1, "deterministic": True}
PARTS = ["enc1", "enc2", "bott", "up1", "dec1", "up2", "dec2", "outc"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@dataclasses.dataclass
class Run:
    config: Config
    rows: list
    out: object
    checkpoint: object


def run_of(folder, cache, **values):
    """Train a tiny run that stands alone, and save its last checkpoint."""
    config = configuration.build(Config, {**TINY, "data.cache": cache, "out": str(folder / "out"), **values})
    rows = []
    for epoch in telescope.train(config):
        rows.append(dict(epoch.metrics))
        if epoch.number == config.epochs:
            epoch.save(folder / "checkpoint")
    return Run(config, rows, folder / "out", folder / "checkpoint")


@pytest.fixture(scope="module")
def with_el(tmp_path_factory, cache):
    values = {"variant": "withEL", "keep_last": 0, "train_iou": True, "overlay_threshold": 0.75}
    return run_of(tmp_path_factory.mktemp("withEL"), cache, **values)


@pytest.fixture(scope="module")
def no_el(tmp_path_factory, cache):
    return run_of(tmp_path_factory.mktemp("noEL"), cache, keep_last=2)


def tiny(cache, **values):
    return configuration.build(Config, {**TINY, "data.cache": cache, **values})


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.row("A8")
def test_network_is_the_originals():
    model = telescope.build_network(Config()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 235_683
    assert [name for name, _ in model.named_children()] == PARTS
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.row("A8")
def test_a_checkpoint_of_the_original_loads_strictly(tmp_path):
    donor = telescope.build_network(Config())
    path = tmp_path / "unet_multilabel_noEL_ep35_best.pt"
    torch.save({"epoch": 35, "model": donor.state_dict(), "optimizer": {}}, path)
    config = configuration.build(Config, {"finetune.checkpoint": str(path)})
    filled = telescope.start_network(config)
    assert all(
        torch.equal(a, b) for a, b in zip(filled.state_dict().values(), donor.state_dict().values(), strict=True)
    )
    lacking = {name: value for name, value in donor.state_dict().items() if name != "outc.bias"}
    torch.save({"model": lacking}, path)
    with pytest.raises(checkpoints.CheckpointError, match=r"outc\.bias is missing"):
        telescope.start_network(config)


@pytest.mark.row("A9")
def test_other_widths_and_odd_sizes_train(cache):
    config = tiny(cache, base_c=16, p_drop=0.0, epochs=1, **{"data.synthetic.size": 33})
    (epoch,) = telescope.train(config)
    assert np.isfinite(epoch.metrics["val_loss"])
    assert telescope.build_network(config)(torch.zeros(2, 1, 33, 33)).shape == (2, 3, 33, 33)


@pytest.mark.row("A10")
def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, image = telescope.build_network(Config()), torch.rand(2, 1, 32, 32)
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout2d)]
    assert dropouts == [0.25, 0.25]
    model.eval()
    assert torch.equal(model(image), model(image))
    model.train()
    assert not torch.equal(model(image), model(image))


def formula(logits, mask, bce, dice):
    """Write the original's loss out: its epsilon stands below the line only."""
    p, t = 1 / (1 + np.exp(-logits)), mask
    cross = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    overlap, total = (p * t).sum((2, 3)), p.sum((2, 3)) + t.sum((2, 3)) + 1e-6
    return bce * cross + dice * (1 - 2 * overlap / total).mean()


@pytest.mark.row("A11")
@pytest.mark.parametrize(("bce", "dice"), [(0.5, 0.5), (0.2, 0.9)])
def test_loss_is_the_formula(bce, dice):
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(0, 2, (4, 3, 32, 32)), rng.integers(0, 2, (4, 3, 32, 32))
    for preset in (Config.reference(), configuration.build(Config, {"loss.dice_empty": "legacy"})):
        config = configuration.replace(preset, {"loss.bce": bce, "loss.dice": dice})
        value = losses.build(config.loss, multilabel=True)(torch.tensor(logits).float(), torch.tensor(mask))
        assert value.item() == pytest.approx(formula(logits, mask, bce, dice), abs=1e-6)


@pytest.mark.row("A12")
def test_dice_of_an_empty_channel_is_one_in_legacy_only():
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.int64)
    for logit in (-30.0, 0.0, 4.0):
        legacy = configuration.build(Config, {"loss.bce": 0.0, "loss.dice": 1.0, "loss.dice_empty": "legacy"}).loss
        assert losses.build(legacy, multilabel=True)(torch.full(mask.shape, logit), mask).item() == 1.0
    smooth = configuration.build(Config, {"loss.bce": 0.0, "loss.dice": 1.0}).loss
    assert smooth.dice_empty == "smooth"
    assert losses.build(smooth, multilabel=True)(torch.full(mask.shape, -30.0), mask).item() < 1e-6
    assert losses.build(smooth, multilabel=True)(torch.full(mask.shape, 30.0), mask).item() > 0.9


@pytest.mark.row("A7")
def test_percentile_clip_is_numpys_and_configurable():
    image = np.random.default_rng(0).integers(0, 182, (1, 1, 32, 32)).astype(np.uint8)
    for low, high in ((0.5, 99.5), (2.0, 90.0)):
        config = configuration.build(Config, {"normalise.low": low, "normalise.high": high}).normalise
        normaliser = normalisation.Normaliser(method=config.method, low=config.low, high=config.high)
        bottom, top = np.percentile(image, [low, high])
        expected = (np.clip(image, bottom, top) - bottom) / (top - bottom)
        np.testing.assert_allclose(normaliser(torch.tensor(image)).numpy(), expected, atol=1e-6)
        assert not normaliser(torch.full((1, 1, 32, 32), 7, dtype=torch.uint8)).any()
    off = normalisation.Normaliser(method=configuration.build(Config, {"normalise.method": "none"}).normalise.method)
    np.testing.assert_array_equal(off(torch.tensor(image)).numpy(), image.astype(np.float32))


def fixed_batches():
    """Return logits in place of images, for a network that hands them through, and masks with an empty channel."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (3, 2):
        logits = torch.randn(size, 3, 8, 8, generator=generator)
        mask = (torch.rand(size, 3, 8, 8, generator=generator) > 0.7).long()
        mask[:, 2] = 0
        made.append((logits, mask, torch.arange(size)))
    return made


@pytest.mark.row("A13", "A28")
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_run_epoch_agrees_with_torchmetrics(threshold):
    made, loss = fixed_batches(), losses.build(Config().loss, multilabel=True)
    found = scores.run_epoch(nn.Identity(), made, loss, threshold=threshold)
    probs = torch.cat([logits for logits, _, _ in made]).sigmoid()
    mask = torch.cat([mask for _, mask, _ in made])
    jaccard = MultilabelJaccardIndex(3, threshold=threshold, average=None)(probs, mask)
    accuracy = MultilabelAccuracy(3, threshold=threshold, average=None)(probs, mask)
    avg_loss, mean_iou, mean_acc, per_class_iou, per_class_acc = found
    assert per_class_iou == pytest.approx(jaccard.tolist())
    assert per_class_acc == pytest.approx(accuracy.tolist())
    assert mean_iou == pytest.approx(jaccard.mean().item())
    assert mean_acc == pytest.approx(accuracy.mean().item())
    whole = [loss(logits, mask).item() for logits, mask, _ in made]
    assert avg_loss == pytest.approx((3 * whole[0] + 2 * whole[1]) / 5)


@pytest.mark.row("A28")
def test_run_epoch_changes_weights_in_training_only():
    model = telescope.build_network(Config(base_c=2))
    made = [(torch.rand(2, 1, 8, 8), torch.ones(2, 3, 8, 8, dtype=torch.int64), torch.arange(2))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, optimizer = losses.build(Config().loss, multilabel=True), torch.optim.Adam(model.parameters(), lr=0.1)
    telescope.run_epoch(model, made, loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first = telescope.run_epoch(model, made, loss, optimizer, train=True)[0]
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "conv" in name)
    for _ in range(20):
        last = telescope.run_epoch(model, made, loss, optimizer, train=True)[0]
    assert last < first
    with pytest.raises(ValueError, match="optimizer: got None"):
        telescope.run_epoch(model, made, loss, train=True)


def test_run_epoch_means_over_real_channels_when_asked():
    made, loss = fixed_batches(), losses.build(Config().loss, multilabel=True)
    _, mean_iou, _, per_class_iou, _ = scores.run_epoch(nn.Identity(), made, loss, classes=2)
    assert mean_iou == pytest.approx(sum(per_class_iou[:2]) / 2)


@pytest.mark.row("A14")
def test_optimizer_is_adam_with_the_originals_values():
    optimizer = training.build_optimizer(Config.reference(), telescope.build_network(Config.reference()))
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)


def scripted(config, values):
    """Pull a run whose validation losses are given; return the epochs' metrics and the last saver."""
    model, left = nn.Conv2d(1, 3, 1), iter(values)
    batch = (torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.arange(1))
    return training.fit(
        config,
        model=model,
        loss=losses.build(config.loss, multilabel=True),
        train_batches=lambda epoch: [batch],
        validate=lambda model: {"val_loss": next(left)},
        meta={},
    )


@pytest.mark.row("A15")
def test_plateau_lowers_the_learning_rate_after_the_fourth_epoch_without_improvement():
    config = dataclasses.replace(Config.reference(), epochs=10, patience=0)
    rates = [epoch.metrics["lr"] for epoch in scripted(config, [1.0] * 10)]
    assert rates[:5] == [1e-3] * 5
    assert rates[5:9] == pytest.approx([3e-4] * 4)
    assert rates[9] == pytest.approx(9e-5)


@pytest.mark.row("A16")
def test_early_stop_after_eight_stalls_and_small_improvements_do_not_count(tmp_path):
    values = [1.0, 0.5, *(0.5 - 1e-6 * (stall + 1) for stall in range(8)), 0.1]
    epochs = []
    for epoch in scripted(Config.reference(), values):
        epochs.append(epoch.number)
        epoch.save(tmp_path)
    assert epochs == list(range(1, 11))
    assert (
        "early stop: val_loss has not improved by more than 1e-05 for 8 epochs"
        in (checkpoints.read_meta(tmp_path)["stop_reason"])
    )


@pytest.mark.row("A17", "X4")
def test_reference_preset_is_the_originals_values():
    values = configuration.to_values(configuration.build(Config, {"preset": "reference"}))
    expected = {
        "epochs": 120,
        "batch_size": 8,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "optimizer": "adam",
        "lr_schedule": "plateau",
        "plateau_patience": 3,
        "plateau_factor": 0.3,
        "patience": 8,
        "min_delta": 1e-5,
        "early_stop_metric": "val_loss",
        "loss.bce": 0.5,
        "loss.dice": 0.5,
        "loss.ce": 0.0,
        "threshold": 0.5,
        "base_c": 32,
        "p_drop": 0.25,
        "loader_workers": 32,
        "normalise.method": "percentile",
        "normalise.low": 0.5,
        "normalise.high": 99.5,
        "data.fractions": [0.7, 0.15, 0.15],
        "keep_last": 0,
        "variant": "noEL",
        "augmentation.horizontal_flip": 0.0,
        "augmentation.rotate90": 0.0,
        "ema_decay": 0.0,
        "precision": "fp32",
    }
    assert {name: values[name] for name in expected} == expected
    assert telescope.CHANNELS == 3


@pytest.mark.row("A17", "X16")
def test_loader_workers_are_capped_with_one_warning(caplog):
    loading.capped_workers.cache_clear()
    found = [loading.capped_workers(Config.reference().loader_workers * 100) for _ in range(2)]
    assert found[0] == found[1] < 3200
    assert len([record for record in caplog.records if "loader_workers" in record.message]) == 1


@pytest.mark.row("X3")
@pytest.mark.parametrize(("key", "value"), [("p_drop", 1.0), ("threshold", 0.0), ("base_c", 0), ("loss.ce", 0.5)])
def test_values_out_of_range_are_refused_by_key(key, value):
    with pytest.raises(configuration.ConfigError, match=rf"{key.rpartition('.')[2]}: got {value}"):
        configuration.build(Config, {key: value})


@pytest.mark.row("X3")
def test_unknown_keys_are_refused_with_the_nearest():
    with pytest.raises(configuration.ConfigError, match="did you mean 'base_c'"):
        configuration.build(Config, {"base_ch": 16})
    fields = configuration.fields(Config)
    assert all(field.help for field in fields.values())
    assert {name: field.default for name, field in fields.items()} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in configuration.to_values(Config()).items()
    }


@pytest.mark.row("A18")
def test_every_epoch_reports_what_is_promised(with_el, no_el):
    wanted = {"train_loss", "val_loss", "iou_cr", "iou_ps", "mean_iou", "acc", "lr"}
    for run, more in ((with_el, {"iou_el", "train_mean_iou"}), (no_el, set())):
        assert len(run.rows) == 3
        for row in run.rows:
            assert wanted | more <= row.keys() == telescope.metrics(run.config).keys()
            assert all(isinstance(value, float) and np.isfinite(value) for value in row.values())


@pytest.mark.row("A18")
def test_training_learns_the_synthetic_classes(cache):
    config = tiny(cache, variant="withEL", base_c=16, epochs=12, **{"data.synthetic.samples": 160})
    rows = [epoch.metrics for epoch in telescope.train(dataclasses.replace(config, lr=3e-3))]
    best = max(rows, key=lambda row: row["mean_iou"])
    assert min(best["iou_cr"], best["iou_ps"], best["iou_el"]) > 0.2
    assert best["acc"] > best["acc_all_zero"]


@pytest.mark.row("A19", "A20")
def test_checkpoints_have_the_originals_names_and_keys(with_el):
    names = {path.name for path in with_el.out.glob("*.pt")}
    assert {f"unet_multilabel_withEL_ep{n}_last.pt" for n in (1, 2, 3)} <= names
    best, expected = -1.0, set()
    for number, row in enumerate(with_el.rows, 1):
        if row["mean_iou"] > best:
            best, expected = row["mean_iou"], {*expected, f"unet_multilabel_withEL_ep{number}_best.pt"}
    assert {name for name in names if "best" in name} == expected
    content = torch.load(with_el.out / "unet_multilabel_withEL_ep3_last.pt", weights_only=True)
    assert {"epoch", "model", "optimizer"} <= content.keys()
    assert content["epoch"] == 3
    telescope.build_network(with_el.config).load_state_dict(content["model"])
    saved = checkpoints.safetensors_weights(with_el.checkpoint / checkpoints.WEIGHTS_FILE)
    assert all(torch.equal(value, saved[name]) for name, value in content["model"].items())


@pytest.mark.row("A19")
def test_best_is_kept_only_when_mean_iou_rises(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "reference_checkpoint", lambda epoch: {"epoch": epoch.number})
    run = outputs.RunFolder(tmp_path, "noEL", keep_last=0)
    for number, value in enumerate((0.2, 0.2, 0.3, 0.1), 1):
        run.add(Epoch(number, {"mean_iou": value}, lambda folder: None))
    assert sorted(path.name for path in tmp_path.glob("*best.pt")) == [
        "unet_multilabel_noEL_ep1_best.pt",
        "unet_multilabel_noEL_ep3_best.pt",
    ]
    assert len(list(tmp_path.glob("*last.pt"))) == 4


@pytest.mark.row("A20")
def test_older_checkpoints_go(no_el):
    names = sorted(path.name for path in no_el.out.glob("*last.pt"))
    assert names == ["unet_multilabel_noEL_ep2_last.pt", "unet_multilabel_noEL_ep3_last.pt"]
    assert len(list(no_el.out.glob("*best.pt"))) == 1
    assert (Config().keep_last, Config.reference().keep_last) == (1, 0)


@pytest.mark.row("A21", "A22", "A23")
def test_a_finished_run_leaves_one_row(with_el, no_el):
    for run, columns, file in (
        (with_el, 15, "checkpoints_multilabel_withEL.csv"),
        (no_el, 14, "run_log_multilabel_noEL.csv"),
    ):
        (row,) = read_csv(run.out / file)
        assert list(row) == list(runlog.COLUMNS[run.config.variant])
        assert len(row) == columns
        last, best = run.rows[-1], max(row["mean_iou"] for row in run.rows)
        assert float(row["best_val_iou"]) == best
        assert float(row["val_loss"]) == last["val_loss"]
        assert (row["run_id"], row["epochs"], row["batch_size"], row["num_workers"]) == ("1", "3", "8", "0")
        assert int(row["dataset_size"]) == sum(telescope.prepare(run.config)["samples"].values())
        assert re.fullmatch(r"\d+:\d\d:\d\d", row["train_time_hms"])
    assert float(read_csv(with_el.out / "checkpoints_multilabel_withEL.csv")[0]["iou_el"]) == with_el.rows[-1]["iou_el"]
    assert float(read_csv(no_el.out / "run_log_multilabel_noEL.csv")[0]["iou_cosmic"]) == no_el.rows[-1]["iou_cr"]


@pytest.mark.row("A22", "A37", "X15")
def test_no_gpu_is_no_problem(no_el, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.resolve_device(Config().device) == torch.device("cpu")
    assert outputs.csv_scores(no_el.rows, "noEL")["gpu_used"] is None
    if not torch.backends.cuda.is_built():
        assert read_csv(no_el.out / "run_log_multilabel_noEL.csv")[0]["gpu_used"] == ""


@pytest.mark.row("A24")
def test_the_placeholder_counts_only_where_asked(no_el, cache, tmp_path):
    assert no_el.rows[0].keys().isdisjoint({"iou_el", "iou_none"})
    assert no_el.rows[-1]["mean_iou"] == pytest.approx((no_el.rows[-1]["iou_cr"] + no_el.rows[-1]["iou_ps"]) / 2)
    (epoch,) = telescope.train(tiny(cache, epochs=1, include_placeholder=True))
    asked = epoch.metrics
    assert asked["iou_none"] == 0.0
    assert asked["mean_iou"] == pytest.approx((no_el.rows[0]["iou_cr"] + no_el.rows[0]["iou_ps"]) / 3)
    scored = telescope.evaluate(no_el.checkpoint, "test", tmp_path)
    assert scored.metrics["iou_none (placeholder)"] is None
    means = [scored.metrics[f"iou_{name}"] for name in ("cr", "ps")]
    assert scored.metrics["mean_iou"] == pytest.approx(sum(means) / 2)
    assert telescope_figures.CLASS_NAMES["noEL"][2] == "none (placeholder)"


@pytest.mark.row("A26", "X6")
def test_every_run_and_checkpoint_writes_its_splits(with_el):
    _, made = dataset.load(with_el.config.data, "withEL")
    for folder in (with_el.out, with_el.checkpoint):
        written = splits.read(folder / "splits.json")
        assert written == made
        splits.check(written)


@pytest.mark.row("A29", "A30")
def test_curves_are_drawn_and_name_the_classes(with_el, no_el, monkeypatch):
    for run in (with_el, no_el):
        for name in ("loss_curve.png", "iou_per_class.png", "accuracy.png"):
            assert image_size(run.out / name)[1] > 300
    assert (with_el.out / "train_iou.png").is_file()
    assert not (no_el.out / "train_iou.png").exists()
    seen = {}

    def spy(path, rows, series, **more):
        seen[path.name] = (dict(series), more)
        return path

    monkeypatch.setattr(figures, "curves", spy)
    outputs.draw_curves(with_el.out, with_el.rows, "withEL")
    series, more = seen["iou_per_class.png"]
    assert series == {"iou_cr": "CR", "iou_ps": "PS", "iou_el": "EL", "mean_iou": "mean"}
    assert more["ylabel"] == "IoU"
    outputs.draw_curves(no_el.out, no_el.rows, "noEL")
    assert "EL" not in seen["iou_per_class.png"][0].values()
    assert seen["accuracy.png"][0]["acc_all_zero"] == "all zero"


@pytest.mark.row("A31", "A33", "A34")
def test_evaluation_draws_a_few_samples_with_their_own_threshold(with_el, tmp_path, monkeypatch):
    drawn, read = {}, []
    original, image = figures.prediction_grid, Samples.image

    def grid(path, examples, names, **more):
        drawn["grid"] = (examples, names, more)
        return original(path, examples, names, **more)

    monkeypatch.setattr(figures, "prediction_grid", grid)
    monkeypatch.setattr(telescope_figures, "_save", lambda figure, path: drawn.update({path.name: figure}) or path)
    monkeypatch.setattr(telescope.evaluation, "score_batches", recorded(telescope.evaluation.score_batches, read))
    monkeypatch.setattr(Samples, "image", lambda self, index: read.append(index) or image(self, index))
    first = telescope.evaluate(with_el.checkpoint, "test", tmp_path)
    assert len(read[read.index("scored") + 1 :]) == 4  # the figures read what they show, no more
    examples, names, more = drawn["grid"]
    assert (len(examples), tuple(names), more["thr"]) == (4, ("CR", "PS", "EL"), 0.75)
    assert all(example.probability.shape == (3, 32, 32) and example.mask is not None for example in examples)
    assert image_size(tmp_path / first.figures[0])[1] > 600
    titles = [axis.get_title() for axis in drawn["examples.png"].axes]
    assert titles[:4] == ["input", "prediction > 0.75", "ground truth", "probability"]
    assert len(drawn["examples.png"].axes) == 16
    again = telescope.evaluate(with_el.checkpoint, "test", tmp_path)
    assert [example.name for example in drawn["grid"][0]] == [example.name for example in examples]
    assert again.metrics == first.metrics
    assert first.details["threshold"] == 0.5


def recorded(function, into):
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        into.append("scored")
        return found

    return call


@pytest.mark.row("A33")
def test_overlay_threshold_leaves_metrics_alone(with_el, tmp_path):
    scored = telescope.evaluate(with_el.checkpoint, "validation", tmp_path)
    last = with_el.rows[-1]
    for name in ("mean_iou", "iou_cr", "iou_ps", "iou_el"):
        assert scored.metrics[name] == pytest.approx(last[name])
    assert scored.metrics["accuracy"] == pytest.approx(last["acc"])


@pytest.mark.row("A41", "X8")
def test_evaluation_tells_the_share_of_each_class_and_the_all_zero_accuracy(with_el, tmp_path):
    scored = telescope.evaluate(with_el.checkpoint, "test", tmp_path)
    manifest = telescope.prepare(with_el.config)
    assert list(scored.details["class_shares"].values()) == pytest.approx(
        list(manifest["class_shares"]["test"].values())
    )
    assert scored.metrics["accuracy_background"] == pytest.approx(manifest["all_zero_accuracy"]["test"])
    assert with_el.rows[0]["acc_all_zero"] == pytest.approx(manifest["all_zero_accuracy"]["validation"])
    assert scored.details["conventions"]["mean_iou"] == {"pooling": "pixel", "background": "in", "empty": "zero"}
    low, high = scored.intervals["mean_iou"]
    assert low <= scored.metrics["mean_iou"] <= high


def test_evaluation_refuses_test_samples_that_were_trained_on(with_el, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in with_el.checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = splits.read(folder / "splits.json")
    splits.write(dataclasses.replace(made, train=made.test, test=made.train), folder / "splits.json")
    with pytest.raises(DataError, match=r"samples of the test split were used in training, such as 'TOD_"):
        telescope.evaluate(folder, "test", tmp_path)


@pytest.mark.row("A35")
def test_fine_tuning_freezes_the_encoder_first_and_logs_one_row(no_el, cache, tmp_path):
    values = {
        "finetune.checkpoint": str(no_el.checkpoint),
        "finetune.freeze_epochs": 2,
        "variant": "withEL",
        "epochs": 3,
    }
    config = tiny(cache, out=str(tmp_path / "out"), **values)
    before = checkpoints.safetensors_weights(no_el.checkpoint / checkpoints.WEIGHTS_FILE)
    for epoch in telescope.train(config):
        epoch.save(tmp_path / "checkpoint")
        now = checkpoints.safetensors_weights(tmp_path / "checkpoint" / checkpoints.WEIGHTS_FILE)
        encoder = [name for name in before if name.split(".")[0] in config.finetune.frozen]
        assert any("running_mean" in name for name in encoder)
        same = {name: torch.equal(before[name], now[name]) for name in before}
        if epoch.number <= 2:
            assert all(same[name] for name in encoder)
        else:
            assert not any(same[name] for name in encoder)
        assert not same["dec2.0.0.weight"]
        assert not same["outc.weight"]
    (row,) = read_csv(tmp_path / "out" / "checkpoints_multilabel_withEL.csv")
    assert len(row) == 15
    assert row["epochs"] == "3"


@pytest.mark.row("A35")
def test_fine_tuning_resumes_in_the_middle_of_the_frozen_stage(no_el, cache, tmp_path):
    values = {
        "finetune.checkpoint": str(no_el.checkpoint),
        "finetune.freeze_epochs": 2,
        "variant": "withEL",
        "epochs": 3,
    }
    config, whole = tiny(cache, **values), []
    for epoch in telescope.train(config):
        whole.append(dict(epoch.metrics))
        if epoch.number == 1:
            epoch.save(tmp_path)
    rest = [dict(epoch.metrics) for epoch in telescope.train(config, resume=tmp_path)]
    assert rest == whole[1:]


@pytest.mark.row("A35")
def test_fine_tuning_without_its_checkpoint_fails_before_training(cache, tmp_path):
    config = tiny(cache, **{"finetune.checkpoint": str(tmp_path / "gone.pt")})
    with pytest.raises(DataError, match=r"finetune\.checkpoint: .*gone\.pt does not exist"):
        telescope.prepare(config)
    with pytest.raises(DataError, match="does not exist"):
        next(telescope.train(config))
    (tmp_path / "gone.pt").touch()
    with pytest.raises(ValueError, match=r"no part encoder; the network has enc1, enc2"):
        telescope.prepare(configuration.replace(config, {"finetune.frozen": ["encoder"]}))


@pytest.mark.row("A35")
def test_fine_tuning_preset_is_ten_and_ten():
    config = Config.finetuning()
    assert (config.variant, config.epochs, config.finetune.freeze_epochs) == ("withEL", 20, 10)


@pytest.mark.row("A36")
@pytest.mark.parametrize("reset", [False, True])
def test_only_the_third_output_row_is_drawn_anew(no_el, cache, reset):
    values = {"finetune.checkpoint": str(no_el.checkpoint), "finetune.reset_third": reset, "variant": "withEL"}
    state = telescope.start_network(tiny(cache, seed=7, **values)).state_dict()
    source = transfer.weights(no_el.checkpoint)
    for name, value in state.items():
        if name.startswith("outc"):
            assert torch.equal(value[:2], source[name][:2])
            assert torch.equal(value[2], source[name][2]) is not reset
        else:
            assert torch.equal(value, source[name])


@pytest.mark.row("A6")
def test_inspect_draws_one_sample_and_says_its_range(cache, tmp_path, caplog):
    caplog.set_level("INFO")
    (path,) = telescope.inspect(tiny(cache), tmp_path)
    assert image_size(path)[1] > 400
    assert re.search(r"uint8, raw \d+ to \d+", caplog.text)
    assert "normalised 0 to 1" in caplog.text
    splits.read(tmp_path / "splits.json")


@pytest.mark.row("A38")
def test_import_needs_no_plotting_and_no_progress_bars():
    code = (
        "import sys\n"
        "for name in ('tqdm', 'matplotlib', 'ray', 'optuna', 'pydantic', 'pyarrow'): sys.modules[name] = None\n"
        "import workloads.telescope\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.row("A40")
def test_prediction_turns_observations_into_hits(with_el, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-0.01, 0.01, (2, 300))
    tod = rng.normal(0, 1, (300, 96))
    tod[np.hypot(x - 0.003, y) < 0.002, 40] += 80
    path = tmp_path / "in" / "night.npz"
    path.parent.mkdir()
    np.savez(path, tod=tod, x=x, y=y, det_uid=[f"d{n}" for n in range(300)], rate_hz=100.0)
    values = configuration.to_values(with_el.config)
    values |= {"observation.slice_samples": 48, "observation.thresholds": [1e-6, 1e-6, 0.999999]}
    folder = rewritten(with_el.checkpoint, tmp_path / "checkpoint", values)
    (written,) = telescope.predict(folder, path.parent, tmp_path / "out")
    rows = read_csv(written)
    assert list(rows[0])[:5] == ["slice_from", "slice_to", "det_uid", "sky_x_rad", "sky_y_rad"]
    assert list(rows[0])[5:] == ["prob_cr", "prob_ps", "prob_el", "labels"]
    assert {(row["slice_from"], row["slice_to"]) for row in rows} == {("0", "48"), ("48", "96")}
    assert {row["labels"] for row in rows} == {"cr|ps"}
    assert len(rows) == 600
    np.savez(path, x=x, y=y)
    with pytest.raises(DataError, match=r"night\.npz: lacks tod"):
        telescope.predict(folder, path, tmp_path / "out")


def rewritten(checkpoint, folder, values):
    """Copy a checkpoint with another configuration in it."""
    model = telescope.load(checkpoint)[1]
    meta = checkpoints.read_meta(checkpoint)
    checkpoints.save(folder, model=model, meta={**meta, "config": values}, state={})
    return folder


def test_prediction_of_pictures_keeps_their_names(with_el, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    name = "TOD_1.2.ar5:f090_converted_0-9"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 45)).astype(np.uint8)).save(source / f"{name}.png")
    array, picture = telescope.predict(with_el.checkpoint, source, tmp_path / "out")
    assert (array.name, picture.name) == (f"{name}_prob.npy", f"{name}_composite.png")
    probability = np.load(array)
    assert probability.shape == (3, 37, 45)
    expected = figures.composite_map(probability, 0.5)
    np.testing.assert_array_equal(read_image(picture), expected)
    with pytest.raises(DataError, match="nothing to predict"):
        telescope.predict(with_el.checkpoint, tmp_path / "nowhere", tmp_path / "out")


def test_pictures_of_one_name_in_two_folders_are_both_predicted(with_el, tmp_path):
    for name in ("a", "sub/a"):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((32, 32), len(name), np.uint8)).save(path)
    written = telescope.predict(with_el.checkpoint, tmp_path / "in", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert found == {"a_prob.npy", "a_composite.png", "sub/a_prob.npy", "sub/a_composite.png"}


def test_checkpoints_of_other_workloads_are_refused(with_el, tmp_path):
    model, meta = telescope.load(with_el.checkpoint)[1], checkpoints.read_meta(with_el.checkpoint)
    checkpoints.save(tmp_path, model=model, meta={**meta, "workload": "steel"}, state={})
    with pytest.raises(DataError, match="made by workload 'steel'; expected 'telescope'"):
        telescope.load(tmp_path)


@pytest.mark.row("X5", "X10")
def test_runs_repeat_and_resume_bit_for_bit(no_el, cache, tmp_path):
    config, again = tiny(cache), []
    for epoch in telescope.train(config):
        again.append(dict(epoch.metrics))
        if epoch.number == 2:
            epoch.save(tmp_path)
    assert again == no_el.rows
    (third,) = telescope.train(config, resume=tmp_path)
    assert dict(third.metrics) == again[2]


@pytest.mark.row("X10")
def test_a_resumed_run_keeps_its_curves_and_its_best(cache, tmp_path):
    config = tiny(cache, out=str(tmp_path / "out"))
    run = telescope.train(config)
    rows = [dict(next(run).metrics)]
    epoch = next(run)
    rows.append(dict(epoch.metrics))
    epoch.save(tmp_path / "checkpoint")
    run.close()
    rows += [dict(epoch.metrics) for epoch in telescope.train(config, resume=tmp_path / "checkpoint")]
    (row,) = read_csv(tmp_path / "out" / "run_log_multilabel_noEL.csv")
    assert row["epochs"] == "3"
    assert float(row["best_val_iou"]) == max(row["mean_iou"] for row in rows)


@pytest.mark.row("A21")
def test_resuming_a_run_that_had_ended_logs_nothing_more(no_el):
    assert list(telescope.train(no_el.config, resume=no_el.checkpoint)) == []
    assert len(read_csv(no_el.out / "run_log_multilabel_noEL.csv")) == 1


@pytest.mark.row("X7")
def test_training_never_opens_a_test_sample(cache, monkeypatch):
    config = tiny(cache, epochs=1, train_iou=True)
    _, made = dataset.load(config.data, config.variant)
    storage._sealed.cache_clear()  # what an earlier run holds in memory would not be read again
    read, image = set(), Samples.image
    monkeypatch.setattr(Samples, "image", lambda self, index: read.add(index) or image(self, index))
    list(telescope.train(config))
    assert read == {*made.train, *made.validation}
    with pytest.raises(TestSplitError):
        splits.indices(made, "test")


@pytest.mark.row("X12")
def test_nothing_is_written_unless_out_is_given(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(telescope.train(tiny(cache, epochs=1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.row("A42")
def test_search_space_covers_the_originals_choices():
    spec = spec_file.load("telescope")
    names = {parameter.name for parameter in spec.parameters}
    assert names >= {"lr", "weight_decay", "base_c", "p_drop", "loss.bce", "loss.dice", "threshold"}
    assert names >= {"plateau_patience", "plateau_factor"}
    assert [(objective.metric, objective.mode) for objective in spec.objectives] == [("mean_iou", "max")]
    config = configuration.build(Config, spec.fixed)
    assert "mean_iou" in telescope.metrics(config)
    assert metrics.Convention(empty="zero") == scores.CONVENTION
