"""Each benchmark explains itself, and gives in a tiny setting what the README's table is made of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks import __main__ as command
from benchmarks import (
    _results,
    _searches,
    _training,
    big_study,
    evaluation,
    inheritance,
    kills,
    pruning,
    scaling,
    tiles,
    trial_start,
)
from search.record import StudyPaths, TrialRecord

KEYS = {
    "trial_start": {"first_step_s", "stock_first_step_s", "stock_over_ours"},
    "bookkeeping": {"slot_s_per_trial_random", "slot_s_per_trial_tpe"},
    "logging": {"on_over_off"},
    "quickstart": {"wall_s", "trials", "test_mean_iou", "search_over_stock"},
    "kills": {"kills", "lost", "finished_twice", "repeated"},
    "big_study": {"trials", "driver_peak_gib", "start_s"},
    "scaling": {f"{kind}_{n}_{what}" for kind in ("strong", "weak") for n in (1, 2) for what in ("s", "efficiency")},
    "strategies": {"ddp_vs_single_loss", "deepspeed_vs_ddp_loss", "reload_logits", "counts_difference"},
    "gang_start": {"ddp_first_step_s", "deepspeed_first_step_s", "stock_first_step_s", "stock_over_ours"},
    "gang_stop": {"reusable_p95_s", "left_over"},
    "gang_wall": {"ours_over_stock"},
    "gang_memory": {"control_mib_per_trial", "growth_after_50"},
    "pruning": {
        "equivalence_max_abs",
        "cases",
        "unet64_params",
        "pruned_params",
        "unet64_macs",
        "pruned_macs",
    },
    "inheritance": {"time_ratio_to_scratch"},
    "soak": {"finished", "lost", "run_again", "driver_growth", "slot_growth"},
    "latency": {"latency_ratio", "macs_ratio"},
    "int8": {"size_ratio", "dice_loss"},
    "evaluation": {"threshold_error", "auprc_error", "memory_growth_mib"},
    "loader": {"cached_over_decoding"},
    "tiles": {"round_trip_errors", "preprocess_over_read", "peak_gib"},
}
NAMES = benchmarks.names()


@pytest.mark.parametrize("name", NAMES)
def test_each_says_in_one_line_what_it_measures(name: str) -> None:
    assert 20 < len(benchmarks.summary(name)) <= 120


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_each_measures_in_a_tiny_setting(name: str, ray_cluster: None) -> None:
    module = benchmarks.load(name)
    result = json.loads(json.dumps(module.measure(**module.TINY)))
    assert KEYS.get(name, set()) <= result.keys()
    assert all(value >= 0 for value in result.values() if isinstance(value, int | float))
    assert all(len(row) == 3 and all(row) for row in module.figures(result))


def test_none_of_the_promised_is_missing() -> None:
    assert KEYS.keys() <= set(NAMES)


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    assert all(benchmarks.summary(line.split()[0]) in line for line in listed)


def test_an_unknown_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kill"]) == 2
    told = capsys.readouterr()
    assert "no benchmark 'kill'; did you mean 'kills'?" in told.err
    assert told.out == ""


def test_the_last_line_is_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(kills, "measure", lambda: {"kills": 30, "lost": 0, "finished_twice": 0, "repeated": 0})
    monkeypatch.setattr(_results, "FOLDER", tmp_path)
    assert command.main(["kills"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kills"] == 30
    assert list(tmp_path.iterdir()) == [], "only --write keeps results"


def test_the_readme_shows_what_is_kept() -> None:
    text = _results.README.read_text(encoding="utf-8")
    assert text == _results.with_table(text, _results.stored()), "run python -m benchmarks --write"


def test_write_keeps_the_result_and_renews_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures: so and so -->\nold\n<!-- /figures -->\nafter\n")
    monkeypatch.setattr(_results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(_results, "README", readme)
    monkeypatch.setattr(kills, "measure", lambda: {"kills": 30, "lost": 1, "finished_twice": 2, "repeated": 3})

    assert command.main(["kills", "--write"]) == 0

    text, kept = readme.read_text(), json.loads((tmp_path / "results" / "kills.json").read_text())
    assert "| trials after 30 kills with SIGKILL | 1 lost, 2 run twice, 3 repeated | aim: 0 of each | `" in text
    assert f"Measured {kept['date']} on {kept['machine']['cores']} cores" in text
    assert text.startswith("before\n<!-- figures: so and so -->\n") and text.endswith("<!-- /figures -->\nafter\n")
    assert "old" not in text


def test_gaps_lie_between_a_trials_last_and_the_next_ones_first_step() -> None:
    assert trial_start.gaps([(10.0, 11.0), (1.0, 3.0), (3.5, 9.0)]) == [0.5, 1.0]


def test_the_span_is_from_the_first_start_to_the_last_end() -> None:
    from datetime import datetime

    def record(number: int, start: int, end: int) -> TrialRecord:
        moments = {"started": datetime(2026, 1, 1, 0, 0, start), "finished": datetime(2026, 1, 1, 0, 0, end)}
        return TrialRecord(number=number, state="complete", params={}, **moments)

    assert _searches.span_s([record(0, 10, 30), record(1, 5, 20)]) == 25


def test_lost_repeated_and_twice_finished_trials_are_counted() -> None:
    def record(number: int, lr: float, state: Any = "complete") -> TrialRecord:
        return TrialRecord(number=number, state=state, params={"lr": lr})

    was = {0: ("a", 1, 9), 1: ("b", 2, 9), 2: ("c", 3, 9), 3: ("d", 4, 9)}
    now = {0: ("a", 1, 9), 1: ("b", 7, 9), 3: ("d", 4, 18)}
    records = [record(0, 0.1), record(1, 0.2), record(3, 0.1), record(4, 0.3, "running")]

    found = kills.count(kills.Seen(finished=was), now, records)

    # Trial 2 has gone, 1 was written again, 3 trained again, 0 and 3 are the same.
    assert found == {"finished": 3, "lost": 1, "finished_twice": 1, "run_again": 1, "repeated": 1}


def test_a_sound_search_counts_nothing() -> None:
    finished = {0: ("a", 1, 9), 1: ("b", 2, 9)}
    records = [TrialRecord(number=n, state="stopped", params={"lr": n}) for n in range(2)]
    found = kills.count(kills.Seen(finished=finished), dict(finished), records)
    assert found == {"finished": 2, "lost": 0, "finished_twice": 0, "run_again": 0, "repeated": 0}


def test_a_kill_hits_a_trial_only_if_this_driver_has_begun_it(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path)
    for number, begun, ended in ((0, 100, True), (1, 200, False), (2, 300, True)):
        paths.trial(number).mkdir(parents=True)
        attempt = paths.trial(number) / "attempt-1"
        attempt.touch()
        os.utime(attempt, (begun, begun))
        if ended:
            (paths.trial(number) / "result.json").touch()
    assert kills.running(paths, since=150)
    assert not kills.running(paths, since=250)


def test_a_filled_study_holds_finished_and_stopped_trials(tmp_path: Path) -> None:
    from search import spec_file
    from search.study import Study

    spec = spec_file.load(str(_searches.write_space(tmp_path / "s.yaml", {**_searches.TOY, "fixed": {"epochs": 9}})))
    paths = StudyPaths(tmp_path / "study")
    big_study.fill(paths, spec, 7)
    records = Study(paths, spec).records()
    assert [record.state for record in records].count("stopped") == 2
    assert [len(record.epochs) for record in records] == [9, 9, 3, 9, 9, 3, 9]
    assert len({tuple(record.params.values()) for record in records}) == 7


def test_the_training_workload_learns_and_notes_when_it_stepped(tmp_path: Path) -> None:
    config = _training.Config(epochs=5, lr=0.3)
    found = list(_training.train(config))
    assert found[-1].metrics["loss"] < found[0].metrics["loss"]
    assert found[0].metrics.keys() == _training.metrics(config).keys()
    assert len({epoch.metrics["first_step"] for epoch in found}) == 1
    assert found[0].metrics["first_step"] <= found[0].metrics["last_step"] < found[-1].metrics["last_step"]
    found[-1].save(tmp_path)
    scored = _training.evaluate(tmp_path, "test", tmp_path).metrics["loss"]
    assert scored is not None and 0 < scored < found[0].metrics["loss"]


@pytest.mark.row("K39")
def test_efficiency_worked_by_hand() -> None:
    assert scaling.efficiencies("strong", {1: 8.0, 2: 5.0, 4: 4.0}) == {1: 1.0, 2: 0.8, 4: 0.5}
    assert scaling.efficiencies("weak", {1: 8.0, 2: 10.0, 4: 16.0}) == {1: 1.0, 2: 0.8, 4: 0.5}
    assert scaling.efficiencies("strong", {2: 8.0, 4: 5.0}) == {2: 1.0, 4: 0.8}


@pytest.mark.row("K39")
def test_scaling_shows_time_and_efficiency_of_every_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {("strong", 1): 8.0, ("strong", 2): 5.0, ("weak", 1): 8.0, ("weak", 2): 10.0}
    monkeypatch.setattr(scaling, "_epoch_s", lambda kind, count, *sizes: taken[kind, count])
    result = scaling.measure(processes=(1, 2), repetitions=1)
    assert [result[f"{kind}_2_{what}"] for kind in ("strong", "weak") for what in ("s", "efficiency")] == [
        5,
        0.8,
        10,
        0.8,
    ]
    rows = scaling.figures(result)
    assert [row[1:] for row in rows] == [
        ("5.00 s, efficiency 0.80", "8.00 s on 1; report"),
        ("10.00 s, efficiency 0.80", "8.00 s on 1; report"),
    ]
    assert "the same images (strong" in rows[0][0] and "2 times the images (weak" in rows[1][0]
    with pytest.raises(ValueError, match="batch_size: got 8; expected a multiple of 3"):
        scaling.measure(processes=(1, 3))


@pytest.mark.row("K39")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_on_half_the_images_each() -> None:
    assert scaling._epoch_s("strong", 2, images=12, size=32, batch_size=4, epochs=2) > 0


def test_hypervolumes_and_times_to_them_worked_by_hand() -> None:
    points = [(10.0, 0.5, 0.2), (20.0, 0.8, 0.1), (30.0, 0.4, 0.6), (40.0, 0.1, 0.1)]
    # 0.8 up to a tenth saved, 0.5 up to two, 0.4 up to six; the last point is dominated.
    assert inheritance.hypervolume(points) == pytest.approx(0.8 * 0.1 + 0.5 * 0.1 + 0.4 * 0.4)
    assert inheritance.hypervolume(points[:1]) == pytest.approx(0.1)
    assert inheritance.seconds_to(points, 0.1) == 10.0
    assert inheritance.seconds_to(points, 0.13) == 20.0
    assert inheritance.seconds_to(points, inheritance.hypervolume(points)) == 30.0
    assert inheritance.seconds_to(points, 0.9) == float("inf")


def test_pruned_networks_of_the_benchmark_are_exact() -> None:
    found = pruning.measure(cases=8)
    assert found["equivalence_max_abs"] < 1e-5
    assert (found["unet64_params"], found["pruned_params"]) == (31_036_676, 15_766_586)
    assert (found["unet64_macs"], found["pruned_macs"]) == (48_104_472_576, 31_201_319_936)


@pytest.mark.row("S10")
@pytest.mark.row("S14")
def test_thresholds_and_auprc_of_the_benchmark_are_within_their_bars() -> None:
    assert evaluation.threshold_error(100_000) <= 0.005
    assert evaluation.auprc_error(100_000) <= 1e-3


@pytest.mark.row("S49")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_validating_two_thousand_strips_takes_bounded_memory() -> None:
    found = evaluation.measure(pixels=100_000)
    assert (found["images"], found["size"]) == (2000, "1600x256")
    assert found["memory_growth_mib"] * 2**20 <= 300e6


@pytest.mark.row("E8")
@pytest.mark.row("E21")
def test_tiles_come_back_as_they_were_cut_and_those_that_do_not_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile, _ = tiles._tiles(tmp_path, 2)
    assert tiles.round_trip_errors(tile, tmp_path / "whole") == (0, 4 * 7 * 2)
    join = tiles.subtiles.join

    def turned(pieces: Any) -> Any:
        return join({(y, x): piece for (x, y), piece in pieces.items()})

    monkeypatch.setattr(tiles.subtiles, "join", turned)
    monkeypatch.setattr(tiles, "SIZES", (8, 16))
    # All but what is in one piece, whichever way it went.
    assert tiles.round_trip_errors(tile, tmp_path / "turned") == (7 * 2, 2 * 7 * 2)


@pytest.mark.row("E42")
def test_processing_a_tile_takes_bounded_memory_and_the_bars_are_told(tmp_path: Path) -> None:
    found = tiles.measure(pixels=2, repetitions=1)
    assert 0 < found["peak_gib"] < 2 and found["size"] == "32x32"
    assert [row[2].rpartition("aim: ")[2] for row in tiles.figures(found)] == ["0", "at most 2 x", "at most 2 GiB"]
