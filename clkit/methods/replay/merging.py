"""Which rows stay when a memory shrinks, or when two become one."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from clkit.methods._checks import Ids
from clkit.methods.replay.rows import RowTable

__all__ = ["MERGE_LIMIT", "Sample", "merged_rows", "remaining_rows"]

MERGE_LIMIT = 10**9  # rows seen, of NumPy's hypergeometric distribution


class Sample(NamedTuple):
    """A sample of a stream.

    Attributes:
        labels: (size,) class of each row.
        seen: Rows of the stream.
        class_seen: Rows of the stream by class.
    """

    labels: Ids
    seen: int
    class_seen: Counter[int]


def remaining_rows(table: RowTable, capacity: int, generator: np.random.Generator, *, balanced: bool) -> Ids:
    """Return the rows that stay when there is room for ``capacity``."""
    if not balanced:
        return _drawn(np.arange(table.size), min(capacity, table.size), generator)
    counts = table.class_counts()
    shares = _levelled(list(counts.values()), capacity)
    labels = table.now("label")
    kept = [_drawn(np.flatnonzero(labels == c), share, generator) for c, share in zip(counts, shares, strict=True)]
    return np.sort(np.concatenate(kept))


def merged_rows(
    mine: Sample, theirs: Sample, capacity: int, generator: np.random.Generator, *, balanced: bool
) -> tuple[Ids, Ids]:
    """Return the rows to keep of two samples, so that they are one of both streams together."""
    if not balanced:
        total = min(capacity, mine.seen + theirs.seen)
        return _shared_out(
            (np.arange(mine.labels.size), mine.seen), (np.arange(theirs.labels.size), theirs.seen), total, generator
        )
    parts = []
    for c in sorted(mine.class_seen.keys() | theirs.class_seen.keys()):
        ours = np.flatnonzero(mine.labels == c), mine.class_seen[c]
        parts.append((ours, (np.flatnonzero(theirs.labels == c), theirs.class_seen[c])))
    most = [
        min(seen + others_seen, _exact_limit(at, seen), _exact_limit(others_at, others_seen))
        for (at, seen), (others_at, others_seen) in parts
    ]
    shares = _levelled(most, capacity)
    kept = [_shared_out(*part, share, generator) for part, share in zip(parts, shares, strict=True)]
    first, second = zip(*kept, strict=True)
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _drawn(rows: Ids, k: int, generator: np.random.Generator) -> Ids:
    """Return ``k`` of the rows, in order."""
    return np.sort(generator.choice(rows, k, replace=False))


def _levelled(counts: list[int], capacity: int) -> list[int]:
    """Return counts with the largest reduced until they add up to ``capacity`` at most."""
    left = np.array(counts, dtype=np.int64)
    for _ in range(int(left.sum()) - capacity):
        left[left.argmax()] -= 1
    return [int(count) for count in left]


def _exact_limit(rows: Ids, seen: int) -> int:
    """Return how large a uniform sample of this stream and another can be when these rows of ``seen`` are left."""
    return MERGE_LIMIT if rows.size == seen else rows.size


def _shared_out(
    one: tuple[Ids, int], other: tuple[Ids, int], total: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """Return rows of two samples, each with the number it was drawn from, that sample the union uniformly."""
    (ours, seen), (theirs, others_seen) = one, other
    k = int(generator.hypergeometric(seen, others_seen, total))
    return _drawn(ours, k, generator), _drawn(theirs, total - k, generator)
