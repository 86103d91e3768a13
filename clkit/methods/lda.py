r"""Linear discriminant analysis from the same sums: nearest mean in the metric of the pooled covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.methods._checks import check_probability
from clkit.methods._leave_one_out import left_out_distances
from clkit.methods._solving import condition_number, spectrum, warn_of_lost_digits
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.readout import Readout
from clkit.methods.nearest_mean import nearest_mean_readout, negative_distances
from clkit.methods.statistics import FeatureStatistics

__all__ = ["LDAHead"]


class LDAHead(Head):
    r"""Linear discriminant analysis with equal priors; exact for any order and batch size.

    Use it where classes share a shape but not a scale in all directions: it usually beats nearest means and needs no
    lift. With the pooled within-class covariance of all N samples

    .. math::
        \Sigma = \frac{1}{N} \sum_c \sum_{x \in F_c} (x - \mu_c) (x - \mu_c)^\top, \quad
        \Lambda = [(1-\varepsilon) \Sigma + \varepsilon I]^{-1}, \quad
        \mathrm{score}_c(x) = -(x - \mu_c)^\top \Lambda (x - \mu_c).

    Unlike streaming LDA, whose running covariance depends on the order of the samples, this is the covariance of the
    batch algorithm (scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr")``, whose pooled covariance weighs
    classes by their priors: with equal priors the two agree where classes have equally many samples).

    Args:
        in_features: D, width of the features; the state has D² numbers.
        shrinkage: ``"auto"``: Λ = [Σ + γ/N I]⁻¹ with the γ that generalised cross-validation chooses, from the same
            sums, for the ridge regression (with intercept) of the classes on the features: both damp the same noise.
            It takes an eigendecomposition at each solve, and :meth:`leave_one_out` keeps to the γ chosen. A number ε in
            [0, 1], as above: 0 takes Σ as it is, 1 is the nearest mean; it is absolute, compared with Σ.
        unit: Whether rows are scaled to unit length first, in learning and in predicting: where the length of a
            feature says how clear an image is rather than what is on it. A row of zeros stays zero, counts as a sample
            and is warned about once (on a CPU).
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.
        statistics: Sums to share with other heads (needs ``sums`` and ``scatter``); update them, not the head. With
            ``unit`` give them rows of unit length.

    Raises:
        ArgumentError: If an argument is not allowed; at prediction, if the shrunk covariance is singular.

    Example:
        >>> head = LDAHead(1, shrinkage=0.0)
        >>> head.update(torch.tensor([[-1.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[1.0]]))  # Σ = 1, means 0 and 4
        tensor([[-1., -9.]])

    Source: T. Hayes, C. Kanan (Deep SLDA), arXiv 1909.01520, for ε and the equal priors; M. Mueller, M. Hein,
    arXiv 2505.18032, for ``unit``.
    """

    _factor: Tensor
    _gamma, _gcv_error = 0.0, math.nan
    _own_options: tuple[str, ...] = ("shrinkage", "unit")
    _added_options: Mapping[str, Any] = {"unit": False}

    def __init__(
        self,
        in_features: int,
        *,
        shrinkage: float | Literal["auto"] = "auto",
        unit: bool = False,
        num_classes: int | None = None,
        max_classes: int = 65536,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        check_arguments(LDAHead, locals())
        super().__init__(in_features, num_classes=num_classes, max_classes=max_classes)
        self.shrinkage = shrinkage if isinstance(shrinkage, str) else check_probability("shrinkage", shrinkage)
        self.unit = self.normalizes = bool(unit)
        self.feature_map = FeatureMap(in_features)
        self.statistics = self._adopt(statistics, in_features, ("sums", "scatter"))
        self._warned = False

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, the pooled within-class covariance Σ before shrinkage; zero if nothing was learned."""
        return self._sums.scatter / max(self._sums.samples, 1)

    @property
    def chosen_gamma(self) -> float:
        """What ``"auto"`` adds to the diagonal of the scatter N Σ; 0 for a number, NaN before anything was learned."""
        return self._gamma if self._solved().size else math.nan

    @property
    def gcv_error(self) -> float:
        """What ``"auto"`` has minimised: the squared error of left-out rows that it foresees for the ridge; else NaN.

        Of two heads that learned the same rows of the same classes, such as one with ``unit`` and one without, the
        smaller is the better guess.
        """
        return self._gcv_error if self._solved().size else math.nan

    def distance(self, features: Tensor) -> Tensor:
        r"""Return how far features are from everything learned: the squared distance to the nearest class.

        .. math:: \min_c \, (x - \mu_c)^\top \Lambda (x - \mu_c)

        In expectation about D for a sample of a class with that covariance. :class:`Novelty` is the same of features
        of unit length, which tells new classes better.

        Args:
            features: (B, in_features).

        Returns:
            (B,), at least 0; float64 for float64 features, else float32.

        Raises:
            NotFittedError: If nothing was learned.
            BatchError: If the features have the wrong shape or, on a CPU, are not finite.

        Example:
            >>> head = LDAHead(1, shrinkage=0.0)
            >>> head.update(torch.tensor([[-1.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
            >>> head.distance(torch.tensor([[1.0], [9.0]]))  # Σ = 1, means 0 and 4
            tensor([ 1., 25.])
        """
        self._check_fitted()
        scores: Tensor = self(features)
        return scores.amax(dim=1).abs()  # they are at most 0

    def left_out_distance(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the distance of learned rows from everything else learned; see :meth:`leave_one_out`.

        As far as new samples of the classes learned would be, so a quantile of it is a threshold with a known rate of
        false alarms. Infinite where nothing is left.

        Returns:
            (B,), at least 0; float64 for float64 features, else float32.
        """
        return self.leave_one_out(features, targets).amax(dim=1).abs()

    @property
    def _sums(self) -> FeatureStatistics:
        """The sums that the read-out is made of."""
        return self.statistics

    def _best_gamma(self, sums: FeatureStatistics) -> tuple[float, float]:
        """Return what sums choose for the ridge regression with intercept of the same classes: strength and error."""
        means, counts = sums.means, sums.counts.to(torch.float64)[:, None]
        rows = float(counts.sum())
        # Relative to one of the means: at a distance from the origin the others differ from it by few digits only.
        means = means - means[:1]
        means = means - (counts * means).sum(dim=0) / rows
        between = counts * means
        square = rows - float(counts.square().sum()) / rows
        return spectrum(sums.scatter + between.T @ means, between).best_gamma(rows, square, spent=1.0)

    def _choose(self) -> None:
        """Let the sums choose what is not given."""
        if self.shrinkage == "auto":
            self._gamma, self._gcv_error = self._best_gamma(self.statistics)

    def _readout_of_sums(self) -> Readout:
        self._gamma, self._gcv_error = 0.0, math.nan
        classes = self.statistics.classes
        if not classes.numel():
            return nearest_mean_readout(classes, self.statistics.means)
        self._choose()
        self._factor = self._factorised(self._sums.scatter, self._sums.samples)
        plain = nearest_mean_readout(classes, self._sums.means)
        weight = torch.cholesky_solve(plain.weight.T, self._factor).T  # 2 Λ (μ - o)
        weight = weight if plain.duplicates is None else weight[plain.duplicates]
        bias = -(weight * plain.weight).sum(dim=1) / 4
        return Readout.of(classes, weight, bias, plain.offset)

    def _factorised(self, scatter: Tensor, samples: int) -> Tensor:
        """Return the Cholesky factor of the shrunk covariance of a scatter of this number of samples."""
        shrunk = scatter / samples
        if self.shrinkage == "auto":
            shrunk.diagonal().add_(self._gamma / samples)
        else:
            shrunk *= 1 - self.shrinkage
            shrunk.diagonal().add_(self.shrinkage)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        condition = math.inf if int(failed) else condition_number(factor)
        # Rounding lets a singular matrix through with a tiny pivot; nothing computed from it would mean anything.
        if condition * torch.finfo(torch.float64).eps * self._sums.width >= 1:
            raise ArgumentError(
                f"the pooled covariance is singular with shrinkage={self.shrinkage}: its smallest variance is "
                f"{float(shrunk.diagonal().min()):.3g} and {self._sums.samples} samples were seen for "
                f'{self._sums.width} features; raise shrinkage, or let the sums choose it by shrinkage="auto"'
            )
        if not self._warned:
            advice = 'use shrinkage="auto" or scale the features'
            self._warned = warn_of_lost_digits(condition, "the pooled covariance", advice)
        return factor

    def _left_out(self, rows: Tensor, at: Tensor, readout: Readout) -> Tensor:
        samples = self._sums.samples - 1
        if not samples:
            return rows.new_full((rows.shape[0], 1), -torch.inf)
        factor = self._factorised(self._sums.scatter, samples)
        both = [readout.centred(self._design(rows)), readout.centred(self._sums.means)]
        white, means = (torch.linalg.solve_triangular(factor, each.T, upper=False).T for each in both)
        return -left_out_distances(white, means, self.counts, at, self._weight / samples)[0]

    @property
    def _weight(self) -> float:
        """What the scatter weighs in the shrunk covariance."""
        return 1.0 if isinstance(self.shrinkage, str) else 1 - self.shrinkage

    def _frozen_parts(self, leverage: bool) -> dict[str, Tensor]:
        return {"factor": self._factor}

    def _freeze(self, parts: dict[str, Tensor]) -> None:
        self._factor = parts["factor"]

    def _final_scores(self, scores: Tensor, centred: Tensor) -> Tensor:
        if not scores.shape[1]:
            return scores
        white = torch.linalg.solve_triangular(self._factor, centred.T, upper=False)
        return negative_distances(scores, white.T)
