"""The metrics of continual learning as ``torchmetrics.Metric`` objects that watch a whole stream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.metrics import figures, functional
from clkit.metrics._stream_metric import AccuracyMetric, StreamMetric
from clkit.metrics.counts import StreamCounts, Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AMCA",
    "AccuracyMatrix",
    "AccuracySeen",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "FinalAccuracy",
    "Forgetting",
    "ForwardTransfer",
    "PerClassAccuracy",
    "StreamConfusionMatrix",
]


class AccuracyMatrix(AccuracyMetric):
    """The accuracy matrix of a stream: how well each experience is known after each stage.

    The source of most other numbers, and the first figure to look at. ``compute()`` gives ``R[i, j]``, the accuracy on
    experience ``j + 1`` after stage ``i + 1`` (indices from 0): (T, E) float64 in [0, 1], ``NaN`` where nothing was
    evaluated. See :func:`clkit.metrics.functional.accuracy_matrix`.

    Example:
        >>> metric = AccuracyMatrix()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 7]), torch.tensor([0, 1]), experience=0)
        >>> metric.update(torch.tensor([7, 7, 7, 0]), torch.tensor([7, 7, 7, 7]), experience=1)
        >>> metric.compute()
        tensor([[1.0000,    nan],
                [0.5000, 0.7500]], dtype=torch.float64)
    """

    _dimensions = 2

    def _of(self, tables: Tables) -> Tensor:
        return functional.accuracy_matrix(tables.correct, tables.total)

    def _figure(self, tables: Tables, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_accuracy_matrix(self._of(tables), ax)


class AccuracySeen(AccuracyMetric):
    """Accuracy after each stage on all experiences learned so far, every test sample counting the same.

    The curve over time of class-incremental papers. ``compute()`` gives (T,) float64 in [0, 1]:
    ``A_i = Σ_{j ≤ i} n_j R[i, j] / Σ_{j ≤ i} n_j``. See :func:`clkit.metrics.functional.accuracy_seen`.
    """

    _dimensions = 1

    def _of(self, tables: Tables) -> Tensor:
        return functional.accuracy_seen(tables.correct, tables.total)

    def _figure(self, tables: Tables, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_accuracy_over_time({"accuracy": self._of(tables)}, ax, legend=False)


class PerClassAccuracy(AccuracyMetric):
    """Accuracy of each class after each stage, on everything evaluated then.

    Shows which classes an average hides. ``compute()`` gives ``a[t, c]``: (T, K) float64 in [0, 1] with one column for
    each class that was evaluated since the first stage, in the order of :attr:`classes`; ``NaN`` where a stage did not
    evaluate it. See :func:`clkit.metrics.functional.per_class_accuracy`.

    Attributes:
        classes: Sorted class ids of the columns that :meth:`compute` returned last.

    Example:
        >>> metric = PerClassAccuracy()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([3, 3, 900]), torch.tensor([3, 900, 900]), experience=0)
        >>> metric.compute()
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
        >>> metric.classes
        (3, 900)
    """

    _dimensions = 2

    classes: tuple[int, ...] = ()

    def compute(self) -> Tensor:
        """Return the (T, K) accuracies."""
        tables = StreamCounts(self.counts).tables()
        self.classes = tables.classes
        return self._value(self._of(tables))

    def reset(self) -> None:
        """Forget all counts and go back to stage 0."""
        super().reset()
        self.classes = ()

    def _of(self, tables: Tables) -> Tensor:
        return functional.per_class_accuracy(tables.class_correct, tables.class_total)

    def _figure(self, tables: Tables, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_class_accuracy(self._of(tables), tables.classes, ax)


class StreamConfusionMatrix(StreamMetric):
    """Which class is taken for which, at one stage.

    ``compute()`` gives ``M[a, b]``, the number of samples of class ``a`` that were predicted as ``b`` at the stage
    :attr:`stage` (set it back to look at an earlier one): (K, K) int64. Rows and columns are the classes that occurred
    as target or prediction at any stage, in the order of :attr:`classes`, so that the matrices of all stages compare.

    Attributes:
        classes: Sorted class ids of the rows and columns that :meth:`compute` returned last.

    Example:
        >>> metric = StreamConfusionMatrix()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([2, 2, 50]), torch.tensor([2, 50, 50]), experience=0)
        >>> metric.compute()
        tensor([[1, 0],
                [1, 1]])
        >>> metric.classes
        (2, 50)
    """

    _keys = 3  # stage, target, prediction
    _dimensions = 2

    classes: tuple[int, ...] = ()

    def _key(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack([stages, targets, predictions], dim=1)

    def compute(self) -> Tensor:
        """Return the (K, K) counts of the current stage."""
        matrix, self.classes = self._confusion(self.counts.cpu())
        return matrix.to(self.device)

    def reset(self) -> None:
        """Forget all counts and go back to stage 0."""
        super().reset()
        self.classes = ()

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_confusion_matrix(*self._confusion(counts), ax)

    def _confusion(self, counts: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        ids = torch.unique(counts[:, 1:3])
        rows = counts[counts[:, 0] == self.stage]
        matrix = torch.zeros(len(ids), len(ids), dtype=torch.int64)
        where = torch.searchsorted(ids, rows[:, 1:3].contiguous())
        matrix[where[:, 0], where[:, 1]] = rows[:, 3]
        return matrix, tuple(ids.tolist())


class _StreamValue(AccuracyMetric):
    """A metric that is one number, with the name that it has in ``results.json``; drawn over the stages."""

    num_test_classes: int | None = None
    _dimensions = 0
    _name: str
    _label = ""  # default: the name in words

    def _of(self, tables: Tables) -> float:
        value = functional.summarize(*tables[:5], self.num_test_classes)[self._name]
        return value if isinstance(value, float) else math.nan

    def _figure(self, tables: Tables, ax: Axes | None) -> tuple[Figure, Axes]:
        values = [self._of(tables.until(stage)) for stage in range(1, len(tables.total) + 1)]
        label, share = self._label or self._name.replace("_", " "), self.plot_lower_bound == 0.0
        return figures.plot_accuracy_over_time(
            {label: values}, ax, ylabel=f"{label} (%)", legend=False, full_scale=share
        )


class AverageIncrementalAccuracy(_StreamValue):
    """Mean over stages of the accuracy on everything seen: ``(1/T) Σ_i A_i``.

    The headline number of class-incremental papers; it rewards being good at all times and depends on the order of the
    classes. See :func:`clkit.metrics.functional.average_incremental_accuracy`.
    """

    _name = "average_incremental_accuracy"


class FinalAccuracy(_StreamValue):
    """Accuracy after the last stage on everything seen, every test sample counting the same: ``A_T``.

    See :func:`clkit.metrics.functional.final_accuracy`; where every experience shall count the same, see
    :class:`AverageAccuracy`.
    """

    _name = "final_accuracy"
    _label = "accuracy on all seen"


class AverageAccuracy(_StreamValue):
    """Mean accuracy over the experiences learned, after the last stage: ``(1/T) Σ_{j ≤ T} R[T, j]``.

    Every experience counts the same, whatever its size. See :func:`clkit.metrics.functional.average_accuracy`.
    """

    _name = "average_accuracy"


class Forgetting(_StreamValue):
    """Mean fall of earlier experiences from their best accuracy: ``(1/(T−1)) Σ_{j<T} (max_{i<T} R[i, j] − R[T, j])``.

    Lower is better. The maximum is over all earlier stages, nothing is clipped at 0, the last experience is left out;
    ``NaN`` with one experience. See :func:`clkit.metrics.functional.forgetting`.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -1.0

    _name = "forgetting"


class BackwardTransfer(_StreamValue):
    """Mean change of earlier experiences since they were learned: ``(1/(T−1)) Σ_{j<T} (R[T, j] − R[j, j])``.

    Negative is forgetting, positive is improvement by later learning; ``NaN`` with one experience. See
    :func:`clkit.metrics.functional.backward_transfer`.
    """

    plot_lower_bound: float | None = -1.0

    _name = "backward_transfer"


class ForwardTransfer(_StreamValue):
    """Mean gain on an experience just before it is learned: ``(1/(T−1)) Σ_{1<j≤T} (R[j−1, j] − R[0, j])``.

    ``NaN`` unless every experience was evaluated before any training (stage 0) and again right before it was learned.
    See :func:`clkit.metrics.functional.forward_transfer`.

    Example:
        >>> metric = ForwardTransfer()
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([1, 0]), experience=1)  # stage 0: 1/2
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 0]), experience=1)  # not learned yet: 2/2
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 0]), experience=1)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    plot_lower_bound: float | None = -1.0

    _name = "forward_transfer"


class AMCA(_StreamValue):
    """Average mean class accuracy: ``(1/T) Σ_t (1/K) Σ_c a[t, c]`` over the ``K`` classes of the full test set.

    The measure of imbalanced streams: every class counts the same at every stage, and a class that a stage did not
    evaluate, because it was not learned yet, counts as 0. ``NaN`` when the counts cannot be those of a full test set.
    With one fixed test set give ``experience=0`` at every stage. See :func:`clkit.metrics.functional.amca`.

    Args:
        num_test_classes: Number of classes in the full test set; default: those evaluated at the last stage.
        kwargs: See ``torchmetrics.Metric``.

    Raises:
        ArgumentError: If ``num_test_classes`` is below 1; by ``compute()`` if it is below the number of classes that
            the last stage evaluated.

    Example:
        >>> metric = AMCA(num_test_classes=4)
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 6]), experience=0)
        >>> metric.compute()  # (1 + 0 + 0 + 0) / 4
        tensor(0.2500, dtype=torch.float64)
    """

    _name = "amca"
    _label = "average mean class accuracy"

    def __init__(self, num_test_classes: int | None = None, **kwargs: Any) -> None:
        check_arguments(AMCA, locals())
        super().__init__(**kwargs)
        if num_test_classes is not None and num_test_classes < 1:
            raise ArgumentError(
                f"num_test_classes is {num_test_classes}: give the number of classes in the full test set, or None"
            )
        self.num_test_classes = num_test_classes
