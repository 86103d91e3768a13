"""The rows of a replay memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.errors import BatchError

__all__ = ["EXPERIENCE_LIMIT", "NUMBERS", "Ids", "RowLayout", "RowTable", "host_tensor", "taken"]

NUMBERS = {"label": np.int64, "arrival": np.int64, "experience": np.int32, "origin": np.int32}
EXPERIENCE_LIMIT = 2**31 - 1  # kept in 4 bytes
Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class RowLayout:
    """Shape and dtype of a row's tensors, as they are given and given back."""

    def __init__(self, data: Tensor, extras: Mapping[str, Tensor]) -> None:
        tensors = {"data": data, **extras}
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowLayout) and (self.shapes, self.dtypes) == (other.shapes, other.dtypes)

    def __str__(self) -> str:
        return ", ".join(f"{name} {shape} {self.dtypes[name]}" for name, shape in self.shapes.items())

    @property
    def names(self) -> set[str]:
        """Of the tensors."""
        return set(self.shapes)

    def check_equal(self, fixed: RowLayout) -> None:
        if self != fixed:
            raise BatchError(f"the first batch fixed the rows to {fixed}, got {self}; nothing was changed")

    def row_bytes(self, stored: torch.dtype) -> int:
        """Bytes of one row's tensors with ``data`` in dtype ``stored``."""
        dtypes = {**self.dtypes, "data": stored}
        return sum(int(np.prod(shape)) * dtypes[name].itemsize for name, shape in self.shapes.items())


class RowTable:
    """The rows themselves: tensors on the device, numbers on the host, with room for ``capacity`` rows."""

    __slots__ = ("capacity", "counts", "layout", "numbers", "size", "stored", "tensors")

    def __init__(self, layout: RowLayout, stored: torch.dtype, capacity: int, device: torch.device) -> None:
        self.layout = layout
        self.stored = stored
        self.capacity = capacity
        self.size = 0
        self.counts: dict[int, int] | None = None  # rows by class, where somebody keeps count
        dtypes = {**layout.dtypes, "data": stored}
        self.tensors = {
            name: torch.empty((capacity, *shape), dtype=dtypes[name], device=device)
            for name, shape in layout.shapes.items()
        }
        self.numbers: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
            name: np.zeros(capacity, dtype=dtype) for name, dtype in NUMBERS.items()
        }

    def now(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """(size,) the numbers of that name; not a copy."""
        return self.numbers[name][: self.size]

    def class_counts(self) -> dict[int, int]:
        ids, counts = np.unique(self.now("label"), return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))

    def put(self, slots: Ids, tensors: Mapping[str, Tensor], numbers: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write rows to distinct slots."""
        for name, own in self.tensors.items():
            own.index_copy_(0, torch.from_numpy(slots).to(own.device), tensors[name].to(own.device))
        for name, values in numbers.items():
            self.numbers[name][slots] = values

    def append(self, other: RowTable, rows: Ids, origins: int = 0) -> None:
        """Add rows of another table, their origins counted on from ``origins``."""
        tensors = {name: taken(tensor, rows) for name, tensor in other.tensors.items()}
        numbers = {name: values[rows] for name, values in other.numbers.items()}
        numbers["origin"] = numbers["origin"] + origins
        self.put(np.arange(self.size, self.size + rows.size), tensors, numbers)
        self.size += rows.size

    def resized(self, capacity: int, rows: Ids) -> RowTable:
        """A table of that capacity with these rows of this one."""
        device = self.tensors["data"].device
        table = RowTable(self.layout, self.stored, capacity, device)
        table.append(self, rows)
        return table


def host_tensor(values: int | list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def taken(tensor: Tensor, rows: Ids) -> Tensor:
    return tensor.index_select(0, torch.from_numpy(rows).to(tensor.device))
