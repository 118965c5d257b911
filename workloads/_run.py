"""One training in a folder of its own, without Ray: what it keeps, and how it goes on.

run.json         workload, every value of its Config, the metric that `best` goes by, the data's manifest; perhaps the
                 file that the values came from
metrics.jsonl    a line for each epoch
best/, last/     checkpoint folders: one to use, one to go on from
epoch_N/         that of one epoch, kept for good, where the Config has a rewind_epoch
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import configuration
import durable
from configuration import ConfigError
from segmentation.epoch import DataError, Epoch, NonFiniteError

logger = logging.getLogger(__name__)

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
BEST, LAST = "best", "last"


class RunError(ValueError):
    """A folder that this training cannot use: the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One training, about to begin or to go on."""

    folder: Path
    workload: ModuleType
    config: Any
    metric: str
    """What chooses the best epoch."""
    mode: str
    record: Mapping[str, Any]
    """What run.json says."""
    resume: Path | None = None
    """The checkpoint that it goes on from."""


def begin(folder: Path, name: str, workload: ModuleType, values: Mapping[str, Any], metric: str | None) -> Run:
    """Check configuration and data of a new run; nothing is written before its first epoch has ended.

    Raises:
        RunError: if a run is there already.
        ConfigError, DataError: for a value or data that cannot be used.
    """
    if any(_recovered(folder / checkpoint) for checkpoint in (BEST, LAST)):
        raise RunError(f"{folder}: holds a run; go on with it by --resume, or give this one its own folder by --out")
    config = configuration.build(workload.Config, values)
    return _run(folder, name, workload, config, metric, workload.prepare(config))


def go_on(folder: Path, name: str, workload: ModuleType, values: Mapping[str, Any], metric: str | None) -> Run:
    """Return the run that a folder holds, some values changed: such as more epochs, but not other data.

    Raises:
        RunError: if there is none, or it is of another workload, metric or data.
        ConfigError, DataError: for a value or data that cannot be used.
    """
    record = _read(folder)
    if record["workload"] != name:
        raise RunError(f"{folder}: a run of {record['workload']}; expected one of {name}")
    if metric not in (None, record["metric"]):
        raise RunError(
            f"{folder}: its best epoch goes by {record['metric']}; leave --metric out, or start anew by --out"
        )
    stored = configuration.without_retired(record["config"])
    config = _changed(configuration.build(workload.Config, stored), values)
    manifest = workload.prepare(config)
    if manifest["sha256"] != record["manifest"]["sha256"]:
        raise RunError(f"{folder}: its data has changed since; start a new run by --out")
    run = _run(folder, name, workload, config, record["metric"], manifest, resume=_recovered(folder / LAST))
    return dataclasses.replace(run, record={**record, **run.record})


def train(run: Run) -> Path:
    """Pull every epoch, keep the best and the last, and return the best one's checkpoint folder.

    Raises:
        NonFiniteError: from the workload, or where no epoch had a finite metric to choose by.
    """
    lines = _lines(run.folder) if run.resume else []
    advanced, begun = False, time.monotonic()
    for epoch in run.workload.train(run.config, run.resume):
        seconds, begun = time.monotonic() - begun, time.monotonic()
        if not advanced:
            durable.write_json(run.folder / RUN_FILE, run.record)
            advanced = True
        # A run that was killed may have a line for an epoch that it goes on before.
        lines = [line for line in lines if line["epoch"] < epoch.number]
        best = _better(run, epoch.metrics[run.metric], lines)
        lines.append({"epoch": epoch.number, "seconds": round(seconds, 4), "metrics": durable.plain(epoch.metrics)})
        _keep(run, epoch, lines, best)
        logger.info("%s", _text(run, epoch, seconds, best))
    if run.resume and not advanced:
        logger.info("nothing was left to train; for more than %s epochs: --set epochs=...", len(lines))
    found = _recovered(run.folder / BEST)
    if found is None:
        raise NonFiniteError(f"{run.metric} was never finite, so no epoch is the best; choose by another --metric")
    if advanced and hasattr(run.workload, "finish"):
        for path in run.workload.finish(run.folder):
            logger.info("%s", path)
    return found


def checkpoint(path: Path) -> Path:
    """Return a checkpoint folder: the one given, or the best of the run that it holds; or a file, as it is.

    Raises:
        DataError: if there is nothing there.
    """
    if not path.exists():
        raise DataError(f"{path}: no such checkpoint folder; `train` prints the path of its best")
    if not (path / RUN_FILE).is_file():
        return path
    if (best := _recovered(path / BEST)) is None:
        raise DataError(f"{path}: a run without a finished epoch")
    return best


def _run(
    folder: Path,
    name: str,
    workload: ModuleType,
    config: Any,
    metric: str | None,
    manifest: Mapping[str, Any],
    *,
    resume: Path | None = None,
) -> Run:
    reported = workload.metrics(config)
    chosen = next(iter(reported)) if metric is None else metric
    if chosen not in reported:
        raise ConfigError("--metric", configuration.unknown_key(chosen, reported).problem.replace("key", "metric"))
    for warning in manifest["warnings"]:
        logger.warning("%s", warning)
    values = configuration.to_values(config)
    record = {"workload": name, "metric": chosen, "config": values, "manifest": manifest}
    return Run(folder, workload, config, chosen, reported[chosen], record, resume)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder}: no run to go on with; leave --resume out, or name its folder by --out") from error
    except ValueError as error:
        raise RunError(f"{folder / RUN_FILE}: damaged ({error}); start a new run by --out") from error
    return record


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    for key in (flat := configuration.flatten(values)):
        if key == configuration.PRESET or key.startswith("data."):
            raise ConfigError(key, "cannot change in a run that goes on; start a new one by --out")
    return configuration.replace(config, flat)


def _better(run: Run, value: float, lines: list[dict[str, Any]]) -> bool:
    """Return whether a score beats those of the epochs before; one that is not finite beats none."""
    before = [line["metrics"][run.metric] for line in lines]
    known = [score for score in before if score is not None]
    if not math.isfinite(value):
        return False
    return not known or (value > max(known) if run.mode == "max" else value < min(known))


def _keep(run: Run, epoch: Epoch, lines: list[dict[str, Any]], best: bool) -> None:
    """Write what an epoch gave, `last` at the end: a run that goes on from it knows all epochs up to it."""
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    durable.write(run.folder / METRICS_FILE, text)
    kept = epoch.number == getattr(run.config, "rewind_epoch", 0)
    for name in [BEST] * best + [f"epoch_{epoch.number}"] * kept + [LAST]:
        _save(epoch, run.folder / name)


def _save(epoch: Epoch, folder: Path) -> None:
    """Replace a checkpoint folder such that a kill at any moment leaves the old one or the new one."""
    new, old = _aside(folder, "new"), _aside(folder, "old")
    shutil.rmtree(new, ignore_errors=True)
    epoch.save(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _recovered(folder: Path) -> Path | None:
    """Return a checkpoint folder, first put back where a kill came between its two renames; None: there is none."""
    old = _aside(folder, "old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    return folder if folder.is_dir() else None


def _aside(folder: Path, age: str) -> Path:
    return folder.with_name(f".{folder.name}.{age}")


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); start a new run by --out") from error


def _text(run: Run, epoch: Epoch, seconds: float, best: bool) -> str:
    losses = [name for name in epoch.metrics if name.endswith("loss") and name != run.metric]
    shown = [f"{name} {epoch.metrics[name]:.4g}" for name in (run.metric, *losses)]
    of = f" of {run.config.epochs}" if hasattr(run.config, "epochs") else ""
    return f"epoch {epoch.number}{of} {' '.join(shown)} {seconds:.1f} s{' best so far' if best else ''}"
