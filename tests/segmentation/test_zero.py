"""Every strategy trains alike, and goes on from what another one left; two real processes on the CPU."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from segmentation import checkpoints, evaluation, loading, losses, networks, ranks, strategy, training, zero
from segmentation.cache import cached
from segmentation.epoch import NonFiniteError
from segmentation.losses import Loss
from segmentation.networks.parts import EncoderNetwork
from segmentation.networks.unet import UNet
from segmentation.normalisation import Normaliser
from segmentation.outputs import Outputs
from segmentation.samples import Sample
from segmentation.strategy import StrategyError
from segmentation.training import TrainingConfig
from tests import processes

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed ninja"
)

CLASSES = 2
IMAGES = 7
ONE = TrainingConfig(epochs=2, batch_size=4, lr=1e-2, device="cpu", precision="fp32", optimizer="adam")
TWO = replace(ONE, batch_size=2)
DDP = replace(TWO, strategy="ddp")
STAGES = {stage: replace(TWO, strategy="deepspeed", zero_stage=stage) for stage in range(4)}
FSDP = replace(TWO, strategy="fsdp")
WAYS = {"ddp": DDP, "fsdp": FSDP, **{f"zero{stage}": config for stage, config in STAGES.items()}}


def samples(folder: Path):
    def make():
        for number in range(IMAGES):
            drawn = np.random.default_rng(number)
            image = drawn.integers(0, 256, (1, 16, 16), dtype=np.uint8)
            yield Sample(f"s{number}", f"g{number}", image, (image[0] > 127).astype(np.uint8))

    return cached("zero", make, folder=folder)


def network(norm: str = "group", frozen: bool = False) -> UNet:
    training.seed_everything(0)
    model = UNet(1, CLASSES, widths=(4, 6), bottleneck=8, norm=norm)
    model.encoders.requires_grad_(not frozen)
    return model


def validator(data):
    normalise, per_image = Normaliser(), losses.build_per_image(Loss(), multilabel=False)

    def validate(model: nn.Module):
        mine = ranks.shard(range(IMAGES))
        part = loading.batches(data, mine, batch_size=3, normalise=normalise, shuffle=False, seed=0, epoch=0)
        scores = evaluation.gather(evaluation.score_batches(model, part, CLASSES, multilabel=False, loss=per_image))
        return evaluation.summary(scores, ["a", "b"], multilabel=False, prefix="val_")

    return validate


def epochs(folder: Path, config: TrainingConfig, resume: Path | None = None, model: nn.Module | None = None, loss=None):
    data = samples(folder / f"cache{ranks.place()[0]}")

    def batches(epoch: int):
        return loading.batches(
            data, range(IMAGES), batch_size=config.batch_size, normalise=Normaliser(), shuffle=True, seed=config.seed,
            epoch=epoch, place=ranks.place(),
        )  # fmt: skip

    return training.fit(
        config,
        model=model or network(),
        loss=loss or losses.build(Loss(), multilabel=False),
        train_batches=batches,
        validate=validator(data),
        meta={},
        resume=resume,
        steps_per_epoch=2,
    )


def told(folder: Path, config: TrainingConfig, keep: Path | None = None, **options: Any) -> list[dict[str, float]]:
    """Train; return what the epochs told, and save each of them."""
    found = []
    for epoch in epochs(folder, config, **options):
        found.append(dict(epoch.metrics))
        if keep is not None:
            epoch.save(keep / str(epoch.number))
    return found


def _rank(number: int, job: Callable[[Path], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    found = job(Path(folder))
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def together(folder: Path, job: Callable[[Path], Any]) -> list[Any]:
    """Return what a job returns in each of two processes."""
    folder.mkdir(exist_ok=True)
    processes.ranks(_rank, job, str(folder))
    return [json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)]


def close(ours: list[dict[str, float]], others: list[dict[str, float]], tolerance: float) -> None:
    assert len(ours) == len(others) > 0
    for one, other in zip(ours, others, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            assert one[name] == pytest.approx(other[name], abs=tolerance), name


VARIANTS = {
    "plain": {"epochs": 3},
    "clipped": {"optimizer": "sgd", "clip_norm": 0.05, "lr": 0.1},
    "parts": {"micro_batch": 1, "optimizer": "rmsprop", "lr": 1e-3},
    "bf16": {"precision": "bf16", "optimizer": "adamw"},
    "recomputed": {"checkpointing": True, "channels_last": False, "lr_schedule": "cosine"},
}


def _all_ways(variants: Collection[str], folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for variant, (name, config) in itertools.product(variants, WAYS.items()):
        changed = replace(config, **{"epochs": 1, **VARIANTS[variant]})
        found[f"{variant}-{name}"] = told(folder, changed, folder / f"{variant}-{name}")
    found["freed-ddp"] = [{"networks": alive()}]
    return found


def _partly_trained(folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name in ("ddp", "fsdp", "zero1", "zero3"):
        found[f"frozen-{name}"] = told(folder, replace(WAYS[name], epochs=1), model=network(frozen=True))
    for name in ("ddp", "zero0", "zero2"):
        found[f"average-{name}"] = told(folder, replace(WAYS[name], epochs=1, ema_decay=0.9))
    return found


@needs_deepspeed
@pytest.mark.row("K8")
@pytest.mark.row("K43")
@pytest.mark.parametrize("variants", [["plain"], pytest.param([*VARIANTS][1:], marks=pytest.mark.slow)], ids="_".join)
def test_fsdp_and_every_stage_of_deepspeed_train_as_ddp_does_with_every_value(variants, tmp_path):
    first, second = together(tmp_path, functools.partial(_all_ways, variants))
    assert first == second
    assert first.pop("freed-ddp") == [{"networks": 0}]
    for name, ours in first.items():
        variant, way = name.split("-")
        close(ours, first[f"{variant}-ddp"], 1e-3 if variant == "bf16" else 1e-4)
        if way != "ddp":
            last = str(len(ours))
            _check_saved(
                tmp_path / name / last, tmp_path / f"{variant}-ddp" / last, 1e-2 if variant == "bf16" else 1e-4
            )


@needs_deepspeed
@pytest.mark.slow
def test_with_a_part_frozen_and_with_averaged_weights_too(tmp_path):
    first, second = together(tmp_path, _partly_trained)
    assert first == second
    for name, ours in first.items():
        close(ours, first[f"{name.split('-')[0]}-ddp"], 1e-4)


def _check_saved(ours: Path, other: Path, tolerance: float) -> None:
    """The folders hold the same: weights by the same names, and the optimiser's state as torch has it."""
    weights = [checkpoints.safetensors_weights(folder / checkpoints.WEIGHTS_FILE) for folder in (ours, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=tolerance, rtol=tolerance)
    states = [checkpoints.load_state(folder)["optimizer"] for folder in (ours, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, kept in states[1]["state"].items():
        assert states[0]["state"][index].keys() == kept.keys()
        for key, value in kept.items():
            torch.testing.assert_close(states[0]["state"][index][key], value, atol=10 * tolerance, rtol=10 * tolerance)


def save_first(folder: Path, config: TrainingConfig, checkpoint: Path) -> None:
    run = epochs(folder, config)
    next(run).save(checkpoint)
    run.close()


def _networks(folder: Path) -> dict[str, list[float]]:
    """Two steps of every network that the package has, by ddp and by fsdp."""
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(ranks.place()[0]))
    found: dict[str, list[float]] = {}
    for name, way in itertools.product(networks.NETWORKS, ("ddp", "fsdp")):
        training.seed_everything(0)
        model = networks.build(networks.Network(name=name), 3, CLASSES).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        made = strategy.build(way, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.0)
        for _ in range(2):
            output = made.forward(image.to(memory_format=torch.channels_last))
            loss = (output.logits if isinstance(output, Outputs) else output).square().mean()
            made.backward(loss, last=True)
            made.step()
            found.setdefault(f"{name} {way}", []).append(loss.item())
        made.release()
    return found


@pytest.mark.slow
@pytest.mark.row("K8")
def test_every_network_trains_by_fsdp_as_by_ddp(tmp_path):
    for found in together(tmp_path, _networks):
        for name in networks.NETWORKS:
            assert found[f"{name} fsdp"] == pytest.approx(found[f"{name} ddp"], abs=1e-4)


def _first_epoch(folder: Path) -> None:
    for name, config in WAYS.items():
        save_first(folder, config, folder / name)


GONE_ON = {
    "single": tuple(WAYS),
    "ddp": ("zero2", "fsdp"),
    "fsdp": ("ddp", "zero1", "zero3", "fsdp"),
    "zero0": ("zero1",),
    "zero1": ("zero3", "zero1"),
    "zero2": ("ddp",),
    "zero3": ("zero2", "zero3", "fsdp"),
}


def _second_epoch(folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for left, names in GONE_ON.items():
        for name in names:
            found[f"{left} to {name}"] = told(folder, WAYS[name], resume=folder / left)
    return found


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.row("K8")
def test_a_run_goes_on_under_any_strategy_from_any_other(tmp_path):
    together(tmp_path, _first_epoch)
    save_first(tmp_path, ONE, tmp_path / "single")
    (tmp_path / "store").unlink(missing_ok=True)
    gone_on, _ = together(tmp_path, _second_epoch)
    for left in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"):
        gone_on[f"{left} to single"] = told(tmp_path, ONE, resume=tmp_path / left)
    whole = told(tmp_path, ONE)
    assert len(gone_on) == sum(map(len, GONE_ON.values())) + len(WAYS)
    for way, metrics in gone_on.items():
        for name, value in whole[1].items():
            assert metrics[0][name] == pytest.approx(value, abs=1e-4), (way, name)


def _logits(folder: Path) -> dict[str, Any]:
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, config in WAYS.items():
        model = network()
        run = epochs(folder, config, model=model)
        epoch = next(run)
        shown: list[Any] = []
        whole = run.gi_frame.f_locals["loop"].best_model  # type: ignore[attr-defined]
        with torch.inference_mode():
            shown = whole(image).tolist()
        epoch.save(folder / name)
        found[name] = shown
        run.close()
    return found


@needs_deepspeed
@pytest.mark.row("K8")
@pytest.mark.slow
def test_a_checkpoint_of_every_strategy_gives_one_process_the_same_logits(tmp_path):
    shown, _ = together(tmp_path, _logits)
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in WAYS:
        model = network()
        checkpoints.load_weights(tmp_path / name, model)
        with torch.inference_mode():
            logits = model.eval()(image)
        assert (logits - torch.tensor(shown[name])).abs().max() <= 1e-5


def _scaled(folder: Path) -> dict[str, Any]:
    """Three steps with a loss scale, the second of which overflows on rank 1."""
    found = {}
    for name in ("ddp", "fsdp", 0, 1, 2, 3):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        made = strategy.build(
            name if isinstance(name, str) else "deepspeed", model, optimizer, scaler, 0.01,
            zero_stage=0 if isinstance(name, str) else name,
        )  # fmt: skip
        for step in range(4):
            image = torch.full((1, 1, 16, 16), 0.1 * (step + 1))
            broken = 1e38 if step == 1 and made.rank == 1 else 1.0
            made.backward(made.forward(image).square().mean() * broken, last=True)
            made.step()
        weights = torch.cat([value.flatten() for value in made.network().state_dict().values()])
        found[str(name)] = {"scale": scaler.get_scale(), "sum": weights.double().abs().sum().item()}
        assert made.state()["scaler"]["scale"] == scaler.get_scale()
        made.release()
    return found


@needs_deepspeed
@pytest.mark.slow
def test_the_loss_scale_falls_on_all_ranks_and_no_weight_moves_where_one_overflows(tmp_path):
    first, second = together(tmp_path, _scaled)
    assert first == second
    # Halved once, then doubled after two steps that went well.
    assert {each["scale"] for each in first.values()} == {1024.0}
    for each in first.values():
        assert each["sum"] == pytest.approx(first["ddp"]["sum"], rel=1e-6)


def _spoiled(folder: Path) -> str:
    def bad(logits, mask):
        # The square root's slope at 0 is infinite, and infinity times 0 is no number.
        return (logits * 0).sum().sqrt() + logits.mean()

    try:
        told(folder, STAGES[2], loss=bad)
    except NonFiniteError as error:
        return str(error)
    return ""


@needs_deepspeed
@pytest.mark.row("X11")
def test_a_gradient_that_is_no_number_ends_all(tmp_path):
    assert all("a gradient is not finite" in message for message in together(tmp_path, _spoiled))


TRIALS = 50


def alive() -> int:
    """Return how many networks this process still holds."""
    gc.collect()
    # Some of what lies there warns when it is only looked at.
    with warnings.catch_warnings(action="ignore"):
        return sum(issubclass(type(each), UNet) for each in gc.get_objects())


def _many(folder: Path) -> dict[str, list[float]]:
    process, grown = psutil.Process(), {}
    for way in ("zero1", "zero3", "fsdp"):
        used = []
        for _ in range(TRIALS):
            next(epochs(folder, replace(WAYS[way], epochs=1)))
            gc.collect()
            used.append(process.memory_info().rss)
        grown[way] = [used[-1] / used[4], float(alive())]
    return grown


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.row("K8")
def test_fifty_runs_one_after_another_do_not_grow(tmp_path):
    for rank in together(tmp_path, _many):
        for growth, left in rank.values():
            assert left == 0
            assert growth <= 1.05


class Resting(EncoderNetwork):
    """The smallest network with an encoder that can rest."""

    def __init__(self) -> None:
        training.seed_everything(0)
        # Adam would make steps of the rounding errors that are a bias's slope before batch norm.
        encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        encoder.feature_info = SimpleNamespace(reduction=lambda: [1])
        super().__init__(encoder, frozen=False)
        self.head = nn.Conv2d(4, CLASSES, 3, padding=1)

    def forward(self, image):
        return self.head(self.encoder(image))


RESTED = ("ddp", "fsdp", "zero0")


def _rested(folder: Path) -> dict[str, list[dict[str, float]]]:
    found, values = {}, {"epochs": 4, "freeze_epochs": 2, "optimizer": "adamw", "weight_decay": 0.1}
    for name in RESTED:
        found[f"{name}-1"] = told(folder, replace(WAYS[name], **values), folder / name, model=Resting())
    for name, left in zip(RESTED, (*RESTED[1:], RESTED[0]), strict=True):
        for epoch in (2, 3):  # it is about to learn, it learns
            changed = replace(WAYS[name], **values)
            found[f"{name}-{epoch + 1}"] = told(folder, changed, model=Resting(), resume=folder / left / str(epoch))
    try:
        next(epochs(folder, replace(STAGES[1], epochs=4), model=Resting(), resume=folder / "ddp" / "3"))
    except StrategyError as error:
        found["refused"] = str(error)
    return found


@needs_deepspeed
@pytest.mark.row("K8")
@pytest.mark.slow
def test_an_encoder_rests_and_learns_alike_and_a_run_goes_on_across_that(tmp_path):
    first, second = together(tmp_path, _rested)
    assert first == second
    assert first.pop("refused").startswith("zero_stage: got 1 to go on from weights that rested")
    before, after = (
        checkpoints.safetensors_weights(tmp_path / "fsdp" / epoch / checkpoints.WEIGHTS_FILE) for epoch in "24"
    )
    start = Resting().state_dict()
    for name in ("encoder.0.weight", "encoder.1.running_mean"):
        assert torch.equal(before[name], start[name])
        assert not torch.equal(after[name], start[name])
    for way, ours in first.items():
        close(ours, first["ddp-1"][int(way[-1]) - 1 :] if len(ours) < 4 else first["ddp-1"], 1e-4)


REFUSED = {
    "ema_decay: got 0.9 with zero_stage 3": replace(STAGES[3], ema_decay=0.9),
    "ema_decay: got 0.9 with strategy fsdp": replace(FSDP, ema_decay=0.9),
    "freeze_epochs: got 1 with zero_stage 1": replace(STAGES[1], freeze_epochs=1),
    "freeze_epochs: got 1 with zero_stage 3": replace(STAGES[3], freeze_epochs=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_strategy_cannot_do_is_refused_with_its_remedy(message, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "place", lambda: (0, 2))
    with pytest.raises(StrategyError, match=f"^{message}.*; write .*{message.partition(':')[0]}: 0$"):
        next(epochs(tmp_path, REFUSED[message], model=Resting()))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ((), ["ninja (pip install ninja)", "a C++ compiler (apt-get install g++)"]),
        (("ninja",), ["a C++ compiler (apt-get install g++)"]),
        (("g++",), ["ninja (pip install ninja)"]),
    ],
)
def test_what_deepspeed_needs_to_compile_is_named(found, named, monkeypatch):
    monkeypatch.setattr(zero.shutil, "which", lambda name: f"/{name}" if name in found else None)
    with pytest.raises(StrategyError) as refused, zero._building():
        raise RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)")
    assert str(refused.value).endswith(f"install {' and '.join(named)}, or write ddp")
    with pytest.raises(RuntimeError, match="no room"), zero._building():
        raise RuntimeError("no room")
    monkeypatch.setattr(zero.shutil, "which", lambda name: f"/{name}")
    with pytest.raises(RuntimeError, match="ninja broke"), zero._building():
        raise RuntimeError("ninja broke")


@pytest.mark.row("K44")
def test_without_deepspeed_all_but_deepspeed_trains(tmp_path):
    script = textwrap.dedent(f"""
        import importlib.abc, sys
        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("deepspeed", "ninja"):
                    raise ModuleNotFoundError(name) if name != "deepspeed" else ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Blocked())
        import torch
        from pathlib import Path
        from dataclasses import replace
        import importlib.util as util
        spec = util.spec_from_file_location("helpers", {str(Path(__file__))!r})
        real = util.find_spec
        def find(name, *rest):
            return None if name in ("deepspeed", "ninja") else real(name, *rest)
        util.find_spec = find
        helpers = util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        folder = Path({str(tmp_path)!r})
        print(len(helpers.told(folder, helpers.ONE)))
        try:
            next(helpers.epochs(folder, replace(helpers.ONE, strategy="deepspeed")))
        except helpers.StrategyError as error:
            print(error)
    """)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2",
        "strategy: got deepspeed, which is not installed; "
        'install it by pip install "segmentation-search[deepspeed]", or write ddp',
    ]


@pytest.mark.row("K44")
def test_deepspeed_is_an_extra_that_the_base_does_without():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert {"deepspeed", "ninja"} <= set(project["optional-dependencies"]["deepspeed"])
    needed = " ".join(project["dependencies"])
    assert "deepspeed" not in needed
    assert all(name in needed for name in ("torch", "torchvision", "timm"))
