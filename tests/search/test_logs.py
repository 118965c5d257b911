from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search import logs
from search.errors import BadInput
from tests.search import conftest
from tests.search.conftest import Drive, Load, Open

ROOT = Path(__file__).resolve().parents[2]
SPACE = """
workload: toy
objective: {metric: score, mode: max}
parameters: {lr: {type: float, low: 1.0e-4, high: 1.0, log: true}}
fixed: {epochs: 2, fail: error, fail_epoch: 2}
search: {sampler: random, trials: 2}
resources: {slots: 1}
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back what these tests do to this process's loggers."""
    monkeypatch.setenv(logs.VARIABLE, "text")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.OURS}
    monkeypatch.setattr(logs, "_now", {})
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.row("C14")
def test_each_line_carries_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    stream = logs.start("json")
    logs.enter(study="cells")
    logging.getLogger("search.desk").info("trial %s went well\nindeed", 7, extra={"trial": 7, "attempt": 2})
    logs.in_worker({"study": "cells", "number": 8, "log": "json"}, rank=1, attempt=3)
    logging.getLogger("some.library").warning("beware")
    logging.getLogger("some.library").info("not ours, and no warning")
    logs.say(stream, "one\n\n  two", trial=9)
    try:
        raise ValueError("what")
    except ValueError:
        logging.getLogger("search").exception("it broke")
    logs.fail("tune.py", "the end")
    found = lines(capsys.readouterr().err)
    assert [line.pop("time") is not None for line in found] == [True] * 6
    told = [(line["level"], line["message"]) for line in found]
    assert told == [
        ("info", "trial 7 went well\nindeed"),
        ("warning", "beware"),
        ("info", "one"),
        ("info", "two"),
        ("error", "it broke"),
        ("error", "the end"),
    ]
    assert found[0] == {
        "level": "info",
        "logger": "search.desk",
        "message": told[0][1],
        "study": "cells",
        "trial": 7,
        "attempt": 2,
    }
    assert {name: found[1][name] for name in logs.FIELDS} == {"study": "cells", "trial": 8, "attempt": 3, "rank": 1}
    assert found[2]["trial"] == 9 and "ValueError: what" in str(found[4]["traceback"])


def test_text_stays_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers[:] = []  # pytest's own, beside which none is put
    stream = logs.start("text")
    logging.getLogger("search.x").info("quiet")
    logging.getLogger("search.x").warning("loud")
    logs.say(stream, "progress", trial=1)
    logs.fail("tune.py", "the end")
    assert capsys.readouterr().err == "WARNING search.x: loud\nprogress\ntune.py: the end\n"


def test_the_environment_chooses_and_the_flag_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert (logs.kind(), logs.kind("text")) == ("json", "text")
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(BadInput, match="TUNE_LOG: got 'xml'; expected one of text, json"):
        logs.kind()


@pytest.mark.ray
@pytest.mark.slow  # a start of Ray
@pytest.mark.row("C14")
def test_driver_and_slots_of_a_search_log_json(tmp_path: Path) -> None:
    space, runs = tmp_path / "cells.yaml", tmp_path / "runs"
    space.write_text(SPACE)
    command = [sys.executable, str(ROOT / "tune.py"), "--space", str(space), "--runs", str(runs), "--log", "json"]
    # Where Ray keeps what its processes write; sockets are there too, whose paths have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        written = [path.read_text(errors="replace") for path in Path(folder).rglob("worker-*.err")]
    assert done.returncode == 1, "nothing finishes here"
    told = lines(done.stderr)
    assert all(line["study"] == "cells" for line in told[20:])
    ended = [line for line in told if "trial" in line]
    assert [(line["trial"], line["attempt"]) for line in ended] == [(0, 1), (1, 1)]
    assert "failed: RuntimeError" in str(ended[0]["message"])
    slot = [line for text in written for line in lines("\n".join(t for t in text.splitlines() if t.startswith("{")))]
    epochs = [line for line in slot if line["logger"] == "search.trial"]
    assert [(line["study"], line["trial"], line["attempt"], line["rank"]) for line in epochs] == [
        ("cells", 0, 1, 0),
        ("cells", 1, 1, 0),
    ]
    assert str(epochs[0]["message"]).startswith("trial 0 epoch 1 score 0.")


def test_a_trial_tells_its_epochs_with_its_study_and_attempt(
    toy: Load, open_study: Open, drive: Drive, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = conftest.order
    monkeypatch.setattr(
        conftest, "order", lambda study, task: {**made(study, task), "study": study.label, "log": "json"}
    )
    study = open_study(toy(fixed={"epochs": 2}))
    task = study.ask()
    assert task is not None
    drive(study, task)
    found = lines(capsys.readouterr().err)
    assert [{name: line[name] for name in logs.FIELDS} for line in found] == [
        {"study": "toy", "trial": 0, "attempt": 1, "rank": 0}
    ] * 2
    assert str(found[1]["message"]).startswith("trial 0 epoch 2 score 0.")
