"""A study in an object store, with a local server that speaks S3; each machine's copy can be lost at any moment."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

import durable
from search import epochs, planning, service
from search.errors import DiskError, SpecError, StoreError, StudyError
from search.record import StudyPaths
from search.spec import Objective, SearchSpec
from search.storage import store
from search.storage.lease import lease
from search.storage.store import Store
from search.study import RESULT, Study, read_outcome
from search.trial import Superseded, TrialRun
from tests import discs
from workloads import toy as toy_workload

Load = Callable[..., SearchSpec]
SCORE = [asdict(Objective(metric="score", mode="max"))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start moto's server with one bucket; return its address."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        s3 = S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True)
        s3.create_dir("bucket")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


class Bucket:
    """What one test has of the store, and this machine's copy of it."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.runs = f"s3://bucket/{prefix}?scheme=http&endpoint_override={endpoint.removeprefix('http://')}"
        self.folder = self.store().folder

    def store(self) -> Store:
        return store.place(self.runs, "toy")

    def paths(self) -> StudyPaths:
        return StudyPaths(self.folder, self.store())

    def names(self, below: str = "") -> list[str]:
        there = self.store()
        return sorted(there._list(there.folder / below))

    def lose_machine(self) -> None:
        """Leave nothing but what is in the store."""
        shutil.rmtree(self.folder)


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv(store.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SETTLE_S", 0.05)
    return Bucket(server, tmp_path.name)


def put(folder: Path, name: str, content: str = "content") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_a_folder_goes_there_and_back_its_manifest_last(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    there, folder = bucket.store(), bucket.folder / "model"
    for name in ("weights.bin", "zz/last.txt"):
        put(folder, name, name * 1000)
    sha256 = durable.seal(folder)
    put(folder, ".half.tmp")
    order: list[str] = []
    upload = Store._upload
    monkeypatch.setattr(Store, "_upload", lambda self, file: (upload(self, file), order.append(file.name)))
    there.push(folder)
    there.push(folder)
    assert sorted(order[:2]) == ["last.txt", "weights.bin"] and order[2:] == ["manifest.json"]
    assert bucket.names() == ["model/manifest.json", "model/weights.bin", "model/zz/last.txt"]

    bucket.lose_machine()
    there = bucket.store()
    there.pull(folder)
    assert durable.sealed(folder) == sha256 and (folder / "zz" / "last.txt").read_text() == "zz/last.txt" * 1000

    there.delete(folder)
    assert bucket.names() == []


def test_pulling_makes_the_copy_what_the_store_is(bucket: Bucket) -> None:
    there = bucket.store()
    for name in ("same", "changed", "gone", "mine/kept"):
        put(bucket.folder, name)
    there.push(bucket.folder)
    there.pull(bucket.folder)
    other = bucket.store()
    other.write(bucket.folder / "changed", b"by another")
    other.write(bucket.folder / "new", b"")
    other.delete_file(bucket.folder / "gone")
    other.delete(bucket.folder / "mine")
    put(bucket.folder, "extra")
    before = (bucket.folder / "same").stat().st_ino

    there.pull(bucket.folder, skip=lambda name: name.startswith("mine/"))

    assert {file.name for file in bucket.folder.iterdir()} == {"same", "changed", "new", "mine"}
    assert (bucket.folder / "changed").read_text() == "by another" and (bucket.folder / "mine" / "kept").exists()
    assert (bucket.folder / "same").stat().st_ino == before, "what has not changed is not fetched again"


def test_without_a_store_nothing_happens(tmp_path: Path) -> None:
    there = store.place(str(tmp_path), "toy")
    assert not there and there.folder == tmp_path / "toy" == store.place(f"file://{tmp_path}", "toy").folder
    there.push(there.folder / "none")
    there.pull(there.folder / "none")
    there.delete(there.folder / "none")
    with there.held():
        there.check()


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("s3://KEY:canary@bucket/runs", "a name or a password in it"),
        ("nothing://bucket/runs", "expected such as s3://"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused(runs: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"--runs: .*{said}") as caught:
        store.place(runs, "toy")
    assert "canary" not in str(caught.value)


def test_the_endpoint_of_the_environment_is_part_of_the_address(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    there = store.place("s3://bucket/runs/", "toy")
    assert there.uri == f"s3://bucket/runs/toy?scheme=http&endpoint_override={server.removeprefix('http://')}"
    assert there.folder == tmp_path / "studies" / "s3" / "bucket" / "runs" / "toy"
    assert store.shown(str(there.uri)) == "s3://bucket/runs/toy"


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    there = Store(tmp_path, f"s3://bucket/runs/toy?scheme=http&endpoint_override={address}")
    with pytest.raises(StoreError, match=r"^s3://bucket/runs/toy: .*run the same command: it goes on from here"):
        there.push(put(tmp_path, "file"))


# A trial, whose slot may be on any machine.


def start(bucket: Bucket, **config: Any) -> TrialRun:
    order = {
        "number": 7,
        "workload": "toy",
        "config": {**toy_workload.Config().__dict__, "epochs": 4, **config},
        "objectives": SCORE,
        "folder": str(bucket.paths().trial(7)),
        "tensorboard": False,
        "store": bucket.store().uri,
    }
    return TrialRun(order)


def steps(run: TrialRun, count: int) -> None:
    for _ in range(count):
        run.step()


def test_a_trial_goes_on_where_another_machine_left_it(bucket: Bucket) -> None:
    steps(start(bucket), 3)
    bucket.lose_machine()

    run = start(bucket)
    assert run.attempt == 2 and run.resume is not None and run.resume.name == "epoch-0003"
    epoch, _, outcome = run.step()
    run.close()

    assert epoch == 4 and outcome is not None and outcome.state == "complete"
    assert [row.attempt for row in epochs.read(run.folder)] == [1, 1, 1, 2]
    found = bucket.names("trials/7")
    assert {name for name in found if not name.startswith("checkpoints/")} == {
        "attempt-1",
        "attempt-2",
        "config.json",
        epochs.FILE,
    }, "what the trial gave is there, but only the driver says so"
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints/")} == {"epoch-0004"}


def test_a_checkpoint_that_is_not_whole_in_the_store_is_passed_over(bucket: Bucket) -> None:
    steps(start(bucket), 3)
    there = bucket.store()
    there.write(bucket.paths().trial(7) / "checkpoints" / "epoch-0003" / toy_workload.STATE_FILE, b"torn")
    bucket.lose_machine()
    run = start(bucket)
    assert run.resume is not None and run.resume.name == "epoch-0002"
    assert [row.epoch for row in epochs.read(run.folder)] == [1, 2]


def test_a_result_that_only_this_machine_has_is_none(bucket: Bucket) -> None:
    """Its driver died before it said so, and another machine may have done more since."""
    run = start(bucket)
    steps(run, 4)
    assert read_outcome(run.folder) is not None
    again = start(bucket)
    assert again.committed is None and again.resume is not None
    assert again.step()[2] is not None and [row.attempt for row in epochs.read(run.folder)] == [1] * 4


@pytest.mark.parametrize("seen", [True, False])
def test_of_two_processes_the_later_goes_on(bucket: Bucket, seen: bool) -> None:
    old = start(bucket)
    steps(old, 1)
    if not seen:  # it began before it could see the other's attempt
        bucket.store().delete_file(old.folder / "attempt-1")
    bucket.lose_machine()
    new = start(bucket)
    with pytest.raises(Superseded, match="attempt"):
        old.step()
    steps(new, 2)


def test_a_store_that_went_away_is_no_fault_of_the_trial(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(bucket)
    steps(run, 1)

    def gone(self: Store, path: Path) -> Any:
        raise OSError("When completing multipart upload: NETWORK_CONNECTION")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_open", gone)
        with pytest.raises(DiskError, match="NETWORK_CONNECTION; when it can be reached again"):
            run.step()
        patch.setattr(Store, "_list", gone)
        taken = start(bucket)
        with pytest.raises(DiskError, match="NETWORK_CONNECTION"):
            taken.step()
        taken.close()
    assert read_outcome(run.folder) is None
    again = start(bucket)
    steps(again, 2)


# The driver: its journal and its lease.


@pytest.fixture
def spec(toy: Load) -> SearchSpec:
    return toy(search={"sampler": "random", "trials": 6}, fixed={"epochs": 2}, stopping={"rule": "none"})


def test_the_journal_is_there_whole_after_the_machine_is_gone(
    bucket: Bucket, spec: SearchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PIECES", 3)
    asked: list[Any] = []
    counts = []
    for _ in range(3):
        paths = bucket.paths()
        with lease(paths):
            study = Study(paths, spec)
            again = Study(paths, spec, name="toy/promotion", trials="promotion")  # of the same journal
            assert [study.ask() for _ in asked] == asked
            asked += [study.ask(), study.ask()]
            again.enqueue({"lr": 0.5, "width": 8}, "once")
            assert (task := again.ask()) is not None and task.number == 0
            assert [record.note for record in again.records()] == ["once"]
        counts.append(len(bucket.names(store.JOURNAL)))
        bucket.lose_machine()
    assert counts == [3, 5, 3], "one for each trial that was asked, those before a start with many put together"
    pieces = [bucket.store().read(bucket.folder / store.JOURNAL / name) for name in bucket.names(store.JOURNAL)]
    lines = b"".join(piece or b"" for piece in pieces).decode().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_pieces_that_were_put_together_by_a_process_that_was_killed_are_read_once(bucket: Bucket) -> None:
    there = bucket.store()
    for offset, content in {0: b"one\ntwo\nthree\n", 4: b"two\n", 8: b"three\n", 14: b"four\n"}.items():
        there.write(bucket.folder / store.JOURNAL / f"{offset:015d}", content)
    journal = bucket.paths().journal
    there.pull_journal(journal)
    assert journal.read_bytes() == b"one\ntwo\nthree\nfour\n"
    with journal.open("ab") as file:
        file.write(b"five\nhal")
    there.push_journal(journal)
    assert there.read(bucket.folder / store.JOURNAL / f"{19:015d}") == b"five\n"


@pytest.mark.row("C9")
def test_a_second_driver_is_told_who_holds_the_study(bucket: Bucket, tmp_path: Path) -> None:
    elsewhere = Store(tmp_path / "another machine", bucket.store().uri)
    began = time.monotonic()
    with (
        bucket.store().held(),
        pytest.raises(StudyError, match=rf'holds this study \(.*"pid": {os.getpid()}.*runs out in \d+ s'),
        elsewhere.held(),
    ):
        pass
    assert time.monotonic() - began < 5
    with elsewhere.held():
        elsewhere.check()
    assert bucket.names() == [], "given back, and nothing left over"


def test_the_lease_of_a_process_that_is_gone_counts_for_nothing(bucket: Bucket) -> None:
    there = bucket.store()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = {"pid": child.pid, "host": socket.gethostname(), "started": time.time(), "token": "theirs"}
    there.write(there.folder / store.LEASE, json.dumps(gone).encode())
    with there.held():
        there.check()


def test_a_lease_runs_out_and_whoever_lost_it_writes_no_more(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = bucket.store(), Store(tmp_path, bucket.store().uri)
    monkeypatch.setattr(store, "RENEW_S", 0.3)
    monkeypatch.setattr(store._Lease, "_is_dead", lambda self, holder: holder.get("host") == "stalled")
    with first.held():
        first.check()
        first.write(first.folder / store.LEASE, json.dumps({"host": "stalled", "pid": 1, "token": "x"}).encode())
        with second.held():
            time.sleep(0.7)
            second.check()
            with pytest.raises(StoreError, match="its lease is lost: another search took it"):
                first.push_journal(put(first.folder, "study.journal"))


def test_a_lease_that_cannot_be_renewed_is_lost_before_it_runs_out(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = bucket.store()
    monkeypatch.setattr(store, "LEASE_S", 0.6)
    monkeypatch.setattr(store, "RENEW_S", 0.3)
    with there.held(), monkeypatch.context() as patch:
        patch.setattr(Store, "_open", lambda self, path: (_ for _ in ()).throw(OSError("no route")))
        time.sleep(0.7)
        with pytest.raises(StoreError, match="its lease is lost: it could not be renewed in time"):
            there.check()


# Whole searches.


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.row("C9")
def test_a_search_goes_on_on_a_fresh_machine(bucket: Bucket, toy: Load) -> None:
    def search(trials: int) -> list[Any]:
        spec = toy(
            search={"sampler": "random", "trials": trials},
            fixed={"epochs": 3},
            resources={"slots": 2},
            stopping={"rule": "asha", "reduction": 2},
            promotion={"k": 2},
        )
        there = bucket.store()
        service.run(planning.make(spec, there.folder, there), io.StringIO())
        with lease(bucket.paths()):
            return Study(bucket.paths(), spec).records()

    first = search(4)
    found = bucket.names()
    assert {f"trials/{number}/{RESULT}" for number in range(4)} <= set(found)
    assert {"spec.yaml", "promotion.json", "report.html", "leaderboard.csv", "trials.parquet"} <= set(found)
    assert len([name for name in found if name.startswith("models/") and name.endswith(durable.MANIFEST)]) >= 2
    assert any("events.out.tfevents" in name for name in found)
    bucket.lose_machine()

    more = search(6)
    assert not (bucket.folder / "trials" / "0" / "metrics.jsonl").exists(), "trials that have ended are not fetched"
    bare = [{**asdict(record), "checkpoint": None} for record in more]
    assert bare[:4] == [{**asdict(record), "checkpoint": None} for record in first] and len(more) == 6
    committed = [bucket.store().read(bucket.folder / "trials" / str(number) / RESULT) for number in range(6)]
    assert [len(json.loads(content or b"")["epochs"]) for content in committed] == [len(r.epochs) for r in more]


@pytest.mark.slow
@pytest.mark.parametrize("keep_copy", [False, True])
@pytest.mark.row("C9")
def test_a_killed_search_loses_nothing_with_its_machine(bucket: Bucket, tmp_path: Path, keep_copy: bool) -> None:
    space = tmp_path / "toy.yaml"
    space.write_text(
        "workload: toy\nobjective: {metric: score, mode: max}\nparameters: {lr: {type: float, low: 0.001, high: 1.0}}\n"
        "fixed: {epochs: 4, epoch_s: 0.2}\nsearch: {sampler: random, trials: 12}\nresources: {slots: 2}\n"
        "stopping: {rule: none}\n"
    )
    command = [sys.executable, "tune.py", "--space", str(space), "--runs", bucket.runs]

    def committed() -> dict[str, bytes | None]:
        there = bucket.store()
        names = [name for name in bucket.names("trials") if name.endswith(RESULT)]
        return {name: there.read(bucket.folder / "trials" / name) for name in names}

    before: dict[str, bytes | None] = {}
    for wanted in (2, 6):
        with (tmp_path / "log").open("ab") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(300):
                if len(committed()) >= wanted or driver.poll() is not None:
                    break
                time.sleep(0.2)
            assert driver.poll() is None, (tmp_path / "log").read_text()
        finally:
            driver.kill()
            driver.wait()
        time.sleep(1)  # its slots go with it
        if not keep_copy:
            bucket.lose_machine()
        assert before.items() <= committed().items()
        before = committed()
    last = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert last.returncode == 0, last.stderr
    assert "s3://bucket/" in last.stdout and "endpoint_override" not in last.stdout
    assert before.items() <= committed().items() and len(committed()) == 12
    attempts = [json.loads(content or b"{}")["attempts"] for content in before.values()]
    rows = {name: json.loads(content or b"{}")["epochs"] for name, content in committed().items()}
    assert max(attempts) <= 3 and all(list(found) == ["1", "2", "3", "4"] for found in rows.values())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "own_cache")
def test_a_parent_and_its_scan_outlive_the_machine(bucket: Bucket, toy: Load, tmp_path: Path) -> None:
    spec = toy(
        workload="pairs",
        objective=[{"metric": "val_mean_dice_no_bg"}, {"metric": "gmacs"}],
        parameters={"prune.encoders.1": {"type": "float", "low": 0.0, "high": 0.7}},
        data={"root": str(discs.write(tmp_path / "discs")), "tile": 32, "classes": 2},
        fixed={"network.name": "unet", "network.widths": [4, 8], "epochs": 1, "threads": 1},
        parent={"train": {"epochs": 2, "rewind_epoch": 1}},
        search={"trials": 2, "sampler": "random"},
        stopping={"rule": "none"},
        promotion={"rule": "pareto", "k": 1, "seeds": 2},
        resources={"slots": 1},
    )

    def search() -> str:
        stream, there = io.StringIO(), bucket.store()
        service.run(planning.make(spec, there.folder, there), stream)
        return stream.getvalue()

    assert "evaluated trial parent" in search()
    sealed = durable.sealed(bucket.folder / "parent")
    assert sealed is not None and {"parent.json", "scan/scan.json"} <= set(bucket.names())
    there = bucket.store()
    for name in [f"trials/1/{RESULT}", "parent.json"]:  # killed before it was said, and in the middle of pinning
        there.delete_file(bucket.folder / name)
    bucket.lose_machine()
    said = search()
    assert "complete, all its trials have ended" in said
    assert durable.sealed(bucket.folder / "parent") == sealed, "trained once, pinned again"
    assert durable.read_json(bucket.folder / "parent.json")["sha256"] == sealed
