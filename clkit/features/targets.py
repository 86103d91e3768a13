"""Which targets are those of single-label classification, the one kind of task that clkit learns and evaluates."""

from __future__ import annotations

import torch
from torch import Tensor

from clkit.errors import BatchError

__all__ = ["are_class_ids", "check_targets"]


def are_class_ids(targets: Tensor) -> bool:
    """Whether targets have the form of one integer class id a sample."""
    return targets.ndim == 1 and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


def check_targets(targets: Tensor) -> None:
    """Refuse targets that are not one integer class id a sample.

    Raises:
        BatchError: If they are none; the message says what they look like, and how class ids are made of them.

    Example:
        >>> check_targets(torch.tensor([4, 7]))
        >>> check_targets(torch.tensor([[0.0, 1.0]]))
        Traceback (most recent call last):
        clkit.errors.BatchError: targets of shape (1, 2) look like several labels a sample, or one-hot ones: ...
    """
    if are_class_ids(targets):
        return
    kind, shape = str(targets.dtype).removeprefix("torch."), tuple(targets.shape)
    numbers = targets.is_floating_point() or targets.is_complex()
    whole = not numbers or bool((targets == targets.real.round()).all())
    cast, ids = ".long()" if numbers or kind == "bool" else "", ""
    if targets.ndim == 1:
        seen = f"targets of type {kind} are no class ids" + (", but may be values of a regression" if numbers else "")
        ids = f"batch[1]{cast}" if whole else ""
    elif targets.ndim == 2 and targets.shape[1] > 1:
        seen = f"targets of shape {shape} look like several labels a sample, or one-hot ones"
        ids = "batch[1].argmax(1)" if whole and bool(((targets != 0).sum(1) == 1).all()) else ""
    else:
        seen = f"targets of shape {shape} and type {kind} are not one class id a sample"
        ids = f"batch[1].flatten(){cast}" if whole and targets[:1].numel() == 1 else ""
    hint = f". If they are ids in another form, pass batch_reader=lambda batch: (batch[0], {ids})" if ids else ""
    raise BatchError(f"{seen}: clkit is for single-label classification, with targets (B,) of integer class ids{hint}")
