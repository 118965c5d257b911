"""The ladder of checks: what is wired rightly passes, and each wrong wiring is found by the check meant for it."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from segmentation import losses, sanity
from segmentation.epoch import DataError
from segmentation.losses import Loss
from segmentation.outputs import Outputs
from segmentation.sanity import Known
from segmentation.training import Parts, TrainingConfig

torch.set_num_threads(1)
pytestmark = pytest.mark.row("E44")
SIZE, COUNT, BATCH = 8, 24, 8


def config(**changes):
    return TrainingConfig(**{"device": "cpu", "lr": 0.03, "weight_decay": 0.0, "batch_size": BATCH, **changes})


def network(classes=2, channels=1, width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, classes, 1))


def images(count=COUNT, seed=1):
    """Return images whose pixels have two classes, 0 more often."""
    image = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return image, (image[:, 0] > 0.5).long()


def wired(image, mask, model, *, loss=None, groups=None, train=16, batch=BATCH, order=None):
    """Return what is checked: the first `train` samples are trained on, the others validate."""
    multilabel = mask.dim() == 4
    loss = loss or losses.build(Loss(ce=not multilabel, bce=multilabel, dice=0), multilabel=multilabel)

    def some(indices):
        for at in range(0, len(indices), batch):
            chosen = torch.tensor(indices[at : at + batch])
            yield image[chosen], mask[chosen], chosen

    def of_epoch(epoch):
        drawn = torch.randperm(train, generator=torch.Generator().manual_seed(epoch)).tolist()
        return some(order or drawn)

    names = groups or list(map(str, range(len(image))))
    known = Known(some, tuple(range(train)), tuple(range(train, len(image))), names)
    return Parts(model, loss, of_epoch), known


def climb(*given, steps=200, **changes):
    parts, known = given
    return sanity.climb(config(**changes), parts, known, steps=steps)


def passed(rungs):
    return [rung.passed for rung in rungs]


class Deep(nn.Module):
    """Logits with those of a further level in training, as deep supervision has them."""

    def __init__(self):
        super().__init__()
        self.net, self.other = network(), network()

    def forward(self, image):
        logits = self.net(image)
        return Outputs(logits, (self.other(image),)) if self.training else logits


def right_wirings():
    image, mask = images()
    ignored = mask.masked_fill(torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.2, 255)
    coarse = functional.avg_pool2d(image, 4)
    several = torch.stack([mask, (image[:, 0] < -0.5).long()], 1)
    return {
        "two classes": wired(image, mask, network()),
        "ignored pixels": wired(image, ignored, network()),
        "channels that share pixels": wired(image, several, network()),
        "masks coarser than images": wired(
            image, (coarse[:, 0] > 0.1).long(), nn.Sequential(nn.AvgPool2d(4), *network())
        ),
        "deep supervision": wired(image, mask, Deep()),
        "batches of one": wired(image, mask, network(), batch=1),
    }


@pytest.mark.parametrize("name", right_wirings())
def test_what_is_wired_rightly_passes_all_checks(name):
    found = climb(*right_wirings()[name])
    assert passed(found) == [True, True, True], found
    assert [rung.name for rung in found] == ["initial loss", "overfit one batch", "shuffled inputs"]


def test_the_initial_loss_is_that_of_the_first_batches_and_zero_logits_lose_the_logarithm_of_the_classes():
    image, mask = images()
    mask = mask + (image[:, 0] > 1.5).long()
    parts, known = wired(image, mask, network(3))
    figures = sanity.initial_loss(config(), parts, known).figures
    assert figures["loss_of_zero_logits"] == pytest.approx(math.log(3))
    assert figures["entropy_of_zero_logits"] == pytest.approx(math.log(3))
    first = [*parts.train_batches(1), *parts.train_batches(2)]  # four batches
    with torch.inference_mode():
        logits = parts.model(torch.cat([each for each, _, _ in first]))
        truth = torch.cat([each for _, each, _ in first])
        turned = [functional.cross_entropy(logits.roll(turn, 1), truth).item() for turn in range(3)]
    assert figures["loss"] == figures["entropy"] == pytest.approx(turned[0], rel=1e-5)
    assert figures["loss_of_classes_exchanged"] == pytest.approx(sum(turned) / 3, rel=1e-5)


def test_zero_logits_go_through_the_workloads_own_loss():
    """Of no pixel of the second class, Dice of a half everywhere: 1 - (64 + 1) / (32 + 64 + 1) and 1 - 1 / (32 + 1)."""
    image, _ = images()
    loss = losses.build(Loss(ce=1, dice=1), multilabel=False)
    parts, known = wired(image, torch.zeros(COUNT, SIZE, SIZE, dtype=torch.int64), network(), loss=loss)
    blind = math.log(2) + (1 - 65 / 97 + 1 - 1 / 33) / 2
    assert sanity.initial_loss(config(), parts, known).figures["loss_of_zero_logits"] == pytest.approx(blind)


def test_channels_that_share_pixels_lose_the_logarithm_of_two():
    image, mask = images()
    parts, known = wired(image, torch.stack([mask] * 3, 1), network(3))
    rung = sanity.initial_loss(config(), parts, known)
    assert rung.figures["loss_of_zero_logits"] == pytest.approx(math.log(2))
    assert "binary cross-entropy ln 2 = 0.6931" in rung.expected


def head(change):
    model = network()
    with torch.no_grad():
        change(model[2])
    return model


@pytest.mark.parametrize(
    "model",
    [
        head(lambda layer: layer.weight.mul_(20)),
        head(lambda layer: layer.bias.copy_(torch.tensor([3.0, -3.0]))),
        nn.Sequential(network(), nn.Softmax(1)),
    ],
    ids=["too large weights", "a bias", "softmax"],
)
def test_a_last_layer_that_is_sure_of_itself_or_ends_in_a_softmax_fails_the_first_check(model):
    rung = sanity.initial_loss(config(), *wired(*images(), model))
    assert not rung.passed
    assert ("the logits are probabilities" in rung.measured) == isinstance(model[-1], nn.Softmax)


@pytest.mark.parametrize("lean", [0.4, -0.4])
def test_which_class_a_fresh_network_happens_to_prefer_is_not_held_against_it(lean):
    """Of a class that is hardly there, a logit of 0.4 moves the loss by a quarter, but says nothing."""
    image, _ = images()
    model = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, lean)
    mask = torch.zeros(COUNT, 1, SIZE, SIZE, dtype=torch.int64)
    mask[:, :, 0, 0] = 1
    rung = sanity.initial_loss(config(), *wired(image, mask, model))
    assert abs(rung.figures["loss"] / math.log(2) - 1) > 0.2
    assert rung.passed


def test_a_network_that_does_not_learn_fails_to_overfit():
    model = network()
    model[:2].requires_grad_(False)
    nn.init.zeros_(model[0].weight)
    rung = sanity.overfit(config(), *wired(*images(), model), steps=50)
    assert not rung.passed
    assert rung.figures["steps"] == 50
    assert rung.figures["accuracy"] == pytest.approx(rung.figures["majority"])


def test_masks_that_are_shifted_against_their_images_fail_to_overfit():
    image, mask = images()
    assert sanity.overfit(config(), *wired(image, mask, network()), steps=200).passed
    assert not sanity.overfit(config(), *wired(image, mask.roll(1, -1), network()), steps=200).passed


def test_a_network_that_ends_in_a_sigmoid_fails_to_overfit():
    """Its logits are never below 0, so that it calls all channels everywhere."""
    image, mask = images()
    model = nn.Sequential(network(1), nn.Sigmoid())
    assert not sanity.overfit(config(), *wired(image, mask[:, None], model), steps=100).passed


def test_accuracy_has_to_beat_the_most_frequent_class_by_half_of_what_that_leaves():
    """One of 64 pixels is of class 1: calling it nowhere has 63/64 right, which is above 0.95 and proves nothing."""
    image, _ = images()
    mask = torch.zeros(COUNT, SIZE, SIZE, dtype=torch.int64)
    mask[:, 0, 0] = 1
    blind = network()
    nn.init.zeros_(blind[0].weight)
    rung = sanity.overfit(config(), *wired(image, mask, blind), steps=100)
    assert rung.figures["majority"] == 63 / 64
    assert rung.figures["least"] == pytest.approx(127 / 128)
    assert rung.figures["accuracy"] == 63 / 64
    assert not rung.passed


@pytest.mark.parametrize("nothing", [0, 255])
def test_the_batch_is_the_first_with_two_classes_and_comes_as_it_is(nothing):
    image, mask = images()
    mask[8:16] = nothing
    parts, known = wired(image, mask, network(), order=[*range(8, 16), *range(8)])
    (seen, truth, index), majority = sanity._first_batch(parts, known)
    assert index.tolist() == list(range(8))
    assert torch.equal(seen, image[:8]) and torch.equal(truth, mask[:8])
    assert majority == pytest.approx(float((mask[:8] == 0).float().mean()))


def test_no_batch_with_two_classes_is_an_error():
    image, mask = images()
    with pytest.raises(DataError, match="no training batch has a pixel of a second class"):
        sanity.overfit(config(), *wired(image, mask * 0, network()))


def test_augmented_batches_are_not_what_is_learned_by_heart():
    """Training images are noise here; the samples as they are can be learned."""
    image, mask = images()
    parts, known = wired(image, mask, network())

    def noisy(epoch):
        for each, truth, index in parts.train_batches(epoch):
            yield torch.randn(each.shape), truth, index

    assert sanity.overfit(config(), Parts(parts.model, parts.loss, noisy), known, steps=200).passed


def test_dropout_is_switched_off_for_one_batch_and_comes_back():
    class Path(nn.Identity):
        drop_prob = 0.9

    model = nn.Sequential(nn.Dropout(0.9), Path(), *network())
    with sanity._without_dropout(model):
        assert (model[0].p, model[1].drop_prob) == (0.0, 0.0)
    assert (model[0].p, model[1].drop_prob) == (0.9, 0.9)
    assert sanity.overfit(config(), *wired(*images(), model), steps=200).passed
    assert model[0].p == 0.9


def scenes():
    """Return six scenes of four frames that hardly differ; their masks are the same."""
    image, mask = images(6)
    image = image.repeat_interleave(4, 0)
    return image + 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(3)), mask.repeat_interleave(
        4, 0
    )


def test_samples_that_belong_together_fail_shuffling_unless_they_are_one_group():
    """Batches of one scene each: an image dealt to another frame's mask still has the right one."""
    image, mask = scenes()
    order = list(range(16))
    given = {"order": order, "batch": 4}
    assert not sanity.shuffled(config(), *wired(image, mask, network(), **given)).passed
    groups = [str(number // 4) for number in range(24)]
    assert sanity.shuffled(config(), *wired(image, mask, network(), groups=groups, **given)).passed


class Copies(nn.Module):
    """A network to which the last channel, another program's mask, is added whatever it learns."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, image):
        sure = 20 * (image[:, 1:] - 0.5)
        return self.net(image[:, :1]) + torch.cat([-sure, sure], 1)


def test_an_answer_in_the_input_that_the_network_did_not_have_to_learn_fails_shuffling():
    image, mask = images()
    leaked = torch.cat([image, mask[:, None].float()], 1)
    assert not sanity.shuffled(config(), *wired(leaked, mask, Copies())).passed
    # As a channel to be learned from it is dealt to other masks with its image, so that nothing can be learned.
    assert sanity.shuffled(config(), *wired(leaked, mask, network(channels=2))).passed


def test_what_is_always_at_one_place_is_no_leak():
    """The left half is class 1 in all masks, which a network that sees the place may know."""
    image, _ = images()
    place = torch.linspace(-1, 1, SIZE).expand(COUNT, 1, SIZE, SIZE)
    mask = (place[:, 0] < 0).long()
    mask[:, 0, 0] = 0
    rung = sanity.shuffled(config(), *wired(torch.cat([image, place], 1), mask, network(channels=2)))
    assert rung.passed
    assert rung.figures["accuracy"] > 0.9
    assert rung.figures["baseline"] == 1.0
    assert rung.expected.endswith("of the most frequent class at each place")


def test_the_margin_is_three_standard_errors_of_the_difference_and_at_least_a_tenth_of_what_is_wrong():
    rung = sanity.shuffled(config(), *wired(*images(), network()))
    assert rung.figures["margin"] >= 0.1 * (1 - rung.figures["baseline"])
    model = network()
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([5.0, -5.0]))
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    same = sanity.shuffled(config(lr=1e-9), *wired(*images(), model)).figures  # class 0 everywhere, as the baseline
    assert same["accuracy"] == same["baseline"]
    assert same["margin"] == pytest.approx(0.1 * (1 - same["baseline"]))


def test_a_loss_that_is_no_number_fails_both_trainings():
    def loss(output, mask):
        return functional.cross_entropy(output, mask) * (math.nan if output.requires_grad else 1)

    found = climb(*wired(*images(), network(), loss=loss), steps=50)
    assert passed(found)[1:] == [False, False]
    assert found[1].figures["steps"] == 0


def test_no_row_meets_its_own_group():
    for seed in range(20):
        drawn = torch.Generator().manual_seed(seed)
        groups = random.Random(seed).choices("abcdefg", k=12)
        order = sanity.derange(groups, drawn)
        if order:
            assert sorted(order) == list(range(12))
            assert all(groups[row] != groups[other] for row, other in enumerate(order))
        else:
            assert max(map(groups.count, groups)) > 6
    assert sanity.derange("aab", torch.Generator()) == sanity.derange("a", torch.Generator()) == []


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_every_image_has_the_mask_of_another_sample_dealt_anew_each_epoch(batch):
    image = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 2, 2)
    parts, known = wired(image, image[:, 0].long(), network(), batch=batch)
    dealt = sanity.dealt_batches(parts, known, seed=0)

    def pairs(epoch):
        found = []
        for each, truth, index in dealt(epoch):
            assert torch.equal(truth[:, 0, 0], index)
            found += zip(each[:, 0, 0, 0].int().tolist(), index.tolist(), strict=True)
        return found

    first = pairs(1)
    assert len(first) >= 15
    assert all(own != other for own, other in first)
    assert first == pairs(1)
    assert set(first) != set(pairs(2))


def test_samples_of_one_group_alone_are_dealt_to_each_other():
    parts, known = wired(*images(), network(), groups=["all"] * COUNT)
    assert sum(len(index) for _, _, index in sanity.dealt_batches(parts, known, 0)(1)) == 16


def test_one_training_sample_cannot_be_shuffled():
    with pytest.raises(DataError, match="1 training sample; shuffled inputs need two"):
        sanity.shuffled(config(), *wired(*images(), network(), train=1))


def test_nothing_is_left_behind_and_the_same_seed_finds_the_same():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.1), *network())
    model[0].eval()
    given = wired(*images(), model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    threads = torch.get_num_threads()
    found = climb(*given, steps=20, threads=threads + 1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in itertools.islice(model, 2)] == [False, True]
    assert climb(*given, steps=20, threads=threads + 1) == found
    assert climb(*given, steps=20, seed=1) != found


def test_images_in_passes_give_the_same_figures():
    whole = sanity.initial_loss(config(), *wired(*images(), network())).figures
    parts = sanity.initial_loss(config(micro_batch=3), *wired(*images(), network())).figures
    assert parts == pytest.approx(whole, rel=1e-5)
    assert sanity.overfit(config(micro_batch=3), *wired(*images(), network()), steps=200).passed
