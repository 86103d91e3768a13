"""The rows of a replay memory: what is offered, how it is laid out, and how it is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import Ids, check_count, check_number

__all__ = [
    "EXPERIENCE_LIMIT",
    "NUMBERS",
    "Layout",
    "RowCodec",
    "RowTable",
    "check_labels",
    "check_layout",
    "checked_experience",
    "checked_rows",
    "described",
    "layout_of",
    "taken",
]

NUMBERS = {"label": np.int64, "arrival": np.int64, "experience": np.int32, "origin": np.int32}
EXPERIENCE_LIMIT = 2**31 - 1  # kept in 4 bytes

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of a row's tensors by name, as they are given and given back."""


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a batch of rows."""
    return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}


def described(layout: Layout) -> str:
    """Return a layout in words."""
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in layout.items())


def check_layout(layout: Layout, fixed: Layout) -> None:
    """Refuse rows of another layout than that of the first batch."""
    if layout != fixed:
        raise BatchError(
            f"the first batch fixed the rows to {described(fixed)}, got {described(layout)}; nothing was changed"
        )


def checked_rows(data: Tensor, label: Tensor, extras: Mapping[str, Tensor]) -> tuple[Ids, dict[str, Tensor]]:
    """Return the labels on the host, and all tensors by name; refuse what has not one row for each sample."""
    tensors = {"data": data, **extras}
    for name, tensor in tensors.items():
        if name in NUMBERS:
            raise BatchError(f"{name} is the name of a number that the memory keeps itself; call the tensor otherwise")
        if not isinstance(tensor, Tensor):
            raise BatchError(f"{name} must be a tensor with one row per sample, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise BatchError(f"{name} must be a plain dense tensor; call to_dense() on a sparse one")
        if tensor.ndim == 0 or len(tensor) != len(data):
            raise BatchError(f"{name} must have one row per sample of data, got shape {tuple(tensor.shape)}")
    return _host_integers("label", label, len(data)), tensors


def checked_experience(experience: int | Tensor, rows: int) -> int | Ids:
    """Return the number of all rows, or one for each; refuse others than whole numbers up to 2**31 - 1."""
    numbers: int | Ids
    if isinstance(experience, Tensor):
        numbers = _host_integers("experience", experience, rows)
        largest = numbers.max(initial=0)
    else:
        largest = check_count("experience", experience, at_least=0)
        numbers = largest
    if largest > EXPERIENCE_LIMIT:
        raise BatchError(f"experience must be at most {EXPERIENCE_LIMIT}, got {largest}")
    return numbers


def _host_integers(name: str, values: Tensor, rows: int) -> Ids:
    if not isinstance(values, Tensor):
        raise BatchError(f"{name} must be a tensor of {rows} integers, got {type(values).__name__}")
    check_labels(name, values, rows)
    numbers: Ids = values.detach().to("cpu", torch.int64).numpy()
    if numbers.size and numbers.min() < 0:
        raise BatchError(
            f"{name} must not be negative, got {numbers.min()} in row {numbers.argmin()}; leave unlabelled rows out"
        )
    return numbers


def check_labels(name: str, labels: Tensor, rows: int, *, below: int | None = None) -> None:
    """Refuse what is no vector of so many integers, from 0 if there is a limit to them."""
    if labels.dtype == torch.bool or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise BatchError(f"{name} must be integers, got {labels.dtype}; call .long() if they are whole numbers")
    if labels.shape != (rows,):
        raise BatchError(f"{name} must have shape ({rows},), got {tuple(labels.shape)}")
    if below is not None and labels.device.type == "cpu" and rows:  # elsewhere the question would cost a wait
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= below:
            raise BatchError(
                f"{name} must be class ids from 0 to {below - 1}, as the head has {below} outputs, "
                f"got {low if low < 0 else high}; make the head as wide as the number of classes"
            )


class RowTable:
    """The rows themselves: tensors on the device, numbers on the host, with room for ``capacity`` rows."""

    def __init__(self, layout: Layout, stored: torch.dtype, capacity: int, device: torch.device) -> None:
        self.layout = layout
        self.stored = stored
        self.capacity = capacity
        self.size = 0
        self.counts: dict[int, int] | None = None  # rows by class, where somebody keeps count
        self.tensors = {
            name: torch.empty((capacity, *shape), dtype=stored if name == "data" else dtype, device=device)
            for name, (shape, dtype) in layout.items()
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

    def put(self, slots: Ids, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write rows to distinct slots; each number is one for all rows, or an array of one for each."""
        at = torch.from_numpy(slots)
        for name, own in self.tensors.items():
            own.index_copy_(0, at.to(own.device), tensors[name].to(own.device))
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
        table = RowTable(self.layout, self.stored, capacity, self.tensors["data"].device)
        table.append(self, rows)
        return table


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

    def stored_dtype(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in memory of such rows; refuse what cannot be stored so."""
        if self.storage == "same":
            return dtype
        if self.storage == "float16":
            if not dtype.is_floating_point:
                raise BatchError(f"storage='float16' is for floating-point data, got {dtype}; use storage='same'")
            return torch.float16
        plain = (self.mean, self.std) == ((0.0,), (1.0,))
        if not dtype.is_floating_point and (dtype != torch.uint8 or not plain):
            raise BatchError(
                f"storage='uint8' is for uint8 data, or floating-point images (with mean and std if they are "
                f"normalised), got {dtype}{'' if plain else ' with mean and std'}"
            )
        if len(self.mean) > 1 and (not shape or shape[0] != len(self.mean)):
            raise BatchError(f"mean and std have {len(self.mean)} channels, a row of data has shape {shape}")
        return torch.uint8

    def normalised(self) -> Tensor:
        """Return mean and std, (2, channels) float64."""
        return torch.tensor([self.mean, self.std], dtype=torch.float64, device="cpu")

    def encode(self, data: Tensor, *, check: bool) -> Tensor:
        """Return rows as stored; ``check`` refuses what the storage would lose, and waits for the device."""
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
                    f"storage='uint8' would lose up to {error / 255:.3g} of a value in [0, 1]; give the mean and std "
                    "by which the images were normalised, or use storage='same' or 'float16'"
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
        return like.new_tensor(self.mean).reshape(shape), like.new_tensor(self.std).reshape(shape)


def _channel_values(name: str, values: float | Sequence[float] | None, otherwise: float) -> tuple[float, ...]:
    if values is None:
        return (otherwise,)
    numbers = (values,) if isinstance(values, int | float) else tuple(values)
    if not numbers:
        raise ArgumentError(f"{name} must be a number, or one per channel, got {values!r}")
    return tuple(check_number(name, number) for number in numbers)
