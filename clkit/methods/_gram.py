"""The one expensive product of an update: ``G += w · HᵀH``, of which only the lower triangle is kept up to date."""

from __future__ import annotations

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

__all__ = ["add_gram_", "mirrored"]

# columns of one product where no symmetric rank-k routine is used
_CPU_BLOCK = 128
_DEVICE_BLOCK = 2048


def add_gram_(lower: Tensor, rows: Tensor, weight: float = 1.0) -> Tensor:
    """Add ``weight · rowsᵀ rows`` to the lower triangle of ``lower``, in place.

    Half the work of a general product. On a CPU where torch runs one thread it is one call of BLAS ``dsyrk``, which
    works on the tensor's own memory: the transposed view of a row-major matrix is the column-major matrix that BLAS
    wants, and its upper triangle is the lower one here. Elsewhere the triangle is covered by blocks, by torch itself:
    the threads of scipy's BLAS and the waiting ones of torch would take turns on the same cores, milliseconds each.
    The other triangle is left as it is or filled with values without meaning; :func:`mirrored` gives the whole matrix.

    Args:
        lower: (D, D), contiguous; changed.
        rows: (B, D) float64 on the same device. Products are formed in float64 whatever the dtype of ``lower``.
        weight: Factor of the product, may be negative.

    Returns:
        ``lower``.

    Example:
        >>> add_gram_(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)).tril()
        tensor([[1., 0.],
                [2., 4.]], dtype=torch.float64)
    """
    if rows.shape[0] == 0:
        return lower
    on_cpu = lower.device.type == "cpu"
    if on_cpu and torch.get_num_threads() == 1 and lower.dtype == torch.float64 and lower.is_contiguous():
        dsyrk(weight, rows.contiguous().numpy().T, beta=1.0, c=lower.numpy().T, overwrite_c=1)
        return lower
    size = _CPU_BLOCK if on_cpu else _DEVICE_BLOCK
    for start in range(0, lower.shape[0], size):
        stop = start + size
        block = lower[start:stop, :stop]
        if lower.dtype == rows.dtype:
            block.addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=weight)
        else:
            block.add_((rows[:, start:stop].T @ rows[:, :stop]).mul_(weight).to(lower.dtype))
    return lower


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle is given, as a new tensor; also for a stack (k, D, D).

    Example:
        >>> mirrored(torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    return torch.tril(lower).add_(torch.tril(lower, -1).transpose(-1, -2))
