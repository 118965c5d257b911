"""What a training run that stands alone leaves in its folder, under the original's names, and the way back from it.

    unet3plus_best/     unet3plus_model.pt and config.json of the epoch with the best score
    unet3plus_final/    the same of the last epoch
    unet3plus_epoch_10/ the same of every tenth
    training_plots.png, training_report.txt, training_curves.npz, history.json

Off unless a folder is given: trials that run side by side must never share files.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import durable
from segmentation import checkpoints, networks
from segmentation.checkpoints import CheckpointError
from segmentation.figures import Colour
from segmentation.networks import Network

Row = Mapping[str, float]
Weights = Mapping[str, Tensor]

MODEL_FILE = "unet3plus_model.pt"
CONFIG_FILE = "config.json"
WEIGHTS_KEY = "model_state_dict"
MODEL_TYPE = "unet3plus"
BEST = "unet3plus_best"
HISTORY_FILE = "history.json"
PLOTS_FILE = "training_plots.png"
REPORT_FILE = "training_report.txt"
CURVES_FILE = "training_curves.npz"
VARIANTS: tuple[Literal["unet3plus", "unet3plus_simplified"], ...] = ("unet3plus", "unet3plus_simplified")
"""The last is the original's network."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP, DeepSpeed and torch.compile put before every name."""
COLOURS: tuple[Colour, ...] = ((31, 119, 180), (214, 39, 40), (255, 127, 14))
PANELS: Mapping[str, Mapping[str, str]] = {
    "loss": {"train_loss": "training", "val_loss": "validation"},
    "mean IoU": {
        "train_mean_iou": "training",
        "val_mean_iou": "validation",
        "val_mean_iou_no_bg": "validation, no background",
    },
    "mean Dice": {
        "train_mean_dice": "training",
        "val_mean_dice": "validation",
        "val_mean_dice_no_bg": "validation, no background",
    },
}
REPORTED = ("train_loss", "val_loss", "val_accuracy", "val_mean_iou", "val_mean_iou_no_bg", "val_mean_dice", "lr")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a network of the original is built from, under the original's names."""

    backbone_name: str
    n_channels: int = 3
    n_classes: int = 3
    cat_channels: int = 64
    deep_supervision: bool = False
    freeze_backbone: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), {"str": str, "int": int, "bool": bool}[str(field.type)]
            if type(value) is not kind:
                raise ValueError(f"{field.name}: got {value!r}; expected {field.type}")


class RunFolder:
    """The folder of one run: its epochs so far, and the files that follow from them.

    metric: what the best epoch is best by; epochs without it, those that were not validated, are never best.
    save_every: keep the weights of every so many epochs; 0: of none.
    """

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        *,
        metric: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        save_every: int = 10,
    ) -> None:
        self.folder, self.architecture = folder, architecture
        self.metric, self.mode, self.save_every = metric, mode, save_every
        self.rows: list[dict[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, epochs_done: int) -> None:
        """Take up the epochs that a resumed run does not repeat; those it does repeat are forgotten."""
        path = self.folder / HISTORY_FILE
        if epochs_done and path.is_file():
            self.rows = [row for row in durable.read_json(path)["epochs"] if row["epoch"] <= epochs_done]

    def add(self, epoch: int, metrics: Row, weights: Weights) -> None:
        """Keep an epoch, counted from 1: as the best so far, and as every tenth, where it is."""
        if self._is_best(metrics):
            save_model(self.folder / BEST, weights, self.architecture)
        if self.save_every and epoch % self.save_every == 0:
            save_model(self.folder / f"unet3plus_epoch_{epoch}", weights, self.architecture)
        self.rows.append({"epoch": epoch, **metrics})
        durable.write_json(self.folder / HISTORY_FILE, {"epochs": self.rows})

    def finish(self, weights: Weights, settings: Mapping[str, Any]) -> list[Path]:
        """Keep the last epoch's weights, write plots, report and curves, and return those three; `settings` head it."""
        save_model(self.folder / "unet3plus_final", weights, self.architecture)
        text = report(self.rows, settings, metric=self.metric, mode=self.mode)
        return [
            draw_plots(self.folder / PLOTS_FILE, self.rows),
            durable.write(self.folder / REPORT_FILE, text),
            write_curves(self.folder / CURVES_FILE, self.rows),
        ]

    def _is_best(self, metrics: Row) -> bool:
        before = best(self.rows, self.metric, self.mode)
        if not _measured(metrics, self.metric):
            return False
        # Of equal epochs the first stays.
        return before is None or best([before, metrics], self.metric, self.mode) is metrics


def best(rows: Sequence[Row], metric: str, mode: Literal["min", "max"]) -> Row | None:
    """Return the first of the best rows that have the metric, or None."""
    scored = [row for row in rows if _measured(row, metric)]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored, key=lambda row: row[metric])


def save_model(folder: Path, weights: Weights, architecture: Architecture) -> None:
    """Write unet3plus_model.pt and config.json, all that loading needs."""
    content = {WEIGHTS_KEY: {name: tensor.detach().cpu() for name, tensor in weights.items()}, **asdict(architecture)}
    stream = io.BytesIO()
    torch.save(content, stream)
    durable.write(folder / MODEL_FILE, stream.getvalue())
    config = {"model_type": MODEL_TYPE, **asdict(architecture)}
    durable.write(folder / CONFIG_FILE, json.dumps(config, indent=2))


def load_model(path: Path) -> tuple[dict[str, Tensor], Architecture]:
    """Return weights and architecture of such a folder, or of a .pt file of the original; no code in it is run.

    Prefixes that wrappers put before every name are taken off.

    Raises:
        CheckpointError: if it is missing, damaged, holds more than tensors and plain data, lacks a key, or if its
            config.json speaks of another network.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    content: Any = checkpoints.torch_weights(file)
    wanted = [WEIGHTS_KEY, *(field.name for field in fields(Architecture))]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}; expected keys {', '.join(wanted)}")
    if missing := [key for key in wanted if key not in content]:
        has = ", ".join(map(str, list(content)[:8]))
        raise CheckpointError(f"{file}: no key {', '.join(missing)}; it has {has}")
    try:
        architecture = Architecture(**{field.name: content[field.name] for field in fields(Architecture)})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    _refuse_other_config(file.parent / CONFIG_FILE, architecture)
    return unwrapped(_tensors(file, content[WEIGHTS_KEY])), architecture


def found_at(path: Path) -> Path | None:
    """Return the .pt file, or the folder with a model of the original's form, that a path means; None: neither.

    A run's own folder means its best epoch.
    """
    if path.is_file():
        return path
    return next((folder for folder in (path, path / BEST) if (folder / MODEL_FILE).is_file()), None)


def load_network(path: Path) -> tuple[nn.Module, Network, Architecture]:
    """Return the network of such a folder or .pt file with its weights, on the CPU, and what it was built from.

    Files of ours are recognised by their names, unet3plus and unet3plus_simplified alike. Any other is taken to be the
    original's: its tensors fill unet3plus_simplified in order, the first the first, where number, shapes and kinds
    (weight, bias, running_mean) all agree. Tried on files of ours, and on the same tensors under other names. No file
    of the original was at hand to try: whether its layers stand in our order is not known, and of those of one
    kind and shape it cannot be seen. Score such a network before you trust it.

    Raises:
        CheckpointError: naming the first tensor that does not fit; nothing is ever left random.
    """
    weights, architecture = load_model(path)
    for name in VARIANTS:
        network = _network(name, architecture)
        model = _built(path, network, architecture)
        if model.state_dict().keys() == weights.keys():
            checkpoints.fill(model, weights, source=str(path))
            return model, network, architecture
    own = model.state_dict()
    model.load_state_dict({**own, **checkpoints.paired(own, weights, source=str(path))})
    return model, network, architecture


def _network(name: Literal["unet3plus", "unet3plus_simplified"], architecture: Architecture) -> Network:
    return Network(
        name=name,
        encoder=architecture.backbone_name,
        cat_channels=architecture.cat_channels,
        deep_supervision=architecture.deep_supervision,
        freeze_encoder=architecture.freeze_backbone,
    )


def _built(path: Path, network: Network, architecture: Architecture) -> nn.Module:
    try:
        return networks.build(network, architecture.n_channels, architecture.n_classes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def unwrapped(weights: Weights) -> dict[str, Tensor]:
    """Return the weights under their own names, without prefixes that all of them have from a wrapper."""
    found = dict(weights)
    while found and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), "")):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def draw_plots(path: Path, rows: Sequence[Row]) -> Path:
    """Write loss, IoU and Dice over epochs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plots_figure(rows).savefig(path, dpi=120)
    return path


def plots_figure(rows: Sequence[Row]) -> Any:
    """Return a matplotlib figure in which each value stands at the epoch it was measured in."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 4), layout="constrained")
    for axis, (label, series) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for colour, (name, text) in zip(COLOURS, series.items(), strict=False):
            epochs, values = points(rows, name)
            if epochs:
                axis.plot(epochs, values, label=text, color=[c / 255 for c in colour], marker="o", markersize=3)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=8)
    return figure


def points(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Return the epochs in which a metric was measured, and its values there."""
    found = [row for row in rows if _measured(row, name)]
    return [int(row["epoch"]) for row in found], [float(row[name]) for row in found]


def write_curves(path: Path, rows: Sequence[Row]) -> Path:
    """Write NAME and NAME_epochs, two arrays of one length, for every metric: its values, and where they belong."""
    arrays: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "epoch"):
        epochs, values = points(rows, name)
        arrays |= {name: np.array(values, np.float64), f"{name}_epochs": np.array(epochs, np.int64)}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return durable.write(path, stream.getvalue())


def report(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    *,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
) -> str:
    """Return settings, the best epoch, and a line for each epoch; a dash where nothing was measured."""
    names = [name for name in REPORTED if any(name in row for row in rows)]
    top = best(rows, metric, mode)
    width = max((len(name) for name in settings), default=0) + 2
    lines = ["TRAINING REPORT", "", *(f"{name:<{width}}{value}" for name, value in settings.items()), ""]
    lines += [f"best epoch: {top['epoch']} ({metric} {top[metric]:.5f})" if top else f"best epoch: none has {metric}"]
    lines += ["", f"{'epoch':>6}" + "".join(f"{name:>20}" for name in names)]
    for row in rows:
        cells = (f"{row[name]:.6g}" if _measured(row, name) else "-" for name in names)
        lines.append(f"{row['epoch']:>6}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines) + "\n"


def _measured(row: Row, name: str) -> bool:
    """Say whether a row has a number under a name; JSON gives None back where there was none."""
    value = row.get(name)
    return value is not None and math.isfinite(value)


def _tensors(file: Path, weights: Any) -> Weights:
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{file}: {WEIGHTS_KEY} holds more than tensors; expected names and tensors")
    return weights


def _refuse_other_config(path: Path, architecture: Architecture) -> None:
    if not path.is_file():
        return
    try:
        config = durable.read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the folder again") from error
    own = asdict(architecture)
    if differing := [name for name in own if name in config and config[name] != own[name]]:
        told = ", ".join(f"{name} {config[name]!r} instead of {own[name]!r}" for name in differing)
        raise CheckpointError(f"{path}: speaks of another network than {MODEL_FILE}: {told}; copy the folder again")
