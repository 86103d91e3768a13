"""What the metrics of a stream share: counting by stage, and adding up over batches and processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from clkit.errors import ArgumentError, BatchError
from clkit.metrics._exact_metric import ExactMetric
from clkit.metrics.counts import StreamCounts, Tables, add_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AccuracyMetric", "StreamMetric", "integers"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class StreamMetric(ExactMetric):
    """Counts by stage, added up over batches and processes.

    A row of the state ``counts`` is a key of ``_keys`` integers, the first of which is the stage, and the number of
    samples with that key. Rows are distinct and sorted, so the state does not depend on the order or the size of
    batches.
    """

    # The fast path of `forward` cannot add up tables of different lengths.
    full_state_update: bool | None = True

    counts: Tensor
    current_stage: Tensor
    _keys: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keep_stage = False
        self.add_state("counts", torch.zeros(0, self._keys + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("current_stage", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    @property
    def stage(self) -> int:
        """Number of experiences learned so far; the next :meth:`update` counts for this row. May be set."""
        return int(self.current_stage)

    @stage.setter
    def stage(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ArgumentError(f"stage is {value!r}: give the number of experiences learned so far, an integer >= 0")
        self.current_stage = torch.full_like(self.current_stage, value)
        self._computed = None

    def next_stage(self) -> None:
        """Note that one more experience was learned: what follows is evaluated after it."""
        self.stage = self.stage + 1

    def update(self, predictions: Tensor, targets: Tensor, experience: int | Tensor) -> None:
        """Count a batch of test samples at the current stage.

        Args:
            predictions: (B,) integers >= 0, predicted class ids.
            targets: (B,) integers, true class ids; -1 (unlabelled) is not counted.
            experience: Index from 0 of the experience that the samples belong to, or (B,) integers, one a sample.

        Raises:
            BatchError: If an argument is not as above. Nothing was counted then.
        """
        predictions, targets, experiences = _checked_batch(predictions, targets, experience)
        keys = self._key(self.current_stage.expand(len(targets)), experiences, targets, predictions)[targets >= 0]
        self.counts = _summed(self.counts, torch.cat([keys, torch.ones_like(keys[:, :1])], dim=1))

    @abstractmethod
    def _key(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        """Return (B, keys) int64: under which key each sample is counted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Count a batch as :meth:`update` does and return the metric of this batch alone at the current stage."""
        self._keep_stage = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._keep_stage = False

    def reset(self) -> None:
        """Forget all counts and go back to stage 0."""
        stage = self.current_stage
        super().reset()
        if self._keep_stage:
            self.current_stage = stage

    def sync(self, dist_sync_fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """Add up the counts of all processes, as ``torchmetrics.Metric.sync`` does; arguments as there."""
        gather = dist_sync_fn or gather_all_tensors

        def gather_rows(state: Tensor, group: Any | None = None) -> list[Tensor]:
            gathered: list[Tensor] = gather(state, group=group)
            # Tables of different lengths cannot be stacked: hand over the one table that is their sum.
            return [_summed(*gathered)] if state.ndim == 2 else gathered

        super().sync(gather_rows, *args, **kwargs)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same class, or its ``metric_state``, has counted; the higher stage stays.

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
        if counts.ndim != 2 or counts.shape[1] != self._keys + 1:
            raise ArgumentError(
                f"incoming_state has counts of shape {tuple(counts.shape)}: those of a {type(self).__name__} are"
                f" (rows, {self._keys + 1})"
            )
        self.counts = _summed(self.counts, counts.to(self.counts.device))
        self.current_stage = torch.maximum(self.current_stage, stage.to(self.current_stage.device))
        self._update_count += 1
        self._computed = None

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the metric on given axes, or on those of a new figure that pyplot does not know; return both."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            counts = self.counts.cpu()
        return self._draw(counts, ax)

    @abstractmethod
    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        """Draw the given counts, which are on the CPU and those of all processes."""


class AccuracyMetric(StreamMetric):
    """A metric whose state is a table of :class:`StreamCounts` in which a wrong prediction stands as -1."""

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    _keys = 4

    def _key(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack([stages, experiences, targets, torch.where(predictions == targets, targets, -1)], dim=1)

    def compute(self) -> Tensor:
        """Return the value for everything counted so far, float64, ``NaN`` where not defined."""
        return self._value(self._of(StreamCounts(self.counts).tables()))

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return self._figure(StreamCounts(counts).tables(), ax)

    @abstractmethod
    def _of(self, tables: Tables) -> Tensor | float: ...

    @abstractmethod
    def _figure(self, tables: Tables, ax: Axes | None) -> tuple[Figure, Axes]: ...


def _summed(*tables: Tensor) -> Tensor:
    rows = torch.cat(tables)
    return add_up(rows[:, :-1], rows[:, -1])


def _checked_batch(predictions: Tensor, targets: Tensor, experience: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets = integers("targets", targets)
    predictions = integers("predictions", predictions, hint=" Scores (B, C) become class ids by scores.argmax(dim=1).")
    if isinstance(experience, Tensor):
        experiences = integers("experience", experience)
    elif isinstance(experience, int) and not isinstance(experience, bool):
        experiences = torch.full_like(targets, experience)
    else:
        raise BatchError(f"experience is {experience!r}: it must be an integer >= 0 or a (B,) integer tensor")
    if not len(predictions) == len(targets) == len(experiences):
        raise BatchError(
            f"predictions has {len(predictions)} entries, targets {len(targets)} and experience {len(experiences)}:"
            " give one of each a sample"
        )
    for name, values in (("predictions", predictions), ("targets", targets), ("experience", experiences)):
        lowest, unlabelled = (-1, " (-1 = unlabelled)") if name == "targets" else (0, "")
        if len(values) and int(values.min()) < lowest:
            raise BatchError(f"{name} contains {int(values.min())}: the lowest allowed value is {lowest}{unlabelled}")
    return predictions, targets, experiences


def integers(name: str, values: Tensor, hint: str = "") -> Tensor:
    """Return a vector of integers as int64, or raise a BatchError."""
    if not isinstance(values, Tensor):
        raise BatchError(f"{name} is a {type(values).__name__}: it must be a (B,) integer tensor.{hint}")
    if values.ndim != 1 or values.dtype not in _INTEGERS:
        raise BatchError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: it must be a (B,) integer tensor.{hint}"
        )
    return values.long()
