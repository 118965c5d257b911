"""The table itself: in the default run, since a table that cannot say NO is worth nothing."""

from __future__ import annotations

import pytest

from tests.faults.table import BARS, Table


def line(table: Table, fault: str) -> str:
    return next(line for line in table.lines() if line.startswith(fault))


def test_counts_add_up_and_seconds_are_the_longest() -> None:
    table = Table()
    table.tell("two drivers", "once", refused=1, slowest_s=2.0)
    table.tell("two drivers", "again", refused=1, slowest_s=1.0)
    assert table.counts["two drivers"] == {"refused": 2, "slowest_s": 2.0}
    assert "once, again" in line(table, "two drivers") and line(table, "two drivers").endswith("too few")
    assert not table.holds()
    table.tell("two drivers", "more", refused=1, slowest_s=5.0)
    assert line(table, "two drivers").endswith("yes") and table.holds()
    assert line(table, "late commit").endswith("not run")


def test_what_several_processes_were_told_is_one_table() -> None:
    one, other = Table(), Table()
    one.tell("two drivers", "here", refused=2, slowest_s=2.0)
    other.tell("two drivers", "there", refused=1, slowest_s=3.0)
    one.add(other.plain())
    assert one.counts == {"two drivers": {"refused": 3, "slowest_s": 3.0}}
    assert "here, there" in line(one, "two drivers") and line(one, "two drivers").endswith("yes")
    assert line(one, "late commit").endswith("not run")


def test_what_is_worse_than_its_bar_fails_and_stays_in_the_table() -> None:
    table = Table()
    table.tell("driver killed", "seed 0", kills=30, finished=120, lost=0)
    with pytest.raises(AssertionError, match=r"driver killed, seed 1: \{'lost': 1\}; the bar is kills >= 30"):
        table.tell("driver killed", "seed 1", kills=10, finished=39, lost=1)
    assert line(table, "driver killed").endswith("NO") and not table.holds()
    assert table.plain()["driver killed"]["counted"] == {"kills": 40, "finished": 159, "lost": 1}


def test_a_fault_without_a_bar_is_refused() -> None:
    with pytest.raises(KeyError):
        Table().tell("flood", "once", lost=0)
    assert all(bar.at_least for bar in BARS.values()), "a row that nothing has to be counted for holds by itself"
