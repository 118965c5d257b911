"""Several processes train as one does; each test with two starts them once, on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmentation import evaluation, loading, losses, ranks, strategy, training
from segmentation.cache import cached
from segmentation.epoch import NonFiniteError, OutOfMemoryError
from segmentation.losses import Loss
from segmentation.networks.unet import UNet
from segmentation.normalisation import Normaliser
from segmentation.samples import Sample
from segmentation.training import TrainingConfig
from tests import processes

CLASSES = 2
ONE = TrainingConfig(epochs=2, batch_size=4, lr=1e-2, device="cpu", precision="fp32", optimizer="sgd")
TWO = replace(ONE, batch_size=2)


@pytest.mark.row("S5")
def test_gradients_are_clipped_in_true_units_whatever_they_are_scaled_by() -> None:
    torch.manual_seed(0)
    model, image = nn.Linear(8, 4), torch.randn(16, 8)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    made = strategy.Single(model, torch.optim.SGD(model.parameters(), lr=1.0), scaler, 1.0)
    loss = 30 * made.forward(image).square().mean()
    true = torch.cat(
        [gradient.ravel() for gradient in torch.autograd.grad(loss, model.parameters(), retain_graph=True)]
    )
    made.backward(loss, last=True)
    made.step()
    moved = torch.cat([(new - old).ravel() for new, old in zip(model.parameters(), before, strict=True)])
    assert true.norm() > 5, "or nothing would be clipped"
    assert moved.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert made.grad_norm.item() == pytest.approx(true.norm().item(), rel=1e-4), "told as it was before"


def samples(folder: Path, count: int):
    def make():
        for number in range(count):
            drawn = np.random.default_rng(number)
            image = drawn.integers(0, 256, (1, 16, 16), dtype=np.uint8)
            yield Sample(f"s{number}", f"g{number}", image, (image[0] > 127).astype(np.uint8))

    return cached(f"strategy-{count}", make, folder=folder)


def epochs(
    folder: Path,
    count: int,
    config: TrainingConfig,
    resume: Path | None = None,
    poison: int = -1,
    model: nn.Module | None = None,
):
    """Train as a workload does; `poison` is the rank whose loss becomes nan in the second epoch."""
    data, rank = samples(folder, count), ranks.place()[0]
    loss = losses.build(Loss(), multilabel=False)
    normalise = Normaliser()

    def batches(epoch: int):
        return loading.batches(
            data, range(count), batch_size=config.batch_size, normalise=normalise, shuffle=True, seed=config.seed,
            epoch=epoch, place=ranks.place(),
        )  # fmt: skip

    def spoiled(logits, mask):
        broken = poison == rank and loop_epoch["now"] == 2
        return loss(logits, mask) * (math.nan if broken else 1.0)

    def validate(model: nn.Module):
        mine = ranks.shard(range(count))
        part = loading.batches(data, mine, batch_size=3, normalise=normalise, shuffle=False, seed=0, epoch=0)
        per_image = losses.build_per_image(Loss(), multilabel=False)
        scores = evaluation.gather(evaluation.score_batches(model, part, CLASSES, multilabel=False, loss=per_image))
        return evaluation.summary(scores, ["a", "b"], multilabel=False, prefix="val_")

    def staged(epoch: int):
        loop_epoch["now"] = epoch
        return batches(epoch)

    loop_epoch = {"now": 0}
    training.seed_everything(config.seed)
    network = model or UNet(1, CLASSES, widths=(4,), bottleneck=8, norm="group")
    yield from training.fit(
        config, model=network, loss=spoiled, train_batches=staged, validate=validate, meta={}, resume=resume
    )


def told(run) -> list[dict[str, float]]:
    return [dict(epoch.metrics) for epoch in run]


def _rank(number: int, store: str, folder: str, count: int, poison: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    out = Path(folder)
    try:
        found = []
        for epoch in epochs(out / f"cache{number}", count, TWO, poison=poison):
            found.append(dict(epoch.metrics))
            epoch.save(out / f"epoch{epoch.number}-rank{number}")
        (out / f"{number}.json").write_text(json.dumps(found))
    except NonFiniteError as error:
        (out / f"{number}.error").write_text(str(error))
    torch.distributed.destroy_process_group()


def together(folder: Path, count: int, poison: int = -1) -> None:
    """Train in two processes; each writes what its epochs told."""
    processes.ranks(_rank, str(folder / "store"), str(folder), count, poison)


# 8 images: whole batches. 7: one of two and one. 5: the second rank has none left in the last batch.
@pytest.mark.parametrize("count", [8, 7, 5])
@pytest.mark.row("X9")
def test_two_ranks_train_as_one_process_with_their_batch(count, tmp_path):
    together(tmp_path, count)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first == second
    alone = told(epochs(tmp_path / "cache", count, ONE))
    for ours, other in zip(first, alone, strict=True):
        assert ours.keys() == other.keys()
        for name, value in other.items():
            assert ours[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.row("K16", "K45")
def test_one_checkpoint_is_written_and_one_process_goes_on_from_it(tmp_path):
    together(tmp_path, 7)
    assert not (tmp_path / "epoch1-rank1").exists()
    gone_on = told(epochs(tmp_path / "cache", 7, ONE, resume=tmp_path / "epoch1-rank0"))
    alone = told(epochs(tmp_path / "cache", 7, ONE))
    assert gone_on[0]["train_loss"] == pytest.approx(alone[1]["train_loss"], abs=1e-5)
    meta = json.loads((tmp_path / "epoch1-rank0" / "checkpoint.json").read_text())
    assert (meta["world_size"], meta["batch_per_worker"], meta["effective_batch"]) == (2, 2, 4)


@pytest.mark.row("X11")
def test_a_loss_that_is_no_number_on_one_rank_ends_all(tmp_path):
    together(tmp_path, 8, poison=1)
    assert "another rank" in (tmp_path / "0.error").read_text()
    assert "loss is nan" in (tmp_path / "1.error").read_text()


@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_of_parts_add_up_to_those_of_the_batch(micro, tmp_path):
    whole = told(epochs(tmp_path, 7, ONE))
    parts = told(epochs(tmp_path, 7, replace(ONE, micro_batch=micro)))
    for ours, other in zip(parts, whole, strict=True):
        assert ours["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
        assert ours["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)


def test_ranks_share_every_batch_and_no_sample_comes_twice(tmp_path):
    data = samples(tmp_path, 7)
    options = {"batch_size": 2, "normalise": Normaliser(), "shuffle": True, "seed": 3, "epoch": 1}
    parts = [list(loading.batches(data, range(7), place=(rank, 2), **options)) for rank in (0, 1)]
    whole = list(loading.batches(data, range(7), **{**options, "batch_size": 4}))
    assert [len(part) for part in parts] == [2, 2]
    for left, right, both in zip(*parts, whole, strict=True):
        assert torch.equal(torch.cat([left[2], right[2]]), both[2])
    lonely = list(loading.batches(data, range(5), place=(1, 2), **options))[-1]
    assert len(lonely[0]) == 1 and len(lonely[2]) == 0


def test_a_strategy_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "place", lambda: (0, 2))
    with pytest.raises(ValueError, match="strategy: got single, but 2 processes train together"):
        strategy.build("single", nn.Linear(1, 1), None, None, 0.0)


class Small(UNet):
    """A network that the device's memory holds for so many images only, on one rank or on all."""

    def __init__(self, most: int, rank: int | None = None) -> None:
        training.seed_everything(0)
        super().__init__(1, CLASSES, widths=(4,), bottleneck=8, norm="group")
        self.most, self.rank = most, rank

    def forward(self, image):
        if self.training and len(image) > self.most and self.rank in (None, ranks.place()[0]):
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB. It did not fit")
        return super().forward(image)


def test_where_memory_is_short_the_micro_batch_is_halved_until_it_fits(tmp_path, caplog):
    config = replace(ONE, on_oom="accumulate", batch_size=7)
    found, metas = [], []
    for epoch in epochs(tmp_path, 7, config, model=Small(2)):
        found.append(dict(epoch.metrics))
        epoch.save(tmp_path / "checkpoint")
        metas.append(json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text()))
    whole = told(epochs(tmp_path, 7, replace(config, on_oom="fail")))
    for ours, other in zip(found, whole, strict=True):
        assert ours["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert ours["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
    assert [(meta["micro_batch"], meta["effective_batch"]) for meta in metas] == [(1, 7), (1, 7)]
    halved = [record.message for record in caplog.records if "does not fit" in record.message]
    assert [message.partition(" (")[0] for message in halved] == [
        "epoch 1 step 1: micro_batch 7 does not fit, going on with 3",
        "epoch 1 step 1: micro_batch 3 does not fit, going on with 1",
    ]
    # The run that goes on does not look for it again.
    caplog.clear()
    told(epochs(tmp_path, 7, replace(config, epochs=3), model=Small(2), resume=tmp_path / "checkpoint"))
    assert not caplog.records


def test_memory_that_does_not_hold_one_image_ends_with_that_reason(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="micro_batch 1 does not fit, lower the size of images"):
        told(epochs(tmp_path, 7, replace(ONE, on_oom="accumulate"), model=Small(0)))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        told(epochs(tmp_path, 7, ONE, model=Small(2)))


def _short(number: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    config = replace(TWO, batch_size=3, on_oom="accumulate")
    cache = Path(folder) / f"cache{number}"
    whole = told(epochs(cache, 7, replace(config, on_oom="fail")))
    found = {"whole": whole, "parted": told(epochs(cache, 7, replace(config, on_oom="fail", micro_batch=1)))}
    found["halved"] = told(epochs(cache, 7, config, model=Small(1, rank=1)))
    synced = strategy.DDP.local
    try:
        # As with sync_batchnorm or deepspeed, where ranks wait for each other within a pass.
        strategy.Apart.local = False
        told(epochs(cache, 7, config, model=Small(1)))
    except OutOfMemoryError as error:
        found["ended"] = [str(error), error.micro_batch, synced]
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_where_one_rank_runs_out_of_memory_all_halve(tmp_path):
    processes.ranks(_short, str(tmp_path / "store"), str(tmp_path))
    for number in (0, 1):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert {epoch["micro_batch"] for epoch in found["halved"]} == {1.0}, "what gave way is on record"
        for way in ("parted", "halved"):
            for ours, other in zip(found[way], found["whole"], strict=True):
                ours.pop("micro_batch", None)
                assert ours == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}, way
        assert found["ended"] == [
            "epoch 1 step 1: micro_batch 3 does not fit, going on with 1 (Tried to allocate 2 GiB)", 1, False,
        ]  # fmt: skip


@pytest.mark.row("K38")
def test_the_profile_of_an_epoch_adds_up_to_all_of_it(tmp_path):
    parts = {f"time_{part}" for part in ("data", "forward", "backward", "step", "sync")}
    for metrics in told(epochs(tmp_path, 7, replace(ONE, profile=True, micro_batch=2))):
        shares = {name: value for name, value in metrics.items() if name in parts}
        assert shares.keys() == parts
        assert sum(shares.values()) == pytest.approx(100)
        assert min(shares.values()) > 0
        assert shares["time_forward"] + shares["time_backward"] > shares["time_sync"]
    assert not parts & told(epochs(tmp_path, 7, ONE))[0].keys()


def test_the_layout_of_images_is_a_value_that_changes_no_number(tmp_path):
    seen = []

    class Seen(Small):
        def forward(self, image):
            seen.append(self.encoders[0].net[3].weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(image)

    found = [told(epochs(tmp_path, 7, replace(ONE, channels_last=on), model=Seen(9))) for on in (True, False)]
    assert set(seen[: len(seen) // 2]) == {True} and set(seen[len(seen) // 2 :]) == {False}
    for one, other in zip(*found, strict=True):
        assert one == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}


def test_a_state_goes_on_alike_in_another_layout(tmp_path):
    config = replace(ONE, optimizer="adam", epochs=3)
    run = epochs(tmp_path, 7, config)
    next(run).save(tmp_path / "first")
    run.close()
    whole = told(epochs(tmp_path, 7, config))[1:]
    gone_on = told(epochs(tmp_path, 7, replace(config, channels_last=False), resume=tmp_path / "first"))
    for one, other in zip(gone_on, whole, strict=True):
        assert one == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}
