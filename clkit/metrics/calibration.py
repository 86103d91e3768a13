r"""Whether predicted probabilities come true: calibration errors, Brier score and negative log-likelihood.

Calibration is asked of one probability a sample, ``confidence`` (N,) in [0, 1], and of what came of it, ``outcome``
(N,) in [0, 1]: whether the predicted class was right (:func:`top_label` gives both from the probabilities of a
classifier), or, for a predicted error such as that of DEUP, whether it was wrong. The arithmetic is float64, on the
CPU; ``NaN`` without samples. Arguments are tensors, NumPy arrays or lists, and a :class:`~clkit.errors.BatchError` says
what is not as above.
"""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.metrics._stream_metric import integers
from clkit.metrics.functional import Array
from clkit.metrics.ranking import numbers

__all__ = [
    "Bins",
    "adaptive_bins",
    "brier_scores",
    "calibration_error",
    "equal_width_bins",
    "log_losses",
    "max_calibration_error",
    "top_label",
]

_SUM_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4}  # of probabilities that were computed in that dtype
_NARROW_SUM_ERROR = 3e-2


class Bins(NamedTuple):
    """Samples in groups by their confidence; groups without samples are left out.

    Attributes:
        confidence: (b,) float64, mean confidence of each group.
        outcome: (b,) float64, mean outcome of each group.
        size: (b,) int64, samples of each group.
    """

    confidence: Tensor
    outcome: Tensor
    size: Tensor


def equal_width_bins(confidence: Array, outcome: Array, bins: int = 15) -> Bins:
    r"""Return groups whose confidence lies in :math:`[i/n, (i+1)/n)`, the last with 1.

    Example:
        >>> equal_width_bins([0.1, 0.5, 0.75, 1.0], [0, 1, 0, 1], bins=2).confidence
        tensor([0.1000, 0.7500], dtype=torch.float64)
    """
    sure, came = in_order(confidence, outcome)
    edges = np.arange(1, check_bins(bins)) / bins
    return _grouped(sure, came, np.searchsorted(edges, sure, side="right"))


def adaptive_bins(confidence: Array, outcome: Array, bins: int = 15) -> Bins:
    """Return groups of equally many samples, in the order of their confidence; the first have one more if need be.

    Where equal confidences fall into two groups the lower outcomes come first, whatever the order of the samples.

    Example:
        >>> adaptive_bins([0.1, 0.5, 0.75, 1.0], [0, 1, 0, 1], bins=2)[:2]
        (tensor([0.3000, 0.8750], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    sure, came = in_order(confidence, outcome)
    parts = np.array_split(np.arange(len(sure)), check_bins(bins))
    return _grouped(sure, came, np.repeat(np.arange(bins), [len(part) for part in parts]))


def calibration_error(bins: Bins) -> float:
    r"""Return the expected calibration error of groups: the mean of what their outcome and confidence differ by.

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{outcome}_b - \mathrm{confidence}_b|

    ECE of :func:`equal_width_bins`, adaptive ECE of :func:`adaptive_bins`. A float in [0, 1].

    Example:
        >>> calibration_error(equal_width_bins([0.25, 0.75, 0.75], [0, 1, 1], bins=2))
        0.25

    Source: M. P. Naeini, G. Cooper, M. Hauskrecht, AAAI 2015; C. Guo et al., arXiv 1706.04599; K. Nguyen,
    B. O'Connor, arXiv 1508.05154 (groups of equal size).
    """
    total = int(bins.size.sum())
    return float((bins.size * (bins.outcome - bins.confidence).abs()).sum() / total) if total else nan


def max_calibration_error(bins: Bins) -> float:
    """Return the largest difference between outcome and confidence of a group (MCE). A float in [0, 1].

    Example:
        >>> max_calibration_error(equal_width_bins([0.25, 0.75, 0.5], [0, 1, 0], bins=2))
        0.25
    """
    return float((bins.outcome - bins.confidence).abs().max()) if len(bins.size) else nan


def top_label(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest probability of each sample, and whether its class is right; of equal ones the lowest id.

    Args:
        probabilities: (N, C) floats in [0, 1], each row of sum 1.
        targets: (N,) class ids; rows of -1 are left out.

    Returns:
        Confidence (n,) float64 and outcome (n,) bool.

    Example:
        >>> top_label(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        (tensor([0.7500, 0.5000], dtype=torch.float64), tensor([ True, False]))
    """
    p, y = _labelled(probabilities, targets)
    return p.amax(dim=1), p.argmax(dim=1) == y


def brier_scores(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Return the Brier score :math:`\sum_c (p_c - [c = y])^2` of each sample, in [0, 2].

    Arguments are those of :func:`top_label`.

    Example:
        >>> brier_scores(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([1]))
        tensor([1.1400], dtype=torch.float64)
    """
    p, y = _labelled(probabilities, targets)
    return (p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(dim=1)


def log_losses(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Return the negative log-likelihood :math:`-\log p_y` of each sample; infinite where the class was ruled out.

    Arguments are those of :func:`top_label`.

    Example:
        >>> log_losses(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([1]))
        tensor([1.6094], dtype=torch.float64)
    """
    p, y = _labelled(probabilities, targets)
    return -p.gather(1, y[:, None])[:, 0].log()


def _grouped(confidence: np.ndarray, outcome: np.ndarray, group: np.ndarray) -> Bins:
    count = np.bincount(group)
    sums = [np.bincount(group, weights=values) for values in (confidence, outcome)]
    some = count > 0
    sure, came = (torch.from_numpy(total[some] / count[some]) for total in sums)
    return Bins(sure, came, torch.from_numpy(count[some]))


def in_order(confidence: Array, outcome: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return both, checked, by rising confidence and then outcome: sums come out the same in any order."""
    sure, came = numbers("confidence", confidence), numbers("outcome", outcome)
    for name, values in (("confidence", sure), ("outcome", came)):
        if len(values) and not (values.min() >= 0 and values.max() <= 1):
            raise BatchError(f"{name} must lie in [0, 1], got values from {values.min():g} to {values.max():g}")
    if sure.shape != came.shape:
        raise BatchError(f"confidence has {len(sure)} entries and outcome {len(came)}: give one of each a sample")
    order = np.lexsort((came, sure))
    return sure[order], came[order]


def check_bins(bins: int) -> int:
    """Return a number of groups, or refuse it."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ArgumentError(f"bins must be an integer of at least 1, got {bins!r}")
    return bins


def _labelled(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that have a label, float64, with their labels."""
    y = integers("targets", targets)
    if not isinstance(probabilities, Tensor) or probabilities.ndim != 2 or len(probabilities) != len(y):
        seen = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise BatchError(f"probabilities must have shape ({len(y)}, C), one row for each of the targets, got {seen}")
    if not probabilities.dtype.is_floating_point:
        raise BatchError(f"probabilities must be floating-point numbers, got {probabilities.dtype}")
    p = probabilities.detach().double()
    if p.numel():
        off = float((p.sum(dim=1) - 1).abs().max())
        if not (float(p.min()) >= 0 and off <= _SUM_ERROR.get(probabilities.dtype, _NARROW_SUM_ERROR)):
            raise BatchError(
                f"probabilities must be at least 0 and sum to 1 in each row, got a lowest of {float(p.min()):g} and a "
                f"sum that is off by {off:g}; logits become probabilities by .softmax(dim=1)"
            )
    if len(y) and not (int(y.min()) >= -1 and int(y.max()) < p.shape[1]):
        raise BatchError(f"targets must be class ids below {p.shape[1]}, or -1, got {int(y.min())} to {int(y.max())}")
    return p[y >= 0], y[y >= 0]
