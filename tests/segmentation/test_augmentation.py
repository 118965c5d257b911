import dataclasses

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from segmentation import augmentation
from segmentation.augmentation import NONE, Augmentation
from segmentation.loading import generator
from segmentation.normalisation import IMAGENET_MEAN, IMAGENET_STD, Normaliser

MOVES = {"horizontal_flip": 1.0, "vertical_flip": 1.0, "rotate90": 1.0}
WARPS = {
    "rotate_degrees": 30.0,
    "scale": 0.3,
    "translate": 0.2,
    "elastic": 3.0,
    "grid_distortion": 0.4,
    "optical_distortion": 0.3,
}
COLOURS = {
    "brightness": 0.3,
    "brightness_factor": 0.3,
    "contrast": 0.3,
    "gamma": 0.5,
    "bias_field": 0.5,
    "blur": 1.5,
    "motion": 4.0,
    "noise": 0.2,
}


def only(**changed):
    return augmentation.build(dataclasses.replace(NONE, **changed))


def batch(count=6, size=16, channels=2):
    image = torch.rand(count, channels, size, size, generator=generator(1))
    return image, torch.randint(0, 3, (count, size, size), generator=generator(2))


def test_every_amount_is_tried_here():
    known = {field.name for field in dataclasses.fields(Augmentation)} - {"elastic_smoothness"}
    assert {*MOVES, *WARPS, *COLOURS} == {name for name in known if not name.endswith("_probability")}


def test_nothing_asked_for_is_the_identity():
    image, mask = batch()
    moved, moved_mask = augmentation.build(NONE)(image, mask, generator(0))
    assert torch.equal(moved, image)
    assert torch.equal(moved_mask, mask)


@pytest.mark.parametrize(("name", "amount"), [*MOVES.items(), *WARPS.items(), *COLOURS.items()])
def test_each_amount_changes_images_keeps_shapes_and_leaves_its_input_alone(name, amount):
    image, mask = batch()
    kept, kept_mask = image.clone(), mask.clone()
    moved, moved_mask = only(**{name: amount})(image, mask, generator(0))
    assert (moved.shape, moved.dtype, moved_mask.shape, moved_mask.dtype) == (
        image.shape,
        torch.float32,
        mask.shape,
        torch.int64,
    )
    assert not torch.equal(moved, image)
    assert moved.isfinite().all()
    assert torch.equal(image, kept)
    assert torch.equal(mask, kept_mask)


@pytest.mark.row("K22")
@pytest.mark.parametrize(("name", "amount"), COLOURS.items())
def test_colours_leave_the_mask_bit_for_bit(name, amount):
    image, mask = batch()
    assert torch.equal(only(**{name: amount})(image, mask, generator(0))[1], mask)


@pytest.mark.row("K22")
@pytest.mark.parametrize("planes", [False, True])
def test_flips_and_turns_move_image_and_mask_alike(planes):
    _, mask = batch(40)
    mask = torch.stack([mask, mask == 1], dim=1).long() if planes else mask
    image = (mask if planes else mask[:, None]).float()
    changed = dict.fromkeys(MOVES, 0.5)
    moved, moved_mask = only(**changed)(image, mask, generator(0))
    assert torch.equal(moved.long(), moved_mask if planes else moved_mask[:, None])
    ways = {
        tuple(turned.rot90(turns, (-2, -1)).flatten().tolist())
        for turned in (image[0], image[0].flip(-1))
        for turns in range(4)
    }
    seen = {tuple(only(**changed)(image[:1], mask[:1], generator(seed))[0].flatten().tolist()) for seed in range(80)}
    assert seen == ways


def test_warps_move_image_and_mask_alike():
    """A smooth ramp warped equals the ramp's own class map warped, but for pixels at the class border."""
    ramp = torch.linspace(0, 1, 64).expand(8, 1, 64, 64).contiguous()
    mask = (ramp[:, 0] > 0.5).long()
    moved, moved_mask = only(**WARPS)(ramp, mask, generator(0))
    away = (moved[:, 0] - 0.5).abs() > 0.03
    assert torch.equal((moved[:, 0] > 0.5)[away], (moved_mask == 1)[away])
    assert away.float().mean() > 0.8
    assert not torch.equal(moved_mask, mask)


def test_warps_never_make_up_a_class():
    _, mask = batch(20, 32)
    mask[mask == 1] = 255
    _, moved = only(**WARPS)(torch.rand(20, 1, 32, 32), mask, generator(0))
    assert set(moved.unique().tolist()) <= {0, 2, 255}


def test_a_turn_by_a_known_angle_is_that_of_torchvision(monkeypatch):
    monkeypatch.setattr(augmentation, "_uniform", lambda count, generator: torch.ones(count))
    disc = torch.zeros(1, 1, 33, 49)
    disc[..., 10:20, 12:30] = 1
    moved, _ = only(rotate_degrees=25.0)(disc, disc[:, 0].long(), generator(0))
    expected = transforms.rotate(disc, 25.0, interpolation=transforms.InterpolationMode.BILINEAR)
    opposite = transforms.rotate(disc, -25.0, interpolation=transforms.InterpolationMode.BILINEAR)
    assert min((moved - other).abs().max() for other in (expected, opposite)) < 1e-3


def test_a_shift_by_a_known_part_moves_that_many_pixels(monkeypatch):
    monkeypatch.setattr(augmentation, "_uniform", lambda count, generator: torch.ones(count))
    image, mask = batch(1, 16)
    moved, moved_mask = only(translate=0.25)(image, mask, generator(0))
    assert torch.allclose(moved[..., :12, :12], image[..., 4:, 4:], atol=1e-5)
    assert torch.equal(moved_mask[..., :12, :12], mask[..., 4:, 4:])


def test_draws_come_from_the_generator_alone():
    image, mask = batch()
    augment = augmentation.build(Augmentation(**{**WARPS, **COLOURS}))
    before = torch.get_rng_state()
    first = augment(image, mask, generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = augment(image, mask, generator(3)), augment(image, mask, generator(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("name", "amount"), [*WARPS.items(), *COLOURS.items()])
def test_every_sample_has_its_own_draw(name, amount):
    image, mask = batch(1)
    image, mask = image.expand(5, -1, -1, -1), mask.expand(5, -1, -1)
    moved, _ = only(**{name: amount})(image, mask, generator(0))
    assert len({tuple(one.flatten().tolist()) for one in moved}) == 5


def test_without_a_vertical_flip_the_top_stays_at_the_top():
    image = torch.zeros(50, 1, 16, 24)
    image[..., 0, :] = 1
    augment = augmentation.build(Augmentation(vertical_flip=0, rotate90=0, noise=0.01, brightness=0.01))
    for seed in range(5):
        moved, _ = augment(image, image[:, 0].long(), generator(seed))
        assert (moved[..., 0, :] > 0.5).all()
        assert (moved[..., 1:, :] < 0.5).all()


def test_quarter_turns_of_oblongs_are_refused():
    with pytest.raises(ValueError, match="rotate90: images are 24x16; set it to 0"):
        only(rotate90=0.5)(torch.zeros(1, 1, 16, 24), torch.zeros(1, 16, 24, dtype=torch.int64), generator(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("horizontal_flip", 1.5),
        ("contrast", 2.0),
        ("brightness_factor", 2.0),
        ("colour_probability", 1.1),
        ("noise_probability", 1.1),
        ("grid_distortion", 1.0),
        ("optical_distortion", 0.34),
        ("noise", -0.1),
        ("elastic_smoothness", 0.5),
    ],
)
def test_impossible_amounts_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        Augmentation(**{name: value})


@pytest.mark.row("K22")
def test_a_brightness_factor_multiplies_the_stored_values():
    """What is normalised afterwards is as if the picture had been multiplied before."""
    raw = torch.randint(0, 180, (40, 3, 8, 8), generator=generator(1), dtype=torch.uint8).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normaliser = Normaliser(method="imagenet", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    augment = augmentation.build(dataclasses.replace(NONE, brightness_factor=0.2), normaliser.black)
    image, mask = (raw / 255 - mean) / std, torch.zeros(40, 8, 8, dtype=torch.int64)
    stored = (augment(image, mask, generator(0))[0] * std + mean) * 255
    factor = (stored / raw.clamp_min(1)).amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(stored, raw * factor)
    assert 0.8 <= factor.min() < 0.85 and 1.15 < factor.max() <= 1.2


@pytest.mark.row("K22")
@pytest.mark.parametrize(("name", "amount"), COLOURS.items())
def test_changes_of_colour_come_with_their_probability(name, amount):
    image, mask = batch(1)
    image, mask = image.expand(400, -1, -1, -1), mask.expand(400, -1, -1)
    moved, _ = only(**{name: amount}, colour_probability=0.5)(image, mask, generator(0))
    changed = (moved != image).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6
    never, _ = only(**{name: amount}, colour_probability=0.0)(image, mask, generator(0))
    assert torch.equal(never, image)


OWN = ("elastic", "grid_distortion", "optical_distortion", "gamma", "bias_field", "blur", "motion", "noise")


@pytest.mark.parametrize("name", OWN)
def test_a_change_may_have_a_probability_of_its_own(name):
    image, mask = batch(1)
    image, mask = image.expand(400, -1, -1, -1), mask.expand(400, -1, -1)
    amount = {**WARPS, **COLOURS}[name]
    moved, _ = only(**{name: amount, f"{name}_probability": 0.3}, colour_probability=0.9)(image, mask, generator(0))
    changed = (moved - image).abs().flatten(1).amax(1) > 1e-4
    assert 0.22 < changed.float().mean() < 0.38


def test_a_distorted_grid_keeps_the_edges_and_moves_its_lines_by_hand(monkeypatch):
    """Cells of widths 1.5, 1, 1, 1, 0.5 out of five end at 0.3, 0.5, 0.7, 0.9 and 1 of the way."""
    cells = torch.tensor([[1.5, 1.0, 1.0, 1.0, 0.5]])
    moved = augmentation._stretched(cells, 10)[0] + (torch.arange(10) + 0.5) / 5 - 1
    from_left = (moved + 1) / 2
    expected = [0.075, 0.225, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.925, 0.975]
    torch.testing.assert_close(from_left, torch.tensor(expected))


@pytest.mark.row("S26")
def test_a_lens_moves_along_the_radius_by_its_square(monkeypatch):
    """In pixels of a picture twice as wide as high: half way to a corner r * r is a quarter."""
    monkeypatch.setattr(augmentation, "_uniform", lambda count, generator: torch.ones(count))
    config = dataclasses.replace(NONE, optical_distortion=0.2)
    grid = torch.zeros(1, 100, 200, 2)
    grid[0, 0, :5] = torch.tensor([[1.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    moved = augmentation._seen_through_a_lens(config, grid, generator(0))
    expected = torch.tensor([[1.2, 1.2], [0.525, 0.525], [1.16, 0.0], [0.0, 1.04], [0.0, 0.0]])
    torch.testing.assert_close(moved[0, 0, :5], expected)


def test_a_bias_field_is_smooth_and_multiplies_the_stored_values():
    flat, mask = torch.full((8, 2, 33, 33), 3.0), torch.zeros(8, 33, 33, dtype=torch.int64)
    augment = augmentation.build(dataclasses.replace(NONE, bias_field=0.5), black=(1.0,))
    field = (augment(flat, mask, generator(0))[0] - 1) / 2
    torch.testing.assert_close(field[:, 0], field[:, 1])
    torch.testing.assert_close(field[..., 16, 16], torch.ones(8, 2))
    fourth = field.log().diff(n=4, dim=-1)
    assert fourth.abs().max() < 1e-4 < field.log().diff(n=1, dim=-1).abs().max()


def test_motion_spreads_a_point_along_its_way(monkeypatch):
    monkeypatch.setattr(augmentation, "_uniform", lambda count, generator: torch.zeros(count))
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: torch.ones(*shape))
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    moved, _ = only(motion=2.0)(point, point[:, 0].long(), generator(0))
    expected = torch.zeros(9)
    expected[3:6] = 1 / 3
    torch.testing.assert_close(moved[0, 0, 4], expected, atol=1e-5, rtol=0)
    assert moved.sum() == pytest.approx(1, abs=1e-4)
