r"""Stationarising features: numbers of an input that keep their meaning while the predictor and its data change.

An error predictor reads these in place of the input: how far it is from what was learned, and how sure the predictor
is of it. All are computed from one :class:`Snapshot`, with no data that are newer. With :math:`m_c` the squared
Mahalanobis distance to class c, :math:`m_1 \leq m_2` the two smallest, D the width, v the leverage, z the scores of the
predictor, highest first, and p their softmax:

================ ==================================================== ==== =============================
name             value                                                sign needs
================ ==================================================== ==== =============================
``log_maha``     :math:`\log(m_1 / D + 10^{-6})`                      \+
``gap``          :math:`\min((m_2 - m_1) / D, 50)`, 50 with one class \-
``log_leverage`` :math:`\log(v + 10^{-12})`                           \+
``log_knn``      log of the distance to the 5th nearest memory row,   \+   memory
                 :math:`+ 10^{-6}`
``confidence``   :math:`1 - \max p`, or :math:`1 - \max z`            \+
``margin``       :math:`-(z_1 - z_2)`, -50 with one class             \+
``entropy``      :math:`H(p)`                                         \+   probabilities
``energy``       :math:`-\log \sum_c e^{z_c}`                         \+   probabilities
``log_density``  log-density of a Gaussian a class, shared covariance \-
``gmm``          that of a mixture of Gaussians                       \-   memory
``kde``          that of a Gaussian kernel at each memory row         \-   memory
================ ==================================================== ==== =============================

The sign says whether an error is to be expected where the number is high (+) or low (-). Distances to classes are
divided by D, logarithms are natural. A value is infinite where nothing is left to compare with, and a row is NaN where
its features are not finite or its scores are NaN: such rows are no records.

Source: S. Lahlou et al., "DEUP: Direct Epistemic Uncertainty Prediction", TMLR 2023, arXiv 2102.08501, for the idea;
K. Lee et al., arXiv 1807.03888 (Mahalanobis distance); Y. Sun et al., arXiv 2204.06507 (nearest neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, did_you_mean
from clkit.methods._leave_one_out import class_positions, left_out_distances, squared_distances, what_is_left
from clkit.methods._row_densities import kernel_bandwidth, kernel_log_density, mixture_log_density
from clkit.methods._state import exact
from clkit.methods.snapshot import Snapshot, gaussian_rows

__all__ = [
    "FEATURE_SIGNS",
    "Snapshot",
    "gaussian_rows",
    "left_out_features",
    "novel_features",
    "stationarising_features",
]

FEATURE_SIGNS = {
    "log_maha": 1,
    "gap": -1,
    "log_leverage": 1,
    "log_knn": 1,
    "confidence": 1,
    "margin": 1,
    "entropy": 1,
    "energy": 1,
    "log_density": -1,
    "gmm": -1,
    "kde": -1,
}
"""The names of the features, each with the direction in which an error is to be expected, for monotone models."""

_MEMORY = ("log_knn", "gmm", "kde")
_LOGITS = ("entropy", "energy")
_OF_SCORES = ("confidence", "margin", *_LOGITS)
_NEIGHBOUR = 5
_LARGEST_GAP = 50.0  # also between the best score and that of a rival that is not there
_LARGEST_LEVERAGE = 0.999  # of a row whose class is dropped
_LOG_2PI = math.log(2 * math.pi)
_SAME = 1e-6  # a row is in the memory if one is so near, relative to its length


def stationarising_features(
    names: Sequence[str], snapshot: Snapshot | None, features: Tensor, scores: Tensor, *, probabilities: bool
) -> Tensor:
    """Return the features of inputs that were not learned.

    Args:
        names: Which, in the order of the columns; see :data:`FEATURE_SIGNS`.
        snapshot: What is known; ``None`` will do where all names are of scores alone.
        features: (B, D) of any floating dtype, as the statistics of the snapshot have learned them.
        scores: (B, C) of the predictor, of any floating dtype, ``-inf`` for classes not seen.
        probabilities: Whether the softmax of the scores are probabilities: they are logits, not distances or the
            scores of a ridge regression.

    Returns:
        (B, K) float64 on the device of the snapshot.

    Raises:
        ArgumentError: If a name is not known.
        BatchError: If features or scores have the wrong shape.
        ConfigurationError: If a feature needs a memory or probabilities, and there are none.

    Example:
        >>> from clkit.methods import FeatureStatistics
        >>> statistics = FeatureStatistics(2, scatter=True)
        >>> rows, targets = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> statistics.update(rows, targets)
        >>> snapshot = Snapshot.of(statistics, shrinkage=0.5)
        >>> x, z = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> stationarising_features(["log_maha", "gap", "margin", "log_density"], snapshot, x, z, probabilities=False)
        tensor([[ 0.6931, 16.0000, -0.2500, -3.6940]], dtype=torch.float64)
    """
    with exact():
        return _columns(names, _View(snapshot, features, scores, probabilities))


def left_out_features(
    names: Sequence[str],
    snapshot: Snapshot,
    features: Tensor,
    targets: Tensor,
    scores: Tensor,
    leverage: Tensor | None = None,
    *,
    probabilities: bool,
) -> Tensor:
    r"""Return the features of rows that were learned, as if each had not been: its own part is taken out.

    Out of the mean of its class, the covariance (of which N and the trace term stay) and the priors of ``log_density``
    for all that comes from the sums, out of the memory for what comes from that. So a row must be in the statistics
    exactly once, and where a name needs the memory also in that. ``gmm`` has no such form.

    Args:
        names: As for :func:`stationarising_features`.
        snapshot: What is known, these rows included.
        features: (B, D), the numbers that were learned.
        targets: (B,) class ids that they were learned as.
        scores: (B, C) of the predictor without the row, such as ``AnalyticHead.leave_one_out`` gives.
        leverage: (B,) without the row; by default v / (1 - v) of the leverage v that the snapshot knows.
        probabilities: As for :func:`stationarising_features`.

    Returns:
        (B, K) float64 on the device of the snapshot.

    Raises:
        ArgumentError: If a name is not known, or is ``"gmm"``.
        BatchError: If a tensor has the wrong shape, or a row cannot have been learned.
        ConfigurationError: As for :func:`stationarising_features`.

    Example:
        >>> from clkit.methods import FeatureStatistics
        >>> rows, targets = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> statistics = FeatureStatistics(2, scatter=True)
        >>> statistics.update(rows, targets)
        >>> snapshot = Snapshot.of(statistics, shrinkage=0.5)
        >>> left_out_features(["gap"], snapshot, rows[:1], targets[:1], torch.zeros(1, 2), probabilities=False)
        tensor([[29.]], dtype=torch.float64)
    """
    if "gmm" in names:
        raise ArgumentError("'gmm' has no left-out form: a mixture is fitted anew, not updated; use 'kde'")
    with exact():
        return _columns(names, _View(snapshot, features, scores, probabilities, "row", targets, leverage))


def novel_features(
    names: Sequence[str],
    snapshot: Snapshot,
    features: Tensor,
    targets: Tensor,
    scores: Tensor,
    leverage: Tensor | None = None,
    *,
    probabilities: bool,
    learned: bool = True,
) -> Tensor:
    r"""Return the features of rows as if their class had never been seen: what novelties look like.

    The class is dropped from scores, distances, priors and memory; nothing is solved again. Of rows that were learned,
    their own part is taken out of the covariance too. The loss that goes with them is that of a class without a score.

    Args:
        names: As for :func:`stationarising_features`.
        snapshot: What is known, at least two classes.
        features: (B, D).
        targets: (B,) class ids, of classes seen.
        scores: (B, C) of the predictor; the column of a row's class is not read.
        leverage: (B,) of the rows; by default v of the snapshot, as v / (1 - min(v, 0.999)) where they were learned.
        probabilities: As for :func:`stationarising_features`.
        learned: Whether these rows are in the statistics, exactly once; those of :func:`gaussian_rows` are not.

    Returns:
        (B, K) float64 on the device of the snapshot; not finite where no other class is there.

    Raises:
        ArgumentError: If a name is not known.
        BatchError: If a tensor has the wrong shape, or a class was not seen.
        ConfigurationError: As for :func:`stationarising_features`.

    Example:
        >>> from clkit.methods import FeatureStatistics
        >>> rows, targets = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]), torch.tensor([0, 0, 1, 1])
        >>> statistics = FeatureStatistics(2, scatter=True)
        >>> statistics.update(rows, targets)
        >>> snapshot = Snapshot.of(statistics, shrinkage=0.5)
        >>> novel_features(["log_maha"], snapshot, rows[:1], targets[:1], torch.zeros(1, 2), probabilities=False).exp()
        tensor([[33.0000]], dtype=torch.float64)
    """
    with exact():
        view = _View(snapshot, features, scores, probabilities, "class", targets, leverage, learned)
        return _columns(names, view)


class _View:
    """What is known to some rows of the snapshot: everything, all but the row itself, or all but its class."""

    def __init__(
        self,
        snapshot: Snapshot | None,
        features: Tensor,
        scores: Tensor,
        probabilities: bool,
        without: Literal["nothing", "row", "class"] = "nothing",
        targets: Tensor | None = None,
        leverage: Tensor | None = None,
        learned: bool = True,
    ) -> None:
        self._snapshot, self.probabilities, self.without, self.learned = snapshot, probabilities, without, learned
        rows = features.detach().to(torch.float64) if snapshot is None else snapshot.relative(features)
        finite = rows.isfinite().all(dim=1)
        self.rows = torch.where(finite[:, None], rows, 0.0)
        self.number = torch.arange(len(rows), device=rows.device)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(rows) or not scores.shape[1]:
            seen = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise BatchError(f"scores must have shape ({len(rows)}, C), one row for each of the features, got {seen}")
        self.scores = scores.detach().to(device=rows.device, dtype=torch.float64, copy=True)
        self.usable = finite & ~self.scores.isnan().any(dim=1)
        self.at = None if targets is None else class_positions(self.snapshot.classes, targets, len(rows))
        if without == "class" and self.at is not None and len(rows):
            dropped = self.snapshot.classes[self.at]
            if int(dropped.max()) >= scores.shape[1]:
                raise BatchError(f"scores have {scores.shape[1]} columns and a target is {int(dropped.max())}")
            self.scores[self.number, dropped] = -torch.inf
        if leverage is not None and leverage.shape != (len(rows),):
            raise BatchError(f"leverage must have shape ({len(rows)},), got {tuple(leverage.shape)}")
        self._leverage = leverage

    @property
    def snapshot(self) -> Snapshot:
        assert self._snapshot is not None  # or it was refused
        return self._snapshot

    @cached_property
    def leverage(self) -> Tensor:
        """(B,) float64."""
        if self._leverage is not None:
            return self._leverage.detach().to(self.rows)
        known = self.snapshot.leverage(self.rows + self.snapshot.offset).detach().to(self.rows)
        if self.without == "row":
            return known / what_is_left(known)
        return known / (1 - known.clamp(max=_LARGEST_LEVERAGE)) if self.without == "class" and self.learned else known

    @cached_property
    def distances(self) -> tuple[Tensor, Tensor]:
        """(B, k) squared Mahalanobis distances, and (B,) the logarithm of the covariance's determinant."""
        known = self.snapshot
        white = known.whitened(self.rows)
        determinant = self.rows.new_full((len(self.rows),), known.log_determinant)
        if self.at is None or not self.learned:
            distances = squared_distances(white, known.white_means)
        else:
            weight = (1 - known.shrinkage) / float(known.counts.sum())
            distances, left = left_out_distances(white, known.white_means, known.counts, self.at, weight)
            determinant += left.log()
        if self.without == "class":
            distances[self.number, self.at] = torch.inf
        return distances, determinant

    @cached_property
    def nearest(self) -> Tensor:
        """(B, 2) the two smallest of these distances, infinite where there is none."""
        distances = self.distances[0]
        two = distances.topk(min(2, distances.shape[1]), largest=False).values
        return two if two.shape[1] == 2 else torch.cat([two, torch.full_like(two, torch.inf)], dim=1)

    @cached_property
    def to_memory(self) -> Tensor:
        """(B, M) squared distances to the rows of the memory, infinite for those that are left out."""
        rows, classes = self.memory
        squared = squared_distances(self.rows, rows, self.snapshot.memory_squares)
        if self.without == "class":
            assert self.at is not None
            squared[self.snapshot.classes[self.at][:, None] == classes] = torch.inf
        elif self.without == "row" and len(self.rows):
            lengths = torch.linalg.vector_norm(self.rows + self.snapshot.offset, dim=1)
            own = squared.argmin(dim=1) if len(rows) else None
            far = None if own is None else torch.linalg.vector_norm(self.rows - rows[own], dim=1) > _SAME * lengths
            if own is None or far is None or bool(far.any()):
                row = 0 if far is None else int(far.nonzero()[0])
                raise BatchError(f"row {row} is not in the memory of the snapshot, so it cannot be left out of it")
            squared[self.number, own] = torch.inf
        return squared

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        assert self.snapshot.memory is not None  # or it was refused
        return self.snapshot.memory

    def log_maha(self) -> Tensor:
        return (self.nearest[:, 0] / self.snapshot.width + 1e-6).log()

    def gap(self) -> Tensor:
        first, second = self.nearest.unbind(dim=1)
        return torch.where(second.isinf(), _LARGEST_GAP, (second - first) / self.snapshot.width).clamp(max=_LARGEST_GAP)

    def log_leverage(self) -> Tensor:
        return (self.leverage + 1e-12).log()

    def log_knn(self) -> Tensor:
        squared, (rows, _) = self.to_memory, self.memory
        if not len(rows):
            return self.rows.new_full((len(self.rows),), torch.inf)
        near, index = squared.topk(min(_NEIGHBOUR, len(rows)), largest=False)
        last = near.isfinite().sum(dim=1) - 1  # with fewer rows the farthest of them
        neighbour = rows[index.gather(1, last.clamp(min=0)[:, None])[:, 0]]
        distance = torch.linalg.vector_norm(
            self.rows - neighbour, dim=1
        )  # the product that found it has lost digits of small distances
        return torch.where(last < 0, torch.inf, (distance + 1e-6).log())

    def confidence(self) -> Tensor:
        return 1 - (self.scores.softmax(dim=1) if self.probabilities else self.scores).amax(dim=1)

    def margin(self) -> Tensor:
        if self.scores.shape[1] == 1:
            return torch.full_like(self.scores[:, 0], -_LARGEST_GAP)
        first, second = self.scores.topk(2).values.unbind(dim=1)
        return torch.where(second.isneginf() & first.isfinite(), -_LARGEST_GAP, second - first)

    def entropy(self) -> Tensor:
        terms: Tensor = torch.special.entr(self.scores.softmax(dim=1))
        return terms.sum(dim=1)

    def energy(self) -> Tensor:
        return -self.scores.logsumexp(dim=1)

    def log_density(self) -> Tensor:
        distances, determinant = self.distances
        counts = self.snapshot.counts.to(torch.float64).repeat(len(self.rows), 1)
        if self.at is not None and self.learned:
            counts[self.number, self.at] -= 1
        if self.without == "class":
            counts[self.number, self.at] = 0.0
        shares = (counts / counts.sum(dim=1, keepdim=True)).log()
        return (shares - distances / 2).logsumexp(dim=1) - (determinant + self.snapshot.width * _LOG_2PI) / 2

    def gmm(self) -> Tensor:
        rows, classes = self.memory
        if self.without != "class" or self.at is None:
            return mixture_log_density(self.rows, rows, classes)
        density, dropped = self.rows.new_zeros(len(self.rows)), self.snapshot.classes[self.at]
        for class_id in set(dropped.tolist()):
            which, kept = dropped == class_id, classes != class_id
            density[which] = mixture_log_density(self.rows[which], rows[kept], classes[kept])
        return density

    def kde(self) -> Tensor:
        return kernel_log_density(self.to_memory, kernel_bandwidth(self.memory[0]), self.snapshot.width)


def _columns(names: Sequence[str], view: _View) -> Tensor:
    for name in names:
        if name not in FEATURE_SIGNS:
            raise ArgumentError(f"there is no stationarising feature {name!r}{did_you_mean(name, FEATURE_SIGNS)}")
        if name not in _OF_SCORES and view._snapshot is None:
            raise ConfigurationError(f"the feature {name!r} needs a snapshot of what is known, got None")
        if name in _MEMORY and view.snapshot.memory is None:
            raise ConfigurationError(f"the feature {name!r} needs a memory: give one to Snapshot.of")
        if name in _LOGITS and not view.probabilities:
            raise ConfigurationError(
                f"the feature {name!r} needs scores whose softmax are probabilities, which probabilities=False denies"
            )
    values = [getattr(view, name)() for name in names]
    table = torch.stack(values, dim=1) if values else view.rows.new_zeros(len(view.rows), 0)
    return torch.where(view.usable[:, None], table, torch.nan)
