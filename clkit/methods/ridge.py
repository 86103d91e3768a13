r"""Ridge regression on one-hot targets in closed form: the classifier of ACIL, AEF-OCL, AIR and RanPAC."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from clkit.arguments import check_arguments
from clkit.distributed import world_size
from clkit.errors import ArgumentError, ConfigurationError, NotFittedError
from clkit.methods._checks import Batch, check_count, check_number
from clkit.methods._gram import add_gram_
from clkit.methods._leave_one_out import left_out_ridge_scores, what_is_left
from clkit.methods._recursion import RecursiveLeastSquares, not_positive_definite, woodbury_update
from clkit.methods._solving import condition_number, spectrum, warn_of_lost_digits
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import Activation, FeatureMap, ProjectionInit
from clkit.methods.heads.pseudo_features import pseudo_features
from clkit.methods.heads.readout import Readout, same_for_same
from clkit.methods.statistics import FeatureStatistics

__all__ = ["AnalyticHead", "pseudo_features"]

Balance = Literal["none", "pfg", "reweight", "expected"]
Solver = Literal["gram", "recursive"]

_MOST_ROWS = 2**26  # of pseudo-features a solve, about an hour of drawing


class AnalyticHead(Head):
    r"""Ridge regression on one-hot targets, equal at any time to the one fitted to all data seen so far.

    Use it to learn classes one after the other on a fixed backbone without forgetting and without storing samples.
    With all features mapped and stacked in H (N, D) and one-hot targets Y (N, C):

    .. math:: W = (H^\top H + \gamma I)^{-1} H^\top Y

    ``gamma`` is an absolute amount, not divided by N. Learning adds to :math:`H^\top H` and to the per-class sums;
    the system is solved by Cholesky, in float64, when a prediction needs it.

    ``gamma="auto"`` chooses it at each solve by generalised cross-validation, which needs nothing but the sums of what
    is solved (balancing included): of the strengths from 10⁻⁸ to 10² times the mean eigenvalue of :math:`H^\top H`, in
    steps of a twentieth of a decade, the one with the smallest

    .. math:: \frac{n \, \mathrm{RSS}(\gamma)}{(n - \mathrm{df}(\gamma))^2}, \qquad
              \mathrm{df}(\gamma) = \mathrm{tr} \, H (H^\top H + \gamma I)^{-1} H^\top

    So it is the same after merges, unlearning and in several processes. It costs an eigendecomposition at a solve,
    about ten times what Cholesky costs, and nothing at a batch. ``chosen_gamma`` tells it, and :meth:`leave_one_out`
    keeps to it and to what balances the classes: without a row either might be another.

    Imbalance is corrected at solve time, never in what is learned; with :math:`m_c = \max_j n_j - n_c`:

    * ``"pfg"``: m_c Gaussian pseudo-features of each class join the sums (AEF-OCL);
    * ``"expected"``: their expectation joins instead, which is deterministic and cheap, but needs no lift;
    * ``"reweight"``: classes are weighted by 1/n_c, scaled to sum to the number of seen classes (AIR). Keeps a Gram
      per class, D² · 8 bytes each.

    ``solver="recursive"`` keeps :math:`R = (H^\top H + \gamma I)^{-1}` and W themselves and updates them with each
    batch (the gain form of the Woodbury identity). It pays only where a prediction is wanted after every batch; it
    cannot merge, subtract or learn in several processes, and loses digits with small gamma.

    Args:
        in_features: d, width of the features.
        gamma: Ridge strength, above 0; its scale is that of the squared features; or ``"auto"``, see above.
        expansion_dim: D, width of a fixed random lift; ``None`` for none.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"gelu"``, of the lift.
        projection_init: ``"uniform"`` or ``"normal"``, of the lift; see :class:`FeatureMap`.
        balance: ``"none"``, ``"pfg"``, ``"expected"`` or ``"reweight"``, see above.
        solver: ``"gram"`` or ``"recursive"``.
        noise: Factor of the standard deviation of pseudo-features, at least 0.
        pfg_seed: Seed of the pseudo-features.
        pfg_max_per_class: Draw at most so many rows a class and weigh them up: same expectation, bounded cost.
        clamp_min: Lower bound of pseudo-features, e.g. 0 for features that come out of a ReLU.
        bias: Append a constant 1 to the mapped features; its weight is regularised like the others.
        projection_seed: Seed of the lift.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.
        statistics: Sums to share with other heads; update them, not the head. Needs ``sums`` and ``gram``, with
            ``balance="pfg"`` or ``"expected"`` also ``squares``, with ``"reweight"`` ``class_grams`` in place of
            ``gram``; only without lift, bias and recursion.

    Raises:
        ArgumentError: If an argument is not allowed, or two exclude each other; at prediction, if the system cannot
            be factorised.

    Example:
        >>> head = AnalyticHead(2, gamma=1.0)
        >>> head.update(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 2]))
        >>> head.weight  # (diag(1, 9) + I)^-1 diag(1, 3)
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.3000]], dtype=torch.float64)
        >>> head(torch.tensor([[1.0, 1.0]]))
        tensor([[0.5000,   -inf, 0.3000]])

    Source: H. Zhuang et al., arXiv 2405.17779 (AEF-OCL); H. Zhuang et al., arXiv 2205.14922 (ACIL);
    D. Fang et al., arXiv 2408.10349 (AIR); G. Golub et al., Technometrics 21, 1979 (generalised cross-validation).
    """

    _own_options = (
        "gamma",
        "expansion_dim",
        "activation",
        "projection_init",
        "balance",
        "solver",
        "noise",
        "pfg_seed",
        "pfg_max_per_class",
        "clamp_min",
        "bias",
        "projection_seed",
    )

    def __init__(
        self,
        in_features: int,
        *,
        gamma: float | Literal["auto"] = 1.0,
        expansion_dim: int | None = None,
        activation: Activation = "relu",
        projection_init: ProjectionInit = "uniform",
        balance: Balance = "none",
        solver: Solver = "gram",
        noise: float = 1.0,
        pfg_seed: int = 0,
        pfg_max_per_class: int | None = None,
        clamp_min: float | None = None,
        bias: bool = False,
        projection_seed: int = 0,
        num_classes: int | None = None,
        max_classes: int = 65536,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        check_arguments(AnalyticHead, locals())
        super().__init__(in_features, num_classes=num_classes, max_classes=max_classes)
        self.gamma = gamma if isinstance(gamma, str) else check_number("gamma", gamma, above=0)
        self.balance = balance
        self.solver = solver
        self.noise = check_number("noise", noise, at_least=0)
        self.pfg_seed = check_count("pfg_seed", pfg_seed, at_least=0)
        self.pfg_max_per_class = (
            None if pfg_max_per_class is None else check_count("pfg_max_per_class", pfg_max_per_class)
        )
        self.clamp_min = None if clamp_min is None else check_number("clamp_min", clamp_min)
        self.bias = bool(bias)
        if balance == "expected" and expansion_dim is not None:
            raise ArgumentError(
                'balance="expected" needs expansion_dim=None: behind a lift there is no such expectation; use "pfg"'
            )
        if self.gamma == "auto" and solver == "recursive":
            raise ArgumentError('gamma="auto" needs solver="gram": recursion begins with I/gamma, before there is data')
        if balance == "reweight" and solver == "recursive":
            raise ArgumentError('balance="reweight" needs solver="gram": it weighs sums that recursion does not keep')
        if statistics is not None and (bias or solver == "recursive" or expansion_dim is not None):
            raise ArgumentError("statistics can be shared only without expansion_dim, bias and recursion")
        self.feature_map = FeatureMap(
            in_features, expansion_dim, activation=activation, init=projection_init, seed=projection_seed
        )
        self.expansion_dim, self.activation = expansion_dim, activation
        self.projection_init, self.projection_seed = projection_init, projection_seed

        width = self.feature_map.out_features + self.bias
        moments = ("sums", "squares") if balance in ("pfg", "expected") else ()
        sums = ("sums", "class_grams" if balance == "reweight" else "gram")
        self._factor: tuple[int, Tensor] | None = None
        self._chosen, self._gcv_error = 1.0, math.nan  # by the sums, where they choose
        self._warned = False
        self.raw_statistics: FeatureStatistics | None = None  # of the features before the lift
        self.recursion: RecursiveLeastSquares | None = None
        if solver == "recursive":
            self.statistics = self._adopt(None, in_features, moments)
            self.recursion = RecursiveLeastSquares(width, float(self.gamma))
        elif self.feature_map.is_identity:
            self.statistics = self._adopt(statistics, width, (*sums, *moments))
        else:
            self.statistics = self._adopt(None, width, sums)
            self.raw_statistics = self._adopt(None, in_features, moments) if moments else None

    @property
    def weight(self) -> Tensor:
        """(D, C) float64, W with a zero column for each class not seen; with ``bias`` its last row belongs to the 1."""
        readout = self._solved()
        compact = torch.cat([readout.weight.T, readout.bias[None, :]]) if self.bias else readout.weight.T
        width = readout.size if self.num_classes is None else self.num_classes
        weight = torch.zeros(compact.shape[0], width, dtype=torch.float64, device=compact.device)
        return weight.index_copy_(1, readout.classes, compact)

    @property
    def chosen_gamma(self) -> float:
        """The ridge strength of the present solution; NaN if it is to be chosen and nothing was learned."""
        if self.gamma != "auto":
            return self.gamma
        return self._chosen if self._solved().size else math.nan

    @property
    def gcv_error(self) -> float:
        """What ``gamma="auto"`` has minimised: the squared error of left-out rows that it foresees; else NaN."""
        return self._gcv_error if self._solved().size else math.nan

    def leverage(self, features: Tensor, *, left_out: bool = False) -> Tensor:
        r"""Return how far features are from what was learned.

        .. math:: u(x) = \varphi(x) (H^\top H + \gamma I)^{-1} \varphi(x)^\top

        ``s² (1 + u)``, with s² the residual variance, is the predictive variance of the Bayesian linear model with
        the same prior. Pseudo-features and class weights do not enter.

        Args:
            features: (B, in_features).
            left_out: Whether these are rows that are in the sums exactly once, and each is to be left out of them:
                u / (1 - u).

        Returns:
            (B,), at least 0; float64 for float64 features, else float32.

        Raises:
            NotFittedError: If nothing was learned.
            BatchError: If a row that is to be left out cannot be in the sums.
        """
        self._check_sums()
        if not self.statistics.classes.numel():
            raise NotFittedError("this AnalyticHead has learned nothing yet: call update first")
        leverage = self._leverage_of(self._check_features(features))
        if left_out:
            leverage = leverage / what_is_left(leverage)
        return (leverage if features.dtype == torch.float64 else leverage.to(torch.float32)).to(features.device)

    def reset(self) -> None:
        """Forget everything learned; options and projection stay."""
        super().reset()
        if self.recursion is not None:
            self.recursion.reset()

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        mapped = self._mapped(batch.features)
        if self.recursion is not None:
            return [(self.recursion, mapped), (self.statistics, batch.features)]
        rows: list[tuple[Any, Tensor]] = [(self.statistics, mapped)]
        return rows if self.raw_statistics is None else [*rows, (self.raw_statistics, batch.features)]

    def _all_statistics(self) -> list[FeatureStatistics]:
        return [self.statistics] if self.raw_statistics is None else [self.statistics, self.raw_statistics]

    def _take_bad(self) -> int:
        number = super()._take_bad()
        if number and self.recursion is not None:
            self.recursion.keep(self.statistics.classes.cpu().numpy())
        return number

    def _mapped(self, features: Tensor) -> Tensor:
        """Return the rows that products are formed of: lifted, and with the constant 1."""
        mapped: Tensor = self.feature_map(features)
        return pad(mapped, (0, 1), value=1.0) if self.bias else mapped

    def _leverage_of(self, rows: Tensor) -> Tensor:
        if self.recursion is None:
            return self._leverage_under(self._real_factor(), rows)
        design = self._mapped(rows)
        return (design @ self.recursion.inverse * design).sum(dim=1).clamp(min=0)

    def _leverage_under(self, factor: Tensor, rows: Tensor) -> Tensor:
        white: Tensor = torch.linalg.solve_triangular(factor, self._mapped(rows).T, upper=False)
        return white.square().sum(dim=0)

    def _frozen_parts(self, leverage: bool) -> dict[str, Tensor]:
        return {"factor": self._real_factor()} if leverage and self.recursion is None else {}

    def _left_out(self, rows: Tensor, at: Tensor, readout: Readout) -> Tensor:
        scores = self._score(rows, readout)
        if self.balance == "none" or self.recursion is not None:
            if self.balance != "none":
                raise ConfigurationError(f'balance={self.balance!r} has a leave-one-out form with solver="gram" only')
            return left_out_ridge_scores(scores, self._leverage_of(rows), at)
        lower, _, _, weights = self._balanced_system()
        taken = self._leverage_under(self._factorised(lower, self.chosen_gamma), rows)
        return left_out_ridge_scores(scores, taken if weights is None else taken * weights[at], at)

    def _check_allowed(self, verb: str) -> None:
        super()._check_allowed(verb)
        if self.recursion is not None and verb != "reset" and (verb in ("merge", "subtract") or world_size() > 1):
            raise ConfigurationError(
                f'solver="recursive" cannot {verb} here: it keeps an inverse, not sums, and learns in one process '
                f'only; use solver="gram"'
            )

    def _readout_of_sums(self) -> Readout:
        classes = self.statistics.classes
        if not classes.numel():
            empty = torch.zeros(0, self.feature_map.out_features, dtype=torch.float64, device=classes.device)
            return Readout.of(classes, empty, empty.new_zeros(0))
        compact = self._balanced_recursion() if self.recursion is not None else self._solved_sums()
        if self.bias:
            return Readout.of(classes, compact[:-1].T.contiguous(), compact[-1].clone())
        return Readout.of(classes, compact.T.contiguous(), compact.new_zeros(compact.shape[1]))

    def _solved_sums(self) -> Tensor:
        """Return W (D, k) of the balanced system."""
        if self.balance == "none" and self.gamma != "auto":
            sums = self.statistics.sums.to(torch.float64)
            return same_for_same(torch.cholesky_solve(sums.T, self._real_factor()), sums)
        lower, sums, rows, weights = self._balanced_system()
        if self.gamma != "auto":
            return same_for_same(torch.cholesky_solve(sums.T, self._factorised(lower, self.gamma)), sums)
        system = spectrum(lower, sums)
        square = rows if weights is None else float((weights * self.statistics.counts).sum())
        self._chosen, self._gcv_error = system.best_gamma(rows, square)
        return same_for_same(system.solve(self._chosen), sums)

    def _balanced_system(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """Return Gram matrix (lower) and class sums with what balances them, how many rows they are, class weights."""
        sums, counts = self.statistics.sums.to(torch.float64), self.statistics.counts.to(torch.float64)
        if self.balance == "reweight":
            weights = (1 / counts) * (counts.numel() / (1 / counts).sum())
            lower = torch.einsum("c,cij->ij", weights, self.statistics.lower_class_grams().to(torch.float64))
            return lower, sums * weights[:, None], float(counts.sum()), weights
        lower = self.statistics.lower_gram().to(torch.float64, copy=True)
        for position, drawn, weight in self._pseudo_rows():
            add_gram_(lower, drawn, weight)
            if position is not None:
                sums[position] += weight * drawn.sum(dim=0)
        rows = float(counts.sum()) if self.balance == "none" else float(counts.max()) * counts.numel()
        return lower, sums, rows, None

    def _balanced_recursion(self) -> Tensor:
        """Return W (D, k) after the pseudo-features, on copies."""
        assert self.recursion is not None
        inverse, weight = self.recursion.inverse, self.recursion.weight
        for position, rows, factor in self._pseudo_rows():
            targets = rows.new_zeros(rows.shape[0], weight.shape[1])
            if position is not None:
                targets[:, position] = factor**0.5
            inverse, weight = woodbury_update(inverse, weight, rows * factor**0.5, targets, self.recursion.gamma)
        return weight

    def _pseudo_rows(self) -> Iterator[tuple[int | None, Tensor, float]]:
        """Yield rows that balance the classes: position of the class (``None`` for a target of zero), rows, weight."""
        if self.balance == "none":
            return
        moments = self.statistics if self.raw_statistics is None else self.raw_statistics
        counts = moments.counts
        missing = counts.max() - counts
        if self.balance == "pfg":
            wanted = int(missing.double().clamp(max=self.pfg_max_per_class or _MOST_ROWS * 2).sum())
            if wanted > _MOST_ROWS:
                raise ConfigurationError(
                    f'balance="pfg" would draw {wanted} pseudo-features or more at each solve, of {_MOST_ROWS} at '
                    f"most; pass a smaller pfg_max_per_class (it is {self.pfg_max_per_class})"
                )
        means, deviations = moments.means[:, : self.in_features], moments.deviations[:, : self.in_features]
        for position, (class_id, count) in enumerate(zip(moments.classes.tolist(), missing.tolist(), strict=True)):
            if self.balance == "expected":
                if count:
                    yield position, self._mapped(means[position : position + 1]), float(count)
                continue
            drawn = count if self.pfg_max_per_class is None else min(count, self.pfg_max_per_class)
            blocks = pseudo_features(
                means[position],
                deviations[position],
                drawn,
                class_id=class_id,
                seed=self.pfg_seed,
                noise=self.noise,
                clamp_min=self.clamp_min,
            )
            for rows in blocks:
                yield position, self._mapped(rows), count / drawn
        if self.balance == "expected":  # the products sum to sum_c m_c (mu_c mu_c^T + noise^2 diag(sigma_c^2))
            spread = torch.diag(self.noise * (missing[:, None] * deviations.square()).sum(dim=0).sqrt())
            yield None, pad(spread, (0, 1)) if self.bias else spread, 1.0

    def _real_factor(self) -> Tensor:
        """Return the Cholesky factor of the system without any balancing, kept until more is learned."""
        version = self.statistics.version
        if self._factor is None or self._factor[0] != version:
            if self.balance == "reweight":
                lower = self.statistics.lower_class_grams().to(torch.float64).sum(dim=0)
            else:
                lower = self.statistics.lower_gram().to(torch.float64, copy=True)
            self._factor = (version, self._factorised(lower, self.chosen_gamma))
        return self._factor[1]

    def _factorised(self, lower: Tensor, gamma: float) -> Tensor:
        """Return the Cholesky factor of ``lower + gamma I``; ``lower`` is used up."""
        lower.diagonal().add_(gamma)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(lower)
        if int(failed):
            raise not_positive_definite(gamma, float(lower.diagonal().min()))
        if not self._warned:
            advice = 'use gamma="auto", raise gamma, or take the mean off the features and scale them'
            self._warned = warn_of_lost_digits(
                condition_number(factor), f"the ridge system with gamma={gamma:.3g}", advice
            )
        return factor
