"""Rows of a stream of which a bounded part is kept that depends on the set of samples, and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.distributed import exchange_device, gather_rows, report_lost_process, world_size
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import Ids
from clkit.methods._state import exact

__all__ = ["KeyedRows", "Keys", "keys_of"]

Keys = np.ndarray[tuple[int], np.dtype[np.uint64]]

_SHARE = 8  # rows are sorted in when this share of the capacity waits

_EVERY = np.uint64(2**64 - 1)
_STEP, _FIRST, _SECOND = (np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(values: Keys) -> Keys:
    """Apply splitmix64, a bijection of 64 bits; products wrap around on purpose."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: Keys = values ^ (values >> np.uint64(31))
    return mixed


def keys_of(seed: int, ids: Ids) -> Keys:
    """Return the key of each sample, which is a function of the seed and its id."""
    return _mixed(_mixed(np.array([seed], dtype=np.uint64)) ^ ids.astype(np.uint64))


class KeyedRows:
    """Of each stratum the rows with the smallest keys, as many as each stratum's equal share of the capacity.

    What is kept is a function of the set of rows that were offered: not of their order, of batches, or of how they were
    spread over several tables that are then merged. With more strata than the capacity, those with the smallest keys
    have one row each. A row that is offered again takes the place of the one before.

    Args:
        capacity: Most rows.
        seed: Of the keys.
        columns: Dtypes by name; the first column is (N, W), the others (N,).
        device: Where the columns lie.
    """

    def __init__(self, capacity: int, seed: int, columns: Mapping[str, torch.dtype], device: torch.device) -> None:
        self.capacity = capacity
        self.seed = seed
        self.device = device
        self._dtypes = dict(columns)
        self._wide = next(iter(columns))
        self.width: int | None = None  # W, known from the first rows on
        self._seen: Ids = np.empty(0, dtype=np.int64)
        self._cuts: Keys = np.empty(0, dtype=np.uint64)  # of each the largest key that may enter
        self._used = np.zeros(capacity, dtype=np.bool_)
        self._ids: Ids = np.zeros(capacity, dtype=np.int64)
        self._keys: Keys = np.zeros(capacity, dtype=np.uint64)
        self._stratum: Ids = np.zeros(capacity, dtype=np.int64)
        self._columns: dict[str, Tensor] = {}
        self._waiting: list[tuple[Ids, Ids, dict[str, Tensor]]] = []  # ids, strata and columns of rows to sort in

    def __len__(self) -> int:
        self._settle()
        return int(self._used.sum())

    @property
    def strata(self) -> Ids:
        """All strata that were ever seen, sorted."""
        self._settle()
        return self._seen

    def admits(self, ids: Ids, strata: Ids) -> Any:
        """Return which of some rows may be kept, (B,) bool; the others are certainly not."""
        if not self._seen.size:
            return np.ones(ids.size, dtype=np.bool_)
        at = np.searchsorted(self._seen, strata).clip(max=self._seen.size - 1)
        return (self._seen[at] != strata) | (keys_of(self.seed, ids) <= self._cuts[at])

    def add(self, ids: Ids, strata: Ids, columns: Mapping[str, Tensor]) -> None:
        """Offer rows; those that may be kept wait until it pays to sort them in."""
        width = columns[self._wide].shape[1]
        if self.width not in (None, width):
            raise BatchError(f"{self._wide} must have {self.width} columns as before, got {width}; nothing was changed")
        at = np.flatnonzero(self.admits(ids, strata))
        if not at.size:
            return
        self.width = width
        taken = {
            name: columns[name][torch.from_numpy(at).to(columns[name].device)].to(self.device, dtype)
            for name, dtype in self._dtypes.items()
        }
        self._waiting.append((ids[at], strata[at], taken))
        if sum(each[0].size for each in self._waiting) * _SHARE >= self.capacity:
            self._settle()

    def _settle(self) -> None:
        """Sort in the rows that wait."""
        if not self._waiting:
            return
        with exact():
            ids, strata = (np.concatenate([each[part] for each in self._waiting]) for part in (0, 1))
            columns = {name: torch.cat([each[2][name] for each in self._waiting]) for name in self._dtypes}
            self._waiting = []
            if not self._columns:
                self._columns = {name: rows.new_zeros(self.capacity, *rows.shape[1:]) for name, rows in columns.items()}
            self._seen = np.union1d(self._seen, strata)
            held, new_keys = np.flatnonzero(self._used), keys_of(self.seed, ids)
            chosen = self._smallest(
                np.concatenate([self._keys[held], new_keys]), np.concatenate([self._stratum[held], strata])
            )
            new = chosen[chosen >= held.size] - held.size
            self._used[:] = False
            self._used[held[chosen[chosen < held.size]]] = True
            free = np.flatnonzero(~self._used)[: new.size]
            self._used[free] = True
            self._ids[free], self._stratum[free], self._keys[free] = ids[new], strata[new], new_keys[new]
            slots, at = (torch.from_numpy(each).to(self.device) for each in (free, new))
            for name, own in self._columns.items():
                own.index_copy_(0, slots, columns[name][at])
            self._set_cuts()

    def _smallest(self, keys: Keys, strata: Ids) -> Ids:
        """Return the positions of the rows that are kept; of several with one key the last."""
        if not keys.size:
            return np.empty(0, dtype=np.int64)
        order = np.lexsort((keys, strata))  # is stable
        keys_in_order, of = keys[order], strata[order]
        last = np.append((keys_in_order[1:] != keys_in_order[:-1]) | (of[1:] != of[:-1]), True)
        order = order[last]
        rank = np.arange(order.size) - np.searchsorted(strata[order], strata[order])
        chosen: Ids
        if self._seen.size <= self.capacity:
            chosen = order[rank < self.capacity // self._seen.size]
        else:
            first = order[rank == 0]
            chosen = first[keys[first].argsort()[: self.capacity]]
        return chosen

    def _set_cuts(self) -> None:
        """Say up to which key a row may enter; rows in a stratum that is not full always may."""
        if not self._seen.size:
            return
        used = np.flatnonzero(self._used)
        at = np.searchsorted(self._seen, self._stratum[used])
        largest = np.zeros(self._seen.size, dtype=np.uint64)
        np.maximum.at(largest, at, self._keys[used])
        number = np.bincount(at, minlength=self._seen.size)
        if self._seen.size <= self.capacity:
            self._cuts = np.where(number < self.capacity // self._seen.size, _EVERY, largest)
        else:
            most = self._keys[used].max(initial=0) if used.size == self.capacity else _EVERY
            self._cuts = np.where(number > 0, largest, most)

    def remove(self, of: Any) -> int:
        """Take out rows, given as a mask of those that :meth:`read` gives; return how many."""
        removed = self._slots()[of]
        if removed.size:
            self._used[removed] = False
            self._set_cuts()
        return int(removed.size)

    def read(self) -> tuple[Ids, Ids, Keys, dict[str, Tensor]]:
        """Return ids, strata, keys and columns in the order of the keys, copies; columns without a width have 0."""
        slots = self._slots()
        at = torch.from_numpy(slots).to(self.device)
        columns = {
            name: self._columns[name].index_select(0, at)
            if self._columns
            else torch.zeros((0, 0) if name == self._wide else 0, dtype=dtype, device=self.device)
            for name, dtype in self._dtypes.items()
        }
        return self._ids[slots], self._stratum[slots], self._keys[slots], columns

    def _slots(self) -> Ids:
        self._settle()
        used = np.flatnonzero(self._used)
        slots: Ids = used[np.lexsort((self._stratum[used], self._keys[used]))]
        return slots

    def merge(self, other: KeyedRows) -> None:
        """Take up the rows of another table; of a row that both have, the other's."""
        if (self.capacity, self.seed) != (other.capacity, other.seed):
            raise ArgumentError(
                f"cannot merge rows kept with capacity={other.capacity}, seed={other.seed} into ones with "
                f"capacity={self.capacity}, seed={self.seed}; build both with the same arguments"
            )
        ids, strata, _, columns = other.read()
        self._absorb(other.strata, ids, strata, columns)

    def synchronize(self, group: Any, what: str) -> None:
        """Take up the rows of all processes, so that all have the same; all must call it."""
        if world_size(group) == 1:
            return
        ids, strata, _, columns = self.read()
        device = exchange_device(self.device, group)
        with report_lost_process(what):
            own = torch.tensor([ids.size, self._seen.size, self.width or 0], device=device)
            headers = torch.stack(gather_rows(own, [3] * world_size(group), what, group)).tolist()
            widths = {width for _, _, width in headers if width}
            if len(widths) > 1:
                raise BatchError(f"{self._wide} must have one width in all processes, got {sorted(widths)}")
            if not widths:
                return
            if not self.width:
                columns[self._wide] = columns[self._wide].new_zeros(0, *widths)
            sizes = [rows for rows, _, _ in headers]
            seen = gather_rows(torch.from_numpy(self._seen).to(device), [n for _, n, _ in headers], what, group)
            parts = [
                gather_rows(each.to(device).contiguous(), sizes, what, group)
                for each in (torch.from_numpy(ids), torch.from_numpy(strata), *columns.values())
            ]
        for known, part_ids, part_strata, *rows in zip(seen, *parts, strict=True):
            self._absorb(
                known.cpu().numpy(),
                part_ids.cpu().numpy(),
                part_strata.cpu().numpy(),
                dict(zip(columns, rows, strict=True)),
            )

    def _absorb(self, seen: Ids, ids: Ids, strata: Ids, columns: Mapping[str, Tensor]) -> None:
        """Take up rows of a table that has seen some strata, of which it may not have a row any more."""
        if ids.size:
            self.add(ids, strata, columns)
        self._settle()
        if np.setdiff1d(seen, self._seen).size:
            self._seen = np.union1d(self._seen, seen)
            used = np.flatnonzero(self._used)
            self._used[:] = False
            self._used[used[self._smallest(self._keys[used], self._stratum[used])]] = True
            self._set_cuts()

    def to(self, device: torch.device) -> None:
        """Move the columns."""
        self._settle()
        self._columns = {name: column.to(device) for name, column in self._columns.items()}
        self.device = device
