"""acdc in 3D: patches that show each slice once, whole volumes scored and predicted, and pruning."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import configuration
from configuration import ConfigError
from segmentation import augmentation, checkpoints, losses, metrics, nifti, normalisation, pruning, splits
from segmentation import cache as cache_files
from segmentation.augmentation import Augmentation
from segmentation.loading import generator
from segmentation.networks.volume import to_image, to_volume
from segmentation.pruning import channels as tracing
from workloads import _model, acdc
from workloads._acdc import dataset, patches

pytestmark = [pytest.mark.row("P43"), pytest.mark.usefixtures("own_cache")]

DEPTH = 4


def small(**changed):
    values = {
        **{"network.dims": 3, "network.widths": [4, 8], "data.patch_slices": DEPTH, "data.size": 32},
        **{"data.synthetic.patients": 16, "data.synthetic.size": 40, "data.synthetic.slices": 6},
        **{
            "batch_size": 2,
            "epochs": 10,
            "evaluation_batch": 2,
            "rewind_epoch": 1,
            "data.fractions": [0.5, 0.25, 0.25],
        },
    }
    return configuration.replace(acdc.Config.debug(), {**values, **changed})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The metrics of each epoch of a training in 3D, and the checkpoint of the last."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    acdc.prepare(small())
    told = []
    for epoch in acdc.train(small()):
        told.append(epoch.metrics)
        if epoch.number == small().epochs:
            epoch.save(folder)
    return told, folder


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [([0, 0, 0, 0], [1, 0, 0, 0])]),
        (3, [([0, 1, 2, 2], [1, 1, 1, 0])]),
        (4, [([0, 1, 2, 3], [1, 1, 1, 1])]),
        (6, [([0, 1, 2, 3], [1, 1, 1, 1]), ([2, 3, 4, 5], [0, 0, 1, 1])]),
        (8, [([0, 1, 2, 3], [1, 1, 1, 1]), ([4, 5, 6, 7], [1, 1, 1, 1])]),
    ],
)
def test_patches_cover_a_volume_and_show_each_slice_once_as_new(count, expected):
    found = [(list(window.places), list(map(int, window.new))) for window in patches.windows(count, DEPTH)]
    assert found == expected


@pytest.mark.parametrize("count", [1, 3, 4, 6, 11])
def test_patches_put_together_are_the_slices_of_the_volume(tmp_path, count):
    """Against the same volumes read slice by slice."""
    changed = {"synthetic": replace(small().data.synthetic, slices=count, patients=3)}
    flat, _ = dataset.load(replace(small().data, patch_slices=0, **changed))
    samples, made = dataset.load(replace(small().data, **changed))
    assert samples.shape(0) == (1, DEPTH * 32, 32)
    with splits.test_split_open():
        for whole in patches.together(samples, range(len(samples)), DEPTH):
            name = samples.extra(whole.first)["volume"]
            alone = [index for index, other in enumerate(flat.names) if other.startswith(name)]
            assert len(alone) == count
            assert np.array_equal(whole.image, np.stack([flat.image(index) for index in alone], axis=1))
            assert np.array_equal(whole.mask, np.stack([flat.mask(index) for index in alone]))
            assert whole.spacing == tuple(json.loads(flat.extra(alone[0])["spacing"]))
            assert made.groups[whole.first] == name.partition("_")[0]
        ignored = [(samples.mask(index) == losses.IGNORE_INDEX).sum() for index in range(len(samples))]
    extra_slices = 6 * (-(-count // DEPTH) * DEPTH - count)
    assert sum(ignored) == extra_slices * 32 * 32


def test_pixels_in_the_manifest_count_once():
    told, flat = acdc.prepare(small()), acdc.prepare(acdc.Config(data=replace(small().data, patch_slices=0)))
    assert told["volumes"] == flat["volumes"] and told["sample_shape"] == [1, DEPTH * 32, 32]
    everything = [
        sum(np.array(json.loads(samples.extra(index)["pixels"])) for index in range(len(samples)))
        for samples in (dataset.load(small().data)[0], dataset.load(replace(small().data, patch_slices=0))[0])
    ]
    assert np.array_equal(*everything)


def test_slices_cached_before_are_still_found():
    data = replace(small().data, patch_slices=0)
    found = dataset.find(data)
    values = json.dumps([dataset.VERSION, [4, 1, None, 32, [1.0, 99.0], r"patient\d+"]])  # all there were then
    contents = cache_files.content_hash(dataset._files(found), extra=values, folder=cache_files.cache_folder(""))
    assert dataset._key(found, data) == f"acdc-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"
    assert dataset._key(found, small().data) != dataset._key(found, data)


def test_generated_hearts_are_learned_in_3d(run):
    told, _ = run
    assert told[-1]["train_loss"] < 0.7 * told[0]["train_loss"]
    assert told[-1]["val_mean_dice_no_bg"] > 0.3 > told[0]["val_mean_dice_no_bg"]
    assert told[0].keys() == acdc.metrics(small()).keys()


def test_whole_volumes_are_scored_and_each_voxel_counts_once(run, tmp_path):
    """Against counts by hand of the volumes' own probabilities, which predict_volume makes."""
    _, folder = run
    found = acdc.evaluate(folder, "test", tmp_path)
    config, model, normaliser = acdc.load(folder)
    with splits.test_split_open():
        samples, made = dataset.load(config.data)
        wholes = list(patches.together(samples, made.test, DEPTH))
    table = np.zeros((4, 4), np.int64)
    for whole in wholes:
        called = patches.probability(model, normaliser, whole.image, DEPTH, 2).argmax(0).numpy()
        np.add.at(table, (whole.mask.ravel(), called.ravel()), 1)
    assert table.sum() == len(wholes) * 6 * 32 * 32
    hits = np.diag(table)
    dice = 2 * hits / (table.sum(0) + table.sum(1))
    assert [found.metrics[f"dice_{name}"] for name in dataset.HEART] == pytest.approx(dice.tolist())
    assert found.metrics["accuracy"] == pytest.approx(hits.sum() / table.sum())
    assert found.details["volumes"] == len(wholes) == 2 * len(found.groups)
    assert found.metrics["mean_hd95"] > 0 and 0 < found.metrics["mean_nsd"] <= 1
    assert (tmp_path / "predictions.png").is_file()


def test_validation_counts_each_voxel_once(run):
    """Where patches overlap, those of the later one that were seen before are ignored."""
    config, model, normaliser = acdc.load(run[1])
    samples, made = dataset.load(config.data)
    found = acdc._score(config, model, samples, made.validation, normaliser)
    volumes = {samples.extra(index)["volume"] for index in made.validation}
    assert found.counts.sum() == 4 * len(volumes) * 6 * 32 * 32
    logits, masks = [], []
    with torch.inference_mode():
        for index in made.validation:
            logits.append(model(torch.from_numpy(samples.image(index).copy())[None])[0])
            masks.append(torch.from_numpy(samples.mask(index).copy()).long())
    assert np.array_equal(found.counts, metrics.count(torch.stack(logits), torch.stack(masks), multilabel=False))


def test_a_volume_is_predicted_as_a_whole_at_its_own_size(run, tmp_path):
    config, model, _ = acdc.load(run[1])
    source = dataset.root(config.data) / "patient003"
    acdc.predict(run[1], source, tmp_path)
    mask, head = nifti.read(tmp_path / "patient003_frame01_mask.nii.gz")
    truth, own = nifti.read(source / "patient003_frame01_gt.nii.gz")
    assert head == own
    stored, _ = nifti.read(source / "patient003_frame01.nii.gz")
    seen = np.stack([dataset.scaled(stored[None, ..., z], config.data) for z in range(6)], axis=1)
    likely = patches.probability(model, normalisation.Normaliser(method="none"), seen, DEPTH, 1)
    own_size = torch.nn.functional.interpolate(likely.transpose(0, 1), mask.shape[:2], mode="bilinear")
    assert np.array_equal(np.moveaxis(mask, -1, 0), own_size.argmax(1).numpy())
    assert (mask == truth).mean() > 0.8
    acdc.predict(run[1], source, tmp_path / "flips", {"flips": True})
    flipped, _ = nifti.read(tmp_path / "flips/patient003_frame01_mask.nii.gz")
    assert 0 < (flipped != mask).mean() < 0.1


def test_a_short_volume_is_predicted_as_it_is_learned_filled_up_by_its_last_slice(run):
    _, model, normaliser = acdc.load(run[1])
    image = torch.rand(1, 2, 32, 32)
    filled = torch.cat([image, image[:, 1:], image[:, 1:]], 1)
    with torch.inference_mode():
        expected = to_volume(model(to_image(filled)[None]).softmax(1)[0], DEPTH)[:, :2]
    found = patches.probability(model, normaliser, image.numpy(), DEPTH, 1)
    torch.testing.assert_close(found, expected)


def test_every_slice_of_a_volume_is_changed_alike():
    config = Augmentation(
        **{"rotate_degrees": 30, "scale": 0.2, "translate": 0.1, "elastic": 1.0, "grid_distortion": 0.2},
        **{"gamma": 0.3, "bias_field": 0.3, "brightness_factor": 0.2, "blur": 1.0, "motion": 3.0},
    )
    plane, shape = torch.rand(3, 2, 1, 16, 16), torch.randint(0, 4, (3, 1, 16, 16))
    image, mask = to_image(plane.expand(-1, -1, 5, -1, -1)), to_image(shape.expand(-1, 5, -1, -1))
    augment = augmentation.build(config, (0.1, 0.2), slices=5)
    moved, moved_mask = augment(image, mask, generator(0))
    assert moved.shape == image.shape and moved_mask.shape == mask.shape and moved_mask.dtype == mask.dtype
    apart, apart_mask = to_volume(moved, 5), to_volume(moved_mask, 5)
    torch.testing.assert_close(apart, apart[:, :, :1].expand_as(apart))
    assert torch.equal(apart_mask, apart_mask[:, :1].expand_as(apart_mask))
    assert not torch.equal(moved, image) and not torch.equal(moved_mask, mask)
    alone, alone_mask = augmentation.build(replace(config, elastic=0), (0.1, 0.2), 5)(image, mask, generator(0))
    flat, flat_mask = augmentation.build(replace(config, elastic=0), (0.1, 0.2))(
        plane[:, :, 0], shape[:, 0], generator(0)
    )
    torch.testing.assert_close(to_volume(alone, 5)[:, :, 2], flat)
    assert torch.equal(to_volume(alone_mask, 5)[:, 2], flat_mask)


@pytest.mark.row("P13")
@pytest.mark.parametrize("name", ["unet", "unetplusplus"])
def test_a_pruned_network_of_volumes_equals_the_one_with_those_channels_silenced(name):
    config = small(**{"network.name": name})
    blank = acdc._blank(config)
    torch.manual_seed(0)
    model = blank.build().eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(layer.running_mean), torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.uniform_(layer.weight), torch.nn.init.uniform_(layer.bias)
    channels = pruning.trace(model, *blank.shape)
    made = pruning.make_plan(pruning.Prune(default=0.4), model, channels)
    smaller = pruning.apply(model, channels, made)
    silent = tracing.silenced(model, channels, pruning.plan.origins(channels, made))
    image = torch.rand(2, *blank.shape)
    with torch.inference_mode():
        assert (smaller(image) - silent(image)).abs().max() < 1e-5
        assert (smaller(image) - model(image)).abs().max() > 1e-3
    assert sum(p.numel() for p in smaller.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


@pytest.mark.row("P8")
def test_blocks_have_the_names_that_they_have_in_2d():
    config = small(**{"prune.encoders.1": 0.5, "prune.bottleneck": 0.25})
    blank, (flat, deep) = acdc._blank(config), ([], [])
    for found, size in ((flat, {"network.dims": 2, "data.patch_slices": 0}), (deep, {})):
        model = acdc._blank(small(**size)).build()
        channels = pruning.trace(model, *acdc._blank(small(**size)).shape)
        found += pruning.blocks.of(model, channels)
    assert flat == deep
    channels = pruning.trace(blank.build(), *blank.shape)
    widths = pruning.make_plan(config.prune, blank.build(), channels).widths
    whole = {name: layer.writes[0][1] for name, layer in channels.layers.items() if name in widths}
    cut = {name.split(".net.")[0].removeprefix("network."): (whole[name], widths[name]) for name in widths}
    assert {name: ends for name, ends in cut.items() if ends[0] != ends[1]} == {
        "encoders.1": (8, 4),
        "bottleneck": (16, 12),
    }
    with pytest.raises(pruning.PlanError, match=r"encoders\.7: no block of this network"):
        acdc.check(small(**{"prune.encoders.7": 0.5}))


@pytest.mark.row("P51")
def test_a_dependency_graph_prunes_volumes_of_any_number_of_slices():
    pytest.importorskip("torch_pruning")
    config = small(**{"data.patch_slices": 5, "prune.default": 0.5, "prune.backend": "depgraph"})
    blank = acdc._blank(config)
    model = blank.build().eval()
    channels = pruning.trace(model, *blank.shape)
    made = pruning.make_plan(config.prune, model, channels)
    smaller = pruning.apply(model, channels, made)
    silent = tracing.silenced(model, channels, pruning.plan.origins(channels, made))
    image = torch.rand(1, *blank.shape)
    with torch.inference_mode():
        assert (smaller(image) - silent(image)).abs().max() < 1e-5
    assert sum(p.numel() for p in smaller.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mode", ["none", "rewind"])
def test_a_parent_is_pruned_and_trained_on_in_3d(run, tmp_path, mode):
    config = small(parent=str(run[1]), epochs=1, **{"prune.default": 0.5, "prune.mode": mode})
    for epoch in acdc.train(config):
        epoch.save(tmp_path / "checkpoint")
    meta = checkpoints.read_meta(tmp_path / "checkpoint")
    assert meta["constants"]["gmacs"] < 0.5 * meta["pruned"]["parent_gmacs"]
    found = acdc.evaluate(tmp_path / "checkpoint", "test", tmp_path / "out")
    assert {"mean_dice_before", "mean_dice", "latency_ms"} < found.metrics.keys()


def test_a_run_goes_on_in_3d_with_patches_whose_number_is_no_power_of_two(tmp_path):
    """The network is traced at patches of its own size, which 64 rows would not be."""
    config = small(epochs=1, **{"data.patch_slices": 5, "prune.default": 0.5})
    for epoch in acdc.train(config):
        epoch.save(tmp_path / "checkpoint")
    *_, second = acdc.train(replace(config, epochs=2), tmp_path / "checkpoint")
    assert second.number == 2
    assert _model.macs_of(acdc.load(tmp_path / "checkpoint")[1], *acdc._blank(config).shape, config.network) > 0


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"data.patch_slices": 0}, "data.patch_slices: got 0 for a network of volumes; write how many slices"),
        ({"network.dims": 2}, "network.dims: got 2 with data.patch_slices 4; write 3, or 0 slices"),
        ({"normalise.method": "percentile"}, "normalise.method: percentile would scale each patch otherwise"),
        ({"loss.ms_ssim": 0.1}, "loss.ms_ssim: is of images, it would mix the slices of volumes"),
        ({"data.patch_slices": -1}, "patch_slices: got -1; expected 0 or more"),
        ({"network.name": "tinyunet"}, "dims: got 3 for tinyunet; write 2, or a network of unet"),
    ],
)
def test_what_has_no_sense_in_3d_is_refused(changed, problem):
    with pytest.raises(ConfigError, match=problem):
        small(**changed)


def test_a_parent_of_images_is_refused_for_volumes(tmp_path):
    for epoch in acdc.train(replace(acdc.Config.debug(), epochs=1)):
        epoch.save(tmp_path / "flat")
    config = configuration.build(acdc.Config, {"parent": str(tmp_path / "flat"), "data.patch_slices": 4})
    with pytest.raises(ValueError, match="dims: got 2, but the samples here are volumes; write 3"):
        acdc.prepare(config)


def test_inspect_draws_a_slice_of_each_volume(tmp_path):
    (path,) = acdc.inspect(small(), tmp_path)
    (flat,) = acdc.inspect(replace(acdc.Config.debug(), data=replace(small().data, patch_slices=0)), tmp_path / "flat")
    with Image.open(path) as ours, Image.open(flat) as theirs:
        assert ours.size == theirs.size and len(np.unique(np.asarray(ours.convert("L")))) > 50
