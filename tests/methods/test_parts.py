"""Heads as bytes, heads merged as a tree, and parts that know which rows they hold."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import (
    AnalyticHead,
    FeatureStatistics,
    HeadPart,
    Holdings,
    LDAHead,
    NearestMeanHead,
    Novelty,
    shard_bounds,
)
from clkit.methods.heads.base import Head
from clkit.methods.heads.holdings import keys_of_names

WIDTH, CLASSES = 6, 4
KINDS: dict[str, Callable[[], Head]] = {
    "ridge": lambda: AnalyticHead(WIDTH, gamma=0.5),
    "lift": lambda: AnalyticHead(WIDTH, expansion_dim=20, gamma="auto", balance="pfg"),
    "reweight": lambda: AnalyticHead(WIDTH, balance="reweight", bias=True),
    "lda": lambda: LDAHead(WIDTH),
    "novelty": lambda: Novelty(WIDTH, relative=True),
    "nearest": lambda: NearestMeanHead(WIDTH, metric="cosine", num_classes=9),
}


def rows(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (number,), generator=draws)
    return torch.randn(number, WIDTH, generator=draws, dtype=torch.float64) + targets[:, None], targets


def taught(kind: str, number: int = 40, seed: int = 0) -> Head:
    head = KINDS[kind]()
    head.update(*rows(number, seed))
    return head


def assert_same_bits(one: Head, other: Head) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name


# ---- bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_comes_out_of_its_bytes_as_it_went_in(kind: str) -> None:
    head = taught(kind)
    for owner in (Head, type(head)):
        again = owner.from_bytes(head.to_bytes())
        assert type(again) is type(head)
        assert again.options == head.options
        assert_same_bits(again, head)
    again.update(*rows(9, seed=1))  # what comes out learns on
    assert int(again.counts.sum()) == 49
    assert int(head.counts.sum()) == 40


def test_a_strangers_head_travels_too() -> None:
    class Doubled(NearestMeanHead):
        """Somebody's own."""

    head = Doubled(WIDTH)
    head.update(*rows(10))
    assert type(NearestMeanHead.from_bytes(head.to_bytes())) is Doubled
    with pytest.raises(StateError, match=r"is a 'Doubled', this clkit knows \['KLDA', 'LDAHead', 'Novelty'\]"):
        LDAHead.from_bytes(head.to_bytes())


def test_bytes_that_are_cut_off_or_changed_are_refused() -> None:
    whole = taught("lda").to_bytes()
    cuts = [*range(0, len(whole), max(1, len(whole) // 23))]
    for cut in cuts:
        with pytest.raises(StateError, match="the bytes of a LDAHead cannot be read"):
            LDAHead.from_bytes(whole[:cut])
    for at in cuts[1:]:
        changed = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        try:
            again = LDAHead.from_bytes(changed)
        except StateError:
            continue
        assert_same_bits(again, taught("lda"))  # a byte that pads
    for other in (pickle.dumps({"format": 1}), b"", "text"):
        with pytest.raises(StateError, match="the bytes of a Head"):
            Head.from_bytes(other)  # type: ignore[arg-type]  # what a careless caller gives


# ---- the tree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 2, 7, 16])
def test_a_tree_in_any_order_equals_one_head(kind: str, number: int) -> None:
    x, y = rows(40 * number)
    whole = KINDS[kind]()
    whole.update(x, y)
    parts = []
    for index in np.random.default_rng(number).permutation(number):
        start, stop = shard_bounds(len(x), int(index), number)
        part = KINDS[kind]()
        part.update(x[start:stop], y[start:stop])
        parts.append(part)
    before = [part.to_bytes() for part in parts]
    total = type(whole).merge_all(iter(parts))
    assert [part.to_bytes() for part in parts] == before
    assert all(total is not part for part in parts)
    assert torch.equal(total.counts, whole.counts)
    scores, wanted = total.scores_seen(x), whole.scores_seen(x)
    assert float((scores - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


def test_a_tree_holds_few_heads_at_a_time() -> None:
    alive: weakref.WeakSet[Head] = weakref.WeakSet()
    most = 0

    def made() -> Iterator[NearestMeanHead]:
        nonlocal most
        for seed in range(64):
            head = NearestMeanHead(WIDTH)
            head.update(*rows(3, seed))
            alive.add(head)
            most = max(most, len(alive))
            yield head
            del head

    assert int(NearestMeanHead.merge_all(made()).counts.sum()) == 192
    assert most <= 9


def test_heads_that_do_not_fit_are_refused_by_number() -> None:
    for others, said in (
        ([], "there is no head to merge"),
        ([taught("ridge"), AnalyticHead(WIDTH, gamma=2.0)], r"head 1: .* different gamma: 0\.5 here, 2\.0 there"),
        ([taught("lda"), taught("lda"), taught("nearest")], "head 2: a LDAHead cannot merge a NearestMeanHead"),
        ([taught("lda"), 3], "head 1 is a int, not a Head"),
    ):
        given: Any = others
        with pytest.raises(ArgumentError, match=said):
            Head.merge_all(given)
    shared = LDAHead(WIDTH, statistics=FeatureStatistics(WIDTH, scatter=True))
    with pytest.raises(ConfigurationError, match="shares"):
        LDAHead.merge_all([shared])


# ---- what parts hold


@given(
    total=st.integers(1, 40),
    parts=st.lists(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12)), max_size=3), max_size=6),
    cut=st.integers(1, 7),
)
def test_holdings_are_sets_of_rows(total: int, parts: list[list[tuple[int, int]]], cut: int) -> None:
    held: set[int] = set()
    mine = Holdings()
    for number, part in enumerate(parts):
        ranges = [(start, min(start + length, total)) for start, length in part if start < total]
        wanted = {row for start, stop in ranges for row in range(start, stop)}
        other = Holdings()
        keys = keys_of_names([f"{number}"])
        if sum(stop - start for start, stop in ranges) > len(wanted):
            with pytest.raises(ArgumentError, match=r"ranges: \[.* cannot be; give disjoint ranges"):
                other.add("made", total, ranges, cut=min(cut, total), keys=keys)
            continue
        other.add("made", total, ranges, cut=min(cut, total), keys=keys)
        before = mine.state_dict()
        if held & wanted:
            with pytest.raises(ArgumentError, match=r"'made'.* is held already"):
                mine.merge(other)
            assert str(mine.state_dict()) == str(before)
        else:
            mine.merge(other)
            held |= wanted
        assert mine.rows == len(held)
        again = Holdings.of_state(mine.state_dict(), "again")
        assert str(again.state_dict()) == str(mine.state_dict())
        assert (not again.missing()) == (len(held) == total)


@pytest.mark.parametrize("wrong", [(5, 20), (-3, 2), (5, 2)])
def test_ranges_of_no_rows_are_refused(wrong: tuple[int, int]) -> None:
    held = Holdings()
    with pytest.raises(ArgumentError, match="within the 10 rows of 'made'"):
        held.add("made", 10, [wrong])
    assert held.rows == 0


def test_a_part_holds_all_that_its_head_has_learned() -> None:
    head = KINDS["ridge"]()
    head.update(torch.randn(25, WIDTH), torch.arange(25) % 3)
    with pytest.raises(ArgumentError, match="holds=10 rows, and the head has learned 25"):
        HeadPart(head, Holdings.shard("made", 40, 0, 4))
    with pytest.raises(ArgumentError, match=r"part 0 is b'.*; give HeadPart.from_bytes\(…\) of what was sent"):
        HeadPart.merge_all([HeadPart(head, Holdings.shard("made", 25)).to_bytes()])  # type: ignore[list-item]  # bytes as they were sent, which is what is refused


@given(rows=st.lists(st.integers(0, 29), max_size=30))
def test_rows_by_their_numbers_are_held_as_they_are(rows: list[int]) -> None:
    held = Holdings()
    if len(set(rows)) < len(rows):
        with pytest.raises(ArgumentError, match=r"row \d+ of 'made' is given twice"):
            held.add_rows("made", 30, np.array(rows))
        return
    held.add_rows("made", 30, np.array(rows, dtype=np.int64))
    assert [row for a, b in held.held("made:30") for row in range(a, b)] == sorted(rows)
    for row in rows[:1]:
        with pytest.raises(ArgumentError, match=f"rows {row} to {row} of 'made' is held already"):
            held.add_rows("made", 30, np.array([row]))


@pytest.mark.parametrize("rows", [[-1, 3], [30], [0.0, 1.0], [True, False], [None, 1]])
def test_numbers_of_no_rows_are_refused(rows: list[float]) -> None:
    with pytest.raises(ArgumentError, match="rows must be integers from 0 to 29, the last of 'made', got "):
        Holdings().add_rows("made", 30, np.array(rows))


@given(total=st.integers(1, 500), of=st.integers(1, 40))
def test_shards_are_even_and_cover_all(total: int, of: int) -> None:
    if of > total:
        with pytest.raises(ArgumentError, match=f"{total} rows cannot be cut into {of} shards"):
            shard_bounds(total, 0, of)
        return
    bounds = [shard_bounds(total, index, of) for index in range(of)]
    assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), total]
    sizes = {stop - start for start, stop in bounds}
    assert max(sizes) - min(sizes) <= 1


def part_of(index: int, of: int, kind: Callable[[], Head] = KINDS["ridge"], total: int = 100) -> HeadPart:
    x, y = rows(total)
    start, stop = shard_bounds(total, index, of)
    head = kind()
    head.update(x[start:stop], y[start:stop])
    return HeadPart(head, Holdings.shard("made", total, index, of))


def test_parts_are_merged_once_each_and_all_of_them() -> None:
    sent = [part_of(index, 8).to_bytes() for index in (3, 0, 7, 1, 6, 2, 5, 4)]
    whole = HeadPart.merge_all(map(HeadPart.from_bytes, sent))
    assert_same_bits(HeadPart.from_bytes(whole.to_bytes()).head, whole.head)
    assert torch.equal(whole.head.counts, part_of(0, 1).head.counts)
    half = [HeadPart.from_bytes(data) for data in sent[:4]]
    for parts, said in (
        ([*half, half[1]], r"part 4: shard 0/8 of 'made' is held already; its samples would count twice"),
        (half, r"shard 2/8 of 'made', shard 4/8 of 'made', shard 5/8 of 'made', shard 6/8 of 'made' are missing"),
        ([*half, part_of(1, 4)], r"part 4: shard 3/4 of 'made'|part 4: shard 1/4 of 'made' from row 37 to 49"),
    ):
        with pytest.raises(ArgumentError, match=said):
            HeadPart.merge_all(parts)
    some = HeadPart.merge_all(half, partial=True)  # a branch of a tree whose rest is elsewhere
    rest = HeadPart.merge_all([HeadPart.from_bytes(data) for data in sent[4:]], partial=True)
    assert torch.equal(HeadPart.merge_all([rest, some]).head.counts, whole.head.counts)


def test_parts_of_other_settings_and_damaged_ones_are_refused() -> None:
    first = part_of(0, 2)
    for kind, said in (
        (lambda: AnalyticHead(WIDTH, gamma=1.0), "different gamma: 0.5 here, 1.0 there"),
        (lambda: AnalyticHead(WIDTH, gamma=0.5, expansion_dim=9), "different expansion_dim: None here, 9 there"),
        (lambda: LDAHead(WIDTH), "a AnalyticHead cannot merge a LDAHead"),
    ):
        with pytest.raises(ArgumentError, match=f"part 1: .*{said}"):
            HeadPart.merge_all([first, part_of(1, 2, kind)])
    data = first.to_bytes()
    with pytest.raises(StateError, match="the bytes of a part cannot be read"):
        HeadPart.from_bytes(data[: len(data) // 2])
    with pytest.raises(StateError, match="has the unknown 'holds'"):
        Head.from_bytes(data)
    for index, of in ((8, 8), (-1, 8), (True, 2)):
        with pytest.raises(ArgumentError, match=f"there is no shard {index}/{of}"):
            Holdings.shard("made", 100, index, of)


def test_lists_of_one_name_and_other_content_are_two() -> None:
    holds = Holdings.shard("made", 10, digest="one")
    holds.merge(Holdings.shard("made", 10, digest="other"))
    assert holds.rows == 20
    assert holds.missing() == []
    assert Holdings.shard("made", 10, 0, 2, digest="one").missing() == ["shard 1/2 of 'made'"]


def test_of_many_missing_shards_a_few_are_named() -> None:
    holds = Holdings.shard("made", 2**62, 5, 2**50)  # as fast as for few
    assert holds.missing() == [
        *(f"shard {index}/{2**50} of 'made'" for index in (0, 1, 2, 3, 4, 6, 7, 8)),
        f"{2**50 - 9} more",
    ]


def test_images_are_known_again_in_another_list() -> None:
    old = Holdings()
    old.add("old", 3, [(0, 3)], digest="old", keys=keys_of_names(["a", "b", "c"]))
    new = Holdings()
    new.add("new", 3, [(0, 3)], digest="new", keys=keys_of_names(["b", "d", "e"]))
    with pytest.raises(ArgumentError, match="1 images of 'new' are held already"):
        old.merge(new)
    old.forget(keys_of_names(["b"]))
    old.merge(new)
    assert set(old.keys) == set(keys_of_names("abcde"))


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": torch.tensor([[5, 3]])},
        {"ranges": torch.tensor([[0, 11]])},
        {"ranges": torch.tensor([[4, 6], [0, 2]])},
        {"total": -1},
        {"cut": 11},
        {"name": 3},
        {"left_out": "x"},
    ],
)
def test_damaged_holdings_are_refused(change: dict[str, Any]) -> None:
    state = Holdings.shard("made", 10).state_dict()
    state["lists"][0] |= change
    with pytest.raises(StateError, match="the rows"):
        Holdings.of_state(state, "the rows")
