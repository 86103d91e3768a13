r"""The nearest-mean classifier: one mean feature per class, predict the class of the nearest."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from clkit.arguments import check_arguments
from clkit.methods._checks import Batch
from clkit.methods._leave_one_out import left_out_means
from clkit.methods.heads.base import Head
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.readout import Readout
from clkit.methods.heads.unit_length import unit_rows

__all__ = ["NearestMeanHead"]

Metric = Literal["janson", "euclidean", "icarl", "cosine"]


class NearestMeanHead(Head):
    r"""Nearest class mean on fixed features; exact for any order, batch size and number of passes.

    Use it as the floor that every continual learner on pretrained features must beat: it has nothing to tune, costs
    nothing to learn, and class counts do not enter its decision. With :math:`g = f / \lVert f \rVert`:

    ============= ======================== =============================== =========================
    ``metric``    mean of class c          score                           known from
    ============= ======================== =============================== =========================
    ``janson``    mean of g                :math:`-\lVert g - M_c\rVert^2` Janson et al. 2022
    ``euclidean`` mean of f                :math:`-\lVert f - M_c\rVert^2` textbook, ``NearestCentroid``
    ``icarl``     mean of g, scaled to 1   :math:`-\lVert g - M_c\rVert^2` iCaRL
    ``cosine``    mean of f, scaled to 1   :math:`g \cdot M_c`             SimpleCIL, RanPAC's NCM rows
    ============= ======================== =============================== =========================

    Distances are computed in float64 after the mean of all class means is taken off both sides, so that a common
    offset of the features does not change the winner. A zero feature vector stays zero, counts as a sample and is
    warned about once (on a CPU) where features are normalised.

    Args:
        in_features: D, width of the features.
        metric: See the table.
        num_classes: Fixed number of score columns; ``None`` for the largest id seen + 1.
        max_classes: Class ids must be below this.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> import torch
        >>> head = NearestMeanHead(2, metric="euclidean")
        >>> head.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 2]))
        >>> head(torch.tensor([[1.0, 1.0]]))
        tensor([[ -1., -inf, -10.]])
        >>> head.predict(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        tensor([0, 2])

    Source: P. Janson, W. Zhang, R. Aljundi, M. Elhoseiny, arXiv 2210.04428.
    """

    _own_options = ("metric",)

    def __init__(
        self,
        in_features: int,
        *,
        metric: Metric = "janson",
        num_classes: int | None = None,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(NearestMeanHead, locals())
        super().__init__(in_features, num_classes=num_classes, max_classes=max_classes)
        self.metric = metric
        self.normalizes = metric != "euclidean"
        self.feature_map = FeatureMap(in_features)
        self.statistics = self._adopt(None, in_features, ("sums",))

    @property
    def means(self) -> Tensor:
        """(k, D) float64, the means that features are compared with, in the order of :attr:`classes`."""
        return self._scaled(self.statistics.means)

    def _design(self, features: Tensor) -> Tensor:
        return unit_rows(features) if self.normalizes else features  # never lifted

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        rows = self._prepared(batch)
        return [(self.statistics, batch.features if self.metric == "cosine" else rows)]

    def _left_out(self, rows: Tensor, at: Tensor, readout: Readout) -> Tensor:
        design = self._design(rows)
        averaged = rows if self.metric == "cosine" else design
        own = self._scaled(left_out_means(averaged, self.statistics.means, self.counts, at))
        score = (design * own).sum(dim=1) if self.metric == "cosine" else -(design - own).square().sum(dim=1)
        return self._score(rows, readout).scatter(1, at[:, None], score[:, None])

    def _scaled(self, means: Tensor) -> Tensor:
        return unit_rows(means) if self.metric in ("icarl", "cosine") else means

    def _readout_of_sums(self) -> Readout:
        classes, means = self.statistics.classes, self._scaled(self.statistics.means)
        if self.metric == "cosine":
            return Readout.of(classes, means, means.new_zeros(means.shape[0]))
        return nearest_mean_readout(classes, means)

    def _final_scores(self, scores: Tensor, centred: Tensor) -> Tensor:
        return scores if self.metric == "cosine" else negative_distances(scores, centred)


def nearest_mean_readout(classes: Tensor, means: Tensor) -> Readout:
    r"""Return the linear form :math:`2 (x-o) \cdot (\mu_c-o) - \lVert \mu_c-o \rVert^2`, o the mean of means."""
    if not means.shape[0]:
        return Readout.of(classes, means, means.new_zeros(0))
    offset = means.mean(dim=0)
    centred = means - offset
    return Readout.of(classes, 2 * centred, -centred.square().sum(dim=1), offset)


def negative_distances(scores: Tensor, centred: Tensor) -> Tensor:
    """Turn the linear form into minus squared distances; rounding cannot make one positive."""
    return (scores - centred.square().sum(dim=1, keepdim=True)).clamp(max=0)
