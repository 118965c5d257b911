"""Thresholds against optima known in closed form, counts against comparisons, AUPRC against sorting."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from segmentation import calibration, evaluation, froc, histograms, metrics
from segmentation import operating_points as op
from segmentation.epoch import NonFiniteError
from segmentation.evaluation import ImageScores
from segmentation.operating_points import CUTS, EDGES, Thresholds
from tests import processes

torch.set_num_threads(1)
NAMES = [f"{number}.png" for number in range(7)]


def seven_images(channels=1):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, channels, 12, 16, generator=generator) < 0.3).to(torch.uint8)
    mask[3] = 0
    probability = (torch.randn(mask.shape, generator=generator) + 2 * mask - 1).sigmoid()
    return probability, mask


def counted(indices=range(7), channels=1):
    probability, mask = seven_images(channels)
    place = torch.as_tensor(list(indices))
    return op.histogram(probability[place], mask[place], place)


def of_pixels(positive, negative):
    """Return one image's histograms of these scores."""
    scores = torch.tensor(np.concatenate([positive, negative]), dtype=torch.float32).view(1, 1, 1, -1)
    mask = torch.tensor([1] * len(positive) + [0] * len(negative)).view(1, 1, 1, -1)
    return op.histogram(scores, mask, torch.zeros(1, dtype=torch.int64))


def by_share(share, pixels=20_000):
    """Return the quantiles of two densities of scores: 2 p for positive pixels, 2 (1 - p) for negative ones."""
    many = [round(share * pixels), pixels - round(share * pixels)]
    quantiles = [(np.arange(count) + 0.5) / max(count, 1) for count in many]
    return np.sqrt(quantiles[0]), 1 - np.sqrt(1 - quantiles[1])


def dice_by_share(share, cut):
    found, false = share * (1 - cut**2), (1 - share) * (1 - cut) ** 2
    return 2 * found / (found + false + share)


def together(*parts):
    each = [of_pixels(*part) for part in parts]
    return histograms.merge([histograms.Histograms(np.array([place]), part.pixels) for place, part in enumerate(each)])


@pytest.mark.row("S10")
def test_the_cuts_that_people_name_are_among_them():
    named = [*(step / 20 for step in range(1, 20)), 0.45, 0.475]
    assert all(np.float32(cut) in EDGES for cut in named)
    assert len(CUTS) >= 200 and (np.diff(EDGES) > 0).all()
    assert np.diff(CUTS).max() <= 0.0025 + 1e-12


@pytest.mark.row("S10")
def test_scores_are_binned_as_float32_compares_them():
    generator = np.random.default_rng(0)
    near = [EDGES, np.nextafter(EDGES, np.float32(1)), np.nextafter(EDGES, np.float32(0))]
    spread = [[0, -0.0, 1], generator.random(20_000), 10 ** (-9 * generator.random(20_000))]
    values = np.concatenate([*near, *spread, 1 - 10 ** (-8 * generator.random(20_000))]).astype(np.float32)
    np.testing.assert_array_equal(op._bins(values), np.searchsorted(EDGES, values))


@pytest.mark.row("S13")
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.85, float(CUTS[3]), float(CUTS[-3])])
def test_counts_at_a_cut_are_those_of_metrics(cut):
    probability, mask = seven_images(channels=2)
    probability[0, 0, :4] = cut  # not called: more is asked for, not as much
    probability = torch.cat([probability, torch.nextafter(probability, torch.ones(()))], dim=-1)
    mask = torch.cat([mask, mask], dim=-1)
    mask[1, 1, :3] = 255
    found = op.histogram(probability, mask, torch.arange(7))
    logits = probability.double().logit()
    np.testing.assert_array_equal(op.counts_at(found, cut), metrics.counts_multilabel(probability > cut, mask))
    several = metrics.count(logits, mask, multilabel=True, threshold=(0.5, 0.25))
    np.testing.assert_array_equal(op.counts_at(found, (0.5, 0.25)), several)


@pytest.mark.row("S10")
def test_the_pooled_optimum_is_that_of_the_closed_form():
    # Of as many positive pixels as negative ones: t^2 - 3 t + 1 = 0.
    learnt = op.learn(of_pixels(*by_share(0.5)), ["a"])
    assert learnt.f1[0] == pytest.approx((3 - 5**0.5) / 2, abs=0.005)
    # The best threshold of calibrated scores is half of the F1 there.
    assert learnt.f1_score[0] == pytest.approx(3 - 5**0.5, abs=1e-3)


@pytest.mark.row("S10")
def test_dice_as_a_mean_over_images_has_an_optimum_of_its_own():
    shares = (0.6, 0.02)
    learnt = op.learn(together(*(by_share(share, 500_000) for share in shares)), ["a", "b"])
    best = minimize_scalar(lambda t: -np.mean([dice_by_share(share, t) for share in shares]), bounds=(0, 1))
    pooled = minimize_scalar(lambda t: -dice_by_share(np.mean(shares), t), bounds=(0, 1))
    assert abs(best.x - pooled.x) > 0.02
    assert learnt.dice[0] == pytest.approx(best.x, abs=0.005)
    assert learnt.f1[0] == pytest.approx(pooled.x, abs=0.005)
    assert learnt.dice_score[0] == pytest.approx(-best.fun, abs=1e-3)


@pytest.mark.row("S10")
def test_of_equally_good_cuts_the_middle_is_taken():
    assert op.learn(of_pixels([0.9] * 4, [0.1] * 4), ["a"]).f1 == (0.5,)
    assert op.best_cut(np.full(len(CUTS), np.nan)) == 0.5
    two = np.zeros(len(CUTS))
    two[op._place(0.1)] = two[op._place(0.6) : op._place(0.8)] = 1
    assert op.best_cut(two) == pytest.approx(0.7, abs=0.0026)


@pytest.mark.row("S14")
def test_average_precision_of_the_textbook_and_of_ties():
    assert op.average_precision([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(0.5 + 0.5 * 2 / 3, abs=1e-12)
    assert op.average_precision([0.5] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.3, abs=1e-12)
    assert np.isnan(op.average_precision([0.5], [0]))
    with pytest.raises(NonFiniteError, match="1 of 2 are NaN"):
        op.average_precision([0.5, np.nan], [0, 1])


def reference(scores, truth):
    """Return scikit-learn's average precision, or where it is not installed the sum that it documents."""
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        recall, area = 0.0, 0.0
        for score in sorted(set(scores), reverse=True):
            called = scores >= score
            area += ((called & truth).sum() / truth.sum() - recall) * (called & truth).sum() / called.sum()
            recall = (called & truth).sum() / truth.sum()
        return area
    return average_precision_score(truth, scores)


@pytest.mark.row("S14")
@pytest.mark.parametrize("decimals", [1, 3, 9])
def test_exact_average_precision_is_the_references(decimals):
    generator = np.random.default_rng(decimals)
    truth = generator.random(1500) < 0.2
    scores = np.round(np.where(truth, generator.beta(3, 2, 1500), generator.beta(2, 4, 1500)), decimals)
    assert op.average_precision(scores, truth) == pytest.approx(reference(scores, truth), abs=1e-6)


def normal_logits(positive, negative, share=0.1, pixels=10**6, seed=0):
    generator = np.random.default_rng(seed)
    many = round(share * pixels)
    draws = [generator.normal(*positive, many), generator.normal(*negative, pixels - many)]
    return [torch.from_numpy(draw).float().sigmoid().numpy() for draw in draws]


@pytest.mark.row("S14")
@pytest.mark.parametrize(
    ("positive", "negative", "share"),
    [((1, 1.5), (-1, 1.5), 0.1), ((6, 5), (-8, 5), 0.1), ((1, 2), (-6, 2), 0.005), ((-4.6, 0.4), (-5, 0.4), 0.1)],
    ids=["spread", "crowded", "rare", "first epoch"],
)
def test_auprc_of_a_million_pixels_is_within_a_thousandth(positive, negative, share):
    scores = normal_logits(positive, negative, share)
    exact = op.average_precision(np.concatenate(scores), [1] * len(scores[0]) + [0] * len(scores[1]))
    assert op.auprc(of_pixels(*scores))[0] == pytest.approx(exact, abs=1e-3)


@pytest.mark.row("S14")
def test_auprc_of_masks_instead_of_probabilities_is_exact():
    positive, negative = [1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 940
    exact = op.average_precision([*positive, *negative], [1] * 40 + [0] * 960)
    assert op.auprc(of_pixels(positive, negative))[0] == pytest.approx(exact, abs=1e-12)
    assert np.isnan(op.auprc(of_pixels([], [0.3]))[0])
    assert op.auprc(of_pixels([0.3, 0.4], [])) == 1
    assert op.learn(of_pixels(positive, negative), ["a"]).f1 == (0.5,)


@pytest.mark.row("X9")
def test_parts_and_repeated_images_change_nothing():
    whole = counted()
    parts = histograms.merge([op.empty(1), counted([4, 0, 2, 6]), counted([1, 3, 5, 0])])
    np.testing.assert_array_equal(parts.index, whole.index)
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    assert histograms.gather(whole) is whole


@pytest.mark.row("S49")
def test_an_image_takes_the_same_room_however_large_it_is():
    small, large = (
        op.histogram(torch.rand(1, 1, 16, side), torch.ones(1, 1, 16, side), torch.zeros(1)) for side in (1, 999)
    )
    assert small.pixels.nbytes == large.pixels.nbytes < 10_000


def rank(number, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    indices = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 0]][number])
    probability, mask = seven_images()
    both = histograms.gather(counted(indices))
    seen = froc.gather(froc.detect(probability[indices, 0], mask[indices, 0], indices))
    told = [op.learn(both, NAMES).record(), froc.scores(seen)]
    torch.save(json.dumps(told), f"{results}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.row("X9")
def test_two_processes_learn_what_one_does(tmp_path):
    processes.ranks(rank, str(tmp_path / "store"), str(tmp_path))
    probability, mask = seven_images()
    seen = froc.detect(probability[:, 0], mask[:, 0], torch.arange(7))
    alone = json.dumps([op.learn(counted(), NAMES).record(), froc.scores(seen)])
    assert [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)] == [alone, alone]


@pytest.mark.row("S12")
def test_thresholds_survive_json_and_know_their_run():
    found = counted(channels=2)
    learnt = op.learn(found, NAMES)
    assert Thresholds(**json.loads(json.dumps(learnt.record()))) == learnt
    assert len(learnt.f1) == len(learnt.dice) == 2 and learnt.images == 7

    order = [3, 1, 0, 2, 6, 5, 4]
    shuffled = histograms.Histograms(found.index[order], found.pixels[order])
    assert histograms.digest(shuffled, [NAMES[place] for place in order]) == learnt.run
    assert histograms.digest(found, [*NAMES[:-1], "other.png"]) != learnt.run
    pixels = found.pixels.copy()
    pixels[0, 0, :, 100] += np.array([1, 0], np.uint32)
    assert histograms.digest(histograms.Histograms(found.index, pixels), NAMES) != learnt.run


@pytest.mark.row("S11")
@pytest.mark.row("S12")
def test_test_labels_cannot_change_the_thresholds():
    learnt = op.learn(counted([0, 1, 2]), NAMES[:3])
    probability, mask = seven_images()
    records = [
        op.report(op.histogram(probability, labels, torch.arange(7)), learnt, ["defect"])
        for labels in (mask, 1 - mask, torch.zeros_like(mask))
    ]
    assert [record["thresholds"] for record in records] == [{"fixed": 0.5, **learnt.record()}] * 3
    scored = [record["channels"]["defect"]["f1"]["pooled_f1"] for record in records]
    assert len(set(scored)) == 3
    with pytest.raises(AttributeError):
        learnt.f1 = (0.3,)


@pytest.mark.row("S11")
@pytest.mark.row("S43")
def test_the_report_scores_both_thresholds_beside_a_half_pooled_and_per_image():
    found = counted()
    learnt = op.learn(found, NAMES)
    record = json.loads(json.dumps(op.report(found, learnt, ["defect"])))["channels"]["defect"]
    for kind, cut in (("fixed", 0.5), ("f1", learnt.f1), ("dice", learnt.dice)):
        counts = op.counts_at(found, cut)
        assert record[kind]["pooled_precision"] == pytest.approx(metrics.precision(counts.sum(0))[0])
        assert record[kind]["image_recall"] == pytest.approx(np.nanmean(metrics.recall(counts)))
    assert record["f1"]["pooled_f1"] == learnt.f1_score[0] == op.pooled_f1(found).max()
    assert record["dice"]["image_dice"] == pytest.approx(learnt.dice_score[0])
    assert record["auprc"] == op.auprc(found)[0]
    with pytest.raises(ValueError, match="histograms of 1 channels, thresholds of 1 and the names a, b"):
        op.report(found, learnt, ["a", "b"])


@pytest.mark.row("S13")
def test_iou_at_cuts_and_shares_of_images_are_two_things():
    # Four pixels are true; calling those above 0.5, 0.75 and 0.9 finds 4, 2 and 1 of them.
    one = ([0.6, 0.7, 0.8, 0.95], [0.1] * 4)
    # Above 0.5 three false ones come in; above 0.75 none is left of all.
    other = ([0.7], [0.6, 0.6, 0.6, 0.1])
    found = together(one, other)
    assert {name: value[0] for name, value in op.iou_at_cuts(found).items()} == pytest.approx(
        {"iou_50": (1 + 0.25) / 2, "iou_75": (0.5 + 0) / 2, "iou_90": (0.25 + 0) / 2}
    )
    at = op.scores(op.counts_at(found, 0.5))
    assert [at[f"frac_images_iou_ge_{share}"][0] for share in (50, 75, 90, 95)] == [0.5] * 4
    assert op.scores(op.counts_at(found, 0.75))["frac_images_iou_ge_50"][0] == 0.5
    assert op.scores(op.counts_at(found, 0.9))["frac_images_iou_ge_50"][0] == 0


@pytest.mark.row("S47")
@pytest.mark.parametrize(
    ("empty", "dice", "baseline", "share"),
    [("nan", 0.5, 0.0, 0.5), ("one", 0.75, 0.75, 0.75), ("zero", 0.25, 0.0, 0.25)],
)
def test_images_without_a_defect_score_what_the_convention_says(empty, dice, baseline, share):
    # One found whole, one clean plate called dirty, two clean ones left alone.
    found = together(([0.9], [0.1]), ([], [0.8, 0.1]), ([], [0.1]), ([], [0.2]))
    at = op.scores(op.counts_at(found, 0.5), empty)
    assert at["image_dice"][0] == pytest.approx(dice)
    assert at["frac_images_iou_ge_50"][0] == pytest.approx(share)
    assert at["recall_per_image"][0] == pytest.approx(0.25)
    assert op.mean_dice(found, empty)[0, op._place(0.5)] == pytest.approx(dice)
    nothing = op.scores(op.all_empty(found), empty)
    assert nothing["image_dice"][0] == pytest.approx(baseline)
    assert nothing["pooled_recall"][0] == 0
    record = op.report(found, op.learn(found, list("abcd"), empty=empty), ["defect"])
    assert record["channels"]["defect"]["all_empty"]["image_dice"] == pytest.approx(baseline)
    assert record["thresholds"]["empty"] == empty


@pytest.mark.row("S47")
def test_images_that_are_all_clean_all_defect_or_none_at_all():
    clean = together(([], [0.2, 0.3]), ([], [0.1]))
    learnt = op.learn(clean, ["a", "b"], empty="one")
    assert learnt.dice[0] > 0.3 and learnt.dice_score == (1.0,)
    assert op.report(clean, learnt, ["defect"])["channels"]["defect"]["auprc"] is None
    undefined = op.learn(clean, ["a", "b"])
    assert undefined.f1 == undefined.dice == (0.5,), "cuts that call something score 0, and none scores more"
    assert op.report(clean, undefined, ["defect"])["channels"]["defect"]["all_empty"]["image_dice"] is None
    full = op.learn(together(([0.2, 0.9], [])), ["a"])
    assert full.f1_score == (1.0,) and full.f1[0] < 0.2
    none = op.learn(op.empty(1), [])
    assert none.f1 == (0.5,) and none.f1_score == (None,) and none.images == 0
    assert op.report(op.empty(1), none, ["defect"])["channels"]["defect"]["iou_50"] is None


def test_counts_at_a_cut_are_evaluated_like_all_others():
    found = counted()
    scores = ImageScores(found.index, op.counts_at(found, 0.5), np.full(7, np.nan))
    told = evaluation.evaluation(scores, NAMES, ["defect"], multilabel=True, replicates=50)
    assert told.metrics["dice_defect"] == pytest.approx(op.scores(op.counts_at(found, 0.5))["pooled_dice"][0])
    assert set(told.intervals) >= {"dice_defect", "iou_defect"}


def test_what_is_no_probability_is_told_with_its_image():
    probability, mask = seven_images()
    probability[4, 0, 0, :3] = float("nan")
    with pytest.raises(NonFiniteError, match="3 pixels are NaN, in 1 images: sample 14"):
        op.histogram(probability, mask, torch.arange(10, 17))
    with pytest.raises(ValueError, match="got -3 to 2; expected 0 to 1: logits need a sigmoid"):
        op.histogram(torch.tensor([[[[-3.0, 2.0]]]]), torch.zeros(1, 1, 1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="mask: got 2 to 2; expected 0, 1 or 255"):
        op.histogram(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"got scores \(1, 1, 2, 2\), mask \(1, 2, 2\) and 1 numbers; they must agree"):
        op.histogram(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"cut: got 0.333; .*the nearest is 0.3325"):
        op.counts_at(counted(), 0.333)
    with pytest.raises(ValueError, match="cut: got 2 for 1 channels"):
        op.counts_at(counted(), (0.5, 0.5))
    with pytest.raises(ValueError, match=f"2, {op.BINS}.* of probabilities"):
        op.pooled_f1(calibration.empty(1))
    with pytest.raises(ValueError, match="got 2 names of 7 images"):
        op.learn(counted(), ["a", "b"])
    record = op.learn(counted(), NAMES).record()
    with pytest.raises(ValueError, match="thresholds: f1"):
        Thresholds(**{**record, "f1": [1.5]})
    with pytest.raises(ValueError, match="learn them on validation again"):
        Thresholds(**{**record, "dice": [None]})
