"""UNet 3+ reads every scale at every level, is supervised at each, leaves out absent classes, and can be frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from segmentation import economy, training
from segmentation.checkpoints import safetensors_weights
from segmentation.epoch import DataError
from segmentation.losses import Loss
from segmentation.losses import build as build_loss
from segmentation.networks import Network, build, parameter_count, unet3plus
from segmentation.networks.cost import BACKBONES, parameters
from segmentation.outputs import Outputs

torch.set_num_threads(1)
FAMILIES = ("unet3plus", "unet3plus_simplified")
QUICK = ("convnext_tiny", "hrnet_w18", "efficientnet_b0", "resnet34")


def plain(name="unet3plus", **changes):
    return Network(name=name, **{"encoder": "plain", "base": 4, "depth": 3, "cat_channels": 3, **changes})


def built(config, classes=3, seed=0):
    torch.manual_seed(seed)
    return build(config, 3, classes)


@pytest.mark.row("K1")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "encoder", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in BACKBONES]
)
def test_every_backbone_gives_logits_and_says_its_own_channels(name, encoder):
    model = built(Network(name=name, encoder=encoder)).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        assert model(image).shape == (1, 3, 64, 64)
        features = model.encoder(image)
    info = model.encoder.feature_info
    assert [each.shape[1] for each in features] == info.channels()
    assert [64 // each.shape[2] for each in features] == info.reduction() == model.strides
    assert model.decoder.width == 64 * len(features)


@pytest.mark.row("K3")
def test_the_papers_network_has_the_papers_number_of_parameters():
    # Table 1 of arXiv:2004.08790: 26.97 million, without deep supervision, for one class.
    with torch.device("meta"):
        model = build(Network(name="unet3plus", encoder="plain", base=64, depth=4), 3, 1)
    assert round(parameters(model) / 1e6, 2) == 26.97


@pytest.mark.row("K3")
@pytest.mark.row("K4")
@pytest.mark.parametrize("encoder", ["plain", "resnet10t"])
def test_every_level_reads_every_scale_by_a_branch_of_its_own(encoder):
    model = built(plain(encoder=encoder)).eval()
    image = torch.randn(1, 3, 64, 64)
    seen, levels = {}, {}
    for at, level in enumerate(model.decoder.levels):
        level.register_forward_hook(lambda module, inputs, output, at=at: levels.update({at: output}))
        for scale, branch in enumerate(level.branches):
            branch.register_forward_hook(
                lambda module, inputs, output, key=(at, scale): seen.update({key: (inputs[0], output)})
            )
    features = model.encoder(image)
    model.decoder(features)
    count = len(features)
    assert set(seen) == {(at, scale) for at in range(count - 1) for scale in range(count)}
    for (at, scale), (given, found) in seen.items():
        size = features[at].shape[-2:]
        deeper = features[-1] if scale == count - 1 else levels.get(scale)
        if scale <= at:
            expected = F.adaptive_max_pool2d(features[scale], size)
        else:
            expected = F.interpolate(deeper, size=size, mode="bilinear")
        torch.testing.assert_close(given, expected)
        assert found.shape == (1, 3, *size)
    assert all(output.shape[1] == 3 * count for output in levels.values())


@pytest.mark.row("K3")
@pytest.mark.row("K5")
def test_the_simplified_network_fuses_all_levels_at_the_size_of_the_finest(monkeypatch):
    model = built(plain("unet3plus_simplified", encoder="resnet10t")).eval()
    sizes, given = [], []
    enlarged = unet3plus._enlarged
    monkeypatch.setattr(unet3plus, "_enlarged", lambda maps, like: sizes.append(like.shape[-1]) or enlarged(maps, like))
    model.decoder.fuse.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    features = model.encoder(torch.randn(1, 3, 64, 64))
    fused, maps = model.decoder(features)
    assert [each.shape for each in maps] == [(1, 15, *level.shape[-2:]) for level in features[:-1]]
    assert max(sizes) == 32 == features[0].shape[-1]
    reduced = [layer(each) for layer, each in zip(model.decoder.reduce, maps, strict=True)]
    expected = torch.cat([F.interpolate(each, size=(32, 32), mode="bilinear") for each in reduced], 1)
    torch.testing.assert_close(given[0], expected)
    assert given[0].shape == (1, 3 * 4, 32, 32)
    assert fused.shape == (1, 15, 32, 32)


@pytest.mark.row("K4")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_width_of_a_branch_is_searched_by_its_name(name):
    widths = {each: built(plain(name, cat_channels=each)).decoder.width for each in (2, 5)}
    assert widths == {2: 8, 5: 20}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_every_norm_and_dropout_are_taken(name, norm):
    model = built(plain(name, norm=norm, dropout=0.2))
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()
    assert not [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]


@pytest.mark.row("K6")
@pytest.mark.row("K15")
@pytest.mark.parametrize("name", FAMILIES)
def test_deep_supervision_gives_auxiliary_logits_in_training_only(name):
    model, without = built(plain(name, deep_supervision=True)), built(plain(name))
    image = torch.randn(2, 3, 33, 47)
    outputs = model(image)
    assert isinstance(outputs, Outputs)
    assert [each.shape for each in outputs.auxiliary] == [(2, 3, 33, 47)] * 3
    assert parameter_count(model) - sum(map(torch.numel, model.side_heads.parameters())) == parameter_count(without)
    assert isinstance(without(image), torch.Tensor)
    fresh, without = built(plain(name, deep_supervision=True)).eval(), built(plain(name)).eval()
    torch.testing.assert_close(fresh(image), without(image), rtol=0, atol=0)


@pytest.mark.row("K6")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_every_parameter_gets_a_gradient_with_heads_of_any_weight(name, weight):
    model = built(plain(name, deep_supervision=True, guided=True))
    loss = build_loss(Loss(aux_weight=weight, presence=weight), multilabel=False)
    loss(model(torch.randn(2, 3, 32, 32)), torch.randint(0, 3, (2, 32, 32))).backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    heads = [model.presence.conv.weight, *[head.weight for head in model.side_heads]]
    assert [bool(head.grad.any()) for head in heads] == [weight > 0] * len(heads)


@pytest.mark.row("K7")
def test_gating_worked_by_hand():
    logits = torch.tensor([1.0, 5.0, -2.0]).view(1, 3, 1, 1)
    gated = unet3plus.gated(logits, torch.tensor([[3.0, -1.0, 0.5]])).flatten()
    assert gated.tolist() == [1.0, -32.0, -2.0]
    nothing = unet3plus.gated(logits, torch.full((1, 3), -1.0))
    assert nothing.argmax(1).item() == 0
    assert not (nothing.sigmoid() > 0.5).any()


@pytest.mark.row("K7")
def test_a_guided_network_learns_to_give_an_empty_mask_for_an_empty_image():
    torch.manual_seed(0)
    image, mask = 0.1 * torch.randn(8, 3, 16, 16), torch.zeros(8, 16, 16, dtype=torch.long)
    image[:4, :, 4:12, 4:12] += 2
    mask[:4, 4:12, 4:12] = 1
    model = built(plain(depth=2, guided=True), classes=2)
    loss = build_loss(Loss(), multilabel=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(image), mask).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        # Whatever else the network sees: all of every image, were there no gate.
        model.head.bias += torch.tensor([0.0, 50.0])
        found = model(image).argmax(1)
        presence, model.presence = model.presence, None
        ungated = model(image).argmax(1)
    assert presence is not None
    assert ungated.all()
    assert not found[4:].any()
    assert found[:4].flatten(1).any(1).all()


@pytest.mark.row("K14")
@pytest.mark.parametrize("name", ["timm_unet", *FAMILIES])
def test_a_frozen_encoder_keeps_weights_and_statistics_while_the_rest_learns(name):
    model = built(plain(name, encoder="resnet10t", freeze_encoder=True))
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = training.build_optimizer(training.TrainingConfig(optimizer="sgd", lr=0.1), model)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for key, each in model.named_parameters() if not key.startswith("encoder.")}
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(each.grad is None for each in model.encoder.parameters())
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not [key for key in changed if key.startswith("encoder.")]
    thawed = built(plain(name, encoder="resnet10t"))
    thawed(torch.randn(2, 3, 32, 32))
    assert not torch.equal(thawed.encoder.bn1.running_mean, model.encoder.bn1.running_mean)


@pytest.mark.row("K14")
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_epoch_loop_trains_a_frozen_guided_supervised_network(average, tmp_path):
    model = built(plain(encoder="resnet10t", freeze_encoder=True, deep_supervision=True, guided=True))
    before = copy.deepcopy(model.encoder.state_dict())
    image, mask = torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 32, 32))
    loss = build_loss(Loss(), multilabel=False)
    config = training.TrainingConfig(epochs=4, lr=1e-2, device="cpu", ema_decay=average)

    def validate(network):
        return {"val_loss": loss(network(image), mask).item()}

    history = []
    for epoch in training.fit(
        config,
        model=model,
        loss=loss,
        train_batches=lambda number: [(image, mask, torch.arange(4))],
        validate=validate,
        meta={},
    ):
        history.append(epoch.metrics)
        epoch.save(tmp_path / "checkpoint")
    saved = safetensors_weights(tmp_path / "checkpoint" / "weights.safetensors")
    for key, value in before.items():
        assert torch.equal(saved[f"encoder.{key}"], value), key
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputing_decoder_levels_changes_neither_gradients_nor_statistics(name):
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    models = [built(plain(name, dropout=0.2)) for _ in range(2)]
    economy.recompute_stages(models[1])
    calls = [0, 0]
    for place, model in enumerate(models):
        layer = next(each for each in model.decoder.levels[0].modules() if isinstance(each, torch.nn.Conv2d))

        def count(module, inputs, place=place):
            calls[place] += 1

        layer.register_forward_pre_hook(count)
        torch.manual_seed(2)
        model(image).square().mean().backward()
    assert calls == [1, 2]
    kept, again = (model.state_dict() for model in models)
    for key in kept:
        assert torch.equal(kept[key], again[key]), key
    for (key, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=key)


@pytest.mark.row("K43")
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_in_single_precision_after_autocast(name):
    model = built(plain(name, deep_supervision=True, guided=True))
    image = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        trained, logits = model.train()(image), model.eval()(image)
    assert {trained.logits.dtype, trained.presence.dtype, logits.dtype} == {torch.float32}
    assert {each.dtype for each in trained.auxiliary} == {torch.float32}
    assert logits.shape == (1, 3, 32, 32)
    assert set(logits.argmax(1).unique().tolist()) <= {0, 1, 2}
    assert build(plain(name), 3, 2).double().eval()(image.double()).dtype == torch.float64


def test_an_encoder_of_one_level_is_refused():
    with pytest.raises(ValueError, match=r"'resnet10t' is used at one level; expected 2 or more"):
        built(plain(encoder="resnet10t", encoder_levels=1))


def test_a_misspelt_backbone_is_named_with_its_neighbour():
    with pytest.raises(ValueError, match=r"no model 'convnext_tinny'; did you mean .*convnext_tiny"):
        built(plain(encoder="convnext_tinny"))


@pytest.mark.row("K13")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_takes_the_weights_of_a_file(name, tmp_path):
    import timm

    torch.manual_seed(1)
    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    model = built(plain(name, encoder="resnet10t", weights_path=path, freeze_encoder=True))
    torch.testing.assert_close(model.encoder.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    with pytest.raises(DataError, match=r"no file .*nowhere.*pretrained=false"):
        built(plain(name, encoder="resnet10t", weights_path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("encoder", "levels"),
    [("efficientnet_b0", 3), ("mobilenetv3_small_100", 3), ("resnet18", 3), ("hrnet_w18_small", 3)],
)
def test_with_fewer_levels_whatever_learns_gets_a_gradient(encoder: str, levels: int) -> None:
    """Several processes would wait for ever for the gradient of a stage that no level reads."""
    config = Network(name="unet3plus", encoder=encoder, encoder_levels=levels, cat_channels=4)
    model = build(config, 3, 2)
    for resting in (False, True, False):
        model.rest(resting)
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(model(torch.rand(2, 3, 64, 64)).sum())
        waiting = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        assert waiting == []
    assert any(one.grad is not None for one in model.encoder.parameters())


def test_stages_after_the_last_level_are_not_computed() -> None:
    whole, cut = (
        build(Network(name="unet3plus", encoder="efficientnet_b0", encoder_levels=levels), 3, 2) for levels in (0, 3)
    )
    stages = [len(model.encoder.blocks) for model in (whole, cut)]  # type: ignore[union-attr, arg-type]
    assert stages == [7, 3]
