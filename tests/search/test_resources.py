from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from search.errors import SpecError
from search.resources import Room, check_evaluation, is_gang, notes, resolved, slots
from search.spec import Evaluation, Resources, SearchSpec

HERE = Room(4.0, 1.0, "this machine")


def needs(**given: Any) -> Resources:
    return Resources(**{"gpus_per_worker": 0.0, **given})


def jobs(**given: Any) -> Evaluation:
    return Evaluation(**{"gpus": 0.0, **given})


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (needs(), 4),
        (needs(cpus_per_worker=1.5), 2),
        (needs(cpus_per_worker=0.1), 40),
        (needs(cpus_per_worker=4.0), 1),
        (needs(gpus_per_worker=0.5), 2),
        (needs(gpus_per_worker=0.1), 4),
        (needs(slots=3), 3),
        (needs(slots=2, cpus_per_worker=2.0, gpus_per_worker=0.5), 2),
    ],
)
def test_slots_by_hand(resources: Resources, expected: int) -> None:
    assert slots(resources, HERE) == expected


def test_thirds_of_a_gpu_fit_three_times() -> None:
    assert slots(needs(cpus_per_worker=0.1, gpus_per_worker=0.1), Room(1.0, 0.3, "here")) == 3


@pytest.mark.parametrize(
    ("resources", "arithmetic"),
    [
        (needs(slots=5), "5 slots x (1 CPU, 0 GPU) = 5 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU"),
        (needs(cpus_per_worker=8.0), "1 slots x (8 CPU, 0 GPU) = 8 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU"),
        (
            needs(slots=3, cpus_per_worker=0.5, gpus_per_worker=0.5),
            "3 slots x (0.5 CPU, 0.5 GPU) = 1.5 CPU, 1.5 GPU, but this machine has 4 CPU, 1 GPU",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(resources: Resources, arithmetic: str) -> None:
    with pytest.raises(SpecError) as caught:
        slots(resources, HERE)
    assert str(caught.value) == f"resources: {arithmetic}; lower resources.slots or what each slot gets"


def test_a_cluster_that_grows_is_asked_for_more_than_it_has() -> None:
    small = Room(0.0, 0.0, "the cluster at present", grows=True)
    assert slots(needs(slots=6, gpus_per_worker=1.0), small) == 6
    assert slots(needs(), small) == 1
    check_evaluation(jobs(cpus=99.0), small)


def test_an_evaluation_that_would_wait_for_ever_is_refused() -> None:
    check_evaluation(jobs(cpus=4.0, gpus=1.0), HERE)
    with pytest.raises(SpecError) as caught:
        check_evaluation(jobs(cpus=5.0), HERE)
    assert str(caught.value) == (
        "evaluation: one job takes 5 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU; "
        "lower evaluation.cpus or evaluation.gpus"
    )
    with pytest.raises(SpecError, match="one job takes 1 CPU, 2 GPU"):
        check_evaluation(jobs(gpus=2.0), HERE)


def test_jobs_are_for_clusters() -> None:
    check_evaluation(jobs(run_as="jobs"), dataclasses.replace(HERE, grows=True))
    with pytest.raises(SpecError, match="this machine takes no jobs; write tasks"):
        check_evaluation(jobs(run_as="jobs"), HERE)


@pytest.mark.parametrize(
    ("room", "gpus"),
    [
        (HERE, 1.0),
        (Room(4.0, 0.0, "this machine"), 0.0),
        (Room(0.0, 0.0, "the cluster at present", grows=True, most=(64.0, 8.0)), 1.0),
        (Room(0.0, 0.0, "the cluster at present", grows=True, most=(64.0, 0.0)), 0.0),
    ],
)
def test_auto_is_a_gpu_where_there_are_any(toy: Callable[..., SearchSpec], room: Room, gpus: float) -> None:
    spec = resolved(toy(), room)
    assert (spec.resources.gpus_per_worker, spec.evaluation.gpus) == (gpus, gpus)
    given = resolved(toy(resources={"gpus_per_worker": 0.5}, evaluation={"gpus": 0}), room)
    assert (given.resources.gpus_per_worker, given.evaluation.gpus) == (0.5, 0)


def test_a_cluster_that_may_have_gpus_later_is_asked_for_them_by_number(toy: Callable[..., SearchSpec]) -> None:
    unknown = Room(8.0, 0.0, "the cluster at present", grows=True, autoscales=True)
    slots_note, gpus_note = notes(toy(), unknown)
    assert slots_note.startswith("resources.slots: auto is what the cluster at present has room for")
    assert [gpus_note] == [
        "resources.gpus_per_worker: auto is none, since the cluster at present has no GPU and does not say what may "
        "come; write 1 to ask for them"
    ]
    assert notes(toy(resources={"gpus_per_worker": 1, "slots": 3}), unknown) == []
    fixed = dataclasses.replace(unknown, autoscales=False)
    for room in (HERE, fixed, Room(8.0, 0.0, "this machine"), dataclasses.replace(unknown, most=(8.0, 0.0))):
        assert notes(toy(), room) == []


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (needs(workers=2), 2),
        (needs(workers=3), 1),
        (needs(workers=4, cpus_per_worker=0.5), 2),
        (needs(workers=2, gpus_per_worker=0.25), 2),
        (needs(workers=1, strategy="deepspeed"), 4),
    ],
)
def test_gangs_by_hand(resources: Resources, expected: int) -> None:
    assert is_gang(resources)
    assert slots(resources, HERE) == expected


def test_a_worker_has_to_fit_on_one_machine_a_gang_on_several() -> None:
    three = Room(12.0, 6.0, "the cluster", nodes=((4.0, 2.0),) * 3)
    assert slots(needs(workers=2, cpus_per_worker=3.0), three) == 1
    assert slots(needs(workers=3, cpus_per_worker=3.0, gpus_per_worker=2.0), three) == 1
    with pytest.raises(SpecError, match="room for 0 workers of 2; lower"):
        slots(needs(workers=2, cpus_per_worker=5.0), three)


def test_more_workers_than_the_cluster_can_ever_give_are_refused() -> None:
    grows = Room(0.0, 0.0, "the cluster at present", grows=True, most=(32.0, 8.0))
    assert slots(needs(workers=4, cpus_per_worker=8.0, gpus_per_worker=1.0), grows) == 1
    assert slots(needs(workers=2, gpus_per_worker=1.0), grows) == 4
    with pytest.raises(SpecError) as caught:
        slots(needs(workers=16, gpus_per_worker=1.0), grows)
    assert str(caught.value) == (
        "resources: 1 slots x 16 workers x (1 CPU, 1 GPU) = 16 CPU, 16 GPU, but the cluster at its largest has "
        "32 CPU, 8 GPU, room for 8 workers of 16; lower resources.workers or what each worker gets"
    )
