from __future__ import annotations

import pytest

from search.errors import SpecError
from search.resources import Room, check_evaluation, slots
from search.spec import Evaluation, Resources

HERE = Room(4.0, 1.0, "this machine")


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (Resources(), 4),
        (Resources(cpus_per_worker=1.5), 2),
        (Resources(cpus_per_worker=0.1), 40),
        (Resources(cpus_per_worker=4.0), 1),
        (Resources(gpus_per_worker=0.5), 2),
        (Resources(gpus_per_worker=0.1), 4),
        (Resources(slots=3), 3),
        (Resources(slots=2, cpus_per_worker=2.0, gpus_per_worker=0.5), 2),
    ],
)
def test_slots_by_hand(resources: Resources, expected: int) -> None:
    assert slots(resources, HERE) == expected


def test_thirds_of_a_gpu_fit_three_times() -> None:
    assert slots(Resources(cpus_per_worker=0.1, gpus_per_worker=0.1), Room(1.0, 0.3, "here")) == 3


@pytest.mark.parametrize(
    ("resources", "arithmetic"),
    [
        (Resources(slots=5), "5 slots x (1 CPU, 0 GPU) = 5 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU"),
        (Resources(cpus_per_worker=8.0), "1 slots x (8 CPU, 0 GPU) = 8 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU"),
        (
            Resources(slots=3, cpus_per_worker=0.5, gpus_per_worker=0.5),
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
    assert slots(Resources(slots=6, gpus_per_worker=1.0), small) == 6
    assert slots(Resources(), small) == 1
    check_evaluation(Evaluation(cpus=99.0), small)


def test_an_evaluation_that_would_wait_for_ever_is_refused() -> None:
    check_evaluation(Evaluation(cpus=4.0, gpus=1.0), HERE)
    with pytest.raises(SpecError) as caught:
        check_evaluation(Evaluation(cpus=5.0), HERE)
    assert str(caught.value) == (
        "evaluation: one job takes 5 CPU, 0 GPU, but this machine has 4 CPU, 1 GPU; "
        "lower evaluation.cpus or evaluation.gpus"
    )
    with pytest.raises(SpecError, match="one job takes 1 CPU, 2 GPU"):
        check_evaluation(Evaluation(gpus=2.0), HERE)
