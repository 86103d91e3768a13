"""The one expensive product of an update: ``G += w · HᵀH``, of which only the lower triangle is kept up to date."""

from __future__ import annotations

import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["add_gram_", "mirrored", "new_gram"]

# columns of one product where no symmetric rank-k routine is used
_CPU_BLOCK = 128
_DEVICE_BLOCK = 2048
# Rows whose distance is a whole number of pages (512 float64) all compete for the same few places of the cache: a
# product of 512 columns then takes a quarter longer, one of 2048 several times as long. Some columns more prevent it.
_PAGE = 512
_EXTRA = 8


def new_gram(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros (width, width) for :func:`add_gram_`; on a CPU, for some widths, a corner of a larger matrix.

    Example:
        >>> new_gram(512, torch.float64, torch.device("cpu")).stride()
        (520, 1)
    """
    side = width + _EXTRA if device.type == "cpu" and width % _PAGE == 0 else width
    return torch.zeros(side, side, dtype=dtype, device=device)[:width, :width]


def add_gram_(lower: Tensor, rows: Tensor, weight: float = 1.0) -> Tensor:
    """Add ``weight · rowsᵀ rows`` to the lower triangle of ``lower``, in place; return ``lower``.

    Half the work of a product. On a CPU where torch runs one thread it is one call of BLAS ``dsyrk``, which works on
    the tensor's own memory: the transposed view of a row-major matrix is the column-major matrix that BLAS wants, and
    its upper triangle is the lower one here. Elsewhere the triangle is covered by blocks, by torch itself: the threads
    of scipy's BLAS and the waiting ones of torch would take turns on the same cores, milliseconds each. The other
    triangle is left as it is or filled with values without meaning; :func:`mirrored` gives the whole matrix.
    Rows are (B, D) float64, as are the products, whatever the dtype of ``lower`` (D, D).
    """
    if rows.shape[0] == 0:
        return lower
    on_cpu = lower.device.type == "cpu"
    if on_cpu and torch.get_num_threads() == 1 and lower.dtype == torch.float64:
        whole, values, side = None, rows, lower.shape[0] + _EXTRA
        if lower.is_contiguous():
            whole = lower
        elif lower.stride() == (side, 1) and lower.untyped_storage().nbytes() == side * side * lower.element_size():
            whole = lower.as_strided((side, side), (side, 1), 0)
            values = pad(rows, (0, _EXTRA))  # zeros for the columns that nobody reads
        if whole is not None:
            dsyrk(weight, values.contiguous().numpy().T, beta=1.0, c=whole.numpy().T, overwrite_c=1)
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
    """Return a new tensor, the symmetric matrix whose lower triangle is given; also for a stack (k, D, D).

    Example:
        >>> mirrored(torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    return torch.tril(lower).add_(torch.tril(lower, -1).transpose(-1, -2))
