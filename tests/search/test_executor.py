"""What the executor makes of the ways in which Ray says that a process is gone."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from search import executor, ray_tune
from search.drain import Leaving

LOW = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ActorDiedError(), "process"),
        (RayActorError(error_msg="The actor died because its node has died."), "node"),
        (RayActorError(error_msg=f"OutOfMemoryError: {LOW}"), "memory"),
        (RayTaskError("step", str(Leaving()), Leaving()), "machine"),
        (RayTaskError("step", "ValueError: no", ValueError("no")), "error"),
        (None, "error"),
    ],
)
def test_a_loss_has_one_word(error: Exception | None, word: str) -> None:
    assert executor._lost(error) == word


@pytest.mark.parametrize("error", [LOW, NodeDiedError("node a1 has died")])
@pytest.mark.row("F10")
def test_every_death_of_a_slot_is_one_that_ray_tune_understands(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception] = []
    monkeypatch.setattr(ray_tune, "_task_failed", lambda manager, task, exception: told.append(exception))
    manager = ray_tune.RayActorManager.__new__(ray_tune.RayActorManager)
    manager._actor_task_failed(tracked_actor_task=None, exception=error)  # type: ignore[arg-type]
    assert isinstance(told[0], RayActorError) and str(error) in str(told[0])
