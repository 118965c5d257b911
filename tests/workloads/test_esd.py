"""Satellite tiles: what is reported, what is written, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchmetrics.functional import classification

import configuration
from configuration import ConfigError
from search import spec_file
from segmentation import augmentation, loading, ranks, splits
from segmentation.augmentation import Augmentation
from segmentation.epoch import DataError
from segmentation.losses import Loss
from workloads import esd
from workloads._esd import dataset, figures, generator, original, processed, reader, scoring, subtiles
from workloads._esd.forest import Forest
from workloads._esd.original import ESDConfig, EvalConfig
from workloads._esd.satellites import CLASSES, GT, TITLES

pytestmark = pytest.mark.usefixtures("own_cache")

CELLS = (12, 4, 4)


def debug(**values):
    return configuration.replace(esd.Config.debug(), values)


def made_up(masks, seed=0):
    """Return logits (N, 4, 4, 4) that know something of masks, masks and numbers."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn((len(masks), 4, 4, 4), generator=random)
    return logits + 2 * torch.nn.functional.one_hot(masks, 4).movedim(-1, 1), masks, torch.arange(len(masks))


@pytest.fixture
def batch():
    return made_up(torch.randint(0, 4, CELLS, generator=torch.Generator().manual_seed(1)))


def found_of(logits, masks, index):
    scorer = scoring.Scorer(Loss())
    for part in torch.arange(len(index)).split(5):
        scorer.add(logits[part], masks[part], index[part])
    return scorer.whole()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for epoch in esd.train(debug(epochs=1)):
        epoch.save(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.row("E9")
@pytest.mark.row("E10")
def test_jaccard_and_iou_are_one_number_and_torchmetrics_has_it_too(batch) -> None:
    scores = scoring.epoch_scores(found_of(*batch))
    theirs = classification.multiclass_jaccard_index(batch[0], batch[1], 4, average=None)
    for name, value in zip(CLASSES, theirs.tolist(), strict=True):
        assert scores[f"val_jaccard_{name}"] == scores[f"val_iou_{name}"] == pytest.approx(value)
    macro = classification.multiclass_jaccard_index(batch[0], batch[1], 4, average="macro")
    assert scores["val_mean_jaccard"] == scores["val_mean_iou"] == pytest.approx(float(macro))


@pytest.mark.row("E11")
@pytest.mark.row("E13")
def test_accuracy_and_f1_are_those_of_torchmetrics(batch) -> None:
    scores = scoring.epoch_scores(found_of(*batch))
    logits, masks, _ = batch
    assert scores["val_accuracy"] == pytest.approx(float((logits.argmax(1) == masks).float().mean()))
    for family, theirs in (
        ("accuracy", classification.multiclass_accuracy),
        ("f1", classification.multiclass_f1_score),
    ):
        for name, value in zip(CLASSES, theirs(logits, masks, 4, average=None).tolist(), strict=True):
            assert scores[f"val_{family}_{name}"] == pytest.approx(value)
        assert scores[f"val_mean_{family}"] == pytest.approx(float(theirs(logits, masks, 4, average="macro")))
    dark = classification.binary_f1_score((logits.argmax(1) == 0).int(), (masks == 0).int())
    assert scores["val_contest_f1"] == scores[f"val_f1_{CLASSES[0]}"] == pytest.approx(float(dark))


@pytest.mark.row("E12")
@pytest.mark.row("E38")
def test_auroc_is_of_all_cells_and_never_a_mean_of_batches(batch) -> None:
    logits, masks, index = batch
    theirs = classification.multiclass_auroc(logits, masks, 4, average=None).tolist()
    scores = scoring.epoch_scores(found_of(logits, masks, index))
    assert [scores[f"val_auroc_{name}"] for name in CLASSES] == pytest.approx(theirs)
    assert scores["val_mean_auroc"] == pytest.approx(np.mean(theirs))
    halves = [found_of(*(each[rows] for each in batch)) for rows in (slice(0, 6), slice(6, 12))]
    assert np.mean([scoring.auroc(half)["mean_auroc"] for half in halves]) != pytest.approx(np.mean(theirs), abs=1e-4)
    assert {name.partition("_")[0] for name in scores} == {"val"}


@pytest.mark.row("E12")
def test_a_class_that_is_not_there_has_no_auroc_and_a_notice() -> None:
    found = found_of(*made_up(torch.randint(0, 3, CELLS)))
    scores = scoring.epoch_scores(found)
    assert f"val_auroc_{CLASSES[3]}" not in scores and 0 < scores["val_mean_auroc"] < 1
    evaluation = scoring.evaluated(found, ["Tile1"] * 12, {}, 1)
    assert evaluation.metrics[f"auroc_{CLASSES[3]}"] is None
    [notice] = evaluation.details["notices"]
    assert notice.startswith(CLASSES[3])
    assert json.dumps(evaluation.metrics, allow_nan=False)


def test_two_processes_count_each_subtile_once(batch, monkeypatch) -> None:
    whole = found_of(*batch)
    rows = [torch.tensor([0, 2, 4, 6, 8, 10]), torch.tensor([1, 3, 5, 7, 9, 11, 0])]
    parts = [found_of(*(each[row] for each in batch)) for row in rows]
    monkeypatch.setattr(ranks, "gather", lambda _: parts)
    both = scoring.Scorer(Loss()).whole()
    assert scoring.epoch_scores(both) == pytest.approx(scoring.epoch_scores(whole))


@pytest.mark.row("E16")
@pytest.mark.row("E21")
def test_a_tile_of_true_size_becomes_99_channels_and_comes_back(tmp_path) -> None:
    generator.write_tile(generator.Synthetic(), 1, tmp_path / "Tile1")
    [tile] = reader.find(tmp_path)
    arrays = processed.arrays(tile, "float16")
    pieces = subtiles.grid_slice(arrays, processed.metadata(tile), 4)
    assert len(pieces) == 16
    images = [dataset.image_of(dataset.Data(), piece.arrays) for piece in pieces]
    assert {image.shape for image in images} == {(99, 200, 200)}
    assert {piece.arrays[GT].shape for piece in pieces} == {(1, 1, 4, 4)}
    for name, stack in arrays.items():
        shuffled = [pieces[place] for place in np.random.default_rng(0).permutation(16)]
        assert np.array_equal(subtiles.join({(p.x_gt, p.y_gt): p.arrays[name] for p in shuffled}), stack)


@pytest.mark.row("E15")
@pytest.mark.row("E16")
def test_the_torch_data_set_gives_what_the_projects_loops_take() -> None:
    samples, made = dataset.load(debug().data)
    loader = torch.utils.data.DataLoader(
        dataset.TorchDataset(samples, made.train), batch_size=5, collate_fn=dataset.collate
    )
    images, labels, notes = next(iter(loader))
    assert images.shape == (5, 99, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (5, 1, 4, 4) and set(labels.unique().tolist()) <= {0, 1, 2, 3}
    assert [(note["x_gt"], note["y_gt"]) for note in notes] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    with pytest.raises(splits.TestSplitError):
        dataset.TorchDataset(samples, made.test)[0]


@pytest.mark.row("E25")
def test_augmentation_moves_cells_with_their_pixels_and_validation_is_left_alone() -> None:
    mask = torch.randint(0, 4, (16, 4, 4))
    image = mask.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, None].float()
    moved, moved_mask = augmentation.build(Augmentation())(image, mask, loading.generator(0))
    assert not torch.equal(moved_mask, mask)
    assert torch.equal(moved[:, 0, ::5, ::5].long(), moved_mask)
    config = debug()
    samples, made = dataset.load(config.data)
    normaliser = esd.normalisation.build(config.normalise, samples, made.train)
    passes = [
        [image for image, _, _ in esd._batches(config, samples, made.validation, normaliser, torch.device("cpu"))]
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*passes, strict=True))
    assert torch.equal(passes[0][0][0], torch.from_numpy(samples.image(made.validation[0]).astype(np.float32)))
    for name in ("rotate_degrees", "elastic"):
        with pytest.raises(ConfigError, match=rf"augmentation.{name}: .*expected 0"):
            debug(**{f"augmentation.{name}": 3.0})


@pytest.mark.row("E8")
@pytest.mark.row("E27")
def test_predictions_are_put_together_by_place_whatever_their_order(tmp_path) -> None:
    config = debug(first_class=0)
    samples, made = dataset.load(config.data)
    indices = list(made.validation[::-1])
    masks = torch.from_numpy(np.stack([samples.mask(index) for index in indices])).long()
    logits = 9.0 * torch.nn.functional.one_hot(masks, 4).movedim(-1, 1)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    scorer = scoring.Scorer(config.loss)
    scorer.add(logits[order], masks[order], torch.tensor(indices)[order])
    esd._save_tiles(config, samples, scorer.whole(), tmp_path)
    tile = next(tile for tile in dataset.find(config.data).tiles if tile.name == samples.groups[indices[0]])
    truth = reader.read_labels(tile) - 1
    raster = tifffile.imread(tmp_path / f"{tile.name}_prediction.tif")
    assert raster.dtype == np.uint8 and np.array_equal(raster, truth)
    assert np.array_equal(tifffile.imread(tmp_path / f"{tile.name}_contest.tif"), truth == 0)


@pytest.mark.row("E13")
@pytest.mark.row("E26")
@pytest.mark.row("E27")
@pytest.mark.row("E34")
@pytest.mark.row("E41")
def test_evaluate_writes_each_tile_as_raster_and_picture(trained, tmp_path) -> None:
    found = esd.evaluate(trained, "test", tmp_path)
    samples, made = dataset.load(debug().data)
    [tile] = {samples.groups[index] for index in made.test}
    for name in ("prediction.tif", "prediction.png", "ground_truth.png", "contest.tif", "contest.png"):
        assert f"{tile}_{name}" in found.figures
    stitched = f"{tile}/plot/{figures.STITCHED}"
    assert stitched in found.figures
    with Image.open(tmp_path / stitched) as picture:
        assert picture.width > 2 * picture.height
    assert set(np.unique(tifffile.imread(tmp_path / f"{tile}_prediction.tif"))) <= {1, 2, 3, 4}
    table = np.array(found.details["confusion"])
    assert table.sum() == 256
    assert found.details["majority"] == CLASSES[1]
    assert found.metrics["accuracy_majority"] == pytest.approx(table[1].sum() / 256)
    assert found.intervals.keys() >= {"mean_iou", "contest_f1", "mean_jaccard"}


def test_predict_takes_tiles_without_truth_and_names_one_with_other_dates(trained, tmp_path) -> None:
    tile = tmp_path / "tiles" / "Tile7"
    generator.write_tile(debug().data.synthetic, 7, tile)
    (tile / "groundTruth.tif").unlink()
    written = esd.predict(trained, tmp_path / "tiles", tmp_path / "out")
    assert {path.name for path in written} >= {"Tile7_prediction.tif", figures.BLIND}
    for path in tile.glob("LC08_L1TP_2020-08-15_*"):
        path.unlink()
    with pytest.raises(DataError, match=r"Tile7: 88 channels .*2 of landsat.*; the network takes 99"):
        esd.predict(trained, tile, tmp_path / "again")
    generator.write_tile(generator.Synthetic(pixels=6), 7, tile)
    with pytest.raises(DataError, match="Tile7: 6 pixels to a cell; the network takes 4"):
        esd.predict(trained, tile, tmp_path / "again")


@pytest.mark.row("E24")
def test_channels_follow_from_the_selected_bands(tmp_path) -> None:
    config = debug(**{"data.selected_bands.sentinel2": ["04", "03", "02"], "data.selected_bands.viirs_maxproj": ["0"]})
    samples, _ = dataset.load(config.data)
    assert samples.shape(0)[0] == 4 * 3 + 1
    assert esd.build_network(config, samples)(torch.zeros(1, 13, 16, 16)).shape == (1, 4, 4, 4)
    channels = dataset.channels_of(config.data, samples)
    assert [one.band for one in channels[:3]] == ["02", "03", "04"], "in the order in which they are stacked"
    for bands, problem in (
        (["B04"], "has no band 'B04'"),
        ([4], "expected text"),
        (["04", "04"], "each band once"),
    ):
        with pytest.raises(ConfigError, match=f"data.selected_bands.*{problem}"):
            debug(**{"data.selected_bands.sentinel2": bands})


@pytest.mark.row("E22")
def test_tiles_of_other_sizes_are_refused_by_name(tmp_path) -> None:
    for number, pixels in ((1, 4), (2, 4), (3, 6)):
        generator.write_tile(generator.Synthetic(pixels=pixels), number, tmp_path / f"Tile{number}")
    with pytest.raises(DataError, match=r"a subtile of Tile3 has 99 channels of 24 pixels, those of Tile1 99 .* 16"):
        dataset.load(replace(debug().data, root=str(tmp_path)))


@pytest.mark.row("E31")
@pytest.mark.row("E41")
@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "loss.class_weights": [4.0, 1.0, 2.0, 2.0]},
        {"network.name": "unet", "loss.focal": 1.0, "loss.ce": 0.0},
    ],
)
def test_optimisers_networks_and_losses_can_be_chosen(values) -> None:
    [epoch] = esd.train(debug(epochs=1, **values))
    assert np.isfinite(epoch.metrics["train_loss"])


@pytest.mark.row("E32")
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"network.pool_sizes": [5, 2]}, r"network.pool_sizes: .*product is 10; expected 4"),
        ({"network.n_encoders": 5, "network.name": "unet"}, r"network.n_encoders: got 5"),
        ({"network.kernel_size": 9}, r"network.kernel_size: got 9"),
        ({"data.tile_size_gt": 3}, r"data.tile_size_gt: got 3; expected 1, 2, 4, 8 or 16"),
        ({"data.tile_size_gt": 1, "network.name": "unet", "network.n_encoders": 3}, "network.n_encoders"),
    ],
)
def test_combinations_that_cannot_be_are_refused_before_anything_starts(values, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        debug(**values)


def test_a_network_for_other_cells_than_the_datas_is_refused() -> None:
    with pytest.raises(ValueError, match=r"network.scale_factor: got 50, but a cell .* has 4 x 4 pixels; set it to 4"):
        esd.prepare(debug(**{"network.scale_factor": 50, "network.pool_sizes": [5, 5, 2]}))


@pytest.mark.row("E40")
def test_a_random_forest_on_the_networks_features_is_scored_beside_it(trained, tmp_path) -> None:
    plain = esd.evaluate(trained, "test", tmp_path / "plain")
    both = esd.evaluate(trained, "test", tmp_path / "both", {"forest.trees": 20})
    assert {name: both.metrics[name] for name in plain.metrics} == plain.metrics
    assert {f"forest_{name}" for name in plain.metrics} <= both.metrics.keys()
    assert (
        both.intervals["forest_mean_iou"][0] <= both.metrics["forest_mean_iou"] <= both.intervals["forest_mean_iou"][1]
    )
    assert both.metrics["forest_mean_iou"] > plain.metrics["mean_iou"], "one epoch teaches a head less than a forest"
    assert esd.evaluate(trained, "test", tmp_path / "again", {"forest.trees": 20}).metrics == both.metrics
    with pytest.raises(ConfigError, match=r"trees: got -1"):
        replace(esd.Config(), forest=configuration.build(Forest, {"trees": -1}))


@pytest.mark.row("E29")
def test_the_projects_settings_have_its_defaults_and_are_read_into_ours() -> None:
    config = ESDConfig()
    assert {name: str(getattr(config, name)) for name in vars(config)} == {
        "processed_dir": "data/processed/4x4",
        "raw_dir": "data/raw/Train",
        "selected_bands": "None",
        "model_type": "SegmentationCNN",
        "tile_size_gt": "4",
        "batch_size": "8",
        "max_epochs": "2",
        "seed": "12378921",
        "learning_rate": "0.0003",
        "num_workers": "11",
        "accelerator": "gpu",
        "devices": "1",
        "in_channels": "99",
        "out_channels": "4",
        "depth": "2",
        "n_encoders": "2",
        "embedding_size": "64",
        "pool_sizes": "5,5,2",
        "kernel_size": "3",
        "scale_factor": "50",
        "wandb_run_name": "None",
    }
    built = configuration.build(esd.Config, original.values(config))
    assert built == replace(esd.Config.reference(), data=built.data)
    assert built.network.pool_sizes == (5, 5, 2) and built.lr == 3e-4 and built.seed == 12378921
    with pytest.raises(ConfigError, match="product is 25; expected 50"):
        configuration.build(esd.Config, original.values(ESDConfig(pool_sizes="5,5")))


@pytest.mark.row("X4")
def test_the_reference_preset_is_the_projects_own() -> None:
    config = esd.Config.reference()
    assert (config.epochs, config.batch_size, config.lr, config.seed, config.optimizer) == (
        2,
        8,
        3e-4,
        12378921,
        "adam",
    )
    assert (config.network.name, config.network.depth, config.network.embedding_size) == ("segmentation_cnn", 2, 64)
    assert config.data.tile_size_gt == 4 and config.weight_decay == 0


@pytest.mark.row("E30")
@pytest.mark.row("E35")
def test_flags_say_what_is_other_than_the_defaults(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = original.parse(
        ESDConfig, ["--model_type=UNet", "--max_epochs=5", '--selected_bands={landsat: ["8"]}'], "train"
    )
    values = original.values(told)
    assert (values["network.name"], values["epochs"], values["data.root"]) == ("unet", 5, "")
    assert configuration.build(esd.Config, values).data.selected_bands.landsat == ("8",)
    (tmp_path / "data/raw/Train").mkdir(parents=True)
    assert original.values(told)["data.root"] == "data/raw/Train"
    evaluated = original.parse(EvalConfig, ["--model_type=UNet"], "evaluate")
    assert str(evaluated.checkpoint) == "models/UNet/last.ckpt" and str(evaluated.results) == "data/predictions/UNet"
    assert str(original.parse(EvalConfig, ["--model_path=x/last.ckpt"], "evaluate").checkpoint) == "x/last.ckpt"
    for flags, problem in (
        (["--model=UNet"], "unrecognized arguments"),
        (["--max_epochs=many"], "max_epochs: invalid int"),
        (["--model_type=Net"], "--model_type: got 'Net'; expected SegmentationCNN, UNet, FCN"),
        (["--pool_sizes=5x5"], "--pool_sizes: got '5x5'"),
        (["--devices=2"], "--devices: got 2"),
    ):
        with pytest.raises(DataError, match=problem):
            original.parse(ESDConfig, flags, "train")


@pytest.mark.row("E47")
def test_the_search_space_asks_what_the_project_asked() -> None:
    spec = spec_file.load("esd.yaml")
    asked = {parameter.name for parameter in spec.parameters}
    assert asked >= {"network.name", "lr", "batch_size", "optimizer", "network.n_encoders", "network.depth"}
    assert asked >= {"network.embedding_size", "loss.class_weights", "loss.focal"}
    assert spec.objectives[0].metric == "val_mean_iou"
    assert "val_contest_f1" in esd.metrics(esd.Config())


def test_pictures_of_predictions_name_the_four_classes(trained, tmp_path) -> None:
    assert len(TITLES) == len(figures.RGB) == 4
    assert figures.RGB[0] == (255, 0, 0) and figures.RGB[3] == (0xB2, 0x66, 0xFF)
