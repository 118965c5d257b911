"""DeepSpeed's ZeRO as a strategy: several processes that each keep a part of what training needs.

Stage 0 spreads nothing, 1 the optimiser's state, 2 the gradients too, 3 the weights too. Source: Rajbhandari et al.
2020, arXiv:1910.02054.

The engine's configuration is made here of the run's own values; there is no file of it. Optimiser, autocast and loss
scale are ours and weights are fp32, so that a run means the same as by ddp. A state has the form that optimisers of
torch give theirs, whatever the stage: a checkpoint knows no strategy.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import importlib.util
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmentation.epoch import NonFiniteError
from segmentation.strategy import Single, StrategyError, Whole, lay_in_a_row

# Larger buckets than these have no use; DeepSpeed's own default reserves 2 GB of them for the smallest network.
LARGEST_BUCKET = 500_000_000
COMPILE_WORDS = ("ninja", "c++", "g++", "cpp_extension", "compiler", "cuda_home")


class ZeRO(Single):
    """Several processes of the group that is up, through a DeepSpeed engine."""

    local = False
    lockstep = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_norm: float,
        *,
        stage: int,
        batch_size: int,
    ) -> None:
        super().__init__(model, optimizer, scaler, clip_norm)
        self.stage = stage
        self.device = next(model.parameters()).device
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._whole = Whole(model) if stage == 3 else None
        self._layout = lay_in_a_row(model)
        self._deepspeed = _imported(self.device)
        self._inside = _Casting(model)
        self._local_rank = _set_local_rank(_number(self.device))
        with _building():
            self.engine = self._deepspeed.initialize(
                model=self._inside,
                optimizer=optimizer,
                config=engine_config(
                    stage=stage,
                    batch_size=batch_size,
                    clip_norm=clip_norm,
                    parameters=sum(parameter.numel() for parameter in model.parameters()),
                ),
                dist_init_required=False,
            )[0]

    def forward(self, image: Tensor, *, last: bool = True) -> Any:
        """Return what the network says of this rank's images."""
        # The engine switches autocast off around its network; inside it is switched on again.
        kind = image.device.type
        self._inside.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.engine(image.to(memory_format=self._layout))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients; `last` ends a batch that was worked on in parts."""
        if self.stage == 0:
            loss = self.scaler.scale(loss)
        elif self.scaler.is_enabled():
            self.engine.optimizer.override_loss_scale(self.scaler.get_scale())
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Move the weights and forget the gradients.

        Raises:
            NonFiniteError: on every rank, if a gradient is not finite and no loss scale could be to blame.
        """
        if self.stage == 0:
            super().step()
            return
        self.engine.step()
        self.grad_norm = self.engine.get_global_grad_norm() if self.clip_norm else None
        overflow = bool(self.engine.optimizer.overflow)
        if self.scaler.is_enabled():
            _rescale(self.scaler, overflow)
        elif overflow:
            raise NonFiniteError("a gradient is not finite; lower lr, set clip_norm, or use precision=fp32")

    def network(self) -> nn.Module:
        """Return the network with all of its weights; at stage 3 a copy made now, on every rank."""
        if self._whole is None:
            return self.model
        weights = list(self.model.parameters())
        with self._deepspeed.zero.GatheredParameters(weights):
            return self._whole.filled(self.model, weights, self.device)

    def free_network(self) -> None:
        """Let the copy of stage 3 wait in the host's memory."""
        if self._whole is not None:
            self._whole.network.cpu()

    def state(self) -> dict[str, Any]:
        """Return what the next process needs to go on, whatever its strategy; every rank has to ask."""
        if self.stage == 0:
            return super().state()
        groups, first = [], 0
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            groups.append({**group, "params": list(range(first, first + size))})
            first += size
        return {"optimizer": {"state": self._gathered(), "param_groups": groups}, "scaler": self.scaler.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the weights have to be in the network before the engine is made."""
        if self.stage == 0:
            super().load(state)
            return
        self.scaler.load_state_dict(state["scaler"])
        for group, saved in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if state["optimizer"]["state"]:
            self._scatter(state["optimizer"]["state"])

    def release(self) -> None:
        """Free what the engine holds; the process group stays."""
        engine, self.engine = self.engine, None
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        _set_local_rank(self._local_rank)
        for parameter in self.parameters:
            parameter.grad = None
            for name in [name for name in vars(parameter) if name not in ("grad", "data")]:
                delattr(parameter, name)
        vars(engine).clear()
        _forget_modules(self._inside)
        self.parameters.clear()
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        self._whole = None
        # Engine, hooks and parameters hold each other.
        gc.collect()

    def _flats(self) -> list[Tensor]:
        """Return this rank's parts of the fp32 weights, which the optimiser's state is kept for."""
        inner = self.engine.optimizer
        flats: list[Tensor] = (
            inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups
        )
        return flats

    def _gathered(self) -> dict[int, dict[str, Any]]:
        """Return the state of each parameter as if one process had trained it."""
        flat = self._flats()[0]
        known = self.optimizer.state.get(flat, {})
        get = self._deepspeed.utils.safe_get_full_optimizer_state

        def full(parameter: Tensor, key: str, value: Any) -> Any:
            of_weights = torch.is_tensor(value) and value.shape == flat.shape
            return get(parameter, key).detach().clone() if of_weights else copy.deepcopy(value)

        return {
            index: {key: full(parameter, key, value) for key, value in known.items()}
            for index, parameter in enumerate(self.parameters if known else [])
        }

    def _scatter(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Give this rank its parts of the state of all parameters."""
        known = max(state.values(), key=len)
        if len({float(values.get("step", 0)) for values in state.values()}) > 1:
            raise StrategyError(
                f"zero_stage: got {self.stage} to go on from weights that rested for part of the run (freeze_epochs), "
                "but it keeps one count of steps for all of them; write zero_stage: 0, or strategy: ddp or fsdp"
            )
        # Counts, such as Adam's steps, are single numbers and the same for all.
        of_weights = [key for key, value in known.items() if torch.is_tensor(value) and value.ndim > 0]
        for flat in self._flats():
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if key in of_weights else copy.deepcopy(value)
                for key, value in known.items()
            }
        if self.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.parameters):
            for key in of_weights if index in state else []:
                self._set(parameter, key, state[index][key].to(self.device, torch.float32))

    def _set(self, parameter: Tensor, key: str, value: Tensor) -> None:
        utils = self._deepspeed.utils
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value.contiguous(), key)
            return
        # DeepSpeed's own way for whole values cannot cut those that do not divide evenly.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(size * self.world)
        padded[: value.numel()] = value.flatten()
        utils.safe_set_local_optimizer_state(parameter, padded[size * self.rank : size * (self.rank + 1)], key)


class _Casting(nn.Module):
    """A network that computes in the type which held where the engine was called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtype: torch.dtype | None = None

    def forward(self, image: Tensor) -> Any:
        """Return what the network says."""
        if self.dtype is None:
            return self.network(image)
        with torch.autocast(image.device.type, dtype=self.dtype):
            return self.network(image)


def engine_config(*, stage: int, batch_size: int, clip_norm: float, parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run; `parameters` is how many numbers the network has."""
    bucket = min(parameters + parameters % 2, LARGEST_BUCKET)  # it has to be even
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
    }


def _imported(device: torch.device) -> Any:
    """Import DeepSpeed for a device and keep it from compiling and from talking."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    _show_ninja()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.utils")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if accelerator != device.type:
        raise StrategyError(
            f"device: got {device.type}, but DeepSpeed was set up for {accelerator} in this process; "
            f"write device: {accelerator}, or start a process with DS_ACCELERATOR={device.type}"
        )
    # Half a minute of compiling for a sum that only inference takes; what training takes is gloo's.
    compatible = getattr(importlib.import_module("deepspeed.ops"), "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
    return deepspeed


def _show_ninja() -> None:
    """Put ninja on the PATH where it lies beside this Python, or in its package, but is not found."""
    if shutil.which("ninja"):
        return
    folders = [Path(sys.executable).parent]
    if (spec := importlib.util.find_spec("ninja")) is not None and spec.origin:
        folders += [Path(spec.origin).parent / "data" / "bin", Path(spec.origin).parent.parent / "bin"]
    for folder in folders:
        if (folder / "ninja").is_file():
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(folder)])
            return


def _forget_modules(network: nn.Module) -> None:
    """Take a network out of what stage 3 keeps for as long as the process lives: a list of engines' modules, a cache.

    What of the cache belongs to other engines is found again.
    """
    package = "deepspeed.runtime.zero"
    modules = {id(module) for module in network.modules()}
    stack = getattr(sys.modules.get(f"{package}.parameter_offload"), "FWD_MODULE_STACK", [])
    stack[:] = [module for module in stack if id(module) not in modules]
    coordinator = getattr(
        sys.modules.get(f"{package}.partitioned_param_coordinator"), "PartitionedParameterCoordinator", None
    )
    for method in filter(inspect.isfunction, vars(coordinator).values() if coordinator is not None else ()):
        # Each is wrapped, without saying what it wraps.
        for cell in method.__closure__ or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _set_local_rank(value: str | None) -> str | None:
    """Set the number that DeepSpeed takes for the GPU's, whenever it likes; return what it was."""
    before = os.environ.pop("LOCAL_RANK", None)
    if value is not None:
        os.environ["LOCAL_RANK"] = value
    return before


def _number(device: torch.device) -> str:
    current = torch.cuda.current_device() if device.type == "cuda" else 0
    return str(current if device.index is None else device.index)


@contextlib.contextmanager
def _building() -> Iterator[None]:
    """Say what to install where DeepSpeed wants to compile and cannot."""
    try:
        yield
    except (RuntimeError, OSError, ImportError) as error:
        missing = [
            what
            for what, found in {
                "ninja (pip install ninja)": shutil.which("ninja"),
                "a C++ compiler (apt-get install g++)": shutil.which(os.environ.get("CXX", "c++"))
                or shutil.which("g++"),
            }.items()
            if not found
        ]
        if missing and any(word in str(error).lower() for word in COMPILE_WORDS):
            raise StrategyError(
                f"strategy: DeepSpeed has to compile a part of itself; install {' and '.join(missing)}, or write ddp"
            ) from error
        raise


def _rescale(scaler: torch.amp.GradScaler, overflow: bool) -> None:
    """Do to the loss scale what GradScaler.update does after a step that overflowed, or did not."""
    state = scaler.state_dict()
    if overflow:
        state["scale"], state["_growth_tracker"] = state["scale"] * state["backoff_factor"], 0
    elif state["_growth_tracker"] + 1 == state["growth_interval"]:
        state["scale"], state["_growth_tracker"] = state["scale"] * state["growth_factor"], 0
    else:
        state["_growth_tracker"] += 1
    scaler.load_state_dict(state)
