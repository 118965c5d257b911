import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segmentation import normalisation, samples
from segmentation.normalisation import Normalise, Normaliser
from segmentation.samples import Sample, Samples


def numpy_clip(image, low, high):
    """The formula of the original: clip to two percentiles, stretch to [0, 1]."""
    bottom, top = np.percentile(image, (low, high))
    return (np.clip(image, bottom, top) - bottom) / (top - bottom)


@pytest.mark.row("A7")
@pytest.mark.parametrize(("low", "high"), [(0.5, 99.5), (0, 100), (2, 90)])
def test_percentiles_are_those_of_numpy(low, high):
    images = np.random.default_rng(0).normal(50, 20, (3, 2, 32, 32)).astype(np.float32)
    mine = normalisation.percentile(torch.from_numpy(images), low, high).numpy()
    for index in np.ndindex(3, 2):
        assert np.abs(mine[index] - numpy_clip(images[index], low, high)).max() < 1e-6


@pytest.mark.row("A7")
@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_image_becomes_zero(value):
    image = torch.full((1, 1, 32, 32), value, dtype=torch.float32)
    assert normalisation.percentile(image, 0.5, 99.5).abs().max() == 0


def test_one_bright_pixel_in_a_constant_image_is_clipped_away():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 0, 0] = 9
    assert normalisation.percentile(image, 0.5, 99.5).abs().max() == 0


@given(st.floats(-1e3, 1e3), st.floats(0.1, 1e3))
def test_percentiles_ignore_brightness_and_contrast(offset, factor):
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = normalisation.percentile(image * factor + offset, 1, 99)
    assert torch.allclose(changed, normalisation.percentile(image, 1, 99), atol=max(2e-3, abs(offset) / factor * 1e-5))


@pytest.mark.parametrize(("kind", "largest"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)])
def test_unit_divides_by_what_the_type_can_hold(kind, largest):
    image = torch.tensor([[[[0, largest]]]]).to(kind)
    scaled = Normaliser(method="unit")(image)
    assert scaled.dtype == torch.float32
    assert scaled.flatten().tolist() == [0, 1]


def stored(path, arrays):
    with path.open("wb") as stream:
        mask = np.zeros(arrays[0].shape[1:], np.uint8)
        samples.write([Sample(f"s{i}", "g", array, mask) for i, array in enumerate(arrays)], stream)
    return Samples(path)


def test_standard_uses_the_training_split_alone(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [(rng.normal(30000, 5, (2, 8, 8))).astype(np.uint16) for _ in range(4)]
    arrays[3][:] = 0
    read = stored(tmp_path / "a.arrow", arrays)
    normaliser = normalisation.build(Normalise(method="standard"), read, [0, 1, 2])
    train = np.stack(arrays[:3]).astype("f8")
    assert np.allclose(normaliser.mean, train.mean((0, 2, 3)))
    assert np.allclose(normaliser.std, train.std((0, 2, 3)))
    scaled = normaliser(torch.from_numpy(np.stack(arrays[:3])))
    assert np.allclose(scaled.mean((0, 2, 3)), 0, atol=1e-3)
    assert np.allclose(scaled.std((0, 2, 3), correction=0), 1, atol=1e-3)


def test_a_channel_without_contrast_is_only_shifted(tmp_path):
    image = np.stack([np.full((4, 4), 9), np.arange(16).reshape(4, 4)]).astype(np.uint8)
    normaliser = normalisation.build(Normalise(method="standard"), stored(tmp_path / "a.arrow", [image]), [0])
    assert normaliser.std[0] == 1
    assert normaliser(torch.from_numpy(image[None]))[0, 0].abs().max() == 0


def test_imagenet_is_the_usual_formula_and_knows_its_channels(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (3, 4, 4)).astype(np.uint8)
    normaliser = normalisation.build(Normalise(method="imagenet"), stored(tmp_path / "a.arrow", [image]), [0])
    expected = (image / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    assert np.allclose(normaliser(torch.from_numpy(image[None]))[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="got imagenet for 2 channels"):
        normalisation.imagenet(2)


def test_statistics_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="image has 2 channels; statistics are of 1"):
        Normaliser(method="standard", mean=(0.0,), std=(1.0,))(torch.zeros(1, 2, 4, 4))


def test_a_normaliser_survives_json_and_stays_equal():
    first = Normaliser(method="standard", mean=(1.5, 0.1), std=(2.0, 3.0))
    again = normalisation.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    assert hash(again) == hash(first)


@pytest.mark.parametrize("method", ["unit", "percentile", "standard", "imagenet", "none"])
def test_input_is_left_alone_and_output_is_new(method):
    image = torch.rand(2, 1, 4, 4)
    before = image.clone()
    Normaliser(method=method, mean=(0.5,), std=(2.0,))(image).zero_()
    assert torch.equal(image, before)


def test_percentiles_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"low: got 99\.5 with high 0\.5"):
        Normalise(low=99.5, high=0.5)


@pytest.mark.parametrize("method", ["unit", "imagenet", "standard", "none"])
def test_black_is_what_a_stored_zero_becomes(method):
    numbers = {"mean": (0.5, 0.4, 3.0), "std": (0.2, 0.25, 2.0)} if method in ("imagenet", "standard") else {}
    normaliser = Normaliser(method=method, **numbers)
    stored = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    expected = torch.tensor(normaliser.black).view(1, -1, 1, 1).expand(1, 3, 1, 1)
    torch.testing.assert_close(normaliser(stored), expected)
