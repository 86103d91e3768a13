"""Other views of an edited image, which shall get its label too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import BatchError
from clkit.methods._checks import generator

__all__ = ["FLIP_SHARE", "Equivalence", "equivalents_of"]

Equivalence: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""``(images (B, …), generator) -> images``: another view of each, which shall get the same label."""

FLIP_SHARE = 0.75  # of the views, which shall follow where nothing else is asked for
_VIEWS = 8  # of a function


def equivalents_of(x: Tensor, given: Tensor | Equivalence | None, seed: tuple[int, ...]) -> Tensor:
    """Return equivalents (B, k, …) of images, or raise a BatchError.

    Args:
        x: (B, …).
        given: ``None``; images (B, k, …), or (k, …) of a single one; or an :data:`Equivalence`.
        seed: Of the generator.
    """
    if given is None:
        return x[:, None][:, :0]
    if not isinstance(given, Tensor):
        if not callable(given):
            raise BatchError(f"equivalents must be images or a function (images, generator), got {in_short(given)}")
        draws = generator(*seed)
        views = [given(x.clone(), draws) for _ in range(_VIEWS)]
        if not all(isinstance(view, Tensor) and view.shape == x.shape for view in views):
            raise BatchError(f"equivalents must return images of shape {tuple(x.shape)}, got {in_short(views[0])}")
        given = torch.stack([view.to(x.device) for view in views], dim=1)
    if given.ndim == x.ndim and len(x) == 1:
        given = given[None]
    if given.shape[:1] + given.shape[2:] != x.shape:
        raise BatchError(f"equivalents must be of shape (B, k, …) to images {tuple(x.shape)}, got {tuple(given.shape)}")
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        raise BatchError("equivalents has values that are not finite; nothing was changed")
    return given
