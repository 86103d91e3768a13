r"""Whether models of a sequence can search each other's galleries: functions of a matrix, and ``torchmetrics`` objects.

``M[i, j]`` is the score of queries by model i in the gallery of model j, for :math:`i \geq j`, counted from 0: a (T, T)
matrix whose entries above the diagonal are not read. Model i is compatible with model j if ``M[i, j] > M[j, j]``: it
finds more in the old gallery than the old model did. An entry that a definition needs and that is missing (``NaN``)
makes the value ``NaN``; a score of exactly 0 counts. Functions take tensors, NumPy arrays or nested lists and raise an
:class:`~clkit.errors.ArgumentError` for what is no square matrix.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.metrics import figures, retrieval
from clkit.metrics._exact_metric import ExactMetric
from clkit.metrics.functional import Array, as_floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AverageCompatibility",
    "AverageMultiModelAccuracy",
    "BackwardCompatibility",
    "CompatibilityMatrix",
    "ForwardCompatibility",
    "MultiModelAccuracyCurve",
    "average_compatibility",
    "average_multi_model_accuracy",
    "backward_compatibility",
    "forward_compatibility",
    "multi_model_accuracy_curve",
]

_MOST = 10_000_000  # models, pairs and neighbours: what can be counted at all

Score = Literal["identification", "verification", "recall", "map"]


def average_compatibility(matrix: Array, *, strict: bool = True) -> float:
    r"""Return the share of pairs of models that are compatible: :math:`\frac{2}{T(T-1)} \sum_{i>j} [M_{ij} > M_{jj}]`.

    From arXiv 2111.07632. Where both are equal the pair counts as incompatible, as in the code of arXiv 2405.02581;
    ``strict=False`` counts it as compatible, as older code does.

    A float in [0, 1]; ``NaN`` with one model.

    Example:
        >>> M = [[0.5, None, None], [0.5, 0.6, None], [0.4, 0.7, 0.7]]
        >>> round(average_compatibility(M), 4), round(average_compatibility(M, strict=False), 4)
        (0.3333, 0.6667)
    """
    M = _square(matrix)
    below = torch.ones_like(M, dtype=torch.bool).tril(-1)
    if len(M) < 2 or bool(M[below | torch.eye(len(M), dtype=torch.bool)].isnan().any()):
        return nan
    own = M.diagonal()
    better = own < M if strict else own <= M
    return float(better[below].double().mean())


def average_multi_model_accuracy(matrix: Array) -> float:
    r"""Return the mean score over all pairs and all models: :math:`\frac{2}{T(T+1)} \sum_{i \geq j} M_{ij}`.

    From arXiv 2111.07632 ("AM"; "AA" in the code of arXiv 2405.02581, which leaves scores of 0 out).

    A float in [0, 1]; ``NaN`` without a model.

    Example:
        >>> round(average_multi_model_accuracy([[0.5, None], [0.0, 0.6]]), 4)
        0.3667
    """
    M = _square(matrix)
    return float(M[torch.ones_like(M, dtype=torch.bool).tril()].mean())


def multi_model_accuracy_curve(matrix: Array) -> Tensor:
    """Return :func:`average_multi_model_accuracy` of the first models alone, for one, two, … T of them: (T,) float64.

    Example:
        >>> multi_model_accuracy_curve([[0.5, None], [0.25, 0.75]])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    rows = _square(matrix).tril().sum(dim=1)  # a missing entry above the diagonal is taken off, below it is not
    number = torch.arange(1, len(rows) + 1)
    return rows.cumsum(0) / (number * (number + 1) / 2)


def backward_compatibility(matrix: Array) -> float:
    r"""Return how much the last model gains in older galleries: :math:`\frac{1}{T-1} \sum_{j<T} (M_{Tj} - M_{jj})`.

    From arXiv 2211.09032. A float in [-1, 1]; ``NaN`` with one model.

    Example:
        >>> backward_compatibility([[0.5, None], [0.75, 0.6]])
        0.25
    """
    M = _square(matrix)
    return float((M[-1] - M.diagonal())[:-1].mean()) if len(M) > 1 else nan


def forward_compatibility(matrix: Array) -> float:
    r"""Return what a gallery one model old costs: :math:`\frac{1}{T-1} \sum_{i>1} (M_{i,i-1} - M_{ii})`.

    From arXiv 2211.09032. A float in [-1, 1]; ``NaN`` with one model.

    Example:
        >>> forward_compatibility([[0.5, None], [0.5, 0.75]])
        -0.25
    """
    M = _square(matrix)
    return float((M.diagonal(-1) - M.diagonal()[1:]).mean()) if len(M) > 1 else nan


class _CompatibilityMetric(ExactMetric):
    """What the metrics of the matrix share; scores add up over queries, so that batches and processes do."""

    higher_is_better: bool | None = True
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    sums: Tensor
    counts: Tensor

    _dimensions = 0
    _label = ""

    def __init__(
        self,
        models: int,
        score: Score = "identification",
        *,
        k: int = 1,
        pairs: int = 6000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_arguments(_CompatibilityMetric, locals())
        super().__init__(**kwargs)
        for name, value in (("models", models), ("k", k), ("pairs", pairs)):
            if not 1 <= value <= _MOST:
                raise ArgumentError(f"{name} must be an integer from 1 to {_MOST}, got {value}")
        if not 0 <= seed < 2**63:
            raise ArgumentError(f"seed must be an integer from 0 to 2**63 - 1, got {seed}")
        self.models, self.score, self.k, self.pairs, self.seed = models, score, k, pairs, seed
        self.add_state("sums", torch.zeros(models, models, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(models, models, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        queries: Tensor,
        query_labels: Tensor,
        gallery: Tensor,
        gallery_labels: Tensor,
        query_model: int,
        gallery_model: int,
    ) -> None:
        """Count how queries by one model fare in the gallery of another, or of itself.

        Args:
            queries: (Q, d) features by model ``query_model``; a part of them, or all.
            query_labels: (Q,) integer class ids; -1 (unlabelled) is left out.
            gallery: (G, d) features by model ``gallery_model``, the whole gallery in each call.
            gallery_labels: (G,) integer class ids.
            query_model: Number of the model from 0, below ``models``.
            gallery_model: That of the same or an earlier model.

        Raises:
            BatchError: If an argument is not as above. Nothing was counted then.
        """
        for name, model in (("query_model", query_model), ("gallery_model", gallery_model)):
            if isinstance(model, bool) or not isinstance(model, int) or not 0 <= model < self.models:
                raise BatchError(f"{name} is {model!r}: it must be an integer from 0, below models={self.models}")
        if gallery_model > query_model:
            raise BatchError(
                f"gallery_model is {gallery_model} and query_model {query_model}: a gallery is searched by its own "
                "model and by later ones"
            )
        sides = queries, query_labels, gallery, gallery_labels
        if self.score == "verification":
            total, number = self.pairs * retrieval.verified(*sides, self.pairs, seed=self.seed), self.pairs
        else:
            found = {
                "identification": lambda: retrieval.identified(*sides),
                "recall": lambda: retrieval.recalled(*sides, self.k),
                "map": lambda: retrieval.average_precisions(*sides),
            }[self.score]()
            total, number = float(found.sum()), len(found)
        self.sums[query_model, gallery_model] += total
        self.counts[query_model, gallery_model] += number

    def compute(self) -> Tensor:
        """Return the value for everything counted so far, float64, ``NaN`` where not defined."""
        return self._value(self._of(self._matrix(self.sums, self.counts)))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the metric on given axes, or on those of a new figure that pyplot does not know; return both."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            matrix = self._matrix(self.sums, self.counts)
        return self._figure(matrix, ax)

    def _matrix(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return the matrix of the models that were evaluated, up to the last."""
        number = int(counts.cpu().nonzero().max()) + 1 if bool(counts.any()) else 0
        return (sums / counts)[:number, :number].cpu()

    def _of(self, matrix: Tensor) -> Tensor | float:
        raise NotImplementedError  # each metric below says what it makes of the matrix

    def _figure(self, matrix: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        values = [self._of(matrix[:number, :number]) for number in range(1, len(matrix) + 1)]
        return self._curve(values, ax)

    def _curve(self, values: Any, ax: Axes | None) -> tuple[Figure, Axes]:
        share = self.plot_lower_bound == 0.0
        figure, axes = figures.plot_accuracy_over_time(
            {self._label: values}, ax, ylabel=f"{self._label} (%)", legend=False, full_scale=share
        )
        axes.set(xlabel="number of models")
        return figure, axes


class CompatibilityMatrix(_CompatibilityMetric):
    r"""The matrix ``M[i, j]``: how queries by model i fare in the gallery of model j.

    The source of the numbers below. ``compute()`` gives (T, T) float64 in [0, 1] for the T models evaluated so far,
    ``NaN`` above the diagonal and where nothing was evaluated.

    ================== ==============================================================================
    ``score``          function
    ================== ==============================================================================
    ``identification`` :func:`clkit.metrics.retrieval.identification`
    ``verification``   :func:`clkit.metrics.retrieval.verification` of pairs drawn by ``seed``; give
                       all queries in one call
    ``recall``         :func:`clkit.metrics.retrieval.recall_at_k`
    ``map``            :func:`clkit.metrics.retrieval.mean_average_precision`
    ================== ==============================================================================

    Args:
        models: Number of models at most.
        score: See the table.
        k: Of recall.
        pairs: Of verification, an even number.
        seed: Of the draw of these pairs.
        kwargs: See ``torchmetrics.Metric``.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> metric = CompatibilityMatrix(models=2)
        >>> gallery, labels = torch.eye(2), torch.tensor([3, 8])
        >>> for query_model, gallery_model in (0, 0), (1, 0), (1, 1):
        ...     queries = torch.tensor([[1.0, 0.2], [0.5 - query_model, 0.4]])
        ...     metric.update(queries, labels, gallery, labels, query_model, gallery_model)
        >>> metric.compute()
        tensor([[0.5000,    nan],
                [1.0000, 1.0000]], dtype=torch.float64)
    """

    _dimensions = 2

    def _of(self, matrix: Tensor) -> Tensor:
        return matrix

    def _figure(self, matrix: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_compatibility_matrix(matrix, ax)


class AverageCompatibility(_CompatibilityMetric):
    """Share of pairs of models that are compatible ("AC"). See :func:`average_compatibility`.

    Args:
        models: As for :class:`CompatibilityMatrix`, like those below.
        score: What is compared.
        strict: Whether equal scores count as incompatible.
        kwargs: Further ones of :class:`CompatibilityMatrix` (``k``, ``pairs``, ``seed``), and of ``torchmetrics``.

    Raises:
        ArgumentError: If an argument is not allowed.
    """

    _label = "average compatibility"

    def __init__(self, models: int, score: Score = "identification", *, strict: bool = True, **kwargs: Any) -> None:
        check_arguments(AverageCompatibility, locals())
        super().__init__(models, score, **kwargs)
        self.strict = strict

    def _of(self, matrix: Tensor) -> float:
        return average_compatibility(matrix, strict=self.strict)


class AverageMultiModelAccuracy(_CompatibilityMetric):
    """Mean score over all pairs and all models ("AM"). See :func:`average_multi_model_accuracy`."""

    _label = "average multi-model accuracy"

    def _of(self, matrix: Tensor) -> float:
        return average_multi_model_accuracy(matrix)


class MultiModelAccuracyCurve(_CompatibilityMetric):
    """The mean score over the first models alone, as their number grows. See :func:`multi_model_accuracy_curve`."""

    _dimensions = 1
    _label = "average multi-model accuracy"

    def _of(self, matrix: Tensor) -> Tensor:
        return multi_model_accuracy_curve(matrix)

    def _figure(self, matrix: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return self._curve(self._of(matrix), ax)


class BackwardCompatibility(_CompatibilityMetric):
    """Mean gain of the last model in older galleries ("BC"). See :func:`backward_compatibility`."""

    plot_lower_bound: float | None = -1.0
    _label = "backward compatibility"

    def _of(self, matrix: Tensor) -> float:
        return backward_compatibility(matrix)


class ForwardCompatibility(_CompatibilityMetric):
    """Mean cost of a gallery that is one model old ("FC"). See :func:`forward_compatibility`."""

    plot_lower_bound: float | None = -1.0
    _label = "forward compatibility"

    def _of(self, matrix: Tensor) -> float:
        return forward_compatibility(matrix)


def _square(matrix: Array) -> Tensor:
    M = as_floats("matrix", matrix, 2)
    if M.shape[0] != M.shape[1]:
        raise ArgumentError(f"matrix has shape {tuple(M.shape)}: it must have a row and a column for each model")
    return M
