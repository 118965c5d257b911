"""Configuration files of the original pruning system load as they are; folders are named as there."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configuration
from configuration import ConfigError
from search.spec import Tracking
from segmentation.networks import Network
from segmentation.pruning import PlanError, Prune
from workloads import __main__ as command
from workloads import acdc
from workloads._acdc import original

STORED = """
experiment: {experiment_name: exp41, model_name: UNet_ACDC, seed: 7, device: cuda}
train:
  phase: training
  val_ratio: 0.25
  batch_size: 16
  num_slices_per_volume: null
  model: {in_channels: 1, out_channels: 4, features: [8, 16, 24]}
  parameters: {learning_rate: 0.0009, num_epochs: 5, save_interval: 4, loss_function: ce_dice}
  paths: {train_dir: /data/set/imagesTr, label_dir: /data/set/labelsTr, save_root: results}
evaluation:
  phase: baseline_evaluation
  batch_size: 2
  num_slices_per_volume: null
  num_visuals: 3
  paths: {eval_dir: /data/set/imagesTs, label_dir: /data/set/labelsTs, save_root: results}
pruning:
  method: l1_norm
  reinitialize_weights: null # null, "random" or "rewind"
  ckpt_path: {subfolder: baseline, ckpt_name: final_model.pth}
  save_path: {subfolder: pruned, filename: pruned_model.pth}
  ratios:
    default: 0.25
    block_ratios:
      encoders.0: 0.0
      encoders.1: 0.1
      bottleneck: 0.3
      decoders.5: 0.125
"""
README = """
model:
  in_channels: 1
  out_channels: 4

training:
  batch_size: 8
  learning_rate: 1e-3
  num_epochs: 40

pruning:
  block_ratios:
    encoders.1: 0.1
    decoders.3: 0.3
  reinitialize_weights: rewind

logging:
  use_wandb: true
  project: "basic_unet_pruning"
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, sigterm_as_before):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "cache"))


def load(text: str, old: str = "", new: str = "") -> original.Original:
    assert old in text
    path = Path("config.yaml")
    path.write_text(text.replace(old, new, 1))
    return original.read(path, acdc.Config)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """As much of a prunable Config as a folder's name is made of."""

    network: Network = field(default_factory=Network)
    prune: Prune = field(default_factory=Prune)


@pytest.mark.row("P24")
def test_the_stored_form_becomes_a_config():
    told = load(STORED)
    config = configuration.build(acdc.Config, original.resolved(told, {}))
    assert (config.seed, config.device, config.batch_size, config.evaluation_batch) == (7, "auto", 16, 2)
    assert (config.lr, config.epochs, config.rewind_epoch, config.loss_function) == (0.0009, 5, 4, "ce_dice")
    assert (config.network.name, config.network.widths, config.network.bottleneck) == ("unet", (8, 16, 24), 0)
    assert (config.data.root, config.data.classes, config.data.in_channels) == ("/data/set", 4, 1)
    assert config.data.slices_per_volume is None
    assert config.data.fractions == pytest.approx((0.6, 0.2, 0.2))
    assert config.augmentation == acdc.Config.reference().augmentation  # what the file does not say
    assert (told.experiment, told.root, told.tracking) == ("exp41", Path("results"), {})
    prune = configuration.build(Pruned, told.prune).prune
    assert prune == Prune(
        default=0.25, blocks={"encoders.0": 0, "encoders.1": 0.1, "bottleneck": 0.3, "decoders.5": 0.125}
    )


@pytest.mark.row("P24", "P30")
def test_the_form_of_the_readme_loads_unchanged_with_its_number_that_yaml_takes_for_text():
    told = load(README)
    config = configuration.build(acdc.Config, original.resolved(told, {}))
    assert (config.batch_size, config.lr, config.epochs, config.rewind_epoch) == (8, 0.001, 40, 5)
    assert config.network == acdc.Config.reference().network
    prune = configuration.build(Pruned, told.prune).prune
    assert prune == Prune(mode="rewind", blocks={"encoders.1": 0.1, "decoders.3": 0.3})
    assert told.tracking == {"wandb": "online", "project": "basic_unet_pruning"}
    assert configuration.build(Tracking, told.tracking) == Tracking(wandb="online", project="basic_unet_pruning")
    assert load(README, "true", "false").tracking == {}


@pytest.mark.row("P24")
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("batch_size: 16", "batchsize: 16", "train.batchsize: unknown key; did you mean 'train.batch_size'"),
        ("0.0009", "fast", "train.parameters.learning_rate: got 'fast'; expected number"),
        ("l1_norm", "taylor", "pruning.method: got 'taylor'; expected one of l1_norm"),
        ("weights: null", "weights: again", "pruning.reinitialize_weights: got 'again'; expected null, none, random"),
        ("set/imagesTr", "set/images", "train.paths.train_dir: got '/data/set/images'; expected the folder imagesTr"),
        ("set/imagesTs", "other/imagesTs", "'/data/other/imagesTs', but train.paths.train_dir says '/data/set'"),
        ("val_ratio: 0.25", "val_ratio: 20", "train.val_ratio: got 20; expected a number between 0 and 1"),
        ("exp41", "../exp", "experiment.experiment_name: got '../exp'; expected the name of one folder"),
        ("save_interval: 4", "save_interval: 0", "train.parameters.save_interval: got 0"),
        ("batch_size: 2\n  num_slices_per_volume: null", "num_slices_per_volume: 3", "got 3, but training has None"),
        ("features: [8, 16, 24]", "features: [8], enc_features: [9]", "got [9], but train.model.features says [8]"),
    ],
)
def test_what_cannot_be_is_refused_by_file_and_key(old, new, problem):
    with pytest.raises(ConfigError) as caught:
        load(STORED, old, new)
    assert str(caught.value).startswith("config.yaml: ") and problem in str(caught.value)


@pytest.mark.row("P25")
def test_values_given_beside_the_file_win_and_pruning_counts_where_there_is_a_parent():
    told = load(README)
    assert not any(key.startswith("prune.") for key in original.resolved(told, {"epochs": 3}))
    assert original.resolved(told, {"epochs": 3})["rewind_epoch"] == 0  # epoch 5 never comes
    found = original.resolved(told, {"epochs": 7, "lr": 0.5, "parent": "p", "prune.encoders.1": 0.4})
    assert (found["epochs"], found["lr"], found["batch_size"], found["rewind_epoch"]) == (7, 0.5, 8, 5)
    assert (found["prune.encoders.1"], found["prune.decoders.3"], found["prune.mode"]) == (0.4, 0.3, "rewind")


@pytest.mark.row("P31")
def test_both_names_of_the_mode_give_the_same_and_none_is_null(monkeypatch):
    told = load(STORED)
    found = {
        (flag, text): original.resolved(told, {"parent": "p"}, command._parse(["train", "acdc", flag, text]).mode)
        for flag in ("--mode", "--reinitialize_weights")
        for text in ("none", "null", "rewind", "random")
    }
    assert {text: values["prune.mode"] for (_, text), values in found.items()} == {
        **{"none": "none", "null": "none"},
        **{"rewind": "rewind", "random": "random"},
    }
    for text in ("none", "null", "rewind", "random"):
        assert found["--mode", text] == found["--reinitialize_weights", text]
    assert found["--mode", "none"] == found["--mode", "null"] == original.resolved(told, {"parent": "p"})
    with pytest.raises(ConfigError, match="--mode: is about a trained network that is pruned"):
        original.resolved(told, {}, "rewind")


@pytest.mark.row("P26")
def test_the_suffix_of_the_originals_experiment_is_made_and_read_back():
    ratios = dict(zip(original._blocks(4), (0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.2, 0.1), strict=True))
    made = Prune(blocks=ratios, mode="rewind")
    assert original.suffix(made, 4) == "l1_norm_0_10_20_30_30_30_30_20_10_rewind"
    assert original.parse("l1_norm_0_10_20_30_30_30_30_20_10_rewind") == made
    assert original.name_of(Pruned(network=Network(depth=4), prune=made)) == original.suffix(made, 4)
    assert original.name_of(Pruned()) == original.name_of(SimpleNamespace()) == "baseline"
    assert original.name_of(Pruned(prune=Prune(global_=0.3))) == "pruned"
    with pytest.raises(PlanError, match=r"decoders\.9: no block"):
        original.suffix(Prune(blocks={"decoders.9": 0.1}), 4)


@pytest.mark.row("P26")
@given(
    percent=st.lists(st.integers(0, 999).map(lambda tenths: tenths / 1000), min_size=1, max_size=6),
    middle=st.integers(0, 99),
    mode=st.sampled_from(["none", "random", "rewind"]),
    importance=st.sampled_from(["l1", "l2", "pearson", "cosine", "bn_scale", "random"]),
)
def test_every_suffix_is_read_back_as_it_was_made(percent, middle, mode, importance):
    levels = len(percent)
    ratios = [*percent, middle / 100, *reversed(percent)]
    made = Prune(blocks=dict(zip(original._blocks(levels), ratios, strict=True)), mode=mode, importance=importance)
    name = original.suffix(made, levels)
    again = original.parse(name)
    assert (again.mode, again.importance) == (mode, importance)
    assert dict(again.blocks) == pytest.approx(dict(made.blocks))
    assert original.suffix(again, levels) == name


@pytest.mark.parametrize("name", ["baseline", "l1_norm_10_20_rewind", "l1_norm_10_20_30", "10_20_30_none"])
def test_another_folders_name_is_no_suffix(name):
    with pytest.raises(ValueError, match="expected a name such as l1_norm"):
        original.parse(name)


@pytest.mark.row("P26")
def test_folders_of_runs_that_begin_together_are_all_different():
    told = load(STORED)
    with ThreadPoolExecutor(8) as pool:
        now = lambda: datetime(2025, 3, 1, 12, 30, 15)  # noqa: E731
        folders = list(pool.map(lambda _: original.run_folder(told, "baseline", now), range(24)))
    assert len(set(folders)) == 24
    assert Path("results/exp41/20250301-123015/baseline") in folders
    assert all(folder.parent.is_dir() and folder.parent.parent == Path("results/exp41") for folder in folders)


TINY = (
    *("data.root=''", "data.size=32", "data.synthetic.patients=6", "data.synthetic.slices=2"),
    *("data.synthetic.size=32", "threads=1", "batch_size=8"),
)


def train(*words, values=TINY):
    line = ["train", "acdc", "--config", "config.yaml", *words]
    return command.main([*line, *(word for value in values for word in ("--set", value))])


@pytest.mark.row("P24", "P25", "P26")
def test_a_run_from_a_file_leaves_the_file_alone_and_records_it(capsys):
    load(STORED)
    before = hashlib.sha256(Path("config.yaml").read_bytes()).hexdigest()
    assert train(values=(*TINY, "epochs=1", "lr=0.01", "network.widths=[2, 4]")) == 0
    best = Path(capsys.readouterr().out.strip())
    assert best.name == "best" and best.parent.name == "baseline" and best.parts[:2] == ("results", "exp41")
    datetime.strptime(best.parts[2], original.SECONDS)
    record = json.loads((best.parent / "run.json").read_text())
    assert (record["config"]["epochs"], record["config"]["lr"], record["config"]["seed"]) == (1, 0.01, 7)
    assert record["config"]["network.widths"] == [2, 4]
    assert record["source"]["sha256"] == hashlib.sha256(Path("config.yaml").read_bytes()).hexdigest() == before
    assert record["source"]["changes"]["epochs"] == 1
    # A run that goes on keeps what it came from.
    assert command.main(["train", "acdc", "--resume", "--out", str(best.parent), "--set", "epochs=2"]) == 0
    again = json.loads((best.parent / "run.json").read_text())
    assert (again["source"], again["config"]["epochs"]) == (record["source"], 2)


@pytest.mark.parametrize(
    ("words", "values", "problem"),
    [
        (("--resume",), TINY, "a run that goes on has its values with it"),
        (("--mode", "rewind"), TINY, "--mode: is about a trained network that is pruned"),
        ((), (*TINY, "epochs=0"), "epochs: got 0"),
        ((), (), "/data/set: no such folder"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(words, values, problem, capsys):
    load(STORED)
    assert train(*words, values=values) == 2
    assert problem in capsys.readouterr().err
    assert not list(Path().glob("results/*/*"))


def test_a_value_of_the_file_that_the_config_refuses_names_the_file(capsys):
    load(STORED, "num_epochs: 5", "num_epochs: 0")
    assert train() == 2
    assert "config.yaml: epochs: got 0" in capsys.readouterr().err


def test_other_workloads_read_no_such_file_and_the_mode_belongs_to_one(capsys):
    load(STORED)
    assert command.main(["train", "toy", "--config", "config.yaml"]) == 2
    assert "toy reads no other system's files" in capsys.readouterr().err
    assert command.main(["train", "toy", "--mode", "rewind"]) == 2
    assert "--mode: belongs to --config FILE" in capsys.readouterr().err
