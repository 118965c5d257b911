"""What a network costs where it runs: parameters, MACs, latency and peak memory, each with its convention."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segmentation.networks import cost

CONVENTIONS = {
    "parameters": "numbers learned, frozen ones included; batch-norm statistics are not",
    "macs": "multiply-accumulates of one image, 1 MAC = 2 FLOPs: convolutions, transposed ones, linear layers and "
    "matrix products; not biases, normalisation, activations, pooling, interpolation",
    "latency": "milliseconds of one forward pass as its caller waits for it, float32; p50 and p95 over the timed "
    "passes, warm-up left out; a GPU is synchronised before and after each",
    "peak_mib": "largest memory of tensors at any moment of one pass, weights and image included; on a CPU the "
    "storage of living tensors, on a GPU by torch.cuda.max_memory_allocated; scratch space inside a CPU kernel is "
    "not seen",
}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one call takes."""

    p50_ms: float
    p95_ms: float
    runs: int
    warmup: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one network costs for a batch of images of one size on one device; `CONVENTIONS` says how it is counted."""

    parameters: int
    macs: int
    """Of one image, whatever the batch."""
    p50_ms: float
    p95_ms: float
    peak_mib: float
    device: str
    """cpu, or the GPU's name."""
    threads: int | None
    """Of the CPU; None on a GPU."""
    batch: int
    channels: int
    height: int
    width: int
    runs: int
    warmup: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the conventions among them."""
        return {**dataclasses.asdict(self), "conventions": dict(CONVENTIONS)}


def measure(
    model: nn.Module,
    channels: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    device: torch.device | str | None = None,
    threads: int | None = None,
    runs: int = 30,
    warmup: int = 5,
) -> Cost:
    """Return what a network costs for images (B, C, H, W) on a device (its own, if not given), where it then stays.

    threads: of the CPU; None: as many as PyTorch has now.

    Raises:
        ValueError: for fewer than one run, thread or image, or a negative warm-up.
    """
    least_values = {"batch": (batch, 1), "threads": (threads or 1, 1), "runs": (runs, 1), "warmup": (warmup, 0)}
    for name, (value, least) in least_values.items():
        if value < least:
            raise ValueError(f"{name}: got {value}; expected at least {least}")
    place = torch.device(device) if device is not None else _device(model)
    image = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0)).to(place)
    with _ready(model.to(place), threads):
        wait = _nothing if place.type == "cpu" else lambda: torch.cuda.synchronize(place)
        told = latency(lambda: model(image), runs=runs, warmup=warmup, wait=wait)
        return Cost(
            parameters=cost.parameters(model),
            macs=cost.macs(model, channels, height, width),
            peak_mib=_peak_bytes(model, image) / 2**20,
            device="cpu" if place.type == "cpu" else torch.cuda.get_device_name(place),
            threads=torch.get_num_threads() if place.type == "cpu" else None,
            batch=batch,
            channels=channels,
            height=height,
            width=width,
            **dataclasses.asdict(told),
        )


def in_turns(
    models: Sequence[nn.Module],
    channels: int,
    height: int,
    width: int,
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    rounds: int = 7,
    runs: int = 3,
) -> list[float]:
    """Return the p50 of each network in ms, one image at a time, timed in turns: what else runs falls on all alike."""
    place = torch.device(device)
    image = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0)).to(place)
    wait = _nothing if place.type == "cpu" else lambda: torch.cuda.synchronize(place)
    found: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, taken_ms in zip(models, found, strict=True):
            with _ready(model.to(place), threads):
                call = functools.partial(model, image)
                taken_ms.append(latency(call, runs=runs, warmup=1, wait=wait).p50_ms)
    return [statistics.median(taken_ms) for taken_ms in found]


def latency(call: Callable[[], object], *, runs: int, warmup: int, wait: Callable[[], None] | None = None) -> Latency:
    """Return how long a call takes; `wait` returns once what was asked for is done, as on a GPU."""
    wait = wait or _nothing
    taken_ms = []
    for _ in range(warmup + runs):
        wait()
        started = time.perf_counter()
        call()
        wait()
        taken_ms.append(1e3 * (time.perf_counter() - started))
    timed = taken_ms[warmup:]
    p95 = float(np.percentile(timed, 95))
    return Latency(p50_ms=statistics.median(timed), p95_ms=p95, runs=runs, warmup=warmup)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return lines of two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def rows(found: Cost) -> list[tuple[str, str]]:
    """Return a cost as people read it."""
    threads = f", {found.threads} thread{'s' * (found.threads > 1)}" if found.threads else ""
    return [
        ("parameters", f"{found.parameters:,}"),
        ("GMACs", f"{found.macs / 1e9:.4f}  (1 MAC = 2 FLOPs)"),
        ("latency p50", f"{found.p50_ms:.2f} ms"),
        ("latency p95", f"{found.p95_ms:.2f} ms"),
        ("peak memory", f"{found.peak_mib:.1f} MiB"),
        ("measured for", f"{found.batch} x {found.channels} x {found.height} x {found.width}, float32"),
        ("measured on", f"{found.device}{threads}, {found.runs} runs after {found.warmup} to warm up"),
    ]


def _peak_bytes(model: nn.Module, image: Tensor) -> int:
    living = _Living([*model.parameters(), *model.buffers(), image])
    if image.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(image.device)
        before, own = torch.cuda.memory_allocated(image.device), living.now
        model(image)
        return int(torch.cuda.max_memory_allocated(image.device)) - before + own
    with living:
        model(image)
    return living.peak


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the largest number of bytes that the storages of living tensors had together; views have their base's."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in given:
            self._add(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return found

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextlib.contextmanager
def _ready(model: nn.Module, threads: int | None) -> Iterator[None]:
    """Put the network into evaluation and PyTorch at some threads, and both back."""
    training, before = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _nothing() -> None:
    """Wait for nothing: a CPU has done what it was asked when it returns."""
