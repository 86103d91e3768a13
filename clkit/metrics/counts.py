"""The one table of counts that every accuracy of a stream is read from.

:class:`~clkit.callbacks.StreamEvaluation` and the metrics of :mod:`clkit.metrics` both count with it and read its
tables, so a number in ``results.json`` and the value of a metric cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.errors import ArgumentError, StateError
from clkit.schema import Numbers, Whole, read_state

__all__ = ["StreamCounts", "Tables", "add_up", "staged_counts"]

MOST_STAGES = 2**20  # more in a saved state are damage, for which no table should be made
MOST_CELLS = 2**26  # of a dense table, by the same right
MOST_SAMPLES = 2**53
_TABLE = {"counts": Numbers(("n", 5)), "last": Whole(-1, MOST_STAGES - 1)}


class Tables(NamedTuple):
    """Dense counts of the stages 1 … T on the CPU; the first five are what ``summarize`` takes."""

    correct: Tensor  # (T, E), with E of at least T, or of 1 for one fixed test set
    total: Tensor  # (T, E)
    class_correct: Tensor  # (T, K)
    class_total: Tensor  # (T, K)
    baseline: Tensor  # (E,) accuracies of stage 0, NaN where not evaluated
    classes: tuple[int, ...]  # the ids of the K columns

    def until(self, stage: int) -> Tables:
        """Return the tables of the stream cut after that many stages."""
        correct, total, class_correct, class_total = (table[:stage] for table in self[:4])
        return Tables(correct, total, class_correct, class_total, self.baseline, self.classes)


class StreamCounts:
    """How many samples of each class were taken for which class, at each stage and in each experience of a stream.

    Stage 0 is before any training, stage ``i`` after the ``i``-th experience. Only combinations that occurred take
    space, so ids may have gaps and be large.

    Attributes:
        rows: (n, 5) int64: stage, experience, class, predicted class, samples; distinct and sorted by the first four.
            A predicted class of -1 means none, or one that is not known any more.
        last: The last stage that was evaluated, also where no sample of it had a label; -1 before any.

    Example:
        >>> counts = StreamCounts()
        >>> counts.add(1, torch.tensor([0, 0, 0]), torch.tensor([7, 7, 9]), torch.tensor([7, 9, 9]))
        >>> counts.rows.tolist()
        [[1, 0, 7, 7, 1], [1, 0, 7, 9, 1], [1, 0, 9, 9, 1]]
        >>> counts.tables().correct, counts.tables().total
        (tensor([[2]]), tensor([[3]]))
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.rows = torch.zeros(0, 5, dtype=torch.int64) if rows is None else rows
        self.last = int(self.rows[-1, 0]) if len(self.rows) else -1

    # ---- counting

    def add(self, stage: int, experiences: Tensor, targets: Tensor, predictions: Tensor) -> None:
        """Count samples of a stage, each argument (n,) int64; one with the target -1 (unlabelled) is not counted."""
        keys = torch.stack([torch.full_like(targets, stage), experiences, targets, predictions], dim=1)
        self.merge(StreamCounts(add_up(keys[targets >= 0])))
        self.last = max(self.last, stage)

    def merge(self, other: StreamCounts) -> None:
        """Add the counts of another table."""
        rows = torch.cat([self.rows, other.rows.to(self.rows.device)])
        # A stage that follows all others needs no sorting, which would take longer and longer in a long stream.
        follows = bool(len(other.rows)) and int(other.rows[0, 0]) > self.last
        self.rows = rows if follows else add_up(rows[:, :4], rows[:, 4])
        self.last = max(self.last, other.last)

    def measure(self, stage: int, experiences: Tensor, targets: Tensor, predictions: Tensor) -> None:
        """Count one evaluation, as :meth:`add`; it takes the place of an earlier one of the stage's same experiences.

        Stages before the last one keep hits and misses of each class only, because confusions of all stages would grow
        with the stream's square.
        """
        measured = StreamCounts()
        measured.add(stage, experiences, targets, predictions)
        if stage > self.last:
            begin = int((self.rows[:, 0] < self.last).sum())
            keys, counts = self.rows[begin:, :4].clone(), self.rows[begin:, 4]
            keys[keys[:, 2] != keys[:, 3], 3] = -1
            self.rows = torch.cat([self.rows[:begin], add_up(keys, counts)])
        else:
            earlier = self.rows[:, 0] == stage
            if bool(torch.isin(self.rows[earlier, 1], measured.rows[:, 1]).any()):
                self.rows = self.rows[~earlier]
        self.merge(measured)

    # ---- reading

    def class_tables(self) -> tuple[Tensor, Tensor]:
        """Return (k, 3) class, correct and evaluated samples, and (m, 3) class, predicted class and samples.

        Both are of the last stage, sorted, with what occurred only.
        """
        rows = self.rows[self.rows[:, 0] == self.last]
        pairs = add_up(rows[:, 2:4], rows[:, 4])
        return add_up(pairs[:, :1], _hits(pairs)), pairs

    def accuracies(self) -> tuple[dict[int, float], float | None]:
        """Return the accuracy on each experience at the last stage, and on all samples (``None`` without any)."""
        rows = self.rows[self.rows[:, 0] == self.last]
        counted = add_up(rows[:, 1:2], _hits(rows)).tolist()
        hits, total = (sum(row[column] for row in counted) for column in (1, 2))
        return {j: correct / n for j, correct, n in counted}, hits / total if total else None

    def tables(self, *, by_experience: bool = False) -> Tables:
        """Return the dense tables of all stages; a class that only stage 0 evaluated has no column.

        Where only the first experience was evaluated that is one fixed test set, if not said to be ``by_experience``.
        """
        rows = self.rows.cpu()
        (stage, experience, label), both = rows[:, :3].unbind(1), _hits(rows)
        stages, width = max(self.last, 0), int(experience.max()) + 1 if len(experience) else 0
        if width != 1 or by_experience:
            width = max(width, stages)  # an experience that was not evaluated has a column too
        correct, total = _dense(stage, experience, both, stages + 1, width)
        later = stage > 0
        ids, column = torch.unique(label[later], return_inverse=True)
        class_correct, class_total = _dense(stage[later] - 1, column, both[later], stages, len(ids))
        baseline = correct[0].double() / total[0].double()
        return Tables(correct[1:], total[1:], class_correct, class_total, baseline, tuple(ids.tolist()))

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was counted: a tensor and a number."""
        return {"counts": self.rows, "last": self.last}

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take up what :meth:`state_dict` returned; ``owner`` is whose state it is, for the message.

        Raises:
            StateError: If it cannot be such a table; nothing is changed then.
        """
        saved = read_state(state, _TABLE, owner)
        rows, last = saved["counts"].cpu(), saved["last"]
        lowest = torch.tensor([0, 0, 0, -1, 1])
        if bool((rows < lowest).any()) or not torch.equal(rows, add_up(rows[:, :4], rows[:, 4])):
            raise StateError(f"{owner}: its counts cannot be right; the file is damaged")
        if float(rows[:, 4].double().sum()) > MOST_SAMPLES:
            raise StateError(f"{owner}: its counts add up to more than {MOST_SAMPLES} samples; the file is damaged")
        width = max(int(rows[:, 1].max()) + 1, len(rows[:, 2].unique())) if len(rows) else 0
        if (last + 1) * width > MOST_CELLS:
            raise StateError(f"{owner}: a table of {last + 1} stages by {width} cannot be right; the file is damaged")
        if bool((rows[:, 0] > last).any()):
            raise StateError(f"{owner}: {last} cannot be its last stage; the file is damaged")
        self.rows, self.last = rows, last


def _hits(rows: Tensor) -> Tensor:
    """Return (n, 2) correct and all samples of rows that end in class, predicted class and samples."""
    label, predicted, samples = rows[:, -3:].unbind(1)
    return torch.stack([samples * (label == predicted), samples], dim=1)


def add_up(keys: Tensor, values: Tensor | None = None) -> Tensor:
    """Return (u, k + v) int64: the distinct rows of (n, k) keys, sorted, with the sums over equal ones of the values.

    The values are (n,) or (n, v) int64, by default 1 for each key.

    Example:
        >>> add_up(torch.tensor([[5, 1], [2, 0], [5, 1]])).tolist()
        [[2, 0, 1], [5, 1, 2]]
    """
    values = torch.ones_like(keys[:, 0]) if values is None else values
    values = values[:, None] if values.ndim == 1 else values
    # Sorting column by column is several times faster than torch.unique(dim=0), and needs no bound on the ids.
    order = torch.arange(len(keys), device=keys.device)
    for column in reversed(range(keys.shape[1])):
        order = order[torch.argsort(keys[order, column], stable=True)]
    keys = keys[order]
    first = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    first[1:] = (keys[1:] != keys[:-1]).any(1)
    distinct = keys[first]
    sums = values.new_zeros(len(distinct), values.shape[1]).index_add_(0, first.cumsum(0) - 1, values[order])
    return torch.cat([distinct, sums], dim=1)


def _dense(rows: Tensor, columns: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """Return (2, height, width): the sums of (n, 2) values at their places."""
    sums = values.new_zeros(height * width, 2).index_add_(0, rows * width + columns, values)
    return sums.T.reshape(2, height, width)


def staged_counts(
    classes: Mapping[int, tuple[int, int]], stages: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return ``correct`` and ``total``, (T, T) integers, for a network that has learned everything at once.

    ``classes`` has for each class the correct and the evaluated test samples, ``stages`` the classes of each
    experience. After stage ``i`` the network is measured on the classes that the stream has brought by then, which is
    the stream's own evaluation where no class comes twice.

    Raises:
        ArgumentError: If a class comes in two experiences.

    Example:
        >>> staged_counts({0: (3, 4), 1: (1, 4), 2: (4, 4)}, [(0, 2), (1,)])
        ([[7, 0], [7, 1]], [[8, 0], [8, 4]])
    """
    labels = [label for stage in stages for label in stage]
    if len(labels) != len(set(labels)):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise ArgumentError(f"stages has the classes {twice} more than once: their samples belong to no one experience")
    last = [[sum(classes.get(label, (0, 0))[k] for label in stage) for stage in stages] for k in (0, 1)]
    correct, total = (
        [[count if j <= i else 0 for j, count in enumerate(row)] for i in range(len(stages))] for row in last
    )
    return correct, total
