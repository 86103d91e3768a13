"""What an update breaks: samples that were answered rightly before it and no more after it."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clkit.errors import BatchError
from clkit.metrics import figures
from clkit.metrics._exact_metric import ExactMetric
from clkit.metrics._stream_metric import integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NegativeFlipRate", "negative_flip_rate"]


def negative_flip_rate(old: Tensor, new: Tensor, targets: Tensor) -> float:
    """Return the share of samples that the old system answered rightly and the new one answers wrongly.

    What users of an update notice, also where the accuracy rises (Yan et al., "Positive-Congruent Training", CVPR 2021,
    arXiv 2011.09161). Answers are class ids: predictions of a classifier, or classes of the nearest gallery rows.

    Args:
        old: (B,) integers from 0, the answers of the old system.
        new: (B,) integers from 0, those of the new one.
        targets: (B,) integers, the right answers; -1 is not counted.

    A float in [0, 1]; ``NaN`` where nothing is counted. A :class:`~clkit.errors.BatchError` for other arguments.

    Example:
        >>> targets = torch.tensor([0, 1, 2, 3])
        >>> negative_flip_rate(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 3]), targets)
        0.25
    """
    return _flip_rate(_answers(old, new, targets))


class NegativeFlipRate(ExactMetric):
    """Share of samples that the old system answered rightly and the new one wrongly. See :func:`negative_flip_rate`.

    Example:
        >>> metric = NegativeFlipRate()
        >>> metric.update(torch.tensor([4, 4, 9, 0]), torch.tensor([4, 9, 9, 0]), torch.tensor([4, 4, 9, 9]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    table: Tensor

    _dimensions = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("table", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, old: Tensor, new: Tensor, targets: Tensor) -> None:
        """Count a batch; arguments and errors are those of :func:`negative_flip_rate`."""
        self.table += _answers(old, new, targets)

    def compute(self) -> Tensor:
        """Return the share, a float64 scalar, ``NaN`` where nothing was counted."""
        return self._value(_flip_rate(self.table))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the four counts on given axes, or on those of a new figure that pyplot does not know; return both."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            table = self.table.cpu()
        return figures.plot_flips(table, ax)


def _answers(old: Tensor, new: Tensor, targets: Tensor) -> Tensor:
    """Return how many samples each system answered wrongly (0) and rightly (1): (2, 2) int64, rows the old one."""
    given, wanted = (integers("old", old), integers("new", new)), integers("targets", targets)
    for name, values in zip(("old", "new"), given, strict=True):
        if len(values) != len(wanted):
            raise BatchError(f"{name} has {len(values)} entries and targets {len(wanted)}: give one of each a sample")
        if len(values) and int(values.min()) < 0:
            raise BatchError(f"{name} contains {int(values.min())}: the lowest allowed value is 0")
    if len(wanted) and int(wanted.min()) < -1:
        raise BatchError(f"targets contains {int(wanted.min())}: the lowest allowed value is -1 (-1 = unlabelled)")
    was, now = ((values == wanted).long()[wanted >= 0] for values in given)
    return torch.bincount(2 * was + now, minlength=4).reshape(2, 2)


def _flip_rate(table: Tensor) -> float:
    return int(table[1, 0]) / int(table.sum()) if bool(table.any()) else nan
