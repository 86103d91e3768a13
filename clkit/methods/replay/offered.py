"""What a memory is offered: its form is checked before anything is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clkit.errors import BatchError
from clkit.methods._checks import Ids, check_count
from clkit.methods.replay.rows import EXPERIENCE_LIMIT, NUMBERS

__all__ = ["checked_experience", "checked_rows"]


def checked_rows(data: Tensor, label: Tensor, extras: Mapping[str, Tensor]) -> tuple[Ids, dict[str, Tensor]]:
    """Return the labels on the host, and all tensors by name.

    Raises:
        BatchError: If they have not one row for each sample.
    """
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
    labels = _host_integers("label", label, len(data))
    return labels, tensors


def checked_experience(experience: int | Tensor, rows: int) -> Ids:
    """Return a number for each row.

    Raises:
        BatchError: If there are others than whole numbers up to 2**31 - 1.
    """
    if isinstance(experience, Tensor):
        numbers = _host_integers("experience", experience, rows)
        largest = numbers.max(initial=0)
    else:
        largest = check_count("experience", experience, at_least=0)
        numbers = np.full(rows, min(largest, EXPERIENCE_LIMIT))
    if largest > EXPERIENCE_LIMIT:
        raise BatchError(f"experience must be at most {EXPERIENCE_LIMIT}, got {largest}")
    return numbers


def _host_integers(name: str, values: Tensor, rows: int) -> Ids:
    if not isinstance(values, Tensor):
        raise BatchError(f"{name} must be a tensor of {rows} integers, got {type(values).__name__}")
    if values.dtype == torch.bool or values.dtype.is_floating_point or values.dtype.is_complex:
        raise BatchError(f"{name} must be integers, got {values.dtype}; call .long() if they are whole numbers")
    if values.shape != (rows,):
        raise BatchError(f"{name} must have shape ({rows},), one per row of data, got {tuple(values.shape)}")
    numbers: Ids = values.detach().to("cpu", torch.int64).numpy()
    if numbers.size and numbers.min() < 0:
        raise BatchError(
            f"{name} must not be negative, got {numbers.min()} in row {numbers.argmin()}; leave unlabelled rows out"
        )
    return numbers
