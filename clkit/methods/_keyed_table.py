"""What bounded tables of keyed rows share: their state, their exchange between processes, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.distributed import exchange_device, gather_rows, report_lost_process, world_size
from clkit.errors import ArgumentError, BatchError, StateError
from clkit.methods._checks import Ids, check_count, check_device
from clkit.methods._keyed_rows import KeyedRows
from clkit.methods._state import exact
from clkit.schema import Kind, Numbers, OneOf, Table, Whole, check_format, read_state

__all__ = ["KeyedTable", "integers", "matrix"]

_MOST = 2**53


class KeyedTable:
    """A table of keyed rows with its state, its exchange between processes, and a count of rows that were refused."""

    _format = 1
    _columns: Mapping[str, torch.dtype]
    _last_stratum = 2**63 - 1

    def __init__(self, capacity: int, seed: int, device: torch.device | str) -> None:
        self.capacity = check_count("capacity", capacity)
        self.seed = check_count("seed", seed, at_least=0)
        self._rows = KeyedRows(self.capacity, self.seed, self._columns, check_device(device))
        self._refused = self._refused_here = 0  # of all processes, and of this one since they last spoke

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @property
    def rejected(self) -> int:
        """Rows that were offered and could not be used."""
        return self._refused + self._refused_here

    @property
    def width(self) -> int | None:
        """Features a row, known from the first ones on."""
        return self._rows.width

    def merge(self, other: Any) -> None:
        """Take up what another one keeps, as if its rows had been offered here; of a sample in both, the other's row.

        Raises:
            ArgumentError: If the other is of another kind, capacity or seed.
            BatchError: If its rows have another width; nothing is changed in each case.
        """
        if type(other) is not type(self):
            raise ArgumentError(f"a {type(self).__name__} cannot merge a {type(other).__name__}")
        with exact():
            self._rows.merge(other._rows)
            self._refused_here += other.rejected

    def synchronize(self, group: Any = None) -> None:
        """Exchange rows between processes, so that all keep the same; a second call changes nothing.

        A collective call: every rank of ``group`` (the default one if ``None``) makes it.

        Raises:
            BatchError: On all ranks, if rows have different widths.
            ProcessLostError: If another process died meanwhile.
        """
        if world_size(group) == 1:
            return
        what = "the rows that they keep"
        with exact():
            self._rows.synchronize(group, what)
            with report_lost_process(what):
                device = exchange_device(self._rows.device, group)
                own = torch.tensor([self._refused_here], device=device)
                self._refused += int(torch.cat(gather_rows(own, [1] * world_size(group), what, group)).sum())
            self._refused_here = 0

    def forget(self, ids: Tensor) -> int:
        """Take out all rows of some samples, and return how many that were; rows that were not kept do not come back.

        Raises:
            BatchError: If the ids are no integers.
        """
        with exact():
            return self._rows.remove(np.isin(self._rows.read()[0], integers("ids", ids, None)))

    def state_dict(self) -> dict[str, Any]:
        """Return the rows in the order of their keys, and what else there is, as tensors and plain values."""
        with exact():
            ids, strata, _, columns = self._rows.read()
        return {
            "format": self._format,
            "capacity": self.capacity,
            "seed": self.seed,
            "rejected": self.rejected,
            "seen": torch.from_numpy(self._rows.strata.copy()),
            "ids": torch.from_numpy(ids),
            "strata": torch.from_numpy(strata),
            **{name: column.cpu() for name, column in columns.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            StateError: If it is of another capacity or seed, or damaged; nothing is changed then.
        """
        owner = type(self).__name__
        advice = "build it with the saved capacity and seed"
        table: Table = {
            "format": OneOf((self._format,)),
            "capacity": OneOf((self.capacity,), advice),
            "seed": OneOf((self.seed,), advice),
            "rejected": Whole(most=_MOST),
            "seen": Numbers(("S",), least=0, ids=True, most=self._last_stratum),
            "ids": Numbers(("N",), least=0),
            "strata": Numbers(("N",), least=0),
            **self._column_kinds(),
        }
        saved = read_state(check_format(state, self._format, owner), table, owner)
        rows = KeyedRows(self.capacity, self.seed, self._columns, self._rows.device)
        ids, strata, seen = (saved[name].cpu().numpy().copy() for name in ("ids", "strata", "seen"))
        with exact():
            rows._absorb(seen, ids, strata, {name: saved[name] for name in self._columns})
            same = np.array_equal(rows.strata, seen) and np.array_equal(rows.read()[0], ids)
        if not same:
            raise StateError(
                f"{owner}: {ids.size} saved rows of {seen.size} kinds are not those that capacity={self.capacity} "
                "keeps; the file is damaged"
            )
        self._rows, self._refused, self._refused_here = rows, saved["rejected"], 0

    def _column_kinds(self) -> dict[str, Kind]:
        raise NotImplementedError  # each table says what its columns are


def matrix(name: str, rows: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.dtype.is_floating_point or not rows.shape[1]:
        seen = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else in_short(rows)
        raise BatchError(f"{name} must be floating-point numbers of shape (B, K), got {seen}")
    return rows.detach()


def integers(name: str, values: Tensor, rows: int | None, *, least: int = 0) -> Ids:
    """Return a vector of integers on the host."""
    shape = "(B,)" if rows is None else f"({rows},)"
    good = isinstance(values, Tensor) and values.ndim == 1 and rows in (None, len(values))
    if not good or values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        seen = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else in_short(values)
        raise BatchError(f"{name} must be integers of shape {shape}, got {seen}")
    numbers: Ids = values.detach().to("cpu", torch.int64).numpy()
    if numbers.size and numbers.min() < least:
        raise BatchError(f"{name} must be at least {least}, got {numbers.min()} in row {numbers.argmin()}")
    return numbers
