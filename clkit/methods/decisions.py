r"""From a number of uncertainty to a decision: when to abstain, and which samples to ask labels for."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import torch
from scipy.special import betaincinv
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_count, check_finite, check_number, check_probability
from clkit.methods._state import exact

__all__ = ["abstention_threshold", "conformal_rank", "largest_error_rate", "query", "risk_threshold"]

_STEPS = 20  # coverages tried, 5 % apart


def conformal_rank(n: int, rate: float) -> int:
    """Return ``ceil((n + 1)(1 - rate))``, exactly for the decimal number that was written.

    The k-th smallest of n exchangeable numbers is exceeded by the next one with a probability of at most ``rate``.
    """
    return math.ceil((n + 1) * (1 - Fraction(repr(float(rate)))))


def abstention_threshold(u: Tensor, rate: float) -> float:
    """Return the uncertainty above which to abstain, so that this happens for a share of at most ``rate``.

    With n held-out values in ascending order it is the ``ceil((n + 1)(1 - rate))``-th: a new input that is
    exchangeable with them is above it with a probability of at most ``rate``. A stream is not exchangeable, so measure
    the rate again as it goes on.

    Args:
        u: (n,) uncertainties of samples that the error predictor was not fitted to.
        rate: Share to abstain on, from 0 to 1.

    Returns:
        The threshold; infinite where n is too small for the rate, so that nothing is refused, and minus infinity for a
        rate of 1.

    Raises:
        ArgumentError: If the rate is not allowed.
        BatchError: If uncertainties are NaN or no vector.

    Example:
        >>> abstention_threshold(torch.arange(9.0), rate=0.2), abstention_threshold(torch.arange(10.0), rate=0.05)
        (7.0, inf)

    Source: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005 (split conformal rank).
    """
    check_probability("rate", rate)
    values = _vector("u", u).sort().values
    k = conformal_rank(len(values), rate)
    return math.inf if k > len(values) else -math.inf if k == 0 else float(values[k - 1])


def risk_threshold(u: Tensor, wrong: Tensor, risk: float, delta: float = 0.05) -> float:
    r"""Return the largest uncertainty to accept such that the error rate of what is accepted is at most ``risk``.

    With probability 1 - ``delta`` over the n held-out samples, if new ones are exchangeable with them. Thresholds at
    coverages of 5 %, 10 %, ... are tested one after the other, from the first that accepts enough samples to pass
    without an error; k errors among m accepted pass if the Clopper-Pearson upper bound, the 1 - ``delta`` quantile of
    Beta(k+1, m-k), is at most the risk. The first failure ends it, which is why no correction for many tests is needed.

    Args:
        u: (n,) uncertainties of samples that the error predictor was not fitted to.
        wrong: (n,) whether the predictor was wrong there: bool, or 0 and 1.
        risk: Error rate that is tolerated, between 0 and 1.
        delta: Probability that it is exceeded, between 0 and 1.

    Returns:
        The threshold; minus infinity, with a warning, where no coverage passes: then nothing is to be accepted.

    Raises:
        ArgumentError: If risk or delta is not allowed.
        BatchError: If uncertainties or errors are not.

    Example:
        >>> u = torch.arange(100.0)
        >>> risk_threshold(u, u >= 80, risk=0.1)
        79.0

    Source: Clopper and Pearson, 1934; fixed-sequence testing as in Angelopoulos et al., "Learn then Test", arXiv
    2110.01052.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < check_number(name, value) < 1:
            raise ArgumentError(f"{name} must be between 0 and 1, got {value}")
    values = _vector("u", u)
    errors = _vector("wrong", wrong)
    if errors.shape != values.shape or not bool(((errors == 0) | (errors == 1)).all()):
        raise BatchError(
            f"wrong must be {len(values)} truth values, one for each of u: the bound is one of a rate, so an error has "
            "to be made or not (loss='error')"
        )
    order = values.argsort()
    values, counts = values[order], errors[order].cumsum(0)
    needed = math.log(delta) / math.log1p(-risk)
    found = -math.inf
    for step in range(1, _STEPS + 1) if len(values) else ():
        threshold = values[-(-step * len(values) // _STEPS) - 1]
        accepted = int((values <= threshold).sum())
        if accepted < needed:
            continue
        if largest_error_rate(int(counts[accepted - 1]), accepted, delta) > risk:
            break
        found = float(threshold)
    if found == -math.inf:
        warnings.warn(
            f"no threshold on {len(values)} held-out samples keeps the error rate below risk={risk} with "
            f"delta={delta}: everything is to be refused. Allow more risk, or hold out more samples; without one error "
            f"{math.ceil(needed)} accepted ones are needed",
            stacklevel=2,
        )
    return found


def largest_error_rate(wrong: int, accepted: int, delta: float) -> float:
    """Return the Clopper-Pearson upper bound, with confidence 1 - delta, of an error rate that gave these counts.

    Example:
        >>> round(largest_error_rate(0, 59, 0.05), 7), largest_error_rate(3, 3, 0.05)
        (0.0495076, 1.0)
    """
    return 1.0 if wrong == accepted else float(betaincinv(wrong + 1, accepted - wrong, 1 - delta))


def query(k: int, u: Tensor, features: Tensor | None = None, diversity: float = 0.0) -> Tensor:
    r"""Return the k samples to ask labels for: the most uncertain ones, or such that are far from each other too.

    With ``diversity`` w the first is the most uncertain one, and each next one has the largest
    :math:`(1-w) \, \mathrm{rank}(u)/N + w \, d/d_{max}`, with d its distance to the nearest one chosen, and the largest
    such distance of all that are left.

    Args:
        k: At most the number of samples.
        u: (N,) uncertainties.
        features: (N, D), needed for diversity.
        diversity: w, from 0 to 1.

    Returns:
        (k,) int64 distinct indices, in the order of choice; of equal ones the lower index first.

    Raises:
        ArgumentError: If k or w is not allowed, or features are missing.
        BatchError: If uncertainties are NaN, or shapes do not fit.

    Example:
        >>> u = torch.tensor([0.9, 0.8, 0.1])
        >>> query(2, u).tolist(), query(2, u, torch.tensor([[0.0], [0.1], [5.0]]), diversity=0.6).tolist()
        ([0, 1], [0, 2])
    """
    w = check_probability("diversity", diversity)
    values = _vector("u", u)
    n = len(values)
    if check_count("k", k, at_least=0) > n:
        raise ArgumentError(f"k must be at most {n}, the number of samples, got {k}")
    by_size = values.sort(descending=True, stable=True).indices
    if w == 0 or k == 0:
        return by_size[:k].to(u.device)
    if features is None:
        raise ArgumentError(f"features are needed for diversity={w}: it is a distance between them")
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != n:
        raise BatchError(f"features must have shape ({n}, D), one row a sample")
    with exact():
        rows = features.detach().cpu().double()
        check_finite(rows)
        # equal values have the mean of their ranks
        _, at, counts = torch.unique(values, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[at] / n
        chosen = [int(by_size[0])]
        nearest = torch.full((n,), math.inf, dtype=torch.float64)
        taken = torch.zeros(n, dtype=torch.bool)
        for _ in range(k - 1):
            taken[chosen[-1]] = True
            nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).norm(dim=1))
            largest = nearest[~taken].max()
            apart = nearest / largest if largest > 0 else torch.zeros_like(nearest)
            chosen.append(int(((1 - w) * ranks + w * apart).masked_fill(taken, -1.0).argmax()))
    return torch.tensor(chosen, device=u.device)


def _vector(name: str, values: Tensor) -> Tensor:
    """Return a vector without NaN, in float64 on the CPU."""
    if not isinstance(values, Tensor) or values.ndim != 1 or values.dtype.is_complex:
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise BatchError(f"{name} must be a vector of numbers, got {seen}")
    column = values.detach().cpu().double()
    if bool(column.isnan().any()):
        raise BatchError(f"{name} is NaN in row {int(column.isnan().nonzero()[0])}; leave such samples out")
    return column
