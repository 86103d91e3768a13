"""Rows of unit length: how every head that wants them makes them, and what becomes of a row of zeros."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from clkit.methods._checks import Batch

if TYPE_CHECKING:
    from clkit.methods.heads.base import Head

__all__ = ["unit_batch", "unit_rows"]

_EPSILON = 1e-12  # shortest length that a row is divided by


def unit_rows(rows: Tensor) -> Tensor:
    r"""Return each row of (B, D) divided by its length, :math:`x / \max(\lVert x \rVert_2, 10^{-12})`; zeros stay zero.

    Example:
        >>> import torch
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return normalize(rows, dim=-1, eps=_EPSILON)


def unit_batch(batch: Batch, head: Head, stacklevel: int) -> Tensor:
    """Return the rows of a batch at unit length, and say once for a head, on a CPU, that some are zero.

    A row of zeros has no direction: it stays zero and counts as a sample of its class.
    """
    lengths = vector_norm(batch.features, dim=1, keepdim=True)
    if batch.on_host and not head._said_zeros and not lengths.numpy().all():
        head._said_zeros = True
        warnings.warn(
            f"{int((lengths == 0).sum())} feature vectors of a batch are zero and have no direction: they stay "
            f"zero and count as samples of their class (said once)",
            stacklevel=stacklevel,
        )
    rows: Tensor = batch.features / lengths.clamp(min=_EPSILON)
    return rows
