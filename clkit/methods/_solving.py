r"""How the closed-form heads solve their systems: the strength that the sums choose, and the digits that are left."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spectrum", "condition_number", "spectrum", "warn_of_lost_digits"]

# strengths that are tried, as factors of the mean eigenvalue: the choice then does not depend on the features' unit
_FACTORS = 10.0 ** (torch.arange(-160, 41, dtype=torch.float64) / 20)
_EPSILON = torch.finfo(torch.float64).eps
_CONDITION_LIMIT = 1e12  # fewer than four of float64's sixteen digits are left above it
_POWER_STEPS = 12


class Spectrum(NamedTuple):
    """A system of sums in the basis of its eigenvectors, where it is solved for any ridge strength at once.

    Source: G. Golub, M. Heath, G. Wahba, "Generalized cross-validation as a method for choosing a good ridge
    parameter", Technometrics 21, 1979.
    """

    values: Tensor  # (D,) eigenvalues of the Gram matrix, ascending, 0 where they are rounding
    vectors: Tensor  # (D, D), a column an eigenvector
    moments: Tensor  # (D, k) class sums in their basis

    def solve(self, gamma: float) -> Tensor:
        """Return the ridge weights W (D, k)."""
        return self.vectors @ (self.moments / (self.values + gamma)[:, None])

    def best_gamma(self, rows: float, square: float, spent: float = 0.0) -> tuple[float, float]:
        r"""Return the strength with the smallest :math:`n \mathrm{RSS} / (n - \mathrm{df})^2`, and that smallest.

        Of equals it is the smaller strength. Where the sums say nothing about it (no spread, or targets that are all
        equal) it is the mean eigenvalue, with NaN.

        Args:
            rows: n, rows behind the sums.
            square: Sum of the squared targets, n for one-hot ones of weight 1.
            spent: Degrees of freedom taken by what was subtracted before, 1 for a mean.
        """
        scale = float(self.values.mean())
        if scale <= 0:
            return 1.0, math.nan
        gammas = scale * _FACTORS.to(self.values.device)
        shrunk = 1 / (self.values[:, None] + gammas)  # (D, number of strengths)
        energy = self.moments.square().sum(dim=1)
        left = rows - spent - self.values @ shrunk
        residual = square - 2 * energy @ shrunk + (self.values * energy) @ shrunk.square()
        score = residual.clamp(min=1e-13 * square) / left.square()  # less of a residual is rounding
        score = torch.where(left > 1e-9 * rows, score, torch.inf)
        best = int(score.argmin())
        if square <= 0 or not bool(score[best].isfinite()):
            return scale, math.nan
        return float(gammas[best]), rows * float(score[best])


def spectrum(lower: Tensor, sums: Tensor) -> Spectrum:
    """Return the eigenvalues of a Gram matrix of which only the lower triangle counts, and sums (k, D) in their basis.

    Example:
        >>> lower = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> spectrum(lower, torch.tensor([[2.0, 5.0]], dtype=torch.float64)).solve(1.0)
        tensor([[1.],
                [1.]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(lower)  # reads the lower triangle
    values = torch.where(values > values[-1] * _EPSILON * values.numel(), values, 0.0)
    return Spectrum(values, vectors, vectors.T @ sums.T)


def condition_number(factor: Tensor) -> float:
    """Estimate the condition number of a system from its Cholesky factor (D, D).

    By the power method on the system and on its inverse: a lower bound, close to the number itself where that is
    large, at the price of a few products with a triangle. Infinite where the numbers leave float64.

    Example:
        >>> round(condition_number(torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))))
        1000000
    """
    start = torch.cos(torch.arange(1, factor.shape[0] + 1, dtype=torch.float64, device=factor.device))[:, None]
    condition = 1.0
    for inverse in (False, True):
        vector, size = start / start.norm(), start.new_zeros(())
        for _ in range(_POWER_STEPS):
            vector = torch.cholesky_solve(vector, factor) if inverse else factor @ (factor.T @ vector)
            size = vector.norm()
            vector = vector / size
        condition *= float(size)
    return condition if math.isfinite(condition) else math.inf


def warn_of_lost_digits(condition: float, what: str, advice: str) -> bool:
    """Warn if a system of this condition number cannot be solved to four digits; return whether that is so."""
    if condition <= _CONDITION_LIMIT:
        return False
    digits = max(0, math.floor(-math.log10(condition * _EPSILON))) if math.isfinite(condition) else 0
    warnings.warn(
        f"the condition number of {what} is about {condition:.1e}, which leaves {digits} of float64's 16 digits: "
        f"predictions may be wrong; {advice}",
        stacklevel=2,
    )
    return True
