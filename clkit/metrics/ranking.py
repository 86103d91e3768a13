r"""How well an uncertainty ranks samples: by their loss, right before wrong, known before new.

All functions take one float a sample, ``uncertainty`` (N,), where higher means less sure, and beside it ``loss`` (N,),
what was lost on the sample, or ``positive`` (N,), booleans or 0 and 1: whether it is what should have a high
uncertainty, a sample that was answered wrongly or one of a class never learned. Only the order of the uncertainties
counts, so any unit will do: log-densities and distances as well as probabilities. They may be infinite; losses are
finite.

Equal uncertainties are equal: nothing depends on the order in which samples are stored. A value that is not defined (a
correlation with a constant, a ranking of one kind of samples) is ``NaN``. The arithmetic is float64, on the CPU.
Arguments are tensors, NumPy arrays or lists. A :class:`~clkit.errors.BatchError` says what is not as above, also for a
NaN: it has no place in an order.
"""

from __future__ import annotations

from math import nan

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.metrics.functional import Array

__all__ = [
    "augrc",
    "aurc",
    "auroc",
    "average_precision",
    "excess_aurc",
    "fpr_at_tpr",
    "kendall",
    "risk_coverage",
    "spearman",
]

_Floats = npt.NDArray[np.float64]


def spearman(uncertainty: Array, loss: Array) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, where equal values share the mean of their ranks.

    A float in [-1, 1]; ``NaN`` if either is constant.

    Example:
        >>> round(spearman([0.1, 0.4, 0.2, 0.8], [0, 1, 0, 1]), 4)
        0.8944
    """
    u, losses = in_order(uncertainty, loss)
    if not len(u) or u[0] == u[-1] or losses.min() == losses.max():
        return nan
    first, second = (_ranks(values) - (len(u) + 1) / 2 for values in (u, losses))
    return float(np.clip(first @ second / np.sqrt((first @ first) * (second @ second)), -1, 1))


def kendall(uncertainty: Array, loss: Array) -> float:
    r"""Return Kendall's :math:`\tau_b`, the share of pairs in the same order less that in the other, with ties.

    A float in [-1, 1]; ``NaN`` if either is constant.

    Example:
        >>> round(kendall([0.1, 0.4, 0.2, 0.8], [0, 1, 0, 1]), 4)
        0.8165
    """
    from scipy.stats import kendalltau

    u, losses = in_order(uncertainty, loss)
    return float(kendalltau(u, losses).statistic) if len(u) > 1 else nan


def auroc(uncertainty: Array, positive: Array) -> float:
    """Return the probability that a positive sample has a higher uncertainty than another; equal ones count one half.

    The area under the ROC curve, as the statistic of Mann and Whitney. A float in [0, 1]; ``NaN`` unless there are
    samples of both kinds.

    Example:
        >>> auroc([-1000.0, -900.0, -800.0, -200.0], [0, 0, 1, 1])
        1.0
    """
    u, kinds = in_order(uncertainty, positive, kinds=True)
    high, low = kinds.sum(), (1 - kinds).sum()
    if not high or not low:
        return nan
    return float((_ranks(u) @ kinds - high * (high + 1) / 2) / (high * low))


def average_precision(uncertainty: Array, positive: Array) -> float:
    """Return the area under the precision-recall curve as average precision; equal uncertainties enter together.

    A float in [0, 1]; ``NaN`` unless there are samples of both kinds.

    Example:
        >>> round(average_precision([0.1, 0.4, 0.2, 0.8], [0, 0, 1, 1]), 4)  # (1 + 2/3) / 2
        0.8333
    """
    taken, hits = counts_from_the_top(uncertainty, positive)
    if not hits[-1] or hits[-1] == taken[-1]:
        return nan
    return float(np.diff(hits) @ (hits[1:] / taken[1:]) / hits[-1])


def fpr_at_tpr(uncertainty: Array, positive: Array, tpr: float = 0.95) -> float:
    """Return the least false positive rate of a threshold that finds a share ``tpr`` of the positive samples.

    A sample is taken for positive if its uncertainty is at or above the threshold. A float in [0, 1]; ``NaN`` unless
    there are samples of both kinds. An :class:`~clkit.errors.ArgumentError` unless 0 < ``tpr`` <= 1.

    Example:
        >>> fpr_at_tpr([0.1, 0.4, 0.2, 0.8], [0, 0, 1, 1])
        0.5
    """
    if isinstance(tpr, bool) or not isinstance(tpr, int | float) or not 0 < tpr <= 1:
        raise ArgumentError(f"tpr must be a number above 0 and at most 1, got {tpr!r}")
    taken, hits = counts_from_the_top(uncertainty, positive)
    if not hits[-1] or hits[-1] == taken[-1]:
        return nan
    first = int((hits / hits[-1] >= tpr).argmax())  # both counts grow, so this is the least
    return float((taken[first] - hits[first]) / (taken[-1] - hits[-1]))


def risk_coverage(uncertainty: Array, loss: Array) -> Tensor:
    """Return the risk at each coverage: the mean loss of the k samples with the lowest uncertainty, k = 1 … N.

    Of samples with equal uncertainty those that are in are drawn at random, and the risk is its expectation: of a group
    of g with a total loss w the j-th adds w·j/g.

    Returns:
        (N,) float64.

    Example:
        >>> risk_coverage([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1])
        tensor([0.0000, 0.2500, 0.3333, 0.5000], dtype=torch.float64)

    Source: Y. Geifman, R. El-Yaniv, arXiv 1705.08500 (selective classification).
    """
    expected = expected_losses(uncertainty, loss)
    return torch.from_numpy(np.cumsum(expected) / np.arange(1, len(expected) + 1))


def aurc(uncertainty: Array, loss: Array) -> float:
    """Return the area under the risk-coverage curve, the mean of :func:`risk_coverage`.

    Of a constant uncertainty it is the mean loss. ``NaN`` without samples.

    Example:
        >>> round(aurc([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1]), 4)
        0.2708
    """
    return float(risk_coverage(uncertainty, loss).mean())


def excess_aurc(uncertainty: Array, loss: Array) -> float:
    """Return :func:`aurc` less that of the best uncertainty that there is, the loss itself. ``NaN`` without samples.

    Example:
        >>> round(excess_aurc([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1]), 4)
        0.0625

    Source: Y. Geifman, G. Uziel, R. El-Yaniv, arXiv 1805.08206 (E-AURC).
    """
    return aurc(uncertainty, loss) - aurc(loss, loss)


def augrc(uncertainty: Array, loss: Array) -> float:
    """Return the area under the generalised risk-coverage curve, the mean of risk times coverage.

    Each point is the loss that goes undetected, as a mean over all samples, also those not answered. ``NaN`` without
    samples.

    Example:
        >>> round(augrc([0.1, 0.5, 0.5, 0.9], [0, 0, 1, 1]), 4)
        0.2188

    Source: J. Traub et al., arXiv 2407.01032 (AUGRC).
    """
    risk = risk_coverage(uncertainty, loss)
    return float((risk * torch.arange(1, len(risk) + 1)).sum() / len(risk) ** 2) if len(risk) else nan


def expected_losses(uncertainty: Array, loss: Array) -> _Floats:
    """Return the loss of each sample by rising uncertainty; samples of equal uncertainty have the mean of theirs."""
    u, losses = in_order(uncertainty, loss)
    if not len(u):
        return losses
    ends = _ends(u)
    sizes = np.diff(ends, prepend=0)
    return np.repeat(np.add.reduceat(losses, ends - sizes) / sizes, sizes)


def counts_from_the_top(uncertainty: Array, positive: Array) -> tuple[_Floats, _Floats]:
    """Return how many samples, and how many positive ones, are at or above each threshold, from none to all of them."""
    u, kinds = in_order(uncertainty, positive, kinds=True)
    u, kinds = u[::-1], kinds[::-1]
    ends = np.append(0, _ends(u))
    return ends.astype(np.float64), np.append(0.0, np.cumsum(kinds))[ends]


def _ends(ordered: _Floats) -> npt.NDArray[np.int64]:
    """Return where each group of equal values ends."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], [True] * bool(len(ordered)))) + 1


def _ranks(values: _Floats) -> _Floats:
    """Return the rank of each value from 1; equal values have the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: _Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def in_order(uncertainty: Array, beside: Array, kinds: bool = False) -> tuple[_Floats, _Floats]:
    """Return both, checked, by rising uncertainty and then by what is beside: sums come out the same in any order."""
    name = "positive" if kinds else "loss"
    u, values = numbers("uncertainty", uncertainty, infinite=True), numbers(name, beside)
    if u.shape != values.shape:
        raise BatchError(f"uncertainty has {len(u)} entries and {name} {len(values)}: give one of each a sample")
    if kinds and not np.isin(values, (0.0, 1.0)).all():
        raise BatchError("positive must be booleans, or 0 and 1")
    order = np.lexsort((values, u))
    return u[order], values[order]


def numbers(name: str, values: Array, infinite: bool = False) -> _Floats:
    """Return a vector of numbers as float64, -0 as 0; refuse NaN, and infinities unless they are allowed."""
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise BatchError(f"{name} has shape {array.shape} and dtype {array.dtype}: it must be (N,) numbers")
    vector = array.astype(np.float64) + 0.0
    bad = np.isnan(vector) if infinite else ~np.isfinite(vector)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise BatchError(f"{name} is {vector[rows[0]]} in row {rows[0]}, one of {len(rows)} that cannot be ranked")
    return vector
