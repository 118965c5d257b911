"""`python -m search list | show | stop | promote | report | compare`, as people and scripts use them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import durable
from search import __main__ as command_line
from search import glance, planning, service, study_spec
from search.record import StudyPaths
from search.spec import SearchSpec
from search.storage.lease import lease
from search.study import Study
from tests.search.conftest import Drive, Load, Open

SECTIONS: dict[str, Any] = {
    "fixed": {"epochs": 2},
    "search": {"sampler": "random", "trials": 4, "seed": 1},
    "stopping": {"rule": "none"},
    "promotion": {"k": 1},
    "resources": {"slots": 2, "gpus_per_worker": 0},
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sigterm_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Return a function that runs a command on the studies of this test; gives exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def ran(*arguments: str) -> tuple[int, str, str]:
        code = command_line.main([*arguments, "--runs", str(tmp_path / "runs")])
        return (code, *capsys.readouterr())

    return ran


@pytest.fixture
def half(toy: Load, open_study: Open, drive: Drive) -> Study:
    """Return a study of four trials of which two have ended, one of them failed, and one was begun."""
    spec = toy(**SECTIONS, parameters={"lr": {"choices": [0.01, 0.1, 1.0]}, "fail": {"choices": ["never", "error"]}})
    study = open_study(spec)
    write_spec(study.paths, spec)
    for params in ({"lr": 0.01, "fail": "never"}, {"lr": 1.0, "fail": "error"}, {"lr": 0.1, "fail": "never"}):
        study.enqueue(params, f"test {params}")
    for _ in range(2):
        task = study.ask()
        assert task is not None
        drive(study, task)
    study.ask()
    return study


def write_spec(paths: StudyPaths, spec: SearchSpec) -> None:
    plan = planning.make(spec, paths.folder)
    study_spec.write(paths, plan.spec, plan.config, plan.manifest)


@pytest.mark.row("C12")
def test_list_tells_who_runs_how_far_and_the_best(half: Study, run: Run, tmp_path: Path) -> None:
    best = half.records()[0].values
    assert best is not None
    code, out, err = run("list", "--json")
    (row,) = json.loads(out)
    assert (code, err) == (0, "")
    assert row.pop("age_s") >= 0
    assert row == {
        "study": "toy",
        "state": "interrupted",
        "finished": 1,
        "stopped early": 0,
        "failed": 1,
        "running": 1,
        "waiting": 0,
        "of": 4,
        "metric": "score",
        "best": best[0],
        "trial": 0,
    }
    with lease(half.paths):
        code, out, _ = run("list", "--json")
        assert json.loads(out)[0]["state"] == "running here"
    # A study that cannot be read does not hide the others.
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "spec.yaml").write_text("name: broken\n")
    code, out, _ = run("list")
    head, broken, toy_line = out.splitlines()
    assert code == 0 and head.split()[:2] == ["study", "state"]
    assert broken.startswith("broken  unreadable") and toy_line.startswith("toy     interrupted")
    assert f"{best[0]:.4g}" in toy_line


def test_reading_takes_nothing_and_changes_nothing(half: Study, run: Run) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in half.paths.folder.rglob("*") if path.is_file()}

    with half.paths.journal.open("ab") as file:
        file.write(b'{"op_code": 6, "half a li')  # as while another process writes
    before = content()
    with lease(half.paths):
        before[half.paths.lease] = half.paths.lease.read_bytes()
        for name in ("list", "show"):
            assert run(name, *(["toy"] if name == "show" else []))[0] == 0
        assert content() == before
    assert len(glance.at(half.paths).records) == 3


@pytest.mark.row("C12")
def test_show_tells_the_question_the_best_and_why_trials_failed(half: Study, run: Run) -> None:
    code, out, _ = run("show", "toy")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["objective", "score", "max"] in lines and ["lr", "one", "of", "0.01,", "0.1,", "1"] in lines
    assert ["trials", "1", "finished,", "1", "failed,", "1", "running;", "4", "wanted"] in lines
    assert ["state", "interrupted"] in lines
    assert ["1", "1", "RuntimeError:", "the", "toy", "was", "told", "to", "fail"] in lines
    code, out, _ = run("show", "toy", "--json")
    told = json.loads(out)
    assert [row["trial"] for row in told["best"]] == [0] and told["best"][0]["lr"] == 0.01
    assert told["failed"] == [{"trials": 1, "first": 1, "reason": "RuntimeError: the toy was told to fail"}]
    assert run("show", str(half.paths.folder))[0] == 0, "a folder names a study too"


def test_an_unknown_study_is_told_with_those_there_are(half: Study, run: Run, tmp_path: Path) -> None:
    code, out, err = run("show", "tyo")
    assert (code, out) == (2, "") and err == "python -m search: tyo: no such study; did you mean toy?\n"
    code, _, err = run("stop", "nuclei")
    assert code == 2 and err.startswith("python -m search: nuclei: no such study; here are toy (in ")
    shutil.rmtree(tmp_path / "runs")
    code, out, err = run("list")
    assert (code, out) == (0, "") and "--runs names another folder" in err


@pytest.mark.row("C12")
def test_stop_says_what_it_did(half: Study, run: Run, tmp_path: Path) -> None:
    assert run("stop", "toy") == (0, f"{half.paths.folder}: nobody runs it\n", "")
    script = "import sys, time; from pathlib import Path\n"
    script += "from search.storage.lease import lease; from search.record import StudyPaths\n"
    script += "with lease(StudyPaths(Path(sys.argv[1]))): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(half.paths.folder)], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        code, out, _ = run("stop", "toy")
        assert code == 0 and driver.wait(10) == -15
        assert f"asked process {driver.pid} on " in out and "by SIGTERM" in out and "stopped; nothing is lost" in out


def test_list_and_show_take_less_than_two_seconds_and_start_no_ray(half: Study, tmp_path: Path) -> None:
    script = (
        "import sys; from search.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'ray', 'torch'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    for arguments in (["list"], ["show", "toy"]):
        began = time.monotonic()
        command = [sys.executable, "-c", script, *arguments, "--runs", str(tmp_path / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began < 2


def test_every_search_space_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    from search import spec_file

    for path in sorted(spec_file.FOLDER.glob("*.yaml")):
        spec = spec_file.load(str(path))
        paths = StudyPaths(tmp_path / path.stem)
        study_spec.write(paths, spec, {}, {})
        read, content = study_spec.read(paths)
        # What YAML has no word for, such as a tuple, is the same in a file.
        assert study_spec.resolved(read, {}, {}) == study_spec.resolved(spec, {}, {}) == content, path.name


def test_a_spec_in_unknown_words_is_told(half: Study, run: Run) -> None:
    content = yaml.safe_load(half.paths.spec.read_text())
    content["search"]["later"] = 1
    half.paths.spec.write_text(yaml.safe_dump(content))
    code, _, err = run("show", "toy")
    assert code == 2 and "spec.yaml: not understood" in err and "later" in err and "version" in err


def test_what_cannot_be_promoted_is_told_before_anything_starts(half: Study, run: Run) -> None:
    for number, message in (
        ("1", "trial 1: it is failed (RuntimeError: the toy was told to fail), and only finished trials move on"),
        ("2", "trial 2: it is running, and only finished trials move on"),
        ("9", "trial 9: there is none with this number; those that can be promoted: 0"),
    ):
        code, out, err = run("promote", "toy", "--trial", number)
        assert (code, out) == (2, "") and message in err
    half.forget_checkpoint(0)
    code, _, err = run("promote", "toy", "--trial", "0")
    assert code == 2 and "trial 0: its checkpoint is gone" in err and "those that can be promoted: none yet" in err
    with lease(half.paths):
        code, _, err = run("promote", "toy", "--trial", "0")
    assert code == 2 and "holds it; wait for it, or stop it first" in err
    assert not half.paths.promotion.exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.row("C12")
def test_promoted_by_hand_reported_and_compared(toy: Load, run: Run, tmp_path: Path) -> None:
    spec = toy(**SECTIONS)
    runs = tmp_path / "runs"
    paths = StudyPaths(runs / "one")
    service.run(planning.make(spec, paths.folder), sys.stderr)
    records = glance.at(paths).records
    assert glance.at(paths).standing == "complete"
    ruled = durable.read_json(paths.promotion)["promoted"][0]
    other = next(r.number for r in records if r.number not in (ruled["trial"], 0) and r.checkpoint)

    # A report made again from the study is the search's own, byte for byte.
    files = (paths.leaderboard, paths.table, paths.report)
    before = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    code, out, _ = run("report", "one")
    assert code == 0 and out.split() == [str(path) for path in files]
    assert {path: path.read_bytes() for path in files} == before

    # By hand: once recorded, once evaluated, however often it is asked for.
    assert not paths.evaluation(str(other)).exists()
    code, out, err = run("promote", "one", "--trial", str(other))
    assert code == 0 and f"trial {other}: by hand" in out and f"evaluated trial {other}" in err
    promoted = durable.read_json(paths.promotion)["promoted"]
    assert promoted == [ruled, {"trial": other, "why": "by hand", "by": "hand"}]
    evaluated = paths.evaluation(str(other)) / "evaluation.json"
    at = evaluated.stat().st_mtime_ns
    assert paths.model(str(other)).is_dir() and str(other) in paths.leaderboard.read_text()
    code, _, err = run("promote", "one", "--trial", str(other), "--trial", str(other))
    assert code == 0 and "evaluat" not in err
    assert durable.read_json(paths.promotion)["promoted"] == promoted and evaluated.stat().st_mtime_ns == at

    # The search goes on, and what was chosen by hand stays: in the list and on the disk.
    more = toy("search.trials=8", "evaluation.keep_checkpoints=1", **SECTIONS)
    service.run(planning.make(more, paths.folder), sys.stderr)
    again = durable.read_json(paths.promotion)
    assert again["trials"] == 8 and {"trial": other, "why": "by hand", "by": "hand"} in again["promoted"]
    assert glance.at(paths).records[other].checkpoint is not None
    code, _, _ = run("promote", "one", "--k", "2")
    assert code == 0 and len(durable.read_json(paths.promotion)["promoted"]) in (2, 3)

    # Side by side: the numbers of each, what differs in data is marked, other questions are refused.
    shutil.copytree(paths.folder, runs / "two", symlinks=True)
    content = yaml.safe_load((runs / "two" / "spec.yaml").read_text())
    (runs / "two" / "spec.yaml").write_text(yaml.safe_dump({**content, "data_sha256": "another"}))
    code, out, err = run("compare", "one", "two", "--json")
    one, two = json.loads(out)
    evaluation = durable.read_json(paths.evaluation(one["evaluated"]) / "evaluation.json")
    assert one["test_score"] == evaluation["metrics"]["score"]
    assert [one["low"], one["high"]] == evaluation["intervals"]["score"]
    assert one["slot_hours"] == pytest.approx(sum(r.slot_s for r in glance.at(paths).records) / 3600, abs=1e-4)
    assert (one["trials"], one["data"], two["data"]) == (8, "same", "other")
    assert {**two, "study": "one", "data": "same"} == one
    assert code == 0 and f"note: {runs / 'two'}: other data than the first" in err
    content["objectives"] = [{"metric": "loss", "mode": "min"}]
    (runs / "two" / "spec.yaml").write_text(yaml.safe_dump(content))
    code, out, err = run("compare", "one", "two")
    assert (code, out) == (2, "") and "its objective is loss min, that of" in err and "is score max" in err
