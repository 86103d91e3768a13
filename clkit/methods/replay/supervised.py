"""Supervised contrastive loss: images of one class attract each other, all others are pushed away."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.errors import BatchError
from clkit.methods._checks import check_number

__all__ = ["supervised_contrast"]


def supervised_contrast(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Mean over all 2n rows of the mean cost of finding each row of the same class among all others.

    With :math:`z` the rows of both views and :math:`P(i)` the other rows with the label of row i:

    .. math::
        L = \frac{1}{2n} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \neq i} \exp(z_i \cdot z_a / \tau)}

    Computed in float32 with autocast off, or in float64.

    Args:
        first: (n, p) unit rows, the embeddings of n images.
        second: (n, p) unit rows, another view of the same images.
        labels: (n,) integer class ids, any values.
        temperature: :math:`\tau`.

    Returns:
        Scalar; 0 with a graph for no rows.

    Raises:
        ArgumentError: If the temperature is not positive.
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> rows = torch.eye(2)
        >>> round(float(supervised_contrast(rows, rows, torch.tensor([0, 1]), temperature=1.0)), 4)
        0.5514

    Source: P. Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2; in replay learning: Z. Mai et
    al., "Supervised Contrastive Replay", CVPR Workshops 2021.
    """
    check_number("temperature", temperature, above=0)
    if first.ndim != 2 or first.shape != second.shape or labels.shape != (len(first),):
        raise BatchError(
            f"first and second must have one shape (n, p) and labels the shape (n,), got {tuple(first.shape)}, "
            f"{tuple(second.shape)} and {tuple(labels.shape)}"
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise BatchError(f"first and second must be floating-point numbers, got {first.dtype} and {second.dtype}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise BatchError(f"labels must be integer class ids, got {labels.dtype}; call .long() on whole numbers")
    with torch.autocast(first.device.type, enabled=False):
        rows = torch.cat([first, second])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not len(rows):
            return rows.sum()
        ids = labels.repeat(2)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        same = (ids[:, None] == ids).to(rows.device) & ~itself
        costs = -F.log_softmax((rows @ rows.T / temperature).masked_fill(itself, -torch.inf), dim=1)
        # where, not a product: the cost of a row with itself is infinite
        return (torch.where(same, costs, 0).sum(dim=1) / same.sum(dim=1)).mean()
