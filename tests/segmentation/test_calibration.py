"""Temperatures against the one that logits were spoilt with, calibration errors against counts of single pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar

from segmentation import calibration, histograms
from segmentation import operating_points as op
from segmentation.calibration import Temperature
from segmentation.epoch import NonFiniteError


def spoilt(factor, images=4, channels=1, seed=0):
    """Return logits that are as many times too large, and masks."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, channels, 128, 128, generator=generator) - 1
    mask = (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).to(torch.uint8)
    return factor * logits, mask


def counted(logits, mask):
    return calibration.histogram(logits, mask, torch.arange(len(logits)))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_what_the_logits_were_spoilt_with(factor):
    logits, mask = spoilt(factor)
    learnt = calibration.learn(counted(logits, mask), list("abcd"))
    assert learnt.temperature[0] == pytest.approx(factor, rel=0.03)
    assert learnt.nll_scaled[0] <= learnt.nll[0]
    assert learnt.ece_scaled[0] < 0.01
    if factor != 1.0:
        assert learnt.ece[0] > 0.05


def test_the_temperature_is_that_of_the_pixels_themselves():
    logits, mask = spoilt(2.5)
    values, truth = logits.double().numpy().ravel(), mask.numpy().ravel() == 1

    def loss(temperature):
        return np.logaddexp(0, np.where(truth, -values, values) / temperature).mean()

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6})
    learnt = calibration.learn(counted(logits, mask), list("abcd"))
    assert learnt.temperature[0] == pytest.approx(best.x, rel=1e-3)
    assert learnt.nll_scaled[0] == pytest.approx(best.fun, abs=1e-4)
    assert learnt.nll[0] == pytest.approx(loss(1), abs=1e-3)


def test_the_calibration_error_is_that_of_the_pixels_themselves():
    logits, mask = spoilt(2.5)
    probability, truth = logits.double().sigmoid().numpy().ravel(), mask.numpy().ravel()
    place = np.minimum((probability * 10).astype(int), 9)
    shares = np.array([(place == b).mean() for b in range(10)])
    observed = np.array([truth[place == b].mean() for b in range(10)])
    predicted = np.array([probability[place == b].mean() for b in range(10)])
    found = calibration.reliability(counted(logits, mask), bins=10)
    assert found.ece() == pytest.approx((shares * np.abs(predicted - observed)).sum(), abs=2e-3)
    np.testing.assert_allclose(found.predicted, predicted, atol=0.01)
    np.testing.assert_allclose(found.observed, observed, atol=0.02)
    assert found.pixels.sum() == truth.size


def test_four_pixels_by_hand():
    logits = torch.tensor([[[[-1.0, -1.0, 1.0, 1.0]]]])
    found = counted(logits, torch.tensor([[[[0, 1, 1, 255]]]]))
    # Logits are counted at the middle of steps of 1/16.
    low, high = 1 / (1 + np.exp(1 - 1 / 32)), 1 / (1 + np.exp(-1 - 1 / 32))
    pair = calibration.reliability(found, bins=2)
    assert pair.pixels.tolist() == [2, 1]
    assert pair.predicted.tolist() == pytest.approx([low, high])
    assert pair.observed.tolist() == [0.5, 1]
    assert pair.ece() == pytest.approx((2 * (0.5 - low) + (1 - high)) / 3)
    assert calibration.negative_log_likelihood(found.pixels[0, 0]) == pytest.approx(
        -(np.log(1 - low) + np.log(low) + np.log(high)) / 3
    )


def test_each_channel_has_its_own_and_thresholds_move_with_it():
    logits, mask = spoilt(2.0, channels=2)
    logits[:, 1] /= 4
    learnt = calibration.learn(counted(logits, mask), list("abcd"))
    assert learnt.temperature == pytest.approx((2.0, 0.5), rel=0.05)
    scaled = learnt.scale(logits)
    torch.testing.assert_close(scaled[:, 0] * learnt.temperature[0], logits[:, 0])
    # Scaling keeps the order of a channel's pixels, so that it neither gains nor loses average precision.
    before, after = (op.histogram(each.sigmoid(), mask, torch.arange(4)) for each in (logits, scaled))
    np.testing.assert_allclose(op.auprc(before), op.auprc(after), atol=1e-4)
    with pytest.raises(ValueError, match="got logits of 1 channels for 2"):
        learnt.scale(logits[:, :1])


def test_plain_data_survives_json_and_knows_its_run():
    logits, mask = spoilt(1.0)
    found = counted(logits, mask)
    learnt = calibration.learn(found, list("abcd"))
    assert Temperature(**json.loads(json.dumps(learnt.record()))) == learnt
    assert learnt.run == histograms.digest(found, list("abcd")) != calibration.learn(found, list("abce")).run
    assert learnt.images == 4
    with pytest.raises(ValueError, match="temperature: got"):
        Temperature(**{**learnt.record(), "temperature": [0.0]})


@pytest.mark.row("X9")
def test_parts_and_repeated_images_change_nothing():
    logits, mask = spoilt(1.0)
    parts = [calibration.histogram(logits[p], mask[p], torch.tensor(p)) for p in ([2, 0], [1, 3], [0])]
    merged = histograms.merge([calibration.empty(1), *parts])
    np.testing.assert_array_equal(merged.pixels, counted(logits, mask).pixels)


def test_one_kind_of_pixels_or_none_keeps_the_logits():
    logits, mask = spoilt(1.0)
    for labels in (torch.zeros_like(mask), torch.ones_like(mask), torch.full_like(mask, 255)):
        assert calibration.learn(counted(logits, labels), list("abcd")).temperature == (1.0,)
    none = calibration.learn(calibration.empty(1), [])
    assert (none.temperature, none.nll, none.ece) == ((1.0,), (0.0,), (0.0,))
    # Told apart without error, the coldest temperature is the best there is.
    apart = calibration.learn(counted(torch.where(mask == 1, 1.0, -1.0), mask), list("abcd"))
    assert apart.temperature[0] == pytest.approx(calibration.COLDEST, rel=1e-3)


def test_logits_beyond_the_bins_are_counted_in_the_last_and_nan_is_told():
    far = torch.tensor([[[[-1e9, 1e9, float("inf"), 32.0]]]])
    found = counted(far, torch.tensor([[[[0, 1, 1, 1]]]]))
    assert found.pixels[0, 0, 0, 0] == 1 and found.pixels[0, 0, 1, -1] == 3
    with pytest.raises(NonFiniteError, match="logit: 1 pixels are NaN, in 1 images: sample 0"):
        counted(torch.tensor([[[[0.0, float("nan")]]]]), torch.zeros(1, 1, 1, 2))
    with pytest.raises(ValueError, match="of logits"):
        calibration.learn(op.empty(1), [])


def test_the_picture_shows_the_error_of_each_curve(tmp_path, monkeypatch):
    from matplotlib.text import Text

    seen, set_text = [], Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda self, text: (seen.append(str(text)), set_text(self, text))[1])
    logits, mask = spoilt(3.0)
    found = counted(logits, mask)
    curves = {"as trained": calibration.reliability(found), "scaled": calibration.reliability(found, temperature=3.0)}
    path = calibration.draw(tmp_path / "a" / "reliability.png", curves)
    with Image.open(path) as picture:
        assert picture.size[0] > 600
    assert f"as trained, ECE {curves['as trained'].ece():.3f}" in seen
    assert {"calibrated", "predicted probability", "share positive"} <= set(seen)
