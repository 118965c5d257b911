"""Lightning is a second way to what the project's own loop does: the same numbers, the same checkpoints."""

from __future__ import annotations

import builtins
import dataclasses
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import configuration
from configuration import ConfigError
from segmentation import checkpoints, ranks, splits
from segmentation.epoch import NonFiniteError
from tests import processes
from workloads import esd
from workloads._esd import dataset, scoring

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
pytest.importorskip("greenlet", reason="greenlet is not installed")

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from workloads._esd import lightning, pulled
from workloads._esd.lightning import TileDataModule, TileModule

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    # Lightning's own, of a change in PyTorch.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
]

LIVELY = {
    "epochs": 3,
    "batch_size": 7,
    "optimizer": "sgd",
    "lr": 1e-2,
    "lr_schedule": "warmup_cosine",
    "warmup_steps": 5,
    "clip_norm": 0.5,
    "ema_decay": 0.9,
    "loss.dice": 0.5,
}


def debug(**values):
    return configuration.replace(esd.Config.debug(), values)


def by_lightning(config):
    return dataclasses.replace(config, trainer="lightning")


def told(epochs):
    return [dict(epoch.metrics) for epoch in epochs]


def same(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, abs=1e-6)


def plain_trainer(folder, **options):
    """Return a Trainer as anyone makes one, but for what it prints and starts."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(**{**quiet, "default_root_dir": folder, "enable_checkpointing": False, "max_epochs": -1, **options})


# Inside the service.


@pytest.mark.row("E4", "E43")
@pytest.mark.parametrize(
    "values",
    [
        {},
        LIVELY,
        {"lr_schedule": "plateau", "plateau_patience": 0, "plateau_factor": 0.1, "epochs": 3, "lr": 0.3},
        {"validate_every": 2, "epochs": 3, "normalise.method": "standard"},
        {"network.name": "unet", "checkpointing": True, "precision": "bf16"},
        {"patience": 1, "early_stop_metric": "val_accuracy", "min_delta": 1.0, "epochs": 5},
        {"optimizer": "adamw", "augmentation.brightness": 0.2, "rewind_epoch": 1, "deterministic": True},
    ],
)
def test_lightning_gives_the_numbers_of_the_own_loop(values):
    config = debug(**values)
    wanted = told(esd.train(config))
    found = told(esd.train(by_lightning(config)))
    same(found, wanted)
    assert wanted[0]["train_loss"] != wanted[-1]["train_loss"]


@pytest.mark.row("E4")
@pytest.mark.parametrize("values", [{}, LIVELY])
def test_each_goes_on_from_the_checkpoints_of_the_other(values, tmp_path):
    config = debug(**{"patience": 4, **values})
    ways = {"loop": config, "lightning": by_lightning(config)}
    unbroken = {}
    for name, way in ways.items():
        unbroken[name] = []
        for epoch in esd.train(way):
            unbroken[name].append(dict(epoch.metrics))
            epoch.save(tmp_path / f"{name}-{epoch.number}")
    for first in ways:
        for second in ways:
            gone_on = list(esd.train(ways[second], tmp_path / f"{first}-1"))
            assert [epoch.number for epoch in gone_on] == list(range(2, config.epochs + 1))
            same(told(gone_on), unbroken["loop"][1:])
    states = [checkpoints.load_state(tmp_path / f"{name}-2") for name in ways]
    assert states[0]["progress"] == states[1]["progress"]
    for one, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_a_run_that_had_ended_gives_no_epoch(tmp_path):
    config = by_lightning(debug(epochs=1))
    for epoch in esd.train(config):
        epoch.save(tmp_path)
    assert list(esd.train(config, tmp_path)) == []
    longer = dataclasses.replace(config, epochs=2)
    assert [epoch.number for epoch in esd.train(longer, tmp_path)] == [2]


def test_its_checkpoint_is_evaluated_and_used_as_any_other(tmp_path):
    for epoch in esd.train(by_lightning(debug())):
        epoch.save(tmp_path / "checkpoint")
        epoch.draw(tmp_path / "drawn.png")
    config, model, _ = esd.load(tmp_path / "checkpoint")
    assert config == by_lightning(debug()) and not model.training
    found = esd.evaluate(tmp_path / "checkpoint", "validation", tmp_path / "out")
    assert found.metrics["mean_iou"] == pytest.approx(epoch.metrics["val_mean_iou"])
    assert (tmp_path / "drawn.png").is_file()
    meta = checkpoints.read_meta(tmp_path / "checkpoint")
    assert meta["metrics"] == epoch.metrics and meta["stop_reason"] == "finished: 2 epochs"
    with pytest.raises(RuntimeError, match="epoch 2 is over"):
        epoch.save(tmp_path / "late")


def surroundings():
    return {
        "signals": [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "threads": threading.active_count(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "settings": (torch.get_num_threads(), torch.backends.cudnn.benchmark),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "levels": [logging.getLogger(name).level for name in ("", *lightning.LOGGERS)],
        "warnings": list(warnings.filters),
        "test_open": splits.test_split_is_open(),
        "environment": dict(os.environ),
    }


@pytest.mark.row("E37")
def test_nothing_is_left_behind_or_said_or_written(tmp_path, monkeypatch, capfd, sigterm_as_before):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    config = by_lightning(debug())
    before = surroundings()
    epochs = esd.train(config)
    next(epochs)
    during = surroundings()
    assert during | {"settings": before["settings"]} == before, "a run's settings are its own, whatever makes its steps"
    module = next(each for each in gc_modules() if each.loop is not None and not each.loop.closed)
    epochs.close()
    assert surroundings() == before
    assert module.loop.closed and module._trainer.state.status == "interrupted"
    list(esd.train(config))
    assert surroundings() == before
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def gc_modules():
    import gc

    return [each for each in gc.get_objects() if type(each) is TileModule]


def test_two_runs_can_be_pulled_by_turns():
    configs = [by_lightning(debug(seed=seed)) for seed in (0, 1)]
    wanted = [told(esd.train(config)) for config in configs]
    turns = list(zip(*(esd.train(config) for config in configs), strict=True))
    assert [told(run) for run in zip(*turns, strict=True)] == wanted


def test_an_error_comes_out_as_it_is():
    with pytest.raises(NonFiniteError, match=r"epoch 1 step \d+: loss is (nan|inf)"):
        list(esd.train(by_lightning(debug(optimizer="sgd", lr=1e30, epochs=9))))


def test_an_interrupt_is_an_interrupt_and_the_next_one_is_heard(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    heard = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TileModule, "on_train_batch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(esd.train(by_lightning(debug())))
    assert signal.getsignal(signal.SIGINT) is heard


def test_what_is_pulled_rests_and_ends_with_its_puller():
    done = []

    def work(give):
        try:
            for number in range(3):
                done.append(number)
                give(number)
        finally:
            done.append("over")

    assert list(pulled.pull(work)) == [0, 1, 2]
    assert done == [0, 1, 2, "over"]
    done.clear()
    numbers = pulled.pull(work)
    assert next(numbers) == 0 and done == [0]
    numbers.close()
    assert done == [0, "over"]
    assert list(pulled.pull(lambda give: None)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch": 2}, r"micro_batch: got 2 with trainer lightning; write micro_batch: 0, or trainer: loop"),
        ({"on_oom": "accumulate"}, r"on_oom: got accumulate with trainer lightning"),
        ({"profile": True}, r"profile: got True with trainer lightning"),
        ({"strategy": "fsdp"}, r"strategy: got fsdp with trainer lightning; write ddp"),
        ({"strategy": "deepspeed"}, r"strategy: got deepspeed with trainer lightning"),
    ],
)
def test_what_lightning_does_not_do_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        debug(trainer="lightning", **values)
    with pytest.raises(ValueError, match=message):
        TileDataModule(debug(**values))


def test_without_the_packages_the_extra_is_named_and_nothing_else_breaks(monkeypatch):
    config = by_lightning(debug())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "greenlet" else find(name))
    message = r"trainer: got lightning, but greenlet not installed; pip install 'segmentation-search\[lightning\]'"
    with pytest.raises(ValueError, match=message):
        esd.prepare(config)
    with pytest.raises(ValueError, match=message):
        list(esd.train(config))
    assert esd.prepare(debug())["samples"]


def test_the_module_names_the_extra_where_lightning_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="pytorch_lightning")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "workloads._esd.lightning")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pytorch_lightning not installed; .*search\[lightning\]"):
        importlib.import_module("workloads._esd.lightning")


# Several processes.


@pytest.mark.row("E4")
def test_two_processes_train_as_those_of_the_own_loop(tmp_path):
    """Nothing comes out even: 64 images to train on, 14 in a step; 16 to validate, 6 in a pass."""
    _, made = dataset.load_once(debug().data)
    assert (len(made.train), len(made.validation)) == (64, 16)
    values = {**LIVELY, "strategy": "ddp", "patience": 9, "evaluation_batch": 3}
    processes.ranks(_rank, str(tmp_path), os.environ["SEGMENTATION_CACHE"], values)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first == second
    same(first["lightning"], first["loop"])
    assert not (tmp_path / "checkpoint-1").exists()
    meta = checkpoints.read_meta(tmp_path / "checkpoint-0")
    assert (meta["world_size"], meta["effective_batch"]) == (2, 14)
    [gone_on] = esd.train(debug(**values, trainer="lightning"), tmp_path / "checkpoint-0")
    assert gone_on.number == 3


def _rank(number, folder, cache, values):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["SEGMENTATION_CACHE"] = cache
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    found = {"loop": told(esd.train(debug(**values))), "lightning": []}
    for epoch in esd.train(debug(**values, trainer="lightning")):
        found["lightning"].append(dict(epoch.metrics))
        if epoch.number == 2:
            epoch.save(Path(folder, f"checkpoint-{number}"))
    assert ranks.place() == (number, 2), "the group is as it was"
    Path(folder, f"{number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# A Trainer of one's own.


@pytest.mark.row("E43")
def test_the_four_methods_are_those_of_a_lightning_module():
    config = debug()
    module, data = TileModule(config), TileDataModule(config)
    data.prepare_data()
    data.setup("fit")
    image, mask, index = batch = next(iter(data.train_dataloader()))
    assert image.shape == (8, 99, 16, 16) and mask.shape == (8, 4, 4) and index.shape == (8,)
    logits = module(image)
    assert logits.shape == (8, 4, 4, 4) and logits.min() < 0
    loss = module.training_step(batch, 0)
    assert loss.shape == () and loss.requires_grad
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.on_validation_epoch_start()
    module.eval()
    with torch.no_grad():
        for number, one in enumerate(data.val_dataloader()):
            module.validation_step(one, number)
    found = scoring.epoch_scores(module._scorer.whole())
    assert found.keys() == {name for name in esd.metrics(config) if name.startswith("val_")}
    for name in ("forward", "training_step", "validation_step", "configure_optimizers"):
        assert name in vars(TileModule)


@pytest.mark.row("E4", "E38", "E43")
@pytest.mark.parametrize("values", [{}, LIVELY])
def test_a_plain_trainer_fits_and_logs_what_the_workload_reports(values, tmp_path):
    config = debug(**values)
    module = TileModule(config)
    trainer = plain_trainer(tmp_path)
    trainer.fit(module, TileDataModule(config))
    wanted = told(esd.train(config))
    assert trainer.callback_metrics.keys() == esd.metrics(config).keys()
    same([{name: float(value) for name, value in trainer.callback_metrics.items()}], wanted[-1:])
    same(module.loop.progress.history, wanted)
    assert trainer.current_epoch == config.epochs, "the configuration's epochs end it"


@pytest.mark.row("E38")
def test_auroc_is_of_all_cells_at_once_and_no_mean_over_batches(tmp_path):
    found = []
    for size in (1, 3, 16):
        config = debug(evaluation_batch=size)
        trainer = plain_trainer(tmp_path)
        [scores] = trainer.validate(TileModule(config), TileDataModule(config), verbose=False)
        assert all(name.startswith("val_") for name in scores)
        found.append(scores)
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-3)
    assert 0 < found[0]["val_mean_auroc"] < 1


@pytest.mark.row("E36", "E37")
def test_best_and_last_are_kept_and_the_learning_rate_is_logged(tmp_path):
    config = debug(**{**LIVELY, "epochs": 4, "lr": 0.05})
    log = CSVLogger(tmp_path, name="", version="")
    trainer = lightning.trainer(config, tmp_path / "models", logger=log, monitor="val_loss")
    assert not sys.stderr.isatty() and trainer.progress_bar_callback is None
    kinds = {type(callback) for callback in trainer.callbacks}
    assert kinds >= {lightning.Best, ModelCheckpoint, LearningRateMonitor, ModelSummary}
    module = TileModule(config)
    trainer.fit(module, TileDataModule(config))
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["best.ckpt", "last.ckpt"]
    history = module.loop.progress.history
    kept = {name: torch.load(tmp_path / "models" / f"{name}.ckpt", weights_only=True) for name in ("best", "last")}
    best = min(range(4), key=lambda number: history[number]["val_loss"])
    assert [kept[name][lightning.KEPT]["progress"]["epoch"] for name in ("best", "last")] == [best + 1, 4]
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"lr", "lr-SGD", "val_mean_iou"} <= set(header.split(","))
    column = header.split(",").index("lr")
    logged = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert logged == pytest.approx([told["lr"] for told in history])


@pytest.mark.row("E37")
def test_a_terminal_is_shown_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert lightning.trainer(debug(), tmp_path).progress_bar_callback is not None


@pytest.mark.row("E36")
@pytest.mark.parametrize("monitor", ["core_values/val_loss", "average ACC", "mean_iou"])
def test_a_monitor_that_is_never_logged_is_refused_with_the_names_there_are(monitor, tmp_path):
    with pytest.raises(ConfigError, match=rf"monitors '{monitor}', which is never logged; .* val_mean_iou, .*val_loss"):
        lightning.trainer(debug(), tmp_path, monitor=monitor)
    for callback in (ModelCheckpoint(tmp_path, monitor=monitor), EarlyStopping(monitor)):
        trainer = plain_trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
        with pytest.raises(ConfigError, match=rf"{type(callback).__name__}: monitors '{monitor}'"):
            trainer.fit(TileModule(debug()), TileDataModule(debug()))


@pytest.mark.row("E36")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("values", [{}, LIVELY])
def test_a_ckpt_goes_on_by_itself_and_becomes_a_checkpoint_folder(values, tmp_path):
    config = debug(**{"patience": 9, "rewind_epoch": 1, **values, "epochs": 3})
    wanted = told(esd.train(config))
    broken = lightning.trainer(config, tmp_path, max_epochs=2)
    broken.fit(TileModule(config), TileDataModule(config))
    folder = lightning.to_folder(tmp_path / "last.ckpt", tmp_path / "folder")
    module = TileModule(config)
    trainer = lightning.trainer(config, tmp_path)
    trainer.fit(module, TileDataModule(config), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.current_epoch == 3
    same(module.loop.progress.history, wanted)
    same(told(esd.train(config, folder)), wanted[2:])
    found = esd.evaluate(folder, "test", tmp_path / "out")
    assert found.metrics["mean_iou"] is not None
    assert checkpoints.load_rewind(folder)
    assert checkpoints.read_meta(folder)["metrics"] == pytest.approx(wanted[1])


def test_a_module_comes_back_from_its_file_without_data(tmp_path, monkeypatch):
    config = debug(**LIVELY)
    module = TileModule(config)
    lightning.trainer(config, tmp_path).fit(module, TileDataModule(config))
    monkeypatch.setattr(dataset, "load_once", lambda data: pytest.fail("data was asked for"))
    loaded = TileModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.config == by_lightning(config)
    image = torch.rand(2, 99, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(image), module.loop.average.eval()(image)), "the average is what is kept"
        assert not torch.equal(loaded(image), module.eval()(image))


def test_a_module_that_came_back_learns_anew(tmp_path):
    config = debug()
    lightning.trainer(config, tmp_path / "first").fit(TileModule(config), TileDataModule(config))
    module = TileModule.load_from_checkpoint(tmp_path / "first" / "last.ckpt")
    lightning.trainer(config, tmp_path / "second").fit(module, TileDataModule(config))
    found = module.loop.progress.history
    assert len(found) == 2 and found[0]["train_loss"] < told(esd.train(config))[0]["train_loss"]


@pytest.mark.row("E36")
def test_the_best_is_one_that_was_validated(tmp_path):
    config = debug(epochs=5, validate_every=2)
    module = TileModule(config)
    lightning.trainer(config, tmp_path, monitor="val_loss").fit(module, TileDataModule(config))
    history = module.loop.progress.history
    scores = {number: each["val_loss"] for number, each in enumerate(history, start=1) if "val_loss" in each}
    assert scores.keys() == {2, 4, 5}
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)[lightning.KEPT]["progress"]["epoch"]
    assert best == min(scores, key=scores.get)


def test_a_file_that_says_too_little_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match=r"other\.ckpt: tells too little of itself"):
        lightning.to_folder(tmp_path / "other.ckpt", tmp_path / "folder")


def test_two_norms_to_clip_by_are_refused(tmp_path):
    config = debug(clip_norm=1.0)
    with pytest.raises(ValueError, match=r"gradient_clip_val: got 0\.5 .* clip_norm 1\.0; give one"):
        plain_trainer(tmp_path, gradient_clip_val=0.5).fit(TileModule(config), TileDataModule(config))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_gradients_are_clipped_in_true_units_where_losses_are_scaled(optimizer, tmp_path):
    """Lightning refuses to clip for fused optimisers, which take scales off by themselves."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    config = debug(optimizer=optimizer, clip_norm=1e-3, batch_size=2, epochs=1)
    norms = []
    for plugins in ([MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))], []):
        module = TileModule(config)
        trainer = plain_trainer(tmp_path, plugins=plugins, limit_train_batches=1, limit_val_batches=0)
        trainer.fit(module, TileDataModule(config))
        norms.append(module.metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.05) and norms[1] > 0.1


# The data.


def test_batches_are_those_of_the_own_loop_and_change_with_the_epoch():
    config = debug()
    data = TileDataModule(config)
    data.setup()
    theirs = list(data.train_dataloader())
    ours = list(esd.parts(config).train_batches(1))
    assert len(theirs) == len(ours) == len(data.train_dataloader())
    for one, other in zip(theirs, ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    data.trainer = type("At", (), {"current_epoch": 1, "strategy": type("On", (), {"root_device": "cpu"})})
    assert [batch[2].tolist() for batch in data.train_dataloader()] == [
        batch[2].tolist() for batch in esd.parts(config).train_batches(2)
    ]


@pytest.mark.row("E25")
def test_validation_is_never_augmented_and_training_is():
    plain = {f"augmentation.{name}": 0.0 for name in ("horizontal_flip", "vertical_flip", "rotate90")}
    data, plain = TileDataModule(debug()), TileDataModule(debug(**plain))
    for each in (data, plain):
        each.setup()
    passes = [list(data.val_dataloader()), list(data.val_dataloader()), list(plain.val_dataloader())]
    for batches in zip(*passes, strict=True):
        assert all(torch.equal(batches[0][0], other[0]) for other in batches[1:])
    (image, mask, _), (flat, truth, _) = next(iter(data.train_dataloader())), next(iter(plain.train_dataloader()))
    assert not torch.equal(image, flat) and not torch.equal(mask, truth)


@pytest.mark.row("X7")
def test_the_test_split_is_shut_but_for_who_opens_it(tmp_path):
    config = debug()
    module, data = TileModule(config), TileDataModule(config)
    trainer = plain_trainer(tmp_path)
    with pytest.raises(splits.TestSplitError):
        trainer.test(module, data, verbose=False)
    with splits.test_split_open():
        [scores] = plain_trainer(tmp_path).test(module, data, verbose=False)
    assert scores.keys() == {f"test_{name}" for name in (*scoring.names(), "loss")}


# Weights & Biases, and Ray.


@pytest.mark.row("E5")
def test_a_logger_of_wandb_has_the_team_and_the_project(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    made = lightning.wandb_logger(tmp_path / "logs", project="dse", entity="grss", name="first")
    assert isinstance(made, WandbLogger)
    asked = made._wandb_init
    assert (asked["project"], asked["entity"], asked["name"]) == ("dse", "grss", "first")
    assert made._offline
    assert lightning.wandb_logger(tmp_path, project="dse", mode="online")._offline is False


@pytest.mark.slow
@pytest.mark.row("E5")
def test_wandb_offline_receives_what_a_run_logs(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" + "0" * 33)
    made = lightning.wandb_logger(tmp_path, project="dse", entity="grss")
    config = debug()
    trainer = lightning.trainer(config, tmp_path / "models", logger=made)
    trainer.fit(TileModule(config), TileDataModule(config))
    wandb.finish()
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    content = next(run.glob("*.wandb")).read_bytes()
    assert b"val_mean_iou" in content and b"lr-Adam" in content and b"embedding_size" in content
    assert b"grss" in content
    assert not any(b"hunter2" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, about itself
@pytest.mark.row("E4")
def test_it_fits_under_rays_own_integration(ray_cluster, tmp_path):
    from pytorch_lightning.strategies import DDPStrategy
    from ray.train import RunConfig, ScalingConfig
    from ray.train.lightning import RayDDPStrategy
    from ray.train.torch import TorchTrainer

    assert issubclass(RayDDPStrategy, DDPStrategy), "of the package lightning, which is another one"
    cache = os.environ["SEGMENTATION_CACHE"]
    values = {"epochs": 1, "batch_size": 4}
    result = TorchTrainer(
        _fit_under_ray,
        train_loop_config={"values": values, "cache": cache, "folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(tmp_path / "results"), name="tiles"),
    ).fit()
    [wanted] = told(esd.train(debug(**{**values, "batch_size": 8})))
    assert result.metrics.keys() >= wanted.keys()
    # Each rank augments and normalises its own share, so that the numbers are only nearly those of one process.
    assert result.metrics["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.05)
    assert result.metrics["world_size"] == 2
    with result.checkpoint.as_directory() as folder:
        made = lightning.to_folder(Path(folder, "checkpoint.ckpt"), tmp_path / "folder")
    assert checkpoints.read_meta(made)["effective_batch"] == 8
    assert math.isfinite(esd.evaluate(made, "test", tmp_path / "out").metrics["mean_iou"])


def _fit_under_ray(arguments):
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    torch.set_num_threads(1)
    os.environ["SEGMENTATION_CACHE"] = arguments["cache"]
    config = debug(**arguments["values"])
    trainer = Trainer(
        devices="auto",
        accelerator="cpu",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        default_root_dir=arguments["folder"],
    )
    module = TileModule(config)
    module.on_train_start = lambda: module.log("world_size", float(trainer.world_size))
    prepare_trainer(trainer).fit(module, TileDataModule(config))
