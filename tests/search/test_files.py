from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from search import files


def test_a_reader_never_sees_half_a_file_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write_atomically(tmp_path / "a" / "table.csv", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["table.csv"]


def test_the_later_line_of_an_epoch_wins_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    lines = [
        {"epoch": 2, "metrics": {"loss": 0.5}, "seconds": 1.5, "attempt": 1, "time": 10.0},
        {"epoch": 1, "metrics": {"loss": None}},
        {"epoch": 2, "metrics": {"loss": 0.25}, "attempt": 2},
    ]
    (tmp_path / files.METRICS).write_text("\n".join(map(json.dumps, lines)) + '\n{"epoch": 3, "met')
    first, second = files.read_epochs(tmp_path)
    assert (first.epoch, second.epoch, second.metrics, second.attempt) == (1, 2, {"loss": 0.25}, 2)
    assert first.metrics["loss"] != first.metrics["loss"]
    assert files.read_epochs(tmp_path / "nowhere") == []


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "promotion.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"promotion\.json: not JSON"):
        files.read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="got list; expected an object"):
        files.read_json(path)


def test_plain_json_has_no_nan() -> None:
    value = {"a": (1.0, float("nan")), "b": {"c": float("inf")}}
    assert files.plain_json(value) == {"a": [1.0, None], "b": {"c": None}}
