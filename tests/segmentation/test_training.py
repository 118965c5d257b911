"""The epoch loop: same seed, same losses; a resumed run equals an unbroken one; it ends when and how it should."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import configuration
from segmentation import checkpoints, training
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import NonFiniteError
from segmentation.losses import Loss, build
from segmentation.networks.tinyunet import TinyUNet
from segmentation.timing import Clock
from segmentation.training import Progress, TrainingConfig, fit, learning_rate, note, seed_everything, stop_reason

torch.set_num_threads(1)
QUICK = TrainingConfig(epochs=4, batch_size=4, deterministic=True, device="cpu")


def squares(count=8, size=16):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, 1, size, size, generator=generator)
    return image, (image[:, 0] > 0.5).long()


def batches(epoch, batch_size=4, fail_at=None):
    image, mask = squares()
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(epoch))
    for step, index in enumerate(order.split(batch_size), 1):
        yield image[index] * (math.nan if fail_at == (epoch, step) else 1.0), mask[index], index


def validate(model):
    image, mask = squares()
    logits = model(image)
    return {
        "val_loss": F.cross_entropy(logits, mask).item(),
        "accuracy": (logits.argmax(1) == mask).float().mean().item(),
    }


def run(config, resume=None, validate=validate, train_batches=batches, **options):
    seed_everything(config.seed)
    model = TinyUNet(1, 2, 4, dropout=0.2)
    loss = build(Loss(), multilabel=False)
    data = {"train_batches": train_batches, "validate": validate, "meta": {"workload": "test"}}
    return fit(config, model=model, loss=loss, resume=resume, **data, **options)


def losses(epochs):
    return [dict(epoch.metrics) for epoch in epochs]


def scripted(values):
    """Return a `validate` that reports these losses one after another."""
    left = iter(values)
    return lambda model: {"val_loss": next(left)}


@pytest.mark.row("X5")
def test_same_seed_gives_bit_identical_losses_and_another_seed_others():
    first, second = losses(run(QUICK)), losses(run(QUICK))
    assert first == second
    assert first != losses(run(replace(QUICK, seed=1)))


@pytest.mark.row("X5")
def test_what_happens_between_epochs_changes_nothing():
    disturbed = []
    for epoch in run(QUICK):
        disturbed.append(dict(epoch.metrics))
        torch.rand(7), np.random.rand(), random.random()
        next(run(replace(QUICK, seed=9)))
    assert disturbed == losses(run(QUICK))


@pytest.mark.row("X5")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
def test_every_optimizer_learns(optimizer):
    lr = {"rmsprop": 0.003, "sgd": 0.1}.get(optimizer, 0.01)
    values = [metrics["train_loss"] for metrics in losses(run(replace(QUICK, optimizer=optimizer, lr=lr, epochs=5)))]
    assert values[-1] < values[0] - 0.05


@pytest.mark.row("X10")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "clip_norm": 0.5, "optimizer": "adamw"},
        {"lr_schedule": "plateau", "plateau_patience": 0, "patience": 3, "min_delta": 10.0, "epochs": 6},
        {"lr_schedule": "onecycle", "optimizer": "sgd", "precision": "bf16"},
        {"optimizer": "rmsprop", "lr_schedule": "restarts", "restart_epochs": 1, "lr_min": 1e-5},
    ],
    ids=["plain", "ema", "plateau", "bf16", "restarts"],
)
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, changes, at):
    config = replace(QUICK, **changes)
    whole = losses(run(config, steps_per_epoch=2))
    broken = run(config, steps_per_epoch=2)
    for epoch in broken:
        if epoch.number == at:
            epoch.save(tmp_path)
            break
    broken.close()
    torch.rand(3)
    assert losses(run(config, resume=tmp_path, steps_per_epoch=2)) == whole[at:]


@pytest.mark.row("X10")
def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    for name, start in (("whole", None), ("resumed", tmp_path / "second")):
        for epoch in run(replace(QUICK, ema_decay=0.8), resume=start):
            epoch.save(tmp_path / name)
            if start is None and epoch.number == 2:
                epoch.save(tmp_path / "second")
    assert checkpoints.digest(tmp_path / "whole") == checkpoints.digest(tmp_path / "resumed")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    epochs = run(QUICK)
    next(epochs).save(tmp_path)
    other = fit(
        QUICK,
        model=TinyUNet(1, 3, 4),
        loss=build(Loss(), multilabel=False),
        train_batches=batches,
        validate=validate,
        meta={},
        resume=tmp_path,
    )
    with pytest.raises(CheckpointError, match=r"outc\.weight"):
        next(other)


@pytest.mark.row("P55")
def test_train_loss_is_the_mean_over_images_not_batches():
    def constant(epoch):
        image, mask = squares(5)
        yield image[:4], mask[:4], torch.arange(4)
        yield image[4:], mask[4:], torch.arange(4, 5)

    values = iter([torch.tensor(1.0), torch.tensor(6.0)])
    model = TinyUNet(1, 2, 4)

    def loss(logits, mask):
        return next(values) + 0 * logits.sum()

    epoch = next(fit(QUICK, model=model, loss=loss, train_batches=constant, validate=lambda model: {}, meta={}))
    assert epoch.metrics["train_loss"] == pytest.approx((4 * 1 + 6) / 5)
    assert epoch.metrics["train_loss_std"] == pytest.approx(2.5), "over the two batches, 1 and 6"


@pytest.mark.row("P55")
def test_peak_memory_is_reported_on_a_gpu_alone(monkeypatch):
    assert training.PEAK not in next(run(QUICK)).metrics
    assert training.PEAK not in training.reported(QUICK)
    assert training.PEAK in training.reported(replace(QUICK, device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training.PEAK in training.reported(replace(QUICK, device="auto"))


@pytest.mark.gpu
@pytest.mark.row("P55")
def test_peak_memory_of_an_epoch_is_that_of_the_epoch():
    hog = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    del hog
    epoch = next(run(replace(QUICK, device="cuda")))
    assert epoch.metrics.keys() == {*training.reported(replace(QUICK, device="cuda")), "val_loss", "accuracy"}
    assert 0 < epoch.metrics[training.PEAK] < 256


@pytest.mark.row("P4")
@pytest.mark.parametrize("schedule", ["plateau", "cosine", "poly", "onecycle", "warmup_cosine", "restarts", "none"])
def test_every_schedule_changes_the_learning_rate_that_is_reported(schedule):
    config = replace(QUICK, lr_schedule=schedule, plateau_patience=0, epochs=4)
    rates = [each["lr"] for each in losses(run(config, validate=scripted([1.0, 1.0, 1.0, 1.0]), steps_per_epoch=2))]
    assert (len(set(rates)) > 1) == (schedule != "none")


@pytest.mark.row("A14")
def test_adam_gets_the_configured_values():
    config = TrainingConfig(lr=1e-3, weight_decay=1e-4, optimizer="adam")
    group = training.build_optimizer(config, TinyUNet(base=4)).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 1e-4, (0.9, 0.999))


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = TinyUNet(base=4)
    model.enc1.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.enc1.parameters()}
    held = {id(p) for group in training.build_optimizer(TrainingConfig(), model).param_groups for p in group["params"]}
    assert held
    assert not held & frozen


@pytest.mark.row("A15")
def test_plateau_drops_after_the_fourth_stalled_epoch():
    config = replace(QUICK, epochs=11, lr=1.0, lr_schedule="plateau", plateau_patience=3, plateau_factor=0.3)
    lrs = [metrics["lr"] for metrics in losses(run(config, validate=scripted([1.0] * 11)))]
    assert lrs == pytest.approx([1.0] * 5 + [0.3] * 4 + [0.09] * 2)


@pytest.mark.row("A15")
def test_plateau_is_torchs():
    generator = np.random.default_rng(0)
    values = np.abs(generator.normal(1, 0.3, 60)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.5)
    config, progress = TrainingConfig(lr=1.0, lr_schedule="plateau", plateau_patience=2, plateau_factor=0.5), Progress()
    for value in values:
        reference.step(value)
        note(config, progress, {"val_loss": value})
        assert learning_rate(config, 1, progress.plateau_scale) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_cosine_and_restarts_are_torchs():
    for schedule, make in (
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=31, eta_min=0.01)),
        ("restarts", lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2, eta_min=0.01)),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        reference = make(optimizer)
        config = TrainingConfig(epochs=31, lr=1.0, lr_min=0.01, lr_schedule=schedule)
        for epoch in range(31):
            assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            reference.step()


def test_warm_up_rises_in_a_line_and_then_falls():
    config = TrainingConfig(epochs=10, lr=1.0, lr_schedule="warmup_cosine", warmup_epochs=2)
    assert learning_rate(config, 0) == pytest.approx(0.01)
    assert learning_rate(config, 1) == pytest.approx(0.505)
    assert learning_rate(config, 2) == pytest.approx(1.0)
    assert learning_rate(config, 6) == pytest.approx(0.5)
    assert learning_rate(config, 10) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "schedule", ["none", "plateau", "cosine", "warmup_cosine", "warmup_linear", "onecycle", "restarts", "poly"]
)
def test_no_schedule_leaves_its_bounds(schedule):
    config = TrainingConfig(epochs=13, lr=0.5, lr_min=0.001, lr_schedule=schedule)
    rates = [learning_rate(config, step / 7) for step in range(13 * 7 + 1)]
    assert all(0.001 <= rate <= 0.5 for rate in rates)


def test_the_learning_rate_changes_within_an_epoch_where_its_steps_are_known():
    config = replace(QUICK, lr=1.0, lr_schedule="cosine", epochs=2)
    by_epoch = [metrics["lr"] for metrics in losses(run(config))]
    by_step = [metrics["lr"] for metrics in losses(run(config, steps_per_epoch=2))]
    assert by_epoch == pytest.approx([1.0, 0.5])
    assert by_step == pytest.approx([(1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(3 * math.pi / 4)) / 2])


@pytest.mark.row("A16")
def test_early_stop_counts_eight_stalls_and_ignores_tiny_gains(tmp_path):
    config = replace(QUICK, epochs=50, patience=8, min_delta=1e-5)
    values = [0.5, 0.4, *(0.4 - 1e-6 * i for i in range(1, 60))]
    for epoch in run(config, validate=scripted(values)):
        epoch.save(tmp_path)
    assert epoch.number == 10
    reason = checkpoints.read_meta(tmp_path)["stop_reason"]
    assert reason == "early stop: val_loss has not improved by more than 1e-05 for 8 epochs, best 0.4 at epoch 2"
    assert list(run(config, resume=tmp_path)) == []


def test_early_stop_on_a_score_wants_it_to_rise():
    config, progress = TrainingConfig(patience=2, early_stop_metric="iou", min_delta=0.01), Progress()
    for epoch, value in enumerate([0.5, 0.6, 0.605, 0.55], 1):
        progress.epoch = epoch
        note(config, progress, {"iou": value})
    assert (progress.best, progress.best_epoch, progress.stalls) == (0.6, 2, 2)
    assert stop_reason(config, progress).startswith("early stop: iou")


@pytest.mark.row("K17")
@pytest.mark.parametrize(("unit", "last"), [("validations", 8), ("epochs", 6)])
def test_patience_counts_validations_or_epochs(tmp_path, unit, last):
    # The best is epoch 2; validations follow at 4, 6 and 8.
    config = replace(QUICK, epochs=20, patience=3, patience_unit=unit, validate_every=2)
    numbers = []
    for epoch in run(config, validate=scripted([0.4] + [0.5] * 9)):
        numbers.append(epoch.number)
        epoch.save(tmp_path)
    assert numbers == list(range(2, last + 1, 2))
    stalls = {"validations": 3, "epochs": 4}[unit]
    assert f"for {stalls} {unit}, best 0.4 at epoch 2" in checkpoints.read_meta(tmp_path)["stop_reason"]


@pytest.mark.row("K17")
def test_only_validated_epochs_are_reported_and_the_last_always_is():
    config = replace(QUICK, epochs=5, validate_every=3)
    seen = []
    found = list(run(config, watch=lambda epoch: seen.append((epoch.number, "val_loss" in epoch.metrics))))
    assert [epoch.number for epoch in found] == [3, 5]
    assert seen == [(1, False), (2, False), (3, True), (4, False), (5, True)]
    often = losses(run(replace(config, validate_every=1)))
    assert [dict(epoch.metrics) for epoch in found] == [often[2], often[4]]


@pytest.mark.row("X10")
@pytest.mark.row("K17")
def test_a_run_goes_on_from_a_validation_as_if_unbroken(tmp_path):
    config = replace(QUICK, epochs=6, validate_every=2, patience=2, min_delta=10.0, patience_unit="validations")
    whole = losses(run(config))
    broken = run(config)
    next(broken).save(tmp_path)
    broken.close()
    assert losses(run(config, resume=tmp_path)) == whole[1:]
    assert len(checkpoints.load_state(tmp_path)["progress"]["history"]) == 2


@pytest.mark.row("K21")
def test_the_warm_up_counts_steps_and_the_fall_ends_with_the_run():
    config = TrainingConfig(epochs=4, lr=1.0, lr_schedule="warmup_linear", warmup_steps=10)
    rates = [learning_rate(config, step / 5, steps_per_epoch=5) for step in range(21)]
    assert rates[:10] == pytest.approx([0.01 + 0.099 * step for step in range(10)])
    assert rates[10:] == pytest.approx([1 - step / 10 for step in range(11)])
    twice = [learning_rate(replace(config, epochs=8), step / 5, steps_per_epoch=5) for step in (10, 25, 40)]
    assert twice == pytest.approx([1, 0.5, 0])
    cosine = replace(config, lr_schedule="warmup_cosine")
    assert [learning_rate(cosine, step / 5, steps_per_epoch=5) for step in (10, 15, 20)] == pytest.approx([1, 0.5, 0])


@pytest.mark.row("K21")
def test_a_run_warms_up_over_as_many_steps_as_it_is_told():
    config = replace(QUICK, lr=1.0, epochs=3, lr_schedule="warmup_linear", warmup_steps=2)
    # Two steps an epoch: the rate told is that of the epoch's second step.
    assert [metrics["lr"] for metrics in losses(run(config, steps_per_epoch=2))] == pytest.approx([0.505, 0.75, 0.25])


def test_a_warm_up_in_steps_needs_to_know_how_many_an_epoch_has(caplog):
    config = replace(QUICK, lr_schedule="warmup_linear", warmup_steps=8)
    with pytest.raises(ValueError, match="warmup_steps: got 8, but how many steps an epoch has is not known"):
        next(run(config))
    next(run(config, steps_per_epoch=2))
    assert "warmup_steps: 8 of 8 steps; lr never reaches its peak" in caplog.text
    list(run(replace(config, lr_schedule="none", epochs=1)))


def test_an_encoder_that_is_not_there_cannot_rest():
    with pytest.raises(ValueError, match="freeze_epochs: got 2, but this network has no encoder that can rest"):
        next(run(replace(QUICK, freeze_epochs=2)))


def test_an_unknown_early_stop_metric_is_named():
    with pytest.raises(ValueError, match=r"early_stop_metric: got 'f1'.*val_loss"):
        next(run(replace(QUICK, patience=1, early_stop_metric="f1")))


def test_a_whole_run_says_that_it_finished_and_can_be_made_longer(tmp_path):
    for epoch in run(QUICK):
        epoch.save(tmp_path)
    meta = checkpoints.read_meta(tmp_path)
    assert (meta["stop_reason"], meta["epoch"], meta["workload"]) == ("finished: 4 epochs", 4, "test")
    assert meta["metrics"] == dict(epoch.metrics)
    assert [epoch.number for epoch in run(replace(QUICK, epochs=6), resume=tmp_path)] == [5, 6]


@pytest.mark.row("X11")
def test_a_loss_that_is_no_number_names_epoch_and_step():
    epochs = run(QUICK, train_batches=lambda epoch: batches(epoch, fail_at=(2, 2)))
    next(epochs)
    with pytest.raises(NonFiniteError, match="epoch 2 step 2: loss is nan"):
        next(epochs)


@pytest.mark.row("X11")
def test_on_a_gpu_the_step_is_found_although_losses_are_looked_at_rarely(monkeypatch):
    loop = type("", (), {"progress": Progress(epoch=3)})()
    values = [torch.tensor(1.0), torch.tensor(math.inf), torch.tensor(math.nan)]
    with pytest.raises(NonFiniteError, match="epoch 3 step 49: loss is inf"):
        training._check_finite(loop, values, 50)


@pytest.mark.row("X11")
def test_a_validation_loss_that_is_no_number_is_a_failure_too():
    with pytest.raises(NonFiniteError, match="epoch 1: val_loss is inf"):
        next(run(QUICK, validate=scripted([math.inf])))


@pytest.mark.row("X15")
@pytest.mark.row("S4")
def test_auto_is_the_cpu_in_single_precision_where_there_is_no_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = training.resolve_device("auto")
    assert device == torch.device("cpu")
    assert training.resolve_precision("auto", device) == torch.float32
    assert training.resolve_precision("fp16", device) == torch.float32
    assert "fp16 needs a GPU; this run computes in fp32" in caplog.text


@pytest.mark.row("S4")
@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_losses_are_scaled_in_fp16_alone(dtype, scaled, monkeypatch):
    monkeypatch.setattr(training, "resolve_precision", lambda *_: dtype)
    loop = training.start(QUICK, TinyUNet(1, 2, 4), F.cross_entropy, 0)
    assert loop.strategy.scaler.is_enabled() is scaled


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1 GPUs"):
        training.resolve_device("cuda:1")
    with pytest.raises(ValueError, match="got 'gpu'"):
        training.resolve_device("gpu")


def test_the_running_average_is_what_is_validated_and_saved(tmp_path):
    seen = []
    seed_everything(0)
    model = TinyUNet(1, 2, 4)
    loss = build(Loss(), multilabel=False)

    def look(average):
        seen.append({name: tensor.clone() for name, tensor in average.state_dict().items()})
        return {"val_loss": 1.0}

    config = replace(QUICK, ema_decay=0.5, lr=0.1, epochs=1)
    epochs = fit(config, model=model, loss=loss, train_batches=batches, validate=look, meta={})
    next(epochs).save(tmp_path)
    assert not torch.equal(seen[0]["outc.weight"], model.outc.weight)
    assert torch.equal(seen[0]["enc1.0.1.running_mean"], model.enc1[0][1].running_mean)
    saved = checkpoints.safetensors_weights(tmp_path / checkpoints.WEIGHTS_FILE)
    assert torch.equal(saved["outc.weight"], seen[0]["outc.weight"])
    assert torch.equal(checkpoints.load_state(tmp_path)["raw_weights"]["outc.weight"], model.outc.weight.detach())


def test_the_running_average_of_still_weights_is_those_weights():
    model = TinyUNet(1, 2, 4)
    loop = training.start(replace(QUICK, ema_decay=0.9), model, lambda logits, mask: logits.sum(), 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for step in range(1, 200):
        loop.progress.step = step
        training._average(loop)
    for average, old in zip(loop.average.parameters(), before, strict=True):
        torch.testing.assert_close(average, old + 1)


@pytest.mark.row("K21")
def test_clipping_bounds_a_step():
    seed_everything(0)
    model = TinyUNet(1, 2, 4)
    config = replace(QUICK, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, clip_norm=0.01)
    loop = training.start(config, model, lambda logits, mask: 1000 * F.cross_entropy(logits, mask), 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training._step(loop, *squares(), len(squares()[0]), Clock(loop.device, on=False))
    moved = [(new.detach() - old).norm() for new, old in zip(model.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert float(loop.strategy.grad_norm) > 0.01


@pytest.mark.row("S5")
def test_an_epoch_tells_the_norm_that_its_gradients_had_before_they_were_clipped():
    plain, clipped = (next(run(replace(QUICK, lr=1e-9, clip_norm=norm))).metrics for norm in (0.0, 1e-3))
    assert "grad_norm" not in plain and clipped["grad_norm"] > 1e-3
    assert set(clipped) - set(plain) == {"grad_norm"}
    assert training.reported(replace(QUICK, clip_norm=1e-3))["grad_norm"] == "min"


def test_the_process_is_left_as_it_was_found():
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    epochs = run(replace(QUICK, threads=2))
    next(epochs)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2
    epochs.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark) == (threads, benchmark)


def test_an_epoch_can_only_be_saved_until_the_next_is_pulled(tmp_path):
    epochs = run(QUICK)
    first = next(epochs)
    next(epochs)
    with pytest.raises(RuntimeError, match="epoch 1 is over"):
        first.save(tmp_path)


def test_an_epoch_cannot_be_saved_once_its_run_is_closed(tmp_path):
    epochs = run(QUICK)
    first = next(epochs)
    epochs.close()
    with pytest.raises(RuntimeError, match="epoch 1 is over"):
        first.save(tmp_path)


def test_an_epoch_without_batches_is_refused():
    with pytest.raises(ValueError, match="no training batch"):
        next(run(QUICK, train_batches=lambda epoch: iter(())))


def test_fit_trains_without_validation_changing_the_mode():
    modes = []

    def look(model):
        modes.append(model.training)
        return {"val_loss": 1.0}

    assert len(list(run(QUICK, validate=look))) == 4
    assert modes == [False] * 4


def test_every_value_has_its_help_and_comes_back_from_plain_values():
    assert all(field.help for field in configuration.fields(TrainingConfig).values())
    config = TrainingConfig(lr=0.5, lr_schedule="poly", device="cpu")
    assert configuration.build(TrainingConfig, configuration.to_values(config)) == config


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"ema_decay": 1.0}, {"plateau_factor": 0.0}, {"clip_norm": -1.0}],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TrainingConfig(**values)


@pytest.mark.row("P5", "P20")
def test_later_checkpoints_keep_exactly_the_weights_of_the_rewind_epoch(tmp_path):
    config = replace(QUICK, epochs=4, rewind_epoch=2)
    for epoch in run(config):
        epoch.save(tmp_path / str(epoch.number))
    second = checkpoints.safetensors_weights(tmp_path / "2" / checkpoints.WEIGHTS_FILE)
    first = checkpoints.safetensors_weights(tmp_path / "1" / checkpoints.WEIGHTS_FILE)
    early = checkpoints.load_rewind(tmp_path / "1")  # a run whose best epoch comes before has nothing later to give
    assert all(torch.equal(early[name], first[name]) for name in first)
    for number in ("2", "3", "4"):
        kept = checkpoints.load_rewind(tmp_path / number)
        assert all(torch.equal(kept[name], second[name]) for name in second), number
    going_on = run(config, resume=tmp_path / "3")
    next(going_on).save(tmp_path / "resumed")
    resumed = checkpoints.load_rewind(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], second[name]) for name in second)


@pytest.mark.row("P19")
def test_a_checkpoint_without_early_weights_says_how_to_get_them(tmp_path):
    epochs = run(QUICK)
    next(epochs).save(tmp_path)
    with pytest.raises(CheckpointError, match="train it with rewind_epoch=1 or more"):
        checkpoints.load_rewind(tmp_path)
