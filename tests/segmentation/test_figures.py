"""Figures show what they say: colours by hand, files that are pictures."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segmentation import figures
from segmentation.figures import CLASS_COLOURS, Example, blend, class_map, composite_map


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    probability = generator.random((4, 3, 16, 20))
    return [
        Example(
            name=f"TOD_{i}.ar5:f090", image=generator.random((1, 16, 20)), probability=p, mask=(p > 0.7).astype(int)
        )
        for i, p in enumerate(probability)
    ]


@pytest.mark.row("A32")
def test_composite_of_four_pixels():
    # Nothing; exactly at the threshold; first and second; all three.
    probs = np.array([[[0.1, 0.5], [0.9, 0.6]], [[0.2, 0.5], [0.8, 0.6]], [[0.0, 0.5], [0.1, 0.51]]])
    painted = composite_map(probs)
    assert painted.dtype == np.uint8
    assert painted.shape == (2, 2, 3)
    assert painted.tolist() == [[[0, 0, 0], [0, 0, 0]], [[255, 105, 180], [255, 255, 0]]]
    assert composite_map(probs, 0.85)[1, 0].tolist() == [220, 20, 60]


def test_each_class_has_its_colour_and_ignored_pixels_are_grey():
    assert class_map(np.array([[0, 1, 2, 255]])).tolist() == [[*map(list, CLASS_COLOURS[:3]), [128, 128, 128]]]


def test_pictures_stretch_grey_and_take_three_of_many_channels():
    grey = figures.as_picture(np.array([[[1.0, 2.0, 3.0]]]))
    assert grey[0, :, 0].tolist() == [0, 128, 255]
    assert figures.as_picture(np.zeros((7, 2, 2))).tolist() == np.zeros((2, 2, 3)).tolist()


def test_three_bands_are_stretched_each_by_itself_between_percentiles():
    bands = np.stack([np.linspace(0, scale, 101).reshape(1, 101) for scale in (1, 10, 100, 1000, 1e4)])
    shown = figures.three_bands(bands, (4, 1, 0))
    assert shown.shape == (3, 1, 101)
    np.testing.assert_allclose(shown[0], shown[2], atol=1e-12)
    assert (shown[0, 0, :3].tolist(), shown[0, 0, 98:].tolist()) == ([0, 0, 0], [1, 1, 1])
    assert shown[1, 0, 50] == pytest.approx(0.5)


def test_bands_that_are_not_chosen_are_the_first_three_of_many_and_all_of_few():
    image = np.random.default_rng(0).random((5, 4, 4))
    np.testing.assert_array_equal(figures.three_bands(image), figures.three_bands(image, (0, 1, 2)))
    np.testing.assert_array_equal(figures.three_bands(image[:4]), image[:4])
    assert not figures.three_bands(np.ones((6, 4, 4))).any()


def test_blending_leaves_unpainted_pixels_alone():
    picture = np.full((1, 2, 3), 100, np.uint8)
    painted = np.array([[[0, 0, 0], [200, 0, 0]]], np.uint8)
    assert blend(picture, painted, 0.25).tolist() == [[[100, 100, 100], [125, 75, 75]]]


def texts(monkeypatch):
    """Collect every text drawn, instead of reading it off the picture."""
    from matplotlib.text import Text

    seen, set_text = [], Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda self, text: (seen.append(str(text)), set_text(self, text))[1])
    return seen


@pytest.mark.row("A31")
@pytest.mark.row("A33")
def test_the_grid_shows_its_threshold_and_is_a_picture(tmp_path, examples, monkeypatch):
    seen = texts(monkeypatch)
    path = figures.prediction_grid(tmp_path / "a" / "grid.png", examples, ["CR", "PS", "EL"], multilabel=True, thr=0.75)
    with Image.open(path) as picture:
        assert picture.size[0] > 600
    assert {"prediction (p > 0.75)", "P(PS)", "ground truth", "CR", "EL"} <= set(seen)


def test_the_grid_without_truth_has_one_column_less(tmp_path, examples, monkeypatch):
    seen = texts(monkeypatch)
    bare = [Example(name=e.name, image=e.image, probability=e.probability) for e in examples[:1]]
    path = figures.prediction_grid(tmp_path / "grid.png", bare, ["bg", "in", "edge"], multilabel=False)
    assert path.stat().st_size > 2000
    assert "ground truth" not in seen


def test_the_grid_of_exclusive_classes_reads_class_ids(tmp_path, examples):
    known = [Example(name=e.name, image=e.image, probability=e.probability, mask=e.mask[0]) for e in examples]
    assert figures.prediction_grid(tmp_path / "g.png", known, ["bg", "in", "edge"], multilabel=False).is_file()


def test_an_overlay_has_a_legend(tmp_path, examples, monkeypatch):
    seen = texts(monkeypatch)
    painted = class_map(examples[0].mask[0])
    path = figures.overlay(tmp_path / "o.png", examples[0].image, painted, ["bg", "in"], CLASS_COLOURS, title="val")
    assert path.stat().st_size > 2000
    assert "in" in seen
    assert "bg" not in seen


@pytest.mark.row("A30")
def test_curves_draw_the_series_that_were_recorded(tmp_path, monkeypatch):
    seen = texts(monkeypatch)
    rows = [{"train_loss": 1 / e, "val_loss": 1.1 / e, "train_mean_iou": 1 - 1 / e} for e in range(1, 6)]
    series = {"train_mean_iou": "train", "val_mean_iou": "validation"}
    figures.curves(tmp_path / "iou.png", rows, series, title="mean IoU", ylabel="IoU")
    assert "train" in seen
    assert "validation" not in seen
    path = figures.curves(tmp_path / "n.png", rows[:1], {"x": "x"}, title="none", ylabel="", colours={"x": (1, 2, 3)})
    assert path.is_file()


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, segmentation.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
