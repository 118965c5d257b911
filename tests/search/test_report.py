from __future__ import annotations

import base64
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.record import State, StudyPaths, TrialRecord
from search.results import plots, report
from search.results.report import Facts
from search.spec import Objective, Parameter, SearchSpec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SPEC = SearchSpec(
    name="which <backbone> & rate?",
    workload="toy",
    objectives=(Objective(metric="val_mean_iou", mode="max"),),
    parameters=(
        Parameter(name="lr", type="float", low=1e-5, high=1e-1, log=True),
        Parameter(name="network.name", type="categorical", choices=("unet", "tiny", "timm")),
        Parameter(name="network.widths", type="categorical", choices=([16, 32], [32, 64], None)),
        Parameter(name="loss.dice", type="float", low=0.0, high=1.0),
        Parameter(name="batch_size", type="int", low=4, high=64, step=4),
        Parameter(name="momentum", type="float", low=0.5, high=0.99, when={"network.name": "unet"}),
    ),
)
TWO = SearchSpec(
    name="two",
    workload="toy",
    objectives=(*SPEC.objectives, Objective(metric="cost", mode="min")),
    parameters=SPEC.parameters,
)
START = datetime(2025, 11, 21, 8, tzinfo=UTC)


def study(count: int, objectives: int = 1) -> list[TrialRecord]:
    """Return trials with an optimum, some of them stopped or failed."""
    draw = random.Random(count)
    return [trial(number, draw, objectives) for number in range(count)]


def trial(number: int, draw: random.Random, objectives: int) -> TrialRecord:
    name = draw.choice(["unet", "tiny", "timm"])
    params: dict[str, Any] = {
        # Trial 0 is the defaults, which may lie outside the ranges.
        "lr": 0.5 if number == 0 else 10 ** draw.uniform(-5, -1),
        "network.name": name,
        "network.widths": draw.choice([[16, 32], [32, 64], None]),
        "loss.dice": draw.random(),
        "batch_size": draw.randrange(4, 65, 4),
    }
    if name == "unet":
        params["momentum"] = draw.uniform(0.5, 0.99)
    top = 0.8 * math.exp(-((math.log10(params["lr"]) + 2.5) ** 2) / 6) + 0.05 * draw.random()
    state: State = "complete" if number == 0 else draw.choices(["complete", "stopped", "failed"], [4, 5, 1])[0]
    last = {"complete": 20, "stopped": draw.choice([2, 6]), "failed": 1}[state]
    epochs = {e: (top * (1 - math.exp(-e / 4)), float(draw.random()))[:objectives] for e in range(1, last + 1)}
    started = START + timedelta(seconds=30 * (number // 4) + draw.random())
    return TrialRecord(
        number=number,
        state=state,
        params=params,
        values=epochs[last] if state == "complete" else None,
        epochs=epochs,
        best_epoch=last,
        reason={"complete": "finished", "stopped": f"stopped at rung {last}", "failed": "loss is nan\nTraceback"}[
            state
        ],
        slot_s=float(last),
        started=started,
        finished=started + timedelta(seconds=last),
        checkpoint=f"trials/{number}/checkpoints/best",
        checkpoint_sha256=f"sha-{number}",
    )


def evaluation(number: int, score: float, spread: float = 0.01, figures: Sequence[str] = ()) -> dict[str, Any]:
    replicates = [score + spread * math.sin(draw * (number + 1)) for draw in range(200)]
    return {
        "trial": number,
        "name": str(number),
        "checkpoint_sha256": f"sha-{number}",
        "split": "test",
        "metrics": {"mean_iou": score},
        "intervals": {"mean_iou": [score - 2 * spread, score + 2 * spread]},
        "resamples": {"mean_iou": replicates},
        "groups": {},
        "figures": list(figures),
        "details": {},
    }


def full(folder: Path, count: int = 40, spec: SearchSpec = SPEC) -> Path:
    records = study(count, len(spec.objectives))
    order = report.ranked(records, spec.objectives)
    promoted = [record.number for record in order[:2]]
    paths = StudyPaths(folder)
    for number in promoted:
        paths.evaluation(str(number)).mkdir(parents=True)
        (paths.evaluation(str(number)) / "grid.png").write_bytes(png(320, 96))
    promotion = {"promoted": [{"trial": n, "why": f"val_mean_iou of trial {n}"} for n in promoted], "incumbent": 0}
    evaluations = [evaluation(n, 0.7 - i / 50, figures=["grid.png"]) for i, n in enumerate(promoted)]
    evaluations += [] if 0 in promoted else [evaluation(0, 0.6)]
    facts = Facts(
        wall_s=400.0,
        slots=4,
        sampler="tpe: auto chose it for 6 parameters",
        versions={"python": "3.11", "optuna": "5.0"},
        manifest={"sha256": "ab" * 32, "samples": {"train": 10}, "synthetic": True, "warnings": ["class 2 is rare"]},
    )
    return report.write(paths, spec, records, promotion, evaluations, facts)


def test_answer_says_better_with_the_paired_interval() -> None:
    records = [record(0, 0.5), record(7, 0.7)]
    text = answer(records, [evaluation(0, 0.6), evaluation(7, 0.7)])
    assert text.title == "Trial 7 is best"
    assert (text.score, text.metric, text.interval) == ("0.700", "mean_iou on the test split", "0.680 to 0.720")
    assert text.comparison.startswith("Better than the defaults (trial 0): mean_iou +0.100, paired 95 % interval +0.0")
    assert text.tone == "better"


def test_answer_says_plainly_that_nothing_can_be_told() -> None:
    records = [record(0, 0.5), record(7, 0.7)]
    text = answer(records, [evaluation(0, 0.600, 0.05), evaluation(7, 0.601, 0.05)])
    assert text.comparison.startswith("Not distinguishable from the defaults (trial 0): mean_iou +0.001")
    assert "holds zero" in text.comparison
    assert text.tone == "plain"


def test_answer_without_evaluation_defaults_or_trials() -> None:
    records = [record(0, 0.5), record(7, 0.7)]
    assert "not been scored on the test split" in answer(records, []).comparison
    assert "nothing to compare" in answer(records, [evaluation(7, 0.7)]).comparison
    assert answer([], []).title == "No trial has finished yet"
    assert answer([record(0, 0.9), record(7, 0.7)], [evaluation(0, 0.9)]).title == "The defaults are best"
    worse = answer(records, [evaluation(0, 0.9), evaluation(7, 0.7)])
    assert worse.comparison.startswith("Worse than the defaults")


def test_warnings_name_synthetic_data_swapped_checkpoints_and_failures() -> None:
    records = [record(0, 0.5), record(7, 0.7), TrialRecord(number=8, state="failed", params={})]
    swapped = {**evaluation(7, 0.7), "checkpoint_sha256": "other"}
    promotion = {"promoted": [{"trial": 7}, {"trial": 0}], "incumbent": None}
    rows = report.leaderboard.rows(SPEC, records, promotion, [swapped])
    facts = Facts(manifest={"synthetic": True, "warnings": ["few images"]}, warnings=["a slot was lost"])
    assert report.warnings(SPEC, records, promotion, rows, facts) == [
        "Synthetic data: the scores say that the search works, nothing about real images.",
        "a slot was lost",
        "few images",
        "Trial 7: the checkpoint that was evaluated is not the one that the search chose.",
        "1 of 3 trials failed; the reasons are under Cost.",
        "Only 2 trials finished: which parameter matters is little more than a guess.",
        "Promoted but not evaluated: trial 0.",
    ]


CASES: dict[str, list[TrialRecord]] = {
    "no trials": [],
    "one finished": study(1),
    "one waiting": [TrialRecord(number=0, state="waiting", params={})],
    "only failed": [
        TrialRecord(number=n, state="failed", params={"lr": 0.1}, reason="out of memory") for n in range(3)
    ],
    "only stopped": [TrialRecord(number=0, state="stopped", params={"lr": 0.1}, epochs={1: (0.1,)}, reason="rung 1")],
    "one value": [TrialRecord(number=n, state="complete", params={"lr": 0.1}, values=(0.5,)) for n in range(6)],
    "one lr": [TrialRecord(number=n, state="complete", params={"lr": 0.1}, values=(n / 9,)) for n in range(6)],
    "nan": [TrialRecord(number=0, state="complete", params={"lr": 0.1}, values=(math.nan,), epochs={1: (math.nan,)})],
    "zero on a log axis": [
        TrialRecord(number=n, state="complete", params={"lr": n / 10}, values=(n / 9,)) for n in range(6)
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_small_and_odd_studies_are_reported_without_a_warning(name: str, tmp_path: Path) -> None:
    promotion: dict[str, Any] = {"promoted": [], "incumbent": None}
    page = report.write(StudyPaths(tmp_path), SPEC, CASES[name], promotion, [], Facts()).read_text()
    assert "<h2>Leaderboard</h2>" in page


@pytest.mark.parametrize("count", [3, 500])
def test_every_figure_is_one_that_plotly_accepts(count: int) -> None:
    from plotly import graph_objects

    records = study(count, 2)
    drawn = [
        plots.history(records, TWO.objectives),
        plots.history(records, TWO.objectives, 1),
        plots.importance(records, TWO),
        plots.parallel(records, TWO),
        plots.front(records, TWO.objectives),
        plots.curves(records, TWO.objectives, [0]),
        plots.timeline(records),
        *plots.slices(records, TWO).values(),
    ]
    for figure in drawn:
        if figure is not None:
            graph_objects.Figure(data=figure["data"], layout=figure["layout"])
    assert sum(figure is not None for figure in drawn) >= (13 if count > 3 else 8)


def test_best_so_far_by_hand() -> None:
    records = [record(n, value) for n, value in enumerate([0.3, 0.2, 0.5, 0.4])]
    figure = plots.history(records, SPEC.objectives)
    assert figure is not None
    assert figure["data"][-1]["y"] == [0.3, 0.3, 0.5, 0.5]
    loss = plots.history(records, (Objective(metric="loss", mode="min"),))
    assert loss is not None
    assert loss["data"][-1]["y"] == [0.3, 0.2, 0.2, 0.2]


def test_the_parameter_that_decides_is_the_most_important() -> None:
    shares = plots.importances(study(200), SPEC)
    assert max(shares, key=lambda name: shares[name]) == "lr"
    assert shares["lr"] > 0.5
    assert "momentum" in shares


def test_lanes_never_overlap_and_are_as_few_as_possible() -> None:
    assert plots.lanes_of([(0, 4), (1, 2), (2, 3), (2.5, 6), (4, 5)]) == [0, 1, 1, 2, 0]


def test_page_is_whole_safe_and_shows_what_it_should(tmp_path: Path) -> None:
    page = full(tmp_path).read_text()
    assert page.count("plotly.js v") == 1
    assert "which &lt;backbone&gt; &amp; rate?" in page
    assert "<backbone>" not in page
    assert base64.b64encode(png(320, 96)).decode() in page
    assert "Synthetic data" in page
    assert page.index('class="answer"') < page.index("Synthetic data") < page.index("<h2>Leaderboard</h2>")
    assert links(page) == []


def test_a_missing_picture_is_named_and_not_fatal(tmp_path: Path) -> None:
    promotion = {"promoted": [{"trial": 0}], "incumbent": None}
    lost = [evaluation(0, 0.5, figures=["lost.png"])]
    page = report.write(StudyPaths(tmp_path), SPEC, [record(0, 0.5)], promotion, lost, Facts()).read_text()
    assert "lost.png is missing" in page


def test_winning_values_read_back_from_yaml_as_they_were() -> None:
    values = {"lr": 1e-05, "network.widths": (16, 32), "weights": None, "name": "1e-5", "rates": [2e-07, 1.0]}
    expected = {**values, "network.widths": [16, 32]}
    assert yaml.safe_load(report._yaml(values)) == expected


def test_text_cannot_leave_its_script_element() -> None:
    assert "</script>" not in report._script_json({"name": "</script><script>alert(1)</script>", "nan": math.nan})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to open the page with")
@pytest.mark.parametrize("spec", [SPEC, TWO], ids=["one objective", "two objectives"])
def test_a_browser_draws_every_plot_without_an_error(spec: SearchSpec, tmp_path: Path) -> None:
    page = full(tmp_path, spec=spec)
    dom, log = browse(page, tmp_path / "profile", "--dump-dom")
    plots_expected = len(re.findall(r'id="plot-\d+"', page.read_text()))
    assert plots_expected >= 11
    assert dom.count('class="plot-container plotly"') == plots_expected
    # Plotly stacks several drawings in each plot.
    assert dom.count('<svg class="main-svg"') >= plots_expected
    assert "CONSOLE" not in log


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to open the page with")
def test_the_browser_test_would_see_an_error_and_a_fetch(tmp_path: Path) -> None:
    page = full(tmp_path)
    broken = page.read_text().replace('"type": "scatter"', '"type": "scatter", "oops": }', 1)
    page.write_text(broken.replace("</h1>", '</h1><img src="http://127.0.0.1:9/a.png">', 1))
    _, log = browse(page, tmp_path / "profile", "--dump-dom")
    assert "SyntaxError" in log
    assert "violates the following Content Security Policy" in log


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    assert CHROMIUM is not None
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=8000", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def answer(records: list[TrialRecord], evaluations: list[dict[str, Any]]) -> report.Answer:
    promotion = {"promoted": [{"trial": 7, "why": ""}], "incumbent": 0}
    return report.answer(SPEC, records, promotion, report.leaderboard.rows(SPEC, records, promotion, evaluations))


def record(number: int, value: float) -> TrialRecord:
    return TrialRecord(
        number=number, state="complete", params={"lr": 0.01}, values=(value,), checkpoint_sha256=f"sha-{number}"
    )


class Links(HTMLParser):
    """Collect whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def links(page: str) -> list[str]:
    parser = Links()
    parser.feed(page)
    return [link for link in parser.found if not link.startswith("data:")]


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\x00" + bytes((x ^ y) & 255 for x in range(width) for _ in range(3)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
