"""Fine-tuning: start from another run's weights, with the encoder frozen for the first epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from segmentation import checkpoints
from segmentation.epoch import DataError

THIRD_ROW = {"outc": (2,)}


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Start from a trained network; only where `checkpoint` is given."""

    checkpoint: str = ""
    """Checkpoint folder, or a .pt file of the original with the weights under `model`; empty: no fine-tuning."""
    freeze_epochs: int = 10
    """First epochs in which the encoder stays as it is, batch statistics included."""
    frozen: tuple[str, ...] = ("enc1", "enc2", "bott")
    """Parts of the network that are frozen."""
    reset_third: bool = False
    """Draw the third output channel anew: it was a placeholder in a noEL run."""

    def __post_init__(self) -> None:
        if self.freeze_epochs < 0:
            raise ValueError(f"freeze_epochs: got {self.freeze_epochs}; expected 0 or more")


def check(config: Finetune, model: nn.Module) -> None:
    """Raise before any training if the checkpoint or a part to freeze is not there."""
    if not config.checkpoint:
        return
    path = Path(config.checkpoint).expanduser()
    if not path.exists():
        raise DataError(f"finetune.checkpoint: {path} does not exist; expected a checkpoint folder or a .pt file")
    parts = dict(model.named_children())
    if unknown := [name for name in config.frozen if name not in parts]:
        raise ValueError(f"finetune.frozen: no part {', '.join(unknown)}; the network has {', '.join(parts)}")


def start(config: Finetune, model: nn.Module) -> None:
    """Fill the network with the checkpoint's weights; with `reset_third` all but the third output row.

    Raises:
        CheckpointError: if they are of another network.
    """
    if config.checkpoint:
        source = Path(config.checkpoint).expanduser()
        rows = THIRD_ROW if config.reset_third else None
        checkpoints.fill(model, weights(source), source=str(source), fresh_rows=rows)


def weights(source: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint folder, a .pt file of the original, or a .safetensors file."""
    if source.is_dir():
        return checkpoints.safetensors_weights(source / checkpoints.WEIGHTS_FILE)
    if source.suffix == ".safetensors":
        return checkpoints.safetensors_weights(source)
    return checkpoints.torch_weights(source, key="model")


def stage(config: Finetune, model: nn.Module, epoch: int) -> None:
    """Freeze or thaw the encoder, as the epoch (from 1) wants it.

    Call it at the start of each epoch, after the optimiser is made: it then knows all parameters, and skips those that
    get no gradient, weight decay included.
    """
    if config.checkpoint:
        set_frozen(model, config.frozen, frozen=epoch <= config.freeze_epochs)


def set_frozen(model: nn.Module, names: Sequence[str], *, frozen: bool) -> None:
    """Keep parts of a network in evaluation mode and out of the gradient, or let them go again."""
    for name in names:
        part = model.get_submodule(name)
        part.requires_grad_(not frozen)
        if frozen:
            part.eval()
            # model.train() calls train() of each part; batch norm would move its statistics even without gradients.
            vars(part)["train"] = lambda mode=True, part=part: part
        else:
            vars(part).pop("train", None)
