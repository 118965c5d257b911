"""Every strategy trains alike, and goes on from what another one left; two real processes on the CPU."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing
from torch import nn

from segmentation import checkpoints, evaluation, loading, losses, ranks, strategy, training
from segmentation.cache import cached
from segmentation.epoch import NonFiniteError
from segmentation.losses import Loss
from segmentation.networks.unet import UNet
from segmentation.normalisation import Normaliser
from segmentation.samples import Sample
from segmentation.strategy import StrategyError
from segmentation.training import TrainingConfig

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
WAYS = {"ddp": DDP, **{f"zero{stage}": config for stage, config in STAGES.items()}}


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
    torch.multiprocessing.spawn(_rank, (job, str(folder)), nprocs=2)
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


def _all_ways(folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for variant, values in VARIANTS.items():
        for name, config in WAYS.items():
            changed = replace(config, **{"epochs": 1, **values})
            found[f"{variant}-{name}"] = told(folder, changed, folder / f"{variant}-{name}")
    for name in ("ddp", "zero1", "zero3"):
        found[f"frozen-{name}"] = told(folder, replace(WAYS[name], epochs=1), model=network(frozen=True))
    for name in ("ddp", "zero0", "zero2"):
        found[f"average-{name}"] = told(folder, replace(WAYS[name], epochs=1, ema_decay=0.9))
    return found


@needs_deepspeed
@pytest.mark.row("K8")
@pytest.mark.row("K43")
def test_every_stage_of_deepspeed_trains_as_ddp_does_with_every_value(tmp_path):
    first, second = together(tmp_path, _all_ways)
    assert first == second
    for name, ours in first.items():
        variant, way = name.split("-")
        close(ours, first[f"{variant}-ddp"], 1e-3 if variant == "bf16" else 1e-4)
        if way != "ddp" and variant in VARIANTS:
            last = str(len(ours))
            _check_saved(
                tmp_path / name / last, tmp_path / f"{variant}-ddp" / last, 1e-2 if variant == "bf16" else 1e-4
            )


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


def _first_epoch(folder: Path) -> None:
    for name, config in WAYS.items():
        save_first(folder, config, folder / name)


GONE_ON = {
    "single": tuple(WAYS),
    "ddp": ("zero2",),
    "zero0": ("zero1",),
    "zero1": ("zero3", "zero1"),
    "zero2": ("ddp",),
    "zero3": ("zero2", "zero3"),
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
    for left in ("ddp", "zero0", "zero1", "zero2", "zero3"):
        gone_on[f"{left} to single"] = told(tmp_path, ONE, resume=tmp_path / left)
    whole = told(tmp_path, ONE)
    assert len(gone_on) == 12 + 5
    for way, metrics in gone_on.items():
        for name, value in whole[1].items():
            assert metrics[0][name] == pytest.approx(value, abs=1e-4), (way, name)


def _logits(folder: Path) -> dict[str, Any]:
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for stage, config in STAGES.items():
        model = network()
        run = epochs(folder, config, model=model)
        epoch = next(run)
        shown: list[Any] = []
        whole = run.gi_frame.f_locals["loop"].best_model  # type: ignore[attr-defined]
        with torch.inference_mode():
            shown = whole(image).tolist()
        epoch.save(folder / f"zero{stage}")
        found[str(stage)] = shown
        run.close()
    return found


@needs_deepspeed
@pytest.mark.row("K8")
def test_a_checkpoint_of_every_stage_gives_one_process_the_same_logits(tmp_path):
    shown, _ = together(tmp_path, _logits)
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for stage in STAGES:
        model = network()
        checkpoints.load_weights(tmp_path / f"zero{stage}", model)
        with torch.inference_mode():
            logits = model.eval()(image)
        assert (logits - torch.tensor(shown[str(stage)])).abs().max() <= 1e-5


def _scaled(folder: Path) -> dict[str, Any]:
    """Three steps with a loss scale, the second of which overflows on rank 1."""
    found = {}
    for name in ("ddp", 0, 1, 2, 3):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        made = strategy.build(
            "ddp" if name == "ddp" else "deepspeed", model, optimizer, scaler, 0.01,
            zero_stage=0 if name == "ddp" else int(name),
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


def _many(folder: Path) -> dict[str, list[float]]:
    process, grown = psutil.Process(), {}
    for stage in (1, 3):
        used = []
        for _ in range(TRIALS):
            next(epochs(folder, replace(STAGES[stage], epochs=1)))
            gc.collect()
            used.append(process.memory_info().rss / 2**20)
        alive = sum(isinstance(each, UNet) for each in gc.get_objects())
        grown[str(stage)] = [used[-1] - used[TRIALS // 5], float(alive)]
    return grown


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.row("K8")
def test_fifty_runs_one_after_another_do_not_grow(tmp_path):
    for rank in together(tmp_path, _many):
        for grown_mib, alive in rank.values():
            assert alive == 0
            assert grown_mib < 20


def _refused(folder: Path) -> str:
    try:
        next(epochs(folder, replace(STAGES[3], ema_decay=0.9)))
    except StrategyError as error:
        return str(error)
    return ""


@needs_deepspeed
def test_an_average_of_weights_that_nobody_has_is_refused(tmp_path):
    for message in together(tmp_path, _refused):
        assert message.startswith("ema_decay: got 0.9 with zero_stage 3")
        assert "write zero_stage: 2, or ema_decay: 0" in message


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
