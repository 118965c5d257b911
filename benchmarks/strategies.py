"""Train a small UNet by one process, by DDP and by DeepSpeed's ZeRO 0 to 3, and take the largest difference found.

Two processes with gloo on the CPU, five steps of one batch, of which each takes half. `reload_logits`: a checkpoint of
each ZeRO stage, loaded by one process, against what the ranks computed. `counts_difference`: pixels counted by two
ranks that share seven images, against one process that has them all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn

from segmentation import checkpoints, evaluation, losses, ranks, training
from segmentation.epoch import Epoch
from segmentation.losses import Loss
from segmentation.networks.unet import UNet
from segmentation.training import TrainingConfig

TINY = {"steps": 2, "size": 16}
IMAGES, CLASSES, STAGES = 7, 2, (0, 1, 2, 3)
ONE = TrainingConfig(batch_size=4, lr=1e-2, device="cpu", precision="fp32", threads=1)


def measure(steps: int = 5, size: int = 64) -> dict[str, Any]:
    """Return the largest differences of losses, logits and counts."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, steps, size), nprocs=2)  # type: ignore[no-untyped-call, attr-defined]
        found = json.loads((Path(folder) / "0.json").read_text(encoding="utf-8"))
        alone, _, counts = _trained(ONE, steps, size)
        reload = max(_reloaded(Path(folder) / str(stage), found["logits"][str(stage)], size) for stage in STAGES)
    zero = [_apart(found["losses"][f"zero{stage}"], found["losses"]["ddp"]) for stage in STAGES]
    return {
        "ddp_vs_single_loss": _apart(found["losses"]["ddp"], alone),
        "deepspeed_vs_ddp_loss": max(zero),
        "reload_logits": reload,
        "counts_difference": int((torch.tensor(found["counts"]) - counts).abs().max()),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    rows = [
        ("ddp_vs_single_loss", "loss of two DDP ranks against one process, largest difference over 5 steps", "1e-5"),
        ("deepspeed_vs_ddp_loss", "loss of DeepSpeed ZeRO 0 to 3 against DDP, largest difference over 5 steps", "1e-4"),
        ("reload_logits", "logits of a DeepSpeed checkpoint loaded by one process, largest difference", "1e-5"),
        ("counts_difference", "pixels counted by two ranks and by one, 7 images, largest difference", "0"),
    ]
    return [(what, f"{result[key]:.1g}", f"aim: at most {bar}") for key, what, bar in rows]


def _rank(number: int, folder: str, steps: int, size: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    two = replace(ONE, batch_size=2)
    told, _, counts = _trained(replace(two, strategy="ddp"), steps, size)
    found: dict[str, Any] = {"losses": {"ddp": told}, "logits": {}, "counts": counts.tolist()}
    for stage in STAGES:
        config = replace(two, strategy="deepspeed", zero_stage=stage)
        told, logits, _ = _trained(config, steps, size, Path(folder) / str(stage))
        found["losses"][f"zero{stage}"], found["logits"][str(stage)] = told, logits.tolist()
    (Path(folder) / f"{number}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _trained(
    config: TrainingConfig, steps: int, size: int, keep: Path | None = None
) -> tuple[list[float], Tensor, Tensor]:
    """Train one step an epoch; return each loss, the logits of all images, and the pixels of the first weights."""
    shown: list[Tensor] = []

    def validate(model: nn.Module) -> dict[str, float]:
        shown.append(model(_images(size)[0]))
        return {"val_loss": 0.0}

    told = []
    for epoch in _run(replace(config, epochs=steps), size, validate):
        told.append(epoch.metrics["train_loss"])
        if keep is not None:
            epoch.save(keep)
    return told, shown[-1], _counts(_network().eval(), size)


def _run(config: TrainingConfig, size: int, validate: Any) -> Iterator[Epoch]:
    image, mask = _images(size)
    mine = torch.tensor(list(ranks.shard(range(ONE.batch_size))))
    return training.fit(
        config,
        model=_network(),
        loss=losses.build(Loss(), multilabel=False),
        train_batches=lambda epoch: [(image[mine], mask[mine], mine)],
        validate=validate,
        meta={},
    )


def _counts(model: nn.Module, size: int) -> Tensor:
    """Return the pixels of each predicted and true class (K, K) over all images, of which each rank scores a part."""
    image, mask = _images(size)
    part = torch.tensor(list(ranks.shard(range(IMAGES))))
    per_image = losses.build_per_image(Loss(), multilabel=False)
    batches = [(image[part], mask[part], part)]
    scores = evaluation.gather(evaluation.score_batches(model, batches, CLASSES, multilabel=False, loss=per_image))
    return torch.as_tensor(scores.counts).sum(0)


def _reloaded(checkpoint: Path, shown: list[Any], size: int) -> float:
    model = _network()
    checkpoints.load_weights(checkpoint, model)
    with torch.inference_mode():
        logits = model.eval()(_images(size)[0])
    return _apart(logits.flatten().tolist(), torch.tensor(shown).flatten().tolist())


def _apart(ours: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, others, strict=True))


def _network() -> nn.Module:
    training.seed_everything(0)
    return UNet(1, CLASSES, widths=(8, 16), bottleneck=32, norm="group")


def _images(size: int) -> tuple[Tensor, Tensor]:
    image = torch.rand(IMAGES, 1, size, size, generator=torch.Generator().manual_seed(0))
    return image, (image[:, 0] > 0.5).long()
