from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import durable
from search import epochs


def test_a_reader_never_sees_half_a_file_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = durable.write(tmp_path / "a" / "table.csv", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        durable.write(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["table.csv"]


def test_the_first_to_commit_wins(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert durable.commit(path, {"by": "first"})
    assert not durable.commit(path, {"by": "second"})
    assert durable.committed(path) == {"by": "first"}
    assert durable.committed(tmp_path / "nowhere") is None
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]


def test_a_sealed_folder_tells_what_has_changed(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345")
    assert durable.seal_of(tmp_path) is None
    sha256 = durable.seal(tmp_path)
    assert durable.seal_of(tmp_path) == durable.sealed(tmp_path) == sha256
    (tmp_path / "weights").write_bytes(b"12346")
    assert durable.seal_of(tmp_path) == sha256
    assert durable.sealed(tmp_path) is None
    (tmp_path / "weights").unlink()
    assert durable.sealed(tmp_path) is None


def test_the_later_line_of_an_epoch_wins_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    lines = [
        {"epoch": 2, "metrics": {"loss": 0.5}, "seconds": 1.5, "attempt": 1, "time": 10.0},
        {"epoch": 1, "metrics": {"loss": None}},
        {"epoch": 2, "metrics": {"loss": 0.25}, "attempt": 2},
    ]
    (tmp_path / epochs.FILE).write_text("\n".join(map(json.dumps, lines)) + '\n{"epoch": 3, "met')
    first, second = epochs.read(tmp_path)
    assert (first.epoch, second.epoch, second.metrics, second.attempt) == (1, 2, {"loss": 0.25}, 2)
    assert first.metrics["loss"] != first.metrics["loss"]
    assert epochs.read(tmp_path / "nowhere") == []


def test_epochs_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [epochs.EpochLine(number, {"loss": 1 / number}, 0.5, 1, 10.0 + number) for number in (1, 2, 3)]
    for line in lines:
        epochs.append(tmp_path, line)
    assert epochs.read(tmp_path) == lines
    epochs.rewrite(tmp_path, lines[:1])
    assert epochs.read(tmp_path) == lines[:1]


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "promotion.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"promotion\.json: not JSON"):
        durable.read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="got list; expected an object"):
        durable.read_json(path)


def test_plain_data_has_no_nan() -> None:
    value = {"a": (1.0, float("nan")), "b": {"c": float("inf")}}
    assert durable.plain(value) == {"a": [1.0, None], "b": {"c": None}}
