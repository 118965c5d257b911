"""Who is trained on, who chooses and who reports: splits of whole groups, written down and checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from segmentation.epoch import DataError

NAMES = ("train", "validation", "test")
_TEST_IS_OPEN: ContextVar[bool] = ContextVar("test_split_is_open", default=False)


class TestSplitError(RuntimeError):
    """A test sample was asked for where nothing may choose by it."""

    __test__ = False


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Sample numbers of each split, and what they were made from."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    seed: int
    key: str
    """What a group is: image, region, patient, ..."""
    names: tuple[str, ...]
    """Name of each sample, by its number."""
    groups: tuple[str, ...]
    """Group of each sample, by its number."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Return the sample numbers of a split, the test split's too: for counting, never for opening."""
        if name not in NAMES:
            raise KeyError(f"split {name!r} not found; expected one of {', '.join(NAMES)}")
        numbers: tuple[int, ...] = getattr(self, name)
        return numbers


@contextmanager
def test_split_open() -> Iterator[None]:
    """Allow test samples to be read inside this block; evaluation alone does so."""
    token = _TEST_IS_OPEN.set(True)
    try:
        yield
    finally:
        _TEST_IS_OPEN.reset(token)


# pytest would take both for tests, wherever they are imported.
test_split_open.__test__ = False  # type: ignore[attr-defined]


def test_split_is_open() -> bool:
    """Say whether this code runs inside `with test_split_open()`."""
    return _TEST_IS_OPEN.get()


test_split_is_open.__test__ = False  # type: ignore[attr-defined]


def indices(splits: Splits, name: str) -> tuple[int, ...]:
    """Return the sample numbers of one split.

    Raises:
        TestSplitError: for the test split outside `with test_split_open()`.
    """
    if name == "test" and not test_split_is_open():
        raise TestSplitError("the test split is opened by evaluation alone; choose by 'validation'")
    return splits[name]


def split(
    names: Sequence[str],
    groups: Sequence[str],
    *,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    key: str = "group",
    test: Collection[str] = (),
    strata: Sequence[str] = (),
) -> Splits:
    """Deal whole groups to train, validation and test; groups given as `test` are that split, and no others.

    The order of the groups is that of a hash of seed and group name: it does not depend on how they were listed,
    on the machine, or on the version of a generator of random numbers. With one sample a group the sizes are
    int(0.7 n), int(0.85 n) - int(0.7 n) and the rest.

    With `strata`, one for each sample, groups of one stratum are dealt among themselves, so that each split has its
    part of every one of them. A group is of the last, in order of name, of its samples' strata.

    Raises:
        DataError: for fewer than three groups, or a sample name that occurs twice.
        ValueError: for fractions that are not three positive parts of one.
    """
    if min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions: got {fractions}; expected three positive numbers that sum to 1")
    sizes = Counter(groups)
    given = {group: "test" for group in sizes if group in test}
    rest = {group: size for group, size in sizes.items() if group not in given}
    if len(sizes) < len(NAMES) or len(rest) < 2:
        raise DataError(f"{len(names)} samples in {len(sizes)} groups by {key}; three splits need at least 3 groups")
    shares = [round(part / (1 - fractions[2]), 9) for part in fractions[:2]] if given else fractions
    stratum: dict[str, str] = {}
    for group, of_sample in zip(groups, strata or [""] * len(groups), strict=True):
        stratum[group] = max(of_sample, stratum.get(group, of_sample))
    owner = dict(given)
    for kind in sorted(set(stratum.values())):
        owner |= _owners({group: size for group, size in rest.items() if stratum[group] == kind}, shares, seed)
    _fill(owner, rest, NAMES[: len(shares)])
    dealt = {name: tuple(i for i, group in enumerate(groups) if owner[group] == name) for name in NAMES}
    splits = Splits(**dealt, seed=seed, key=key, names=tuple(names), groups=tuple(groups))
    check(splits)
    return splits


def check(splits: Splits, *, tested: bool = True) -> None:
    """Raise DataError if a sample or a group is in two splits, a split is empty, or a sample is in none.

    tested: whether there has to be a test split.
    """
    twice = [name for name, count in Counter(splits.names).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} sample names occur twice, such as {twice[0]!r}; give every sample its own")
    for first, second in combinations(NAMES, 2):
        _refuse_shared("sample", splits.names, splits[first], splits[second], f"{first} and {second}")
        _refuse_shared(splits.key, splits.groups, splits[first], splits[second], f"{first} and {second}")
    if empty := [name for name in NAMES if not splits[name] and (tested or name != "test")]:
        raise DataError(f"split {empty[0]} is empty; change the fractions or add samples")
    dealt = [index for name in NAMES for index in splits[name]]
    if sorted(dealt) != list(range(len(splits.names))):
        raise DataError(
            f"{len(dealt)} samples in the splits, {len(splits.names)} in the data; each must be in one split"
        )


def write(splits: Splits, path: Path) -> None:
    """Write the splits as JSON: sample names of each split, what a group is, the group of each sample, the seed."""
    check(splits, tested=False)
    members = {name: [splits.names[index] for index in splits[name]] for name in NAMES}
    record = {"group_key": splits.key, "seed": splits.seed, **members}
    record["groups"] = dict(zip(splits.names, splits.groups, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


def read(path: Path) -> Splits:
    """Return splits that were written, or edited by hand, after checking them.

    Raises:
        DataError: naming the file, if it is no splits.json or breaks a rule of `check`.
    """
    try:
        record = json.loads(path.read_text())
        groups: Mapping[str, str] = record["groups"]
        number = {name: index for index, name in enumerate(groups)}
        dealt = {name: tuple(number[member] for member in record[name]) for name in NAMES}
        splits = Splits(
            **dealt, seed=record["seed"], key=record["group_key"], names=tuple(groups), groups=tuple(groups.values())
        )
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; a run writes it") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as splits ({error})") from error
    except KeyError as error:
        raise DataError(f"{path}: {error} is missing; expected every sample of a split under 'groups'") from error
    try:
        check(splits, tested=False)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return splits


def _owners(sizes: Mapping[str, int], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Return the split of each group, as many splits as fractions: the one in which the middle of its samples falls."""
    total, names = sum(sizes.values()), NAMES[: len(fractions)]
    bounds = [int(sum(fractions[: place + 1]) * total) for place in range(len(names) - 1)]
    owner, before = {}, 0
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest()):
        middle = before + sizes[group] / 2
        owner[group] = names[next(position for position, bound in enumerate([*bounds, total]) if middle < bound)]
        before += sizes[group]
    return owner


def _fill(owner: dict[str, str], sizes: Mapping[str, int], names: Sequence[str]) -> None:
    """Give each split that got none the smallest group of the split that has most groups."""
    for name in names:
        if name not in owner.values():
            richest = Counter(owner[group] for group in sizes).most_common(1)[0][0]
            spare = min((group for group in sizes if owner[group] == richest), key=lambda group: (sizes[group], group))
            owner[spare] = name


def _refuse_shared(what: str, labels: Sequence[str], first: Sequence[int], second: Sequence[int], where: str) -> None:
    shared = {labels[index] for index in first} & {labels[index] for index in second}
    if shared:
        listed = ", ".join(sorted(shared)[:5])
        raise DataError(f"{len(shared)} of the same {what} in {where}: {listed}; a group belongs to one split")
