"""What TensorBoard shows of a study: scalars and pictures of every trial, and the HParams table over all.

One folder is one TensorBoard run, so `tensorboard --logdir runs/<study>` lists `trials/7`. Everything here can be
deleted and written again by `rebuild`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from search import epochs
from search.record import State, StudyPaths, TrialRecord
from search.spec import Parameter, SearchSpec

PREFIX = "events.out.tfevents."
# TensorBoard reads a run's files in the order of their names: the start first, then each attempt, then the end.
EXPERIMENT_FILE = f"{PREFIX}0000000000.experiment"
START_FILE = f"{PREFIX}0000000000.start"
END_FILE = f"{PREFIX}9999999999.end"
STOPPED_TAG = "trial/stopped_early"
STATUS = {"complete": api_pb2.STATUS_SUCCESS, "stopped": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


class Scalars:
    """One trial's epochs as TensorBoard events, written by the process that trains; no thread, one write an epoch."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        """Open a new event file in the trial's folder; TensorBoard forgets `first_epoch` and all after it."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{PREFIX}{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        _put(self._records, event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        _put(self._records, event_pb2.Event(wall_time=time.time(), step=first_epoch, session_log=start))
        self._file.flush()

    def write(self, epoch: int, metrics: Mapping[str, float], wall_time: float | None = None) -> None:
        """Add the metrics of one epoch; `wall_time` is in seconds since 1970, now by default."""
        values = [summary_pb2.Summary.Value(tag=tag(name), simple_value=score) for name, score in metrics.items()]
        self._add(epoch, values, wall_time)

    def image(self, name: str, png: Path, epoch: int) -> None:
        """Add a PNG picture.

        Raises:
            ValueError: if the file is no PNG.
        """
        content = png.read_bytes()
        if content[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{png}: no PNG picture; save it as PNG")
        width, height = struct.unpack(">II", content[16:24])
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._add(epoch, [summary_pb2.Summary.Value(tag=name, image=image)], None)

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._file.close()

    def _add(self, epoch: int, values: list[Any], wall_time: float | None) -> None:
        now = time.time() if wall_time is None else wall_time
        _put(self._records, event_pb2.Event(wall_time=now, step=epoch, summary=summary_pb2.Summary(value=values)))
        self._file.flush()


def tag(metric: str) -> str:
    """Return the name of a metric in TensorBoard, grouped by split: `val_dice` is `val/dice`."""
    for split in ("train", "val", "test"):
        if metric.startswith(f"{split}_"):
            return f"{split}/{metric.removeprefix(f'{split}_')}"
    return f"metrics/{metric}"


def experiment(folder: Path, spec: SearchSpec, metric_names: Iterable[str]) -> None:
    """Declare all parameters and metrics at the study's root, once; a later call replaces the earlier.

    The HParams table takes the first declaration it finds and shows no value that is missing there, so this one
    holds the union: also parameters that exist in some trials only.
    """
    objectives = [objective.metric for objective in spec.objectives]
    others = [name for name in metric_names if name not in objectives]
    infos = [_metric_info(f"best/{name}", f"best {name}") for name in objectives]
    infos += [_metric_info(tag(name), name) for name in [*objectives, *others]]
    infos.append(_metric_info(STOPPED_TAG, "stopped early"))
    declared = api_pb2.Experiment(
        name=spec.name, hparam_infos=[_parameter_info(parameter) for parameter in spec.parameters], metric_infos=infos
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=declared)
    _write_file(folder / EXPERIMENT_FILE, [_hparams_value(metadata.EXPERIMENT_TAG, data)])


def session_start(folder: Path, number: int, params: Mapping[str, Any], started: float | None = None) -> None:
    """Show a trial in the HParams table, with its values; lists and None as text.

    Until `session_end` the plugin calls its status unknown, which is its word for one that still runs.
    """
    info = plugin_data_pb2.SessionStartInfo(
        group_name=f"trial {number}", start_time_secs=time.time() if started is None else started
    )
    for name, value in params.items():
        _set_value(info.hparams[name], value)
    data = plugin_data_pb2.HParamsPluginData(session_start_info=info)
    _write_file(folder / START_FILE, [_hparams_value(metadata.SESSION_START_INFO_TAG, data)])


def session_end(
    folder: Path,
    state: State,
    best: Mapping[str, float] | None = None,
    best_epoch: int | None = None,
    finished: float | None = None,
) -> None:
    """Show how a trial ended: a stopped one counts as a success, with `trial/stopped_early` at 1.

    Args:
        folder: the trial's.
        state: complete, stopped or failed.
        best: metrics at the best epoch, shown as `best/<metric>` beside those of the last epoch.
        best_epoch: the step of `best`.
        finished: seconds since 1970, now by default.
    """
    end = time.time() if finished is None else finished
    info = plugin_data_pb2.SessionEndInfo(status=STATUS[state], end_time_secs=end)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    values = [_hparams_value(metadata.SESSION_END_INFO_TAG, data)]
    values.append(summary_pb2.Summary.Value(tag=STOPPED_TAG, simple_value=float(state == "stopped")))
    best_values = [
        summary_pb2.Summary.Value(tag=f"best/{name}", simple_value=score) for name, score in (best or {}).items()
    ]
    _write_file(folder / END_FILE, values, best_values, best_epoch or 0, end)


def rebuild(paths: StudyPaths, spec: SearchSpec, records: Sequence[TrialRecord]) -> None:
    """Delete the event files of a study and write them again from its records and metrics.jsonl files.

    Pictures are not made again. Call it only while no trial runs: a running one has its file open.
    """
    lines = {record.number: epochs.read(paths.trial(record.number)) for record in records}
    names = dict.fromkeys(name for epochs in lines.values() for line in epochs for name in line.metrics)
    _remove_events(paths.folder)
    experiment(paths.folder, spec, names)
    for record in records:
        if record.state == "waiting":
            continue
        folder = paths.trial(record.number)
        _remove_events(folder)
        session_start(folder, record.number, record.params, record.started.timestamp() if record.started else 0.0)
        if lines[record.number]:
            scalars = Scalars(folder, lines[record.number][0].epoch)
            for line in lines[record.number]:
                scalars.write(line.epoch, line.metrics, line.time)
            scalars.close()
        if record.state != "running":
            best = {objective.metric: record.metrics.get(objective.metric) for objective in spec.objectives}
            known = {name: score for name, score in best.items() if score is not None}
            finished = record.finished.timestamp() if record.finished else 0.0
            session_end(folder, record.state, known, record.best_epoch, finished)


def as_text(value: Any) -> str:
    """Return a value as the HParams table and leaderboards show it: lists and None in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _set_value(slot: Any, value: Any) -> None:
    if isinstance(value, bool):
        slot.bool_value = value
    elif isinstance(value, int | float):
        slot.number_value = value
    else:
        slot.string_value = as_text(value)


def _parameter_info(parameter: Parameter) -> Any:
    info = api_pb2.HParamInfo(name=parameter.name, display_name=parameter.name)
    if parameter.when:
        wanted = ", ".join(f"{name}: {as_text(value)}" for name, value in parameter.when.items())
        info.description = f"only where {wanted}"
    if parameter.type != "categorical":
        info.type = api_pb2.DATA_TYPE_FLOAT64
        info.domain_interval.min_value = parameter.low or 0.0
        info.domain_interval.max_value = parameter.high or 0.0
        return info
    for choice in parameter.choices:
        _set_value(info.domain_discrete.values.add(), choice)
    info.type = _choice_type(parameter.choices)
    return info


def _choice_type(choices: Sequence[Any]) -> Any:
    if all(isinstance(choice, bool) for choice in choices):
        return api_pb2.DATA_TYPE_BOOL
    if all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices):
        return api_pb2.DATA_TYPE_FLOAT64
    return api_pb2.DATA_TYPE_STRING


def _metric_info(name: str, shown: str) -> Any:
    return api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name), display_name=shown)


def _hparams_value(name: str, data: Any) -> Any:
    described = metadata.create_summary_metadata(data)
    return summary_pb2.Summary.Value(tag=name, metadata=described, tensor=metadata.NULL_TENSOR)


def _write_file(
    path: Path, values: list[Any], later: Sequence[Any] = (), step: int = 0, wall_time: float | None = None
) -> None:
    now = time.time() if wall_time is None else wall_time
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not *tfevents*: TensorBoard must not open it before it is whole.
    temporary = path.with_name(f".writing.{os.getpid()}.{path.suffix[1:]}")
    with temporary.open("wb") as file:
        records = RecordWriter(file)
        _put(records, event_pb2.Event(wall_time=now, file_version="brain.Event:2"))
        _put(records, event_pb2.Event(wall_time=now, summary=summary_pb2.Summary(value=values)))
        if later:
            _put(records, event_pb2.Event(wall_time=now, step=step, summary=summary_pb2.Summary(value=later)))
    temporary.replace(path)


def _put(records: RecordWriter, event: Any) -> None:
    records.write(event.SerializeToString())


def _remove_events(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink()
