"""What a batch and an argument must look like, asked in one place and before any state is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import ArgumentError, BatchError, first_line

__all__ = [
    "Array",
    "Batch",
    "Ids",
    "check_batch",
    "check_choice",
    "check_count",
    "check_device",
    "check_features",
    "check_finite",
    "check_number",
    "check_probability",
    "check_width",
    "class_ids",
    "derived_seed",
    "generator",
]

Array = Any
"""A numpy array or a tensor, where what is done with it is spelled alike for both."""

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
"""A vector of int64 numbers on the host: class ids, positions, counts."""

MAGNITUDE_LIMIT = 1e100  # larger values overflow float64 when they are squared and summed
UNLABELLED = -1
SMALL = 8192  # numbers in a matrix up to which BLAS has no use for threads, which would wait for those of torch
_HOSTS = ("cpu",)  # types of devices whose values can be read without waiting


@dataclass(frozen=True)
class Batch:
    """A checked batch: labelled rows only, grouped by class.

    On a CPU its arrays are those of numpy, whose small operations cost half of torch's; elsewhere they are tensors.

    Attributes:
        features: (n, D) float64 on the device of the state that will learn them.
        ids: (u,) sorted distinct class ids, on the host.
        first: (u,) index of the first row of each id.
        inverse: (n,) position in ``ids`` of each row's class.
        counts: (u,) rows to be learned of each id, int64; all 0 where the batch turned out not to be finite.
        weights: (u, 1) rows of each id, float64.
        one_hot: (u, n) float64, 1 where a row to be learned is of a class; ``None`` for a large batch on a CPU.
        finite: Whether all features are finite, a 0-d bool tensor on the device; ``None`` where that is already known.
        on_host: Whether the arrays are numpy's.
    """

    features: Tensor
    ids: Ids
    first: Array
    inverse: Array
    counts: Array
    weights: Array
    one_hot: Array | None
    finite: Tensor | None
    on_host: bool


def check_features(features: Tensor, width: int, device: torch.device) -> Tensor:
    """Return features as (B, ``width``) float64 on ``device``, with their graph; else raise a BatchError."""
    if not isinstance(features, Tensor):
        raise BatchError(f"features must be a tensor of shape (B, {width}), got {type(features).__name__}")
    if features.ndim != 2 or features.shape[1] != width:
        raise BatchError(
            f"features must have shape (B, {width}), got {tuple(features.shape)}; "
            f"a head keeps the width it was made for, so give another network's features a head of their own"
        )
    if not features.dtype.is_floating_point:
        raise BatchError(f"features must be floating-point numbers, got {features.dtype}; call .float() first")
    if features.device.type == "mps":  # has no float64: leave first, upcast then
        return features.to(device).to(torch.float64)
    return features.to(device=device, dtype=torch.float64)


def check_width(name: str, rows: Tensor, width: int) -> None:
    """Raise a BatchError for what is not floating-point numbers of shape (B, ``width``)."""
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != width or not rows.dtype.is_floating_point:
        seen = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else in_short(rows)
        raise BatchError(f"{name} must be floating-point numbers of shape (B, {width}), got {seen}")


def check_finite(features: Tensor) -> None:
    """Raise a BatchError for rows that are not finite or too large (asks the device: use it on a CPU)."""
    if features.numel() == 0:
        return
    low, high = torch.aminmax(features.detach())  # one pass, and NaN propagates into both
    if not (float(low) > -MAGNITUDE_LIMIT and float(high) < MAGNITUDE_LIMIT):
        good = (features.detach().abs() < MAGNITUDE_LIMIT).all(dim=1)
        rows = torch.nonzero(~good).flatten().tolist()
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise BatchError(
            f"features of rows {rows[:10]}{more} are not finite (or above {MAGNITUDE_LIMIT:.0e} in magnitude); "
            f"the batch was refused, nothing was changed; one such row would spoil everything learned"
        )


def check_batch(
    features: Tensor, targets: Tensor, width: int, *, below: int, limit_name: str, device: torch.device
) -> Batch:
    """Check one labelled batch and group it by class; rows with target -1 are unlabelled and left out.

    On a CPU everything is checked here; elsewhere the labels come to the host, because new classes need new rows, but
    whether all features are finite stays on the device as a flag. Class ids must be ``below`` what the argument
    ``limit_name`` says; ``device`` is that of the state. A BatchError names the rows.
    """
    rows = check_features(features, width, device).detach()
    labels = class_ids(targets, features.shape[0])
    ids, first, inverse, counts = _grouped(labels)
    if ids.size and ids[0] < UNLABELLED:
        row = int(labels.argmin())
        raise BatchError(
            f"targets must be class ids from 0, or -1 for an unlabelled row, got {labels[row]} in row {row}; a loss's "
            "ignore_index is not known here: give such rows the target -1"
        )
    if ids.size and ids[-1] >= below:
        row = int(labels.argmax())
        raise BatchError(
            f"target {labels[row]} in row {row} is not below {limit_name}={below}; "
            f"raise {limit_name} or relabel the classes to smaller ids"
        )
    finite = None
    on_host = device.type in _HOSTS
    if on_host:
        check_finite(rows)
    elif rows.numel():
        finite = (rows.abs() < MAGNITUDE_LIMIT).all()
    if ids.size and ids[0] == UNLABELLED:
        labelled = labels != UNLABELLED
        rows = rows[torch.from_numpy(labelled).to(device)]
        ids, first, inverse, counts = _grouped(labels[labelled])

    weights = counts.astype(np.float64)[:, None]
    if on_host:
        small = rows.numel() <= SMALL
        one_hot = (inverse == np.arange(ids.size)[:, None]).astype(np.float64) if small else None
        return Batch(rows, ids, first, inverse, counts, weights, one_hot, finite, on_host)

    arrays = (first, inverse, counts, weights)
    starts, at, added, divisors = [torch.from_numpy(array).to(device) for array in arrays]
    labelled_as = rows.new_zeros((ids.size, rows.shape[0])).scatter_(0, at[None, :], 1.0)
    if finite is not None:
        added, labelled_as = added * finite, labelled_as * finite
    return Batch(rows, ids, starts, at, added, divisors, labelled_as, finite, on_host)


def _grouped(labels: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Do what ``numpy.unique`` does with index, inverse and counts, at a third of its cost: every batch needs it."""
    ids = np.array(sorted(set(labels.tolist())), dtype=np.int64)
    inverse = ids.searchsorted(labels)
    first = np.empty_like(ids)
    first[inverse[::-1]] = np.arange(labels.size - 1, -1, -1)  # of several rows of a class the last one written stays
    return ids, first, inverse, np.bincount(inverse, minlength=ids.size)


def class_ids(targets: Tensor, rows: int) -> Ids:
    """Return integer class ids, one for each of some rows, on the host; else raise a BatchError."""
    if not isinstance(targets, Tensor):
        raise BatchError(f"targets must be a tensor of {rows} class ids, got {type(targets).__name__}")
    if targets.dtype == torch.bool or targets.dtype.is_floating_point or targets.dtype.is_complex:
        raise BatchError(
            f"targets must be integer class ids, got {targets.dtype}; call .long() if they are whole numbers"
        )
    if targets.shape != (rows,):
        raise BatchError(f"targets must have shape ({rows},), one per row of features, got {tuple(targets.shape)}")
    labels: Ids = targets.detach().to("cpu", torch.int64).numpy()
    return labels


def check_count(name: str, value: int, *, at_least: int = 1) -> int:
    """Return an argument that must be an integer with a lower bound; else raise an ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
        size = " below 2**63" * (isinstance(value, int) and value >= 2**63)
        raise ArgumentError(f"{name} must be an integer of at least {at_least}{size}, got {in_short(value)}")
    return value


def check_device(device: torch.device | str) -> torch.device:
    """Return the device, with its number, that an argument of this name must be; else raise an ArgumentError."""
    try:
        return torch.empty(0, device=device).device
    except RuntimeError as error:  # no such device, or none here
        raise ArgumentError(f"device must be one that torch has here, got {device!r}: {first_line(error)}") from error


def check_number(name: str, value: float, *, above: float | None = None, at_least: float | None = None) -> float:
    """Return an argument that must be a finite number, as a float; else raise an ArgumentError."""
    bound = f" above {above}" if above is not None else f" of at least {at_least}" if at_least is not None else ""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (above is None or value > above) and (at_least is None or value >= at_least)
    if not good:
        raise ArgumentError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def check_probability(name: str, value: float) -> float:
    """Return an argument that must be a number from 0 to 1, as a float; else raise an ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ArgumentError(f"{name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return an argument that must be one of some strings; else raise an ArgumentError."""
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def derived_seed(seed: int, *path: int) -> int:
    """Return a seed that is a function of the numbers alone, so that no two uses share their draws.

    ``path`` tells the use from all others of the user's seed: a purpose, a class, a rank; all numbers are at least 0.
    """
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator with the :func:`derived_seed` of the numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, *path))
