"""Orders and answers between a gang and its ranks; the ranks are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from search import epochs
from search.errors import DiskError
from search.gang import crew as crews
from search.gang import rank
from search.gang.crew import Crew, GangError, Hung, RankDied, TrialError
from search.spec import Objective
from workloads import toy

Say = Callable[[int, dict[str, Any]], dict[str, Any] | None]


class Threads:
    """Stands for the group of workers: each rank a thread that answers as `say` has it."""

    say: Say = staticmethod(lambda number, order: {})
    error: BaseException | None = None
    up = True

    def __init__(self, function: Any, options: Mapping[str, Any], workers: int, *rest: Any) -> None:
        self.options, self.workers, self.generation, self.worked = options, workers, 0, 0
        self.orders: list[tuple[int, str]] = []
        self._start()

    def _start(self) -> None:
        self.generation += 1
        for number in range(self.workers):
            threading.Thread(target=self._run, args=(number, str(self.generation)), daemon=True).start()

    def _run(self, number: int, generation: str) -> None:
        with Client(tuple(self.options["address"]), authkey=bytes.fromhex(self.options["key"])) as connection:
            rank.send(connection, {"rank": number, "generation": generation, "node": "here"})
            try:
                self._answer(connection, number)
            except (EOFError, OSError):
                return

    def _answer(self, connection: Connection, number: int) -> None:
        while (order := rank.receive(connection))["do"] != "quit":
            self.orders.append((number, order["do"]))
            answer = self.say(number, order)
            if answer is None:
                return  # as one that dies
            if answer:
                rank.send(connection, {"did": order["do"], **answer})

    def is_up(self) -> bool:
        return self.up

    def works(self) -> None:
        self.worked += 1

    def ran_out_of_memory(self) -> bool:
        return False

    def kill(self) -> None:
        self._start()

    def join(self, timeout_s: float) -> None:
        pass


def answer(number: int, order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "begin" and number == 0:
        return {"resume": None, "config": {}}
    return {"epoch": 1, "number": number}


@pytest.fixture
def open_crew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Say], Crew]]:
    """Return a function that opens a crew of three ranks that answer in this way."""
    opened: list[Crew] = []

    def open_(say: Say) -> Crew:
        monkeypatch.setattr(crews, "TrainGroup", Threads)
        monkeypatch.setattr(Threads, "say", staticmethod(say))
        monkeypatch.setattr(crews, "GRACE_S", 0.3)
        opened.append(Crew(3, {"CPU": 1}, "127.0.0.1", tmp_path))
        return opened[-1]

    yield open_
    for crew in opened:
        crew.quit()
    assert list(tmp_path.iterdir()) == []


def told(reason: str, **more: Any) -> dict[str, Any]:
    return {"error": {"reason": reason, "trace": "", "unhealthy": False, "superseded": False, **more}}


def test_all_ranks_begin_and_step_together(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(answer)
    crew.begin({"number": 1})
    assert crew.step(60.0) == {"did": "step", "epoch": 1, "number": 0}
    crew.close_trial()
    orders: list[tuple[int, str]] = crew.group.orders  # type: ignore[attr-defined]
    assert orders[0] == (0, "begin")
    assert sorted(orders[1:3]) == [(1, "begin"), (2, "begin")]
    assert sorted(orders[3:6]) == [(number, "step") for number in range(3)]
    assert sorted(orders[6:]) == [(number, "close") for number in range(3)]


def test_a_rank_that_dies_makes_all_of_them_new(open_crew: Callable[[Say], Crew]) -> None:
    deaths = iter([True])
    crew = open_crew(
        lambda number, order: (
            None if (number, order["do"]) == (2, "step") and next(deaths, False) else answer(number, order)
        )
    )
    crew.begin({"number": 1})
    with pytest.raises(RankDied, match="rank 2 of 3 died"):
        crew.step(60.0)
    crew.begin({"number": 1})
    assert crew.step(60.0)["epoch"] == 1
    assert crew.group.generation == 2  # type: ignore[attr-defined]


def test_an_error_of_all_ranks_leaves_them_at_work(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(lambda number, order: told("too few") if order["do"] == "step" else answer(number, order))
    crew.begin({"number": 1})
    with pytest.raises(TrialError, match="too few"):
        crew.step(60.0)
    crew.close_trial()
    crew.begin({"number": 2})
    assert crew.group.generation == 1  # type: ignore[attr-defined]


def test_ranks_that_stand_still_after_the_error_of_one_are_replaced(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(
        lambda number, order: (
            answer(number, order) if order["do"] != "step" else told("this one only") if number == 1 else {}
        )
    )
    crew.begin({"number": 1})
    began = time.monotonic()
    with pytest.raises(TrialError, match="this one only"):
        crew.step(60.0)
    assert time.monotonic() - began < 5
    crew.begin({"number": 2})
    assert crew.group.generation == 2  # type: ignore[attr-defined]


def test_a_device_that_is_out_of_order_replaces_the_ranks(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(
        lambda number, order: told("CUDA", unhealthy=True) if order["do"] == "step" else {"config": {}, "resume": None}
    )
    crew.begin({"number": 1})
    with pytest.raises(TrialError):
        crew.step(60.0)
    crew.begin({"number": 2})
    assert crew.group.generation == 2  # type: ignore[attr-defined]


def test_ranks_that_do_not_answer_in_time_are_replaced(
    open_crew: Callable[[Say], Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "DUMP_S", 0.1)
    hangs = iter([True])
    crew = open_crew(
        lambda number, order: (
            {} if (number, order["do"]) == (1, "step") and next(hangs, False) else answer(number, order)
        )
    )
    crew.begin({"number": 1})
    with pytest.raises(Hung, match="no answer from rank 1 of 3"):
        crew.step(0.2)
    crew.begin({"number": 2})
    assert crew.step(60.0)["epoch"] == 1
    assert crew.group.generation == 2  # type: ignore[attr-defined]


def test_ranks_whose_machine_is_gone_are_given_up_once_new_ones_arrive(open_crew: Callable[[Say], Crew]) -> None:
    gone = iter([True])
    crew = open_crew(
        lambda number, order: (
            {} if (number, order["do"]) == (2, "step") and next(gone, False) else answer(number, order)
        )
    )
    crew.begin({"number": 1})
    threading.Timer(0.3, crew.group._start).start()  # as Ray Train does; the connection of rank 2 stays open
    with pytest.raises(RankDied, match="machine"):
        crew.step(60.0)
    crew.begin({"number": 1})
    assert crew.step(60.0)["epoch"] == 1


def test_a_full_disk_is_told_as_such(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(
        lambda number, order: {"halt": "no room"} if (number, order["do"]) == (0, "step") else answer(number, order)
    )
    crew.begin({"number": 1})
    with pytest.raises(DiskError, match="no room"):
        crew.step(60.0)


def test_a_group_that_does_not_come_up_is_an_error(
    open_crew: Callable[[Say], Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Threads, "_start", lambda self: None)
    monkeypatch.setattr(Threads, "up", False)
    monkeypatch.setattr(Threads, "error", RuntimeError("no such module"))
    with pytest.raises(GangError, match="3 workers do not come up: no such module"):
        open_crew(answer).begin({"number": 1})


def test_a_stranger_is_not_let_in(open_crew: Callable[[Say], Crew]) -> None:
    crew = open_crew(answer)
    with pytest.raises((AuthenticationError, OSError, EOFError)):
        Client(tuple(crew.group.options["address"]), authkey=b"guessed")  # type: ignore[attr-defined]
    crew.begin({"number": 1})
    assert crew.step(60.0)["epoch"] == 1


def test_ranks_keep_one_trial_together(
    open_crew: Callable[[Say], Crew], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ranks' code, in threads: rank 0 keeps the files, the others do their part of each checkpoint."""
    mine, saver = threading.local(), toy._saver
    monkeypatch.setattr(toy, "_saver", lambda *words: saver(*words) if mine.number == 0 else lambda folder: None)
    folder = tmp_path.parent / f"{tmp_path.name}-trial"
    folder.mkdir()
    order = {
        "number": 3,
        "workload": "toy",
        "config": {**toy.Config().__dict__, "epochs": 2},
        "objectives": [asdict(Objective(metric="score", mode="max"))],
        "folder": str(folder),
        "resources": {"hung_after_s": 60.0},
        "tensorboard": False,
    }

    def serve(self: Threads, connection: Connection, number: int) -> None:
        mine.number = number
        rank._serve(connection, number)

    Threads._answer, before = serve, Threads._answer  # type: ignore[method-assign]
    try:
        crew = open_crew(answer)
        crew.begin(order)
        first, last = crew.step(60.0), crew.step(60.0)
        crew.close_trial()
    finally:
        Threads._answer = before  # type: ignore[method-assign]
    assert (first["epoch"], first["outcome"]) == (1, None)
    assert (last["epoch"], last["outcome"]["state"]) == (2, "complete")
    assert [row.epoch for row in epochs.read(folder)] == [1, 2]
