"""Shares of a cluster: worked by hand, as laws over drawn cases, and as an actor that several searches ask."""

from __future__ import annotations

import dataclasses
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import executor, queues
from search.errors import SpecError
from search.queues import Alone, Broker, Claim, Turn, allot
from search.record import TrialRecord
from search.resources import Room
from search.spec import Resources
from tests.search.conftest import Load, Open

EIGHT = Room(8.0, 0.0, "here")


def claim(study: str, wanted: int, queue: str = "default", since: float = 0.0, **size: float) -> Claim:
    return Claim(study=study, queue=queue, wanted=wanted, since=since, **{"cpus": 1.0, "gpus": 0.0, **size})


def test_shares_by_hand() -> None:
    both = [claim("a", 8, "vision"), claim("b", 8)]
    assert allot(both, {"vision": 3.0, "default": 1.0}, EIGHT) == {"a": 6, "b": 2}
    assert allot(both, {}, EIGHT) == {"a": 4, "b": 4}, "without shares all queues are equal"
    # What one does not want flows to the other.
    assert allot([claim("a", 1, "vision"), claim("b", 8)], {"vision": 3.0}, EIGHT) == {"a": 1, "b": 7}
    # A queue's part does not grow with its searches: two in vision share what one would have.
    three = [claim("a", 8, "vision"), claim("b", 8, "vision"), claim("c", 8)]
    assert allot(three, {}, EIGHT) == {"a": 2, "b": 2, "c": 4}
    # What a search of a queue does not want goes to the queue's others first.
    assert allot([claim("a", 1, "v"), claim("b", 8, "v"), claim("c", 8)], {}, EIGHT) == {"a": 1, "b": 3, "c": 4}


def test_each_has_one_before_any_has_two_and_who_came_first_is_served_first() -> None:
    many = [claim(name, 8, since=float(index)) for index, name in enumerate("dcba")]
    assert allot(many, {}, Room(3.0, 0.0, "here")) == {"d": 1, "c": 1, "b": 1, "a": 0}
    heavy = [claim("late", 8, "vision", since=2.0), claim("early", 8, since=1.0)]
    assert allot(heavy, {"vision": 100.0}, EIGHT) == {"late": 7, "early": 1}


def test_gpus_and_gangs_count_by_the_part_of_the_cluster_that_they_take() -> None:
    # 16 CPU, 4 GPU: a slot of `g` is a quarter of the GPUs, one of `c` an eighth of the CPUs.
    room = Room(16.0, 4.0, "here")
    claims = [claim("g", 8, "g", gpus=1.0), claim("c", 8, "c", cpus=2.0)]
    # All CPUs are gone then: 4 for the slots with GPUs, 12 for the others.
    assert allot(claims, {}, room) == {"g": 4, "c": 6}
    # Machines that may come count: the search asks for them by its trials.
    assert allot([claim("a", 99)], {}, dataclasses.replace(EIGHT, most=(20.0, 0.0))) == {"a": 20}
    # A slot that finds no room is passed over for one that does.
    assert allot([claim("big", 3, cpus=6.0), claim("small", 9)], {}, EIGHT) == {"big": 1, "small": 2}


CLAIMS = st.lists(
    st.builds(
        Claim,
        study=st.text("abcdef", min_size=1, max_size=3),
        queue=st.sampled_from(["default", "vision", "teaching"]),
        wanted=st.integers(0, 12),
        cpus=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        gpus=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
        since=st.sampled_from([0.0, 1.0, 2.0]),
    ),
    max_size=6,
    unique_by=lambda made: made.study,
)
SHARES = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0]) for name in ("default", "vision", "teaching")})
ROOMS = st.builds(Room, st.integers(0, 24).map(float), st.integers(0, 6).map(float), st.just("here"))


@settings(max_examples=150, deadline=None)
@given(claims=CLAIMS, shares=SHARES, room=ROOMS, order=st.randoms(use_true_random=False))
@pytest.mark.row("C11")
def test_laws(claims: list[Claim], shares: dict[str, float], room: Room, order: object) -> None:
    has = allot(claims, shares, room)
    cpus = room.cpus - sum(has[one.study] * one.cpus for one in claims)
    gpus = room.gpus - sum(has[one.study] * one.gpus for one in claims)
    assert cpus >= -1e-6 and gpus >= -1e-6, "never above the cluster"
    assert all(0 <= has[one.study] <= one.wanted for one in claims), "never above what is wanted"
    hungry = [one for one in claims if has[one.study] < one.wanted]
    assert not [one for one in hungry if one.cpus <= cpus and one.gpus <= gpus], "nothing is left that somebody wants"
    shuffled = list(claims)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert allot(shuffled, shares, room) == has, "the order in which they ask means nothing"
    if sum(one.cpus for one in claims) <= room.cpus and sum(one.gpus for one in claims) <= room.gpus:
        assert all(has[one.study] for one in claims if one.wanted), "each has one where there is room"
    if len({(one.cpus, one.gpus) for one in claims}) == 1:  # all slots alike: fair to within one slot
        slots = {queue: sum(has[one.study] for one in claims if one.queue == queue) for queue in shares}
        for poor in hungry:
            for rich in claims:
                if has[rich.study] > 1 and rich.queue != poor.queue and has[poor.study]:
                    assert (slots[rich.queue] - 1) / shares[rich.queue] <= slots[poor.queue] / shares[poor.queue] + 1e-9
                if has[rich.study] > 1 and rich.queue == poor.queue:
                    assert has[rich.study] - 1 <= has[poor.study]


def test_the_owner_s_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "queues.yaml"
    path.write_text("vision: 3\nteaching: 0.5\n")
    assert queues.read_shares(path) == {"default": 1.0, "vision": 3.0, "teaching": 0.5}
    for text, message in (
        ("vision: 0\n", "vision: got 0; expected a share, a number above 0"),
        ("vision: high\n", "vision: got 'high'; expected a share"),
        ("vision: true\n", "vision: got True; expected a share"),
        ("- vision\n", "got list; expected a line for each queue"),
        ("a: [", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"queues\.yaml: ") as caught:
            queues.read_shares(path)
        assert message in str(caught.value)


def test_the_broker_shares_forgets_and_follows_the_owner_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = tmp_path / "queues.yaml"
    shares.write_text("vision: 3\n")
    monkeypatch.setattr(Broker, "_room", lambda broker: EIGHT)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    broker = Broker(str(shares))

    def ask(study: str, wanted: int, queue: str = "default") -> dict[str, object]:
        return broker.ask(dataclasses.asdict(claim(study, wanted, queue)))

    assert ask("a", 8) == {"slots": 8, "searches": 1}
    assert ask("b", 8, "vision") == {"slots": 6, "searches": 2}
    assert ask("a", 8) == {"slots": 2, "searches": 2}
    assert ask("c", 8, "vison") == {
        "error": "resources.queue: no queue 'vison' on this cluster; known: default, vision"
    }
    shares.write_text("vision: 1\n")
    os.utime(shares, ns=(1, 1))
    assert ask("a", 8) == {"slots": 4, "searches": 2}
    # A driver that was killed says nothing more, and is forgotten; one that leaves is forgotten at once.
    now += queues.FORGET_S - 1
    assert ask("a", 8) == {"slots": 4, "searches": 2}
    now += 2
    assert ask("a", 8) == {"slots": 8, "searches": 1}
    assert broker.leave("nobody") is False
    assert broker.leave("a") is True


def test_a_search_on_its_own_ray_has_all_slots_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with queues.turn(Path("runs/a/trials"), Resources(), 5, io.StringIO()) as turn:
        assert isinstance(turn, Alone) and turn.slots == 5
        turn.tick(lambda: pytest.fail("nobody asks"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.row("C11")
def test_searches_of_one_cluster_ask_one_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "BEAT_S", 0.05)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    said = io.StringIO()
    one = Resources(gpus_per_worker=0.0)

    def wait_for(turn: Alone | Turn, slots: int, wanted: int = 2) -> None:
        until = time.monotonic() + 20
        while turn.slots != slots:
            assert time.monotonic() < until, f"{turn.slots} slots"
            turn.tick(lambda: wanted)
            time.sleep(0.02)

    with queues.turn(Path("/runs/first"), one, 2, said) as first:
        assert first.slots == 2
        with queues.turn(Path("/runs/second"), one, 2, said) as second:
            assert second.slots == 1
            wait_for(first, 1)
            wait_for(second, 1, wanted=0)  # it has still to see its last trial end
        wait_for(first, 2)
    lines = said.getvalue().splitlines()
    assert lines[0] == lines[1] == "1 of 2 slots, queue default, 1 other searches here"
    assert lines[-1] == "2 of 2 slots, queue default, 0 other searches here"
    import ray

    until = time.monotonic() + 10
    while any(actor["name"] == queues.ACTOR for actor in ray.util.list_named_actors(all_namespaces=True)):
        assert time.monotonic() < until, "the last one out ends the actor"
        time.sleep(0.05)


class Watcher:
    """The executor's listener; notes the processors that are free while one long trial runs."""

    def __init__(self) -> None:
        self.placed: set[int] = set()
        self.ended: set[int] = set()
        self.free: list[float] = []

    def trial_started(self, number: int, params: dict[str, Any]) -> None:
        pass

    def trial_placed(self, number: int) -> None:
        self.placed.add(number)

    def trial_retried(self, number: int, reason: str) -> None:
        pass

    def trial_epoch(self, number: int, epoch: int, values: tuple[float, ...], metrics: dict[str, float]) -> None:
        pass

    def trial_ended(self, record: TrialRecord) -> None:
        self.ended.add(record.number)

    def tick(self) -> None:
        import ray

        if self.ended == {0}:
            self.free.append(ray.available_resources().get("CPU", 0.0))

    def allowed(self) -> int:
        return 1 if len(self.placed) >= 2 else 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_slot_that_is_to_be_others_is_given_back_while_a_long_trial_runs(toy: Load, open_study: Open) -> None:
    spec = toy(
        parameters={"epochs": {"choices": [2, 60]}},
        fixed={"epoch_s": 0.05},
        search={"sampler": "random", "trials": 3},
        stopping={"rule": "none"},
        resources={"slots": 2, "gpus_per_worker": 0},
    )
    study, watcher = open_study(spec), Watcher()
    for number, epochs in enumerate((2, 60, 2)):
        study.enqueue({"epochs": epochs}, f"trial {number}")
    executor.run(study, 2, watcher, allowed=watcher.allowed)
    assert watcher.ended == {0, 1, 2}, "no work is lost"
    assert max(watcher.free) >= 1, "the second slot was free while trial 1 went on"
