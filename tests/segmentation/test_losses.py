"""Every loss is near zero for a perfect prediction, finite for empty masks, and blind to ignored pixels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import configuration
from segmentation.losses import LOSSES, Loss, build, build_per_image, read_target

torch.set_num_threads(1)
OFF = dict.fromkeys(LOSSES, 0.0)
CASES = [
    (name, multilabel) for name in sorted(LOSSES) for multilabel in (False, True) if (name, multilabel) != ("ce", True)
]


def only(name, multilabel=False, **values):
    return build(Loss(**{**OFF, name: 1.0, **values}), multilabel=multilabel)


def random_mask(multilabel, classes=3, batch=2, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if multilabel:
        return torch.randint(0, 2, (batch, classes, size, size), generator=generator)
    return torch.randint(0, classes, (batch, size, size), generator=generator)


def perfect_logits(mask, multilabel, classes=3, confidence=40.0):
    hot = mask if multilabel else F.one_hot(mask, classes).permute(0, 3, 1, 2)
    return (hot.float() * 2 - 1) * confidence


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_a_perfect_prediction_costs_nearly_nothing(name, multilabel):
    mask = random_mask(multilabel)
    assert only(name, multilabel)(perfect_logits(mask, multilabel), mask) < 1e-4
    assert only(name, multilabel)(-perfect_logits(mask, multilabel), mask) > 0.3


@pytest.mark.parametrize(("name", "multilabel"), CASES)
@pytest.mark.parametrize("fill", [0, 255])
def test_empty_and_wholly_ignored_masks_give_finite_losses_and_gradients(name, multilabel, fill):
    mask = torch.full_like(random_mask(multilabel), fill)
    logits = torch.randn(2, 3, 12, 12, requires_grad=True)
    value = only(name, multilabel)(logits, mask)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_ignored_pixels_count_for_nothing(name, multilabel):
    mask, logits = random_mask(multilabel), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    mask[..., :5, :] = 255
    other = logits.clone()
    other[..., :5, :] = 100 * torch.randn(2, 3, 5, 12)
    loss = only(name, multilabel)
    torch.testing.assert_close(loss(logits, mask), loss(other, mask))
    torch.testing.assert_close(loss(logits, mask), loss(logits[..., 5:, :], mask[..., 5:, :]))


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_a_step_down_the_gradient_lowers_the_loss(name, multilabel):
    mask = random_mask(multilabel)
    logits = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = only(name, multilabel)
    before = loss(logits, mask)
    before.backward()
    assert logits.grad.abs().sum() > 0
    assert loss(logits.detach() - 0.1 * logits.grad / logits.grad.norm(), mask) < before


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_the_loss_of_a_batch_is_the_mean_of_its_images(name, multilabel):
    mask, logits = random_mask(multilabel), torch.randn(2, 3, 12, 12)
    alone = [only(name, multilabel)(logits[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(only(name, multilabel)(logits, mask), torch.stack(alone).mean())


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_half_precision_logits_are_scored_in_single(name, multilabel):
    mask, logits = random_mask(multilabel), torch.randn(2, 3, 12, 12).bfloat16()
    torch.testing.assert_close(only(name, multilabel)(logits, mask), only(name, multilabel)(logits.float(), mask))


def test_cross_entropy_is_torchs():
    mask, logits = random_mask(False), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(only("ce")(logits, mask), F.cross_entropy(logits, mask))
    weights = torch.tensor([0.2, 1.0, 3.0])
    weighted = F.cross_entropy(logits, mask, weight=weights, reduction="none").mean()
    torch.testing.assert_close(only("ce", class_weights=(0.2, 1.0, 3.0))(logits, mask), weighted)


def test_focal_at_gamma_zero_is_cross_entropy():
    mask, logits = random_mask(False), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(only("focal", focal_gamma=0.0)(logits, mask), F.cross_entropy(logits, mask))
    many = random_mask(True)
    torch.testing.assert_close(
        only("focal", True, focal_gamma=0.0)(logits, many), F.binary_cross_entropy_with_logits(logits, many.float())
    )


def test_focal_worked_by_hand():
    # One pixel, right class at probability 0.8: (1 - 0.8)^2 * -ln 0.8.
    logits = torch.tensor([0.8, 0.2]).log().view(1, 2, 1, 1)
    value = only("focal")(logits, torch.zeros(1, 1, 1, dtype=torch.long))
    assert value.item() == pytest.approx(0.04 * 0.22314355, rel=1e-5)


@pytest.mark.row("A11")
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.7)])
def test_half_bce_and_half_dice_is_the_telescope_formula(weights):
    mask, logits = random_mask(True), torch.randn(2, 3, 12, 12)
    probability, truth = logits.sigmoid(), mask.float()
    overlap, total = (probability * truth).sum((2, 3)), probability.sum((2, 3)) + truth.sum((2, 3))
    bce = F.binary_cross_entropy_with_logits(logits, truth)
    expected = weights[0] * bce + weights[1] * (1 - 2 * overlap / (total + 1e-6)).mean()
    loss = build(Loss(**{**OFF, "bce": weights[0], "dice": weights[1]}, dice_empty="legacy"), multilabel=True)
    torch.testing.assert_close(loss(logits, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.row("A12")
def test_legacy_dice_of_an_empty_mask_is_exactly_one_whatever_is_predicted():
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.long)
    for logits in (torch.full((2, 3, 8, 8), -40.0), torch.randn(2, 3, 8, 8), torch.full((2, 3, 8, 8), 40.0)):
        assert only("dice", True, dice_empty="legacy")(logits, mask).item() == 1.0


@pytest.mark.row("A12")
def test_smooth_dice_of_an_empty_mask_rewards_an_empty_prediction():
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.long)
    assert only("dice", True)(torch.full((2, 3, 8, 8), -40.0), mask) < 1e-6
    assert only("dice", True)(torch.full((2, 3, 8, 8), 40.0), mask) > 0.98


def test_dice_and_tversky_worked_by_hand():
    # Probability 1/2 everywhere, 4 pixels, one of them true: overlap 1/2, predicted 2, true 1.
    logits, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0]]]])
    assert only("dice", True)(logits, mask).item() == pytest.approx(1 - 2 / 4)
    value = only("tversky", True, tversky_alpha=0.3, tversky_beta=0.7)(logits, mask)
    assert value.item() == pytest.approx(1 - 1.5 / (1.5 + 0.3 * 1.5 + 0.7 * 0.5))


def test_pooled_dice_takes_the_batch_as_one_image():
    mask, logits = random_mask(False, batch=3), torch.randn(3, 3, 12, 12)
    joined = torch.cat(list(logits), dim=1).unsqueeze(0), torch.cat(list(mask), dim=0).unsqueeze(0)
    pooled = only("dice", dice_pooling="batch")
    torch.testing.assert_close(pooled(logits, mask), only("dice")(*joined))


def test_background_can_be_left_out_of_dice():
    mask, logits = random_mask(False), torch.randn(2, 3, 12, 12)
    per_class = [
        1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
        for p, t in zip(logits.softmax(1).unbind(1), F.one_hot(mask, 3).float().unbind(3), strict=True)
    ]
    torch.testing.assert_close(only("dice")(logits, mask), torch.stack(per_class).mean())
    torch.testing.assert_close(only("dice", dice_background=False)(logits, mask), torch.stack(per_class[1:]).mean())


def test_lovasz_of_hard_predictions_is_one_minus_the_iou():
    mask, called = random_mask(False), random_mask(False, seed=7)
    expected = []
    for image in range(2):
        ious = [
            ((mask[image] == k) & (called[image] == k)).sum() / ((mask[image] == k) | (called[image] == k)).sum()
            for k in range(3)
        ]
        expected.append(1 - torch.stack(ious).mean())
    value = only("lovasz")(perfect_logits(called, False, confidence=100.0), mask)
    torch.testing.assert_close(value, torch.stack(expected).mean())


@settings(max_examples=25, deadline=None)
@given(weights=st.tuples(*[st.floats(0.1, 3)] * 3), seed=st.integers(0, 100))
def test_the_whole_is_the_weighted_sum_of_its_parts(weights, seed):
    mask, logits = (
        random_mask(False, seed=seed),
        torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)),
    )
    names = ("ce", "dice", "lovasz")
    whole = build(Loss(**{**OFF, **dict(zip(names, weights, strict=True))}), multilabel=False)(logits, mask)
    parts = sum(weight * only(name)(logits, mask) for name, weight in zip(names, weights, strict=True))
    torch.testing.assert_close(whole, parts)


def test_each_image_has_its_own_number():
    mask, logits = random_mask(False, batch=4), torch.randn(4, 3, 12, 12)
    values = build_per_image(Loss(), multilabel=False)(logits, mask)
    assert values.shape == (4,)
    torch.testing.assert_close(values.mean(), build(Loss(), multilabel=False)(logits, mask))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 8, 8\).*\(2, 12, 12\)"):
        read_target(torch.zeros(2, 8, 8, dtype=torch.long), torch.zeros(2, 3, 12, 12), multilabel=False)


def test_cross_entropy_is_refused_where_classes_overlap():
    with pytest.raises(ValueError, match="give bce a weight"):
        build(Loss(), multilabel=True)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (OFF, "all are 0"),
        ({"dice": -1.0}, "dice"),
        ({"dice_smooth": 0.0}, "dice_smooth"),
        ({"class_weights": (-1.0,)}, "-1"),
    ],
)
def test_impossible_losses_are_refused(values, text):
    with pytest.raises(ValueError, match=text):
        Loss(**values)


def test_the_number_of_class_weights_is_checked():
    with pytest.raises(ValueError, match="one for each of 3"):
        only("ce", class_weights=(1.0, 2.0))(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))


def test_every_loss_has_a_weight():
    fields = configuration.fields(Loss)
    assert set(LOSSES) <= set(fields)
    assert all(field.help for field in fields.values())
