r"""AnaCP: features moved towards class means that are spread apart, by ridge solves of running sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, StateError
from clkit.methods._checks import Batch, check_count, check_number
from clkit.methods._gram import add_gram_, new_gram
from clkit.methods._recursion import not_positive_definite
from clkit.methods._solving import spectrum
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.frozen import LARGEST
from clkit.methods.heads.pseudo_features import correlated_rows
from clkit.methods.heads.readout import L2Normalize, Readout, linear_of, same_for_same
from clkit.methods.heads.seeded_map import SeededMap, lift_width
from clkit.methods.heads.unit_length import unit_rows
from clkit.methods.nearest_mean import nearest_mean_readout, negative_distances
from clkit.methods.statistics import FeatureStatistics
from clkit.schema import Kind, Numbers

__all__ = ["AnaCP"]

_VARIANCE = 1e-4  # added to the covariance, and the least that a variance is divided by: those of the public code
_LEAST_VARIANCE = 1e-8
_LONGEST = 1.1  # a mean or a covariance of rows of unit length is no larger
_NOT_OF_ROWS = "these sums are not those of rows of unit length; take an earlier checkpoint"
_NO_DIRECTION = 1e-10  # of the largest singular value: what is below it is rounding, and has no direction to lengthen
_BLOCK = 512  # drawn rows of one product
_MOST_DRAWS = 10_000  # of a class: more change nothing, and take the memory of all at once


class AnaCP(Head):
    r"""Analytic contrastive projection: a function of sums, equal at any time to its formula on all rows.

    Use it where classes are many and features frozen. Rows x have unit length; :math:`\mu_c` are the class means and
    :math:`\Sigma` the pooled within-class covariance of all rows, :math:`10^{-4}` added to its diagonal. With R fixed
    random maps :math:`z_r = \mathrm{gelu}(P_r x)` of one seed:

    1. Targets: of the whitened means :math:`(M - \bar m) \Sigma^{-1/2} = U S V^\top` every singular value that is not 0
       grows by 1, which pushes means apart that lie close: :math:`t = \mathrm{unit}(U (S + 1) V^\top \Sigma^{-1/2} +
       \bar m)`. The public code whitens here once more, as written; ``targets="unwhitened"`` takes
       :math:`\Sigma^{+1/2}`, which leads back.
    2. Projection: a ridge regression of the class's target on :math:`z_r` for each map,
       :math:`\theta_r = (Z_r^\top Z_r + \gamma I)^{-1} Z_r^\top T`, and
       :math:`f(x) = \mathrm{mean}_r \, \mathrm{unit}(\theta_r^\top z_r)`.
    3. Decision: ``"nearest"``: the nearest target. ``"draws"``: ridge regression on one-hot labels of rows drawn from
       :math:`N(\mu_c, \Sigma)`, through f and one more map, :math:`h = \mathrm{gelu}(P_0 f)`.

    All is computed from sums when a prediction needs it: counts, means, scatter, and for each map class sums and Gram
    matrix. The public code's covariance counts each new batch twice and forgets that means move; this one is the
    covariance of all rows. Its singular value of the direction that all means share, which is 0 but for rounding, is
    lengthened too and shifts all targets somewhere; here it is left alone.

    Args:
        in_features: D, width of the features.
        gamma: Strength of the ridge regressions; ``"auto"``: by generalised cross-validation, for each; the paper
            takes 100.
        expansion_dim: L, width of the maps; the state has R L² numbers. ``None``: 2 D, at least 1000 and at most 5000,
            which is what the paper takes for all.
        maps: R.
        targets: ``"published"`` or ``"unwhitened"``, see above.
        readout: ``"draws"`` or ``"nearest"``, see above.
        draws: Rows drawn of each class, at most 10,000; a row is a function of ``seed``, class and number alone.
        seed: Of maps and draws.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.

    Raises:
        ArgumentError: If an argument is not allowed; at prediction, if a system cannot be factorised.
        StateError: At prediction, if sums that were loaded are not those of rows of unit length.

    Example:
        >>> head = AnaCP(2, expansion_dim=30, readout="nearest")
        >>> rows, targets = torch.tensor([[4.0, 1.0], [3.0, 2.0], [1.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 0, 5, 5])
        >>> head.update(rows, targets)
        >>> head.predict(torch.tensor([[9.0, 3.0], [0.1, 0.2]]))
        tensor([0, 5])

    Source: S. Momeni, C. Xiao, B. Liu, "AnaCP: Toward Upper-Bound Continual Learning via Analytic Contrastive
    Projection", NeurIPS 2025, arXiv 2511.13880.
    """

    normalizes = True
    _learns_layers = True  # the layers before the last one too
    _own_options = ("gamma", "expansion_dim", "maps", "targets", "readout", "draws", "seed")
    _projections: Tensor  # (R, L, D), θ of each map; zeros before anything is learned

    def __init__(
        self,
        in_features: int,
        *,
        gamma: float | Literal["auto"] = "auto",
        expansion_dim: int | None = None,
        maps: int = 3,
        targets: Literal["published", "unwhitened"] = "published",
        readout: Literal["draws", "nearest"] = "draws",
        draws: int = 100,
        seed: int = 0,
        num_classes: int | None = None,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(AnaCP, locals())
        super().__init__(in_features, num_classes=num_classes, max_classes=max_classes)
        self.gamma = gamma if isinstance(gamma, str) else check_number("gamma", gamma, above=0)
        width = self.expansion_dim = check_count("expansion_dim", lift_width(in_features, expansion_dim))
        self.maps, self.draws = check_count("maps", maps), check_count("draws", draws)
        if self.draws > _MOST_DRAWS:
            raise ArgumentError(f"draws must be at most {_MOST_DRAWS}, got {draws}")
        self.targets, self.readout = targets, readout
        self.seed = check_count("seed", seed, at_least=0)
        self.feature_map = FeatureMap(in_features)  # of the projected features
        if readout == "draws":
            self.feature_map = SeededMap(in_features, width, seed=seed)
        self.statistics = self._adopt(None, in_features, ("sums", "scatter"))
        for number in range(1, maps + 1):
            setattr(self, f"map_{number}", SeededMap(in_features, width, seed=seed, part=number + 1))
            setattr(self, f"lifted_{number}", self._adopt(None, width, ("sums", "gram")))
        self._projections = self._nothing()
        self._frozen_table: Mapping[str, Kind] = {
            "projections": Numbers((maps, width, in_features), torch.float64, most=LARGEST)
        }

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, Σ before anything is added to it: that of all rows around the means of their classes."""
        return self.statistics.scatter / max(self.statistics.samples, 1)

    def _nothing(self) -> Tensor:
        """Return projections to zero, which take no memory."""
        return torch.zeros(1, 1, 1, dtype=torch.float64).expand(self.maps, self.expansion_dim, self.in_features)

    def _parts(self) -> list[tuple[SeededMap, FeatureStatistics]]:
        return [(getattr(self, f"map_{n}"), getattr(self, f"lifted_{n}")) for n in range(1, self.maps + 1)]

    def _all_statistics(self) -> list[FeatureStatistics]:
        return [self.statistics, *[lifted for _, lifted in self._parts()]]

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        rows = self._prepared(batch)
        return [(self.statistics, rows), *[(lifted, lift(rows)) for lift, lifted in self._parts()]]

    def _readout_of_sums(self) -> Readout:
        classes, means = self.statistics.classes, self.statistics.means
        if not classes.numel():
            self._projections = self._nothing()
            empty = means.new_zeros(0, self.feature_map.out_features)
            return Readout.of(classes, empty, empty.new_zeros(0))
        covariance = self.covariance
        covariance.diagonal().add_(_VARIANCE)
        if not bool((means.abs() <= _LONGEST).all() & (covariance.abs() <= _LONGEST).all()):
            raise StateError(_NOT_OF_ROWS)
        targets = same_for_same(_spread(means, covariance, whiten=self.targets == "published").T, means).T
        counts = self.statistics.counts.to(torch.float64)
        square = float(counts @ targets.square().sum(dim=1))
        self._projections = torch.stack(
            [
                self._ridge(lifted.lower_gram(), targets.T @ lifted.sums, float(counts.sum()), square)
                for _, lifted in self._parts()
            ]
        )
        if self.readout == "nearest":
            return nearest_mean_readout(classes, targets)
        return self._readout_of_draws(classes, means, torch.linalg.cholesky(covariance))

    def _ridge(self, lower: Tensor, sums: Tensor, rows: float, square: float) -> Tensor:
        """Return weights (L, k) of a Gram matrix, of which the lower triangle counts, and sums (k, L)."""
        if self.gamma == "auto":
            system = spectrum(lower, sums)
            return system.solve(system.best_gamma(rows, square)[0])
        lower = lower.clone()
        lower.diagonal().add_(self.gamma)
        factor, failed = torch.linalg.cholesky_ex(lower)
        if int(failed):
            raise not_positive_definite(self.gamma, float(lower.diagonal().min()))
        return torch.cholesky_solve(sums.T, factor)

    def _readout_of_draws(self, classes: Tensor, means: Tensor, factor: Tensor) -> Readout:
        lower = new_gram(self.expansion_dim, torch.float64, means.device)
        sums = means.new_zeros(len(classes), self.expansion_dim)
        at_once = max(1, _BLOCK // self.draws)
        for start in range(0, len(classes), at_once):
            block = zip(classes[start : start + at_once].tolist(), means[start : start + at_once], strict=True)
            drawn = [correlated_rows(mean, factor, self.draws, class_id=c, seed=self.seed) for c, mean in block]
            rows = self.feature_map(self._directions(torch.cat(drawn)))
            add_gram_(lower, rows)
            sums[start : start + at_once] = rows.reshape(-1, self.draws, rows.shape[1]).sum(dim=1)
        number = float(len(classes) * self.draws)
        weight = self._ridge(lower, sums, number, number).T.contiguous()
        return Readout.of(classes, weight, weight.new_zeros(len(weight)))

    def _directions(self, rows: Tensor) -> Tensor:
        """Return f (B, D) of rows that have unit length, or were drawn."""
        parts = zip(self._parts(), self._projections.to(rows.device), strict=True)
        return torch.stack([unit_rows(lift(rows) @ projection) for (lift, _), projection in parts]).mean(dim=0)

    def _design(self, features: Tensor) -> Tensor:
        design: Tensor = self.feature_map(self._directions(unit_rows(features)))
        return design

    def _design_layers(self, dtype: torch.dtype) -> list[nn.Module]:
        parts = zip(self._parts(), self._projections.to(dtype), strict=True)
        branches = [[*lift.layers(dtype), linear_of(projection.T), L2Normalize()] for (lift, _), projection in parts]
        return [_Mean(branches), *self.feature_map.layers(dtype)]

    def _final_scores(self, scores: Tensor, centred: Tensor) -> Tensor:
        return scores if self.readout == "draws" else negative_distances(scores, centred)

    def _frozen_parts(self, leverage: bool) -> dict[str, Tensor]:
        return {"projections": self._projections}

    def _freeze(self, parts: dict[str, Tensor]) -> None:
        self._projections = parts["projections"]


def _spread(means: Tensor, covariance: Tensor, *, whiten: bool) -> Tensor:
    """Return the targets (k, D) of unit length of the class means (k, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    if not float(values.min()) > 0:
        raise StateError(_NOT_OF_ROWS)
    root = (values + _LEAST_VARIANCE).sqrt()
    whitening = (vectors / root) @ vectors.T
    centre = means.mean(dim=0)
    left, lengths, right = torch.linalg.svd((means - centre) @ whitening, full_matrices=False)
    lengths = torch.where(lengths > _NO_DIRECTION * lengths.max(), lengths + 1, 0.0)
    back = whitening if whiten else (vectors * root) @ vectors.T
    return unit_rows((left * lengths) @ right @ back + centre)


class _Mean(nn.Module):
    """The mean of what some sequences of layers give."""

    def __init__(self, branches: list[list[nn.Module]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(*branch) for branch in branches])

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([branch(features) for branch in self.branches]).mean(dim=0)
