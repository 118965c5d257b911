"""Every number is read back with TensorBoard's own reader and its HParams backend."""

from __future__ import annotations

import json
import struct
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_accumulator, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from search.record import StudyPaths, TrialRecord
from search.results import tensorboard as written
from search.spec import Objective, Parameter, SearchSpec

SPEC = SearchSpec(
    name="question",
    workload="toy",
    objectives=(Objective(metric="val_mean_iou", mode="max"),),
    parameters=(
        Parameter(name="lr", type="float", low=1e-5, high=1e-1, log=True),
        Parameter(name="loss.dice", type="float", low=0.0, high=1.0),
        Parameter(name="network.widths", type="categorical", choices=([16, 32], [32, 64])),
        Parameter(name="network.weights", type="categorical", choices=(None, "imagenet")),
        Parameter(name="momentum", type="float", low=0.0, high=1.0, when={"optimizer": "sgd"}),
    ),
)


def test_scalars_come_back_under_their_tags(tmp_path: Path) -> None:
    scalars = written.Scalars(tmp_path, first_epoch=1)
    scalars.write(1, {"train_loss": 0.5, "val_mean_iou": 0.25, "lr": 0.001})
    scalars.write(2, {"train_loss": 0.25, "val_mean_iou": 0.5, "lr": 0.001})
    scalars.close()
    assert series(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.25)],
        "val/mean_iou": [(1, 0.25), (2, 0.5)],
        "metrics/lr": [(1, pytest.approx(0.001)), (2, pytest.approx(0.001))],
    }


def test_a_resumed_trial_shows_each_epoch_once(tmp_path: Path) -> None:
    first = written.Scalars(tmp_path, first_epoch=1)
    for epoch in (1, 2, 3):
        first.write(epoch, {"val_dice": epoch / 8})
    first.close()
    again = written.Scalars(tmp_path, first_epoch=2)
    again.write(2, {"val_dice": 0.75})
    again.close()
    assert series(tmp_path) == {"val/dice": [(1, 0.125), (2, 0.75)]}


def test_200_epochs_of_6_metrics_cost_little(tmp_path: Path) -> None:
    metrics = {f"val_metric_{index}": index / 7 for index in range(6)}
    began = time.process_time()
    scalars = written.Scalars(tmp_path, first_epoch=1)
    for epoch in range(1, 201):
        scalars.write(epoch, metrics)
    scalars.close()
    # Measured 0.03 s; the margin is for slow and busy machines.
    assert time.process_time() - began < 0.3
    assert len(series(tmp_path)["val/metric_5"]) == 200


def test_a_picture_comes_back_with_its_size(tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(png(width=3, height=2))
    scalars = written.Scalars(tmp_path, first_epoch=1)
    scalars.image("predictions", picture, 4)
    scalars.close()
    tensor = accumulator(tmp_path).Tensors("predictions")[0]
    assert tensor.step == 4
    assert list(tensor.tensor_proto.string_val) == [b"3", b"2", picture.read_bytes()]


def test_what_is_no_png_is_refused(tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"GIF89a")
    scalars = written.Scalars(tmp_path, first_epoch=1)
    with pytest.raises(ValueError, match=r"grid\.png: no PNG picture"):
        scalars.image("predictions", picture, 1)
    scalars.close()


def test_hparams_table_shows_every_value_status_and_metric(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    written.experiment(tmp_path, SPEC, ["val_mean_iou", "train_loss"])
    params = {"lr": 0.01, "loss.dice": 0.5, "network.widths": [16, 32], "network.weights": None}
    trial(paths, 0, params, [0.2, 0.4])
    written.session_end(paths.trial(0), "complete", {"val_mean_iou": 0.4}, 2)
    trial(paths, 1, {**params, "momentum": 0.9}, [0.1])
    written.session_end(paths.trial(1), "stopped", {"val_mean_iou": 0.1}, 1)
    trial(paths, 2, params, [])
    written.session_end(paths.trial(2), "failed")
    trial(paths, 3, params, [0.3])
    table = hparams(tmp_path)
    assert table["trial 0"]["params"] == {
        "lr": 0.01,
        "loss.dice": 0.5,
        "network.widths": "[16, 32]",
        "network.weights": "null",
    }
    assert table["trial 1"]["params"]["momentum"] == 0.9
    assert [table[f"trial {number}"]["status"] for number in range(4)] == ["SUCCESS", "SUCCESS", "FAILURE", "UNKNOWN"]
    assert table["trial 0"]["metrics"]["val/mean_iou"] == pytest.approx(0.4)
    assert table["trial 0"]["metrics"]["best/val_mean_iou"] == pytest.approx(0.4)
    assert table["trial 0"]["metrics"][written.STOPPED_TAG] == 0
    assert table["trial 1"]["metrics"][written.STOPPED_TAG] == 1


def test_experiment_declares_the_union_with_ranges_and_choices(tmp_path: Path) -> None:
    written.experiment(tmp_path, SPEC, ["val_mean_iou"])
    written.experiment(tmp_path, SPEC, ["val_mean_iou", "train_loss"])
    context, request, experiment_id = backend(tmp_path)
    found = context.experiment_from_metadata(
        request, experiment_id, True, context.hparams_metadata(request, experiment_id), []
    )
    infos = {info.name: info for info in found.hparam_infos}
    assert set(infos) == {parameter.name for parameter in SPEC.parameters}
    assert infos["lr"].domain_interval.max_value == 0.1
    assert [value.string_value for value in infos["network.weights"].domain_discrete.values] == ["null", "imagenet"]
    assert infos["momentum"].description == "only where optimizer: sgd"
    assert [info.name.tag for info in found.metric_infos] == [
        "best/val_mean_iou",
        "val/mean_iou",
        "train/loss",
        written.STOPPED_TAG,
    ]


def test_rebuild_gives_the_same_tables_from_records_and_metric_files(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    moment = datetime(2025, 11, 21, tzinfo=UTC)
    folder = paths.trial(0)
    folder.mkdir(parents=True)
    lines = [line(1, 0.25), line(2, 0.3), line(2, 0.5), '{"epoch": 3, "metr']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    stale = written.Scalars(folder, first_epoch=1)
    stale.write(9, {"val_mean_iou": 0.9})
    stale.close()
    record = TrialRecord(
        number=0,
        state="complete",
        params={"lr": 0.01},
        values=(0.5,),
        metrics={"val_mean_iou": 0.5, "train_loss": 1.0},
        best_epoch=2,
        started=moment,
        finished=moment,
    )
    waiting = TrialRecord(number=1, state="waiting", params={})
    for _ in range(2):
        written.rebuild(paths, SPEC, [record, waiting])
        assert series(folder)["val/mean_iou"] == [(1, 0.25), (2, 0.5)]
        table = hparams(tmp_path)
        assert list(table) == ["trial 0"]
        assert table["trial 0"]["status"] == "SUCCESS"
        assert table["trial 0"]["metrics"]["best/val_mean_iou"] == 0.5


def line(epoch: int, score: float) -> str:
    return json.dumps(
        {"epoch": epoch, "metrics": {"val_mean_iou": score}, "seconds": 1.0, "attempt": 1, "time": 1763000000.0}
    )


def trial(paths: StudyPaths, number: int, params: dict[str, Any], scores: list[float]) -> None:
    written.session_start(paths.trial(number), number, params)
    scalars = written.Scalars(paths.trial(number), first_epoch=1)
    for epoch, score in enumerate(scores, start=1):
        scalars.write(epoch, {"val_mean_iou": score})
    scalars.close()


def accumulator(folder: Path) -> Any:
    found = plugin_event_accumulator.EventAccumulator(str(folder))
    return found.Reload()


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = accumulator(folder)
    tags = [name for name in found.PluginTagToContent("scalars") if not name.startswith(("best/", "trial/"))]
    return {
        name: [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors(name) if event.step]
        for name in tags
    }


def backend(folder: Path) -> tuple[Any, Any, str]:
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    return backend_context.Context(TBContext(data_provider=provider)), RequestContext(), ""


def hparams(folder: Path) -> dict[str, dict[str, Any]]:
    context, request_context, experiment_id = backend(folder)
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=100, allowed_statuses=statuses)
    response = list_session_groups.Handler(request_context, context, experiment_id, request).run()
    return {group.name: describe(group) for group in response.session_groups}


def describe(group: Any) -> dict[str, Any]:
    status = {0: "UNKNOWN", 1: "SUCCESS", 2: "FAILURE", 3: "RUNNING"}
    return {
        "params": {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
        "status": status[group.sessions[0].status],
        "metrics": {metric.name.tag: metric.value for metric in group.sessions[0].metric_values},
    }


def png(*, width: int, height: int) -> bytes:
    rows = zlib.compress(b"".join(b"\x00" + b"\x80" * width * 3 for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
