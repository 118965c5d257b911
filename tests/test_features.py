"""docs/features.md promises nothing that no test shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import features

TABLE = """
| row | feature, in our words | shown by |
| --- | --- | --- |
| X1 | It flies. | |
| X2 | It lands. | `make land` |
| X3 | It waits. | `tests/test_old.py::test_gone` |
"""


def test_every_row_is_shown_and_the_table_is_current() -> None:
    found = features.problems(
        features.TABLE.read_text(encoding="utf-8"), features.marks(features.test_files(), features.ROOT)
    )
    assert not found, "\n".join(found)


def test_the_table_lists_every_row_once() -> None:
    listed = features.rows(features.TABLE.read_text(encoding="utf-8"))
    counts = {"X": 16, "A": 42, "K": 46, "P": 55, "C": 14, "F": 15, "N": 6, "S": 51, "E": 47}
    unbuilt = {"K33"}
    every = [f"{letter}{number}" for letter, count in counts.items() for number in range(1, count + 1)]
    assert list(listed) == [row for row in every if row not in unbuilt]


def test_marks_are_found_on_functions_parameters_classes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text(
        """
import pytest
pytestmark = [pytest.mark.slow, pytest.mark.row("X9")]

@pytest.mark.row("X1", "X2")
def test_a(): ...

@pytest.mark.parametrize("value", [1, pytest.param(2, marks=pytest.mark.row("X3"))])
def test_b(value): ...

@pytest.mark.row("X4")
class TestC:
    def test_d(self): ...

@pytest.mark.row("X5")
def helper(): ...
"""
    )
    a, b, d = "test_some.py::test_a", "test_some.py::test_b", "test_some.py::TestC::test_d"
    assert features.marks([path], tmp_path) == {"X1": [a], "X2": [a], "X3": [b], "X4": [d], "X9": [d, a, b]}


def test_an_id_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("@pytest.mark.row(ROW)\ndef test_a(): ...\n")
    with pytest.raises(features.FeatureError, match=r"test_some\.py:1: write the row's id as text"):
        features.marks([path], tmp_path)


def test_fill_writes_tests_keeps_commands_and_clears_what_is_gone() -> None:
    filled = features.fill(TABLE, {"X1": ["tests/test_a.py::test_b", "tests/test_a.py::test_c"]})
    assert features.rows(filled) == {
        "X1": "`tests/test_a.py::test_b`<br>`tests/test_a.py::test_c`",
        "X2": "`make land`",
        "X3": "",
    }
    assert features.fill(filled, {"X1": ["tests/test_a.py::test_b", "tests/test_a.py::test_c"]}) == filled


def test_problems_name_every_row_without_a_test_every_unknown_row_and_a_stale_table() -> None:
    assert features.problems(TABLE, {"X7": ["tests/test_a.py::test_b"]}) == [
        "2 of 3 rows have no test: X1, X3",
        "row X7 is not in docs/features.md, but marked by tests/test_a.py::test_b",
        "docs/features.md is not current: run python -m tests.features",
    ]


def test_a_row_listed_twice_is_refused() -> None:
    with pytest.raises(features.FeatureError, match="X1 is listed twice"):
        features.rows("| X1 | a | |\n| X1 | b | |\n")
