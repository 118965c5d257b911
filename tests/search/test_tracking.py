from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from search.epochs import EpochLine
from search.record import TrialRecord
from search.results import tracking
from search.spec import Objective, SearchSpec, Tracking

SPEC = SearchSpec(
    name="question",
    workload="toy",
    objectives=(Objective(metric="val_dice", mode="max"),),
    parameters=(),
    fixed={"data.root": "images", "data.api_key": "hunter2-fixed"},
)
RECORD = TrialRecord(
    number=7,
    state="complete",
    params={"lr": 0.01, "network.widths": [16, 32], "loss.dice": None},
    values=(0.5,),
    best_epoch=2,
    started=datetime(2025, 11, 21, tzinfo=UTC),
    finished=datetime(2025, 11, 21, 1, tzinfo=UTC),
    metrics={"val_dice": 0.5},
    seed=3,
)
ROWS = [EpochLine(epoch, {"val_dice": epoch / 4, "train_loss": 1 / epoch}, time=1763000000.0) for epoch in (1, 2, 3)]


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        tracking.TrackingError, match="the package mlflow is not installed; run `pip install mlflow-skinny`"
    ):
        tracking.check(Tracking(mlflow="file:./mlruns"))
    with pytest.raises(tracking.TrackingError, match=r"tracking\.wandb: got 'offline', but the package wandb"):
        tracking.check(Tracking(wandb="offline"))
    tracking.check(Tracking())


def test_an_address_with_a_password_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://ann:hunter2@mlflow.example.org"
    for installed in (object(), None):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found)
        with pytest.raises(tracking.TrackingError) as error:
            tracking.check(Tracking(mlflow=address))
        assert "hunter2" not in str(error.value)
        assert "mlflow.example.org" in str(error.value)


def test_values_with_secret_names_are_hidden() -> None:
    values = tracking.values_of(SPEC, RECORD)
    assert values["data.api_key"] == tracking.HIDDEN
    assert values["data.root"] == "images"
    assert values["lr"] == 0.01
    words = SearchSpec(name="q", workload="toy", objectives=(), parameters=(), fixed={"network.tokens_mixed": 4})
    assert tracking.values_of(words, RECORD)["network.tokens_mixed"] == 4


@pytest.mark.row("X14")
@pytest.mark.row("S31")
def test_nothing_is_imported_unless_configured(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from search import progress\n"
        "from search.results import leaderboard, plots, report, tracking\n"
        "from search.spec import Tracking\n"
        "tracking.check(Tracking())\n"
        "tracking.log_trial(Tracking(), None, None, [])\n"
        "heavy = {'mlflow', 'wandb', 'plotly', 'jinja2', 'pandas', 'pyarrow', 'optuna', 'torch', 'ray', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    root = Path(tracking.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.row("X14")
def test_mlflow_file_store_receives_values_epochs_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-environment")
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    chosen = Tracking(mlflow=(tmp_path / "mlruns").as_uri())
    tracking.check(chosen)
    failed = TrialRecord(number=8, state="failed", params={"lr": 1.0}, reason="loss is nan")
    for record, rows in ((RECORD, ROWS), (failed, ROWS[:1])):
        tracking.log_trial(chosen, SPEC, record, rows, [picture, tmp_path / "gone.png"])
    client = mlflow.MlflowClient(tracking_uri=chosen.mlflow)
    experiment = client.get_experiment_by_name("question")
    runs = {run.data.tags["trial"]: run for run in client.search_runs([experiment.experiment_id])}
    run = runs["7"]
    assert run.data.params["network.widths"] == "[16, 32]"
    assert (run.data.params["loss.dice"], run.data.params["lr"], run.data.params["seed"]) == ("null", "0.01", "3")
    history = client.get_metric_history(run.info.run_id, "val_dice")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert run.data.metrics["best_val_dice"] == 0.5
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["curve.png"]
    assert (run.info.status, runs["8"].info.status) == ("FINISHED", "FAILED")
    assert runs["8"].data.tags["reason"] == "loss is nan"
    assert run.info.end_time - run.info.start_time == 3_600_000
    assert b"hunter2" not in everything(tmp_path)


@pytest.mark.slow
@pytest.mark.row("X14")
def test_wandb_offline_receives_values_epochs_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" + "0" * 33)
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"\x89PNG picture")
    folder = tmp_path / "study"
    tracking.check(Tracking(wandb="offline"))
    tracking.log_trial(Tracking(wandb="offline"), SPEC, RECORD, ROWS, [picture], folder=folder)
    [run] = (folder / "wandb").glob("offline-run-*")
    assert (run / "files" / "curve.png").read_bytes() == picture.read_bytes()
    records = list(wandb_records(next(run.glob("*.wandb"))))
    config = {item.key or ".".join(item.nested_key): item.value_json for r in records for item in r.run.config.update}
    assert json.loads(config["lr"]) == 0.01
    assert json.loads(config["network.widths"]) == [16, 32]
    steps = [{item.key or item.nested_key[0]: item.value_json for item in r.history.item} for r in records]
    assert [float(step["val_dice"]) for step in steps if "val_dice" in step] == [0.25, 0.5, 0.75]
    assert b"hunter2" not in everything(folder)


@pytest.mark.row("E5")
@pytest.mark.parametrize("entity", [None, "grss"])
def test_wandb_is_told_whose_project_it_is(entity: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    asked: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        asked.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(wandb, "init", init)
    chosen = Tracking(wandb="offline", project="dse: tiles", entity=entity)
    with pytest.raises(InterruptedError):
        tracking.log_trial(chosen, SPEC, RECORD, ROWS, folder=tmp_path)
    assert (asked["entity"], asked["project"], asked["mode"]) == (entity, "dse- tiles", "offline")


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
