"""The record of a study in PostgreSQL: Optuna's tables, written over the one connection that holds the study.

For clusters, where the next driver may start on another machine, and for many studies in one place. Every connection
takes the study's lock before it writes a word, and the lock goes with the connection: a driver that lost it, or that
outlived its machine's network, cannot write any more.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

import durable
from search.errors import StoreError, held
from search.record import StudyPaths
from search.storage import address, holder
from search.storage.holder import Holder
from search.storage.store import SETTLE_S

PATIENCE_S = 60.0
"""How long a database that went away is waited for."""
CONNECT_S = 5
LEASE_S = 2.0
"""How long a study that is held is asked for: a killed driver's connection takes a moment to go."""
PAUSE_S = 0.2
BREAKS = 5
"""How often one question is put again because its connection broke."""
TABLES_LOCK = 0x7365_6172_6368
"""Advisory lock under which Optuna's tables are made: two that make them at once get in each other's way."""
KEEPALIVE = {"idle": 10, "interval": 5, "count": 3}
"""Seconds of silence, between the questions after it, and how many of them: then a machine counts as gone."""


class Server:
    """A database, and connections to it.

    Args:
        url: of the database, from `address.resolve`.
        identity: of the study's folder.
    """

    def __init__(self, url: str, identity: str) -> None:
        self.where, self.identity = address.shown(url), identity
        self._lock = int.from_bytes(hashlib.sha256(f"study {identity}".encode()).digest()[:8], "big", signed=True)
        self._url = make_url(url)
        if importlib.util.find_spec("psycopg") is None:
            raise StoreError(f'{self.where}: needs psycopg; pip install "segmentation-search[cluster]"')
        self._me = f"tune {socket.gethostname()[:32]} pid {os.getpid()}"

    def study_name(self, name: str) -> str:
        """Return what a study is called here: no other folder's study of the same name is ever taken for it."""
        return f"{name} [{self.identity}]"

    def _connected(self, more: str = "") -> Any:
        import psycopg

        _, options = self._url.get_dialect()().create_connect_args(self._url)
        given = {"connect_timeout": CONNECT_S, **{f"keepalives_{name}": value for name, value in KEEPALIVE.items()}}
        server = " ".join(f"-c tcp_keepalives_{name}={value}" for name, value in KEEPALIVE.items())
        options["options"] = f"{options.get('options', '')} {server} {more}".strip()
        return psycopg.connect(**{**given, **options, "application_name": self._me})

    @contextmanager
    def _minding_errors(self) -> Iterator[None]:
        import psycopg

        try:
            yield
        except RuntimeError as error:  # of Optuna, about its tables
            raise StoreError(f"{self.where}: {error}") from error
        except psycopg.Error as error:
            raise StoreError(f"{self.where}: cannot be used: {self._said(error)}") from error
        except (exc.SQLAlchemyError, StorageInternalError) as error:
            cause = getattr(error, "orig", None) or error.__cause__ or error
            raise StoreError(f"{self.where}: cannot be used: {self._said(cause)}") from error

    def _holder(self, connection: Any) -> tuple[str, str | None, str] | None:
        """Return who has the study's lock: the name of a connection, the host that it is from, since when."""
        found: tuple[str, str | None, str] | None = connection.execute(
            "select a.application_name, host(a.client_addr), to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') "
            "from pg_locks l join pg_stat_activity a using (pid) where l.locktype = 'advisory' and l.granted "
            "and l.database = (select oid from pg_database where datname = current_database()) "
            "and l.objsubid = 1 and l.classid::bigint = %s and l.objid::bigint = %s",
            (self._lock >> 32 & 0xFFFF_FFFF, self._lock & 0xFFFF_FFFF),
        ).fetchone()
        return found

    def _said(self, error: BaseException) -> str:
        text = " ".join(str(error).split())
        return text.replace(str(self._url.password), "***") if self._url.password else text


class View(Server):
    """A database as anyone may look at it: nothing is held, and nothing can be written."""

    def __init__(self, url: str, identity: str) -> None:
        super().__init__(url, identity)
        with self._minding_errors():
            self.storage = RDBStorage(
                _URL,
                engine_kwargs={"creator": self._looking, "poolclass": NullPool},
                skip_compatibility_check=True,
                skip_table_creation=True,
            )

    def holder(self) -> Holder | None:
        """Return which driver holds the study."""
        with self._minding_errors(), self._looking() as connection:
            name, _, since = self._holder(connection) or ("", None, "")
        found = re.fullmatch(r"tune (\S+) pid (\d+)", name)
        return holder.named(found[1], int(found[2]), since) if found else None

    def _looking(self) -> Any:
        return self._connected("-c default_transaction_read_only=on")


class Database(Server):
    """A database that holds one study for this process."""

    def __init__(self, url: str, identity: str) -> None:
        super().__init__(url, identity)
        self.connections, self._open = 0, False
        with self._minding_errors():
            self._make_tables()
            self.storage = _Storage(self)
        self._open = True

    def knows(self, name: str) -> bool:
        """Return whether there is such a study."""
        try:
            self.storage.get_study_id_from_name(self.study_name(name))
        except KeyError:
            return False
        return True

    def close(self) -> None:
        """Let go of the study."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def connect(self) -> Any:
        """Return a connection that holds the study; waits for a database that has been there before.

        Raises:
            StudyError: if another driver holds the study, saying who.
            StoreError: if the database cannot be reached.
        """
        import psycopg

        until = time.monotonic() + (PATIENCE_S if self._open else 0)
        while True:
            try:
                return self._held(self._connected())
            except psycopg.OperationalError as error:
                if time.monotonic() > until:
                    waited = f" for {PATIENCE_S:g} s" if self._open else ""
                    raise StoreError(f"{self.where}: not to be reached{waited}: {self._said(error)}{_GO_ON}") from error
            time.sleep(PAUSE_S)

    def _held(self, connection: Any) -> Any:
        """Take the study's lock; it goes with the connection."""
        until = time.monotonic() + (PATIENCE_S if self._open else LEASE_S)
        while not connection.execute("select pg_try_advisory_lock(%s)", (self._lock,)).fetchone()[0]:
            name, host, since = self._holder(connection) or ("just gone", None, "")
            other = f"{name}{f' from {host}' if host else ''}{f' since {since}' if since else ''}"
            # Of our own, broken, the server may not have learned yet.
            if time.monotonic() > until or (self._open and not other.startswith(self._me)):
                connection.close()
                if self._open:
                    taken = "it took over while the connection was lost; nothing is lost"
                    raise StoreError(f"{self.where}: another search holds this study ({other}); {taken}")
                raise held(self.where, other)
            connection.rollback()
            time.sleep(PAUSE_S)
        connection.commit()
        self.connections += 1
        return connection

    def _make_tables(self) -> None:
        """Make Optuna's tables where there are none, one process at a time; refuse those of another version."""
        with self._connected() as connection:
            connection.execute(f"set lock_timeout = '{CONNECT_S}s'")
            connection.execute("select pg_advisory_xact_lock(%s)", (TABLES_LOCK,))
            # Optuna wants two connections for it, so that it is no work for the one that holds the study.
            RDBStorage(_URL, engine_kwargs={"creator": self._connected, "poolclass": NullPool}).engine.dispose()


class _Storage(RDBStorage):
    """Optuna's storage, which puts a question again when its connection broke: only this process writes the study."""

    def __init__(self, database: Database) -> None:
        self._database = database
        super().__init__(
            _URL,
            # One connection, so that none writes that does not hold the study.
            engine_kwargs={
                "creator": database.connect,
                "pool_size": 1,
                "max_overflow": 0,
                "pool_timeout": 2 * PATIENCE_S,
                "pool_pre_ping": True,
            },
            skip_compatibility_check=True,  # done already, and it wants two connections
        )

    def create_new_study(self, directions: Sequence[Any], study_name: str | None = None) -> int:
        """As Optuna's; a study that was made as the connection broke is no duplicate."""
        made = self._database.connections
        try:
            made_id: int = _patiently(self, super().create_new_study, directions, study_name)
            return made_id
        except optuna.exceptions.DuplicatedStudyError:
            if study_name is None or self._database.connections == made:
                raise
            return self.get_study_id_from_name(study_name)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        """As Optuna's; one that was made twice because the first answer was lost is refused once."""
        made = self._database.connections
        trial: FrozenTrial = _patiently(self, super()._create_new_trial, study_id, template_trial)
        if self._database.connections != made:
            for other in self._get_trials(study_id, (trial.state,), set(), -1):
                alike = not other.params and other.user_attrs == trial.user_attrs
                if alike and other.number != trial.number:
                    self.set_trial_user_attr(other._trial_id, "refused", "the connection broke while it was made")
                    self.set_trial_state_values(other._trial_id, TrialState.PRUNED)
        return trial

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a change that was made as the connection broke is no other's."""
        made = self._database.connections
        try:
            changed: bool = _patiently(self, super().set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            if self._database.connections == made:
                raise
            changed = False
        return changed or (self._database.connections != made and self.get_trial(trial_id).state == state)


def _patiently(storage: _Storage, method: Any, *arguments: Any, **options: Any) -> Any:
    for _ in range(BREAKS):
        try:
            return method(*arguments, **options)
        except StorageInternalError as error:
            if not _is_break(error):
                raise
            broken = error
    where = storage._database.where
    raise StoreError(f"{where}: the connection broke {BREAKS} times in a row{_GO_ON}") from broken


def _patient(name: str) -> Any:
    def method(self: _Storage, *arguments: Any, **options: Any) -> Any:
        return _patiently(self, getattr(super(_Storage, self), name), *arguments, **options)

    method.__name__ = name
    return method


for _name in (
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_study_system_attr",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_intermediate_value",
    "_set_trial_param",
    "_get_trials",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
):
    setattr(_Storage, _name, _patient(_name))


def identity(paths: StudyPaths) -> str:
    """Return what tells a study's folder from all others, written when it is first asked for."""
    if durable.commit(paths.identity, {"id": uuid.uuid4().hex[:16]}) and paths.store:
        paths.store.push(paths.identity)
        time.sleep(SETTLE_S)
        durable.write(paths.identity, paths.store.read(paths.identity) or b"")
    found: str = durable.read_json(paths.identity)["id"]
    return found


def _is_break(error: BaseException | None) -> bool:
    """Return whether the connection was lost, and not the question wrong."""
    while error is not None:
        if isinstance(error, exc.OperationalError | exc.InterfaceError | exc.PendingRollbackError):
            return True
        error = error.__cause__ or error.__context__
    return False


_URL = "postgresql+psycopg://"
"""The dialect; connections are ours."""
_GO_ON = "; when it is back, run the same command: it goes on from here"
