import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation import splits
from segmentation.epoch import DataError


def whole(count):
    names = [f"s{i}" for i in range(count)]
    return splits.split(names, names)


@pytest.mark.row("A25")
@pytest.mark.parametrize("count", [7, 20, 100, 2641, 3987])
def test_sizes_are_the_truncated_fractions(count):
    made = whole(count)
    sizes = [len(made[name]) for name in splits.NAMES]
    assert sizes == [int(0.7 * count), int(0.85 * count) - int(0.7 * count), count - int(0.85 * count)]


def test_sizes_of_the_published_telescope_run():
    assert [len(whole(2641)[name]) for name in splits.NAMES] == [1848, 396, 397]


@pytest.mark.row("X6", "A27")
@given(st.lists(st.integers(0, 12), min_size=3, max_size=60).filter(lambda g: len(set(g)) >= 3), st.integers(0, 50))
def test_groups_stay_whole_and_every_sample_is_dealt_once(numbers, seed):
    made = splits.split([f"s{i}" for i in range(len(numbers))], [f"g{n}" for n in numbers], seed=seed)
    owner = {}
    for name in splits.NAMES:
        assert made[name]
        for index in made[name]:
            assert owner.setdefault(made.groups[index], name) == name
    assert sorted(i for name in splits.NAMES for i in made[name]) == list(range(len(numbers)))


def test_listing_order_does_not_change_who_is_where():
    names = [f"s{i}" for i in range(30)]
    forward, backward = splits.split(names, names), splits.split(names[::-1], names[::-1])
    for name in splits.NAMES:
        assert {forward.names[i] for i in forward[name]} == {backward.names[i] for i in backward[name]}


def test_another_seed_deals_otherwise_and_evenly():
    names = [f"s{i}" for i in range(40)]
    tests = [splits.split(names, names, seed=seed).test for seed in range(200)]
    assert len(set(tests)) == 200
    drawn = Counter(index for test in tests for index in test)
    assert 10 < min(drawn.values()) <= max(drawn.values()) < 60  # 30 expected of 200


def test_two_groups_cannot_make_three_splits():
    with pytest.raises(DataError, match="4 samples in 2 groups by patient; three splits need at least 3"):
        splits.split(list("abcd"), list("xxyy"), key="patient")


@pytest.mark.row("P34")
@pytest.mark.parametrize("seed", range(4))
def test_groups_given_for_testing_are_that_split_and_the_others_share_the_rest(seed):
    names = [f"s{index}" for index in range(100)]
    given = {f"s{index}" for index in range(20)}
    made = splits.split(names, names, fractions=(0.6, 0.2, 0.2), seed=seed, test=given)
    assert {names[index] for index in made.test} == given
    assert (len(made.train), len(made.validation)) == (60, 20)
    assert made.train != splits.split(names, names, fractions=(0.6, 0.2, 0.2), seed=seed + 9, test=given).train


def test_one_group_beside_those_for_testing_cannot_make_two_splits():
    with pytest.raises(DataError, match="at least 3 groups"):
        splits.split(["a", "b", "c"], ["a", "b", "c"], test={"a", "b"})


def test_fractions_must_sum_to_one():
    with pytest.raises(ValueError, match="fractions: got"):
        splits.split(list("abc"), list("abc"), fractions=(0.7, 0.2, 0.2))


def test_a_name_that_occurs_twice_is_refused():
    with pytest.raises(DataError, match="1 sample names occur twice, such as 'a'"):
        splits.split(list("aabcd"), list("vwxyz"))


@pytest.mark.row("X6")
def test_written_splits_hold_names_key_and_seed_and_read_back_equal(tmp_path):
    made = splits.split([f"s{i}" for i in range(9)], [f"g{i // 2}" for i in range(9)], seed=5, key="patient")
    splits.write(made, tmp_path / "run" / "splits.json")
    record = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert (record["group_key"], record["seed"], record["groups"]["s8"]) == ("patient", 5, "g4")
    assert sorted(record["train"] + record["validation"] + record["test"]) == [f"s{i}" for i in range(9)]
    assert splits.read(tmp_path / "run" / "splits.json") == made


def edited(tmp_path, change):
    path = tmp_path / "splits.json"
    splits.write(splits.split([f"s{i}" for i in range(12)], [f"g{i // 2}" for i in range(12)]), path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.row("X6")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["test"].append(r["train"][0]), "1 of the same sample in train and test: s"),
        (lambda r: r["test"].append(r["train"].pop()), "1 of the same group in train and test: g"),
        (lambda r: r["validation"].clear(), "split validation is empty"),
        (lambda r: r["train"].append(r["train"][0]), "each must be in one split"),
        (lambda r: r.update(train=r["train"][2:]), "10 samples in the splits, 12 in the data"),
        (lambda r: r["train"].append("nobody"), "'nobody' is missing"),
        (lambda r: r.pop("seed"), "'seed' is missing"),
    ],
)
def test_broken_split_files_are_refused_by_name(tmp_path, change, problem):
    path = edited(tmp_path, change)
    with pytest.raises(DataError, match=rf"splits\.json: .*{problem}"):
        splits.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"groups": []}'])
def test_a_file_that_is_no_splits_is_refused_by_name(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(DataError, match=r"splits\.json"):
        splits.read(tmp_path / "splits.json")


def test_a_missing_split_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        splits.read(tmp_path / "splits.json")


@pytest.mark.row("X2", "X7")
def test_only_an_open_test_split_gives_its_samples():
    made = whole(10)
    assert splits.indices(made, "train") == made.train
    with pytest.raises(splits.TestSplitError, match="evaluation alone"):
        splits.indices(made, "test")
    with splits.test_split_open():
        assert splits.indices(made, "test") == made.test
    with pytest.raises(splits.TestSplitError):
        splits.indices(made, "test")


def test_an_error_inside_the_block_shuts_the_test_split_again():
    with pytest.raises(KeyError), splits.test_split_open():
        raise KeyError
    assert not splits.test_split_is_open()


def test_an_unknown_split_names_those_that_exist():
    with pytest.raises(KeyError, match="expected one of train, validation, test"):
        splits.indices(whole(10), "val")


@pytest.mark.row("S17")
@given(
    clean=st.integers(20, 120),
    defective=st.integers(20, 120),
    seed=st.integers(0, 5),
    fractions=st.sampled_from([(0.7, 0.15, 0.15), (0.8, 0.1, 0.1), (0.64, 0.16, 0.2)]),
)
def test_each_split_has_its_part_of_every_stratum(clean, defective, seed, fractions):
    names = [f"i{number}" for number in range(clean + defective)]
    strata = ["defect" if number < defective else "clean" for number in range(len(names))]
    made = splits.split(names, names, strata=strata, fractions=fractions, seed=seed)
    assert sorted(index for name in splits.NAMES for index in made[name]) == list(range(len(names)))
    for name in splits.NAMES:
        here = sum(strata[index] == "defect" for index in made[name])
        share = defective / len(names) * len(made[name])
        assert abs(here - share) < 1, "less than one image off"


def test_a_group_of_two_strata_stays_whole_and_counts_as_the_last_of_them():
    groups = [f"g{number // 2}" for number in range(40)]
    strata = ["defect" if number % 4 == 0 else "clean" for number in range(40)]
    made = splits.split([f"i{number}" for number in range(40)], groups, strata=strata)
    splits.check(made)
    clean_too = {groups[number] for number in range(40) if strata[number] == "defect"}
    assert sum(groups[index] in clean_too for index in made.train) == 14, "seven of ten groups of two"
