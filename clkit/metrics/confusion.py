"""Which class is taken for which, as a ``torchmetrics.Metric``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clkit.metrics import figures
from clkit.metrics._stream_metric import StreamMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["StreamConfusionMatrix"]


class StreamConfusionMatrix(StreamMetric):
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
    _dimensions = 2

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes: tuple[int, ...] = ()

    def _key(self, stages: Tensor, experiences: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack([stages, targets, predictions], dim=1)

    def compute(self) -> Tensor:
        """Return the (K, K) counts of the current stage."""
        matrix, self.classes = _confusion(self.counts.cpu(), self.stage)
        return matrix.to(self.device)

    def reset(self) -> None:
        """Forget all counts and go back to stage 0."""
        super().reset()
        self.classes = ()

    def _draw(self, counts: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return figures.plot_confusion_matrix(*_confusion(counts, self.stage), ax)


def _confusion(counts: Tensor, stage: int) -> tuple[Tensor, tuple[int, ...]]:
    ids = torch.unique(counts[:, 1:3])
    rows = counts[counts[:, 0] == stage]
    matrix = torch.zeros(len(ids), len(ids), dtype=torch.int64)
    where = torch.searchsorted(ids, rows[:, 1:3].contiguous())
    matrix[where[:, 0], where[:, 1]] = rows[:, 3]
    return matrix, tuple(ids.tolist())
