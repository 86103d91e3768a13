"""Memories of parts of a stream, dealt to more or fewer of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import nn

from clkit.errors import ArgumentError
from clkit.methods import ReservoirBuffer


def split_evenly(total: int, parts: int) -> list[int]:
    """Round after round, one to each."""
    sizes = [0] * parts
    for number in range(total):
        sizes[number % parts] += 1
    return sizes


def offer(memory: ReservoirBuffer, numbers: list[int], classes: int = 3) -> ReservoirBuffer:
    """Adds rows that hold their number, seven at a time."""
    for start in range(0, len(numbers), 7):
        rows = torch.tensor(numbers[start : start + 7])
        memory.add(rows[:, None], rows % classes, rows // 10, logits=rows.double() / 2)
    return memory


def dealt(shards: list[ReservoirBuffer], parts: int, capacity: int, **options: Any) -> list[ReservoirBuffer]:
    capacities = split_evenly(capacity, parts)
    new = [ReservoirBuffer(own, seed=100 + part, **options) for part, own in enumerate(capacities)]
    for part, memory in enumerate(new):
        memory.take_share(shards, part, capacities)
    return new


@given(
    capacity=st.integers(6, 30),
    old=st.integers(1, 4),
    new=st.integers(1, 5),
    rows=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    policy=st.sampled_from(["uniform", "class_balanced"]),
    classes=st.integers(1, 5),
)
@settings(max_examples=50, deadline=None)
def test_every_row_is_in_one_of_them_and_each_can_go_on(
    capacity: int, old: int, new: int, rows: list[int], policy: str, classes: int
) -> None:
    starts = np.cumsum([0, *rows]).tolist()
    shards = [
        offer(ReservoirBuffer(own, seed=part, policy=policy), list(range(starts[part], starts[part + 1])), classes)
        for part, own in enumerate(split_evenly(capacity, old))
    ]
    before = [shard.state_dict() for shard in shards]
    parts = dealt(shards, new, capacity, policy=policy)
    held = torch.cat([part.data.flatten() for part in parts])
    assert sorted(held.tolist()) == sorted(number for shard in shards for number in shard.data.flatten().tolist())
    sizes = [part.size for part in parts]
    assert sizes == split_evenly(sum(sizes), new)
    total = sum(shard.n_seen for shard in shards)
    full = [part.size == part.capacity for part in parts]
    if policy == "class_balanced" or any(full) or total == sum(sizes):
        assert sum(part.n_seen for part in parts) == total
        assert sum((Counter(part.class_seen) for part in parts), Counter()) == sum(
            (Counter(shard.class_seen) for shard in shards), Counter()
        )
    if policy == "uniform":
        assert all(part.n_seen == part.size for part, is_full in zip(parts, full, strict=True) if not is_full)
        extra = [part.n_seen - part.size for part, is_full in zip(parts, full, strict=True) if is_full]
        assert max(extra, default=0) - min(extra, default=0) <= 1
    for part, memory in enumerate(parts):
        own = memory.sample(memory.size) if memory.size else None
        if own is not None:  # all that belongs to a row came with it
            numbers = own.data.flatten()
            assert torch.equal(own.label, numbers % classes)
            assert torch.equal(own.experience, numbers // 10)
            assert torch.equal(own.extras["logits"], numbers.double() / 2)
            assert not own.origin.any()
        again = ReservoirBuffer(split_evenly(capacity, new)[part], policy=policy)
        again.load_state_dict(memory.state_dict())  # checks that no number contradicts another
        for each in (memory, again):
            offer(each, list(range(500, 540)), classes)
        assert torch.equal(memory.data, again.data)
        assert memory.size <= split_evenly(capacity, new)[part]
    for shard, state in zip(shards, before, strict=True):
        assert all(
            torch.equal(value, state[key]) for key, value in shard.state_dict().items() if torch.is_tensor(value)
        )


def test_rows_of_one_shard_keep_their_order_of_arrival() -> None:
    shards = [offer(ReservoirBuffer(20, seed=part), list(range(1000 * part, 1000 * part + 90))) for part in range(2)]
    for part in dealt(shards, 3, 40):
        numbers = part.data.flatten()
        ages = numbers % 1000
        for shard in range(2):
            own = numbers // 1000 == shard
            assert torch.equal(ages[own].argsort(), part.arrival[own].argsort())
        assert len(set(part.arrival.tolist())) == part.size
        # 180 arrivals are dealt to 3: a row's place in its new stream is near its place in the old one
        torch.testing.assert_close(part.arrival / part.n_seen, ages / 90, rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("old", "new", "trials"),
    [(2, 3, 150), *[pytest.param(*case, 3000, marks=pytest.mark.slow) for case in ((3, 2), (1, 4), (4, 1))]],
)
def test_each_row_of_the_stream_is_kept_as_often_as_any_other(old: int, new: int, trials: int) -> None:
    """120 arrivals to 12 rows in ``old`` parts, then 60 more to ``new`` parts: all 180 with one probability."""
    capacity = 12
    counts = np.zeros(180)
    for trial in range(trials):
        shards = [
            offer(ReservoirBuffer(own, seed=10 * trial + part), list(range(part, 120, old)))
            for part, own in enumerate(split_evenly(capacity, old))
        ]
        capacities = split_evenly(capacity, new)
        for part, own in enumerate(capacities):
            memory = ReservoirBuffer(own, seed=part)
            memory.take_share(shards, part, capacities, seed=trial)
            offer(memory, list(range(120 + part, 180, new)))
            counts[memory.data.flatten().numpy()] += 1
    kept = capacity / 180
    assert counts.sum() == trials * capacity
    statistic = ((counts - trials * kept) ** 2).sum() / (trials * kept * (1 - kept))
    assert 1e-4 < chi2.sf(statistic, 179) < 1 - 1e-4
    early, late = counts[:120].mean() / trials, counts[120:].mean() / trials
    deviation = np.sqrt(kept / 60 / trials)
    assert abs(early - kept) < 4 * deviation
    assert abs(late - kept) < 4 * deviation


def test_class_balanced_parts_keep_the_share_of_each_class() -> None:
    """200, 100 and 7 arrivals in two parts, then in three: a class that was full everywhere stays full."""
    shards = []
    for part in range(2):
        labels = torch.tensor([0] * 100 + [1] * 50 + [2] * (3 + part))[torch.randperm(153 + part)]
        shards.append(ReservoirBuffer(15, seed=part, policy="class_balanced"))
        shards[-1].add(torch.arange(len(labels))[:, None], labels)
    parts = dealt(shards, 3, 30, policy="class_balanced")
    seen = sum((Counter(part.class_seen) for part in parts), Counter())
    assert seen == {0: 200, 1: 100, 2: 7}
    for part in parts:
        held = part.class_counts()
        if held.get(2):  # never full: everything of it was kept
            assert part.class_seen[2] == held[2]
        for c, all_seen in ((0, 200), (1, 100)):
            stored = sum(shard.class_counts()[c] for shard in shards)
            assert abs(part.class_seen.get(c, 0) - all_seen * held.get(c, 0) / stored) <= 1


def test_a_class_that_no_memory_holds_any_more_is_counted_and_the_parts_go_on() -> None:
    shards = [ReservoirBuffer(1, policy="class_balanced", seed=part) for part in range(2)]
    for c in (0, 1):  # the second class takes the place of the first, or is not kept
        shards[0].add(torch.zeros(1, 2), torch.tensor([c]))
    for part in dealt(shards, 2, 2, policy="class_balanced"):
        before = part.n_seen
        part.add(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        assert part.n_seen == before + 3
        assert part.size <= 1


def test_the_same_seed_deals_the_same_and_another_one_otherwise() -> None:
    shards = [offer(ReservoirBuffer(10, seed=part), list(range(part, 80, 2))) for part in range(2)]
    found = []
    for seed in (0, 0, 1):
        memory = ReservoirBuffer(7, seed=5)
        memory.take_share(shards, 0, [7, 7, 6], seed=seed)
        found.append(memory.state_dict())
    assert torch.equal(found[0]["data"], found[1]["data"])
    assert torch.equal(found[0]["generator"], found[1]["generator"])
    assert not torch.equal(found[0]["data"], found[2]["data"])


def test_the_global_random_state_is_left_alone() -> None:
    shards = [offer(ReservoirBuffer(10), list(range(50)))]
    before = torch.get_rng_state()
    dealt(shards, 2, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_stored_bytes_are_taken_as_they_are() -> None:
    images = torch.randint(0, 256, (20, 1, 2, 2)) / 255
    shard = ReservoirBuffer(20, storage="uint8")
    shard.add(images, torch.arange(20))
    parts = dealt([shard], 2, 20, storage="uint8")
    assert all(part.data.dtype == torch.uint8 for part in parts)
    rows = [part.sample(10) for part in parts]
    order = torch.cat([each.label for each in rows]).argsort()
    assert torch.equal(torch.cat([each.data for each in rows])[order], shard.sample(20).data)


def test_nothing_seen_is_dealt_as_nothing() -> None:
    (part, _) = dealt([ReservoirBuffer(4), ReservoirBuffer(4)], 2, 8)
    assert (part.size, part.n_seen) == (0, 0)
    (part, _) = dealt([ReservoirBuffer(4), offer(ReservoirBuffer(4), [1, 2, 3])], 2, 8)
    assert part.size == 2


@pytest.mark.parametrize(
    ("shards", "part", "capacities", "message"),
    [
        ([], 0, [4], "at least one memory"),
        ([offer(ReservoirBuffer(9), list(range(9)))], 0, [4, 4], "9 rows of the shards do not fit"),
        ([ReservoirBuffer(4)], 1, [4], "at position part=1"),
        ([ReservoirBuffer(4)], -1, [4], "at position part=-1"),
        ([ReservoirBuffer(4)], 0, [5], "this memory's own, 4,"),
        ([ReservoirBuffer(4, policy="class_balanced")], 0, [4], "policy='class_balanced'"),
        ([ReservoirBuffer(4, storage="uint8")], 0, [4], "storage='uint8'"),
        ([nn.Linear(1, 1)], 0, [4], "got Linear"),
    ],
)
def test_what_does_not_fit_is_refused(shards: Any, part: int, capacities: list[int], message: str) -> None:
    memory = offer(ReservoirBuffer(4), [5, 6])
    with pytest.raises(ArgumentError, match=message):
        memory.take_share(shards, part, capacities)
    assert memory.data.flatten().tolist() == [5, 6]


def test_rows_of_two_kinds_and_the_own_rows_are_refused() -> None:
    memory, other = offer(ReservoirBuffer(4), [1]), ReservoirBuffer(4)
    other.add(torch.zeros(1, 5), torch.zeros(1).long())
    with pytest.raises(ArgumentError, match="rows of one kind"):
        ReservoirBuffer(4).take_share([memory, other], 0, [4])
    with pytest.raises(ArgumentError, match="its own rows"):
        memory.take_share([memory], 0, [4])
