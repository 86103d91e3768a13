"""Arguments of the metric functions: what they may be, and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from clkit.errors import ArgumentError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Array", "as_counts", "as_matrix", "as_vector", "plain", "ratio", "widen"]

Array: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[Any]"


def as_counts(correct: Array, total: Array) -> tuple[Tensor, Tensor]:
    """Return two tables of counts as int64 tensors, or raise what is wrong with them."""
    hits, samples = torch.as_tensor(correct).cpu(), torch.as_tensor(total).cpu()
    if hits.ndim != 2 or hits.shape != samples.shape:
        raise ArgumentError(
            f"correct has shape {tuple(hits.shape)} and total {tuple(samples.shape)}: both must be (stages, columns)"
        )
    if hits.numel() and (hits.is_floating_point() or samples.is_floating_point()):
        raise ArgumentError(f"correct is {hits.dtype} and total {samples.dtype}: both must count, so give integers")
    hits, samples = hits.long(), samples.long()
    wrong = (hits < 0) | (hits > samples)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ArgumentError(
            f"correct[{row}, {column}] is {int(hits[row, column])} of total {int(samples[row, column])}:"
            " 0 <= correct <= total must hold"
        )
    return hits, samples


def as_matrix(name: str, values: Array) -> Tensor:
    """Return an accuracy matrix as float64, with a column for each stage."""
    table = torch.as_tensor(values, dtype=torch.float64).cpu()
    if table.ndim != 2:
        raise ArgumentError(f"{name} has shape {tuple(table.shape)}: it must be (stages, experiences)")
    return widen(table)


def as_vector(name: str, values: Array) -> Tensor:
    """Return a row of numbers as float64."""
    row = torch.as_tensor(values, dtype=torch.float64).cpu()
    if row.ndim != 1:
        raise ArgumentError(f"{name} has shape {tuple(row.shape)}: it must be one-dimensional")
    return row


def ratio(correct: Tensor, total: Tensor) -> Tensor:
    """Divide; 0 / 0 is NaN in IEEE arithmetic, which is what "not evaluated" means here."""
    return correct.double() / total.double()


def widen(table: Tensor) -> Tensor:
    """Add the columns that ``T`` stages must have, as not evaluated; a single column is one fixed test set."""
    stages, experiences = table.shape
    if experiences == 1 or experiences >= stages:
        return table
    filler = math.nan if table.is_floating_point() else 0
    return torch.cat([table, table.new_full((stages, stages - experiences), filler)], dim=1)


def plain(values: Tensor) -> list[Any]:
    """Return nested lists with ``None`` for ``NaN``; no loop, for the matrix of a long stream has millions of cells."""
    entries = values.numpy().astype(object)
    entries[values.isnan().numpy()] = None
    nested: list[Any] = entries.tolist()
    return nested
