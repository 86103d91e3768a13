r"""What is known at one moment, frozen: class means and shared covariance, a memory of rows, and a leverage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, NotFittedError
from clkit.methods._checks import (
    check_count,
    check_features,
    check_finite,
    check_probability,
    class_ids,
    derived_seed,
)
from clkit.methods._leave_one_out import squared_distances
from clkit.methods._state import exact
from clkit.methods.heads.pseudo_features import correlated_rows
from clkit.methods.statistics import FeatureStatistics

__all__ = ["Snapshot", "gaussian_rows"]

_DRAWS = 3  # of the user's seed, so that rows are not the pseudo-features of a head with the same seed

Rows = tuple[Tensor, Tensor]
Leverage = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Snapshot:
    r"""The classes as Gaussians with one covariance, factorised, and what else is needed to judge an input.

    Made by :meth:`of`; it does not change when more is learned, so that numbers computed from it contain no data that
    came later. With S the within-class covariance (divided by N) and λ the shrinkage:

    .. math:: S_\lambda = (1 - \lambda) S + \lambda \frac{\mathrm{tr} S}{D} I

    Attributes:
        classes: (k,) int64, sorted ids of the classes seen.
        counts: (k,) int64, samples of each.
        means: (k, D) float64, relative to ``offset``.
        offset: (D,) float64, the mean of the class means, which is taken off first: it costs no digits then.
        factor: (D, D) float64, lower Cholesky factor of S_λ; the identity as long as all samples of a class are equal.
        shrinkage: λ.
        memory: (M, D) float64 rows relative to ``offset`` and their (M,) int64 classes; ``None`` without a memory.
        leverage: From (B, D) features to their (B,) leverage.

    Example:
        >>> statistics = FeatureStatistics(2, scatter=True)
        >>> rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
        >>> statistics.update(rows, torch.tensor([0, 0, 1, 1]))
        >>> snapshot = Snapshot.of(statistics, shrinkage=0.5)  # S = diag(1, 0)
        >>> snapshot.factor.square()
        tensor([[0.7500, 0.0000],
                [0.0000, 0.2500]], dtype=torch.float64)
        >>> snapshot.distances(torch.tensor([[1.0, 1.0]]))
        tensor([[ 4., 36.]], dtype=torch.float64)
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    offset: Tensor
    factor: Tensor
    shrinkage: float
    memory: Rows | None
    leverage: Leverage

    @classmethod
    def of(
        cls,
        statistics: FeatureStatistics,
        *,
        shrinkage: float = 0.1,
        memory: Rows | None = None,
        leverage: Leverage | None = None,
    ) -> Snapshot:
        r"""Freeze what statistics hold now.

        Args:
            statistics: With ``sums`` and ``scatter``.
            shrinkage: λ in [0, 1]; above 0 where samples are fewer than features.
            memory: Some of the rows that were learned, (M, D) features of any floating dtype and their (M,) class ids.
            leverage: Leverage of features (B, D) under the predictor, such as ``AnalyticHead.leverage``: give that of a
                copy if the head goes on learning. By default :math:`h (G + I)^{-1} h^\top`, G the Gram matrix of the
                statistics, factorised when it is first needed.

        Raises:
            ArgumentError: If the shrinkage is not in [0, 1], or leaves the covariance singular.
            BatchError: If the memory is malformed.
            ConfigurationError: If the statistics do not keep what is needed.
            NotFittedError: If nothing was learned.
        """
        check_probability("shrinkage", shrinkage)
        if not statistics.samples:
            raise NotFittedError("these statistics have seen nothing yet: there is nothing to take a snapshot of")
        with exact():
            covariance, counts, means = statistics.scatter / statistics.samples, statistics.counts, statistics.means
            offset = means.mean(dim=0)
            leverage = _leverage_of(covariance.clone(), counts, means) if leverage is None else leverage
            return cls(
                classes=statistics.classes,
                counts=counts,
                means=means - offset,
                offset=offset,
                factor=_factorised(covariance, float(shrinkage)),
                shrinkage=float(shrinkage),
                memory=None if memory is None else _kept(memory, offset),
                leverage=leverage,
            )

    @property
    def width(self) -> int:
        """D, width of the features."""
        return self.offset.numel()

    @cached_property
    def white_means(self) -> Tensor:
        """(k, D) float64, the means whitened by ``factor``."""
        return self.whitened(self.means)

    @cached_property
    def memory_squares(self) -> Tensor:
        """(M,) float64, squared lengths of the rows of the memory."""
        return self.means.new_zeros(0) if self.memory is None else self.memory[0].square().sum(dim=1)

    @cached_property
    def log_determinant(self) -> float:
        """Of S_λ."""
        return 2 * float(self.factor.diagonal().log().sum())

    def relative(self, features: Tensor) -> Tensor:
        """Return features (B, D), of any floating dtype, less ``offset``, float64, without their graph."""
        return check_features(features, self.width, self.offset.device).detach() - self.offset

    def distances(self, features: Tensor) -> Tensor:
        r"""Return the squared Mahalanobis distances :math:`(h - \mu_c)^\top S_\lambda^{-1} (h - \mu_c)`.

        Args:
            features: (B, D) of any floating dtype.

        Returns:
            (B, k) float64, at least 0, in the order of ``classes``.

        Raises:
            BatchError: If the features have the wrong shape.
        """
        with exact():
            return squared_distances(self.whitened(self.relative(features)), self.white_means)

    def whitened(self, rows: Tensor) -> Tensor:
        """Return rows (B, D) that are relative to ``offset``, whitened by ``factor``."""
        white: Tensor = torch.linalg.solve_triangular(self.factor, rows.T, upper=False).T
        return white


def gaussian_rows(
    snapshot: Snapshot, per_class: int = 50, *, seed: int = 0, clamp_min: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Draw rows :math:`h \sim N(\mu_c, S_\lambda)` of each class, which stand for samples that were not kept.

    Row r of class c is a function of the snapshot and ``(seed, c, r)`` alone. The global random state is not touched.

    Args:
        snapshot: Of means and covariance.
        per_class: Rows of each class.
        seed: Of the draws.
        clamp_min: Lower bound of what is drawn, 0 for features that come out of a ReLU.

    Returns:
        (k · per_class, D) float64 features and their (k · per_class,) int64 classes, in the order of the ids.

    Example:
        >>> statistics = FeatureStatistics(1, scatter=True)
        >>> statistics.update(torch.tensor([[-1.0], [1.0], [5.0]]), torch.tensor([0, 0, 4]))
        >>> rows, classes = gaussian_rows(Snapshot.of(statistics), per_class=2)
        >>> rows.shape, classes
        (torch.Size([4, 1]), tensor([0, 0, 4, 4]))
    """
    check_count("per_class", per_class)
    check_count("seed", seed, at_least=0)
    seed = derived_seed(seed, _DRAWS)
    with exact():
        classes = zip(snapshot.classes.tolist(), snapshot.means + snapshot.offset, strict=True)
        drawn = [correlated_rows(mean, snapshot.factor, per_class, class_id=c, seed=seed) for c, mean in classes]
    rows = torch.cat(drawn)
    return rows if clamp_min is None else rows.clamp(min=clamp_min), snapshot.classes.repeat_interleave(per_class)


def _factorised(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return the Cholesky factor of the shrunk covariance; ``covariance`` is used up."""
    scale = float(covariance.diagonal().mean())
    if scale <= 0:  # each class has shown one point only: there is no spread to measure distances by
        return torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(shrinkage * scale)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # rounding lets a singular matrix through with a tiny pivot
    least = float(factor.diagonal().min()) ** 2 if not int(failed) else 0.0
    if least <= torch.finfo(torch.float64).eps * len(covariance) * scale:
        raise ArgumentError(
            f"the covariance is singular with shrinkage={shrinkage}: of {len(covariance)} features some have no spread "
            "of their own in these samples; raise shrinkage, 0.1 say"
        )
    return factor


def _kept(memory: Rows, offset: Tensor) -> Rows:
    if not isinstance(memory, tuple) or len(memory) != 2:
        raise ArgumentError(f"memory must be a pair of features and class ids, got {type(memory).__name__}")
    rows = check_features(memory[0], offset.numel(), offset.device).detach()
    check_finite(rows)
    targets = torch.from_numpy(class_ids(memory[1], len(rows)).copy()).to(offset.device)
    if len(targets) and int(targets.min()) < 0:
        raise BatchError(f"memory has the target {int(targets.min())}: its rows must have the class that they are of")
    return rows - offset, targets


def _leverage_of(covariance: Tensor, counts: Tensor, means: Tensor) -> Leverage:
    """Return the leverage under the Gram matrix of what was learned and a ridge strength of 1."""

    @cache
    def factor() -> Tensor:
        weighted = counts[:, None].to(torch.float64) * means
        system = torch.addmm(covariance, weighted.T, means, beta=float(counts.sum()))
        system.diagonal().add_(1.0)
        lower: Tensor = torch.linalg.cholesky(system)
        return lower

    def leverage(features: Tensor) -> Tensor:
        rows = check_features(features, len(covariance), covariance.device)
        white: Tensor = torch.linalg.solve_triangular(factor(), rows.T, upper=False)
        return white.square().sum(dim=0)

    return leverage
