r"""What edits of a classifier did: whether answers are as wanted, and what else moved; functions, and ``torchmetrics``.

An edit gives images x_e a label; its *equivalents* are other views of them, which shall get the same. Metrics of one
edit are taken while it stands, one edit at a time on the network without the others, unless a name says otherwise.

================== ================================================================ ======================
metric             what is counted                                                  source
================== ================================================================ ======================
reliability        edited images with the wanted answer                             arXiv 2110.11309
generality         equivalents with the wanted answer                               arXiv 2110.11309
edit success (ES)  images and equivalents of an edit as one set, mean over edits    arXiv 2110.11309, eq. 1
locality           other images whose answer did not change                         arXiv 2110.11309
drawdown (DD)      loss of accuracy on other images, in percentage points           arXiv 2110.11309
locality KL        mean KL divergence of the probabilities of other images          arXiv 2110.11309, eq. 4
retention          earlier edits all of whose images still have the wanted answer
================== ================================================================ ======================

Answers are class ids; a target of -1 is not counted. Where nothing is counted values are ``NaN``.
"""

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

__all__ = [
    "Drawdown",
    "EditSuccess",
    "Generality",
    "Locality",
    "LocalityKL",
    "Reliability",
    "Retention",
    "drawdown",
    "edit_success",
    "generality",
    "locality",
    "locality_kl",
    "reliability",
    "retention",
]


def reliability(predictions: Tensor, targets: Tensor) -> float:
    """Return the share of edited images that have the wanted answer.

    Args:
        predictions: (B,) integers, the answers of the edited network.
        targets: (B,) integers, the wanted ones.

    A float in [0, 1]. A :class:`~clkit.errors.BatchError` for other arguments, like those below.

    Example:
        >>> reliability(torch.tensor([3, 1]), torch.tensor([3, 2]))
        0.5
    """
    return _mean(_hits(predictions, targets))


def generality(predictions: Tensor, targets: Tensor) -> float:
    """Return the share of equivalents that have the wanted answer; arguments are those of :func:`reliability`.

    Example:
        >>> generality(torch.tensor([3, 3, 3, 1]), torch.tensor([3, 3, 3, 3]))
        0.75
    """
    return _mean(_hits(predictions, targets))


def edit_success(predictions: Tensor, targets: Tensor, edits: Tensor) -> float:
    """Return the mean over edits of the share of their images and equivalents that have the wanted answer.

    Args:
        predictions: (B,) integers, answers to edited images and their equivalents.
        targets: (B,) integers, the wanted ones.
        edits: (B,) integers, which edit each row belongs to.

    A float in [0, 1].

    Example:
        >>> edit_success(torch.tensor([3, 1, 5]), torch.tensor([3, 3, 5]), torch.tensor([0, 0, 1]))
        0.75
    """
    shares = [_mean(hits) for hits in _by_edit(predictions, targets, edits)]
    return sum(shares) / len(shares) if shares else nan


def retention(predictions: Tensor, targets: Tensor, edits: Tensor) -> float:
    """Return the share of edits whose images all still have the wanted answer; arguments as for :func:`edit_success`.

    Example:
        >>> retention(torch.tensor([3, 1, 5]), torch.tensor([3, 3, 5]), torch.tensor([0, 0, 1]))
        0.5
    """
    held = [bool(hits.all()) for hits in _by_edit(predictions, targets, edits)]
    return sum(held) / len(held) if held else nan


def locality(before: Tensor, after: Tensor) -> float:
    """Return the share of images whose answer an edit did not change.

    Args:
        before: (B,) integers, answers before the edit.
        after: (B,) integers, those after it.

    A float in [0, 1].

    Example:
        >>> locality(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    return _mean(_pair("before", before, "after", after))


def locality_kl(before: Tensor, after: Tensor) -> float:
    r"""Return the mean of :math:`KL(p \Vert \tilde p)` over images, p the class probabilities before the edit.

    Args:
        before: (B, C) floating-point logits before the edit.
        after: (B, C), those after it.

    A float, at least 0 but for rounding; computed in float64.

    Example:
        >>> locality_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        0.0
    """
    return _mean(_divergences(before, after))


def drawdown(before: Tensor, after: Tensor, targets: Tensor) -> float:
    """Return how many percentage points of accuracy an edit costs.

    Args:
        before: (B,) integers, answers before the edit.
        after: (B,) integers, those after it.
        targets: (B,) integers, the right ones.

    A float in [-100, 100].

    Example:
        >>> drawdown(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]))
        25.0
    """
    lost, number = _lost(before, after, targets)
    return 100 * lost / number if number else nan


class _EditingMetric(ExactMetric):
    """A sum and a number whose quotient, times a factor, is the value; they add up over batches and processes."""

    higher_is_better: bool | None = True
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    total: Tensor
    number: Tensor

    _dimensions = 0
    _label = ""
    _unit = "%"
    _factor = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("number", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _count(self, values: Tensor) -> None:
        self.total += values.double().sum()
        self.number += len(values)

    def compute(self) -> Tensor:
        """Return the value for everything counted so far, a float64 scalar, ``NaN`` where nothing was."""
        return self._value(self._of(self.total, self.number))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the value as a bar on given axes, or on those of a new figure that pyplot does not know; return both."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            value = self._of(self.total, self.number)
        return figures.plot_values({self._label: value}, ax, unit=self._unit)

    def _of(self, total: Tensor, number: Tensor) -> float:
        return self._factor * float(total) / int(number) if int(number) else nan


class _AnswersMetric(_EditingMetric):
    """Of answers and the wanted ones."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count rows; arguments and errors are those of :func:`reliability`. Nothing is counted after an error."""
        self._count(_hits(predictions, targets))


class Reliability(_AnswersMetric):
    """Share of edited images that have the wanted answer. See :func:`reliability`.

    Example:
        >>> metric = Reliability()
        >>> metric.update(torch.tensor([3, 1]), torch.tensor([3, 2]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    _label = "reliability"


class Generality(_AnswersMetric):
    """Share of equivalents that have the wanted answer. See :func:`generality`."""

    _label = "generality"


class EditSuccess(_EditingMetric):
    """Mean over edits of the share of their images with the wanted answer ("ES"). See :func:`edit_success`."""

    _label = "edit success"

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count the images and equivalents of one edit; errors as of :func:`reliability`."""
        hits = _hits(predictions, targets)
        self._count(hits.double().mean()[None] if len(hits) else hits)


class Retention(_EditingMetric):
    """Share of earlier edits all of whose images still have the wanted answer. See :func:`retention`."""

    _label = "retention"

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count the images of one earlier edit; errors as of :func:`reliability`."""
        hits = _hits(predictions, targets)
        self._count(hits.all()[None] if len(hits) else hits)


class Locality(_EditingMetric):
    """Share of other images whose answer did not change. See :func:`locality`."""

    _label = "locality"

    def update(self, before: Tensor, after: Tensor) -> None:
        """Count images; arguments and errors are those of :func:`locality`."""
        self._count(_pair("before", before, "after", after))


class LocalityKL(_EditingMetric):
    """Mean KL divergence of the class probabilities of other images. See :func:`locality_kl`."""

    higher_is_better: bool | None = False
    plot_upper_bound: float | None = None
    _label = "locality KL"
    _unit = "nats"

    def update(self, before: Tensor, after: Tensor) -> None:
        """Count images; arguments and errors are those of :func:`locality_kl`."""
        self._count(_divergences(before, after))


class Drawdown(_EditingMetric):
    """Loss of accuracy on other images, in percentage points ("DD"). See :func:`drawdown`."""

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -100.0
    plot_upper_bound: float | None = 100.0
    _label = "drawdown"
    _unit = "points"
    _factor = 100.0

    def update(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Count images; arguments and errors are those of :func:`drawdown`."""
        lost, number = _lost(before, after, targets)
        self.total += lost
        self.number += number


def _hits(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return whether each counted row has the wanted answer, (n,) bool."""
    same = _pair("predictions", predictions, "targets", targets)
    return same[targets >= 0]


def _pair(name: str, values: Tensor, other_name: str, others: Tensor) -> Tensor:
    given, wanted = integers(name, values), integers(other_name, others)
    if len(given) != len(wanted):
        raise BatchError(f"{name} has {len(given)} entries and {other_name} {len(wanted)}: give one of each an image")
    return given == wanted


def _by_edit(predictions: Tensor, targets: Tensor, edits: Tensor) -> list[Tensor]:
    hits, own = _hits(predictions, targets), integers("edits", edits)
    if len(own) != len(targets):
        raise BatchError(f"edits has {len(own)} entries and targets {len(targets)}: give one of each an image")
    own = own[targets >= 0]
    return [hits[own == each] for each in torch.unique(own)]


def _lost(before: Tensor, after: Tensor, targets: Tensor) -> tuple[int, int]:
    was, now = _hits(before, targets), _hits(after, targets)
    return int(was.sum()) - int(now.sum()), len(was)


def _divergences(before: Tensor, after: Tensor) -> Tensor:
    for name, logits in (("before", before), ("after", after)):
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            seen = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise BatchError(f"{name} is {seen}: it must be floating-point logits (B, C)")
    if before.shape != after.shape:
        raise BatchError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}: they must be the same"
        )
    old, new = before.double().log_softmax(dim=1), after.double().log_softmax(dim=1)
    return (old.exp() * (old - new)).sum(dim=1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else nan
