"""The sweep of the learning rate: what it reads from a curve, and that it leaves nothing behind."""

import math
import random

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from segmentation import lr_finder, training
from segmentation.epoch import NoFallError
from segmentation.networks.parts import conv
from segmentation.training import Parts, TrainingConfig

torch.set_num_threads(1)
pytestmark = pytest.mark.row("P40")
RATES = np.geomspace(1e-7, 1, 100)


def curve(rates):
    """Fall around 1e-3 and rise around 1e-1."""
    rates = np.asarray(rates)
    return 1 - 0.8 / (1 + (1e-3 / rates) ** 2) + 1.6 / (1 + (1e-1 / rates) ** 2)


def parts(seed=0, loss=None):
    """Return a network with batch norm and dropout on a task that it can learn."""
    training.seed_everything(seed)
    model = nn.Sequential(*conv(1, 4), nn.Dropout2d(0.1), nn.Conv2d(4, 2, 1))
    image = torch.randn(3, 4, 1, 8, 8)
    batches = [(each, (each[:, 0] > 0).long(), torch.arange(4)) for each in image]
    return Parts(model, loss or nn.functional.cross_entropy, lambda epoch: batches)


def config(**changes):
    return TrainingConfig(**{"device": "cpu", "optimizer": "sgd", "weight_decay": 0.0, **changes})


def test_the_steepest_fall_is_suggested_and_the_rise_bounds_the_search():
    found = lr_finder.read(RATES.tolist(), curve(RATES).tolist(), 100)
    assert found.suggested == pytest.approx(1e-3, rel=0.2)
    assert found.low == pytest.approx(found.suggested / 10)
    # From 1 it falls to about 0.2; half of that is lost where it is 0.6 again: 1.6 / (1 + (0.1 / rate)^2) = 0.4.
    assert found.high == pytest.approx(0.1 / math.sqrt(3), rel=0.25)


def test_noise_does_not_move_it_far():
    noise = np.random.default_rng(0).normal(0, 0.05, len(RATES))
    found = lr_finder.read(RATES.tolist(), (curve(RATES) + noise).tolist(), 100)
    assert 10**-3.5 < found.suggested < 10**-2.5
    assert 0.02 < found.high < 0.15


def test_a_loss_that_never_rises_bounds_the_search_by_the_last_rate():
    found = lr_finder.read(RATES.tolist(), (1 - 0.8 / (1 + (1e-3 / RATES) ** 2)).tolist(), 100)
    assert found.high == 1.0


@pytest.mark.parametrize("losses", [[], [1.0] * 100, np.linspace(1, 2, 100).tolist()])
def test_a_loss_that_never_falls_is_an_error(losses):
    with pytest.raises(NoFallError, match=f"falls at no learning rate, in {len(losses)} steps"):
        lr_finder.read(RATES[: len(losses)].tolist(), losses, 100)


def test_smoothing_is_the_mean_with_its_neighbours():
    assert lr_finder.smooth([0, 3, 6, 3, 0], 20).tolist() == [1.5, 3, 4, 3, 1.5]


def test_the_rates_rise_by_one_factor_and_training_follows_them(monkeypatch):
    set_to = []
    monkeypatch.setattr(
        training.Single, "set_lr", lambda self, lr: set_to.append(lr) or self.optimizer.param_groups[0].update(lr=lr)
    )
    found = lr_finder.find(config(), parts(), steps=40)
    assert len(found.rates) == len(found.losses) == len(set_to)
    assert list(found.rates) == pytest.approx(np.geomspace(1e-7, 1, 40)[: len(found.rates)].tolist())
    assert set_to == list(found.rates)
    assert found.losses[0] == pytest.approx(found.losses[3], rel=0.2)
    assert min(found.losses) < 0.8 * found.losses[0]
    assert 1e-3 < found.suggested <= found.high <= 1


def test_it_stops_where_the_loss_diverges():
    """Of one weight under a square loss of curvature 20, where SGD diverges at rates above 2 / 20."""
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    batches = [(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), wanted), torch.zeros(1)) for wanted in (0.9, 1.1)]
    square = Parts(model, lambda output, mask: 10 * (output - mask).square().mean(), lambda epoch: batches)
    found = lr_finder.find(config(momentum=0.0), square, high=100.0, steps=200)
    assert 1e-3 < found.suggested < 0.1 < found.rates[-1] < 10
    assert len(found.rates) < 200
    assert found.suggested < found.high <= found.rates[-1]


def test_a_loss_that_is_no_number_ends_the_sweep():
    left = iter([1.0] * 20 + [0.5] * 20)

    def loss(output, mask):
        return output.mean() * 0 + next(left, math.nan)

    found = lr_finder.find(config(), parts(loss=loss), steps=60)
    assert len(found.losses) == 40


def test_weights_statistics_modes_and_random_states_are_as_before():
    given = parts()
    model = given.model
    optimizer = torch.optim.Adam(model.parameters())
    given.loss(model(torch.randn(2, 1, 8, 8)), torch.zeros(2, 8, 8, dtype=torch.int64)).backward()
    optimizer.step()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    moments = [value.clone() for each in optimizer.state.values() for value in each.values()]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    first = lr_finder.find(config(optimizer="adam"), given, steps=40)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    after = [value for each in optimizer.state.values() for value in each.values()]
    assert all(torch.equal(*pair) for pair in zip(after, moments, strict=True))
    assert all(torch.equal(own.grad, before) for own, before in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model] == [True, False, True, True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True, True]
    assert lr_finder.find(config(optimizer="adam"), given, steps=40) == first


def test_an_error_on_the_way_leaves_the_network_as_it_was():
    given = parts()
    state = {key: value.clone() for key, value in given.model.state_dict().items()}
    calls = iter(range(10))

    def loss(output, mask):
        if next(calls, None) is None:
            raise RuntimeError("broken")
        return nn.functional.cross_entropy(output, mask)

    with pytest.raises(RuntimeError, match="broken"):
        lr_finder.find(config(), Parts(given.model, loss, given.train_batches), steps=40)
    assert all(torch.equal(value, state[key]) for key, value in given.model.state_dict().items())


def test_an_epoch_without_batches_is_an_error():
    given = parts()
    with pytest.raises(ValueError, match="epoch 1 has no training batch"):
        lr_finder.find(config(), Parts(given.model, given.loss, lambda epoch: []), steps=20)


def test_the_line_is_yaml_that_a_search_space_takes():
    found = lr_finder.read(RATES.tolist(), curve(RATES).tolist(), 100)
    read = yaml.safe_load(found.search_line())["lr"]
    assert read["low"] == pytest.approx(found.low, rel=0.1) and read["high"] == pytest.approx(found.high, rel=0.1)
    assert (read["type"], read["log"]) == ("float", True)
    assert isinstance(read["low"], float) and isinstance(yaml.safe_load(lr_finder._yaml(1.0)), float)


def test_the_picture_is_written(tmp_path):
    found = lr_finder.read(RATES.tolist(), curve(RATES).tolist(), 100)
    assert lr_finder.draw(found, tmp_path / "new" / "lr.png").read_bytes().startswith(b"\x89PNG")
