"""Recomputed stages and a compiled network: the same gradients, statistics and names as without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segmentation import economy, networks, strategy, training
from segmentation.networks import Network
from segmentation.training import TrainingConfig

NETWORKS = {
    "tinyunet": Network(name="tinyunet", base=4),
    "unet": Network(name="unet", widths=(4, 8)),
    "attention_unet": Network(name="attention_unet", widths=(4, 8)),
    "unetplusplus": Network(name="unetplusplus", widths=(4, 8)),
    "timm_unet": Network(name="timm_unet", decoder_widths=(8, 4, 4), encoder_levels=3),
    "unet3plus": Network(name="unet3plus", encoder="plain", widths=(4, 8), cat_channels=4),
    "unet3plus_simplified": Network(name="unet3plus_simplified", encoder="plain", widths=(4, 8), cat_channels=4),
    "smp_unet": Network(name="smp_unet", decoder_widths=(8, 4, 4), encoder_levels=3),
    "smp_unetplusplus": Network(name="smp_unetplusplus", decoder_widths=(8, 4, 4), encoder_levels=3),
}


def made(name: str) -> nn.Module:
    training.seed_everything(0)
    return networks.build(NETWORKS[name], 1, 2).train()


def passed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return gradients and buffers after one pass."""
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    training.seed_everything(1)
    model(image).float().square().mean().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {**gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.row("K41")
def test_recomputed_stages_give_equal_gradients_and_statistics(name):
    plain, saving = made(name), made(name)
    economy.recompute_stages(saving)
    runs = {"inside": 0}
    stage = next(economy.stages(saving))
    first = next(layer for layer in stage.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_hook(lambda *_: runs.update(inside=runs["inside"] + 1))
    ours, other = passed(saving), passed(plain)
    assert runs["inside"] == 2, "forward, and again in the backward pass"
    assert ours.keys() == other.keys()
    for key, value in other.items():
        torch.testing.assert_close(ours[key], value)
    assert saving.state_dict().keys() == plain.state_dict().keys()
    economy.keep_stages(saving)
    passed(saving)
    assert runs["inside"] == 3


@pytest.mark.parametrize("encoder", ["efficientnet_b0", "mobilenetv3_small_100", "resnet18", "convnext_atto"])
def test_every_stage_of_an_encoder_is_recomputed(encoder):
    model = networks.build(Network(name="unet3plus", encoder=encoder, cat_channels=4, encoder_levels=3), 1, 2).train()
    economy.recompute_stages(model)
    found, runs = list(economy.stages(model.encoder)), {}
    assert len(found) >= 2
    for number, stage in enumerate(found):
        first = next(layer for layer in stage.modules() if isinstance(layer, nn.Conv2d))
        first.register_forward_hook(lambda *_, number=number: runs.update({number: runs.get(number, 0) + 1}))
    passed(model)
    assert runs == dict.fromkeys(range(len(found)), 2)


def test_every_network_is_looked_at():
    assert NETWORKS.keys() == networks.NETWORKS.keys()


def test_a_network_without_stages_says_so(caplog):
    economy.recompute_stages(nn.Conv2d(1, 2, 3))
    assert "Conv2d has no stages" in caplog.text


def counted(monkeypatch, fail: bool):
    """Replace the compiler: one that counts its calls, or that fails at the first of them."""
    calls = []

    def compiler(call):
        def compiled(*inputs):
            calls.append(len(inputs))
            if fail:
                raise economy.TorchDynamoException("no compiler was found\nand more")
            return call(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return calls


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.row("K41")
def test_a_compiled_network_keeps_its_names_and_one_that_fails_goes_on_as_it_is(monkeypatch, caplog, fail):
    calls = counted(monkeypatch, fail)
    plain, ours = made("unet"), made("unet")
    economy.compile_network(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for key, value in passed(plain).items():
        torch.testing.assert_close(passed(copy.deepcopy(ours))[key], value)
    passed(ours), passed(ours)
    assert len(calls) == (1 if fail else 2)
    assert ("compile: the network cannot be compiled here" in caplog.text) == fail
    assert ("no compiler was found" in caplog.text) == fail and "and more" not in caplog.text
    economy.drop_compiled(ours)
    passed(ours)
    assert len(calls) == (1 if fail else 2)


def test_where_nothing_compiles_there_is_a_notice(monkeypatch, caplog):
    def refuse(call):
        raise RuntimeError("torch.compile is not supported here")

    monkeypatch.setattr(torch, "compile", refuse)
    model = made("unet")
    economy.compile_network(model)
    assert "torch.compile is not supported here" in caplog.text
    passed(model)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.row("K41")
def test_the_real_compiler_gives_equal_gradients(caplog):
    plain, ours = made("unet"), made("unet")
    economy.compile_network(ours)
    found, other = passed(ours), passed(plain)
    economy.drop_compiled(ours)
    assert not caplog.records
    for key, value in other.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(ValueError, match="zero_stage: got 4; expected 0, 1, 2 or 3"):
        TrainingConfig(zero_stage=4)
    assert strategy.Single.local
