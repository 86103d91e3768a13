from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from clkit.data.class_orders import PUBLISHED_ORDERS, published_order
from clkit.data.scenarios import (
    Blurry,
    ClassIncremental,
    DomainIncremental,
    Joint,
    Labels,
    LongTailed,
    NaturalOrder,
    Scenario,
    Split,
    TaskIncremental,
)
from clkit.errors import ArgumentError, ClkitError, DataError

ids = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)


@st.composite
def labels(draw: st.DrawFn, unlabelled: bool = True) -> tuple[Labels, Labels]:
    """A training and a test part over some gappy ids; every class occurs in training at least once."""
    classes = draw(ids)
    any_row = st.sampled_from([*classes, -1] if unlabelled else classes)
    train = draw(st.permutations(classes + draw(st.lists(any_row, max_size=60))))
    test = draw(st.lists(any_row, max_size=40))
    domains = st.integers(0, 4)
    return tuple(
        Labels(
            np.array(rows, dtype=np.int64),
            np.array(draw(st.lists(domains, min_size=len(rows), max_size=len(rows))), dtype=np.int64),
        )
        for rows in (train, test)
    )


def assert_partition(splits: list[Split], train: Labels, test: Labels) -> None:
    """Every row is in exactly one experience, rows are in stored order, and the classes are those of the rows."""
    for rows, part in (([s.train for s in splits], train), ([s.test for s in splits], test)):
        joined = np.concatenate(rows)
        assert sorted(joined.tolist()) == list(range(len(part)))
        assert all(r.dtype == np.int64 and (np.diff(r) > 0).all() for r in rows)
    for split in splits:
        assert len(split.train)
        present = set(train.targets[split.train].tolist()) - {-1}
        assert split.classes == tuple(sorted(present))
        assert all(type(c) is int for c in split.classes)


def split_unless_drained(scenario: Scenario, train: Labels, test: Labels) -> list[Split] | None:
    """The splits, or None where a Blurry stream rightly refuses because an experience lost all its samples."""
    try:
        return scenario.split(train, test)
    except DataError as error:
        if not isinstance(scenario, Blurry) or "keeps no training samples" not in str(error):
            raise
        return None


def scenarios_for(train: Labels) -> list[Scenario]:
    n = len(train.classes)
    made: list[Scenario] = [
        Joint(),
        NaturalOrder(len(train)),
        NaturalOrder(1),
        DomainIncremental(),
        DomainIncremental(seed=3),
        ClassIncremental(experiences=n),
        ClassIncremental(experiences=(n + 1) // 2, seed=1),
        TaskIncremental(classes_per_experience=3, seed=2),
        ClassIncremental(classes_per_experience=2, first_experience_classes=1),
    ]
    if n >= 2:
        made += [Blurry(2, disjoint=1.0), Blurry(n, disjoint=0.5, blur=0.3, seed=4)]
        made += [ClassIncremental(experiences=2, first_experience_classes=n - 1)]
    return made


@given(labels())
@settings(max_examples=60, deadline=None)
def test_no_sample_is_lost_or_repeated(parts: tuple[Labels, Labels]) -> None:
    train, test = parts
    for scenario in scenarios_for(train):
        splits = split_unless_drained(scenario, train, test)
        if splits is not None:
            assert_partition(splits, train, test)


@given(labels())
@settings(max_examples=40, deadline=None)
def test_class_incremental_keeps_classes_apart(parts: tuple[Labels, Labels]) -> None:
    train, test = parts
    n = len(set(train.targets.tolist()) - {-1})
    for experiences in {1, (n + 1) // 2, n}:
        splits = ClassIncremental(experiences=experiences).split(train, test)
        sizes = [len(s.classes) for s in splits]
        assert len(splits) == experiences
        assert sizes == [n // experiences + (i < n % experiences) for i in range(experiences)]
        assert [c for s in splits for c in s.classes] == sorted(set(train.targets.tolist()) - {-1})
        for split in splits:
            assert set(test.targets[split.test].tolist()) <= {*split.classes, -1}


def test_unlabelled_rows_are_dealt_out_in_stored_order() -> None:
    train = Labels(np.array([-1, 0, -1, 1, -1, 2, -1, -1]))
    splits = ClassIncremental(experiences=3).split(train, Labels(np.array([0, -1, 2])))
    assert [s.train.tolist() for s in splits] == [[0, 1, 2], [3, 4, 6], [5, 7]]
    assert [s.classes for s in splits] == [(0,), (1,), (2,)]
    assert [s.test.tolist() for s in splits] == [[0, 1], [], [2]]
    blurry = Blurry(3, blur=0.0, class_order=[0, 1, 2]).split(train, Labels(np.array([0, -1, 2])))
    assert [s.train.tolist() for s in blurry] == [[0, 1, 2], [3, 4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("scenario", "sizes"),
    [
        (ClassIncremental(experiences=5), [2, 2, 2, 2, 2]),
        (ClassIncremental(experiences=4), [3, 3, 2, 2]),
        (ClassIncremental(classes_per_experience=4), [4, 4, 2]),
        (ClassIncremental(first_experience_classes=4, classes_per_experience=2), [4, 2, 2, 2]),
        (ClassIncremental(first_experience_classes=5, experiences=3), [5, 3, 2]),
        (ClassIncremental(first_experience_classes=10, experiences=1), [10]),
        (ClassIncremental(first_experience_classes=10, classes_per_experience=2), [10]),
        (TaskIncremental(experiences=2), [5, 5]),
    ],
)
def test_sizes_of_the_cuts_of_ten_classes(scenario: ClassIncremental, sizes: list[int]) -> None:
    ten = Labels(np.arange(10))
    assert [len(s.classes) for s in scenario.split(ten, ten)] == sizes


def test_seed_shuffles_the_sorted_ids_by_numpys_generator() -> None:
    present = Labels(np.array([9, 4, 7, 4, 30]))
    splits = ClassIncremental(classes_per_experience=1, seed=5).split(present, present)
    assert [s.classes[0] for s in splits] == np.random.default_rng(5).permutation([4, 7, 9, 30]).tolist()
    given_order = ClassIncremental(classes_per_experience=1, class_order=[30, 4, 9, 7], seed=5).split(present, present)
    assert [s.classes[0] for s in given_order] == [30, 4, 9, 7]


def test_published_orders() -> None:
    icarl = published_order("cifar100_icarl")
    assert icarl[:10] == (87, 0, 52, 58, 44, 91, 68, 97, 51, 15)
    assert icarl[-4:] == (54, 26, 35, 39)
    assert published_order("cifar100_numpy1993")[:4] == (68, 56, 78, 8)
    assert all(sorted(order) == list(range(100)) for order in PUBLISHED_ORDERS.values())
    hundred = Labels(np.arange(100))
    splits = ClassIncremental(experiences=10, class_order="cifar100_icarl").split(hundred, hundred)
    assert splits[0].classes == tuple(sorted(icarl[:10]))
    assert splits[0].name == "classes 0-97 (10)"
    with pytest.raises(ArgumentError, match=r"cifar100_icarl.*cifar100_numpy1993.*did you mean 'cifar100_icarl'"):
        ClassIncremental(experiences=2, class_order="cifar100_icar")


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        ([5], "class 5"),
        ([0, 1], "classes 0-1"),
        ([3, 7, 9], "classes 3, 7, 9"),
        ([9, 3, 7, 4], "classes 3, 4, 7, 9"),
        ([2, 3, 4, 5], "classes 2-5"),
        (list(range(10)), "classes 0-9 (10)"),
        ([1, 5, 8, 20, 93], "classes 1-93 (5)"),
    ],
)
def test_names_are_short_and_readable(classes: list[int], name: str) -> None:
    part = Labels(np.array(classes))
    assert ClassIncremental(experiences=1).split(part, part)[0].name == name


@pytest.mark.parametrize("cls", [ClassIncremental, TaskIncremental])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "neither given"),
        ({"experiences": 2, "classes_per_experience": 2}, "both given"),
        ({"first_experience_classes": 2}, "neither given"),
        ({"experiences": 0}, "experiences must be an integer of at least 1, got 0"),
        ({"experiences": True}, "experiences must be .* got True"),
        ({"experiences": 2.0}, "experiences must be .* got 2.0"),
        ({"classes_per_experience": -1}, "classes_per_experience must be .* got -1"),
        ({"experiences": 2, "first_experience_classes": 0}, "first_experience_classes must be .* got 0"),
        ({"experiences": 2, "seed": -1}, "seed must be .* got -1"),
    ],
)
def test_constructor_refuses(cls: Callable[..., Scenario], arguments: dict[str, int], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        cls(**arguments)


FOUR = Labels(np.array([2, 3, 5, 7, 7]))


@pytest.mark.parametrize(
    ("scenario", "error", "match"),
    [
        (ClassIncremental(experiences=5), DataError, "4 classes cannot fill 5 experiences"),
        (ClassIncremental(experiences=5, first_experience_classes=1), DataError, "3 classes are left for 4 more"),
        (ClassIncremental(experiences=3, first_experience_classes=4), DataError, "0 classes are left for 2 more"),
        (ClassIncremental(experiences=1, first_experience_classes=2), DataError, "2 classes are left for 0 more"),
        (ClassIncremental(experiences=2, first_experience_classes=5), DataError, "has only 4 classes"),
        (ClassIncremental(experiences=2, class_order=[2, 3, 5]), ArgumentError, "missing 7$"),
        (ClassIncremental(experiences=2, class_order=[2, 3, 5, 7, 8, 9]), ArgumentError, "unknown 8, 9$"),
        (
            ClassIncremental(experiences=2, class_order=[2, 2, 4, 7]),
            ArgumentError,
            "missing 3, 5; unknown 4; repeated 2",
        ),
        (ClassIncremental(experiences=2, class_order=[]), ArgumentError, "missing 2, 3, 5, 7"),
        (ClassIncremental(experiences=2, class_order="cifar100_icarl"), ArgumentError, r"unknown 0, 1, .* \(96\)"),
        (Blurry(5), DataError, "4 classes cannot fill 5 experiences"),
        (Blurry(2, class_order=[2, 3, 5]), ArgumentError, "missing 7"),
        (DomainIncremental(), DataError, "needs a domain for each row, and the training part has none"),
        (NaturalOrder(6), DataError, "experiences=6, but the training part has 5 rows"),
    ],
)
def test_labels_that_cannot_be_cut(scenario: Scenario, error: type[ClkitError], match: str) -> None:
    with pytest.raises(error, match=match):
        scenario.split(FOUR, FOUR)


@pytest.mark.parametrize("scenario", [ClassIncremental(experiences=1), Blurry(2)])
def test_test_classes_that_training_lacks_are_refused(scenario: Scenario) -> None:
    with pytest.raises(DataError, match="training part lacks: 4, 9"):
        scenario.split(Labels(np.array([2, 3])), Labels(np.array([9, 2, 4])))


@pytest.mark.parametrize(
    "scenario", [ClassIncremental(experiences=1), Blurry(2), DomainIncremental(), NaturalOrder(1), Joint()]
)
def test_empty_training_part_is_refused(scenario: Scenario) -> None:
    nothing = Labels(np.array([], dtype=np.int64))
    with pytest.raises(DataError, match=r"no (labelled )?rows|has 0 rows"):
        scenario.split(nothing, nothing)


@pytest.mark.parametrize("scenario", [ClassIncremental(experiences=1), Blurry(2)])
def test_classes_need_labels(scenario: Scenario) -> None:
    unlabelled = Labels(np.array([-1, -1]))
    with pytest.raises(DataError, match="no labelled rows"):
        scenario.split(unlabelled, unlabelled)


@pytest.mark.parametrize(
    ("targets", "domains", "match"),
    [
        (np.array([0.0, 1.0]), None, "targets is float64"),
        (np.array([[0], [1]]), None, r"targets is int64 of shape \(2, 1\)"),
        (np.array([0, -2]), None, "class id -2"),
        (np.array([True, False]), None, "targets is bool"),
        (np.array([0, 1]), np.array([0]), "domains has 1 entries for 2 targets"),
        (np.array([0, 1]), np.array(["a", "b"]), "domains is <U1"),
    ],
)
def test_labels_are_checked(targets: np.ndarray, domains: np.ndarray | None, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Labels(targets, domains)


# Domains -------------------------------------------------------------------------------------------------------------


@given(labels())
@settings(max_examples=40, deadline=None)
def test_domain_incremental_against_a_naive_loop(parts: tuple[Labels, Labels]) -> None:
    train, test = parts
    assert train.domains is not None
    assert test.domains is not None
    present = sorted(set(train.domains.tolist()))
    splits = DomainIncremental().split(train, test)
    for i, (domain, split) in enumerate(zip(present, splits, strict=True)):
        assert split.train.tolist() == [r for r, d in enumerate(train.domains) if d == domain]
        tested = [r for r, d in enumerate(test.domains) if d == domain or (i == 0 and d not in present)]
        assert split.test.tolist() == tested
        assert split.name == f"domain {domain}"


def test_domain_order_by_id_by_name_and_by_seed() -> None:
    train = Labels(np.zeros(6, dtype=np.int64), np.array([3, 1, 1, 8, 3, 8]), {1: "photo", 3: "art", 8: "sketch"})

    def names(**arguments: object) -> list[str]:
        return [s.name for s in DomainIncremental(**arguments).split(train, train)]

    assert names() == ["photo", "art", "sketch"]
    assert names(domain_order=[8, 1, 3]) == ["sketch", "photo", "art"]
    assert names(domain_order=["art", "sketch", 1]) == ["art", "sketch", "photo"]
    permuted = np.random.default_rng(2).permutation([1, 3, 8])
    assert names(seed=2) == [train.domain_names[d] for d in permuted.tolist()]
    with pytest.raises(ArgumentError, match=r"domain_order .* missing 3; unknown 4"):
        names(domain_order=[8, 1, 4])
    with pytest.raises(ArgumentError, match=r"\['clipart'\].*known: \['art', 'photo', 'sketch'\]"):
        names(domain_order=["clipart", 1, 3])
    with pytest.raises(ArgumentError, match="by='style'"):
        names(by="style")


def test_domains_can_be_kept_in_time() -> None:
    train = Labels(np.array([1, 6, 1]), np.array([0, 1, 0]))
    assert [s.ordered for s in DomainIncremental(ordered=True).split(train, train)] == [True, True]
    assert [s.ordered for s in DomainIncremental().split(train, train)] == [False, False]


def test_an_empty_test_part_needs_no_domains() -> None:
    train = Labels(np.array([1, 6]), np.array([0, 1]))
    splits = DomainIncremental().split(train, Labels(np.array([], dtype=np.int64)))
    assert [len(s.test) for s in splits] == [0, 0]


# Blurry --------------------------------------------------------------------------------------------------------------


@given(
    labels(unlabelled=False), st.integers(2, 5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9), st.integers(1, 6)
)
@settings(max_examples=80, deadline=None)
def test_blurry_counts_are_exact(
    parts: tuple[Labels, Labels], experiences: int, disjoint: float, blur: float, seed: int, copies: int
) -> None:
    train = Labels(np.tile(parts[0].targets, copies))
    test = parts[1]
    classes = sorted(set(train.targets.tolist()))
    if len(classes) < experiences:
        return
    scenario = Blurry(experiences, disjoint=disjoint, blur=blur, seed=seed)
    splits = split_unless_drained(scenario, train, test)
    if splits is None:
        return
    assert_partition(splits, train, test)
    homes = ClassIncremental(experiences=experiences, seed=seed).split(train, train)
    blurred = 0
    for c in classes:
        home = next(i for i, s in enumerate(homes) if c in s.classes)
        counts = [int((train.targets[s.train] == c).sum()) for s in splits]
        moved = sum(counts) - counts[home]
        others = counts[:home] + counts[home + 1 :]
        expected = math.floor(blur * sum(counts) + 0.5)
        assert moved in {0, expected}
        assert max(others) - min(others) <= 1
        blurred += moved > 0
        test_home = next((i for i, s in enumerate(splits) if c in test.targets[s.test]), None)
        assert test_home in {None, counts.index(max(counts))}
    most = len(classes) - math.floor(disjoint * len(classes) + 0.5)
    assert blurred <= most
    if blur == 1:
        assert blurred == most


def test_blurry_is_reproducible_and_seeded() -> None:
    part = Labels(np.repeat(np.arange(10), 40))

    def rows(seed: int) -> list[list[int]]:
        return [s.train.tolist() for s in Blurry(5, seed=seed, class_order=list(range(10))).split(part, part)]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_blurry_shares_by_hand() -> None:
    part = Labels(np.repeat(np.arange(10), 100))
    splits = Blurry(5, disjoint=0.5, blur=0.1, class_order=list(range(10)), seed=7).split(part, part)
    counts = np.array([[int((part.targets[s.train] == c).sum()) for s in splits] for c in range(10)])
    spread = sorted(sorted(row.tolist(), reverse=True) for row in counts)
    assert spread == [[90, 3, 3, 2, 2]] * 5 + [[100, 0, 0, 0, 0]] * 5
    assert [counts[c].argmax() for c in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert splits[0].name == "mainly classes 0-1"


def test_blurry_draws_who_gets_one_more() -> None:
    # Ten leave each class for four others: two of these get three. Classes of one home do not all choose the same two.
    part = Labels(np.repeat(np.arange(10), 100))
    splits = Blurry(5, disjoint=0.0, blur=0.1, class_order=list(range(10))).split(part, part)
    extra = [[i for i, s in enumerate(splits) if (part.targets[s.train] == c).sum() == 3] for c in range(10)]
    assert all(len(experiences) == 2 for experiences in extra)
    assert any(extra[c] != extra[c + 1] for c in range(0, 10, 2))


def test_blurry_test_rows_follow_most_training_rows() -> None:
    # blur 1 and two experiences: everything of a blurry class changes sides, and its test rows with it.
    part = Labels(np.repeat([4, 9], 6))
    splits = Blurry(2, disjoint=0.0, blur=1.0, class_order=[4, 9]).split(part, part)
    assert [s.classes for s in splits] == [(9,), (4,)]
    assert [set(part.targets[s.test].tolist()) for s in splits] == [{9}, {4}]
    # Half and half is a tie: the first of the two.
    tied = Blurry(2, disjoint=0.0, blur=0.5, class_order=[4, 9]).split(part, part)
    assert [len(s.test) for s in tied] == [12, 0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"experiences": 1}, "experiences must be .* at least 2, got 1"),
        ({"experiences": 2, "disjoint": 1.5}, "disjoint must be .* got 1.5"),
        ({"experiences": 2, "blur": -0.1}, "blur must be .* got -0.1"),
        ({"experiences": 2, "blur": math.nan}, "blur must be .* got nan"),
        ({"experiences": 2, "seed": None}, "seed must be .* got None"),
        ({"experiences": 2, "class_order": "none"}, "published order"),
    ],
)
def test_blurry_refuses(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Blurry(**arguments)


def test_blurry_refuses_an_experience_that_loses_everything() -> None:
    # One class stays, the other moves to it: the home of the second is left without samples, whatever the seed.
    part = Labels(np.array([0, 0, 1, 1]))
    for seed in range(4):
        with pytest.raises(DataError, match="keeps no training samples"):
            Blurry(2, disjoint=0.5, blur=1.0, seed=seed).split(part, part)


# Long tail -----------------------------------------------------------------------------------------------------------


def test_long_tailed_digits() -> None:
    target = load_digits().target
    train, test = Labels(target[::2]), Labels(target[1::2])
    splits = LongTailed(ClassIncremental(classes_per_experience=1), factor=0.6).split(train, test)
    naive = [math.floor((train.targets == c).sum() * 0.6**c) for c in range(10)]
    assert [len(s.train) for s in splits] == [max(2, n) for n in naive]
    assert [len(s.train) for s in splits][-3:] == [2, 2, 2]
    for c, split in enumerate(splits):
        assert split.train.tolist() == np.flatnonzero(train.targets == c)[: len(split.train)].tolist()
        assert split.test.tolist() == np.flatnonzero(test.targets == c).tolist()


def test_long_tailed_on_any_inner_scenario() -> None:
    train = Labels(np.array([3, 3, 3, 3, 1, 1, 1, 1, -1, 1]), np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1]))
    kept = LongTailed(NaturalOrder(2), factor=0.5).split(train, train)
    # Rank 0 is class 1 (5 rows, all kept), rank 1 is class 3 (first max(2, 2) of 4).
    assert [s.train.tolist() for s in kept] == [[0, 1, 4, 5], [6, 7, 8, 9]]
    assert all(s.ordered for s in kept)
    assert np.concatenate([s.test for s in kept]).tolist() == list(range(10))
    domains = LongTailed(DomainIncremental(), factor=0.5).split(train, train)
    assert [s.train.tolist() for s in domains] == [[0, 4, 6, 8], [1, 5, 7, 9]]
    assert LongTailed(TaskIncremental(experiences=2), factor=0.5).gives_task_id
    assert not LongTailed(Joint(), factor=0.5).gives_task_id
    blurry = LongTailed(Blurry(2, class_order=[3, 1]), factor=0.5)
    assert blurry.ordered_classes(train).tolist() == [3, 1]
    assert sorted(np.concatenate([s.train for s in blurry.split(train, train)]).tolist()) == [0, 1, 2, 3, 4, 5, 8]


def test_long_tailed_keeps_single_rows_and_refuses_wrong_arguments() -> None:
    part = Labels(np.array([0, 1]))
    assert [s.train.tolist() for s in LongTailed(Joint(), factor=0.1).split(part, part)] == [[0, 1]]
    for factor in (0.0, 1.5, math.nan):
        with pytest.raises(ArgumentError, match="factor"):
            LongTailed(Joint(), factor=factor)
    with pytest.raises(ArgumentError, match="inner must be a Scenario, got 'joint'"):
        LongTailed("joint", factor=0.5)


# The rest ------------------------------------------------------------------------------------------------------------


def test_natural_order_cuts_both_parts_like_array_split() -> None:
    train, test = Labels(np.arange(10) % 3), Labels(np.array([0, 1]))
    splits = NaturalOrder(3).split(train, test)
    assert [s.train.tolist() for s in splits] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [s.test.tolist() for s in splits] == [[0], [1], []]
    assert all(s.ordered for s in splits)
    assert splits[0].name == "part 1 of 3"
    with pytest.raises(ArgumentError, match="experiences must be an integer"):
        NaturalOrder(0)


def test_joint_is_one_experience() -> None:
    (split,) = Joint().split(FOUR, Labels(np.array([2, 9])))
    assert split.train.tolist() == [0, 1, 2, 3, 4]
    assert split.test.tolist() == [0, 1]
    assert split.classes == (2, 3, 5, 7)
    assert not split.ordered


@pytest.mark.parametrize("experiences", [1, 2, None])
def test_joint_of_a_scenario_has_the_rows_that_its_experiences_have(experiences: int | None) -> None:
    draw = np.random.default_rng(0)
    train, test = Labels(draw.integers(-1, 6, 200)), Labels(draw.integers(0, 6, 50))
    inner = LongTailed(ClassIncremental(experiences=3, seed=1), factor=0.5)
    parts = inner.split(train, test)[:experiences]
    (split,) = Joint(inner, experiences).split(train, test)
    assert split.train.tolist() == sorted(row for part in parts for row in part.train.tolist())
    assert split.test.tolist() == sorted(row for part in parts for row in part.test.tolist())
    assert split.classes == tuple(sorted(label for part in parts for label in part.classes))
    assert len(split.train) < 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inner": "blurry"}, "inner must be a Scenario or None, got 'blurry'"),
        ({"experiences": 2}, "experiences=2 needs inner, the scenario that cuts them"),
        ({"inner": NaturalOrder(3), "experiences": 0}, "experiences must be an integer of at least 1, got 0"),
    ],
)
def test_joint_refuses(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Joint(**arguments)


@pytest.mark.parametrize(
    ("scenario", "name", "task_id"),
    [
        (ClassIncremental(experiences=5, class_order=[1, 2]), "class_incremental", False),
        (TaskIncremental(classes_per_experience=2, seed=1), "task_incremental", True),
        (DomainIncremental(domain_order=[2, 1]), "domain_incremental", False),
        (Blurry(3), "blurry", False),
        (LongTailed(Blurry(3), 0.9), "long_tailed", False),
        (NaturalOrder(3), "natural_order", False),
        (Joint(), "joint", False),
    ],
)
def test_scenarios_pickle_and_have_names(scenario: Scenario, name: str, task_id: bool) -> None:
    again = pickle.loads(pickle.dumps(scenario))
    assert again == scenario
    assert (again.name, again.gives_task_id) == (name, task_id)
    if not isinstance(scenario, LongTailed):
        assert type(scenario)(**asdict(scenario)) == scenario
