"""Rows of unit length: how every head that wants them makes them, and what becomes of a row of zeros."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from clkit.methods._checks import Batch

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


def unit_batch(batch: Batch, warn: bool, stacklevel: int) -> tuple[Tensor, bool]:
    """Return the rows of a batch at unit length, and whether it was said, on a CPU, that some are zero.

    A row of zeros has no direction: it stays zero and counts as a sample of its class.
    """
    lengths = vector_norm(batch.features, dim=1, keepdim=True)
    said = bool(warn and batch.on_host and not lengths.numpy().all())
    if said:
        warnings.warn(
            f"{int((lengths == 0).sum())} feature vectors of a batch are zero and have no direction: they stay "
            f"zero and count as samples of their class (said once)",
            stacklevel=stacklevel,
        )
    return batch.features / lengths.clamp(min=_EPSILON), said
