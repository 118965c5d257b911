"""A checkpoint folder: weights.safetensors to use, checkpoint.json to read, state.pt to go on from.

    weights.safetensors    the network's parameters and buffers (averaged ones where averaging is on)
    checkpoint.json        workload, config, classes, epoch, metrics, versions; size and sha256 of the other two
    state.pt               optimiser, learning rate, averages and counters, read back with weights_only=True
    rewind.safetensors     where asked for: weights of an early epoch of the same run, to begin again from

Every file is written under a temporary name and renamed; checkpoint.json comes last and vouches for the others, so that
a folder overwritten half-way is found out when it is read. Nothing here runs code found in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from segmentation.epoch import DataError

WEIGHTS_FILE = "weights.safetensors"
META_FILE = "checkpoint.json"
STATE_FILE = "state.pt"
REWIND_FILE = "rewind.safetensors"
FORMAT = 1


class CheckpointError(DataError):
    """A checkpoint that is missing, damaged, or of another network."""


def save(
    folder: Path,
    *,
    model: nn.Module,
    meta: Mapping[str, Any],
    state: Mapping[str, Any],
    rewind: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint into the folder (made if missing), replacing the one that was there.

    meta: plain data for checkpoint.json.
    state: tensors and plain data for state.pt; empty: no state.pt, a checkpoint to use but not to go on from.
    rewind: weights of an early epoch, on the CPU, from `plain_weights`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = plain_weights(model)
    files = {WEIGHTS_FILE: _write(folder / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(weights, path))}
    if rewind:
        early = dict(rewind)
        files[REWIND_FILE] = _write(folder / REWIND_FILE, lambda path: safetensors.torch.save_file(early, path))
    if state:
        files[STATE_FILE] = _write(folder / STATE_FILE, lambda path: torch.save(dict(state), path))
    record = {"format": FORMAT, **meta, "versions": versions(), "files": files}
    text = json.dumps(record, indent=1, allow_nan=False)
    _write(folder / META_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers on the CPU, apart from the graph; on the CPU they are the network's own memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def read_meta(folder: Path) -> dict[str, Any]:
    """Return checkpoint.json.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    path = folder / META_FILE
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder}: a file; expected a checkpoint folder, which holds {META_FILE}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no checkpoint here, {META_FILE} is missing") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: holds a {type(meta).__name__}; expected an object; use another checkpoint")
    return meta


def load_weights(folder: Path, model: nn.Module, *, fresh_rows: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Fill the network with the checkpoint's weights, every one of them.

    fresh_rows: output channels that keep the network's own values, by the name of their layer: {"outc": (2,)}.

    Raises:
        CheckpointError: if the file is missing, damaged or of another network.
    """
    fill(model, load_tensors(folder), source=str(folder), fresh_rows=fresh_rows)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the checkpoint's weights by name; raises as `load_weights`."""
    return safetensors_weights(_verified(folder, WEIGHTS_FILE))


def load_rewind(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the early epoch that a checkpoint keeps; its own, if it is from before that epoch.

    Raises:
        CheckpointError: if it keeps none, or they are damaged.
    """
    check_rewind(folder)
    return safetensors_weights(_verified(folder, REWIND_FILE if has_rewind(folder) else WEIGHTS_FILE))


def check_rewind(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint keeps no weights of an early epoch, and is none of so early an epoch."""
    meta = read_meta(folder)
    early = meta.get("epoch", 0) < meta.get("config", {}).get("rewind_epoch", 0)
    if not (early or has_rewind(folder)):
        raise CheckpointError(
            f"{folder}: has no {REWIND_FILE}, the weights to rewind to; train it with rewind_epoch=1 or more, "
            "or prune in mode none or random"
        )


def has_rewind(folder: Path) -> bool:
    """Return whether a checkpoint keeps weights of an early epoch."""
    return REWIND_FILE in read_meta(folder).get("files", {})


def load_state(folder: Path) -> dict[str, Any]:
    """Return what was saved to go on from, its tensors on the CPU.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = _verified(folder, STATE_FILE)
    state = torch_file(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected a state to go on from")
    return state


def identity(folder: Path) -> str:
    """Return the sha256 of checkpoint.json, which vouches for all other files.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    read_meta(folder)
    return _sha256(folder / META_FILE)


def digest(folder: Path) -> str:
    """Return the sha256 of the weights, as checkpoint.json records it."""
    recorded: str = _recorded(folder, WEIGHTS_FILE)["sha256"]
    return recorded


def safetensors_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error


def torch_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the weights of a .pt file that another program saved, or those under a key in it (`model`).

    Raises:
        CheckpointError: if the file is missing, damaged, holds more than tensors and plain data, or lacks the key.
    """
    content = torch_file(path)
    if key is not None and not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a mapping with the key {key!r}")
    if key is not None and key not in content:
        raise CheckpointError(f"{path}: no key {key!r}; it has {', '.join(map(str, content))}")
    weights: dict[str, Tensor] = content if key is None else content[key]
    return weights


def torch_file(path: Path) -> Any:
    """Return what a .pt file holds; nothing in it is run, and it takes no more memory than its own size."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{path}: holds compressed parts, as torch.save never writes; save it again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    # What comes of a broken file differs from byte to byte.
    except Exception as error:
        problem = " ".join(str(error).split())[:500] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a file of tensors and plain data, or damaged ({problem}); use another checkpoint"
        ) from error


def fill(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    fresh_rows: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Copy weights into a network of the same names and shapes; see `load_weights`.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    own = model.state_dict()
    _check_match(own, weights, source)
    weights = dict(weights)
    for layer, rows in (fresh_rows or {}).items():
        for name in [name for name in own if name.rpartition(".")[0] == layer and own[name].ndim > 0]:
            mixed = weights[name].clone()
            mixed[list(rows)] = own[name][list(rows)].to(mixed)
            weights[name] = mixed
    model.load_state_dict(weights)


def paired(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return weights of other names under a network's own: both in order, the first to the first, counters left out.

    Each pair has to agree in shape and in the last part of its names (weight, bias, running_mean), and none may be left
    over. Two layers of one kind and shape that stand in another order cannot be told apart: order is taken as given.

    Raises:
        CheckpointError: naming the first pair that does not agree, or how many tensors each side has.
    """
    ours, theirs = _without_counters(own), _without_counters(weights)
    for (name, tensor), (other, found) in zip(ours.items(), theirs.items(), strict=False):
        if tensor.shape != found.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise CheckpointError(
                f"{source}: weights of another network: in order, {other} {tuple(found.shape)} stands where "
                f"{name} {tuple(tensor.shape)} is expected"
            )
    if len(ours) != len(theirs):
        raise CheckpointError(
            f"{source}: weights of another network: {len(theirs)} tensors; expected {len(ours)}, in order"
        )
    return dict(zip(ours, theirs.values(), strict=True))


def versions() -> dict[str, str]:
    """Return the versions that numbers may depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without batch norm's counts of batches, which older files lack."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def mismatch(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return what is missing in weights, left over or of another shape, the first three; empty: nothing."""
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}"


def _check_match(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    if problems := mismatch(own, weights):
        raise CheckpointError(
            f"{source}: weights of another network: {problems}; build the network with the checkpoint's own config"
        )


def _write(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Write beside the path, rename, and return size and sha256.

    Raises:
        DataError: if the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        write(temporary)
        record = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error}); make room or choose another folder") from error
    return record


def _recorded(folder: Path, name: str) -> dict[str, Any]:
    files = read_meta(folder).get("files", {})
    if name not in files:
        raise CheckpointError(f"{folder}: {META_FILE} speaks of no {name}; this checkpoint was saved without it")
    record: dict[str, Any] = files[name]
    return record


def _verified(folder: Path, name: str) -> Path:
    """Return the path of a file that is what checkpoint.json says it is."""
    record, path = _recorded(folder, name), folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; use another checkpoint")
    if path.stat().st_size != record["bytes"] or _sha256(path) != record["sha256"]:
        raise CheckpointError(f"{path}: not the file that {META_FILE} describes, damaged or half overwritten")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
