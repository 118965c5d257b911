"""Every network gives finite logits at any size and learns with every parameter; the golden numbers hold."""

import typing

import pytest
import torch
from safetensors.torch import save_file

import configuration
from segmentation.checkpoints import fill
from segmentation.epoch import DataError
from segmentation.losses import Loss
from segmentation.losses import build as build_loss
from segmentation.networks import NETWORKS, Network, build, parameter_count, without_weights
from segmentation.networks.attention_unet import AttentionGate
from segmentation.networks.cost import macs
from segmentation.networks.tinyunet import TinyUNet
from segmentation.networks.unet import UNet
from segmentation.outputs import Outputs

torch.set_num_threads(1)


def small(name, **changes):
    return Network(name=name, **{"base": 4, "depth": 2, "encoder": "resnet10t", "cat_channels": 4, **changes})


@pytest.fixture(params=sorted(NETWORKS))
def name(request):
    return request.param


def test_the_config_offers_every_network():
    choices = typing.get_type_hints(Network)["name"].__args__
    assert set(choices) == set(NETWORKS)
    assert all(field.help for field in configuration.fields(Network).values())


@pytest.mark.row("A9")
@pytest.mark.row("P42")
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 70)])
def test_any_size_gives_finite_logits_of_that_size(name, size):
    torch.manual_seed(0)
    model = build(small(name), 3, 5)
    for mode in (model.train(), model.eval()):
        logits = mode(torch.randn(1, 3, *size))
        assert logits.shape == (1, 5, *size)
        assert torch.isfinite(logits).all()


@pytest.mark.row("P42")
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build(small(name), 1, 3)
    for parameter in model.parameters():
        if not parameter.any():  # timm's residual branches begin at zero, and hide what is behind them
            torch.nn.init.normal_(parameter)
    model(torch.randn(2, 1, 32, 32)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_padding_does_not_touch_an_image_whose_size_divides(name):
    torch.manual_seed(0)
    model = build(small(name), 1, 2).eval()
    image = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(model(image), model._logits(image), rtol=0, atol=0)


def test_a_state_dict_fills_a_second_network_to_the_same_logits(name):
    torch.manual_seed(0)
    first, second = build(small(name), 2, 3).eval(), build(small(name), 2, 3).eval()
    image = torch.randn(1, 2, 40, 24)
    assert not torch.equal(first(image), second(image))
    fill(second, first.state_dict(), source="memory")
    assert torch.equal(first(image), second(image))


@pytest.mark.row("A8")
def test_tinyunet_is_the_telescope_network():
    model = TinyUNet(1, 3, 32)
    assert parameter_count(model) == 235_683
    assert [key for key, _ in model.named_children()] == ["enc1", "enc2", "bott", "up1", "dec1", "up2", "dec2", "outc"]
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.row("A9")
def test_tinyunet_takes_its_base_and_dropout():
    model = build(Network(name="tinyunet", base=16, dropout=0), 1, 3)
    assert model.outc.in_channels == 16
    image = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(image), model(image))


@pytest.mark.row("A10")
def test_dropout_makes_training_passes_differ_and_evaluation_passes_equal():
    torch.manual_seed(0)
    model, image = TinyUNet(dropout=0.25), torch.randn(2, 1, 32, 32)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.row("P1")
@pytest.mark.parametrize(
    ("widths", "bottleneck", "count"),
    [
        ((64, 128, 256, 512), 1024, 31_036_676),
        ((16, 32, 64, 128), 256, 1_942_340),
        ((64, 128, 256, 512, 512), 1024, 43_886_340),
    ],
)
def test_unet_has_the_golden_number_of_parameters(widths, bottleneck, count):
    with torch.device("meta"):
        assert parameter_count(UNet(1, 4, widths, bottleneck)) == count
        assert parameter_count(build(Network(widths=widths, bottleneck=bottleneck), 1, 4)) == count


@pytest.mark.row("P41")
@pytest.mark.parametrize(
    ("widths", "bottleneck", "count"),
    [((64, 128, 256, 512), 1024, 48_104_472_576), ((16, 32, 64, 128), 256, 3_016_753_152)],
)
def test_unet_costs_the_golden_number_of_multiplications(widths, bottleneck, count):
    total = 0

    def add(module, inputs, output):
        nonlocal total
        kernel = module.weight.numel() if isinstance(module, torch.nn.Conv2d) else module.weight.numel() // 4
        total += kernel * output.shape[-2] * output.shape[-1]

    with torch.device("meta"):
        model = UNet(1, 4, widths, bottleneck)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(add)
        model(torch.zeros(1, 1, 256, 256))
    assert total == count
    assert macs(model, 1, 256, 256) == count


@pytest.mark.row("P1")
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_unet_takes_any_depth_and_any_widths(depth):
    widths, decoder = (3, 7, 5, 6, 2)[:depth], (4, 9, 1, 8, 5)[:depth]
    model = build(Network(widths=widths, bottleneck=11, decoder_widths=decoder), 2, 3)
    assert [block.net[0].out_channels for block in model.encoders] == list(widths)
    ups, blocks = model.decoders[::2], model.decoders[1::2]
    assert [(up.in_channels, up.out_channels) for up in ups] == list(zip((11, *decoder), decoder, strict=False))
    inputs = [skip + width for skip, width in zip(reversed(widths), decoder, strict=True)]
    assert [(block.net[0].in_channels, block.net[3].out_channels) for block in blocks] == list(
        zip(inputs, decoder, strict=True)
    )
    assert model(torch.randn(2, 2, 40, 33)).shape == (2, 3, 40, 33)


@pytest.mark.row("P1")
def test_a_decoder_as_wide_as_the_encoder_is_the_default():
    torch.manual_seed(0)
    first = build(Network(widths=(4, 6)), 1, 2).state_dict()
    torch.manual_seed(0)
    second = build(Network(widths=(4, 6), decoder_widths=(6, 4)), 1, 2).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.row("P1")
def test_the_skip_stands_before_what_comes_from_below():
    model = build(Network(widths=(3,), bottleneck=4, decoder_widths=(5,)), 1, 2).eval()
    given = []
    model.decoders[1].register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    image = torch.randn(1, 1, 16, 16)
    model(image)
    skip = model.encoders[0](image)
    below = model.decoders[0](model.bottleneck(torch.nn.functional.max_pool2d(skip, 2)))
    assert torch.equal(given[0], torch.cat([skip, below], 1))


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_unet_takes_every_norm(norm):
    model = build(small("unet", norm=norm, dropout=0.1), 1, 2)
    assert torch.isfinite(model(torch.randn(2, 1, 16, 16))).all()


@pytest.mark.parametrize("encoder", ["convnext_atto", "efficientnet_b0", "hrnet_w18_small"])
def test_timm_encoders_with_other_strides_give_logits_of_the_image_size(encoder):
    model = build(Network(name="timm_unet", encoder=encoder), 3, 3).eval()
    assert model(torch.zeros(1, 3, 65, 64)).shape == (1, 3, 65, 64)


def test_timm_unet_uses_as_many_levels_as_asked():
    model = build(small("timm_unet", encoder_levels=3, decoder_widths=(16, 8, 4)), 1, 2)
    assert model.strides == [2, 4, 8]
    assert model.head.in_channels == 4


def test_a_misspelt_encoder_is_named_with_its_neighbour():
    with pytest.raises(ValueError, match=r"no model 'resnet1O'; did you mean .*resnet1"):
        build(Network(name="timm_unet", encoder="resnet1O"), 3, 2)


def test_too_many_levels_are_refused():
    with pytest.raises(ValueError, match="encoder_levels"):
        build(Network(name="timm_unet", encoder="resnet10t", encoder_levels=9), 3, 2)


KINDS = ("unet", "attention_unet", "unetplusplus")


@pytest.mark.row("P42")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_kinds_of_unet_take_norm_dropout_and_widths(name, norm):
    model = build(small(name, norm=norm, dropout=0.5, widths=(3, 5), bottleneck=6), 1, 2)
    assert not [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    image = torch.randn(2, 1, 16, 16)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image)) and torch.isfinite(model(image)).all()


@pytest.mark.row("P42")
def test_an_attention_gate_weighs_the_skip_as_the_paper_says():
    gate = AttentionGate(2, 3, (2, 2))
    skip, below = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 2, 3)
    theta, phi, psi = gate.theta.weight[0], gate.phi.weight[0, :, 0, 0], gate.psi.weight.item()
    weights = torch.empty(2, 3)
    for y in range(2):
        for x in range(3):
            place = skip[0, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            query = ((theta * place).sum() + phi @ below[0, :, y, x] + gate.phi.bias).relu()
            weights[y, x] = 1 / (1 + torch.exp(-(psi * query + gate.psi.bias)))
    enlarged = torch.nn.functional.interpolate(weights[None, None], size=(4, 6), mode="bilinear")
    torch.testing.assert_close(gate(skip, below), skip * enlarged)
    # What passes is between nothing and all of the skip.
    assert (gate(skip, below).abs() < skip.abs()).all()


@pytest.mark.row("P42")
def test_attention_gates_stand_on_every_skip_and_open_gates_make_it_a_unet():
    torch.manual_seed(0)
    model = build(small("attention_unet", widths=(3, 4), decoder_widths=(6, 5)), 1, 2).eval()
    plain = UNet(1, 2, (3, 4), 8, decoder_widths=(6, 5)).eval()
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    image = torch.randn(1, 1, 32, 32)
    assert [(gate.theta.in_channels, gate.phi.in_channels) for gate in model.gates] == [(4, 8), (3, 6)]
    assert not torch.allclose(model(image), plain(image))
    for gate in model.gates:
        torch.nn.init.constant_(gate.psi.bias, 50.0)
    torch.testing.assert_close(model(image), plain(image))


@pytest.mark.row("P42")
def test_every_node_of_unetplusplus_reads_all_nodes_to_its_left_and_the_one_below():
    model = build(small("unetplusplus", depth=3), 1, 2).eval()
    given, made = {}, {}

    def note(key):
        def hook(module, inputs, output):
            given[key], made[key] = inputs[0], output

        return hook

    for i, encoder in enumerate(model.encoders):
        encoder.register_forward_hook(note((i, 0)))
    for i, row in enumerate(model.nodes):
        for j, node in enumerate(row, start=1):
            node.register_forward_hook(note((i, j)))
    logits = model(torch.randn(1, 1, 32, 32))
    assert set(made) == {(i, j) for i in range(4) for j in range(4 - i)}
    for i, j in made:
        if j:
            up = model.ups[i][j - 1](made[i + 1, j - 1])
            assert torch.equal(given[i, j], torch.cat([*(made[i, k] for k in range(j)), up], 1))
    assert torch.equal(logits, model.final_conv(made[0, 3]))


@pytest.mark.row("P42")
def test_unetplusplus_is_supervised_at_every_node_of_the_finest_level_in_training():
    torch.manual_seed(0)
    model = build(small("unetplusplus", depth=3, deep_supervision=True), 1, 2)
    torch.manual_seed(0)
    without = build(small("unetplusplus", depth=3), 1, 2)
    image, made = torch.randn(2, 1, 33, 40), {}
    for j, node in enumerate(model.nodes[0], start=1):
        node.register_forward_hook(lambda module, inputs, output, j=j: made.update({j: output}))
    outputs = model(image)
    assert isinstance(outputs, Outputs) and torch.equal(outputs.logits, without(image))
    for at, (logits, head) in enumerate(zip(outputs.auxiliary, model.side_heads, strict=True)):
        assert torch.equal(logits, head(made[2 - at])[..., :33, :40])
    loss = build_loss(Loss(), multilabel=False)(outputs, torch.zeros(2, 33, 40, dtype=torch.int64))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.eval()(image), torch.Tensor)


@pytest.mark.parametrize(("name", "levels"), [("timm_unet", 5), ("unet", 2), ("attention_unet", 2)])
def test_wrong_decoder_widths_are_refused(name, levels):
    with pytest.raises(ValueError, match=f"decoder_widths: got .* expected {levels} widths"):
        build(small(name, decoder_widths=(8, 4, 2)), 3, 2)


@pytest.mark.row("X13")
def test_pretrained_without_weights_fails_with_name_and_alternatives(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'resnet10t'.*weights_path.*pretrained=false"):
        build(small("timm_unet", pretrained=True), 3, 2)


@pytest.mark.row("X13")
def test_an_encoder_that_was_never_published_fails():
    with pytest.raises(DataError, match=r"'mobilenetv2_035'.*weights_path.*pretrained=false"):
        build(Network(name="timm_unet", encoder="mobilenetv2_035", pretrained=True), 3, 2)


@pytest.mark.row("X13")
def test_a_network_that_a_checkpoint_fills_needs_no_published_weights():
    config = small("timm_unet", pretrained=True, weights_path="/nowhere/w.safetensors")
    assert parameter_count(build(without_weights(config), 3, 2)) == parameter_count(build(small("timm_unet"), 3, 2))


@pytest.mark.row("X13")
def test_a_missing_weights_file_is_named():
    with pytest.raises(DataError, match=r"no file /nowhere/w\.safetensors.*pretrained=false"):
        build(small("timm_unet", weights_path="/nowhere/w.safetensors"), 3, 2)


@pytest.mark.row("X13")
def test_weights_of_a_file_fill_the_encoder_and_fit_its_channels(tmp_path):
    import timm

    torch.manual_seed(1)
    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    path = str(tmp_path / "resnet.safetensors")
    model = build(small("timm_unet", weights_path=path), 3, 2)
    torch.testing.assert_close(model.encoder.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    grey = build(small("timm_unet", weights_path=path), 1, 2)
    torch.testing.assert_close(grey.encoder.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))


@pytest.mark.row("X13")
def test_weights_of_another_encoder_are_refused_rather_than_left_random(tmp_path):
    import timm

    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "other.safetensors")
    config = Network(
        name="timm_unet", encoder="mobilenetv3_small_050", weights_path=str(tmp_path / "other.safetensors")
    )
    with pytest.raises(DataError, match="mobilenetv3_small_050"):
        build(config, 3, 2)
    unfilled = {key: value for key, value in timm.create_model("resnet10t").state_dict().items() if "layer3" not in key}
    save_file(unfilled, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match="resnet10t"):
        build(small("timm_unet", weights_path=str(tmp_path / "part.safetensors")), 3, 2)


@pytest.mark.parametrize(
    "values",
    [
        {"base": 0},
        {"depth": 0},
        {"dropout": 1.0},
        {"widths": (0,)},
        {"bottleneck": -1},
        {"encoder_levels": -1},
        {"cat_channels": 0},
    ],
)
def test_impossible_networks_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Network(**values)


@pytest.mark.row("S36")
@pytest.mark.row("S38")
@pytest.mark.parametrize(("encoder", "count"), [("resnet34", 24_436_369), ("resnet50", 32_521_105)])
def test_the_librarys_unet_has_its_number_of_parameters(encoder, count):
    """Those of smp.Unet with its own encoder of that name."""
    model = build(Network(name="smp_unet", encoder=encoder), 3, 1).eval()
    assert parameter_count(model) == count
    for size in ((256, 1024), (250, 1000)):
        with torch.inference_mode():
            assert model(torch.zeros(1, 3, *size)).shape == (1, 1, *size)


@pytest.mark.row("S37")
@pytest.mark.parametrize(("encoder", "nodes", "sides"), [("resnet10t", 10, 3), ("convnext_atto", 10, 2)])
def test_the_librarys_nested_unet_is_scored_at_its_finest_nodes(encoder, nodes, sides):
    torch.manual_seed(0)
    model = build(small("smp_unetplusplus", encoder=encoder, deep_supervision=True), 3, 2)
    with_skips = [name for name in model.decoder.blocks if name != f"x_0_{model.decoder.depth}"]
    assert len(with_skips) == nodes == model.decoder.depth * (model.decoder.depth + 1) // 2
    image = torch.randn(2, 3, 60, 90)
    outputs = model(image)
    assert isinstance(outputs, Outputs) and len(outputs.auxiliary) == sides
    assert all(logits.shape == outputs.logits.shape == (2, 2, 60, 90) for logits in outputs.auxiliary)
    loss = build_loss(Loss(aux_weight=0.4), multilabel=False)(outputs, torch.zeros(2, 60, 90, dtype=torch.int64))
    loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.side_heads)
    assert isinstance(model.eval()(image), torch.Tensor)


def test_attention_of_the_library_is_built_and_learns():
    plain, weighed = (build(small("smp_unet", attention=kind), 3, 2) for kind in ("none", "scse"))
    assert parameter_count(weighed) > parameter_count(plain)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norm": "group"}, "norm: got group; smp_unet has batch, instance, none"),
        ({"decoder_widths": (8, 4)}, r"decoder_widths: got \[8, 4\]; expected 5 widths for this encoder"),
        ({"encoder": "vit_tiny_patch16_224"}, "encoder: 'vit_tiny_patch16_224'"),
    ],
)
def test_what_the_library_cannot_build_is_told(changes, text):
    with pytest.raises(ValueError, match=text):
        build(small("smp_unet", **changes), 3, 2)
