"""What every workload promises; a new one is found by itself."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import configuration
import workloads
from configuration import ConfigError
from search import planning, service, spec_file
from segmentation import loading, prediction, splits
from segmentation.epoch import DataError, Evaluation
from segmentation.normalisation import Normaliser
from segmentation.samples import Samples
from workloads._esd import generator as tiles

pytestmark = pytest.mark.usefixtures("own_cache")


NAMES = workloads.names()
EPOCHS = 2


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def workload(name):
    return workloads.load(name)


@dataclasses.dataclass
class Run:
    """A debug run: each epoch's metrics, and the folder of its checkpoints."""

    epochs: list[dict[str, float]]
    folder: Path

    def checkpoint(self, number):
        return self.folder / f"epoch-{number}"


def debug(workload, **values):
    return configuration.replace(workload.Config.debug(), values)


def pull(workload, config, folder=None, resume=None):
    found = []
    for epoch in workload.train(config, resume):
        found.append((epoch.number, dict(epoch.metrics)))
        if folder is not None:
            epoch.save(folder / f"epoch-{epoch.number}")
    return found


@pytest.fixture(scope="module")
def run(workload, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    found = pull(workload, debug(workload), folder)
    assert [number for number, _ in found] == list(range(1, EPOCHS + 1))
    return Run([metrics for _, metrics in found], folder)


@pytest.fixture(scope="module")
def evaluation(workload, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "made" / "if missing"
    return workload.evaluate(run.checkpoint(EPOCHS), "test", out), out


def test_all_workloads_are_found():
    assert set(NAMES) >= {"pairs", "telescope", "toy"}


def test_config_is_a_frozen_dataclass_whose_every_field_says_what_it_is(workload):
    config = workload.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert not [name for name, field in configuration.fields(workload.Config).items() if not field.help]
    assert configuration.build(workload.Config, configuration.to_values(config)) == config


def test_config_has_what_a_search_sets(workload):
    assert {"epochs", "seed"} <= configuration.fields(workload.Config).keys()
    assert workload.Config.debug().epochs == EPOCHS


@pytest.mark.row("X3")
def test_an_unknown_key_is_refused_with_the_nearest(workload):
    with pytest.raises(ConfigError, match=r"epoch: unknown key; did you mean 'epochs'"):
        configuration.build(workload.Config, {"epoch": 3})


def test_metrics_have_a_mode_and_the_first_is_no_score_of_training(workload):
    reported = workload.metrics(workload.Config.debug())
    assert set(reported.values()) <= {"max", "min"}
    assert not next(iter(reported)).startswith("train")


def test_prepare_returns_what_a_search_shows_and_keeps(workload):
    manifest = workload.prepare(debug(workload))
    assert isinstance(manifest["sha256"], str)
    assert list(manifest["samples"]) == list(splits.NAMES)
    assert isinstance(manifest["synthetic"], bool)
    assert all(isinstance(warning, str) for warning in manifest["warnings"])
    assert json.loads(json.dumps(manifest)) == manifest
    assert workload.prepare(debug(workload)) == manifest


def test_an_epoch_reports_exactly_what_was_promised(workload, run):
    promised = workload.metrics(debug(workload)).keys()
    for metrics in run.epochs:
        assert metrics.keys() == promised
        assert all(math.isfinite(score) for score in metrics.values())


@pytest.mark.row("X5")
def test_the_same_seed_gives_the_same_epochs_bit_for_bit(workload, run):
    assert [metrics for _, metrics in pull(workload, debug(workload))] == run.epochs


def test_another_seed_gives_other_epochs(workload, run):
    values = {"seed": 1, **({"noise": 0.1} if hasattr(workload.Config, "noise") else {})}
    assert [metrics for _, metrics in pull(workload, debug(workload, **values))] != run.epochs


@pytest.mark.row("X10")
def test_a_run_goes_on_from_a_checkpoint_as_if_unbroken(workload, run):
    assert pull(workload, debug(workload), resume=run.checkpoint(1)) == [(2, run.epochs[1])]


def test_a_run_that_had_ended_goes_on_when_it_is_made_longer(workload, run):
    found = pull(workload, debug(workload, epochs=EPOCHS + 1), resume=run.checkpoint(EPOCHS))
    assert [number for number, _ in found] == [EPOCHS + 1]
    assert not pull(workload, debug(workload), resume=run.checkpoint(EPOCHS))


@pytest.fixture
def sealed(monkeypatch):
    """Return a list that fills with the samples as a workload sealed them."""
    found = []
    real = Samples.seal

    def seal(samples, indices):
        found.append(real(samples, indices))
        return found[-1]

    monkeypatch.setattr(Samples, "seal", seal)
    return found


@pytest.mark.row("X7")
def test_training_cannot_open_a_test_sample_and_evaluation_can(workload, run, sealed, monkeypatch, tmp_path):
    opened = []
    real = splits.test_split_open
    monkeypatch.setattr(splits, "test_split_open", lambda: opened.append(True) or real())
    next(iter(workload.train(debug(workload))))
    if not sealed:
        pytest.skip("this workload has no samples")
    assert not opened
    test = min(sealed[0].sealed)
    with pytest.raises(splits.TestSplitError):
        sealed[0].image(test)
    workload.evaluate(run.checkpoint(EPOCHS), "test", tmp_path)
    assert opened
    assert not splits.test_split_is_open()


def test_an_evaluation_is_plain_data_with_intervals_and_details(evaluation):
    found, out = evaluation
    assert isinstance(found, Evaluation)
    assert json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert found.intervals.keys() == found.resamples.keys() <= found.metrics.keys()
    assert found.intervals
    for name, (low, high) in found.intervals.items():
        assert low <= high
        assert min(found.resamples[name]) <= low
    assert found.groups
    assert found.details["split"] == "test"
    assert all((out / figure).is_file() for figure in found.figures)


def test_the_first_metric_has_a_test_score_of_the_same_name(workload, evaluation):
    """What a search makes better is then what its leaderboard shows, without a word in the file."""
    headline = next(iter(workload.metrics(debug(workload)))).removeprefix("val_")
    assert evaluation[0].metrics[headline] is not None
    assert headline in evaluation[0].intervals


def test_evaluating_again_gives_the_same(workload, run, evaluation, tmp_path):
    again = workload.evaluate(run.checkpoint(EPOCHS), "test", tmp_path)
    assert scores(again) == scores(evaluation[0])


def scores(found):
    """Return the metrics but for the measured time, which is another each time."""
    return {name: value for name, value in found.metrics.items() if name != "latency_ms"}


def test_nothing_global_is_left_behind(workload, run):
    before = _globals()
    epochs = workload.train(debug(workload, **({"threads": 2} if hasattr(workload.Config, "threads") else {})))
    next(epochs)
    epochs.close()
    assert _globals() == before
    pull(workload, debug(workload))
    workload.evaluate(run.checkpoint(1), "validation", run.folder / "left")
    assert _globals() == before


def _globals():
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "dtype": torch.get_default_dtype(),
        "level": logging.getLogger().level,
        "test_open": splits.test_split_is_open(),
    }


@pytest.fixture
def picture(name, tmp_path):
    """Return a folder with one grey picture, which any workload should be able to read, or with what one needs."""
    folder = tmp_path / "images"
    folder.mkdir()
    if name == "esd":  # a tile is a folder of many files
        tiles.write_tile(workloads.load(name).Config.debug().data.synthetic, 1, folder / "one")
        return folder
    grey = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "one.png")
    return folder


def test_predict_writes_files_for_a_folder_and_for_a_file(name, workload, run, picture, tmp_path):
    if name == "toy":
        with pytest.raises(DataError, match="no images"):
            workload.predict(run.checkpoint(EPOCHS), picture, tmp_path / "out")
        return
    for source in (picture, next(picture.iterdir())):
        out = tmp_path / f"out-{source.name}"
        written = workload.predict(run.checkpoint(EPOCHS), source, out)
        assert written
        assert all(path.is_file() and str(path.relative_to(out)).startswith("one") for path in written)


def test_predict_names_a_folder_without_images(name, workload, run, tmp_path):
    with pytest.raises(DataError):
        workload.predict(run.checkpoint(EPOCHS), tmp_path, tmp_path / "out")


@pytest.mark.row("K42")
def test_a_prediction_is_scaled_as_training_and_evaluation_were(name, workload, picture, tmp_path, monkeypatch):
    if name == "toy":
        pytest.skip("the toy has no images")
    used, call = set(), Normaliser.__call__

    def noted(normaliser, image):
        used.add(hashlib.sha256(json.dumps(normaliser.to_dict(), sort_keys=True).encode()).hexdigest())
        return call(normaliser, image)

    monkeypatch.setattr(Normaliser, "__call__", noted)
    # A set that fits into memory may be there already, scaled by an earlier test.
    monkeypatch.setattr(loading, "_bytes", lambda samples, indices: math.inf)
    pull(workload, debug(workload, epochs=1), tmp_path)
    assert len(used) == 1, "training scales all images alike"
    trained = set(used)
    for use in (
        lambda: workload.predict(tmp_path / "epoch-1", picture, tmp_path / "out"),
        lambda: workload.evaluate(tmp_path / "epoch-1", "test", tmp_path / "evaluation"),
    ):
        used.clear()
        use()
        assert used == trained


@pytest.mark.row("K42")
def test_flips_are_averaged_in_evaluation_too(name, workload, monkeypatch, tmp_path):
    if "flips" not in configuration.fields(workload.Config):
        pytest.skip(f"{name} has no flips")
    pull(workload, debug(workload, epochs=1), tmp_path)
    checkpoint = tmp_path / "epoch-1"
    views, mean = [], prediction._mean

    def turned(model, image, sides, multilabel):
        """Return what was asked for, its classes the other way round."""
        views.append(len(sides))
        return mean(model, image, sides, multilabel).flip(1)

    monkeypatch.setattr(prediction, "_mean", turned)
    plain = workload.evaluate(checkpoint, "test", tmp_path / "without")
    assert not views
    found = workload.evaluate(checkpoint, "test", tmp_path / "with", {"flips": True})
    assert set(views) == {4}
    assert found.details["flips"] is True
    assert scores(found) != scores(plain)


def test_inspect_writes_pictures(name, workload, tmp_path):
    written = workload.inspect(debug(workload), tmp_path / "out")
    assert written
    for path in written:
        assert path.is_file()
        if path.suffix == ".png":
            with Image.open(path) as shown:
                assert len(np.unique(np.asarray(shown.convert("L")))) > 10
    assert name == "toy" or any(path.suffix == ".png" for path in written)


@pytest.mark.ray
@pytest.mark.row("X1")
def test_a_search_of_two_trials_ends_with_an_evaluated_winner(name, workload, ray_cluster, tmp_path):
    config = debug(workload)
    metric, mode = next(iter(workload.metrics(config).items()))
    fixed = configuration.to_values(config)
    lr = fixed.pop("lr")
    content = {
        "workload": name,
        "objective": {"metric": metric, "mode": mode},
        "parameters": {"lr": {"type": "float", "low": lr / 10, "high": lr, "log": True}},
        "fixed": fixed,
        "search": {"trials": 2, "sampler": "random"},
        "promotion": {"k": 1},
        "resources": {"slots": 1},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    plan = planning.make(spec_file.load(str(path)), tmp_path / "study")
    rows = service.run(plan, io.StringIO())
    winner = rows[0]
    assert winner.rank == 1
    assert winner.metric == metric.removeprefix("val_")
    assert winner.test.value is not None
    assert winner.test.low is not None and winner.test.low <= winner.test.value <= winner.test.high
    assert (plan.paths.model(winner.name)).is_dir()
    assert plan.paths.leaderboard.is_file() and plan.paths.report.is_file()


@pytest.mark.row("K38")
def test_a_profile_is_promised_and_reported(workload):
    if "profile" not in configuration.fields(workload.Config):
        pytest.skip("this workload trains no network")
    config = debug(workload, profile=True, epochs=1)
    [(_, told)] = pull(workload, config)
    shares = {name: share for name, share in told.items() if name.startswith("time_")}
    assert told.keys() == workload.metrics(config).keys() > workload.metrics(debug(workload)).keys()
    assert sum(shares.values()) == pytest.approx(100)


@pytest.mark.parametrize("several", [("a.png", "a.tif"), ("a.png", "b.png", "a.PNG")])
def test_pictures_whose_predictions_would_have_one_name_are_refused(name, workload, tmp_path, several):
    if name in ("toy", "esd"):
        pytest.skip("no suffixes: the toy has no images, and tiles are folders")
    if name == "spark":
        several = [each.replace("tif", "jpg") for each in several]
    folder = tmp_path / "images"
    folder.mkdir()
    for each in several:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / each)
    with pytest.raises(DataError, match=rf"{folder}: .*a\.\w+ and a\.\w+ would .*; rename"):
        workload.sources(folder)
    (folder / several[-1]).unlink()
    assert len(workload.sources(folder)) == len(several) - 1
