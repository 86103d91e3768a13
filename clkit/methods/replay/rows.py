"""The rows of a replay memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import Ids, check_number

__all__ = ["EXPERIENCE_LIMIT", "NUMBERS", "RowCodec", "RowLayout", "RowTable", "host_tensor", "taken"]

NUMBERS = {"label": np.int64, "arrival": np.int64, "experience": np.int32, "origin": np.int32}
EXPERIENCE_LIMIT = 2**31 - 1  # kept in 4 bytes


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

    def check_equal(self, fixed: RowLayout, *names: str) -> None:
        """Refuse rows of another layout than the one that the first batch fixed, in all tensors or in some."""
        kinds = (fixed, self) if not names else (fixed.only(*names), self.only(*names))
        if kinds[0] != kinds[1]:
            raise BatchError(f"the first batch fixed the rows to {kinds[0]}, got {kinds[1]}; nothing was changed")

    def only(self, *names: str) -> RowLayout:
        """Return the layout of some of the tensors."""
        part = RowLayout.__new__(RowLayout)
        part.shapes = {name: self.shapes[name] for name in names}
        part.dtypes = {name: self.dtypes[name] for name in names}
        return part

    def row_bytes(self, stored: torch.dtype) -> int:
        """Return the bytes of one row's tensors with ``data`` in dtype ``stored``."""
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
        """Return the numbers of that name, (size,); not a copy."""
        return self.numbers[name][: self.size]

    def class_counts(self) -> dict[int, int]:
        """Return the rows in memory by class id."""
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
        """Return a table of that capacity with these rows of this one."""
        device = self.tensors["data"].device
        table = RowTable(self.layout, self.stored, capacity, device)
        table.append(self, rows)
        return table


def host_tensor(values: int | list[int]) -> Tensor:
    """Return an int64 tensor on the host."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def taken(tensor: Tensor, rows: Ids) -> Tensor:
    """Return rows of a tensor, on its own device."""
    return tensor.index_select(0, torch.from_numpy(rows).to(tensor.device))


_UINT8_TOLERANCE = 1e-3  # in steps of 1/255; float32 arithmetic is within 1e-4 of a whole step


class RowCodec:
    """How ``data`` is written to memory and read from it."""

    def __init__(self, storage: str, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> None:
        if storage != "uint8" and not (mean is None and std is None):
            raise ArgumentError(f"mean and std are for storage='uint8', got storage={storage!r}")
        self.storage = storage
        means, stds = _channel_values("mean", mean, 0.0), _channel_values("std", std, 1.0)
        channels = max(len(means), len(stds))
        if {len(means), len(stds)} - {1, channels}:
            raise ArgumentError(f"mean and std must have as many channels, got {len(means)} and {len(stds)}")
        if min(stds) <= 0:
            raise ArgumentError(f"std must be positive, got {std!r}")
        self.mean = means * (channels // len(means))
        self.std = stds * (channels // len(stds))

    def stored_dtype(self, layout: RowLayout) -> torch.dtype:
        """Return the dtype in memory of such rows.

        Raises:
            BatchError: If they cannot be stored so.
        """
        dtype, shape = layout.dtypes["data"], layout.shapes["data"]
        if self.storage == "same":
            return dtype
        if self.storage == "float16":
            if not dtype.is_floating_point:
                raise BatchError(f"storage='float16' is for floating-point data, got {dtype}; use storage='same'")
            return torch.float16
        plain = (self.mean, self.std) == ((0.0,), (1.0,))
        if not dtype.is_floating_point and (dtype != torch.uint8 or not plain):
            given = "" if plain else " with mean and std"
            raise BatchError(
                f"storage='uint8' is for uint8 data, or floating-point images (with mean and std if they are "
                f"normalised), got {dtype}{given}"
            )
        if len(self.mean) > 1 and (not shape or shape[0] != len(self.mean)):
            raise BatchError(f"mean and std have {len(self.mean)} channels, a row of data has shape {shape}")
        return torch.uint8

    def normalised(self) -> Tensor:
        """Return mean and std for the saved state, (2, channels) float64."""
        return torch.tensor([self.mean, self.std], dtype=torch.float64, device="cpu")

    def encode(self, data: Tensor, *, check: bool) -> Tensor:
        """Return ``data`` as stored.

        Args:
            data: (B, …) rows.
            check: Whether to look at the values, which waits for the device.

        Raises:
            BatchError: With ``check``, if the storage would lose something.
        """
        if self.storage == "same" or data.dtype == torch.uint8:
            return data
        if self.storage == "float16":
            half = data.to(torch.float16)
            if check and bool((data.isfinite() & ~half.isfinite()).any()):
                raise BatchError(f"data up to {float(data.abs().max()):.3g} does not fit storage='float16' (65504)")
            return half
        mean, std = self._constants(data)
        steps = (data * std + mean) * 255
        whole = steps.round().clamp(0, 255)
        if check:
            error = float((steps - whole).abs().max()) if steps.numel() else 0.0
            if not error <= _UINT8_TOLERANCE:
                raise BatchError(
                    f"storage='uint8' would lose up to {error / 255:.3g} of a value in [0, 1]: the images are no "
                    f"multiples of 1/255 there; give the mean and std by which they were normalised, or use "
                    f"storage='same' or 'float16'"
                )
        return whole.to(torch.uint8)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows in the dtype that they came in."""
        if stored.dtype != torch.uint8 or dtype == torch.uint8:
            return stored.to(dtype)
        images = stored.to(dtype).div_(255)
        mean, std = self._constants(images)
        return images.sub_(mean).div_(std)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 2)) if len(self.mean) > 1 else ()
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device).reshape(shape)
            for values in (self.mean, self.std)
        )
        return mean, std


def _channel_values(name: str, values: float | Sequence[float] | None, otherwise: float) -> tuple[float, ...]:
    if values is None:
        return (otherwise,)
    numbers = (values,) if isinstance(values, int | float) else tuple(values)
    if not numbers:
        raise ArgumentError(f"{name} must be a number, or one per channel, got {values!r}")
    return tuple(check_number(name, number) for number in numbers)
