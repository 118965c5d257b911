"""Steel strips: probabilities calibrated, predictions cleaned, and those of others scored by the same rules."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import components, splits
from segmentation.components import Choice, Cleaning
from segmentation.epoch import DataError
from segmentation.operating_points import Thresholds
from workloads import __main__ as command
from workloads import severstal
from workloads._severstal import dataset, evaluating, learnt
from workloads._severstal.annotations import encode_runs
from workloads._severstal.learnt import Learnt
from workloads._severstal.scoring import Clean

HALF = evaluating.fixed(1, "one")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> severstal.Config:
    debug = severstal.Config.debug()
    cache = str(tmp_path_factory.mktemp("cache"))
    return replace(
        debug, data=replace(debug.data, cache=cache), calibrate=True, clean=Clean(areas=(20, 400), fill_holes=True)
    )


@pytest.fixture(scope="module")
def trained(config: severstal.Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Train for two epochs; return the checkpoint and what the last reported."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    for epoch in severstal.train(config):
        last = dict(epoch.metrics)
        epoch.save(folder)
    return folder, last


def test_an_epoch_reports_what_it_promises(config: severstal.Config, trained: tuple[Path, dict[str, float]]) -> None:
    assert set(trained[1]) <= set(severstal.metrics(config))
    assert {"val_dice_clean", "val_ece", "val_ece_scaled", "temperature", "grad_norm"} <= set(trained[1])


def test_what_validation_taught_is_in_the_checkpoint_and_goes_on_from_there(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    checkpoint, reported = trained
    found = learnt.read(checkpoint)
    assert found.temperature is not None and found.temperature.run != found.thresholds.run
    assert sorted(found.cleanings[0].dice) == [0, 20, 400]
    assert reported["val_dice_clean"] == max(score for score in found.cleanings[0].dice.values() if score is not None)
    found.write(tmp_path)
    assert learnt.read(tmp_path) == found
    (tmp_path / learnt.CLEANING).write_text(json.dumps({"classes": [{}]}))
    with pytest.raises(DataError, match=r"cleaning.json: what validation taught cannot be read"):
        learnt.read(tmp_path)


def test_an_evaluation_tells_calibration_and_cleaning_beside_the_plain_scores(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    checkpoint, reported = trained
    found = severstal.evaluate(checkpoint, "validation", tmp_path)
    assert found.metrics["dice_clean"] == pytest.approx(reported["val_dice_clean"], abs=1e-12)
    assert found.intervals["dice_clean"][0] <= found.metrics["dice_clean"] <= found.intervals["dice_clean"][1]
    told = found.details["calibration"]["classes"]["defect"]
    # The same strips and pixels; with other threads a probability may end in the bin beside.
    assert told["ece"] == pytest.approx(reported["val_ece"], abs=1e-5)
    assert told["ece_scaled"] == pytest.approx(reported["val_ece_scaled"], abs=1e-5)
    assert found.details["cleaning"]["defect"]["cleaning"]["fill_holes"] is True
    assert "reliability.png" in found.figures and (tmp_path / "reliability.png").stat().st_size > 0


def test_small_predictions_are_dropped_and_holes_filled_in_masks_and_counts() -> None:
    logits = torch.full((1, 40, 80), -5.0)
    logits[0, 5:15, 5:15] = 5.0
    logits[0, 8:10, 8:10] = -5.0
    logits[0, 30, 70] = 5.0
    plain = Learnt(thresholds=HALF)
    cleaned = replace(plain, cleanings=(Choice(cleaning=Cleaning(min_area=4, fill_holes=True), dice={4: 1.0}),))
    assert plain.called(logits).sum() == 100 - 4 + 1
    assert cleaned.called(logits).sum() == 100
    assert (cleaned.called(logits)[0] == components.clean(plain.called(logits)[0], cleaned.cleanings[0].cleaning)).all()


# --- predictions of others


def write_pictures(folder: Path, config: severstal.Config, split: str, mistake: int = 0) -> list[str]:
    """Write the true masks of a split as pictures, the first `mistake` of them black; return the strips' names."""
    samples, made = dataset.load(config.data)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    with splits.test_split_open():
        for place, index in enumerate(made[split]):
            mask = dataset.native_mask(samples, index)[0] * np.uint8(255 if place >= mistake else 0)
            names.append(samples.names[index])
            Image.fromarray(mask).save(folder / f"{Path(names[-1]).stem}_mask.png")
    return names


@pytest.mark.row("S44")
def test_perfect_predictions_score_one_as_pictures_and_as_run_lengths(
    config: severstal.Config, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    names = write_pictures(tmp_path / "pictures", config, "test")
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "ClassId", "EncodedPixels"])
        for name in names:
            mask = np.asarray(Image.open(tmp_path / "pictures" / f"{Path(name).stem}_mask.png")) > 0
            writer.writerow([name, 1 + len(name) % 4, encode_runs(mask.astype(np.uint8))])
    for source in (tmp_path / "pictures", tmp_path / "runs.csv"):
        found = severstal.external(trained[0], "test", source)
        perfect = ("mean_dice", "mean_iou", "pooled_f1", "pooled_precision", "dice_fixed", "recall_fp_image", "auprc")
        assert {name: found.metrics[name] for name in perfect} == dict.fromkeys(perfect, 1.0)
        assert found.details["thresholds"]["dice"] == [0.5]
        assert found.details["thresholds"]["run"] == "none: fixed at 0.5"


@pytest.mark.row("S44")
def test_thresholds_of_others_are_learnt_where_they_have_the_validation_strips_too(
    config: severstal.Config, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    for split in ("validation", "test"):
        write_pictures(tmp_path, config, split)
    for path in tmp_path.iterdir():  # a network that is never sure of a defect
        Image.fromarray((np.asarray(Image.open(path)) * 0.3).astype(np.uint8)).save(path)
    found = severstal.external(trained[0], "test", tmp_path)
    assert found.metrics["opt_threshold_dice"] < 0.3
    assert found.metrics["mean_dice"] == 1.0 and found.metrics["dice_fixed"] < 1.0


@pytest.mark.row("S44")
@pytest.mark.usefixtures("sigterm_as_before")
def test_a_side_by_side_table_tells_the_difference_with_its_paired_interval(
    config: severstal.Config,
    trained: tuple[Path, dict[str, float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pictures(tmp_path / "sam2", config, "test", mistake=1)
    words = ["evaluate", "severstal", str(trained[0]), "--out", str(tmp_path / "out"), "--set", "examples=0"]
    assert command.main([*words, "--external", f"sam2={tmp_path / 'sam2'}"]) == command.DONE
    assert "paired 95 % interval" in capsys.readouterr().out
    with (tmp_path / "out/comparison.csv").open(newline="") as file:
        rows = {(row["name"], row["metric"]): row for row in csv.DictReader(file)}
    ours, theirs = rows["severstal", "mean_dice"], rows["sam2", "mean_dice"]
    assert ours["difference"] == ""
    assert float(theirs["difference"]) == pytest.approx(float(theirs["score"]) - float(ours["score"]))
    assert float(theirs["difference_low"]) <= float(theirs["difference"]) <= float(theirs["difference_high"])
    told = json.loads((tmp_path / "out/external/sam2/evaluation.json").read_text())
    assert told["metrics"]["mean_dice"] == float(theirs["score"])


@pytest.mark.row("S44")
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.unlink(), r"lacks predictions of 1 of 6 strips: .*; add a picture for each"),
        (lambda path: Image.fromarray(np.zeros((9, 9), np.uint8)).save(path), r"is of shape \(9, 9\)"),
        (lambda path: path.write_bytes(b"none"), r"_mask.png: "),
        (lambda path: _fill(path, 3), r"holds 3 at the most, which may be a class or a faint grey"),
        (lambda path: path.with_name(path.name.replace("_mask", "")).write_bytes(path.read_bytes()), r"of one strip"),
    ],
    ids=["missing", "size", "damaged", "classes", "twice"],
)
def test_predictions_that_cannot_be_used_are_named(
    config: severstal.Config, trained: tuple[Path, dict[str, float]], tmp_path: Path, spoil: Any, problem: str
) -> None:
    write_pictures(tmp_path, config, "test")
    spoil(sorted(tmp_path.iterdir())[0])
    with pytest.raises(DataError, match=problem):
        severstal.external(trained[0], "test", tmp_path)


def _fill(path: Path, value: int) -> None:
    Image.fromarray(np.full((64, 256), value, np.uint8)).save(path)


@pytest.mark.row("S44")
def test_a_table_without_any_strip_of_the_split_is_refused(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    (tmp_path / "runs.csv").write_text("ImageId,ClassId,EncodedPixels\nother.jpg,1,1 5\n")
    with pytest.raises(DataError, match=r"runs.csv: names none of the 6 strips of the split"):
        severstal.external(trained[0], "test", tmp_path / "runs.csv")


def test_thresholds_that_nobody_learnt_say_so() -> None:
    assert Thresholds(**HALF.record()) == HALF
