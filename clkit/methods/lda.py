r"""Linear discriminant analysis from the same sums: nearest mean in the metric of the pooled covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from clkit.errors import ArgumentError
from clkit.methods._checks import check_probability
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
        \Sigma = \frac{1}{N} \Big( G - \sum_c n_c \mu_c \mu_c^\top \Big), \quad
        \Lambda = [(1-\varepsilon) \Sigma + \varepsilon I]^{-1}, \quad
        \mathrm{score}_c(x) = -(x - \mu_c)^\top \Lambda (x - \mu_c).

    Unlike streaming LDA, whose running covariance depends on the order of the samples, this is the covariance of the
    batch algorithm (scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr")``, whose pooled covariance weighs
    classes by their priors: with equal priors the two agree where classes have equally many samples).

    Args:
        in_features: D, width of the features; the state has D² numbers.
        shrinkage: ε in [0, 1]: 0 takes Σ as it is, 1 is the nearest mean. Absolute: ε is compared with Σ.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.
        statistics: Sums to share with other heads (needs ``sums`` and ``gram``); update them, not the head.

    Raises:
        ArgumentError: If an argument is not allowed; at prediction, if the shrunk covariance is singular.

    Example:
        >>> head = LDAHead(1, shrinkage=0.0)
        >>> head.update(torch.tensor([[-1.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[1.0]]))  # Σ = 1, means 0 and 4
        tensor([[-1., -9.]])

    Source: T. Hayes, C. Kanan (Deep SLDA), arXiv 1909.01520, for ε and the equal priors.
    """

    _factor: Tensor
    _own_options = ("shrinkage",)

    def __init__(
        self,
        in_features: int,
        *,
        shrinkage: float = 1e-4,
        num_classes: int | None = None,
        max_classes: int = 65536,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        super().__init__(in_features, num_classes=num_classes, max_classes=max_classes)
        self.shrinkage = check_probability("shrinkage", shrinkage)
        self.feature_map = FeatureMap(in_features)
        self.statistics = self._adopt(statistics, in_features, ("sums", "gram"))

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, the pooled within-class covariance Σ before shrinkage; zero if nothing was learned."""
        means, counts = self.statistics.means, self.statistics.counts
        scatter = self.statistics.gram.to(torch.float64) - (means * counts[:, None]).T @ means
        return (scatter + scatter.T) / 2 / counts.sum().clamp(min=1)

    def _readout_of_sums(self) -> Readout:
        classes = self.statistics.classes
        if not classes.numel():
            return nearest_mean_readout(classes, self.statistics.means)
        shrunk = (1 - self.shrinkage) * self.covariance
        shrunk.diagonal().add_(self.shrinkage)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        # Rounding lets a singular matrix through with a tiny pivot; nothing computed from it would mean anything.
        second_moment = self.statistics.lower_gram().diagonal().max() / self.statistics.samples
        rounding = self.in_features * torch.finfo(torch.float64).eps * second_moment
        if int(failed) or bool((factor.diagonal().square() <= rounding).any()):
            raise ArgumentError(
                f"the pooled covariance is singular with shrinkage={self.shrinkage}: its smallest variance is "
                f"{float(shrunk.diagonal().min()):.3g} and {self.statistics.samples} samples were seen for "
                f"{self.in_features} features; raise shrinkage (1e-4 is usual)"
            )
        self._factor = factor
        plain = nearest_mean_readout(classes, self.statistics.means)
        weight = torch.cholesky_solve(plain.weight.T, factor).T  # 2 Λ (μ - o)
        weight = weight if plain.duplicates is None else weight[plain.duplicates]
        bias = -(weight * plain.weight).sum(dim=1) / 4
        return Readout.of(classes, weight, bias, plain.offset)

    def _final_scores(self, scores: Tensor, centred: Tensor) -> Tensor:
        if not scores.shape[1]:
            return scores
        white = torch.linalg.solve_triangular(self._factor, centred.T, upper=False)
        return negative_distances(scores, white.T)
