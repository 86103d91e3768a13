r"""Log-densities estimated from rows that are kept: a Gaussian kernel at each, and a mixture of Gaussians."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

__all__ = ["kernel_bandwidth", "kernel_log_density", "mixture_log_density"]

_FLOOR = 1e-3  # of a component's variances, relative to that of all rows: components of few rows have none


def kernel_bandwidth(rows: Tensor) -> float:
    r"""Return Scott's bandwidth :math:`\sigma M^{-1/(D+4)}` of rows (M, D), σ² their mean variance; 1 without spread.

    Example:
        >>> kernel_bandwidth(torch.tensor([[-1.0], [1.0]]).double()) == 2 ** (-1 / 5)
        True
    """
    spread = float(rows.var(dim=0, correction=0).mean()) if len(rows) else 0.0
    return math.sqrt(spread) * len(rows) ** (-1 / (rows.shape[1] + 4)) if spread > 0 else 1.0


def kernel_log_density(squared: Tensor, bandwidth: float, width: int) -> Tensor:
    """Return the (B,) log-density of rows whose squared distances (B, M) to the kernels are given.

    A kernel that is to be left out has an infinite distance; a row for which none is left has density 0.

    Example:
        >>> kernel_log_density(torch.tensor([[0.0, torch.inf]]).double(), 1.0, 2)  # -log 2π
        tensor([-1.8379], dtype=torch.float64)
    """
    number = squared.isfinite().sum(dim=1).clamp(min=1).to(torch.float64)
    scale = width * math.log(bandwidth) + width / 2 * math.log(2 * math.pi)
    return (squared / (-2 * bandwidth**2)).logsumexp(dim=1) - number.log() - scale


def mixture_log_density(rows: Tensor, memory: Tensor, classes: Tensor) -> Tensor:
    """Return the (B,) log-density of rows under scikit-learn's mixture of as many Gaussians as the memory has classes.

    With diagonal covariances; a function of the memory alone, drawn with a seed of its own. Minus infinity where there
    is no memory.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if not len(memory) or not len(rows):
        return rows.new_full((len(rows),), -torch.inf)
    values = memory.cpu().numpy()
    values = np.repeat(values, 2, axis=0) if len(values) == 1 else values  # scikit-learn wants two rows
    floor = _FLOOR * float(values.var(axis=0).mean()) or 1.0
    mixture = GaussianMixture(
        len(set(classes.tolist())), covariance_type="diag", reg_covar=floor, init_params="k-means++", random_state=0
    )
    with warnings.catch_warnings():  # a density that still moves in its last digits serves as well
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(values)
    return torch.from_numpy(mixture.score_samples(rows.cpu().numpy())).to(rows.device)
