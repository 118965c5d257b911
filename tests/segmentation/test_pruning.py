"""Pruned networks equal the whole ones with the dropped channels silent; plans are data; selection is exact."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segmentation import checkpoints, networks, pruning
from segmentation.networks import Network, cost
from segmentation.pruning import Prune, blocks, channels, importance, plan, selection, weights

RATIOS = {
    "encoders.0": 0.0,
    "encoders.1": 0.1,
    "encoders.2": 0.2,
    "encoders.3": 0.3,
    "bottleneck": 0.3,
    "decoders.1": 0.3,
    "decoders.3": 0.3,
    "decoders.5": 0.2,
    "decoders.7": 0.1,
}
"""Of the reference's own experiment."""

SMALL = {
    "tinyunet": Network(name="tinyunet", base=4, dropout=0.1),
    "unet": Network(name="unet", widths=(4, 8), dropout=0.1),
    "unetplusplus": Network(name="unetplusplus", widths=(4, 8, 12), deep_supervision=True),
    "unet3plus": Network(name="unet3plus", encoder="plain", base=4, depth=3, cat_channels=4, deep_supervision=True),
    "attention_unet": Network(name="attention_unet", widths=(4, 8)),
}
IMPORTANCES = ("l1", "l2", "bn_scale", "pearson", "cosine", "random")


def alive(config: Network, seed: int = 0, classes: int = 3) -> nn.Module:
    """Return a network whose weights, biases and batch statistics are all different from their first values."""
    torch.manual_seed(seed)
    model = networks.build(config, 1, classes)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim <= 1:
            tensor.data.copy_(torch.rand_like(tensor) + 0.25)
    return model.eval()


def random_kept(sizes: dict[str, int], seed: int) -> dict[str, tuple[int, ...]]:
    """Return a random part of each origin's channels, one at least."""
    drawn = torch.Generator().manual_seed(seed)
    kept = {}
    for origin, size in sizes.items():
        count = int(torch.randint(1, size + 1, (), generator=drawn))
        kept[origin] = tuple(sorted(torch.randperm(size, generator=drawn)[:count].tolist()))
    return kept


def difference(model: nn.Module, graph: channels.Channels, kept: dict[str, tuple[int, ...]], seed: int = 0) -> float:
    """Return how far the smaller network is from the whole one with the same channels silent."""
    image = torch.rand(2, 1, 24, 40, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        smaller = channels.cut(model, graph, kept).eval()(image)
        return float((smaller - channels.silenced(model, graph, kept)(image)).abs().max())


def drawn_network(name: str, widths: tuple[int, ...]) -> Network:
    if name == "tinyunet":
        return Network(name="tinyunet", base=widths[0])
    if name == "unet3plus":
        return Network(name="unet3plus", encoder="plain", widths=widths, cat_channels=widths[0], deep_supervision=True)
    return Network(name=name, widths=widths)  # type: ignore[arg-type]


@pytest.mark.row("P13", "P14", "P15", "P16")
@pytest.mark.parametrize("name", ["tinyunet", "unet", "unetplusplus", "unet3plus", "attention_unet"])
@given(
    widths=st.lists(st.integers(2, 9), min_size=2, max_size=3).map(tuple),
    norm=st.sampled_from(["batch", "none"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=20, deadline=None)
def test_a_pruned_network_equals_the_whole_one_with_the_dropped_channels_silent(name, widths, norm, seed):
    config = drawn_network(name, widths)
    config = config if name == "tinyunet" else Network(**{**vars(config), "norm": norm})
    model = alive(config, seed)
    graph = channels.trace(model, 1)
    assert set(graph.sizes()) > set()
    assert difference(model, graph, random_kept(graph.sizes(), seed), seed) < 1e-5


@pytest.mark.row("P14", "P16")
@pytest.mark.parametrize("block", ["encoders.0", "encoders.1", "bottleneck", "decoders.1", "decoders.3"])
def test_one_block_alone_can_go_wherever_it_is_read(block):
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    groups = blocks.of(model, graph)
    kept = dict.fromkeys(groups[block].origins, (1, 3))
    assert difference(model, graph, kept) < 1e-5
    smaller = channels.cut(model, graph, kept)
    touched = {name for name, layer in smaller.named_modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)}
    changed = {
        name for name in touched if smaller.get_submodule(name).weight.shape != model.get_submodule(name).weight.shape
    }
    assert {"encoders.0": "decoders.3.net.0", "encoders.1": "decoders.1.net.0"}.get(block, "") in {*changed, ""}


@pytest.mark.row("P49")
@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("name", ["unet", "unet3plus"])
def test_every_importance_makes_a_plan_whose_network_equals_the_silenced_one(kind, name):
    model = alive(SMALL[name])
    graph = channels.trace(model, 1)
    images = [torch.rand(2, 1, 24, 24)]
    made = pruning.make_plan(Prune(default=0.4, importance=kind), model, graph, images=images, seed=3)
    assert difference(model, graph, plan.origins(graph, made)) < 1e-5
    for block in blocks.of(model, graph).values():
        assert len(made.kept[block.ranked]) == block.total - math.floor(block.total * 0.4)


def test_groups_that_a_norm_reads_together_cannot_go():
    graph = channels.trace(networks.build(Network(name="unet", widths=(8, 8), norm="group"), 1, 2), 1)
    assert graph.sizes() == {}


def test_residual_additions_and_depthwise_layers_lose_the_same_channels():
    model = alive(Network(name="timm_unet", encoder="mobilenetv3_small_050", encoder_levels=3))
    graph = channels.trace(model, 1)
    assert len(graph.sizes()) < len(list(graph.convolutions()))
    image = torch.rand(2, 1, 64, 64)
    smaller = channels.cut(model, graph, random_kept(graph.sizes(), 1))
    smaller.train()(image).sum().backward()
    assert all(weight.grad is not None for weight in smaller.parameters() if weight.requires_grad)


@pytest.mark.row("P7")
def test_l1_norms_are_sums_of_absolute_weights_of_each_output_filter():
    plain, across = nn.Conv2d(2, 3, 1, bias=False), nn.ConvTranspose2d(2, 3, 1, bias=False)
    plain.weight.data = torch.tensor([[1.0, -2.0], [0.5, 0.5], [-3.0, 0.0]])[:, :, None, None]
    across.weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, -1.0]])[:, :, None, None]
    assert importance.filter_norms(plain, 1).tolist() == [3.0, 1.0, 3.0]
    assert importance.filter_norms(across, 1).tolist() == [1.0, 3.0, 4.0]
    assert importance.filter_norms(plain, 2)[0] == pytest.approx(math.sqrt(5))


@pytest.mark.row("P10")
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0]), min_size=1, max_size=40),
    ratio=st.floats(0, 1, exclude_max=True),
    least=st.integers(1, 4),
)
def test_exactly_the_floor_of_n_times_ratio_smallest_go_and_ties_are_stable(values, ratio, least):
    kept = selection.by_ratio(torch.tensor(values), ratio, least=least)
    count = min(math.floor(len(values) * ratio), max(0, len(values) - least))
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    assert kept == tuple(sorted(order[count:]))


def test_similar_filters_go_first_and_the_weaker_of_two():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False))
    model[0].weight.data = torch.tensor([1.0, 2.0, -1.0])[:, None, None, None]
    images = [torch.rand(4, 1, 8, 8)]
    alike = importance.similarities(model, ["0"], images, "pearson")["0"]
    assert alike.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert alike[0].tolist() == pytest.approx([1, 1, -1])
    found = importance._redundancy(alike, importance.filter_norms(model[0], 1))
    assert int(found.argmin()) == 0
    assert selection.by_ratio(found, 0.67, below=1 - 0.9) == (1, 2)  # the third is alike to none


@pytest.mark.row("P8")
def test_an_unknown_block_is_refused_with_the_nearest_names():
    model = networks.build(SMALL["unet"], 1, 2)
    graph = channels.trace(model, 1)
    with pytest.raises(plan.PlanError, match=r"decoder\.1: no block of this network; did you mean 'decoders.1'"):
        pruning.make_plan(Prune(blocks={"decoder.1": 0.3}), model, graph)


@pytest.mark.row("P8")
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"encoders\.1: got .* less than 1, which would empty a block"):
        Prune(blocks={"encoders.1": ratio})


@pytest.mark.row("P10")
def test_a_floor_of_channels_stays_whatever_the_ratio():
    model = networks.build(SMALL["unet"], 1, 2)
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(default=0.99, min_channels=3), model, graph)
    assert {len(made.kept[block.ranked]) for block in blocks.of(model, graph).values()} == {3}


@pytest.mark.row("P9")
def test_blocks_that_are_not_listed_have_the_default_and_a_name_stands_for_all_below_it():
    groups = dict.fromkeys(["encoders.0", "encoders.1", "encoders.10", "bottleneck"])
    found = blocks.ratios(groups, {"encoders": 0.1, "encoders.1": 0.3}, 0.25)
    assert found == {"encoders.0": 0.1, "encoders.1": 0.3, "encoders.10": 0.1, "bottleneck": 0.25}


@pytest.mark.row("P12", "P41")
def test_the_reference_ratios_give_its_widths_parameters_and_macs():
    with torch.device("meta"):
        model = networks.build(Network(name="unet", widths=(64, 128, 256, 512), bottleneck=1024), 1, 4)
    graph = channels.trace(model, 1, 256, 256)
    assert (graph.parameters(), graph.macs()) == (31_036_676, 48_104_472_576)
    widths = {
        origin: block.total - math.floor(block.total * RATIOS[name])
        for name, block in blocks.of(model, graph).items()
        for origin in block.origins
    }
    assert [widths[f"{name}.net.3"] for name in RATIOS] == [64, 116, 205, 359, 717, 359, 180, 103, 58]
    assert (graph.parameters(widths), graph.macs(widths)) == (15_766_586, 31_201_319_936)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_arithmetic_of_cost_is_that_of_the_networks(name):
    model = networks.build(SMALL[name], 1, 3)
    graph = channels.trace(model, 1, 32, 48)
    made = pruning.make_plan(Prune(default=0.3), model, graph)
    widths = {origin: len(kept) for origin, kept in plan.origins(graph, made).items()}
    smaller = pruning.apply(model, graph, made)
    assert graph.parameters(widths) == networks.parameter_count(smaller) < networks.parameter_count(model)
    again = channels.trace(smaller, 1, 32, 48)
    assert graph.macs(widths) == again.macs() < graph.macs()
    if name in ("tinyunet", "unet", "attention_unet"):  # the others have heads that evaluation does not run
        assert graph.macs() == cost.macs(model, 1, 32, 48)


@pytest.mark.row("P11")
def test_a_plan_is_kept_as_json_and_rebuilds_identical_weights(tmp_path):
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(default=0.3), model, graph)
    plan.write(tmp_path / plan.FILE, made)
    content = json.loads((tmp_path / plan.FILE).read_text())
    assert content["encoders.1.net.0"] == {"kept": list(made.kept["encoders.1.net.0"]), "total": 8}
    assert plan.read(tmp_path / plan.FILE) == made
    again = pruning.make_plan(Prune(plan=str(tmp_path / plan.FILE)), model, graph)
    first, second = (pruning.apply(model, graph, each).state_dict() for each in (made, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.pop("bottleneck.net.0"), "nothing about bottleneck.net.0"),
        (lambda content: content.update({"encoder.9": {"kept": [0], "total": 2}}), "no layer encoder.9"),
        (lambda content: content["bottleneck.net.0"].update(total=99), "bottleneck.net.0 has 16 channels, not 99"),
        (lambda content: content["final_conv"].update(kept=[0]), "final_conv: its channels cannot go"),
        (lambda content: content["bottleneck.net.0"].update(kept=[]), "keeps no channel"),
        (lambda content: content["bottleneck.net.0"].update(kept=[3, 1]), "expected ascending numbers"),
        (lambda content: content["bottleneck.net.0"].pop("total"), "no plan of the form"),
    ],
)
def test_a_plan_of_another_network_or_a_broken_one_is_refused(tmp_path, change, problem):
    model = networks.build(SMALL["unet"], 1, 2)
    graph = channels.trace(model, 1)
    content = pruning.make_plan(Prune(), model, graph).to_dict()
    change(content)
    path = tmp_path / plan.FILE
    path.write_text(json.dumps(content))
    with pytest.raises(plan.PlanError, match=problem):
        pruning.make_plan(Prune(plan=str(path)), model, graph)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(plan.PlanError, match=r"nowhere\.json: no such plan"):
        plan.read(tmp_path / "nowhere.json")


@pytest.mark.row("P46")
def test_a_pruned_network_is_built_again_from_widths_and_weights(tmp_path):
    model = alive(SMALL["unet3plus"])
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(default=0.3, backend="layers"), model, graph)
    smaller = pruning.apply(model, graph, made).eval()
    checkpoints.save(tmp_path, model=smaller, meta={"widths": made.widths}, state={})
    fresh = networks.build(SMALL["unet3plus"], 1, 3)
    again = plan.shrunk(fresh, channels.trace(fresh, 1), checkpoints.read_meta(tmp_path)["widths"]).eval()
    checkpoints.load_weights(tmp_path, again)
    image = torch.rand(1, 1, 24, 24)
    assert torch.equal(again(image), smaller(image))


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_is_met_and_with_as_little_as_possible(what):
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    count = {"macs": graph.macs, "params": graph.parameters}[what]
    made = pruning.make_plan(Prune(**{what: 0.5}), model, graph)
    widths = {origin: len(kept) for origin, kept in plan.origins(graph, made).items()}
    assert count(widths) <= 0.5 * count()
    one_more = {origin: min(width + 1, graph.sizes().get(origin, width)) for origin, width in widths.items()}
    assert count(one_more) > 0.5 * count()
    with pytest.raises(plan.PlanError, match=f"{what}: even with 3 channels in every layer"):
        pruning.make_plan(Prune(**{what: 0.01}, min_channels=3), model, graph)


def test_one_global_ratio_drops_that_share_of_all_filters():
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    groups = blocks.of(model, graph)
    made = pruning.make_plan(Prune(global_=0.4), model, graph)
    total = sum(block.total for block in groups.values())
    assert sum(len(made.kept[block.ranked]) for block in groups.values()) == total - math.floor(total * 0.4)


@pytest.mark.parametrize("given", [{"global_": 0.2, "default": 0.1}, {"macs": 0.5, "params": 0.5}])
def test_filters_go_in_one_way_at_a_time(given):
    with pytest.raises(ValueError, match="one way at a time"):
        Prune(**given)


PARTS = {
    "tinyunet": {"enc2.1.0", "bott.1.0", "up1", "dec1.0.0"},
    "unet": {"encoders.1", "bottleneck", "decoders.1"},
    "unetplusplus": {"encoders.2", "encoders.3", "nodes.2.0"},
    "unet3plus": {f"decoder.levels.2.branches.{level}.0" for level in range(4)}
    | {"encoder.levels.2", "encoder.levels.3", "decoder.levels.2.fuse.0"},
}


@pytest.mark.row("P50")
@pytest.mark.parametrize("name", sorted(PARTS))
def test_parts_of_a_network_are_its_sides_and_its_two_coarsest_resolutions(name):
    model = networks.build(SMALL[name], 1, 2)
    graph = channels.trace(model, 1)
    groups = blocks.of(model, graph)
    encoder, decoder, deep = (blocks.part(groups, graph, where) for where in ("encoder", "decoder", "deep"))
    assert set(deep) == PARTS[name]
    assert {block[:3] for block in encoder} == {"enc"}
    assert set(groups) - set(encoder) - set(decoder) <= {"bottleneck", "bott.1.0"}
    assert set(encoder).isdisjoint(decoder)
    assert blocks.part(groups, graph, "all") == tuple(groups)


@pytest.mark.row("P50")
@pytest.mark.parametrize("where", ["encoder", "decoder", "deep", "decoders.1"])
@pytest.mark.parametrize("way", [{"default": 0.5}, {"global_": 0.4}, {"macs": 0.9}, {"params": 0.9}])
def test_a_part_alone_is_pruned_whatever_the_way(where, way):
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    groups = blocks.of(model, graph)
    made = pruning.make_plan(Prune(where=where, **way), model, graph)
    left = {name: len(made.kept[block.ranked]) for name, block in groups.items()}
    inside = blocks.part(groups, graph, where)
    assert {name for name in groups if left[name] < groups[name].total} <= set(inside)
    total, gone = (sum(count[name] for name in inside) for count in ({n: b.total for n, b in groups.items()}, left))
    gone = total - gone
    if "default" in way:
        assert gone == sum(math.floor(groups[name].total * 0.5) for name in inside)
    elif "global_" in way:
        assert gone == math.floor(total * 0.4)
    else:
        assert gone > 0


@pytest.mark.row("P50")
def test_a_block_with_a_ratio_of_its_own_has_it_inside_and_outside_the_part():
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    prune = Prune(default=0.5, where="encoder", blocks={"encoders.0": 0.25, "decoders.1": 0.75})
    found = pruning.ratios(prune, graph, blocks.of(model, graph))
    assert found == {"encoders.0": 0.25, "encoders.1": 0.5, "bottleneck": 0.0, "decoders.1": 0.75, "decoders.3": 0.0}


@pytest.mark.row("P50")
def test_an_unknown_part_is_refused_with_the_nearest_and_before_any_weights_are_there():
    with torch.device("meta"):
        model = networks.build(SMALL["unet"], 1, 2)
    graph = channels.trace(model, 1)
    with pytest.raises(plan.PlanError, match=r"where: got 'decoder\.1'; no part .* did you mean 'decoders\.1'"):
        pruning.check(Prune(default=0.1, where="decoder.1"), model, graph)
    with pytest.raises(plan.PlanError, match=r"every layer of encoders\.0 more than 0\.5"):
        pruning.check(Prune(params=0.5, where="encoders.0"), model, graph)
    with pytest.raises(ValueError, match="where: got 'deep' together with a plan"):
        Prune(plan="some.json", where="deep")


def test_a_network_whose_names_tell_no_sides_has_none():
    model = fcn()
    graph = channels.trace(model, 1)
    with pytest.raises(plan.PlanError, match="where: got 'decoder'"):
        blocks.part(blocks.of(model, graph), graph, "decoder")


@pytest.mark.parametrize("backend", ["blocks", "layers"])
def test_a_network_that_was_pruned_can_be_pruned_again_by_blocks(backend):
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(global_=0.4, backend=backend, importance="random"), model, graph, seed=1)
    once = pruning.apply(model, graph, made).eval()
    again = channels.trace(once, 1)
    assert all(
        {again.sizes()[origin] for origin in block.origins} == {block.total}
        for block in blocks.of(once, again).values()
    )
    for seed in range(3):
        other = pruning.make_plan(Prune(default=0.5, importance="random"), once, again, seed=seed)
        assert difference(once, again, plan.origins(again, other)) < 1e-5


@pytest.mark.row("P17")
def test_weights_that_stay_are_those_of_the_parent():
    model = alive(SMALL["unet"])
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(default=0.5), model, graph)
    kept, before = made.kept["encoders.0.net.3"], model.get_submodule("encoders.0.net.3").weight
    found = pruning.apply(model, graph, made).get_submodule("encoders.0.net.3").weight
    assert torch.equal(found, before[list(kept)][:, list(made.kept["encoders.0.net.0"])])


@pytest.mark.row("P18")
def test_random_weights_are_seeded_of_the_same_shapes_and_told_of():
    model = alive(SMALL["unet"])
    one, two, other = (copy.deepcopy(model) for _ in range(3))
    state = torch.random.get_rng_state()
    told = weights.draw(one, 1)
    weights.draw(two, 1)
    weights.draw(other, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "bottleneck.net.0"
    first, second, third = (each.get_submodule(name).weight for each in (one, two, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert first.shape == model.get_submodule(name).weight.shape
    assert told[name]["before"] == weights.statistics(model)[name] != told[name]["after"]
    assert told[name]["after"][1] == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)


@pytest.mark.row("P48")
def test_recalibration_takes_batch_statistics_anew_and_leaves_weights_and_modes():
    model = alive(SMALL["unet"])
    model.bottleneck.train()
    before = copy.deepcopy(model)
    images = [torch.rand(4, 1, 16, 16) * 3 for _ in range(3)]
    assert weights.recalibrate(model, images, 2) == 2
    for (name, own), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(own, old), name
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    first, seen = model.encoders[0].net, torch.cat(images[:2])
    assert torch.allclose(first[1].running_mean, first[0](seen).mean((0, 2, 3)), atol=1e-5)
    assert first[1].momentum == before.encoders[0].net[1].momentum


def test_recalibration_without_batches_changes_nothing():
    model = alive(SMALL["unet"])
    before = copy.deepcopy(model.state_dict())
    assert weights.recalibrate(model, [], 5) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.row("P51")
@pytest.mark.parametrize("name", ["unet", "unetplusplus", "unet3plus", "fcn"])
def test_groups_of_torch_pruning_make_the_same_kind_of_plan(name, tmp_path):
    pytest.importorskip("torch_pruning")
    model = fcn() if name == "fcn" else alive(SMALL[name])
    graph = channels.trace(model, 1)
    made = pruning.make_plan(Prune(default=0.3, backend="depgraph"), model, graph)
    smaller = pruning.apply(model, graph, made)
    assert networks.parameter_count(smaller) < networks.parameter_count(model)
    logits = smaller.train()(torch.rand(2, 1, 32, 32))
    (logits.float() if isinstance(logits, torch.Tensor) else logits.logits).sum().backward()
    # Two derivations that know nothing of each other agree on which layers hang together.
    ours, theirs = blocks.of(model, graph, tied=False), pruning.dependency_graph.blocks(model, graph)
    assert {block.origins for block in ours.values()} == {block.origins for block in theirs.values()}
    checkpoints.save(tmp_path, model=smaller, meta={}, state={})
    again = plan.shrunk(model, graph, made.widths)
    checkpoints.load_weights(tmp_path, again)
    assert torch.equal(again.eval()(torch.ones(1, 1, 32, 32)), smaller.eval()(torch.ones(1, 1, 32, 32)))


def fcn() -> nn.Module:
    """Return a fully convolutional network: a ResNet-18 of torchvision with logits enlarged to the image."""
    import torchvision

    class Fcn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = torchvision.models.resnet18(weights=None)
            body.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
            self.body = nn.Sequential(*list(body.children())[:-2])
            self.head = nn.Conv2d(512, 3, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(self.head(self.body(image)), size=image.shape[-2:], mode="bilinear")

    return Fcn()
