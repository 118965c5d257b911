"""Networks of cells: shapes, what is refused and how, and that pretrained weights are really the network's."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import configuration
from configuration import ConfigError
from segmentation.checkpoints import fill
from segmentation.epoch import DataError
from segmentation.networks import parameter_count
from segmentation.networks.coarse import CoarseNetwork, build, check, parse_pool_sizes, without_weights
from segmentation.networks.cost import macs
from segmentation.networks.unet import UNet

torch.set_num_threads(1)
NAMES = typing.get_type_hints(CoarseNetwork)["name"].__args__
SCALE = 16
PUBLISHED = "fcn_resnet101_coco-7ecb50ca.pth"


def small(name="segmentation_cnn", **changes):
    return CoarseNetwork(
        name=name, **{"embedding_size": 4, "pool_sizes": (4, 4), "scale_factor": SCALE, "n_encoders": 3, **changes}
    )


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    """Return each network for 5 channels and 4 classes; they are changed by no test but in their gradients."""
    torch.manual_seed(0)
    return {name: build(small(name), 5, 4) for name in NAMES}


@pytest.fixture(scope="module")
def source():
    """Return weights of the names and shapes that torchvision publishes, second head and all.

    Each tensor but the filters of the first layer is one number of its own, so that the file is small.
    """
    from torchvision.models.segmentation import fcn_resnet101

    with torch.device("meta"):
        state = fcn_resnet101(weights=None, weights_backbone=None, aux_loss=True).state_dict()
    found = {
        name: torch.tensor(at, dtype=like.dtype).expand(like.shape) for at, (name, like) in enumerate(state.items())
    }
    return {**found, "backbone.conv1.weight": noise(64, 3, 7, 7)}


@pytest.fixture(scope="module")
def weights_path(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "fcn.pth"
    torch.save(source, path)
    return path


@pytest.fixture(scope="module")
def transferred(weights_path):
    return build(small("fcn_resnet101", weights_path=str(weights_path), seed_first=True), 5, 4)


# Shapes


@pytest.mark.row("E1")
@pytest.mark.row("E28")
def test_the_cnn_of_the_original_gives_its_cells():
    torch.manual_seed(0)
    model = build(CoarseNetwork(), 99, 4)
    with torch.inference_mode():
        assert model(noise(2, 99, 200, 200)).shape == (2, 4, 4, 4)


@pytest.mark.row("E3")
@pytest.mark.row("E28")
@pytest.mark.parametrize("n_encoders", [1, 2, 3, 4, 5])
def test_a_unet_of_any_depth_gives_the_cells_of_200_pixels(n_encoders):
    torch.manual_seed(0)
    model = build(CoarseNetwork(name="unet", n_encoders=n_encoders, embedding_size=2), 99, 4)
    with torch.inference_mode():
        assert model(noise(2, 99, 200, 200)).shape == (2, 4, 4, 4)


@pytest.mark.row("E2")
@pytest.mark.row("E28")
def test_the_fcn_of_the_original_gives_its_cells():
    with torch.device("meta"):  # only the shape counts here
        model = build(CoarseNetwork(name="fcn_resnet101"), 99, 4)
        assert model(torch.zeros(2, 99, 200, 200)).shape == (2, 4, 4, 4)
    first, last = model.backbone.conv1, model.classifier[4]
    assert (first.in_channels, first.out_channels, first.kernel_size) == (99, 64, (7, 7))
    assert (first.stride, first.padding, first.bias) == ((2, 2), (3, 3), None)
    assert (last.in_channels, last.out_channels, last.kernel_size) == (512, 4, (1, 1))


@pytest.mark.row("E28")
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (50, 39)])
@pytest.mark.parametrize("name", NAMES)
def test_whole_cells_get_finite_logits_in_training_and_evaluation(models, name, size):
    cells = (size[0] // SCALE, size[1] // SCALE)
    for mode in (models[name].train(), models[name].eval()):
        with torch.no_grad():
            logits = mode(noise(1, 5, *size))
        assert logits.shape == (1, 4, *cells)
        assert torch.isfinite(logits).all()


@pytest.mark.row("E46")
def test_blocks_of_the_cnn_end_in_the_maps_of_the_specification():
    model = build(CoarseNetwork(), 99, 4)
    with torch.inference_mode():
        assert [tuple(level.shape) for level in model.levels(noise(1, 99, 200, 200))] == [
            (1, 64, 40, 40),
            (1, 128, 8, 8),
            (1, 256, 4, 4),
        ]
    assert [type(layer).__name__ for layer in model.encoders[0]] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"]


@pytest.mark.row("E1")
@pytest.mark.parametrize(("depth", "embedding_size", "kernel_size"), [(1, 3, 5), (3, 6, 1), (2, 4, 3)])
def test_the_cnn_takes_depth_width_kernel_and_pool_sizes(depth, embedding_size, kernel_size):
    config = small(depth=depth, embedding_size=embedding_size, kernel_size=kernel_size, pool_sizes=(2, 4, 2))
    model = build(config, 5, 4)
    widths, inputs, expected = [embedding_size * factor for factor in (1, 2, 4)], 5, 0
    for width in widths:
        expected += (inputs + (depth - 1) * width) * width * kernel_size**2 + depth * width
        inputs = width
    assert parameter_count(model) == expected + 4 * widths[-1] + 4
    assert [encoder[-1].kernel_size for encoder in model.encoders] == [2, 4, 2]
    assert [tuple(level.shape[1:]) for level in model.levels(noise(1, 5, 32, 48))] == [
        (widths[0], 16, 24),
        (widths[1], 4, 6),
        (widths[2], 2, 3),
    ]


# What they compute


@pytest.mark.row("E1")
@pytest.mark.row("E3")
@pytest.mark.parametrize("name", NAMES)
def test_logits_take_negative_values(models, name):
    with torch.no_grad():
        logits = models[name].eval()(noise(8, 5, 32, 32))
    assert (logits < 0).any()


@pytest.mark.row("E3")
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(models, name):
    model = models[name].train()
    model.zero_grad(set_to_none=True)
    model(noise(2, 5, 64, 64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    model.zero_grad(set_to_none=True)


@pytest.mark.row("E3")
def test_the_unet_grows_with_its_encoders_and_all_of_it_is_saved():
    counts = []
    for n_encoders in range(1, 6):
        torch.manual_seed(0)
        model = build(small("unet", n_encoders=n_encoders), 5, 4)
        with torch.device("meta"):
            whole = UNet(5, 4, [4 * 2**level for level in range(n_encoders)], 4 * 2**n_encoders)
        assert model.state_dict().keys() == whole.state_dict().keys()
        counts.append(parameter_count(model))
        assert counts[-1] == parameter_count(whole)
    assert counts == sorted(set(counts))
    first, second = build(small("unet"), 5, 4).eval(), build(small("unet"), 5, 4).eval()
    fill(second, first.state_dict(), source="memory")
    assert torch.equal(first(noise(1, 5, 32, 32)), second(noise(1, 5, 32, 32)))


@pytest.mark.row("E3")
@pytest.mark.parametrize(("pool", "taken"), [("auto", "amax"), ("max", "amax"), ("avg", "mean")])
def test_the_unet_pools_its_finished_logits(pool, taken):
    torch.manual_seed(0)
    model = build(small("unet", pool=pool), 5, 4).eval()
    image = noise(1, 5, 48, 32)
    pixels = UNet.forward(model, image)
    cells = getattr(pixels.reshape(1, 4, 3, SCALE, 2, SCALE), taken)((3, 5))
    torch.testing.assert_close(model(image), cells)


@pytest.mark.row("E2")
def test_the_fcn_enlarges_its_logits_and_takes_the_mean(models):
    model = models["fcn_resnet101"].eval()
    image = noise(1, 5, 32, 48)
    with torch.no_grad():
        pixels = F.interpolate(model.classifier(model.backbone(image)["out"]), size=(32, 48), mode="bilinear")
        torch.testing.assert_close(model(image), pixels.reshape(1, 4, 2, SCALE, 3, SCALE).mean((3, 5)))
    with torch.device("meta"):
        assert isinstance(build(small("fcn_resnet101", pool="max"), 5, 4).pool, torch.nn.MaxPool2d)


def test_the_last_layer_of_features_gives_the_logits(models):
    """A convolution 1 wide and a mean may change places: what features are of a cell is told by the logits."""
    averaging = build(small("unet", pool="avg"), 5, 4).eval()
    image = noise(2, 5, 32, 48)
    heads = {
        "segmentation_cnn": (models["segmentation_cnn"].eval(), models["segmentation_cnn"].head, 8),
        "unet": (averaging, averaging.final_conv, 4),
        "fcn_resnet101": (models["fcn_resnet101"].eval(), models["fcn_resnet101"].classifier[-1], 512),
    }
    for name in NAMES:
        model, head, width = heads[name]
        with torch.no_grad():
            features = model.features(image)
            assert features.shape == (2, width, 2, 3)
            torch.testing.assert_close(head(features), model(image), rtol=1e-4, atol=1e-5)


def test_their_cost_is_counted(models):
    assert all(macs(models[name], 5, 32, 32) > 0 for name in NAMES)


# What is refused


@pytest.mark.row("E32")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth: got 0; expected at least 1"),
        ({"embedding_size": 0}, "embedding_size: got 0"),
        ({"scale_factor": 0}, "scale_factor: got 0"),
        ({"kernel_size": 4}, "kernel_size: got 4; expected an odd number"),
        ({"pool_sizes": ()}, r"pool_sizes: got \[\]; expected one or more"),
        ({"pool_sizes": (5, 0)}, r"pool_sizes: got \[5, 0\]"),
        ({"n_encoders": 0}, "n_encoders: got 0; expected 1 to 5"),
        ({"n_encoders": 6}, "n_encoders: got 6; expected 1 to 5"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        CoarseNetwork(**changes)


@pytest.mark.row("E29")
@pytest.mark.row("E32")
@pytest.mark.parametrize(
    ("changes", "cells", "message"),
    [
        (
            {"pool_sizes": (5, 5, 4)},
            4,
            r"pool_sizes: got \[5, 5, 4\], whose product is 100; expected 50, .*or set scale_factor=100",
        ),
        ({"kernel_size": 9}, 4, r"kernel_size: got 9, but the last block sees maps of 8 pixels \(4 cells"),
        ({"kernel_size": 3}, 1, r"kernel_size: got 3, but the last block sees maps of 2 pixels .*expected at most 2"),
        (
            {"name": "unet", "n_encoders": 5, "scale_factor": 4},
            4,
            r"n_encoders: got 5, .* 16 pixels \(4 cells of scale_factor 4\); expected at most 4",
        ),
        ({"name": "fcn_resnet101", "scale_factor": 2}, 4, "scale_factor: got 2, .* of 8 pixels .*more than 8"),
        ({"name": "fcn_resnet101", "seed_first": True}, 4, "seed_first: got true without weights .*weights_path"),
    ],
)
def test_a_combination_that_cannot_be_is_refused_with_the_remedy(changes, cells, message):
    with pytest.raises(ValueError, match=message):
        check(CoarseNetwork(**changes), cells)


@pytest.mark.row("E32")
@pytest.mark.parametrize("cells", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_limits_are_where_networks_still_learn_from_one_image(models, name, cells, monkeypatch):
    """What is just allowed is shown an image of the size that it was checked for; one step further is refused."""
    key, base, allowed, refused = {
        "segmentation_cnn": ("kernel_size", {"pool_sizes": (2, 3), "scale_factor": 6}, 3 * cells, 3 * cells + 2),
        "unet": ("n_encoders", {"scale_factor": 2}, (2 * cells).bit_length() - 1, (2 * cells).bit_length()),
        "fcn_resnet101": ("scale_factor", {}, 8 // cells + 1, 8 // cells),
    }[name]
    allowed, refused = (value - (name == "segmentation_cnn" and cells % 2 == 0) for value in (allowed, refused))
    config = small(name, **{**base, key: allowed})
    check(config, cells)
    with pytest.raises(ValueError, match=f"{key}: got {refused}"):
        check(small(name, **{**base, key: refused}), cells)
    model = models[name] if name == "fcn_resnet101" else build(config, 5, 4)
    for side in ("kernel_size", "stride"):
        monkeypatch.setattr(models["fcn_resnet101"].pool, side, config.scale_factor)
    side = cells * config.scale_factor
    with torch.no_grad():
        logits = model.train()(noise(1, 5, side, side))
    assert logits.shape == (1, 4, cells, cells)
    assert torch.isfinite(logits).all()


@pytest.mark.row("E29")
def test_pool_sizes_are_read_as_the_original_writes_them():
    assert parse_pool_sizes("5,5,2") == CoarseNetwork().pool_sizes == (5, 5, 2)
    assert parse_pool_sizes(" 25, 2 ") == (25, 2)
    for text in ("", "5,,2", "5;2", "5,2.0", "-5,2", "a"):
        with pytest.raises(ValueError, match=r"pool_sizes: got .*such as 5,5,2"):
            parse_pool_sizes(text)
    assert configuration.build(CoarseNetwork, {"pool_sizes": [25, 2]}).pool_sizes == (25, 2)
    with pytest.raises(ConfigError, match="pool_sizes"):
        configuration.build(CoarseNetwork, {"pool_sizes": "5,5,2"})


def test_every_value_is_explained():
    assert all(field.help for field in configuration.fields(CoarseNetwork).values())


# Weights


@pytest.mark.row("E2")
def test_what_is_not_replaced_is_the_files(transferred, source):
    found = transferred.state_dict()
    kept = [name for name in found if not name.startswith(("backbone.conv1.", "classifier.4."))]
    assert len(kept) == len(found) - 3
    for name in kept:
        assert torch.equal(found[name], source[name]), name
    assert not [name for name in found if name.startswith("aux")]


@pytest.mark.row("E2")
def test_the_first_layer_is_seeded_by_the_filters_of_red_green_and_blue(transferred, source):
    rgb, first = source["backbone.conv1.weight"], transferred.backbone.conv1.weight
    for channel in range(5):
        torch.testing.assert_close(first[:, channel], (rgb[:, 0] + rgb[:, 1] + rgb[:, 2]) / 5)
    grey = noise(1, 1, 16, 16)
    torch.testing.assert_close(
        transferred.backbone.conv1(grey.repeat(1, 5, 1, 1)),
        F.conv2d(grey.repeat(1, 3, 1, 1), rgb, stride=2, padding=3),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.row("E2")
def test_safetensors_without_counters_or_second_head_do_too_and_the_first_layer_is_drawn(source, tmp_path):
    needless = ("aux_classifier.", "backbone.conv1.", "classifier.4.")
    some = {
        name: tensor.contiguous()
        for name, tensor in source.items()
        if not name.startswith(needless) and not name.endswith("num_batches_tracked")
    }
    save_file(some, tmp_path / "some.safetensors")
    found = build(small("fcn_resnet101", weights_path=str(tmp_path / "some.safetensors")), 3, 4).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in some.items())
    assert not torch.equal(found["backbone.conv1.weight"], source["backbone.conv1.weight"])
    (tmp_path / "some.safetensors").unlink()  # 200 MB


@pytest.mark.row("E2")
@pytest.mark.row("X13")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("classifier.1.weight"), r"classifier\.1\.weight is missing"),
        (lambda state: state.update({"head.weight": torch.zeros(1)}), r"head\.weight is left over"),
        (
            lambda state: state.update({"classifier.1.weight": torch.zeros(256)}),
            r"classifier\.1\.weight is \(256,\) instead of \(512,\)",
        ),
        (lambda state: state.update({"backbone.bn1.weight": [1.0]}), r"backbone\.bn1\.weight is missing"),
        (lambda state: state.clear(), r"backbone\.\S+ is missing; .* and \d{3} more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_keys(source, tmp_path, change, message, monkeypatch):
    state = dict(source)
    change(state)
    path = tmp_path / "other.pth"
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    path.touch()
    with torch.device("meta"), pytest.raises(DataError, match=rf"weights_path: {path}: .*{message}.*pretrained=false"):
        build(small("fcn_resnet101", weights_path=str(path)), 5, 4)


@pytest.mark.row("E2")
@pytest.mark.row("X13")
def test_files_that_are_no_weights_are_refused_by_name(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    files = (
        ("list.pth", "holds a list; expected tensors by their names"),
        ("torn.pth", "damaged"),
        ("torn.safetensors", "damaged"),
        ("none.pth", "no such file"),
    )
    for name, message in files:
        network = small("fcn_resnet101", weights_path=str(tmp_path / name))
        told = rf"weights_path: .*{name}: .*{message}.*pretrained=true to download them, or pretrained=false"
        with torch.device("meta"), pytest.raises(DataError, match=told):
            build(network, 5, 4)


@pytest.mark.row("X13")
def test_published_weights_that_cannot_be_had_end_the_run(tmp_path, monkeypatch):
    def offline(url, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    told = rf"'fcn_resnet101' \({PUBLISHED}\) .*no route to host\); set weights_path .*pretrained=false"
    with torch.device("meta"), pytest.raises(DataError, match=told):
        build(small("fcn_resnet101", pretrained=True), 5, 4)


@pytest.mark.row("E2")
@pytest.mark.row("X13")
def test_published_weights_are_downloaded_once_with_their_hash_and_loaded(source, weights_path, tmp_path, monkeypatch):
    asked = []

    def download(url, path, prefix, progress):
        asked.append((url, prefix))
        (tmp_path / "hub" / "checkpoints" / PUBLISHED).symlink_to(weights_path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = build(small("fcn_resnet101", pretrained=True), 5, 4)
        assert torch.equal(model.classifier[0].weight, source["classifier.0.weight"])
    assert asked == [(f"https://download.pytorch.org/models/{PUBLISHED}", "7ecb50ca")]


def test_a_network_for_weights_of_a_checkpoint_asks_for_none():
    asking = small("fcn_resnet101", pretrained=True, weights_path="w.pth", seed_first=True)
    assert without_weights(asking) == small("fcn_resnet101")
    check(without_weights(asking), 4)
