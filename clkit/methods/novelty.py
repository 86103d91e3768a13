r"""How unlike everything learned an input is, from running sums of features of unit length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.methods._checks import check_probability
from clkit.methods._leave_one_out import left_out_distances
from clkit.methods._state import exact
from clkit.methods.decisions import abstention_threshold
from clkit.methods.heads.readout import Readout
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

    It tells other kinds of images, but hardly classes of the same kind as those learned. ``relative=True`` takes off
    the distance to one Gaussian of all that was learned, from the same sums: what is common to all classes then counts
    no more, new classes are told better, and other kinds of images nearly as well.

    A threshold on :meth:`distance` with a known rate of false alarms is a quantile of :meth:`left_out_distance` of
    rows that were learned (see :meth:`threshold`).

    Args:
        in_features: D, width of the features; the state has D² numbers.
        shrinkage: ε in [0, 1], or ``"auto"``, as for :class:`LDAHead`. Features of unit length have variances of
            about 1/D, so 1e-3 damps the directions of less than average variance. Relative distances want less, 1e-4.
        relative: Whether :meth:`distance` is relative to one Gaussian of everything learned.
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
    arXiv 2505.18032; K. Lee et al., arXiv 1807.03888, for the distance; J. Ren et al., arXiv 2106.09022, for the
    relative one.
    """

    _own_options = ("shrinkage", "relative")
    _everything: tuple[Tensor, Tensor]  # mean and Cholesky factor of one Gaussian of all samples

    def __init__(
        self,
        in_features: int,
        *,
        shrinkage: float | Literal["auto"] = 1e-3,
        relative: bool = False,
        num_classes: int | None = None,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(Novelty, locals())
        super().__init__(in_features, shrinkage=shrinkage, unit=True, num_classes=num_classes, max_classes=max_classes)
        self.relative = relative

    def distance(self, features: Tensor) -> Tensor:
        """Return how far features are from everything learned, see the class; higher is newer.

        Args:
            features: (B, in_features).

        Returns:
            (B,), at least 0 unless ``relative``; float64 for float64 features, else float32.

        Raises:
            NotFittedError: If nothing was learned.
            BatchError: If the features have the wrong shape or, on a CPU, are not finite.
        """
        distance = super().distance(features.to(torch.float64))
        if self.relative:
            mean, factor = self._everything
            rows = self._design(self._check_features(features)) - mean
            distance = distance - _white(factor, rows).square().sum(dim=1).to(distance.device)
        return distance if features.dtype == torch.float64 else distance.to(torch.float32)

    def left_out_distance(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the :meth:`distance` of learned rows from everything else learned; see :meth:`leave_one_out`.

        Infinite where nothing is left. Of ``relative`` distances the one Gaussian stays shrunk in the proportion that
        it is with the row.
        """
        distance = super().left_out_distance(features.to(torch.float64), targets)
        samples = self.statistics.samples
        if self.relative and samples > 1:
            with exact():
                mean, factor = self._gaussian_of_everything(samples - 1)
                white = _white(factor, self._design(self._check_features(features)) - mean)
                all_as_one = torch.zeros(len(white), dtype=torch.int64, device=white.device)
                counts = torch.tensor([samples], device=white.device)
                weight = self._weight / (samples - 1)
                from_all = left_out_distances(white, torch.zeros_like(mean)[None], counts, all_as_one, weight)[0]
            distance = distance - from_all[:, 0].to(distance.device)
        return distance if features.dtype == torch.float64 else distance.to(torch.float32)

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

    def _readout_of_sums(self) -> Readout:
        readout = super()._readout_of_sums()
        if self.relative and readout.size:
            self._everything = self._gaussian_of_everything(self.statistics.samples)
        return readout

    def _gaussian_of_everything(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the mean of all samples and the Cholesky factor of their covariance around it.

        It is shrunk in the same proportion to its own variance as that within classes: by the same amount, distances
        in directions that no sample has would cancel.
        """
        counts, means, scatter = (
            self.statistics.counts.to(torch.float64),
            self.statistics.means,
            self.statistics.scatter,
        )
        mean = counts @ means / counts.sum()
        centred = means - mean
        total = scatter + (counts[:, None] * centred).T @ centred
        ratio = float(total.trace() / scatter.trace()) if float(scatter.trace()) > 0 else 1.0
        return mean, ratio**0.5 * self._factorised(total / ratio, samples)


def _white(factor: Tensor, rows: Tensor) -> Tensor:
    white: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
    return white
