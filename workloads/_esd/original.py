"""The ESD project's own settings, read as they are: the flags of its scripts and the names in its W&B sweeps."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import configuration
from configuration import PRESET, YamlError
from segmentation.epoch import DataError
from segmentation.networks.coarse import parse_pool_sizes
from workloads._esd.satellites import CLASSES

T = TypeVar("T")

MODELS = {"SegmentationCNN": "segmentation_cnn", "UNet": "unet", "FCNResnetTransfer": "fcn_resnet101"}
"""The project's names of its networks, and ours."""
SWEEP_NAMES: Mapping[str, str] = {
    "model_type": "network.name",
    "tile_size_gt": "data.tile_size_gt",
    "max_epochs": "epochs",
    "learning_rate": "lr",
    "num_workers": "loader_workers",
    "depth": "network.depth",
    "n_encoders": "network.n_encoders",
    "embedding_size": "network.embedding_size",
    "pool_sizes": "network.pool_sizes",
    "kernel_size": "network.kernel_size",
    "scale_factor": "network.scale_factor",
    "processed_dir": "data.processed",
    "raw_dir": "data.root",
}
"""Settings that go by another name here; batch_size, seed and optimizer are the same."""


@dataclass(frozen=True, kw_only=True)
class ESDConfig:
    """What scripts.train can be told, with the project's defaults."""

    processed_dir: Path = Path("data/processed/4x4")
    """Where subtiles are written, or lie already."""
    raw_dir: Path = Path("data/raw/Train")
    """The contest's tiles; without this folder the processed ones are taken, or synthetic ones."""
    selected_bands: str | None = None
    """Bands of each satellite, as YAML, such as {sentinel2: ["04", "03", "02"]}; none: all."""
    model_type: str = "SegmentationCNN"
    """SegmentationCNN, UNet or FCNResnetTransfer."""
    tile_size_gt: int = 4
    """Cells along a subtile's side."""
    batch_size: int = 8
    """Subtiles in a step."""
    max_epochs: int = 2
    """Epochs."""
    seed: int = 12378921
    """Seed of weights, order and augmentation."""
    learning_rate: float = 3e-4
    """Learning rate."""
    num_workers: int = 11
    """Processes that read data; more than there are CPUs are not started."""
    accelerator: str = "gpu"
    """gpu: one if there is any, else the CPU. cpu: the CPU."""
    devices: int = 1
    """Has to be 1; several train together in a search (resources.workers)."""
    in_channels: int = 99
    """What comes of the data and the selected bands, whatever is said here."""
    out_channels: int = 4
    """Has to be 4."""
    depth: int = 2
    """Convolutions of a block (SegmentationCNN)."""
    n_encoders: int = 2
    """Times that the resolution is halved (UNet)."""
    embedding_size: int = 64
    """Channels of the first block."""
    pool_sizes: str = "5,5,2"
    """By how much each block is pooled; the product is scale_factor (SegmentationCNN)."""
    kernel_size: int = 3
    """Side of a convolution's kernel (SegmentationCNN)."""
    scale_factor: int = 50
    """Pixels to the side of a cell."""
    wandb_run_name: str | None = None
    """Name of the run on Weights & Biases; none: nothing is sent there."""

    def __post_init__(self) -> None:
        if self.model_type not in MODELS:
            raise ValueError(f"model_type: got {self.model_type!r}; expected {', '.join(MODELS)}")
        if self.devices != 1:
            raise ValueError(f"devices: got {self.devices}; expected 1: several train together in a search")
        if self.out_channels != len(CLASSES):
            raise ValueError(f"out_channels: got {self.out_channels}; expected {len(CLASSES)}, one for each class")
        if self.accelerator not in ("gpu", "cpu", "auto"):
            raise ValueError(f"accelerator: got {self.accelerator!r}; expected gpu or cpu")
        parse_pool_sizes(self.pool_sizes)

    @property
    def models(self) -> Path:
        """Return where checkpoints go."""
        return Path("models") / self.model_type


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What scripts.evaluate can be told, with the project's defaults."""

    processed_dir: Path = Path("data/processed/4x4")
    """Where subtiles lie."""
    raw_dir: Path = Path("data/raw/Train")
    """The contest's tiles."""
    selected_bands: str | None = None
    """What the checkpoint says, whatever is said here."""
    tile_size_gt: int = 4
    """Cells along a subtile's side."""
    batch_size: int = 8
    """Subtiles in one pass."""
    seed: int = 12378921
    """Nothing is drawn."""
    num_workers: int = 11
    """Processes that read data."""
    accelerator: str = "gpu"
    """gpu: one if there is any, else the CPU. cpu: the CPU."""
    devices: int = 1
    """Has to be 1."""
    model_type: str = "SegmentationCNN"
    """Whose checkpoint, where model_path is not given."""
    results_dir: Path | None = None
    """Where predictions and metrics go; none: data/predictions/MODEL_TYPE."""
    model_path: Path | None = None
    """Checkpoint; none: models/MODEL_TYPE/last.ckpt."""
    split: str = "validation"
    """Which part of the data: validation, as the project has it, or test."""

    def __post_init__(self) -> None:
        if self.model_type not in MODELS:
            raise ValueError(f"model_type: got {self.model_type!r}; expected {', '.join(MODELS)}")
        if self.split not in ("train", "validation", "test"):
            raise ValueError(f"split: got {self.split!r}; expected train, validation or test")

    @property
    def results(self) -> Path:
        """Return where everything is written."""
        return self.results_dir or Path("data/predictions") / self.model_type

    @property
    def checkpoint(self) -> Path:
        """Return what is evaluated."""
        return self.model_path or Path("models") / self.model_type / "last.ckpt"


def parse(config_class: type[T], flags: Sequence[str], prog: str) -> T:
    """Return a script's settings from its command line, --name=value for each that is not as it was.

    Raises:
        DataError: for a flag that there is not, or a value that it cannot have.
    """
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    defaults = config_class()
    for name, kind in typing.get_type_hints(config_class).items():
        plain = next(each for each in (typing.get_args(kind) or (kind,)) if each is not type(None))
        parser.add_argument(f"--{name}", type=plain, default=getattr(defaults, name), help="default: %(default)s")
    try:
        return config_class(**vars(parser.parse_args(list(flags))))
    except ValueError as error:
        raise DataError(f"{prog}: --{error}") from error


def values(config: ESDConfig) -> dict[str, Any]:
    """Return the values of esd's Config, dotted, that a script's settings mean.

    Raises:
        DataError: for bands that are no YAML mapping.
    """
    told = dataclasses.asdict(config)
    renamed = {name: sweep_value(theirs, told[theirs]) for theirs, name in SWEEP_NAMES.items()}
    return {
        PRESET: "reference",
        **renamed,
        **_bands(config.selected_bands),
        **folders(config),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "device": "cpu" if config.accelerator == "cpu" else "auto",
    }


def folders(config: ESDConfig | EvalConfig) -> dict[str, str]:
    """Return where tiles lie: raw, or else processed, or else, if no folder was named, nowhere: synthetic ones."""
    default = type(config)()
    if config.raw_dir.is_dir() or config.raw_dir != default.raw_dir:
        return {"data.root": str(config.raw_dir), "data.processed": str(config.processed_dir)}
    if config.processed_dir.is_dir() or config.processed_dir != default.processed_dir:
        return {"data.root": str(config.processed_dir), "data.processed": ""}
    return {"data.root": "", "data.processed": ""}


def sweep_value(name: str, value: Any) -> Any:
    """Return what a value of one of the project's settings is here; what it does not know stays as it is."""
    if name == "model_type":
        return MODELS.get(value, value)
    if name == "pool_sizes" and isinstance(value, str):
        return list(parse_pool_sizes(value))
    return str(value) if isinstance(value, Path) else value


def _bands(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        given = configuration.parse_yaml(text)
    except YamlError as error:
        raise DataError(f"--selected_bands: cannot be read as YAML ({error})") from error
    if not isinstance(given, Mapping):
        raise DataError(f'--selected_bands: got {text!r}; expected such as {{sentinel2: ["04", "03", "02"]}}')
    return {f"data.selected_bands.{name}": bands for name, bands in given.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{self.prog}: {message}; --help lists what there is")
