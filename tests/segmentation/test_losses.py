"""Every loss is near zero for a perfect prediction, finite for empty masks, and blind to ignored pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import configuration
from segmentation import losses
from segmentation.losses import LOSSES, Loss, build, build_per_image, read_target
from segmentation.outputs import Outputs

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


@pytest.mark.parametrize(("name", "multilabel"), CASES)
def test_autocast_changes_no_loss(name, multilabel):
    mask, logits = random_mask(multilabel, size=24), torch.randn(2, 3, 24, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = only(name, multilabel)(logits, mask)
    assert torch.equal(value, only(name, multilabel)(logits, mask))


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
        ({"aux_weight": -1.0}, "aux_weight"),
        ({"presence": -1.0}, "presence"),
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


@pytest.mark.row("K20")
def test_half_cross_entropy_and_half_dice_is_the_default():
    mask, logits = random_mask(False), torch.randn(2, 3, 12, 12)
    probability, truth = logits.softmax(1), F.one_hot(mask, 3).permute(0, 3, 1, 2)
    overlap, total = (probability * truth).sum((2, 3)), probability.sum((2, 3)) + truth.sum((2, 3))
    expected = 0.5 * F.cross_entropy(logits, mask) + 0.5 * (1 - (2 * overlap + 1) / (total + 1)).mean()
    torch.testing.assert_close(build(Loss(), multilabel=False)(logits, mask), expected)


def test_iou_worked_by_hand():
    # Probability 1/2 everywhere, 4 pixels, one of them true: overlap 1/2, union 2 + 1 - 1/2.
    logits, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1, 0], [0, 0]]]])
    assert only("iou", True)(logits, mask).item() == pytest.approx(1 - 1.5 / 3.5)


def test_ms_ssim_of_flat_images_worked_by_hand():
    # Probability 1/2 against 1 everywhere: nothing but luminance differs, and that counts at the coarsest scale.
    luminance = (2 * 0.5 + 1e-4) / (0.25 + 1 + 1e-4)
    for size, power in ((8, 1.0), (64, 0.3001 / (0.0448 + 0.2856 + 0.3001)), (176, 0.1333)):
        value = only("ms_ssim", True)(torch.zeros(1, 1, size, size), torch.ones(1, 1, size, size))
        assert value.item() == pytest.approx(1 - luminance**power, abs=2e-4)


def slow_similarity(first, second, valid):
    """Return luminance times structure, and structure alone, pixel by pixel in double precision."""
    reach = np.arange(11) - 5
    window = np.exp(-(reach[:, None] ** 2 + reach[None] ** 2) / (2 * 1.5**2))
    pad = [np.pad(each, 5) for each in (first, second, valid)]
    both, alone = np.zeros(first.shape), np.zeros(first.shape)
    for row, column in np.ndindex(first.shape):
        a, b, known = (each[row : row + 11, column : column + 11] for each in pad)
        if not (window * known).any():
            continue
        weight = window * known / (window * known).sum()
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
        covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
        alone[row, column] = (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)
        both[row, column] = alone[row, column] * (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return both, alone


def slow_ms_ssim(first, second, valid):
    """Return the similarity of two images at two scales, of sides that are even."""
    _, alone = slow_similarity(first, second, valid)
    fine = (alone * valid).sum() / valid.sum()
    quads = [each.reshape(each.shape[0] // 2, 2, -1, 2) for each in (first * valid, second * valid, valid)]
    share = quads[2].mean((1, 3))
    halves = [each.mean((1, 3)) / np.maximum(share, 1e-9) for each in quads[:2]]
    both, _ = slow_similarity(*halves, share)
    coarse = (both * share).sum() / share.sum()
    total = 0.0448 + 0.2856
    return fine ** (0.0448 / total) * coarse ** (0.2856 / total)


@pytest.mark.parametrize("ignored", [False, True])
def test_ms_ssim_is_that_of_a_loop_over_pixels(ignored):
    mask = random_mask(False, batch=1, size=24)
    mask = F.interpolate(mask[:, None, :6, :8].float(), size=(24, 32)).long()[:, 0]
    logits = 2 * F.one_hot(mask, 3).permute(0, 3, 1, 2) + torch.randn(1, 3, 24, 32)
    if ignored:
        mask[:, 3:10, 5:20] = 255
    valid = (mask[0] != 255).double().numpy()
    probability = logits.double().softmax(1)[0].numpy()
    expected = [1 - slow_ms_ssim(probability[k], (mask[0] == k).double().numpy(), valid) for k in range(3)]
    assert only("ms_ssim")(logits, mask).item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_similarity_of_whole_windows_is_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    _, expected = structural_similarity_index_measure(first, second, data_range=1.0, return_full_image=True)
    luminance, structure = losses._similarity(first, second, torch.ones_like(first))
    inner = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close((luminance * structure)[inner], expected[inner], rtol=1e-4, atol=1e-5)


def test_ms_ssim_counts_a_misplaced_outline_more_than_dim_probabilities():
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 12:36, 12:36] = 1
    dim, moved = (mask - 0.5) * 4, (mask.roll(4, -1) - 0.5) * 40
    loss = only("ms_ssim", True)
    assert loss(dim, mask) < loss(moved, mask)


@pytest.mark.row("K6")
def test_auxiliary_logits_are_scored_with_their_weight():
    mask, logits = random_mask(False), torch.randn(3, 2, 3, 12, 12)
    alone = [build(Loss(), multilabel=False)(each, mask) for each in logits]
    outputs = Outputs(logits[0], (logits[1], logits[2]))
    value = build(Loss(aux_weight=0.4), multilabel=False)(outputs, mask)
    torch.testing.assert_close(value, alone[0] + 0.4 * (alone[1] + alone[2]) / 2)
    value = build(Loss(aux_weight=0.7, aux_decay=True), multilabel=False)(outputs, mask)
    torch.testing.assert_close(value, alone[0] + 0.7 * (alone[1] + alone[2] / 2) / 1.5)
    torch.testing.assert_close(build(Loss(), multilabel=False)(Outputs(logits[0]), mask), alone[0])


@pytest.mark.row("K7")
@pytest.mark.parametrize("multilabel", [False, True])
def test_presence_is_the_binary_cross_entropy_of_what_an_image_has(multilabel):
    # The first image has classes 0 and 2 alone; the second is ignored as a whole.
    mask = torch.zeros(2, 4, 4, dtype=torch.long)
    mask[0, 0, 0], mask[1] = 2, 255
    if multilabel:
        mask = torch.stack([torch.where(mask == 255, 255, (mask == k).long()) for k in range(3)], 1)
    config = Loss(**{**OFF, "dice": 1.0}, presence=0.3)
    logits, presence = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    truth = torch.tensor([1.0, 0.0, 1.0])
    loss = build_per_image(config, multilabel=multilabel)
    extra = loss(Outputs(logits, presence=presence), mask) - loss(logits, mask)
    expected = 0.3 * F.binary_cross_entropy_with_logits(presence[0], truth)
    torch.testing.assert_close(extra, torch.stack([expected, torch.zeros(())]), atol=1e-5, rtol=1e-4)


def _reference(name, logits, mask):
    """Return the formulas of the basic_UNet system, written out."""
    probability, log = logits.softmax(1), logits.log_softmax(1)
    hot = F.one_hot(mask, logits.shape[1]).permute(0, 3, 1, 2).float()
    surprise = -(hot * log).sum(1)
    overlap = (probability * hot)[:, 1:].sum((0, 2, 3))
    both = probability[:, 1:].sum((0, 2, 3)) + hot[:, 1:].sum((0, 2, 3))
    terms = {
        "ce": surprise.mean(),
        "dice": 1 - ((2 * overlap + 1e-6) / (both + 1e-6)).mean(),
        "focal": (0.25 * (1 - (-surprise).exp()) ** 2 * surprise).mean(),
    }
    parts = {"ce_dice": (0.7, "ce", 0.3, "dice"), "dice_focal": (0.5, "dice", 0.5, "focal")}
    if name in terms:
        return terms[name]
    first, one, second, other = parts[name]
    return first * terms[one] + second * terms[other]


@pytest.mark.row("P52")
@pytest.mark.parametrize("name", ["ce", "dice", "ce_dice", "focal", "dice_focal"])
def test_losses_by_name_are_the_formulas_of_basic_unet(name):
    mask = random_mask(False, classes=4)
    logits = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(3))
    found = build(losses.named(name), multilabel=False)(logits, mask)
    torch.testing.assert_close(found, _reference(name, logits, mask))


@pytest.mark.row("P52")
def test_an_unknown_name_of_a_loss_is_refused():
    assert set(losses.NAMED) == {"ce", "dice", "ce_dice", "focal", "dice_focal"}
    with pytest.raises(ValueError, match="got 'dise'; expected one of ce, dice"):
        losses.named("dise")
