"""Which rows of a stream a memory keeps: a uniform sample, or one that is balanced over classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from clkit.methods._checks import Ids
from clkit.methods.replay.rows import RowTable

__all__ = ["balanced_slots", "uniform_slots"]

_Draws = np.ndarray[Any, np.dtype[np.float64]]


def uniform_slots(table: RowTable, drawn: _Draws, seen: int) -> tuple[Ids, Ids]:
    """Return sorted distinct slots to be written, and the row of the batch for each; sets the size of the table.

    Args:
        table: What is kept.
        drawn: (B,) a number in [0, 1) for each row of the batch.
        seen: Rows seen before.
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


def balanced_slots(table: RowTable, drawn: _Draws, labels: Ids, class_seen: Counter[int]) -> tuple[Ids, Ids]:
    """Return the same for classes of equal shares, as far as they have that many rows.

    Args:
        table: What is kept.
        drawn: (B,) a number in [0, 1) for each row of the batch.
        labels: (B,) class ids.
        class_seen: Rows of each class seen before.
    """
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
