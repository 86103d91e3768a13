"""The memory of a stream: drawn without bias, the same bits however it is fed, saved, moved and merged."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

from clkit.errors import ArgumentError, BatchError, NotFittedError, StateError
from clkit.methods import MemoryRows, ReservoirBuffer

TRIALS = 3000


def offer(memory: ReservoirBuffer, rows: int, batch: int = 10, start: int = 0, classes: int = 1) -> ReservoirBuffer:
    """Adds rows whose one value is their number, so that any mix-up of fields shows."""
    for first in range(start, start + rows, batch):
        numbers = torch.arange(first, min(first + batch, start + rows))
        memory.add(numbers[:, None], numbers % classes, numbers // 7, logits=numbers.double())
    return memory


def naive_uniform(capacity: int, rows: int, seed: int = 0) -> list[int]:
    """Vitter's rule R, one row at a time."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    for t in range(1, rows + 1):
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        if t <= capacity:
            kept.append(t - 1)
        elif int(u * t) < capacity:
            kept[int(u * t)] = t - 1
    return kept


def naive_balanced(capacity: int, labels: list[int], seed: int = 0) -> list[int]:
    """The class-balanced rule with an explicit set of full classes, one row at a time."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    full: set[int] = set()
    seen: Counter[int] = Counter()
    for row, c in enumerate(labels):
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        seen[c] += 1
        if len(kept) < capacity:
            kept.append(row)
            continue
        stored = Counter(labels[one] for one in kept)
        full |= {one for one in stored if stored[one] == max(stored.values())}
        victim = c
        position = int(u * seen[c])
        if c not in full:
            victim = min(one for one in stored if stored[one] == max(stored.values()))
            position = int(u * stored[victim])
        of_victim = [slot for slot, one in enumerate(kept) if labels[one] == victim]
        if position < len(of_victim):
            kept[of_victim[position]] = row
    return kept


@functools.lru_cache
def inclusion(capacity: int, batch: int, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(TRIALS, rows): whether each arrival is in memory at the end, one line per seed."""
    found = np.zeros((TRIALS, rows), dtype=np.int64)
    parts = [torch.arange(first, min(first + batch, rows)) for first in range(0, rows, batch)]
    for seed in range(TRIALS):
        memory = ReservoirBuffer(capacity, seed=seed)
        for part in parts:
            memory.add(part, torch.zeros_like(part))
        found[seed, memory.arrival.numpy()] = 1
    return found


def chi_square_tail(counts: np.ndarray[Any, Any], trials: int, kept: float) -> float:
    """How probable counts at least as uneven are, if ``kept`` rows of all are kept with equal probability."""
    n = counts.size
    e = kept / n
    statistic = ((counts - trials * e) ** 2).sum() / (trials * e * (1 - e)) * (n - 1) / n
    return float(chi2.sf(statistic, n - 1))


def contents(memory: ReservoirBuffer) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in memory.state_dict().items()}


def saved_and_loaded(memory: ReservoirBuffer, fresh: ReservoirBuffer) -> ReservoirBuffer:
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# Which rows are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "kept"), [(0, [0, 6, 22, 17, 20]), (1, [5, 15, 2, 17, 26])])
def test_published_runs(seed: int, kept: list[int]) -> None:
    assert offer(ReservoirBuffer(5, seed=seed), 30).arrival.tolist() == kept


@pytest.mark.parametrize(
    "setting",
    [(3, 5, 12), *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 6, 11), (10, 10, 40), (20, 10, 60)])],
)
def test_each_arrival_is_kept_equally_often(setting: tuple[int, int, int]) -> None:
    found = inclusion(*setting)
    assert (found.sum(axis=1) == setting[0]).all()
    assert chi_square_tail(found.sum(axis=0), TRIALS, setting[0]) > 1e-3


def test_the_chi_square_sees_the_bias_of_a_batch_that_counts_from_before_it() -> None:
    """The same test on the faulty rule that uses the count before the batch: it must be refused."""
    generator = np.random.default_rng(0)
    counts = np.zeros(24)
    for _ in range(TRIALS):
        kept = np.arange(6)
        for first in range(6, 24, 6):
            for row in range(first, first + 6):
                slot = generator.integers(max(first, 1))
                if slot < 6:
                    kept[slot] = row
        counts[kept] += 1
    assert chi_square_tail(counts, TRIALS, 6) < 1e-10


@pytest.mark.parametrize("setting", [(3, 5, 12), pytest.param((4, 6, 11), marks=pytest.mark.slow)])
def test_each_pair_is_kept_equally_often(setting: tuple[int, int, int]) -> None:
    m, _, n = setting
    found = inclusion(*setting)
    pairs = (found.T @ found)[np.triu_indices(n, 1)]
    e = m * (m - 1) / (n * (n - 1))
    assert abs(pairs.mean() / TRIALS - e) < 1e-12
    assert np.abs((pairs - TRIALS * e) / np.sqrt(TRIALS * e * (1 - e))).max() < 4.5


def test_the_slots_of_the_memory_are_filled_by_any_arrival() -> None:
    """A later row does not favour a slot: over seeds, each slot holds each late arrival equally often."""
    counts = np.zeros((3, 4))
    for seed in range(1000):
        arrival = offer(ReservoirBuffer(3, seed=seed), 12, 12).arrival.numpy()
        late = arrival >= 8
        counts[np.flatnonzero(late), arrival[late] - 8] += 1
    assert chi_square_tail(counts.flatten(), 1000, counts.sum() / 1000) > 1e-3


@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_splits_of_the_same_arrivals_leave_the_same_bits(policy: str, data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=90)))
    capacity, seed = data.draw(st.integers(1, 25)), data.draw(st.integers(0, 2**40))
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=12))
    rows = torch.randn(len(labels), 2, 3)
    whole = ReservoirBuffer(capacity, policy=policy, seed=seed)
    whole.add(rows, labels, labels + 1, logits=-rows)
    parts = ReservoirBuffer(capacity, policy=policy, seed=seed)
    for first, last in itertools.pairwise([0, *itertools.accumulate(sizes), len(labels)]):
        part = slice(min(first, len(labels)), last)
        parts.add(rows[part], labels[part], labels[part] + 1, logits=-rows[part])
    assert contents(parts) == contents(whole)
    if policy == "uniform":
        assert whole.arrival.tolist() == naive_uniform(capacity, len(labels), seed)
    else:
        assert whole.arrival.tolist() == naive_balanced(capacity, labels.tolist(), seed)


@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
def test_a_row_stays_whole_when_many_hit_one_slot(policy: str) -> None:
    memory = ReservoirBuffer(4, policy=policy)
    for start in range(0, 10_000, 200):  # on average many rows of the first batches share one of four slots
        numbers = torch.arange(start, start + 200)
        images = numbers[:, None, None].expand(200, 2, 2).float()
        memory.add(images, numbers % 7, numbers // 3, logits=numbers[:, None] * 2)
        arrival = memory.arrival
        assert torch.equal(memory.data, arrival[:, None, None].expand(4, 2, 2).float())
        assert torch.equal(memory.label, arrival % 7)
        assert torch.equal(memory.experience, arrival // 3)
        assert torch.equal(memory.sample(4).extras["logits"], arrival[:, None] * 2)
    assert memory.n_seen == 10_000
    assert len(set(memory.arrival.tolist())) == 4


def test_class_balanced_counts_and_uniformity_within_each_class() -> None:
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 7)
    trials, counts = 300, np.zeros(307)
    for seed in range(trials):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(307)) if seed % 2 else torch.arange(307)
        memory = ReservoirBuffer(30, policy="class_balanced", seed=seed)
        memory.add(order, labels[order])
        stored = memory.class_counts()
        assert stored[2] == 7
        assert {stored[0], stored[1]} == {11, 12}
        assert memory.class_seen == {0: 200, 1: 100, 2: 7}
        counts[memory.data.numpy()] += 1
    for c in (0, 1):
        own = counts[labels == c]
        assert chi_square_tail(own, trials, own.sum() / trials) > 1e-3


def test_rows_are_copies_and_carry_no_graph() -> None:
    data = torch.ones(3, 2, requires_grad=True)
    memory = ReservoirBuffer(3)
    memory.add(data * 1.0, torch.arange(3), logits=data * 2)
    with torch.inference_mode():
        memory.add(torch.zeros(40, 2), torch.arange(40), logits=torch.zeros(40, 2))
    first = memory.sample(3)
    assert not first.data.requires_grad
    assert not any(value.requires_grad or value.is_inference() for value in (memory.data, *first.extras.values()))
    first.data.fill_(7)
    memory.data.fill_(7)
    first.label.fill_(7)
    assert not bool((memory.data == 7).any())
    again = ReservoirBuffer(3)
    source, label = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    again.add(source, label)
    source += 1
    label += 1
    assert not bool(again.data.any() or again.label.any())


def test_global_random_state_is_left_alone_and_reading_changes_nothing() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  is what is tested
    memory, read = offer(ReservoirBuffer(5), 40), ReservoirBuffer(5)
    for start in range(0, 40, 10):
        offer(read, 10, start=start)
        read.sample(3, torch.Generator().manual_seed(1))
        read.sample_class(0, 9, replace=True, generator=torch.Generator().manual_seed(1))
        read.sample_classes(torch.zeros(9, dtype=torch.int64), torch.Generator().manual_seed(1))
        read.state_dict()
    read_again = copy.deepcopy(read)
    read.merge(copy.deepcopy(read_again))
    read_again.shrink(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002  see above
    reread = ReservoirBuffer(5)
    for start in range(0, 40, 10):
        offer(reread, 10, start=start)
        reread.sample(3)
        reread.sample_classes(torch.zeros(3, dtype=torch.int64))
    assert contents(reread) == contents(memory)


# Reading ------------------------------------------------------------------------------------------------------------


def test_sample_takes_distinct_rows_each_equally_often() -> None:
    memory = offer(ReservoirBuffer(8), 8, classes=3)
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(8)
    for _ in range(1000):
        rows = memory.sample(3, generator)
        assert len(set(rows.arrival.tolist())) == 3
        counts[rows.arrival.numpy()] += 1
        assert torch.equal(rows.data[:, 0], rows.arrival)
        assert torch.equal(rows.label, rows.arrival % 3)
        assert torch.equal(rows.extras["logits"], rows.arrival.double())
    assert chi_square_tail(counts, 1000, 3) > 1e-3


def test_sample_of_everything_is_in_stored_order() -> None:
    memory = offer(ReservoirBuffer(5), 30, classes=4)
    for k in (5, 6, 100):
        rows = memory.sample(k)
        assert rows.arrival.tolist() == memory.arrival.tolist()
        assert rows.data.tolist() == memory.data.tolist()
    assert isinstance(rows, MemoryRows)
    assert memory.sample(0).data.shape == (0, 1)
    one, other = (memory.sample(2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.arrival.tolist() == other.arrival.tolist()


def test_sample_of_a_class() -> None:
    memory = offer(ReservoirBuffer(9), 9, classes=3)
    rows = memory.sample_class(2, 10)
    assert sorted(rows.arrival.tolist()) == [2, 5, 8]
    many = memory.sample_class(2, 1000, replace=True)
    assert len(many.arrival) == 1000
    assert {int(one) for one in many.arrival} == {2, 5, 8}
    assert len(memory.sample_class(2, 2).arrival.unique()) == 2
    assert memory.classes() == [0, 1, 2]
    assert memory.class_counts() == {0: 3, 1: 3, 2: 3}
    with pytest.raises(ArgumentError, match=r"class_id must have rows in memory, \[0, 1, 2\], got 5"):
        memory.sample_class(5, 1)


@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
def test_a_row_of_each_class_named_is_that_of_a_naive_loop(policy: str) -> None:
    memory = ReservoirBuffer(40, policy=policy, seed=1)
    labels = torch.randint(0, 9, (90,), generator=torch.Generator().manual_seed(0)) ** 2  # gaps, uneven, out of order
    memory.add(torch.arange(90)[:, None], labels, logits=torch.arange(90.0))
    stored = [(int(c), int(row)) for c, row in zip(memory.label, memory.arrival, strict=True)]
    classes = memory.classes()
    named = torch.tensor(classes + classes[::-1] + [classes[2]] * 5)
    for ids in (named, named.int(), named[:0], named[:1]):
        rows = memory.sample_classes(ids, torch.Generator().manual_seed(3))
        drawn = torch.rand(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(3)).tolist()
        expected = []
        for c, u in zip(ids.tolist(), drawn, strict=True):
            own = [row for label, row in stored if label == c]
            expected.append(own[int(u * len(own))])
        assert rows.arrival.tolist() == expected
        assert rows.data.flatten().tolist() == rows.extras["logits"].tolist() == expected
        assert rows.label.tolist() == ids.tolist()
        assert rows.data.shape == (len(ids), 1)


def test_rows_of_classes_are_drawn_with_replacement_and_equally_often() -> None:
    memory = offer(ReservoirBuffer(9), 9, classes=2)  # five rows of class 0, four of class 1
    generator = torch.Generator().manual_seed(0)
    rows = memory.sample_classes(torch.tensor([1, 0]).repeat(3000), generator)
    assert rows.label.tolist() == [1, 0] * 3000
    for c, own in ((0, 5), (1, 4)):
        counts = np.bincount(rows.arrival[rows.label == c].numpy(), minlength=9)[c::2]
        assert counts.size == own
        assert chi2.sf(float(((counts - 3000 / own) ** 2 / (3000 / own)).sum()), own - 1) > 1e-3
    pairs = rows.arrival.view(-1, 2).numpy()  # those of one call do not depend on one another
    table = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=(range(1, 11, 2), range(0, 12, 2)))[0]
    assert chi2.sf(float(((table - 150) ** 2 / 150).sum()), table.size - 1) > 1e-3


def test_classes_of_which_no_row_can_be_drawn_are_refused() -> None:
    memory = offer(ReservoirBuffer(9), 9, classes=3)
    for absent in (-1, 3, 70):
        with pytest.raises(ArgumentError, match=rf"class_ids must have rows in memory, \[0, 1, 2\], got {absent}"):
            memory.sample_classes(torch.tensor([0, absent, 2]))
    bad: list[Any] = [torch.tensor([0.0]), torch.tensor([True]), torch.tensor(1), torch.zeros(2, 2).long(), [0, 1]]
    for class_ids in bad:
        with pytest.raises(ArgumentError, match=r"class_ids must be a tensor \(k,\) of integer class ids, got"):
            memory.sample_classes(class_ids)


def test_numbers_of_a_memory_that_is_not_full() -> None:
    memory = ReservoirBuffer(10)
    fields = (memory.data, memory.label, memory.experience, memory.arrival, memory.origin)
    assert [len(field) for field in fields] == [0] * 5
    assert (memory.size, memory.n_seen, memory.classes(), memory.class_counts()) == (0, 0, [], {})
    offer(memory, 4)
    assert (memory.size, memory.n_seen, memory.arrival.tolist()) == (4, 4, [0, 1, 2, 3])
    assert "capacity=10" in repr(memory)
    assert "size=4" in repr(memory)
    with pytest.raises(NotFittedError, match="nothing was added yet"):
        ReservoirBuffer(3).sample(1)
    with pytest.raises(NotFittedError, match="nothing was added yet"):
        ReservoirBuffer(3).sample_class(0, 1)
    with pytest.raises(NotFittedError, match="nothing was added yet"):
        ReservoirBuffer(3).sample_classes(torch.tensor([0]))


# Storage ------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def normalised(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    mean, std = torch.tensor(MEAN, dtype=dtype), torch.tensor(STD, dtype=dtype)
    return (pixels.to(dtype) / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_gives_back_normalised_images_bit_for_bit(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[torch.randperm(768)].reshape(1, 3, 16, 16)
    pixels = torch.cat([pixels, pixels.flip(2)])
    memory = ReservoirBuffer(2, storage="uint8", mean=MEAN, std=STD)
    memory.add(normalised(pixels, dtype), torch.arange(2))
    assert memory.data.dtype == torch.uint8
    assert torch.equal(memory.data, pixels)
    assert memory.sample(2).data.dtype == dtype
    assert torch.equal(memory.sample(2).data, normalised(pixels, dtype))


def test_uint8_of_plain_images() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    for rows in (pixels, pixels.float() / 255):
        memory = ReservoirBuffer(1, storage="uint8")
        memory.add(rows, torch.zeros(1, dtype=torch.int64))
        assert torch.equal(memory.data, pixels)
        assert memory.sample(1).data.dtype == rows.dtype
        assert torch.equal(memory.sample(1).data, rows)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (torch.full((1, 3, 2, 2), 0.5), {}, r"lose up to 0\.00196"),
        (torch.full((1, 3, 2, 2), 2.0), {}, r"lose up to 1 "),
        (torch.full((1, 3, 2, 2), -1.0), {}, r"lose up to 1 "),
        (torch.full((1, 3, 2, 2), float("nan")), {}, "lose up to nan"),
        (normalised(torch.arange(12).reshape(1, 3, 2, 2)), {}, "lose up to"),
        (torch.ones(1, 3, 2, 2, dtype=torch.int64), {}, "is for uint8 data"),
        (torch.ones(1, 3, 2, 2, dtype=torch.uint8), {"mean": 0.5, "std": 0.5}, "uint8 with mean and std"),
        (torch.ones(1, 1, 2, 2), {"mean": MEAN, "std": STD}, r"3 channels, a row of data has shape \(1, 2, 2\)"),
    ],
)
def test_uint8_refuses_what_it_would_change(data: Tensor, options: dict[str, Any], words: str) -> None:
    memory = ReservoirBuffer(2, storage="uint8", **options)
    before = contents(memory)
    with pytest.raises(BatchError, match=words):
        memory.add(data, torch.zeros(1, dtype=torch.int64))
    assert contents(memory) == before


def test_uint8_looks_at_later_batches_too() -> None:
    memory = ReservoirBuffer(2, storage="uint8")
    memory.add(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64))
    before = contents(memory)
    with pytest.raises(BatchError, match="lose up to"):
        memory.add(torch.full((1, 3), 0.3333), torch.zeros(1, dtype=torch.int64))
    assert contents(memory) == before


def test_float16_rounds_once_and_refuses_what_does_not_fit() -> None:
    data = torch.randn(4, 5)
    memory = ReservoirBuffer(4, storage="float16")
    memory.add(data, torch.arange(4))
    assert memory.data.dtype == torch.float16
    assert torch.equal(memory.sample(4).data, data.half().float())
    with pytest.raises(BatchError, match=r"up to 1e\+05 does not fit"):
        memory.add(torch.full((1, 5), 1e5), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(BatchError, match="floating-point data"):
        ReservoirBuffer(4, storage="float16").add(torch.arange(4), torch.arange(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int8])
def test_any_tensor_is_kept_as_it_is(dtype: torch.dtype) -> None:
    data = (torch.randn(6, 2, 3) * 3).to(dtype)
    memory = ReservoirBuffer(6)
    memory.add(data, torch.arange(6))
    assert memory.sample(6).data.dtype == dtype
    assert torch.equal(memory.sample(6).data, data)
    numbers = ReservoirBuffer(3)
    numbers.add(torch.arange(3.0), torch.arange(3))
    assert numbers.sample(3).data.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("storage", "row"), [("same", 48), ("float16", 24), ("uint8", 12)])
def test_capacity_in_bytes(storage: str, row: int) -> None:
    data, label = torch.ones(4, 3, 2, 2), torch.arange(4)
    extras = {"logits": torch.zeros(4, 5)}
    whole = row + 24 + 20
    memory = ReservoirBuffer(capacity_bytes=3 * whole + whole - 1, storage=storage)
    assert memory.capacity is None
    memory.add(data, label, **extras)
    assert (memory.capacity, memory.size) == (3, 3)
    held = memory._table
    assert held is not None
    tensors = [tensor.numel() * tensor.element_size() for tensor in held.tensors.values()]
    assert sum(tensors) + sum(values.nbytes for values in held.numbers.values()) == 3 * whole
    small = ReservoirBuffer(capacity_bytes=whole - 1, storage=storage)
    with pytest.raises(ArgumentError, match=f"less than one row, which takes {whole} bytes"):
        small.add(data, label, **extras)
    assert (small.n_seen, small.capacity) == (0, None)


# Merging and shrinking ----------------------------------------------------------------------------------------------


def three(seed: int, capacity: int, policy: str = "uniform") -> list[ReservoirBuffer]:
    """Memories of 12, 20 and 6 arrivals; the value of a row is its number in the three one after another."""
    memories = []
    for place, (start, rows) in enumerate([(0, 12), (12, 20), (32, 6)]):
        memory = ReservoirBuffer(capacity, policy=policy, seed=3 * seed + place)
        numbers = torch.arange(start, start + rows)
        memory.add(numbers, numbers % 3)
        memories.append(memory)
    return memories


@pytest.mark.parametrize("order", ["left", "right"])
@pytest.mark.parametrize("trials", [300, pytest.param(TRIALS, marks=pytest.mark.slow)])
def test_three_way_merge_is_uniform_in_both_orders(order: str, trials: int) -> None:
    capacity = 8
    found = np.zeros((trials, 38))
    for seed in range(trials):
        a, b, c = three(seed, capacity)
        if order == "left":
            a.merge(b, seed=seed)
            a.merge(c, seed=seed)
        else:
            b.merge(c, seed=seed)
            a.merge(b, seed=seed)
        data, origin, arrival = a.data, a.origin, a.arrival
        assert (a.n_seen, a.size) == (38, capacity)
        assert torch.equal(data, torch.tensor([0, 12, 32])[origin] + arrival)
        found[seed, data.numpy()] = 1
    assert chi_square_tail(found.sum(axis=0), trials, capacity) > 1e-3
    e = capacity * (capacity - 1) / (38 * 37)
    pairs = (found.T @ found)[np.triu_indices(38, 1)]
    assert np.abs((pairs - trials * e) / np.sqrt(trials * e * (1 - e))).max() < 4.5


def test_a_merged_memory_stays_uniform_when_it_learns_on() -> None:
    trials, counts = 400, np.zeros(40)
    for seed in range(trials):
        a, b = ReservoirBuffer(5, seed=2 * seed), ReservoirBuffer(5, seed=2 * seed + 1)
        for memory, start, rows in ((a, 0, 4), (b, 4, 20)):
            memory.add(torch.arange(start, start + rows), torch.zeros(rows, dtype=torch.int64))
        a.merge(b, seed=seed)
        a.add(torch.arange(24, 40), torch.zeros(16, dtype=torch.int64))
        counts[a.data.numpy()] += 1
        own = torch.where(a.arrival < 4, a.arrival, a.arrival + 20)
        assert torch.equal(a.data, torch.where(a.origin == 0, own, a.arrival + 4))
    assert chi_square_tail(counts, trials, 5) > 1e-3


def test_merge_is_seeded_and_leaves_the_other_alone() -> None:
    a, b, _ = three(0, 8)
    before = contents(b)
    results = []
    for seed in (0, 0, 1):
        one = copy.deepcopy(a)
        one.merge(b, seed=seed)
        results.append(one.data.tolist())
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert contents(b) == before
    a.merge(b)
    a.add(torch.full((30,), -1), torch.zeros(30, dtype=torch.int64))
    assert contents(b) == before


def test_merge_of_memories_that_lost_nothing_keeps_everything() -> None:
    for policy in ("uniform", "class_balanced"):
        a, b = offer(ReservoirBuffer(50, policy=policy), 12), offer(ReservoirBuffer(30, policy=policy), 20, start=12)
        a.merge(b)
        assert a.sample(99).data.flatten().tolist() == list(range(32))
        assert a.origin.tolist() == [0] * 12 + [1] * 20
        empty = ReservoirBuffer(50, policy=policy)
        empty.merge(a)
        assert empty.sample(99).data.flatten().tolist() == list(range(32))
        assert empty.origin.tolist() == [1] * 12 + [2] * 20
        assert empty.sample(99).extras["logits"].tolist() == list(range(32))
        before = empty.data.tolist()
        empty.merge(ReservoirBuffer(1, policy=policy))
        assert empty.data.tolist() == before


def test_class_balanced_merge_is_by_class() -> None:
    trials, labels = 400, torch.tensor([0] * 30 + [1] * 8 + [2] * 2 + [0] * 10 + [1] * 25 + [3] * 3)
    counts, kept = np.zeros(len(labels)), np.zeros(4)
    for seed in range(trials):
        a, b = (ReservoirBuffer(12, policy="class_balanced", seed=2 * seed + place) for place in range(2))
        a.add(torch.arange(40), labels[:40])
        b.add(torch.arange(40, 78), labels[40:])
        a.merge(b, seed=seed)
        stored = a.class_counts()
        assert stored[2] == 2
        assert stored[3] == 3
        assert sum(stored.values()) == 12
        assert {stored[0], stored[1]} == {3, 4}
        assert a.class_seen == {0: 40, 1: 33, 2: 2, 3: 3}
        counts[a.data.numpy()] += 1
        kept += np.bincount(a.label, minlength=4)
    for c in (0, 1):
        assert chi_square_tail(counts[labels == c], trials, kept[c] / trials) > 1e-3


def test_class_balanced_merge_takes_no_more_of_a_class_than_is_exact() -> None:
    """3 of 30 rows here and 12 of 12 there: only 3 of the 42 can be a uniform sample; later rows keep it one."""
    trials, counts = 400, np.zeros(82)
    for seed in range(trials):
        a, b = (ReservoirBuffer(12, policy="class_balanced", seed=2 * seed + place) for place in range(2))
        a.add(torch.arange(30), torch.zeros(30, dtype=torch.int64))
        others = torch.arange(1, 4)
        a.add(others.repeat(3) + 1000, others.repeat(3))
        b.add(torch.arange(30, 42), torch.zeros(12, dtype=torch.int64))
        assert a.class_counts() == {0: 3, 1: 3, 2: 3, 3: 3}
        a.merge(b, seed=seed)
        assert a.class_counts() == {0: 3, 1: 3, 2: 3, 3: 3}
        a.add(torch.arange(42, 82), torch.zeros(40, dtype=torch.int64))
        assert a.class_counts()[0] == 3
        counts[a.data[a.label == 0].numpy()] += 1
    assert chi_square_tail(counts, trials, 3) > 1e-3


def test_class_balanced_merge_may_leave_room_that_only_new_classes_fill() -> None:
    """Of 2 and 1 rows left of class 0, and 1 and 2 of class 1, one of each is exact: the third row stays free."""
    trials, counts = 300, np.zeros(17)
    for seed in range(trials):
        a, b = (ReservoirBuffer(3, policy="class_balanced", seed=2 * seed + place) for place in range(2))
        a.add(torch.arange(11), torch.tensor([1] * 3 + [0] * 8))
        b.add(torch.arange(11, 22), torch.tensor([0] * 3 + [1] * 8))
        assert (a.class_counts(), b.class_counts()) == ({0: 2, 1: 1}, {0: 1, 1: 2})
        a.merge(b, seed=seed)
        assert a.class_counts() == {0: 1, 1: 1}
        a.add(torch.arange(22, 28), torch.zeros(6, dtype=torch.int64))
        assert a.class_counts() == {0: 1, 1: 1}
        of_class = [*range(3, 14), *range(22, 28)]
        counts[of_class.index(int(a.data[a.label == 0]))] += 1
        a.add(torch.arange(28, 30), torch.full((2,), 2))
        assert a.class_counts() == {0: 1, 1: 1, 2: 1}
    assert chi_square_tail(counts, trials, 1) > 1e-3


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(1, 1), "only another ReservoirBuffer can be taken over, got Linear"),
        (ReservoirBuffer(5, policy="class_balanced"), "policy='class_balanced' into one with policy='uniform'"),
        (ReservoirBuffer(5, storage="float16"), "storage='float16'"),
        (offer(ReservoirBuffer(4), 10), r"call shrink\(4\)"),
    ],
)
def test_merge_refuses_what_does_not_fit(other: Any, words: str) -> None:
    memory = offer(ReservoirBuffer(5), 20)
    before = contents(memory)
    with pytest.raises(ArgumentError, match=words):
        memory.merge(other)
    assert contents(memory) == before


def test_merge_refuses_itself_and_other_rows() -> None:
    memory = offer(ReservoirBuffer(5), 20)
    with pytest.raises(ArgumentError, match="its own rows"):
        memory.merge(memory)
    other = ReservoirBuffer(5)
    other.add(torch.ones(3, 2), torch.arange(3))
    with pytest.raises(ArgumentError, match="rows of"):
        memory.merge(other)
    one, two = (ReservoirBuffer(2, storage="uint8", mean=mean, std=0.5) for mean in (0.5, 0.25))
    with pytest.raises(ArgumentError, match="another mean and std"):
        one.merge(two)


def test_shrink_keeps_a_uniform_memory_uniform() -> None:
    trials, counts = 400, np.zeros(24)
    for seed in range(trials):
        memory = ReservoirBuffer(9, seed=seed)
        memory.add(torch.arange(15), torch.zeros(15, dtype=torch.int64))
        memory.shrink(4, seed=seed)
        assert memory.capacity == memory.size == 4
        memory.add(torch.arange(15, 24), torch.zeros(9, dtype=torch.int64))
        counts[memory.data.numpy()] += 1
    assert chi_square_tail(counts, trials, 4) > 1e-3


def test_shrink_of_a_class_balanced_memory_takes_from_the_largest() -> None:
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 2)
    memory = ReservoirBuffer(16, policy="class_balanced")
    memory.add(torch.arange(16), labels)
    memory.shrink(16)
    assert memory.class_counts() == {0: 9, 1: 5, 2: 2}
    memory.shrink(10)
    assert sorted(memory.class_counts().values()) == [2, 4, 4]
    assert torch.equal(labels[memory.data], memory.label)
    memory.shrink(5)
    assert sorted(memory.class_counts().values()) == [1, 2, 2]
    with pytest.raises(ArgumentError, match="only shrink, from 5 rows, got 6"):
        memory.shrink(6)
    with pytest.raises(NotFittedError, match="after the first add"):
        ReservoirBuffer(capacity_bytes=100).shrink(1)


def test_shrink_before_the_memory_is_full() -> None:
    memory = offer(ReservoirBuffer(20), 3)
    memory.shrink(5)
    assert offer(memory, 27, start=3).arrival.tolist() == [0, 6, 22, 17, 20]


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["same", "uint8", "float16"])
@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
@pytest.mark.parametrize("before", [0, 3, 37])
def test_saved_and_loaded_it_goes_on_bit_for_bit(policy: str, storage: str, before: int) -> None:
    options: dict[str, Any] = {"policy": policy, "storage": storage, "seed": 5}
    data = torch.randint(256, (80, 3, 2), generator=torch.Generator().manual_seed(0)) / 255
    label = torch.randint(4, (80,), generator=torch.Generator().manual_seed(1))
    memory = ReservoirBuffer(8, **options)
    memory.add(data[:before], label[:before], 1, logits=data[:before])
    if before:
        other = ReservoirBuffer(8, **options)
        other.add(data[:20], label[:20], 2, logits=data[:20])
        memory.merge(other)
    loaded = saved_and_loaded(memory, ReservoirBuffer(8, policy=policy, storage=storage, seed=99))
    assert contents(loaded) == contents(memory)
    for one in (memory, loaded):
        for part in (slice(before, before + 3), slice(before + 3, 80)):
            one.add(data[part], label[part], 3, logits=data[part])
    assert contents(loaded) == contents(memory)
    assert torch.equal(loaded.sample(8).data, memory.sample(8).data)
    assert loaded.n_seen == memory.n_seen > 60


def test_the_state_is_a_copy_and_part_of_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = ReservoirBuffer(4)

    net, other = Net(), Net()
    offer(net.memory, 20)
    state = net.state_dict()
    kept = copy.deepcopy(state)
    offer(net.memory, 300, start=20)
    assert all(torch.equal(state[k], kept[k]) for k in state if isinstance(state[k], Tensor))
    other.load_state_dict(state)
    assert other.memory.data.tolist() == kept["memory.data"].tolist()
    state["memory.data"].fill_(-1)
    assert other.memory.data.tolist() == kept["memory.data"].tolist()
    assert not list(net.buffers())
    assert all(isinstance(value, Tensor | str) for value in state.values())
    copied = copy.deepcopy(other.memory)
    offer(copied, 50, start=20)
    assert other.memory.n_seen == 20
    offer(other.memory, 50, start=20)
    assert contents(copied) == contents(other.memory)


def test_casts_leave_the_memory_alone() -> None:
    memory = ReservoirBuffer(4)
    memory.add(torch.randn(4, 3, dtype=torch.float64), torch.arange(4))
    before = contents(memory)
    memory.half().to(torch.bfloat16)
    assert contents(memory) == before


@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
def test_a_default_device_of_the_user_changes_nothing(policy: str) -> None:
    options: dict[str, Any] = {"policy": policy, "storage": "uint8", "mean": 0.0, "std": (1.0, 1.0)}
    data, label = torch.ones(40, 2), torch.arange(40) % 3
    with torch.device("meta"):
        memory, other = ReservoirBuffer(5, **options), ReservoirBuffer(9, **options)
        for one in (memory, other):
            one.add(data, label)
            one.sample(2)
            one.sample_class(0, 1)
            one.sample_class(0, 3, replace=True)
            one.sample_classes(torch.zeros(3, dtype=torch.int64, device="cpu"))
        other.shrink(6)
        memory.merge(other)
        state = memory.state_dict()
        memory.load_state_dict(state)
        rows = memory.sample(2)
    assert not any(value.is_meta for value in [*rows[:-1], *state.values()] if isinstance(value, Tensor))
    assert memory.device == torch.device("cpu")


def test_loading_with_another_capacity() -> None:
    full, partial = offer(ReservoirBuffer(6), 20), offer(ReservoirBuffer(6), 5)
    for memory in (full, partial):
        with pytest.raises(StateError, match=r"capacity=6 and call shrink\(5\)"):
            ReservoirBuffer(5).load_state_dict(memory.state_dict())
    with pytest.raises(StateError, match="cannot grow to 7"):
        ReservoirBuffer(7).load_state_dict(full.state_dict())
    larger = ReservoirBuffer(7)
    larger.load_state_dict(partial.state_dict())
    assert contents(offer(larger, 30, start=5)) == contents(offer(offer(ReservoirBuffer(7), 5), 30, start=5))
    in_bytes = ReservoirBuffer(capacity_bytes=6 * (24 + 16))
    in_bytes.load_state_dict(full.state_dict())
    assert contents(in_bytes) == contents(full)


def broken(**changes: Any) -> dict[str, Any]:
    state = offer(ReservoirBuffer(5), 30, classes=3).state_dict()
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


def numbers(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"format": torch.tensor(2)},
            "format must be .* equal to 1, the saved state has an int64 tensor 2; use the clkit release",
        ),
        ({"policy": "class_balanced"}, "policy must be 'uniform', the saved state has 'class_balanced'"),
        ({"storage": "uint8"}, "storage must be 'same', the saved state has 'uint8'"),
        ({"normalised": torch.tensor([[0.5], [0.5]], dtype=torch.float64)}, "mean and std"),
        ({"label": None}, "has no 'label'"),
        ({"more": torch.zeros(1)}, "the unknown 'more'"),
        ({"label": numbers(0, 1, 2, 0)}, r"label must be an int64 tensor of shape \(5,\)"),
        ({"label": numbers(0, 1, 2, 0, -1)}, "label must be .* from 0"),
        ({"label": numbers(9, 9, 9, 9, 9)}, "more rows of a class"),
        ({"arrival": numbers(0, 1, 2, 3, 30)}, "arrived after"),
        ({"arrival": numbers(0, 1, 2, 3, 3)}, "one row twice"),
        ({"origin": numbers(0, 0, 0, 0, 1)}, "origin is not below 1"),
        ({"experience": numbers(0, 0, 0, 0, 2**31)}, f"experience must be .* to {2**31 - 1}"),
        ({"seen": numbers(31)}, "seen is 31 rows, but class_seen adds up to 30"),
        ({"seen": numbers(3)}, "arrived after"),
        ({"class_seen": numbers(10, 10)}, r"class_seen must be .* shape \(3,\)"),
        ({"classes": numbers(0, 0, 2)}, "sorted, distinct"),
        ({"capacity": torch.tensor(0)}, "with capacity 0"),
        ({"data": torch.zeros(4, 1, dtype=torch.int64)}, r"label must be .* \(4,\)"),
        ({"data": torch.zeros(5, 2, dtype=torch.int64)}, r"data of torch.int64 has rows \(2,\)"),
        ({"data": torch.zeros(5, 1)}, "data of torch.float32"),
        ({"data": torch.zeros(())}, "data must be a tensor of shape"),
        ({"extras.logits": torch.zeros(4)}, r"extras.logits must be a tensor of shape \(5, ...\)"),
        ({"generator": torch.zeros(7, dtype=torch.uint8)}, r"generator must be a uint8 tensor of shape \(5056,\)"),
        ({"generator": torch.zeros(5056, dtype=torch.uint8)}, "generator must be .* the state of a generator"),
        ({"data": torch.zeros(1, 1, dtype=torch.int64).expand(5, 1)}, "data must be .* a tensor that does not store"),
        ({"seen": numbers()}, "seen must be .* of one origin at least"),
        ({"seen": numbers(2**62), "class_seen": numbers(0, 0, 2**62)}, "seen must be"),
        ({"extras.label": torch.zeros(5)}, "the unknown 'extras.label'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(changes: dict[str, Any], words: str) -> None:
    memory = offer(ReservoirBuffer(5, seed=1), 12)
    before = contents(memory)
    with pytest.raises(StateError, match=words):
        memory.load_state_dict(broken(**changes))
    assert contents(memory) == before
    memory.load_state_dict(broken())
    assert memory.arrival.tolist() == [0, 6, 22, 17, 20]


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of capacity"),
        ({"capacity": 3, "capacity_bytes": 3}, "exactly one of capacity"),
        ({"capacity": 0}, "capacity must be an integer of at least 1"),
        ({"capacity_bytes": 2.5}, "capacity_bytes must be an integer"),
        ({"capacity": 3, "policy": "fifo"}, "policy must be one of 'uniform', 'class_balanced'"),
        ({"capacity": 3, "storage": "int4"}, "storage must be one of"),
        ({"capacity": 3, "seed": -1}, "seed must be"),
        ({"capacity": 3, "mean": 0.5}, "are for storage='uint8'"),
        ({"capacity": 3, "storage": "uint8", "std": 0.0}, "std must be positive"),
        ({"capacity": 3, "storage": "uint8", "std": ()}, "std must be a number"),
        ({"capacity": 3, "storage": "uint8", "mean": (0.1, 0.2), "std": (1.0, 1.0, 1.0)}, "as many channels"),
        ({"capacity": 3, "storage": "uint8", "mean": float("nan")}, "mean must be a finite number"),
    ],
)
def test_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ReservoirBuffer(**options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": [1, 2]}, "data must be a tensor"),
        ({"data": torch.zeros(())}, "data must have one row per sample"),
        ({"data": torch.zeros(2, 1).to_sparse()}, "plain dense"),
        ({"data": torch.zeros(2, 2, dtype=torch.int64)}, "first batch fixed the rows"),
        ({"data": torch.zeros(2, 1)}, "first batch fixed the rows"),
        ({"label": torch.zeros(2)}, "label must be integers, got torch.float32"),
        ({"label": torch.tensor([0, -1])}, "label must not be negative, got -1 in row 1"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label must have shape \(2,\)"),
        ({"label": 0}, "label must be a tensor of 2 integers"),
        ({"experience": torch.tensor([1, -2])}, "experience must not be negative"),
        ({"experience": 2**31}, "experience must be at most 2147483647, got 2147483648"),
        ({"experience": torch.tensor([0, 2**31])}, "experience must be at most 2147483647, got 2147483648"),
        ({"experience": -1}, "experience must be an integer"),
        ({"logits": torch.zeros(3)}, "logits must have one row per sample"),
        ({"logits": torch.zeros(2, 2)}, "first batch fixed the rows"),
        ({"logits": None}, "logits must be a tensor"),
        ({"other": torch.zeros(2)}, "first batch fixed the rows"),
        ({"arrival": torch.zeros(2)}, "arrival is the name of a number"),
    ],
)
@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
def test_a_refused_batch_changes_nothing(policy: str, changes: dict[str, Any], words: str) -> None:
    memory = offer(ReservoirBuffer(5, policy=policy), 20)
    before = contents(memory)
    batch = {"data": torch.zeros(2, 1, dtype=torch.int64), "label": torch.arange(2), "logits": torch.zeros(2).double()}
    with pytest.raises((BatchError, ArgumentError), match=words):
        memory.add(**{**batch, **changes})
    if changes.keys() <= {"data", "label"}:  # which can be asked before
        with pytest.raises(BatchError, match=words):
            memory.check({**batch, **changes}["data"], {**batch, **changes}["label"], ["logits"])
    memory.check(batch["data"], batch["label"], ["logits"])
    assert contents(memory) == before
    memory.add(**batch)
    assert memory.n_seen == 22


def test_fields_that_could_not_be_added_are_known_before() -> None:
    memory = offer(ReservoirBuffer(4), 4)
    for extras in ([], ["mask"], ["logits", "mask"]):
        added = ", ".join(["data", *extras])
        with pytest.raises(BatchError, match=f"rows in memory consist of data, logits, those to be added of {added}"):
            memory.check(torch.zeros(2, 1, dtype=torch.int64), torch.arange(2), extras)


def test_an_empty_batch_changes_nothing() -> None:
    memory = ReservoirBuffer(3)
    memory.add(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert (memory.n_seen, memory.size) == (0, 0)
    memory.add(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))
    assert memory.size == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["uniform", "class_balanced"])
@pytest.mark.parametrize("storage", ["same", "uint8", "float16"])
def test_on_a_gpu_it_keeps_the_same_rows(policy: str, storage: str) -> None:
    data, label = torch.randint(256, (90, 3, 4)) / 255, torch.randint(4, (90,))
    memories = [ReservoirBuffer(12, policy=policy, storage=storage, device=device) for device in ("cpu", "cuda")]
    moved = ReservoirBuffer(12, policy=policy, storage=storage)
    for start in range(0, 90, 10):
        part = slice(start, start + 10)
        memories[0].add(data[part], label[part], logits=data[part])
        memories[1].add(data[part].cuda(), label[part].cuda(), logits=data[part].cuda())
        moved.add(data[part], label[part], logits=data[part].cuda())
        moved.to("cuda" if start % 20 else "cpu")
    moved.to("cuda")
    rows = [memory.sample(5, torch.Generator().manual_seed(0)) for memory in (*memories, moved)]
    assert rows[1].data.is_cuda
    assert rows[1].label.is_cuda
    assert rows[1].extras["logits"].is_cuda
    for one in rows[1:]:
        assert torch.equal(one.data.cpu(), rows[0].data)
        assert torch.equal(one.arrival.cpu(), rows[0].arrival)
    assert contents(memories[0]) == contents(memories[1]) == contents(moved)
    memories[1].merge(moved)
    other = copy.deepcopy(memories[0])
    memories[0].merge(other)
    assert contents(memories[0]) == contents(memories[1])
    loaded = ReservoirBuffer(12, policy=policy, storage=storage, device="cuda")
    loaded.load_state_dict(memories[0].state_dict())
    assert torch.equal(loaded.sample(12).data.cpu(), memories[0].sample(12).data)
