"""What a part of a stream holds: which rows of which list of samples, so that none counts twice and none is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clkit.arguments import in_short
from clkit.errors import ArgumentError, StateError
from clkit.methods._checks import check_count
from clkit.schema import Instance, Many, Nested, Numbers, Table, Whole, read_state

__all__ = ["Holdings", "check_complete", "keys_of_names", "shard_bounds"]

Keys = npt.NDArray[np.int64]
Ranges = list[tuple[int, int]]

_SHOWN = 8  # of shards that a message lists
_LONGEST = 160  # letters of a name in a message

_LIST: Table = {
    "name": Instance(str),
    "digest": Instance(str),
    "total": Whole(1),
    "cut": Whole(1),
    "ranges": Numbers(("K", 2), least=0, most=2**62),
    "left_out": Many(Instance(str)),
}
_TABLE: Table = {
    "format": Whole(1, 1),
    "lists": Many(Nested(_LIST)),
    "keys": Numbers(("N",), least=0, most=2**62, ids=True),
}


def shard_bounds(total: int, index: int, of: int) -> tuple[int, int]:
    """Return the first row of a shard and the one after its last: shards are as even as can be, and in order.

    Raises:
        ArgumentError: If there is no such shard, or fewer rows than shards.

    Example:
        >>> [shard_bounds(10, index, 3) for index in range(3)]
        [(0, 3), (3, 6), (6, 10)]
    """
    check_count("total", total)
    check_count("of", of)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < of:
        raise ArgumentError(
            f"there is no shard {index}/{of}: of {of} shards the first is 0/{of}, the last {of - 1}/{of}"
        )
    if of > total:
        raise ArgumentError(f"{total} rows cannot be cut into {of} shards; cut them into {total} at most")
    return total * index // of, total * (index + 1) // of


def keys_of_names(names: Iterable[str]) -> Keys:
    """Return a 62-bit key of each name, in their order: what tells samples apart wherever they lie.

    Example:
        >>> keys_of_names(["crow/1.jpg", "jay/1.jpg"])
        array([207350677921520957, 386961039294324029])
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(2)).astype(np.int64)  # differences fit into 64 bits


@dataclass(frozen=True)
class _Rows:
    """Rows of one list that parts have seen to."""

    name: str
    digest: str
    total: int
    cut: int = 1  # into how many shards it was cut, 1 where that is not known
    ranges: Ranges = field(default_factory=list)  # sorted, disjoint, not adjacent
    left_out: list[str] = field(default_factory=list)  # names of rows that could not be read

    def missing(self) -> Ranges:
        """Return the rows that no part has."""
        edges = [0, *(edge for bounds in self.ranges for edge in bounds), self.total]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def named(self, ranges: Ranges) -> list[str]:
        """Return what a person calls some rows, the first few: shards where they were cut so, else numbers of rows."""
        found: list[str] = []
        more = 0
        name = repr(self.name[:_LONGEST])
        for start, stop in ranges:
            first, last = ((row * self.cut + self.cut - 1) // self.total for row in (start, stop - 1))
            for index in range(first, last + 1):
                if len(found) == _SHOWN:
                    more += last + 1 - index
                    break
                begin, end = self.total * index // self.cut, self.total * (index + 1) // self.cut
                own = max(begin, start), min(end, stop)
                if self.cut == 1:
                    found.append(f"rows {own[0]} to {own[1] - 1} of {name}")
                    continue
                some = "" if own == (begin, end) else f" from row {own[0]} to {own[1] - 1}"
                found.append(f"shard {index}/{self.cut} of {name}{some}")
        return [*found, f"{more} more"] if more else found


class Holdings:
    """The rows that something has learned, of one list of samples or of several.

    Lists are told apart by a digest, within which rows have numbers. Where samples have names too (image files), their
    62-bit keys are kept, by which an image is known again in another list; 8 bytes each.

    Example:
        >>> part = Holdings.shard("birds", 1000, 3, 64)
        >>> part.rows
        16
        >>> part.merge(Holdings.shard("birds", 1000, 3, 64))
        Traceback (most recent call last):
        clkit.errors.ArgumentError: shard 3/64 of 'birds' is held already; its samples would count twice
    """

    def __init__(self) -> None:
        self._lists: dict[str, _Rows] = {}
        self.keys: Keys = np.empty(0, dtype=np.int64)

    @classmethod
    def shard(cls, name: str, total: int, index: int = 0, of: int = 1, *, digest: str = "") -> Holdings:
        """Return what a worker holds that learns shard ``index`` of ``of`` of a list of ``total`` rows.

        The rows are those of :func:`shard_bounds`. ``digest`` says which list it is, where lists of one name and
        length may differ.

        Raises:
            ArgumentError: If there is no such shard, or fewer rows than shards.
        """
        made = cls()
        made.add(name, total, [shard_bounds(total, index, of)], cut=of, digest=digest)
        return made

    def add(
        self,
        name: str,
        total: int,
        ranges: Ranges,
        *,
        cut: int = 1,
        digest: str = "",
        keys: Keys | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Note rows ``[start, stop)`` of a list, which must not be held, and the ``keys`` of those with names.

        Raises:
            ArgumentError: If a row is held already or given twice, or the list has no such row.
        """
        check_count("total", total)
        last = 0
        for start, stop in sorted(ranges):
            if not last <= start <= stop <= total:
                raise ArgumentError(
                    f"ranges: [{start}, {stop}) cannot be; give disjoint ranges within the {total} rows of {name!r}"
                )
            last = stop
        rows = _Rows(name, digest or f"{name}:{total}", total, cut, _united(ranges), list(left_out))
        self._check(rows, keys)
        self._take(rows, keys)

    def add_rows(self, name: str, total: int, rows: Keys, *, digest: str = "") -> None:
        """Note rows of a list by their numbers (N,), in any order, as engines have them that cut and mix blocks.

        Raises:
            ArgumentError: If a row is held already or given twice, or the list has no such row.

        Example:
            >>> part = Holdings()
            >>> part.add_rows("birds", 10, np.array([7, 2, 3, 8, 4]))
            >>> part.missing()
            ["rows 0 to 1 of 'birds'", "rows 5 to 6 of 'birds'", "rows 9 to 9 of 'birds'"]
        """
        check_count("total", total)
        numbers = np.asarray(rows).ravel()
        whole = numbers.dtype.kind in "iu"
        if numbers.size and not (whole and numbers.min() >= 0 and numbers.max() < total):
            seen = f"{numbers.min()} to {numbers.max()}" if whole else f"{numbers.dtype}, {in_short(numbers[0])} first"
            raise ArgumentError(f"rows must be integers from 0 to {total - 1}, the last of {name!r}, got {seen}")
        numbers = np.sort(numbers)
        if (twice := numbers[1:][numbers[1:] == numbers[:-1]]).size:
            raise ArgumentError(f"row {twice[0]} of {name!r} is given twice; its sample would count twice")
        numbers = numbers.astype(np.int64)
        starts = numbers[np.diff(numbers, prepend=-2) != 1]
        stops = numbers[np.diff(numbers, append=total + 1) != 1] + 1
        self.add(name, total, list(zip(starts.tolist(), stops.tolist(), strict=True)), digest=digest)

    def merge(self, other: Holdings) -> None:
        """Add what another part holds.

        Raises:
            ArgumentError: If both hold a row; the message names it. Nothing is changed then.
        """
        for rows in other._lists.values():
            self._check(rows, other.keys)
        for rows in other._lists.values():
            self._take(rows, None)
        self._take_keys(other.keys)

    def held(self, digest: str) -> Ranges:
        """Return the ranges ``[start, stop)`` of rows of a list that are held, sorted."""
        return list(self._lists[digest].ranges) if digest in self._lists else []

    def repaired(self, names: Sequence[str]) -> None:
        """Note of rows which could not be read that they were learned after all, or are named anew."""
        found = set(names)
        for digest, rows in self._lists.items():
            self._lists[digest] = replace(rows, left_out=[name for name in rows.left_out if name not in found])

    def forget(self, keys: Keys) -> None:
        """Let go of samples by their keys, so that they may be learned again."""
        self.keys = np.setdiff1d(self.keys, keys)

    def missing(self) -> list[str]:
        """Return what is missing of the lists that are held in part, in words, the first few."""
        words = [word for rows in self._lists.values() for word in rows.named(rows.missing())]
        return words if len(words) <= _SHOWN + 1 else [*words[:_SHOWN], "and more"]

    @property
    def rows(self) -> int:
        """How many rows of lists are held, with those that could not be read."""
        return sum(stop - start for rows in self._lists.values() for start, stop in rows.ranges)

    @property
    def names(self) -> list[str]:
        """Names of the lists."""
        return [rows.name for rows in self._lists.values()]

    @property
    def left_out(self) -> list[str]:
        """Names of the rows that could not be read."""
        return list(dict.fromkeys(name for rows in self._lists.values() for name in rows.left_out))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        lists = [
            {**vars(rows), "ranges": torch.tensor(rows.ranges, dtype=torch.int64).reshape(-1, 2)}
            for rows in self._lists.values()
        ]
        return {"format": 1, "lists": lists, "keys": torch.from_numpy(self.keys.copy())}

    @classmethod
    def of_state(cls, state: Any, owner: str) -> Holdings:
        """Return what :meth:`state_dict` gave.

        Raises:
            StateError: If the state does not fit.
        """
        saved = read_state(state, _TABLE, owner)
        made = cls()
        for entry in saved["lists"]:
            ranges = [(int(start), int(stop)) for start, stop in entry["ranges"].tolist()]
            edges = [edge for bounds in ranges for edge in bounds]
            fits = edges == sorted(edges) and edges[-1:] <= [entry["total"]] and entry["cut"] <= entry["total"]
            if not fits or entry["digest"] in made._lists:
                raise StateError(f"{owner}: the rows of {entry['name'][:60]!r} are in no order; the file is damaged")
            made._lists[entry["digest"]] = _Rows(**{**entry, "ranges": _united(ranges)})
        made.keys = saved["keys"].numpy().copy()
        return made

    def _check(self, rows: _Rows, keys: Keys | None) -> None:
        mine = self._lists.get(rows.digest)
        if mine is not None and (twice := _common(mine.ranges, rows.ranges)):
            raise ArgumentError(f"{', '.join(rows.named(twice))} is held already; its samples would count twice")
        if keys is not None and (common := len(np.intersect1d(self.keys, keys))):
            names = ", ".join(repr(name[:_LONGEST]) for name in self.names[:_SHOWN])
            raise ArgumentError(
                f"{common} images of {rows.name[:_LONGEST]!r} are held already, in their classes and as they are (in "
                f"{names}); they would count twice"
            )

    def _take(self, rows: _Rows, keys: Keys | None) -> None:
        mine = self._lists.get(rows.digest)
        if mine is not None:
            rows = replace(
                mine,
                cut=mine.cut if mine.cut == rows.cut else 1,
                ranges=_united([*mine.ranges, *rows.ranges]),
                left_out=[*mine.left_out, *rows.left_out],
            )
        self._lists[rows.digest] = rows
        self._take_keys(keys)

    def _take_keys(self, keys: Keys | None) -> None:
        if keys is not None and keys.size:
            self.keys = np.union1d(self.keys, keys)


def check_complete(holds: Holdings, partial: bool, way: str = "partial=True") -> None:
    """Refuse holdings of which rows are missing.

    Raises:
        ArgumentError: Naming the missing shards; ``way`` says how to do without them.
    """
    missing = holds.missing()
    if missing and not partial:
        are = "is" if len(missing) == 1 else "are"
        raise ArgumentError(f"{', '.join(missing)} {are} missing; give the part that holds it, or {way}")


def _united(ranges: Ranges) -> Ranges:
    """Return ranges sorted, with those joined that touch."""
    found: Ranges = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def _common(ones: Ranges, others: Ranges) -> Ranges:
    """Return the rows that are in both of two sorted lists of ranges."""
    found: Ranges = []
    at = place = 0
    while at < len(ones) and place < len(others):
        start, stop = max(ones[at][0], others[place][0]), min(ones[at][1], others[place][1])
        if start < stop:
            found.append((start, stop))
        if ones[at][1] < others[place][1]:
            at += 1
        else:
            place += 1
    return found
