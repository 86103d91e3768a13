"""The metrics of continual learning as ``torchmetrics.Metric`` objects that watch a whole stream.

All of them are fed in the same way: ``update(predictions, targets, experience)`` with the test samples of an experience
(``experience`` counts from 0, as :class:`clkit.Experience` does), and :meth:`~_StreamMetric.next_stage` each time an
experience was learned. Stage 0 is before any training (only :class:`ForwardTransfer` reads it), stage ``i`` is after
the ``i``-th experience. The definitions stand in :mod:`clkit.metrics.functional`, the values are those of
``results.json``; what is not defined is ``NaN``.

The state is a list of exact integer counts, one row for every combination of stage, experience and class that really
occurred. So class ids may have gaps and be large, nothing need be known about the stream beforehand, and processes that
saw different experiences or classes are added up exactly.

In a ``LightningModule``:

* log ``metric.compute()``, not the metric: ``log`` would reset it at the end of the epoch, and these remember a stream;
* counts add up, so evaluate each stage once, and skip batches while ``trainer.sanity_checking``;
* call ``metric.persistent(True)`` to have the counts in checkpoints.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from clkit.errors import ArgumentError, BatchError
from clkit.metrics import functional

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

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _Tables(NamedTuple):
    """Dense counts of the stages 1 … T, on the CPU."""

    correct: Tensor  # (T, E)
    total: Tensor  # (T, E)
    class_correct: Tensor  # (T, K)
    class_total: Tensor  # (T, K)
    classes: tuple[int, ...]  # the ids of the K columns
    baseline: Tensor  # (E,) accuracies of stage 0

    def until(self, stage: int) -> _Tables:
        """The tables of the stream cut after that many stages."""
        return self._replace(
            correct=self.correct[:stage],
            total=self.total[:stage],
            class_correct=self.class_correct[:stage],
            class_total=self.class_total[:stage],
        )


class _StreamMetric(Metric):
    """Counts by stage: the part that all metrics of a stream share.

    A row of the state ``counts`` is a key of ``_keys`` integers, the first of which is the stage, followed by the
    integers that are summed over samples with that key. Rows are unique and sorted, so the state does not depend on the
    order or the size of batches.
    """

    is_differentiable: bool | None = False
    # The fast path of `forward` cannot add up tables of different lengths.
    full_state_update: bool | None = True

    counts: Tensor
    current_stage: Tensor
    _keys: int
    _columns: int
    _dimensions: int  # of what `compute` returns

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keep_stage = False
        self.add_state("counts", torch.zeros(0, self._columns, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("current_stage", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    @property
    def stage(self) -> int:
        """Number of experiences learned so far; the next :meth:`update` counts for this row. May be set."""
        return int(self.current_stage)

    @stage.setter
    def stage(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ArgumentError(
                f"stage is {value!r}: it must be an integer >= 0, the number of experiences learned so far"
            )
        self.current_stage = torch.full_like(self.current_stage, value)
        self._computed = None

    def next_stage(self) -> None:
        """Says that one more experience was learned: what follows is evaluated after it."""
        self.stage = self.stage + 1

    def update(self, predictions: Tensor, targets: Tensor, experience: int | Tensor) -> None:
        """Counts a batch of test samples at the current stage.

        Args:
            predictions: (B,) integers >= 0, predicted class ids.
            targets: (B,) integers, true class ids; -1 (unlabelled) is not counted.
            experience: Index from 0 of the experience that the samples belong to, or (B,) integers, one a sample.

        Raises:
            BatchError: If an argument is not as above. Nothing was counted then.
        """
        predictions, targets, experiences = _checked_batch(predictions, targets, experience)
        stages = self.current_stage.expand(len(targets))
        rows = self._rows(stages, experiences, targets, predictions)[targets >= 0]
        self.counts = _add_up(torch.cat([self.counts, rows]), self._keys)

    @abstractmethod
    def _rows(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        """One row of ``counts`` for each sample."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Counts a batch as :meth:`update` does and returns the metric of this batch alone at the current stage."""
        self._keep_stage = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._keep_stage = False

    def reset(self) -> None:
        """Forgets all counts and goes back to stage 0."""
        stage = self.current_stage
        super().reset()
        if self._keep_stage:
            self.current_stage = stage

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Adds up the counts of all processes, as ``torchmetrics.Metric.sync`` does; arguments as there."""
        gather = dist_sync_fn or gather_all_tensors

        def gather_rows(state: Tensor, group: Any | None = None) -> list[Tensor]:
            gathered: list[Tensor] = gather(state, group=group)
            if state.ndim < 2:
                return gathered
            # Tables of different lengths cannot be stacked: hand over the one table that is their sum.
            return [_add_up(torch.cat(gathered), self._keys)]

        super().sync(gather_rows, process_group, should_sync, distributed_available)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds what another metric of the same class, or its ``metric_state``, has counted.

        Args:
            incoming_state: The other metric or its state. The stage becomes the higher of the two.

        Raises:
            ArgumentError: If it is not the state of such a metric.
        """
        if isinstance(incoming_state, Metric):
            if type(incoming_state) is not type(self):
                raise ArgumentError(
                    f"incoming_state is a {type(incoming_state).__name__}: only another {type(self).__name__} can be"
                    " merged into this metric"
                )
            incoming_state = dict(incoming_state.metric_state)
        missing = {"counts", "current_stage"} - incoming_state.keys()
        if missing:
            raise ArgumentError(
                f"incoming_state has no {', '.join(sorted(missing))}: give a {type(self).__name__} or its metric_state"
            )
        counts, stage = incoming_state["counts"], incoming_state["current_stage"]
        if counts.ndim != 2 or counts.shape[1] != self._columns:
            raise ArgumentError(
                f"incoming_state has counts of shape {tuple(counts.shape)}: those of a {type(self).__name__} are"
                f" (rows, {self._columns})"
            )
        self.counts = _add_up(torch.cat([self.counts, counts.to(self.counts.device)]), self._keys)
        self.current_stage = torch.maximum(self.current_stage, stage.to(self.current_stage.device))
        self._update_count += 1
        self._computed = None

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Changes nothing: counts are int64, and values are float64 (float32 on devices that have no float64)."""
        return self

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draws the metric.

        Args:
            ax: Axes to draw on; default: those of a new figure, which matplotlib's global state does not keep.

        Returns:
            The figure and its axes.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            counts = self.counts.cpu()
        return self._draw(counts, ax)

    @abstractmethod
    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        """Draws the given counts, which are on the CPU and those of all processes."""

    def _wrap_compute(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        squeezed = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def in_shape(*args: Any, **kwargs: Any) -> Tensor:
            # torchmetrics makes a scalar of every value with one element, also of a table after the first stage.
            value: Tensor = squeezed(*args, **kwargs)
            return value if value.ndim else value.reshape((1,) * self._dimensions)

        return in_shape

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super()._apply(*args, **kwargs)
        self._computed = None  # casts leave the counts alone, but not a value kept from the last `compute`
        return module

    def _value(self, value: float | Tensor) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.as_tensor(value, dtype=dtype, device=self.device)


class _AccuracyMetric(_StreamMetric):
    """Rows (stage, experience, class, correct, total); metrics with this state can share one in a collection."""

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    _keys = 3
    _columns = 5

    def _rows(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack([stages, experiences, targets, predictions == targets, torch.ones_like(targets)], dim=1)


class AccuracyMatrix(_AccuracyMetric):
    """The accuracy matrix of a stream: how well each experience is known after each stage.

    The source of most other numbers, and the first figure to look at. ``compute()`` gives
    ``R[i, j]``, the accuracy on experience ``j + 1`` after stage ``i + 1`` (indices from 0): (T, E) float64 in [0, 1],
    ``NaN`` where nothing was evaluated. See :func:`clkit.metrics.functional.accuracy_matrix`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

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

    Source:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 2.
    """

    _dimensions = 2

    def compute(self) -> Tensor:
        """The (T, E) accuracy matrix."""
        return self._value(_matrix(self.counts))

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        from clkit.metrics import figures

        return figures.plot_accuracy_matrix(_matrix(counts), ax)


class AccuracySeen(_AccuracyMetric):
    """Accuracy after each stage on all experiences learned so far, every test sample counting the same.

    The curve over time of class-incremental papers. ``compute()`` gives (T,) float64 in [0, 1]:
    ``A_i = Σ_{j ≤ i} n_j R[i, j] / Σ_{j ≤ i} n_j``. See :func:`clkit.metrics.functional.accuracy_seen`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = AccuracySeen()
        >>> metric.stage = 1
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
        >>> metric.stage = 2
        >>> metric.update(torch.tensor([0, 7]), torch.tensor([0, 1]), experience=0)
        >>> metric.update(torch.tensor([7, 7]), torch.tensor([7, 7]), experience=1)
        >>> metric.compute()  # 2 of 2, then 3 of 4
        tensor([1.0000, 0.7500], dtype=torch.float64)

    Source:
        Rebuffi et al., "iCaRL", arXiv 1611.07725, section 4.
    """

    _dimensions = 1

    def compute(self) -> Tensor:
        """The (T,) accuracies."""
        tables = _tables(self.counts)
        return self._value(functional.accuracy_seen(tables.correct, tables.total))

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        from clkit.metrics import figures

        tables = _tables(counts)
        return figures.plot_accuracy_over_time(
            {"accuracy": functional.accuracy_seen(tables.correct, tables.total)}, ax, legend=False
        )


class PerClassAccuracy(_AccuracyMetric):
    """Accuracy of each class after each stage, on everything evaluated then.

    Shows which classes an average hides. ``compute()`` gives ``a[t, c]``: (T, K) float64 in [0, 1] with one column for
    each class that was evaluated since the first stage, in the order of :attr:`classes`; ``NaN`` where a stage did not
    evaluate it. See :func:`clkit.metrics.functional.per_class_accuracy`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes: tuple[int, ...] = ()

    def compute(self) -> Tensor:
        """The (T, K) accuracies."""
        tables = _tables(self.counts)
        self.classes = tables.classes
        return self._value(functional.per_class_accuracy(tables.class_correct, tables.class_total))

    def reset(self) -> None:
        """Forgets all counts and goes back to stage 0."""
        super().reset()
        self.classes = ()

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        from clkit.metrics import figures

        tables = _tables(counts)
        values = functional.per_class_accuracy(tables.class_correct, tables.class_total)
        return figures.plot_class_accuracy(values, tables.classes, ax)


class _StreamValue(_AccuracyMetric):
    """A metric that is one number, with the name that it has in ``results.json``; drawn over the stages."""

    _dimensions = 0
    _name: str
    _label: str

    def compute(self) -> Tensor:
        """The value after the last stage that was evaluated, a float64 scalar; ``NaN`` where not defined."""
        return self._value(self._after_last_stage(_tables(self.counts)))

    def _after_last_stage(self, tables: _Tables) -> float:
        summary = functional.summarize(
            tables.correct,
            tables.total,
            tables.class_correct,
            tables.class_total,
            tables.baseline,
            self._test_classes(),
        )
        value = summary[self._name]
        return value if isinstance(value, float) else math.nan

    def _test_classes(self) -> int | None:
        return None

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        from clkit.metrics import figures

        tables = _tables(counts)
        values = [self._after_last_stage(tables.until(stage)) for stage in range(1, len(tables.total) + 1)]
        share = self.plot_lower_bound == 0.0
        return figures.plot_accuracy_over_time(
            {self._label: values}, ax, ylabel=f"{self._label} (%)", legend=False, full_scale=share
        )


class AverageIncrementalAccuracy(_StreamValue):
    """Mean over stages of the accuracy on everything seen: ``(1/T) Σ_i A_i``.

    The headline number of class-incremental papers; it rewards being good at all times and depends on the order of the
    classes. See :func:`clkit.metrics.functional.average_incremental_accuracy`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = AverageIncrementalAccuracy()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 7, 7, 0]), torch.tensor([0, 1, 7, 7]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()  # (2/2 + 2/4) / 2
        tensor(0.7500, dtype=torch.float64)

    Source:
        Rebuffi et al., "iCaRL", arXiv 1611.07725, section 4.
    """

    _name = "average_incremental_accuracy"
    _label = "average incremental accuracy"


class FinalAccuracy(_StreamValue):
    """Accuracy after the last stage on everything seen, every test sample counting the same: ``A_T``.

    See :func:`clkit.metrics.functional.final_accuracy`; where every experience shall count the same, see
    :class:`AverageAccuracy`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = FinalAccuracy()
        >>> metric.stage = 2
        >>> metric.update(torch.tensor([0, 1, 7, 0]), torch.tensor([0, 1, 7, 7]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    _name = "final_accuracy"
    _label = "accuracy on all seen"


class AverageAccuracy(_StreamValue):
    """Mean accuracy over the experiences learned, after the last stage: ``(1/T) Σ_{j ≤ T} R[T, j]``.

    Every experience counts the same, whatever its size. See :func:`clkit.metrics.functional.average_accuracy`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = AverageAccuracy()
        >>> metric.stage = 2
        >>> metric.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), experience=0)
        >>> metric.update(torch.tensor([7]), torch.tensor([7]), experience=1)
        >>> metric.compute()  # (3/4 + 1/1) / 2
        tensor(0.8750, dtype=torch.float64)

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """

    _name = "average_accuracy"
    _label = "average accuracy"


class Forgetting(_StreamValue):
    """Mean fall of earlier experiences from their best accuracy: ``(1/(T−1)) Σ_{j<T} (max_{i<T} R[i, j] − R[T, j])``.

    Lower is better. The maximum is over all earlier stages, nothing is clipped at 0, the last experience is left out;
    ``NaN`` with one experience. See :func:`clkit.metrics.functional.forgetting`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = Forgetting()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 7]), torch.tensor([0, 1]), experience=0)
        >>> metric.update(torch.tensor([7]), torch.tensor([7]), experience=1)
        >>> metric.compute()  # 2/2 - 1/2
        tensor(0.5000, dtype=torch.float64)

    Source:
        Chaudhry et al., "Riemannian Walk for Incremental Learning", arXiv 1801.10112, section 3.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -1.0

    _name = "forgetting"
    _label = "forgetting"


class BackwardTransfer(_StreamValue):
    """Mean change of earlier experiences since they were learned: ``(1/(T−1)) Σ_{j<T} (R[T, j] − R[j, j])``.

    Negative is forgetting, positive is improvement by later learning; ``NaN`` with one experience. See
    :func:`clkit.metrics.functional.backward_transfer`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = BackwardTransfer()
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), experience=0)
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([0, 7]), torch.tensor([0, 1]), experience=0)
        >>> metric.update(torch.tensor([7]), torch.tensor([7]), experience=1)
        >>> metric.compute()  # 1/2 - 2/2
        tensor(-0.5000, dtype=torch.float64)

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """

    plot_lower_bound: float | None = -1.0

    _name = "backward_transfer"
    _label = "backward transfer"


class ForwardTransfer(_StreamValue):
    """Mean gain on an experience just before it is learned: ``(1/(T−1)) Σ_{1<j≤T} (R[j−1, j] − R[0, j])``.

    ``NaN`` unless every experience was evaluated before any training (stage 0) and again right before it was learned.
    See :func:`clkit.metrics.functional.forward_transfer`.

    Args:
        kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = ForwardTransfer()
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([1, 0]), experience=1)  # stage 0: 1/2
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 0]), experience=1)  # not learned yet: 2/2
        >>> metric.next_stage()
        >>> metric.update(torch.tensor([1, 0]), torch.tensor([1, 0]), experience=1)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Source:
        Lopez-Paz and Ranzato, arXiv 1706.08840, section 2.
    """

    plot_lower_bound: float | None = -1.0

    _name = "forward_transfer"
    _label = "forward transfer"


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

    Source:
        Verwimp et al., "CLAD: A realistic Continual Learning benchmark for Autonomous Driving", arXiv 2210.03482.
    """

    _name = "amca"
    _label = "average mean class accuracy"

    def __init__(self, num_test_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_test_classes is not None and num_test_classes < 1:
            raise ArgumentError(
                f"num_test_classes is {num_test_classes}: give the number of classes in the full test set, or None"
            )
        self.num_test_classes = num_test_classes

    def _test_classes(self) -> int | None:
        return self.num_test_classes


class StreamConfusionMatrix(_StreamMetric):
    """Which class is taken for which, at one stage.

    ``compute()`` gives ``M[a, b]``, the number of samples of class ``a`` that were predicted as ``b`` at the stage
    :attr:`stage` (set it back to look at an earlier one): (K, K) int64. Rows and columns are the classes that occurred
    as target or prediction at any stage, in the order of :attr:`classes`, so that the matrices of all stages compare.

    Args:
        kwargs: See ``torchmetrics.Metric``.

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
    _columns = 4
    _dimensions = 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes: tuple[int, ...] = ()

    def _rows(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack([stages, targets, predictions, torch.ones_like(targets)], dim=1)

    def compute(self) -> Tensor:
        """The (K, K) counts of the current stage."""
        matrix, self.classes = _confusion(self.counts.cpu(), self.stage)
        return matrix.to(self.device)

    def reset(self) -> None:
        """Forgets all counts and goes back to stage 0."""
        super().reset()
        self.classes = ()

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        from clkit.metrics import figures

        return figures.plot_confusion_matrix(*_confusion(counts, self.stage), ax)


def _checked_batch(predictions: Tensor, targets: Tensor, experience: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = _integers("targets", targets)
    predictions = _integers("predictions", predictions, hint=" Scores (B, C) become class ids by scores.argmax(dim=1).")
    if isinstance(experience, Tensor):
        experiences = _integers("experience", experience)
    elif isinstance(experience, int) and not isinstance(experience, bool):
        experiences = torch.full_like(targets, experience)
    else:
        raise BatchError(f"experience is {experience!r}: it must be an integer >= 0 or a (B,) integer tensor")
    if not len(predictions) == len(targets) == len(experiences):
        raise BatchError(
            f"predictions has {len(predictions)} entries, targets {len(targets)} and experience {len(experiences)}:"
            " give one of each a sample"
        )
    for name, values, lowest in (
        ("predictions", predictions, 0),
        ("targets", targets, -1),
        ("experience", experiences, 0),
    ):
        if len(values) and int(values.min()) < lowest:
            unlabelled = " (-1 = unlabelled)" if lowest else ""
            raise BatchError(f"{name} contains {int(values.min())}: the lowest allowed value is {lowest}{unlabelled}")
    return predictions, targets, experiences


def _integers(name: str, values: Tensor, hint: str = "") -> Tensor:
    if not isinstance(values, Tensor):
        raise BatchError(f"{name} is a {type(values).__name__}: it must be a (B,) integer tensor.{hint}")
    if values.ndim != 1 or values.dtype not in _INTEGERS:
        raise BatchError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: it must be a (B,) integer tensor.{hint}"
        )
    return values.long()


def _add_up(rows: Tensor, keys: int) -> Tensor:
    """Sums the rows of equal key (the first columns) and sorts them by key."""
    # Sorting column by column is several times faster than torch.unique(dim=0), and needs no bound on the ids.
    order = torch.arange(len(rows), device=rows.device)
    for column in reversed(range(keys)):
        order = order[torch.argsort(rows[order, column], stable=True)]
    rows = rows[order]
    first = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    first[1:] = (rows[1:, :keys] != rows[:-1, :keys]).any(1)
    unique = rows[first]
    sums = torch.zeros_like(unique[:, keys:]).index_add_(0, first.cumsum(0) - 1, rows[:, keys:])
    return torch.cat([unique[:, :keys], sums], dim=1)


def _tables(counts: Tensor) -> _Tables:
    counts = counts.cpu()
    stage, experience, target = counts[:, :3].unbind(1)
    stages = int(stage.max()) if len(counts) else 0
    experiences = int(experience.max()) + 1 if len(counts) else 0
    # A class that was evaluated only before any training has no place in tables of the stages.
    ids = torch.unique(target[stage > 0])
    by_experience = torch.zeros(2, stages + 1, experiences, dtype=torch.int64)
    by_class = torch.zeros(2, stages + 1, len(ids), dtype=torch.int64)
    listed = counts[torch.isin(target, ids)]
    column = torch.searchsorted(ids, listed[:, 2].contiguous())
    for table, hits in zip(by_experience, (counts[:, 3], counts[:, 4]), strict=True):
        table.index_put_((stage, experience), hits, accumulate=True)
    for table, hits in zip(by_class, (listed[:, 3], listed[:, 4]), strict=True):
        table.index_put_((listed[:, 0], column), hits, accumulate=True)
    correct, total = by_experience
    return _Tables(
        correct=correct[1:],
        total=total[1:],
        class_correct=by_class[0, 1:],
        class_total=by_class[1, 1:],
        classes=tuple(ids.tolist()),
        baseline=correct[0].double() / total[0].double(),
    )


def _matrix(counts: Tensor) -> Tensor:
    tables = _tables(counts)
    return functional.accuracy_matrix(tables.correct, tables.total)


def _confusion(counts: Tensor, stage: int) -> tuple[Tensor, tuple[int, ...]]:
    ids = torch.unique(counts[:, 1:3])
    rows = counts[counts[:, 0] == stage]
    matrix = torch.zeros(len(ids), len(ids), dtype=torch.int64)
    where = torch.searchsorted(ids, rows[:, 1:3].contiguous())
    matrix[where[:, 0], where[:, 1]] = rows[:, 3]
    return matrix, tuple(ids.tolist())
