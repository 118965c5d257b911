"""Signals that ask the driver to end, and a second driver that is refused: the command as people type it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.command import check, end, tune_in
from tests.faults.table import Tell

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]

EARLY_S = 2.5
"""From the lease to a signal in the start of Ray."""
TRIALS = 30


@pytest.mark.row("F6")
def test_signals_end_the_driver_soon_and_lose_nothing(tell: Tell, tmp_path: Path) -> None:
    kept: dict[str, int] = {}
    slowest_s, lost, run_again, left = 0.0, 0, 0, 0
    moments = [(sent, early) for early in (True, False) for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with tune_in(tmp_path) as command:
        for sent, early in moments:
            process = command.start()
            if early:
                command.wait_for(process, lambda pid=process.pid: command.holder() == pid)  # type: ignore[misc]
                time.sleep(EARLY_S)
            else:
                goal = len(kept) + 2
                command.wait_for(process, lambda goal=goal: command.ended(goal))  # type: ignore[misc]
            children = psutil.Process(process.pid).children(recursive=True)
            began = time.monotonic()
            process.send_signal(sent)
            code, out, err = end(process)
            slowest_s = max(slowest_s, time.monotonic() - began)
            left += len(psutil.wait_procs(children, timeout=10)[1])
            assert (code, out) == (130, ""), f"{sent!r}: {err}"
            assert "tune.py: interrupted; nothing is lost, the same command goes on from here" in err
            assert "Traceback" not in err
            now = command.results()
            lost += len(kept.keys() - now.keys())
            run_again += sum(now.get(name, written) != written for name, written in kept.items())
            kept = now
        assert len(kept) < TRIALS
        code, _, err = end(command.start())
        assert code == 0, err
        now = command.results()
        run_again += sum(now[name] != written for name, written in kept.items())
        check(command, TRIALS)
    counts = {"lost": lost, "run_again": run_again, "processes_left": left}
    done = "each at the start of Ray and at work"
    tell("SIGTERM, SIGINT, SIGUSR1", done, signals=len(moments), slowest_exit_s=slowest_s, **counts)


@pytest.mark.row("F13")
def test_a_second_driver_is_refused_at_once(tell: Tell, tmp_path: Path) -> None:
    slowest_s = 0.0
    with tune_in(tmp_path) as command:
        first = command.start("--set", "fixed.epoch_s=1")
        command.wait_for(first, lambda: command.holder() == first.pid)
        for again in range(3):  # while Ray starts, while slots start, at work
            began = time.monotonic()
            code, out, err = end(command.start())
            slowest_s = max(slowest_s, time.monotonic() - began)
            assert (code, out) == (2, "")
            assert "another search holds this study" in err and f'"pid": {first.pid}' in err and "--study NAME" in err
            assert "Traceback" not in err
            if again == 1:
                command.wait_for(first, lambda: command.ended(1))
        first.send_signal(signal.SIGTERM)
        assert end(first)[0] == 130
    tell("two drivers", "3 more", refused=3, slowest_s=slowest_s)
