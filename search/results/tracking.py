"""Optional loggers that receive each trial when it has ended: MLflow and Weights & Biases, neither needed nor imported.

Runs in the process that writes the study. A logger is a copy for people who like its pages: the study stays the truth.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from search.epochs import EpochLine
from search.errors import TrackingError
from search.record import TrialRecord
from search.results.tensorboard import as_text
from search.spec import SearchSpec, Tracking

# Both limits are MLflow's, for one request.
METRICS_A_BATCH = 1000
PARAMS_A_BATCH = 100
SECRET = re.compile(r"(?i)(^|[._-])(token|password|passwd|secret|credentials?|api_?key|access_?key)($|[._-])")
HIDDEN = "(hidden)"


def check(tracking: Tracking) -> None:
    """Refuse at start-up a logger whose package is missing, or an address that holds a password.

    Raises:
        TrackingError: saying what to install or to write instead.
    """
    for module, wanted in (("mlflow", tracking.mlflow), ("wandb", tracking.wandb)):
        if wanted and importlib.util.find_spec(module) is None:
            package = "mlflow-skinny" if module == "mlflow" else module
            raise TrackingError(
                f"tracking.{module}: got {_without_password(wanted)!r}, but the package {module} is not installed; "
                f"run `pip install {package}`, or write `{module}: null`"
            )
    if tracking.mlflow and urlsplit(tracking.mlflow).password:
        raise TrackingError(
            f"tracking.mlflow: the address {_without_password(tracking.mlflow)!r} came with a password, which would be "
            "written into the study's folder; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )


def log_trial(
    tracking: Tracking,
    spec: SearchSpec,
    record: TrialRecord,
    rows: Sequence[EpochLine],
    artifacts: Sequence[Path] = (),
    *,
    folder: Path = Path(),
) -> None:
    """Send one trial that has ended to every configured logger; do nothing if there is none.

    Args:
        tracking: which loggers.
        spec: of the search; its fixed values go along, those with secret names hidden.
        record: the trial.
        rows: its epochs, from metrics.jsonl.
        artifacts: files to keep with it; what is gone by now is passed over.
        folder: where W&B keeps its offline files.
    """
    if not (tracking.mlflow or tracking.wandb):
        return
    files = [path for path in artifacts if path.is_file()]
    if tracking.mlflow:
        _log_mlflow(tracking.mlflow, tracking.project or spec.name, spec, record, rows, files)
    if tracking.wandb:
        project = (tracking.entity, tracking.project or spec.name)
        _log_wandb(tracking.wandb, project, spec, record, rows, files, folder)


def values_of(spec: SearchSpec, record: TrialRecord) -> dict[str, Any]:
    """Return all values that a trial ran with under dotted names; those whose name says secret are hidden."""
    return {
        name: HIDDEN if SECRET.search(name) else value
        for name, value in {**spec.fixed, **record.params, "seed": record.seed}.items()
    }


def _log_mlflow(
    uri: str, project: str, spec: SearchSpec, record: TrialRecord, rows: Sequence[EpochLine], files: Sequence[Path]
) -> None:
    client = _mlflow_client(uri)
    from mlflow.entities import Metric, Param, RunTag

    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    started = _milliseconds(record.started.timestamp()) if record.started else None
    run_id = client.create_run(experiment_id, start_time=started, run_name=f"trial {record.number}").info.run_id
    tags = [RunTag(name, text) for name, text in _tags(spec, record).items()]
    client.log_batch(run_id, tags=tags)
    params = [Param(name, as_text(value)) for name, value in values_of(spec, record).items()]
    for part in _parts(params, PARAMS_A_BATCH):
        client.log_batch(run_id, params=part)
    metrics = [
        Metric(name, score, _milliseconds(row.time), row.epoch) for row in rows for name, score in row.metrics.items()
    ]
    metrics += [Metric(name, score, 0, record.best_epoch or 0) for name, score in _best(spec, record).items()]
    for part in _parts(metrics, METRICS_A_BATCH):
        client.log_batch(run_id, metrics=part)
    for path in files:
        client.log_artifact(run_id, str(path))
    ended = _milliseconds(record.finished.timestamp()) if record.finished else None
    client.set_terminated(run_id, "FAILED" if record.state == "failed" else "FINISHED", end_time=ended)


def _mlflow_client(uri: str) -> Any:
    if urlsplit(uri).scheme in ("", "file"):
        # MLflow 3 refuses plain folders unless told so; whoever writes a file address has decided.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _log_wandb(
    mode: str,
    project: tuple[str | None, str],
    spec: SearchSpec,
    record: TrialRecord,
    rows: Sequence[EpochLine],
    files: Sequence[Path],
    folder: Path,
) -> None:
    import wandb

    # W&B would also keep the command line, the git remote, packages and all output: any may hold a secret.
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        entity=project[0],
        project=re.sub(r"[/\\#?%:]", "-", project[1]),
        id=re.sub(r"[^\w-]", "-", f"{spec.name}-{record.number}"),
        name=f"trial {record.number}",
        group=spec.name,
        tags=[record.state],
        config={**values_of(spec, record), "workload": spec.workload},
        dir=str(folder),
        mode="online" if mode == "online" else "offline",
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        settings=settings,
    )
    for row in rows:
        run.log(dict(row.metrics), step=row.epoch)
    run.summary.update({**_best(spec, record), "state": record.state, "reason": record.reason})
    for path in files:
        copy = Path(run.dir) / path.name
        shutil.copyfile(path, copy)
        run.save(str(copy), base_path=run.dir, policy="end")
    run.finish(exit_code=1 if record.state == "failed" else 0)


def _tags(spec: SearchSpec, record: TrialRecord) -> dict[str, str]:
    known = {
        "study": spec.name,
        "workload": spec.workload,
        "trial": str(record.number),
        "state": record.state,
        "reason": record.reason[:5000],
        "checkpoint_sha256": record.checkpoint_sha256 or "",
    }
    return {name: text for name, text in known.items() if text}


def _best(spec: SearchSpec, record: TrialRecord) -> dict[str, float]:
    """Return the objectives at the best epoch as `best_<metric>`; loggers show the last epoch by themselves."""
    if record.values is not None:
        pairs = zip(spec.objectives, record.values, strict=True)
        return {f"best_{objective.metric}": value for objective, value in pairs}
    known: Mapping[str, float] = record.metrics
    return {f"best_{o.metric}": known[o.metric] for o in spec.objectives if o.metric in known}


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)
