"""Configuration files of the basic_UNet pruning system, read as they are: its stored form, and that of its README.

    experiment: {experiment_name, seed, device}        training: {batch_size, learning_rate, num_epochs}
    train: {val_ratio, batch_size, model, parameters, paths}
    evaluation: {batch_size, paths}                    pruning: {method, ratios or block_ratios, reinitialize_weights}
    logging: {use_wandb, project}

What a file does not say is as in `acdc.Config.reference()`. Its section `pruning` is about a network that has been
trained: it counts where there is a parent.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import configuration
from configuration import ConfigError, YamlError, YamlLoader
from segmentation.pruning import PlanError, Prune, blocks

logger = logging.getLogger(__name__)

ROOT, EXPERIMENT, BASELINE, PRUNED = "results", "experiment", "baseline", "pruned"
SAVE_INTERVAL, EPOCHS = 5, 25
"""Of the original: the epoch whose weights a rewound network begins from, and how many there are."""
METHODS = {
    **{"l1_norm": "l1", "l1": "l1", "l2_norm": "l2", "l2": "l2"},
    **{"correlation": "pearson", "pearson": "pearson", "cosine": "cosine"},
}
MODES = ("none", "random", "rewind")
SECONDS = "%Y%m%d-%H%M%S"
SAME_SECOND = 1000

RENAMED = {
    "experiment.seed": "seed",
    "train.batch_size": "batch_size",
    "train.num_slices_per_volume": "data.slices_per_volume",
    "train.parameters.learning_rate": "lr",
    "train.parameters.num_epochs": "epochs",
    "train.parameters.loss_function": "loss_function",
    "training.batch_size": "batch_size",
    "training.learning_rate": "lr",
    "training.num_epochs": "epochs",
    "training.loss_function": "loss_function",
    "evaluation.batch_size": "evaluation_batch",
    "pruning.threshold": "prune.threshold",
    "pruning.ratios.default": "prune.default",
    **{
        f"{form}model.{name}": target
        for form in ("train.", "")
        for name, target in {
            "in_channels": "data.in_channels",
            "out_channels": "data.classes",
            "features": "network.widths",
            "enc_features": "network.widths",
            "dec_features": "network.decoder_widths",
            "bottleneck_out": "network.bottleneck",
        }.items()
    },
}
"""Keys whose value stays as it is, and what they are called here."""
BLOCK_RATIOS = ("pruning.ratios.block_ratios.", "pruning.block_ratios.")
ELSEWHERE = {
    *("experiment.experiment_name", "train.paths.save_root", "evaluation.paths.save_root"),
    *("logging.use_wandb", "logging.project"),
    *("train.parameters.save_interval", "training.save_interval"),
}
"""Keys that are read, but are no value of the Config."""
UNUSED = {
    *("experiment.model_name", "train.phase", "evaluation.phase", "evaluation.num_visuals"),
    *("pruning.ckpt_path.subfolder", "pruning.ckpt_path.ckpt_name"),
    *("pruning.save_path.subfolder", "pruning.save_path.filename"),
}
"""Keys that are known and change nothing here: one name for all networks, phases are commands, folders are fixed."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """What one file says."""

    path: Path
    sha256: str
    values: Mapping[str, Any]
    """Of acdc's Config, `prune` left out."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Of its part `prune`, by their whole names."""
    tracking: Mapping[str, Any] = field(default_factory=dict)
    """Of the section `tracking` of a search space."""
    experiment: str = EXPERIMENT
    root: Path = Path(ROOT)
    """Where runs go."""
    save_interval: int = SAVE_INTERVAL


def read(path: Path, config_class: type | None = None) -> Original:
    """Return what a file says.

    config_class: whose values are checked one by one, so that an error names the file's own key.

    Raises:
        ConfigError: naming the file and the key that is unknown or has a value that cannot be.
        OSError: if it cannot be read.
    """
    try:
        found = configuration.read_yaml(path, _Loader)
    except YamlError as error:
        raise ConfigError(str(path), str(error)) from error
    if not isinstance(found, Mapping):
        raise ConfigError(str(path), "expected sections experiment, train, evaluation, pruning, or model, training")
    given = _flat(found)
    try:
        _refuse_unknown(given)
        values = _values(given)
        save_interval, experiment = _save_interval(given), _experiment(given)
        if config_class is not None:
            _check(values, config_class)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.key}", error.problem) from error
    named = {target: value for target, (_, value) in values.items()}
    return Original(
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        values={key: value for key, value in named.items() if not key.startswith("prune.")},
        prune={key: value for key, value in named.items() if key.startswith("prune.")},
        tracking=_tracking(given),
        experiment=experiment,
        root=Path(given.get("train.paths.save_root") or ROOT),
        save_interval=save_interval,
    )


def resolved(original: Original, changes: Mapping[str, Any], mode: str | None = None) -> dict[str, Any]:
    """Return the values of one training, dotted: the file's, and above them those that are given beside it.

    changes: dotted values; with `parent` among them its network is pruned as the file says.
    mode: none, null, random or rewind, in place of the file's reinitialize_weights.

    Raises:
        ConfigError: for a mode without a parent.
    """
    found: dict[str, Any] = {configuration.PRESET: "reference", **original.values}
    if changes.get("parent") is not None:
        found |= original.prune
    elif mode is not None:
        raise ConfigError("--mode", "is about a trained network that is pruned; name it by --set parent=FOLDER")
    elif original.prune:
        logger.info("%s: its pruning is left to a run with --set parent=FOLDER", original.path)
    if mode is not None:
        found["prune.mode"] = mode_of(mode)
    found |= changes
    if "rewind_epoch" not in changes:
        # As there, an epoch that never comes leaves nothing to rewind to.
        comes = original.save_interval <= found.get("epochs", EPOCHS)
        found["rewind_epoch"] = original.save_interval if comes else 0
    return found


def mode_of(value: Any) -> str:
    """Return how weights begin, from reinitialize_weights or --mode: none and null are one.

    Raises:
        ConfigError: for any other value.
    """
    text = "none" if value is None or str(value).lower() in ("null", "none", "") else str(value)
    if text not in MODES:
        raise ConfigError("pruning.reinitialize_weights", f"got {value!r}; expected null, none, random or rewind")
    return text


def run_folder(original: Original, name: str, now: Callable[[], datetime] = datetime.now) -> Path:
    """Make results/<experiment>/<timestamp> and return the path of a run's folder in it; nobody else gets the same."""
    parent, stamp = original.root / original.experiment, now().strftime(SECONDS)
    for number in range(1, SAME_SECOND):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder / name
    raise OSError(f"{parent}: {SAME_SECOND} runs began in the second {stamp}")


def name_of(config: Any) -> str:
    """Return what a run's folder is called: baseline, or by what is pruned and how."""
    prune = getattr(config, "prune", Prune())
    if not prune.active:
        return BASELINE
    try:
        return suffix(prune, len(config.network.widths) or config.network.depth)
    except (ValueError, PlanError):  # pruned in a way that the original does not know
        return PRUNED


def suffix(prune: Prune, levels: int) -> str:
    """Return a folder's name that tells how a UNet of so many levels is pruned.

    Such as l1_norm_0_10_20_30_30_30_30_20_10_rewind: percent of the encoders, the bottleneck and the decoders.

    Raises:
        ValueError: if it is not by ratios.
        PlanError: for a ratio of a block that no such UNet has.
    """
    if prune.plan is not None or prune.global_ or prune.macs < 1 or prune.params < 1 or prune.where != blocks.ALL:
        raise ValueError("only ratios make a name")
    ratios = blocks.ratios(dict.fromkeys(_blocks(levels)), prune.blocks, prune.default)  # type: ignore[arg-type]
    percent = [f"{round(100 * ratio, 6):g}" for ratio in ratios.values()]
    method = {"l1": "l1_norm", "l2": "l2_norm"}.get(prune.importance, prune.importance)
    return "_".join([method, *percent, prune.mode])


def parse(name: str) -> Prune:
    """Return what the name of a folder tells, the inverse of `suffix`.

    Raises:
        ValueError: if it is no such name.
    """
    match = re.fullmatch(rf"([a-z]\w*?)((?:_\d+(?:\.\d+)?)+)_({'|'.join(MODES)})", name)
    percent = match[2].split("_")[1:] if match else []
    if match is None or len(percent) % 2 == 0 or len(percent) < 3:
        raise ValueError(f"{name}: expected a name such as l1_norm_0_10_20_10_0_rewind, an odd number of percentages")
    ratios = {block: float(text) / 100 for block, text in zip(_blocks(len(percent) // 2), percent, strict=True)}
    method: Any = METHODS.get(match[1], match[1])
    mode: Any = match[3]
    return Prune(importance=method, mode=mode, blocks=ratios)


def _blocks(levels: int) -> list[str]:
    encoders, decoders = (f"encoders.{i}" for i in range(levels)), (f"decoders.{2 * i + 1}" for i in range(levels))
    return [*encoders, "bottleneck", *decoders]


class _Loader(YamlLoader):
    """Safe YAML in which 1e-3 is a number, as its author meant; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _flat(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values by dotted names; a section without any is none."""
    flat = configuration.flatten(content)
    sections = {key.partition(".")[0] for key in (*RENAMED, *ELSEWHERE, *UNUSED)}
    return {key: value for key, value in flat.items() if value is not None or key not in sections}


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = {*RENAMED, *ELSEWHERE, *UNUSED, *OWN}
    for key in given:
        if key not in known and not key.startswith(BLOCK_RATIOS):
            close = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(known))}"
            raise ConfigError(key, f"unknown key; {hint}")


def _values(given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return by our names the file's key and value; refuse two keys that say two things."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in given.items():
        for target, mine in _translated(key, value, given).items():
            if found.setdefault(target, (key, mine))[1] != mine:
                raise ConfigError(key, f"got {value!r}, but {found[target][0]} says {found[target][1]!r}; keep one")
    if "network.widths" in found:
        key = found["network.widths"][0]
        found.setdefault("network.name", (key, "unet"))
        # Twice the last level unless it is said: the reference's own number belongs to its own widths.
        found.setdefault("network.bottleneck", (key, 0))
        found.setdefault("network.decoder_widths", (key, []))
    return found


def _translated(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if key in OWN:
        return OWN[key](key, value, given)
    prefix = next((prefix for prefix in BLOCK_RATIOS if key.startswith(prefix)), None)
    if prefix is not None:
        return {f"prune.{key.removeprefix(prefix)}": value}
    # What the original calls null is what it does by itself.
    optional = value is None and key != "train.num_slices_per_volume"
    return {} if key not in RENAMED or optional else {RENAMED[key]: value}


def _device(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    # As there, a machine without a GPU takes its CPU.
    return {"device": "auto" if value == "cuda" else value}


def _fractions(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(key, f"got {value!r}; expected a number between 0 and 1")
    return {"data.fractions": [round(0.8 * (1 - value), 6), round(0.8 * value, 6), 0.2]}


def _same_slices(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value != (wanted := given.get("train.num_slices_per_volume")):
        raise ConfigError(key, f"got {value!r}, but training has {wanted!r}; all splits have the same slices here")
    return {}


def _method(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if str(value) not in METHODS:
        raise ConfigError(key, f"got {value!r}; expected one of {', '.join(METHODS)}")
    return {"prune.importance": METHODS[value]}


def _folder(name: str) -> Callable[[str, Any, Mapping[str, Any]], dict[str, Any]]:
    def root(key: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, str) or Path(value).name != name:
            raise ConfigError(key, f"got {value!r}; expected the folder {name} in that of the data")
        return {"data.root": str(Path(value).parent)}

    return root


OWN: dict[str, Callable[[str, Any, Mapping[str, Any]], dict[str, Any]]] = {
    "experiment.device": _device,
    "train.val_ratio": _fractions,
    "evaluation.num_slices_per_volume": _same_slices,
    "pruning.method": _method,
    "pruning.reinitialize_weights": lambda key, value, given: {"prune.mode": mode_of(value)},
    "train.paths.train_dir": _folder("imagesTr"),
    "train.paths.label_dir": _folder("labelsTr"),
    "evaluation.paths.eval_dir": _folder("imagesTs"),
    "evaluation.paths.label_dir": _folder("labelsTs"),
}
"""Keys whose values are other ones here."""


def _experiment(given: Mapping[str, Any]) -> str:
    name = str(given.get("experiment.experiment_name") or EXPERIMENT)
    if Path(name).name != name:
        raise ConfigError("experiment.experiment_name", f"got {name!r}; expected the name of one folder")
    return name


def _save_interval(given: Mapping[str, Any]) -> int:
    for key in ("train.parameters.save_interval", "training.save_interval"):
        if given.get(key) is not None:
            if type(given[key]) is not int or given[key] < 1:
                raise ConfigError(key, f"got {given[key]!r}; expected the number of an epoch")
            return int(given[key])
    return SAVE_INTERVAL


def _tracking(given: Mapping[str, Any]) -> dict[str, Any]:
    if not given.get("logging.use_wandb"):
        return {}
    project = given.get("logging.project")
    return {"wandb": "online", **({} if project is None else {"project": project})}


def _check(values: Mapping[str, tuple[str, Any]], config_class: type) -> None:
    known = configuration.fields(config_class)
    for target, (key, value) in values.items():
        if (leaf := configuration.find(known, target)) is not None:
            configuration.check(leaf.annotation, value, key)
