"""Which rows a memory keeps: as they arrive, when it shrinks, when two become one, and when rows are dealt anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clkit.methods._checks import Ids
from clkit.methods.replay.rows import RowTable

__all__ = [
    "balanced_slots",
    "dealt",
    "even",
    "merged_rows",
    "remaining_rows",
    "shared_table",
    "uniform_slots",
]

_Floats = np.ndarray[Any, np.dtype[np.float64]]
_Sample = tuple[Ids, Counter[int]]  # the labels of the rows kept of a stream, and the rows of the stream by class


# ---- as rows arrive


def uniform_slots(table: RowTable, drawn: _Floats, seen: int) -> tuple[Ids, Ids]:
    """Return sorted distinct slots to be written, and the row of the batch for each; sets the size of the table.

    ``drawn`` has a number in [0, 1) for each row of the batch, ``seen`` rows came before.
    """
    ordinal = np.arange(seen + 1, seen + 1 + drawn.size)
    slots = (drawn * ordinal).astype(np.int64)
    if seen < table.capacity:
        slots = np.where(ordinal <= table.capacity, ordinal - 1, slots)
        table.size = min(table.capacity, seen + drawn.size)
    rows = np.flatnonzero(slots < table.capacity)
    slots = slots[rows]
    if slots.size < 2:
        return slots, rows
    order = slots.argsort(kind="stable")
    slots, rows = slots[order], rows[order]
    last = np.ones(slots.size, dtype=bool)  # of the rows that hit the same slot
    np.not_equal(slots[1:], slots[:-1], out=last[:-1])
    return slots[last], rows[last]


def balanced_slots(table: RowTable, drawn: _Floats, labels: Ids, class_seen: Counter[int]) -> tuple[Ids, Ids]:
    """Return the same for classes of equal shares, as far as they have that many rows."""
    if table.counts is None:
        table.counts = table.class_counts()
    stored, of_slot = table.counts, table.numbers["label"]
    seen = Counter({int(c): class_seen[int(c)] for c in np.unique(labels)})
    written: dict[int, int] = {}
    for row, (c, number) in enumerate(zip(labels.tolist(), drawn.tolist(), strict=True)):
        incomplete = stored.get(c, 0) < seen[c]
        seen[c] += 1
        if table.size < table.capacity and not incomplete:
            slot = table.size
            table.size += 1
        else:
            largest = max(stored.values(), default=0)
            # A class is full once it was the largest. The largest count never grows, so that a class that was
            # the largest either still is, or has lost a row.
            if incomplete or stored.get(c, 0) == largest:
                victim, position = c, int(number * seen[c])
                if position >= stored.get(c, 0):
                    continue
            else:
                victim = min(other for other, count in stored.items() if count == largest)
                position = int(number * largest)
            slot = int(np.flatnonzero(of_slot[: table.size] == victim)[position])
            stored[victim] -= 1
        stored[c] = stored.get(c, 0) + 1
        of_slot[slot] = c
        written[slot] = row
    slots = sorted(written)
    return np.array(slots, dtype=np.int64), np.array([written[slot] for slot in slots], dtype=np.int64)


# ---- when a memory shrinks, or two become one


def remaining_rows(labels: Ids, capacity: int, generator: np.random.Generator, *, balanced: bool) -> Ids:
    """Return the rows that stay when there is room for ``capacity``."""
    parts = [np.flatnonzero(labels == c) for c in np.unique(labels)] if balanced else [np.arange(labels.size)]
    shares = _levelled([rows.size for rows in parts], capacity)
    return _joined(_drawn(rows, share, generator) for rows, share in zip(parts, shares, strict=True))


def merged_rows(
    one: _Sample, other: _Sample, capacity: int, generator: np.random.Generator, *, balanced: bool
) -> tuple[Ids, Ids]:
    """Return the rows to keep of two samples, so that they are one of both streams together."""
    classes = sorted(one[1].keys() | other[1].keys()) if balanced else [None]
    parts = [(_of_class(one, c), _of_class(other, c)) for c in classes]
    # a uniform sample of both streams can have no more rows than are left of either, unless all of that one are
    most = [
        min([seen + n, *(kept.size for kept, number in ((rows, seen), (others, n)) if kept.size < number)])
        for (rows, seen), (others, n) in parts
    ]
    ours, theirs = [], []
    for ((rows, seen), (others, n)), share in zip(parts, _levelled(most, capacity), strict=True):
        k = int(generator.hypergeometric(seen, n, share))
        ours.append(_drawn(rows, k, generator))
        theirs.append(_drawn(others, share - k, generator))
    return _joined(ours), _joined(theirs)


def _of_class(sample: _Sample, c: int | None) -> tuple[Ids, int]:
    """Return the rows that are kept of a class, or of all for ``None``, and how many there were."""
    labels, seen = sample
    return (np.arange(labels.size), seen.total()) if c is None else (np.flatnonzero(labels == c), seen[c])


def _drawn(rows: Ids, k: int, generator: np.random.Generator) -> Ids:
    return np.sort(generator.choice(rows, k, replace=False))


def _joined(parts: Any) -> Ids:
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def _levelled(counts: list[int], capacity: int) -> list[int]:
    """Return counts with the largest reduced until they add up to ``capacity`` at most."""
    left = np.array(counts, dtype=np.int64)
    for _ in range(int(left.sum()) - capacity):
        left[left.argmax()] -= 1
    return [int(count) for count in left]


# ---- when the rows of some memories are dealt to others


def even(total: int, parts: int) -> list[int]:
    """Return whole numbers that add up to ``total`` and differ by one at most, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def dealt(
    labels: Ids, class_seen: Counter[int], capacities: Sequence[int], generator: np.random.Generator, *, balanced: bool
) -> list[tuple[Ids, Counter[int]]]:
    """Deal rows at random, to each part about as many, in order, and by class the arrivals that they stand for.

    A uniform memory that is not full has dropped nothing, so it counts what it holds; arrivals that were dropped before
    are counted by the full ones, each about as many. A class-balanced memory keeps its shares class by class, so the
    arrivals of a class go where its rows are.
    """
    order = generator.permutation(labels.size)
    cuts = np.cumsum(even(labels.size, len(capacities)))[:-1]
    rows = [np.sort(part) for part in np.split(order, cuts)]
    held = [Counter(labels[part].tolist()) for part in rows]
    dropped = class_seen - Counter(labels.tolist())
    more = _by_class(dropped, held) if balanced else _by_part(dropped, held, capacities)
    return [(part, own + extra) for part, own, extra in zip(rows, held, more, strict=True)]


def shared_table(
    shards: Sequence[tuple[RowTable, Sequence[int]]], share: Ids, n_seen: int, capacity: int, device: torch.device
) -> RowTable:
    """Return some rows of shards, given with what each has seen by origin, numbered anew by their ages."""
    first = shards[0][0]
    table, ages, start = RowTable(first.layout, first.stored, capacity, device), [], 0
    for old, seen in shards:
        rows = share[(share >= start) & (share < start + old.size)] - start
        table.append(old, rows)
        ages.append((old.now("arrival") / np.array(seen)[old.now("origin")])[rows])
        start += old.size
    table.numbers["origin"][:] = 0
    table.numbers["arrival"][: table.size] = _numbered(np.concatenate(ages), n_seen)
    return table


def _numbered(ages: _Floats, n_seen: int) -> Ids:
    """Return distinct arrival numbers below ``n_seen`` in the order of the ages, each near its share of the stream."""
    order = ages.argsort(kind="stable")
    ranks = np.arange(ages.size)
    wanted = np.minimum((ages[order] * n_seen).astype(np.int64), n_seen - ages.size + ranks)
    numbers = np.empty(ages.size, dtype=np.int64)
    numbers[order] = np.maximum.accumulate(wanted - ranks) + ranks  # each at least one more than the one before
    return numbers


def _by_class(dropped: Counter[int], held: list[Counter[int]]) -> list[Counter[int]]:
    """Share out each class in proportion to the rows that it holds."""
    more: list[Counter[int]] = [Counter() for _ in held]
    for c, count in sorted(dropped.items()):
        weights = np.array([own[c] for own in held]) if any(own[c] for own in held) else np.ones(len(held), dtype=int)
        bounds = count * np.cumsum(weights) // weights.sum()
        for extra, share in zip(more, np.diff(bounds, prepend=0).tolist(), strict=True):
            extra[c] = share
    return more


def _by_part(dropped: Counter[int], held: list[Counter[int]], capacities: Sequence[int]) -> list[Counter[int]]:
    """Give each full part as many in all, whatever their classes."""
    more: list[Counter[int]] = [Counter() for _ in held]
    full = [part for part, own in enumerate(held) if own.total() == capacities[part]]
    if not full:  # so little is missing in each that the arrivals of the past are no longer known
        return more
    left = sorted(dropped.items())
    for part, room in zip(full, even(dropped.total(), len(full)), strict=True):
        while room:
            c, count = left.pop()
            taken = min(room, count)
            more[part][c] += taken
            room -= taken
            if count > taken:
                left.append((c, count - taken))
    return more
