"""Networks of volumes: apart and together again, by windows as at once, and learning."""

import numpy as np
import pytest
import torch
from torch import nn

from segmentation import losses, metrics, networks, training, volumes
from segmentation.losses import Loss
from segmentation.networks import VOLUMETRIC, Network, unet
from segmentation.networks.cost import macs
from segmentation.networks.volume import Volumes, to_image, to_volume
from segmentation.outputs import Outputs

torch.set_num_threads(1)
pytestmark = pytest.mark.row("P43")


def small(name="unet", **changes):
    return Network(name=name, **{"dims": 3, "base": 4, "depth": 2, **changes})


def test_a_volume_becomes_a_tall_image_and_itself_again():
    volume = torch.arange(2 * 3 * 4 * 5).view(1, 2, 3, 4, 5)
    image = to_image(volume)
    assert image.shape == (1, 2, 12, 5)
    assert torch.equal(image[0, 1, 4:8], volume[0, 1, 1]), "slices lie below each other"
    assert torch.equal(to_volume(image, 3), volume)
    assert torch.equal(to_volume(to_image(volume[0, 0]), 3), volume[0, 0])
    with pytest.raises(ValueError, match="height 12; expected a multiple of its 5 slices"):
        to_volume(image, 5)


@pytest.mark.parametrize("name", VOLUMETRIC)
@pytest.mark.parametrize("size", [(1, 16, 16), (5, 17, 23), (9, 16, 16)])
def test_any_size_gives_finite_logits_of_that_size(name, size):
    torch.manual_seed(0)
    slices, height, width = size
    model = networks.build(small(name), 2, 3, slices=slices)
    assert isinstance(model, Volumes)
    for mode in (model.train(), model.eval()):
        logits = mode(torch.randn(1, 2, slices * height, width))
        assert logits.shape == (1, 3, slices * height, width)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", VOLUMETRIC)
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_every_parameter_gets_a_gradient_whatever_the_norm(name, norm):
    torch.manual_seed(0)
    model = networks.build(small(name, norm=norm, dropout=0.1), 1, 2, slices=8)
    model(torch.randn(2, 1, 8 * 16, 16)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    assert not [layer for layer in model.modules() if type(layer).__name__.endswith("2d")]


def test_auxiliary_logits_are_tall_images_too():
    model = networks.build(small("unetplusplus", depth=3, deep_supervision=True), 1, 2, slices=5)
    output = model(torch.randn(1, 1, 5 * 17, 20))
    assert isinstance(output, Outputs)
    assert [logits.shape for logits in (output.logits, *output.auxiliary)] == [(1, 2, 85, 20)] * 3


def test_slices_are_halved_while_there_are_eight():
    assert unet.strides(3) == [(2, 2)] * 3
    assert unet.strides(4, 16) == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
    assert unet.strides(3, 7) == [(1, 2, 2)] * 3
    assert unet.strides(3, 15) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)], "15 are padded to 16"
    found = []
    model = networks.build(small(depth=3), 1, 2, slices=9).eval()
    model.network.bottleneck.register_forward_hook(lambda module, inputs, output: found.append(output.shape))
    model(torch.zeros(1, 1, 9 * 16, 16))
    assert found == [(1, 32, 5, 2, 2)]


def test_multiplications_of_a_volume_are_those_of_its_convolutions():
    model = networks.build(small(widths=(2,), bottleneck=3), 1, 2, slices=4)
    convolutions = 27 * (1 * 2 + 2 * 2) + 27 * (4 * 2 + 2 * 2) + 2 * 2  # encoder, decoder, head: a voxel
    below = 27 * (2 * 3 + 3 * 3) + 4 * 3 * 2  # bottleneck, and what enlarges it: a voxel of a quarter as many
    assert macs(model, 1, 4 * 8, 8) == 4 * 64 * convolutions + 4 * 16 * below


@pytest.mark.parametrize(
    ("config", "slices", "message"),
    [
        ({"dims": 3}, 0, "dims: got 3, but the samples here are images; write 2"),
        ({"dims": 2}, 4, "dims: got 2, but the samples here are volumes; write 3"),
    ],
)
def test_a_network_of_the_wrong_kind_is_refused(config, slices, message):
    with pytest.raises(ValueError, match=message):
        networks.build(Network(base=4, **config), 1, 2, slices=slices)


def test_a_family_without_volumes_is_refused():
    with pytest.raises(ValueError, match="dims: got 3 for timm_unet; write 2, or a network of unet, attention_unet"):
        Network(name="timm_unet", dims=3)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("window", [(3, 8, 8), (5, 9, 30), (9, 9, 9)])
def test_windows_of_a_local_operation_give_what_the_whole_volume_gives(multilabel, window):
    torch.manual_seed(0)
    local = nn.Sequential(nn.Conv3d(2, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1))
    volume = torch.randn(2, 7, 21, 26)
    logits = local(volume[None])[0]
    whole = logits.sigmoid() if multilabel else logits.softmax(0)
    found = volumes.predict_volume(local, volume, window=window, multilabel=multilabel, batch_size=2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_windows_of_a_convolution_differ_from_the_whole_at_their_faces_only():
    torch.manual_seed(0)
    model = nn.Conv3d(1, 2, 3, padding=1)
    volume = torch.randn(1, 8, 12, 12)
    whole = model(volume[None])[0].softmax(0)
    found = volumes.predict_volume(model, volume, window=(4, 6, 6), multilabel=False, overlap=0.0)
    inner = np.ix_(
        *[[at for at in range(size) if at % side not in (0, side - 1)] for size, side in ((8, 4), (12, 6), (12, 6))]
    )
    assert inner[0].size == 4 and inner[1].size == 8
    for ours, theirs in zip(found.numpy(), whole.detach().numpy(), strict=True):
        np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-6)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_windows_see_what_the_network_of_a_tall_image_sees():
    torch.manual_seed(0)
    model = networks.build(small(), 1, 2, slices=4).eval()
    volume = torch.randn(1, 4, 16, 16)
    found = volumes.predict_volume(model, volume, window=(8, 32, 32), multilabel=False)
    torch.testing.assert_close(to_image(found), model(to_image(volume)[None])[0].softmax(0))


def test_a_volume_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"volume: got shape \(4, 8, 8\)"):
        volumes.predict_volume(nn.Conv3d(1, 2, 1), torch.zeros(4, 8, 8), window=(2, 4, 4), multilabel=False)
    with pytest.raises(ValueError, match="overlap: got 1"):
        volumes.predict_volume(
            nn.Conv3d(1, 2, 1), torch.zeros(1, 4, 8, 8), window=(2, 4, 4), multilabel=False, overlap=1
        )


def test_dice_over_a_volume_is_that_of_its_voxels():
    mask = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    mask[0, 0, 0, :] = 1  # three voxels in the first slice
    mask[0, 1, 1, :2] = 1  # two in the second
    mask[0, 1, 0, 0] = 255
    called = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    called[0, 0, 0, :2] = 1  # two right, one missed
    called[0, 1, 1, 1:] = 1  # one right, one missed, one wrong
    called[0, 1, 0, 0] = 1  # ignored
    scores = nn.functional.one_hot(called, 2).movedim(-1, 1).float()
    counts = volumes.count(scores, mask, multilabel=False)
    assert counts.tolist() == [[[5, 2, 1, 3], [3, 1, 2, 5]]]
    np.testing.assert_allclose(metrics.dice(counts), [[10 / 13, 6 / 9]])
    both = torch.stack([mask != 1, mask == 1], 1).long()
    both[:, :, 1, 0, 0] = 255
    assert volumes.count(20 * scores - 10, both, multilabel=True).tolist() == counts.tolist()


def test_a_network_of_volumes_learns_balls():
    """The epoch loop and the losses are those of images."""
    rng, size = torch.Generator().manual_seed(0), (8, 16, 16)
    grid = torch.stack(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
    mask = torch.stack(
        [
            ((grid - torch.tensor(middle).view(3, 1, 1, 1)).square().sum(0) < 16).long()
            for middle in ((4, 8, 8), (3, 6, 9))
        ]
    )
    volume = (mask + 0.3 * torch.randn(mask.shape, generator=rng))[:, None]
    config = training.TrainingConfig(epochs=30, lr=1e-2, device="cpu")
    training.seed_everything(0)
    model = networks.build(small(), 1, 2, slices=8)
    batch = (to_image(volume), to_image(mask), torch.arange(2))

    def validate(network):
        return {"dice": float(metrics.dice(metrics.count(network(batch[0]), batch[1], multilabel=False).sum(0))[1])}

    epochs = list(
        training.fit(
            config,
            model=model,
            loss=losses.build(Loss(), multilabel=False),
            train_batches=lambda epoch: [batch],
            validate=validate,
            meta={},
        )
    )
    assert epochs[-1].metrics["train_loss"] < 0.6 * epochs[0].metrics["train_loss"]
    assert epochs[-1].metrics["dice"] > 0.8
