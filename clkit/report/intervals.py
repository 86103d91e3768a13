"""Confidence intervals of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from clkit.errors import ArgumentError

__all__ = ["Interval", "t_interval"]


CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval (``None`` where one value gives none)."""

    mean: float
    half_width: float | None


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of independent runs and Student's confidence interval of it, ``mean ± t · s / √n``.

    Args:
        values: One number a run.
        confidence: Share of such intervals that hold the true mean, if runs were normally distributed.

    Raises:
        ArgumentError: If there is no value.

    Example:
        >>> mean, half_width = t_interval([0.8, 0.9])
        >>> round(mean, 6), round(half_width, 6)  # t = 12.706205 with one degree of freedom
        (0.85, 0.63531)
    """
    if not values:
        raise ArgumentError("values is empty: a mean needs at least one run")
    n, mean = len(values), fmean(values)
    if n == 1:
        return Interval(mean, None)
    from scipy.stats import t  # takes a second to import

    return Interval(mean, float(t.interval(confidence, n - 1)[1]) * stdev(values) / math.sqrt(n))
