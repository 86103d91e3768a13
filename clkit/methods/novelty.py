r"""How unlike everything learned an input is, from running sums of features of unit length."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clkit.arguments import check_arguments
from clkit.methods._checks import Batch, check_probability
from clkit.methods.decisions import abstention_threshold
from clkit.methods.lda import LDAHead

__all__ = ["Novelty"]


class Novelty(LDAHead):
    r"""Mahalanobis distance of features of unit length to the nearest class learned: large for what is new.

    Use it to tell inputs of classes not learned yet, or of another domain, from those of the classes learned, with no
    further pass over the data. With :math:`g = f / \lVert f \rVert`, class means and pooled covariance of the g:

    .. math:: d(x) = \min_c \, (g - \mu_c)^\top [(1 - \varepsilon) \Sigma + \varepsilon I]^{-1} (g - \mu_c)

    The length of a feature says how much of what was learned an image shows; it differs between classes, spoils the
    covariance, and is small for many new inputs. Everything else is :class:`LDAHead`: it learns, merges, unlearns and
    saves exact sums, and predicts the nearest class as well.

    A threshold on :meth:`distance` with a known rate of false alarms is a quantile of :meth:`left_out_distance` of
    rows that were learned (see :meth:`threshold`).

    Args:
        in_features: D, width of the features; the state has D² numbers.
        shrinkage: ε in [0, 1], or ``"auto"``, as for :class:`LDAHead`. Features of unit length have variances of
            about 1/D, so 1e-3 damps the directions of less than average variance.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.

    Raises:
        ArgumentError: If an argument is not allowed; at prediction, if the shrunk covariance is singular.

    Example:
        >>> novelty = Novelty(2, shrinkage=0.5)
        >>> rows, targets = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> novelty.update(rows, targets)
        >>> novelty.distance(torch.tensor([[9.0, 0.0], [3.0, 3.0], [-1.0, 0.0]]))  # squared, in units of ε
        tensor([0.0000, 1.1716, 4.0000])

    Source: M. Mueller, M. Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization",
    arXiv 2505.18032; K. Lee et al., arXiv 1807.03888, for the distance.
    """

    normalizes = True

    def __init__(
        self,
        in_features: int,
        *,
        shrinkage: float | Literal["auto"] = 1e-3,
        num_classes: int | None = None,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(Novelty, locals())
        super().__init__(in_features, shrinkage=shrinkage, num_classes=num_classes, max_classes=max_classes)

    def threshold(self, features: Tensor, targets: Tensor, false_alarms: float = 0.05) -> float:
        r"""Return the distance that a new sample of the classes learned exceeds with at most a given probability.

        The :math:`\lceil (n+1)(1-r) \rceil`-th smallest :meth:`left_out_distance` of n rows learned. New samples that
        are exchangeable with those rows give false alarms at a rate of at most r, but for what one row of all that
        were learned changes. Give all rows, or some drawn at random.

        Args:
            features: (n, in_features), rows that are in the sums exactly once.
            targets: (n,) class ids that they were learned as.
            false_alarms: r, from 0 to 1.

        Returns:
            The threshold of :func:`abstention_threshold`, infinite where n is too small for the rate: an alarm is a
            distance above it.

        Raises:
            ArgumentError: If the rate is not allowed.
            BatchError: If the batch is malformed, or a row cannot have been learned.

        Example:
            >>> novelty = Novelty(2, shrinkage=0.5)
            >>> rows = torch.tensor([[1.0, 0.0], [4.0, 3.0], [0.0, 1.0], [0.0, 4.0]])
            >>> targets = torch.tensor([0, 0, 1, 1])
            >>> novelty.update(rows, targets)
            >>> round(novelty.threshold(rows, targets, false_alarms=0.5), 4)
            0.8
        """
        check_probability("false_alarms", false_alarms)
        return abstention_threshold(self.left_out_distance(features.to(torch.float64), targets), false_alarms)

    def _design(self, features: Tensor) -> Tensor:
        return normalize(features, eps=1e-12)

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        return [(self.statistics, self._design(batch.features))]
