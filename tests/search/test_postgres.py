"""A study whose record is in PostgreSQL, with a real server that these tests start, break and start again."""

from __future__ import annotations

import io
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import exc

from search import glance, planning, service
from search.errors import StoreError, StudyError
from search.record import StudyPaths
from search.spec import SearchSpec
from search.storage import address, database
from search.storage.lease import lease
from search.study import Outcome, Study, Task

Load = Callable[..., SearchSpec]
Drive = Callable[[Study, Task], Outcome]
PASSWORD = "canary p@ssword/7"


class Server:
    """A PostgreSQL of its own, on loopback, which knows one user by a password."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder, self.count = binaries, folder, itertools.count()
        # PostgreSQL refuses to run as root.
        self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        made = self._run(
            "initdb", "-D", str(folder / "data"), "-U", "me", "--no-sync", f"--pwfile={secret}", "-A", "scram-sha-256"
        )
        assert made.wait(60) == 0, (folder / "log").read_text()
        with closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.start()

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        settings = [argument for name, value in options.items() for argument in ("-c", f"{name}={value}")]
        self.process = self._run("postgres", "-D", str(self.folder / "data"), *settings)
        for _ in range(200):
            try:
                return self.connect().close()
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def connect(self, name: str = "postgres") -> Any:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="me", password=PASSWORD, dbname=name, autocommit=True
        )

    def new(self) -> str:
        """Return the URL, password in it, of a database that is empty."""
        name = f"tune{next(self.count)}"
        with self.connect() as connection:
            connection.execute(f"create database {name}")
        secret = "canary%20p%40ssword%2F7"
        return f"postgresql+psycopg://me:{secret}@127.0.0.1:{self.port}/{name}"

    def _run(self, binary: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self.binaries / binary, *arguments], stdout=log, stderr=log, cwd=self.folder, **self.user
            )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    places = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    binaries = next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)
    if binaries is None:
        pytest.skip("no PostgreSQL here; `make postgres` installs it")
    # Not below pytest's own folder, into which only its user may look.
    folder = Path(tempfile.mkdtemp(prefix="tune-postgres-"))
    started = Server(binaries, folder)
    yield started
    started.stop()
    shutil.rmtree(folder)


@pytest.fixture
def url(server: Server) -> str:
    return server.new()


@pytest.fixture
def spec(toy: Load) -> SearchSpec:
    return toy(search={"sampler": "random", "trials": 6}, fixed={"epochs": 3}, stopping={"rule": "none"})


@pytest.fixture
def paths(tmp_path: Path) -> StudyPaths:
    return StudyPaths(tmp_path / "runs" / "toy")


def run(study: Study, drive: Drive, trials: int) -> None:
    for _ in range(trials):
        task = study.ask()
        assert task is not None
        drive(study, task)


def test_what_is_told_is_what_a_journal_would_hold(
    url: str, spec: SearchSpec, paths: StudyPaths, tmp_path: Path, drive: Drive
) -> None:
    kept = StudyPaths(tmp_path / "journal")
    kept.folder.mkdir()
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        study.enqueue({"lr": 0.5, "width": 8}, "first")
        run(study, drive, 6)
        assert study.ask() is None
    journal = Study(kept, spec)
    journal.enqueue({"lr": 0.5, "width": 8}, "first")
    run(journal, drive, 6)

    with lease(paths, url) as held:
        records = Study(paths, spec, database=held).records()

    assert [record.params for record in records] == [record.params for record in journal.records()]
    assert [record.epochs for record in records] == [record.epochs for record in journal.records()]
    assert [record.values for record in records] == [record.values for record in journal.records()]
    assert [record.note for record in records] == ["first", *[""] * 5]
    assert {record.state for record in records} == {"complete"}
    assert not paths.journal.exists()


@pytest.mark.slow
def test_several_objectives_are_kept_too(url: str, toy: Load, paths: StudyPaths, drive: Drive) -> None:
    both = [{"metric": "score", "mode": "max"}, {"metric": "cost", "mode": "min"}]
    spec = toy(
        objective=both, search={"sampler": "random", "trials": 2}, fixed={"epochs": 2}, stopping={"rule": "none"}
    )
    with lease(paths, url) as held:
        run(Study(paths, spec, database=held), drive, 2)
    with lease(paths, url) as held:
        records = Study(paths, spec, database=held).records()
    assert [len(record.epochs) for record in records] == [2, 2]
    assert all(record.values == record.epochs[record.best_epoch or 0] for record in records)


def test_a_trial_in_flight_goes_on_with_its_number_and_a_committed_one_is_told(
    url: str, spec: SearchSpec, paths: StudyPaths, drive: Drive
) -> None:
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        committed, flying = study.ask(), study.ask()
        assert committed is not None and flying is not None
        told, study.tell = study.tell, lambda number, outcome: None  # type: ignore[method-assign]
        drive(study, committed)
        del told
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        assert [record.state for record in study.records()] == ["complete", "running"]
        assert study.ask() == flying


HOLDER = """
import sys, time
from pathlib import Path
from search.record import StudyPaths
from search.storage.lease import lease
with lease(StudyPaths(Path(sys.argv[1])), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.row("C8")
def test_a_second_driver_is_told_who_holds_the_study_until_that_one_dies(url: str, paths: StudyPaths) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(paths.folder), url], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        began = time.monotonic()
        with (
            pytest.raises(StudyError, match=rf"another search holds this study \(tune .* pid {first.pid} from 127"),
            lease(paths, url),
        ):
            pass
        assert time.monotonic() - began < 5
        view = database.View(url, database.identity(paths))
        assert (holder := view.holder()) is not None and (holder.pid, holder.is_here) == (first.pid, True)
        with pytest.raises(exc.InternalError, match="read-only transaction"), view.storage.engine.begin() as looking:
            looking.exec_driver_sql("create table theirs (number integer)")
        first.kill()
        with lease(paths, url) as held:
            assert held is not None
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()


@pytest.mark.row("C8")
def test_studies_of_one_name_in_one_database_never_meet(
    url: str, spec: SearchSpec, tmp_path: Path, drive: Drive
) -> None:
    ours, theirs = StudyPaths(tmp_path / "ours" / "toy"), StudyPaths(tmp_path / "theirs" / "toy")
    with lease(ours, url) as first, lease(theirs, url) as second:
        run(Study(ours, spec, database=first), drive, 2)
        study = Study(theirs, spec, database=second)
        assert study.records() == []
        run(study, drive, 1)
        assert len(Study(ours, spec, database=first).records()) == 2


def test_a_record_that_is_elsewhere_is_not_begun_anew(
    server: Server, url: str, spec: SearchSpec, paths: StudyPaths, tmp_path: Path, drive: Drive
) -> None:
    with lease(paths, url) as held:
        run(Study(paths, spec, database=held), drive, 1)
    with pytest.raises(StudyError, match=r"is in a database; name it as search\.storage or TUNE"), lease(paths):
        pass
    with lease(paths, server.new()) as empty, pytest.raises(StudyError, match="has no record of them; name the data"):
        Study(paths, spec, database=empty)
    journal = StudyPaths(tmp_path / "journal")
    with lease(journal):
        Study(journal, spec)
    with pytest.raises(StudyError, match=r"its record is study\.journal; leave out"), lease(journal, url):
        pass


def test_a_database_that_was_away_is_waited_for(
    server: Server, url: str, spec: SearchSpec, paths: StudyPaths, drive: Drive
) -> None:
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        run(study, drive, 2)
        flying = study.ask()
        assert flying is not None
        server.stop()
        back = threading.Timer(0.7, server.start)
        back.start()
        drive(study, flying)
        back.join()
        run(study, drive, 3)
        assert study.ask() is None
        assert held is not None and held.connections == 2
        assert [record.state for record in study.records()] == ["complete"] * 6


@pytest.mark.slow
def test_a_database_that_stays_away_is_named_and_the_same_command_goes_on(
    server: Server, url: str, spec: SearchSpec, paths: StudyPaths, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE_S", 0.5)
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        run(study, drive, 1)
        flying = study.ask()
        assert flying is not None
        server.stop()
        try:
            with pytest.raises(StoreError, match=rf"127.0.0.1:{server.port}/.*: not to be reached for 0.5 s") as caught:
                drive(study, flying)
            assert "run the same command" in str(caught.value) and "canary" not in str(caught.value)
        finally:
            server.start()
    with lease(paths, url) as held:
        study = Study(paths, spec, database=held)
        assert [record.state for record in study.records()] == ["complete", "complete"]
        run(study, drive, 4)
        assert study.ask() is None


@pytest.mark.slow
def test_a_connection_that_breaks_again_and_again_loses_and_doubles_nothing(
    server: Server, url: str, toy: Load, paths: StudyPaths, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy(search={"sampler": "random", "trials": 12}, fixed={"epochs": 3}, stopping={"rule": "none"})
    monkeypatch.setattr(database, "BREAKS", 100)
    done, broken = threading.Event(), 0

    def cut() -> None:
        nonlocal broken
        with server.connect() as admin:
            while not done.wait(0.09):
                broken += admin.execute(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'tune %'"
                ).fetchone()[0]

    with lease(paths, url) as held:
        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            study = Study(paths, spec, database=held)
            for lr in (0.1, 0.2, 0.3):
                study.enqueue({"lr": lr, "width": 8}, f"wanted {lr}")
            run(study, drive, 12)
            assert study.ask() is None
        finally:
            done.set()
            cutter.join()
        records = study.records()
        assert broken > 3
        assert [record.state for record in records] == ["complete"] * 12
        assert [record.note for record in records][:3] == ["wanted 0.1", "wanted 0.2", "wanted 0.3"]
        assert len({str(record.params) for record in records}) == 12


def test_whoever_took_over_meanwhile_is_not_written_over(
    server: Server, url: str, spec: SearchSpec, paths: StudyPaths, drive: Drive
) -> None:
    with lease(paths, url) as held:
        assert held is not None
        study = Study(paths, spec, database=held)
        run(study, drive, 1)
        with server.connect(url.rpartition("/")[2]) as other:
            other.execute("set application_name = 'tune elsewhere pid 1'")
            other.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'tune %' "
                "and pid <> pg_backend_pid()"
            )
            other.execute("select pg_advisory_lock(%s)", (held._lock,))
            with pytest.raises(StoreError, match=r"another search holds this study \(tune elsewhere pid 1.*took over"):
                study.ask()


@pytest.mark.parametrize(
    ("change", "said"),
    [(("canary", "wrong"), "password authentication failed"), (("/tune", "/none"), 'database "none.*does not exist')],
)
def test_a_database_that_cannot_be_opened_says_why_at_once(
    url: str, paths: StudyPaths, change: tuple[str, str], said: str
) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match=said) as caught, lease(paths, url.replace(*change)):
        pass
    assert time.monotonic() - began < 5
    assert "p@ssword" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.row("C8")
def test_a_whole_search_and_its_password_in_no_file(
    url: str, toy: Load, paths: StudyPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(address.VARIABLE, url)
    spec = toy(
        search={"sampler": "random", "trials": 3},
        fixed={"epochs": 2},
        resources={"slots": 2},
        promotion={"k": 1, "seeds": 2},
    )
    stream = io.StringIO()
    rows = service.run(planning.make(spec, paths.folder), stream)
    assert len(rows) >= 2
    service.run(planning.make(spec, paths.folder), stream)
    assert "toy: complete, all its trials have ended" in stream.getvalue()
    seen = glance.at(paths)
    assert (seen.standing, seen.counts.total(), seen.holder) == ("complete", 3, None)
    monkeypatch.delenv(address.VARIABLE)
    with pytest.raises(StudyError, match="its record is in a database; name it by TUNE_STORAGE"):
        glance.at(paths)
    written = [file for file in paths.folder.rglob("*") if file.is_file()]
    assert paths.report in written and paths.spec in written and not paths.journal.exists()
    for text in (*(file.read_bytes() for file in written), stream.getvalue().encode(), caplog.text.encode()):
        assert b"canary" not in text


@pytest.mark.slow
@pytest.mark.row("C8")
def test_a_killed_search_goes_on_from_the_database(server: Server, url: str, tmp_path: Path) -> None:
    space = tmp_path / "toy.yaml"
    space.write_text(
        "workload: toy\nobjective: {metric: score, mode: max}\nparameters: {lr: {type: float, low: 0.001, high: 1.0}}\n"
        "fixed: {epochs: 4, epoch_s: 0.15}\nsearch: {sampler: random, trials: 14}\nresources: {slots: 2}\n"
        "stopping: {rule: none}\n"
    )
    environment = {**os.environ, address.VARIABLE: url}
    command = [sys.executable, "tune.py", "--space", str(space), "--runs", str(tmp_path / "runs")]
    paths = StudyPaths(tmp_path / "runs" / "toy")

    def committed() -> dict[str, int]:
        found = paths.folder.glob("trials/*/result.json")
        return {file.parent.name: file.stat().st_mtime_ns for file in found}

    before: dict[str, int] = {}
    for wanted in (2, 5):
        with (tmp_path / "log").open("ab") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(600):
                if len(committed()) >= wanted or driver.poll() is not None:
                    break
                time.sleep(0.1)
            assert driver.poll() is None, (tmp_path / "log").read_text()
            server.stop()  # both at once: the database comes back, the driver does not
        finally:
            driver.kill()
            driver.wait()
        server.start()
        assert before.items() <= committed().items()
        before = committed()
    last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert last.returncode == 0, last.stderr
    assert before.items() <= committed().items() and sorted(map(int, committed())) == list(range(14))
