"""Images a second of our epoch loop next to a plain PyTorch loop with the same network, optimiser and batches.

Both train UNet 3+ on random images, in turns, validation left out. On a GPU also: bf16 in channels_last against fp32,
and the peak of its memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segmentation import networks, training
from segmentation.epoch import Epoch
from segmentation.networks import Network
from segmentation.training import TrainingConfig

TINY = {"rounds": 1, "steps": 2, "size": 64}
CLASSES = 3


def measure(rounds: int = 7, steps: int = 0, size: int = 0) -> dict[str, Any]:
    """Return ours as a part of plain PyTorch's images a second; zeros: what suits the device.

    Args:
        rounds: epochs of each loop; the first warms up and does not count.
        steps: in an epoch.
        size: side of an image.
    """
    on_gpu = torch.cuda.is_available()
    steps, size = steps or (50 if on_gpu else 4), size or (512 if on_gpu else 96)
    config = TrainingConfig(epochs=rounds + 1, batch_size=16 if on_gpu else 4, optimizer="adamw", precision="fp32")
    ours, plain = _in_turns(_ours(config, steps, size), _plain(config, steps, size), rounds)
    images = config.batch_size * steps
    result = {
        "ours_over_plain": round(statistics.median(p / o for o, p in zip(ours, plain, strict=True)), 4),
        "images_per_s": round(images / statistics.median(ours), 2),
        "size": size,
        "on_gpu": int(on_gpu),
    }
    return {**result, **_economical(config, steps, size, rounds)} if on_gpu else result


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the README's rows."""
    where = f"{'a GPU' if result['on_gpu'] else 'two cores'}, {result['size']} pixels"
    rows = [
        (
            f"our epoch loop, UNet 3+ on {where}",
            f"{result['ours_over_plain']:.3f} of a plain PyTorch loop's images a second",
            "aim: at least 0.98",
        )
    ]
    if result["on_gpu"]:
        rows.append(
            (
                "bf16 in channels_last",
                f"{result['bf16_over_fp32']:.2f} x the images a second of fp32",
                f"peak memory {result['bf16_peak_gib']:.1f} GiB, {result['fp32_peak_gib']:.1f} GiB in fp32",
            )
        )
    return rows


def _in_turns(ours: Iterator[float], plain: Iterator[float], rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each epoch, one loop after the other, so that a busy machine slows both."""
    next(ours), next(plain)
    pairs = [(next(ours), next(plain)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _ours(config: TrainingConfig, steps: int, size: int) -> Iterator[float]:
    """Yield the seconds that each epoch of ours took."""
    batch = _batch(config, size)
    epochs: Iterator[Epoch] = training.fit(
        config,
        model=_network(),
        loss=_loss,
        train_batches=lambda epoch: itertools.repeat((*batch, torch.arange(config.batch_size)), steps),
        validate=lambda model: {"val_loss": 0.0},
        meta={},
        resume=None,
    )
    yield from _timed(lambda: next(epochs))


def _plain(config: TrainingConfig, steps: int, size: int) -> Iterator[float]:
    """Yield the seconds that each epoch takes in the loop of a tutorial, in our memory layout."""
    device = training.resolve_device("auto")
    model = _network().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    image, mask = _batch(config, size)

    def epoch() -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = _loss(model(image.to(device)), mask.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        loss.item()

    yield from _timed(epoch)


def _timed(epoch: Callable[[], object]) -> Iterator[float]:
    while True:
        begun = time.perf_counter()
        epoch()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield time.perf_counter() - begun


def _economical(config: TrainingConfig, steps: int, size: int, rounds: int) -> dict[str, float]:
    """Return what half precision gains on a GPU, and the memory of both."""
    seconds, peaks = {}, {}
    modes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for mode in modes:
        torch.cuda.reset_peak_memory_stats()
        changed = dataclasses.replace(config, precision=mode, channels_last=mode == "bf16")
        taken = list(itertools.islice(_ours(changed, steps, size), rounds + 1))[1:]
        seconds[mode], peaks[mode] = statistics.median(taken), torch.cuda.max_memory_allocated() / 2**30
    return {
        "bf16_over_fp32": round(seconds["fp32"] / seconds["bf16"], 2),
        **{f"{name}_peak_gib": round(peak, 2) for name, peak in peaks.items()},
    }


def _network() -> nn.Module:
    torch.manual_seed(0)
    return networks.build(Network(name="unet3plus", encoder="resnet18", cat_channels=16), 3, CLASSES)


def _loss(output: Any, mask: Tensor) -> Tensor:
    return nn.functional.cross_entropy(getattr(output, "logits", output), mask)


def _batch(config: TrainingConfig, size: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    image = torch.rand(config.batch_size, 3, size, size, generator=drawn)
    mask = torch.randint(CLASSES, (config.batch_size, size, size), generator=drawn)
    return (image.pin_memory(), mask.pin_memory()) if torch.cuda.is_available() else (image, mask)
