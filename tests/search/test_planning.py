from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from search import planning
from search.errors import SpecError
from search.spec import SearchSpec
from workloads import toy as workload


def test_data_without_a_test_split_is_refused_before_anything_runs(
    toy: Callable[..., SearchSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = workload.prepare(workload.Config())
    lacking = {**whole, "samples": {"train": 8, "validation": 2, "test": 0}}
    monkeypatch.setattr(workload, "prepare", lambda config: lacking)
    with pytest.raises(SpecError, match="there is no test split, so the promoted could not be evaluated"):
        planning.make(toy(), tmp_path / "study")
    monkeypatch.setattr(workload, "prepare", lambda config: whole)
    assert planning.make(toy(), tmp_path / "study").manifest == whole
