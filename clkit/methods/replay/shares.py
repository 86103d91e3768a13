"""Which memory gets which rows, and how many arrivals it counts, when the rows of some are dealt to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from clkit.methods._checks import Ids
from clkit.methods.replay.rows import RowTable

__all__ = ["Share", "dealt", "even", "numbered", "shared_table"]


class Share(NamedTuple):
    """What one of the new memories gets.

    Attributes:
        rows: Positions among all rows, ascending.
        class_seen: Arrivals that it counts, by class; at least the rows that it holds.
    """

    rows: Ids
    class_seen: Counter[int]


def even(total: int, parts: int) -> list[int]:
    """Return whole numbers that add up to ``total`` and differ by one at most, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def dealt(
    labels: Ids, class_seen: Counter[int], capacities: Sequence[int], generator: np.random.Generator, *, balanced: bool
) -> list[Share]:
    """Deal rows at random, to each part about as many, and the arrivals that they stand for.

    A uniform memory that is not full has dropped nothing, so it counts what it holds; arrivals that were dropped before
    are counted by the full ones, each about as many. A class-balanced memory keeps its shares class by class, so the
    arrivals of a class go where its rows are.

    Args:
        labels: (S,) class of each row.
        class_seen: Arrivals by class, those of the rows included.
        capacities: Of each part; not below its share of S.
        generator: Draws who gets what.
        balanced: Whether the memories are class-balanced.
    """
    order = generator.permutation(labels.size)
    cuts = np.cumsum(even(labels.size, len(capacities)))[:-1]
    rows = [np.sort(part) for part in np.split(order, cuts)]
    held = [Counter(labels[part].tolist()) for part in rows]
    dropped = class_seen - Counter(labels.tolist())
    more = _by_class(dropped, held) if balanced else _by_part(dropped, held, capacities)
    return [Share(part, own + extra) for part, own, extra in zip(rows, held, more, strict=True)]


def shared_table(
    shards: Sequence[tuple[RowTable, Sequence[int]]], share: Share, capacity: int, device: torch.device
) -> RowTable:
    """Return the rows of a share, numbered anew in the order of their ages.

    Args:
        shards: Their rows, and how many each has seen by origin.
        share: Which of all rows.
        capacity: Of the table.
        device: Where it lies.
    """
    first = shards[0][0]
    table, ages, start = RowTable(first.layout, first.stored, capacity, device), [], 0
    for old, seen in shards:
        rows = share.rows[(share.rows >= start) & (share.rows < start + old.size)] - start
        table.append(old, rows)
        ages.append((old.now("arrival") / np.array(seen)[old.now("origin")])[rows])
        start += old.size
    table.numbers["origin"][:] = 0
    table.numbers["arrival"][: table.size] = numbered(np.concatenate(ages), share.class_seen.total())
    return table


def numbered(ages: np.ndarray[tuple[int], np.dtype[np.float64]], n_seen: int) -> Ids:
    """Return distinct arrival numbers below ``n_seen`` in the order of the ages, each near its share of the stream.

    Args:
        ages: (size,) when each row came, as a share of its own stream, in [0, 1).
        n_seen: At least as many as there are rows.
    """
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
