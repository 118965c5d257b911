"""Tiles that overlap give back what the whole image would."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from segmentation.networks.tinyunet import TinyUNet
from segmentation.prediction import FLIPS, FlipAverage, importance, predict, predict_tiles, starts

torch.set_num_threads(1)


class Constant(nn.Module):
    def forward(self, image):
        logits = torch.tensor([0.0, 1.0, -2.0]).view(1, 3, 1, 1)
        return logits.expand(len(image), 3, *image.shape[-2:])


class Local(nn.Module):
    """Each pixel's logits depend on that pixel alone."""

    def forward(self, image):
        return torch.cat([image, -2 * image, image.square()], 1)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (37, 91), (10, 70)])
def test_a_constant_network_gives_a_constant_map(size, flips):
    found = predict_tiles(Constant(), torch.randn(1, *size), tile=32, multilabel=False, flips=flips)
    expected = torch.tensor([0.0, 1.0, -2.0]).softmax(0).view(3, 1, 1).expand(3, *size)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("multilabel", [False, True])
def test_a_local_network_by_tiles_equals_itself_on_the_whole(overlap, multilabel):
    image = torch.randn(1, 45, 70)
    found = predict_tiles(Local(), image, tile=16, multilabel=multilabel, overlap=overlap, flips=True, batch_size=3)
    torch.testing.assert_close(found, predict(Local(), image[None], multilabel=multilabel)[0])


def test_an_image_smaller_than_a_tile_is_seen_whole():
    torch.manual_seed(0)
    model, image = TinyUNet(base=4).eval(), torch.randn(1, 20, 33)
    found = predict_tiles(model, image, tile=64, multilabel=True)
    torch.testing.assert_close(found, predict(model, image[None], multilabel=True)[0])


def test_flips_make_the_prediction_follow_the_image():
    torch.manual_seed(0)
    model, image = TinyUNet(base=4).eval(), torch.randn(1, 1, 24, 32)
    found = predict(model, image, multilabel=True, flips=True)
    mirrored = predict(model, image.flip(-1), multilabel=True, flips=True).flip(-1)
    torch.testing.assert_close(found, mirrored)
    assert not torch.allclose(found, predict(model, image, multilabel=True))


class Symmetric(nn.Module):
    """A convolution whose kernels look the same in any mirror, so that its maps follow the image by themselves."""

    def __init__(self):
        super().__init__()
        kernel = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        self.kernel = torch.stack([kernel.flip(view) for view in FLIPS]).mean(0)

    def forward(self, image):
        return torch.nn.functional.conv2d(image, self.kernel, padding=2)


@pytest.mark.row("K42")
@pytest.mark.parametrize("multilabel", [False, True])
def test_flips_change_nothing_for_a_symmetric_network(multilabel):
    image = torch.randn(2, 1, 24, 31)
    plain = predict(Symmetric(), image, multilabel=multilabel)
    torch.testing.assert_close(predict(Symmetric(), image, multilabel=multilabel, flips=True), plain)
    for view in FLIPS:
        seen = predict(Symmetric(), image.flip(view), multilabel=multilabel, flips=True)
        torch.testing.assert_close(seen.flip(view), plain)


@pytest.mark.row("K42")
def test_flips_are_the_mean_of_four_softmaxes_worked_by_hand():
    class Positional(nn.Module):
        def forward(self, image):
            ramp = torch.arange(4.0).view(1, 1, 2, 2) + 0 * image
            return torch.cat([ramp, torch.zeros_like(ramp)], 1)

    found = predict(Positional(), torch.zeros(1, 1, 2, 2), multilabel=False, flips=True)
    mean = torch.arange(4.0).sigmoid().mean()  # softmax of (x, 0); four mirrors put each of the values everywhere once
    torch.testing.assert_close(found, torch.stack([mean, 1 - mean]).view(1, 2, 1, 1).expand(1, 2, 2, 2))


@pytest.mark.row("K42")
@pytest.mark.parametrize("multilabel", [False, True])
def test_a_flip_averages_logits_are_those_of_the_mean(multilabel):
    torch.manual_seed(0)
    model, image = TinyUNet(base=4).eval(), torch.randn(2, 1, 24, 32)
    with torch.inference_mode():
        logits = FlipAverage(model, multilabel=multilabel).eval()(image)
    activated = logits.sigmoid() if multilabel else logits.softmax(1)
    torch.testing.assert_close(activated, predict(model, image, multilabel=multilabel, flips=True))


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_flip_averages_logits_stay_finite_where_a_network_is_certain(multilabel):
    class Certain(nn.Module):
        def forward(self, image):
            return torch.cat([image * 0 + 1e4, image * 0 - 1e4], 1)

    logits = FlipAverage(Certain(), multilabel=multilabel)(torch.zeros(1, 1, 4, 4))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == 0).all()


@pytest.mark.parametrize("size", [16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99])
def test_tiles_cover_all_and_overlap_enough(size, overlap):
    places = starts(size, 16, overlap)
    assert (places[0], places[-1]) == (0, size - 16)
    steps = [after - before for before, after in pairwise(places)]
    assert all(0 < step <= max(1, 16 * (1 - overlap) + 1) for step in steps)


def test_weights_peak_in_the_middle_and_never_vanish():
    weight = importance(64, 32)
    assert weight.shape == (64, 32)
    assert weight.argmax() in (31 * 32 + 15, 31 * 32 + 16, 32 * 32 + 15, 32 * 32 + 16)
    assert weight.min() == pytest.approx(1e-3)
    torch.testing.assert_close(weight, weight.flip(0).flip(1))


def test_overlap_has_bounds():
    with pytest.raises(ValueError, match="overlap"):
        predict_tiles(Constant(), torch.zeros(1, 8, 8), tile=4, multilabel=False, overlap=1.0)
