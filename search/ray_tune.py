"""Ray Tune, set and mended for an executor that keeps its own records. Import it before a search is run.

Written against Ray 2.60: what begins with an underscore there may change with the next release.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000000")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

from ray.air._internal import usage
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import Callback
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback

_ended_by: dict[str, Exception | None] = {}


def ended_by(trial: Trial) -> Exception | None:
    """Return what a trial has just lost its process to; `Trial.get_error` looks where nothing is copied to."""
    return _ended_by.get(trial.trial_id)


def _any_death(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    """Take every way for a slot to die as one: of memory it is not a RayActorError, and Ray Tune would break off."""
    if not isinstance(exception, RayActorError | RayTaskError):
        exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
    _task_failed(manager, tracked_actor_task, exception)


def _remembering(trial: Trial, exc: Any = None) -> None:
    _ended_by.clear()  # whoever asks is called from here on, before the next
    _ended_by[trial.trial_id] = exc
    _handle_error(trial, exc)


def _forgetting(controller: Any) -> None:
    """Drop the trials that have ended: Ray Tune keeps them all, and looks through all of them at every step."""
    _step_ended(controller)
    trials, kept = controller._trials, {*controller._live_trials, *controller._trial_to_actor}
    ended = {trial for trial in trials if trial.is_finished()} - kept
    if ended:
        trials[:] = [trial for trial in trials if trial not in ended]
        for known in (controller._stopped_trials, controller._failed_trials, controller._trials_to_cache):
            known.difference_update(ended)


_task_failed, _handle_error = RayActorManager._actor_task_failed, Trial.handle_error
_step_ended: Any = TuneController.on_step_end
setattr(RayActorManager, _task_failed.__name__, _any_death)
setattr(Trial, _handle_error.__name__, _remembering)
setattr(TuneController, _step_ended.__name__, _forgetting)
# It would print what our own listener shows, and keep every trial to know which it has printed.
for _hook in ("on_trial_result", "on_trial_error", "on_trial_complete"):
    setattr(TrialProgressCallback, _hook, getattr(Callback, _hook))
# Every logger there is would be imported, MLflow and W&B too, to count those in use: seconds of each start.
usage.tag_callbacks = lambda callbacks: False
# These would be handed on as a runtime_env, which Ray writes to a log. Slots inherit them, or have their machine's own.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
