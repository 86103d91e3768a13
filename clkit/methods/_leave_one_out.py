r"""What learned rows would score had they never been learned: the algebra of leaving one row out, in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clkit.errors import BatchError
from clkit.methods._checks import class_ids

__all__ = [
    "class_positions",
    "left_out_distances",
    "left_out_means",
    "left_out_ridge_scores",
    "squared_distances",
    "what_is_left",
]

# Less of a pivot than this is left when a row goes: of the sixteen digits fewer than six are left then.
_LEAST_LEFT = 1e-10


def class_positions(classes: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Return the (B,) positions of the classes of learned rows in the sorted ids (k,) of what was learned.

    Raises:
        BatchError: If targets are no (B,) integers, or a class was not learned.

    Example:
        >>> class_positions(torch.tensor([3, 7]), torch.tensor([7, 7, 3]), 3)
        tensor([1, 1, 0])
    """
    labels, known = class_ids(targets, rows), classes.cpu().numpy()
    strangers = np.flatnonzero(~np.isin(labels, known))
    if strangers.size:
        row = int(strangers[0])
        raise BatchError(
            f"target {labels[row]} in row {row} is no class that was learned: give rows that are in the sums, with the "
            "class that each was learned as"
        )
    return torch.from_numpy(known.searchsorted(labels)).to(classes.device)


def what_is_left(taken: Tensor) -> Tensor:
    """Return ``1 - taken`` (B,), by which what a row took is divided when it goes.

    Raises:
        BatchError: If it is not above 0 by more than rounding.

    Example:
        >>> what_is_left(torch.tensor([0.25], dtype=torch.float64))
        tensor([0.7500], dtype=torch.float64)
    """
    left = 1 - taken
    if bool((left < _LEAST_LEFT).any()):
        row = int(left.argmin())
        raise BatchError(
            f"row {row} cannot be left out: its leverage is {float(taken[row]):.10g}, and that of a row that is in the "
            "sums is below 1. Either it is not in the sums, or without it nothing is known of its direction: raise "
            "gamma or shrinkage"
        )
    return left


def left_out_ridge_scores(scores: Tensor, leverage: Tensor, at: Tensor) -> Tensor:
    r"""Return the scores of ridge regression on one-hot targets without each row: :math:`(z - v \, e_y) / (1 - v)`.

    Args:
        scores: (B, k) z, with the rows; used up.
        leverage: (B,) v, of the same sums.
        at: (B,) position of each row's class.

    Example:
        >>> scores = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        >>> left_out_ridge_scores(scores, torch.tensor([0.5], dtype=torch.float64), torch.tensor([1]))
        tensor([[1., 0.]], dtype=torch.float64)

    Source: R. D. Cook, S. Weisberg, "Residuals and Influence in Regression", 1982 (deletion of a case).
    """
    left = what_is_left(leverage)
    scores[torch.arange(len(at), device=at.device), at] -= leverage
    return scores / left[:, None]


def left_out_means(rows: Tensor, means: Tensor, counts: Tensor, at: Tensor) -> Tensor:
    r"""Return the (B, D) mean of each row's class without the row, :math:`\mu + (\mu - r) / (n - 1)`.

    A class of one row keeps its mean: the caller masks it.

    Args:
        rows: (B, D) r, as they were averaged.
        means: (k, D) with the rows.
        counts: (k,) rows of each class.
        at: (B,) position of each row's class.

    Example:
        >>> left_out_means(torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([3]), torch.tensor([0]))
        tensor([[1.]])
    """
    own = means[at]
    return own + (own - rows) / (counts[at, None] - 1).clamp(min=1)


def left_out_distances(
    white: Tensor, white_means: Tensor, counts: Tensor, at: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    r"""Return squared Mahalanobis distances to all means with each row out of its own mean and out of the covariance.

    The covariance S is the sum of :math:`w (x - \mu)(x - \mu)^\top` over all rows and a part that stays. With
    :math:`d = h - \mu_y`, :math:`q_c = (h - \mu_c)^\top S^{-1} d`, :math:`s = q_y`, :math:`k = n_y / (n_y - 1)`:

    .. math:: t = 1 - w k s, \qquad m_c + w k \, q_c^2 / t \quad (c \neq y), \qquad k^2 s / t \quad (c = y)

    Args:
        white: (B, D) float64 rows h, whitened by the Cholesky factor of S.
        white_means: (k, D) means, whitened alike.
        counts: (k,) rows of each class.
        at: (B,) position of each row's class.
        weight: w, what a row weighs in S.

    Returns:
        The distances (B, k), infinite for a class of which no row is left, and t (B,), the share of the determinant
        of S that is left.

    Example:
        >>> white, means = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[1.0, 0.0], [1.0, 4.0]]).double()
        >>> left_out_distances(white, means, torch.tensor([2, 2]), torch.tensor([0]), 0.25)
        (tensor([[ 8., 18.]], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    rows, counted = torch.arange(len(at), device=at.device), counts[at].to(torch.float64)
    own = white - white_means[at]
    growth = counted / (counted - 1).clamp(min=1)  # a class of one row has no scatter, and d is zero
    size = own.square().sum(dim=1)
    left = what_is_left(weight * growth * size)
    distances = squared_distances(white, white_means)
    products = (own * white).sum(dim=1, keepdim=True) - own @ white_means.T
    distances += (weight * growth / left)[:, None] * products.square()
    distances[rows, at] = torch.where(counted > 1, growth.square() * size / left, torch.inf)
    return distances, left


def squared_distances(rows: Tensor, others: Tensor, squares: Tensor | None = None) -> Tensor:
    """Return the (B, k) squared Euclidean distances by one product; rounding cannot make one negative.

    ``squares`` (k,) are the squared lengths of the others, where they are known.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [0.0, 3.0]]))
        tensor([[25.,  0.]])
    """
    squares = others.square().sum(dim=1) if squares is None else squares
    own = rows.square().sum(dim=1, keepdim=True)
    return torch.addmm(squares, rows, others.T, alpha=-2).add_(own).clamp_(min=0)
