from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from search import progress
from search.progress import Progress, forecast
from search.record import TrialRecord
from search.spec import Objective, Resources, Search, SearchSpec

SPEC = SearchSpec(
    name="question",
    workload="toy",
    objectives=(Objective(metric="val_dice", mode="max"),),
    parameters=(),
    search=Search(trials=20),
    resources=Resources(slots=4),
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def ended(number: int, state: Any = "complete", value: float = 0.812, **changes: Any) -> TrialRecord:
    values = (value,) if state == "complete" else None
    known = {"params": {"lr": 0.01}, "epochs": {9: (value,)}, "slot_s": 31.4, **changes}
    return TrialRecord(number=number, state=state, values=values, **known)


def test_an_end_is_one_line_with_units() -> None:
    objective = SPEC.objectives[0]
    assert progress.line(ended(17), objective) == "trial 17 epoch 9 val_dice 0.812 31.4 s"
    stopped = ended(18, "stopped", reason="rung 9: 0.812 is below 0.9\nmore")
    assert progress.line(stopped, objective) == (
        "trial 18 epoch 9 val_dice 0.812 31.4 s stopped early: rung 9: 0.812 is below 0.9"
    )
    failed = TrialRecord(number=19, state="failed", params={}, reason="out of memory", slot_s=2.0)
    assert progress.line(failed, objective) == "trial 19 epoch 0 2.0 s failed: out of memory"


def test_without_a_terminal_only_ends_and_rare_summaries_are_said() -> None:
    stream = io.StringIO()
    shown = Progress(SPEC, stream, now=0.0)
    for number in range(3):
        shown.trial_started(number, {"lr": 0.1}, now=1.0)
        for epoch in range(1, 50):
            shown.trial_epoch(number, epoch, (epoch / 100,), {}, now=1.0 + epoch / 10)
    shown.trial_ended(ended(0), now=6.0)
    shown.trial_ended(ended(1, "stopped", 0.3), now=12.0)
    for second in range(13, 40):
        shown.tick(float(second))
    shown.close("leaderboard.csv written", now=41.0)
    assert stream.getvalue().splitlines() == [
        "trial 0 epoch 9 val_dice 0.812 31.4 s",
        "trial 1 epoch 9 val_dice 0.3 31.4 s stopped early",
        "question: 1 finished, 1 running, 1 stopped early of 20, best val_dice 0.812 (trial 0), 12 s so far,"
        " about 2 min 19 s to go",
        "question: 1 finished, 1 running, 1 stopped early of 20, best val_dice 0.812 (trial 0), 41 s so far,"
        " about 2 min 13 s to go",
        "leaderboard.csv written",
    ]


def test_table_shows_trials_states_and_the_values_in_which_they_differ() -> None:
    shown = Progress(SPEC, io.StringIO(), now=0.0)
    for number in range(3):
        shown.trial_started(number, {"lr": 10.0**-number, "epochs": 5}, now=0.0)
    shown.trial_epoch(2, 3, (0.25,), {}, now=1.0)
    shown.trial_epoch(2, 4, (0.125,), {}, now=2.0)
    shown.trial_ended(ended(0, params={"lr": 1.0, "epochs": 5}), now=3.0)
    text = drawn(shown, now=65.0)
    assert "epochs" not in text
    assert [line.split() for line in text.splitlines()[:4]] == [
        ["trial", "state", "epoch", "val_dice", "time", "lr"],
        ["0", "finished", "9", "0.812", "31", "s", "1"],
        ["1", "running", "0", "1", "min", "05", "s", "0.1"],
        ["2", "running", "4", "0.25", "1", "min", "05", "s", "0.01"],
    ]


def test_columns_that_do_not_fit_are_left_out_and_none_is_cut() -> None:
    shown = Progress(SPEC, io.StringIO(), now=0.0)
    for number in range(2):
        shown.trial_started(number, {"network.name": f"net{number}", "loss.dice": number, "x" * 80: number}, now=0.0)
    text = drawn(shown, now=5.0, width=80)
    assert text.splitlines()[0].split() == ["trial", "state", "epoch", "val_dice", "time", "name", "dice"]
    assert "…" not in text


def test_table_stays_small_however_many_trials_there_are() -> None:
    shown = Progress(SPEC, io.StringIO(), now=0.0)
    for number in range(200):
        shown.trial_started(number, {}, now=0.0)
        shown.trial_ended(ended(number), now=1.0)
    for number in range(200, 300):
        shown.trial_started(number, {}, now=0.0)
        if number < 206:
            assert len(drawn(shown, 2.0).splitlines()) == progress.SHOWN_TRIALS + 2
    assert len(drawn(shown, 2.0).splitlines()) == progress.SHOWN_TRIALS + 2


def test_a_resumed_study_counts_what_ended_before() -> None:
    records = [ended(0), ended(1, "failed"), TrialRecord(number=2, state="running", params={})]
    shown = Progress(SPEC, io.StringIO(), records, now=0.0)
    text = progress.summary(shown.state, 1.0)
    assert text.startswith("question: 1 finished, 1 failed of 20, best val_dice 0.812 (trial 0)")


def test_forecast_by_hand() -> None:
    assert forecast([], 2, [], 5) is None
    # 10 s each; two run and have 4 and 0 s left, six wait: 64 s of work on 2 slots.
    assert forecast([8, 12], 2, [6, 30], 6) == 32
    # One trial waits for many slots: it still takes its own time.
    assert forecast([10], 8, [], 1) == 10
    assert forecast([10], 8, [4], 0) == 6
    assert forecast([10], 2, [], 0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_terminal_is_redrawn_at_most_four_times_a_second() -> None:
    stream = Terminal()
    shown = Progress(SPEC, stream, now=0.0)
    shown.trial_started(0, {"lr": 0.1}, now=0.0)
    for event in range(5000):
        shown.trial_epoch(0, event, (0.5,), {}, now=event / 5000)
    redrawn = stream.getvalue().count("val_dice")
    shown.close(now=1.0)
    assert redrawn == 3
    assert "1 running of 20" in stream.getvalue()


def test_5000_events_a_second_cost_a_tenth_of_a_core() -> None:
    shown = Progress(SPEC, Terminal(), now=0.0)
    for number in range(16):
        shown.trial_started(number, {"lr": number / 7, "network.name": "unet"}, now=0.0)
    began = time.process_time()
    for event in range(5000):
        shown.trial_epoch(event % 16, event, (event / 5000,), {"val_dice": 0.5}, now=event / 5000)
    spent = time.process_time() - began
    shown.close(now=1.0)
    # Measured 0.02 s; a tenth is the promise, and the margin is for slow and busy machines.
    assert spent < 0.1


def drawn(shown: Progress, now: float, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(progress.table(shown.state, now, width))
    return stream.getvalue()
