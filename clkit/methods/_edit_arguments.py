"""What a caller may say of an edit beside its images: numbers in the log, and where nothing shall be added."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import ArgumentError, did_you_mean
from clkit.methods._checks import check_number

__all__ = ["check_limits", "edit_ids", "level_outside"]


def edit_ids(ids: Any) -> list[int]:
    """Return numbers of edits, of one or of several, or raise an ArgumentError.

    Example:
        >>> edit_ids(3), edit_ids([0, 2])
        ([3], [0, 2])
    """
    several = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | Tensor) else [ids]
    for each in several:
        if not isinstance(each, int) or isinstance(each, bool):
            raise ArgumentError(
                f"edits are named by their numbers (result.id, None of a refused one), got {in_short(each)}"
            )
    return several


def level_outside() -> int:
    """Return the ``stacklevel`` by which a warning points at the line outside of this library that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "clkit":
        frame, level = frame.f_back, level + 1
    return level


def check_scale(scale: Any) -> None:
    """Raise an ArgumentError where it is not what the proposal of an edit may be multiplied by."""
    if scale not in ("smallest", "unit"):
        try:
            check_number("scale", scale, above=0)
        except ArgumentError as error:
            raise ArgumentError(
                f"scale must be 'smallest', 'unit' or a finite number above 0, got {scale!r}"
            ) from error


def check_limits(protect: Any, within: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an ArgumentError where directions or masks are not those of the edited weights, whose shapes are given."""
    for name, given in (("protect", protect), ("within", within)):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ArgumentError(f"{name} must be tensors by the names of layers, got {in_short(given)}")
        for layer, value in given.items():
            if layer not in shapes:
                near = did_you_mean(str(layer), shapes)
                raise ArgumentError(f"{name} names {layer!r}, and the edited layers are {list(shapes)}{near}")
            fits = isinstance(value, Tensor)
            if name == "within":
                fits = fits and value.dtype == torch.bool and tuple(value.shape) == shapes[layer]
                wanted = f"a bool tensor of shape {shapes[layer]}"
            else:
                width = torch.Size(shapes[layer][1:]).numel()
                fits = fits and value.is_floating_point() and value.ndim == 2 and len(value) == width
                fits = fits and bool(((value.double().norm(dim=0) - 1).abs() < 1e-3).all())
                wanted = f"columns of length 1, of shape ({width}, k), as span() gives them"
            if not fits:
                seen = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else in_short(value)
                raise ArgumentError(f"{name}[{layer!r}] must be {wanted}, got {seen}")
