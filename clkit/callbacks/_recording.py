"""One evaluation, counted: what each predictor said, row by row of the accuracy matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clkit.callbacks.base import MODULE, Predictor, scores_of
from clkit.distributed import gather_objects
from clkit.errors import StateError
from clkit.features.observer import BatchObserver
from clkit.schema import saved_entry
from clkit.stream._lightning import datamodule_of

__all__ = [
    "Allowed",
    "ModulePredictor",
    "Recorded",
    "Recorder",
    "Row",
    "Rows",
    "allowed_for",
    "packed",
    "tables",
    "unpacked",
]

Ids = npt.NDArray[np.int64]


@dataclass
class Row:
    """What one predictor got right on one evaluation.

    Attributes:
        experiences: (n, 3) experience, correct, samples; sorted.
        pairs: (m, 3) class, predicted class (-1 for none, or for any other), samples; sorted.
    """

    experiences: Ids = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    pairs: Ids = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))

    @classmethod
    def of(cls, experiences: Ids, targets: Ids, predicted: Ids) -> Row:
        one = np.ones_like(targets)
        return cls(
            _summed(experiences[:, None], np.stack([(targets == predicted).astype(np.int64), one], axis=1)),
            _summed(np.stack([targets, predicted], axis=1), one[:, None]),
        )

    @cached_property
    def classes(self) -> Ids:
        """(k, 3) class, correct, samples; sorted."""
        target, predicted, count = self.pairs.T
        return _summed(target[:, None], np.stack([count * (target == predicted), count], axis=1))

    @property
    def accuracy(self) -> float | None:
        """Share of all samples that are right."""
        _, correct, total = self.experiences.sum(axis=0).tolist()
        return correct / total if total else None

    def joined(self, other: Row) -> Row:
        """The counts of both; of an experience that both measured, those of ``other`` alone."""
        if np.isin(self.experiences[:, 0], other.experiences[:, 0]).any():
            return other
        experiences, pairs = (
            np.concatenate(both) for both in ((self.experiences, other.experiences), (self.pairs, other.pairs))
        )
        return Row(_summed(experiences[:, :1], experiences[:, 1:]), _summed(pairs[:, :2], pairs[:, 2:]))

    def without_confusions(self) -> Row:
        """Hits and misses of each class, but not with what it was confused (-1)."""
        target, predicted, count = self.pairs.T
        merged = np.where(predicted == target, target, -1)
        return Row(self.experiences, _summed(np.stack([target, merged], axis=1), count[:, None]))


class Rows(dict[int, Row]):
    """The rows of one predictor by stage, and their tables below each other, to which each new row only adds."""

    def __init__(self, rows: Mapping[int, Row] | None = None) -> None:
        super().__init__(rows or {})
        self._stacks: dict[str, tuple[int, Ids]] = {}  # by table: of how many stages, and the table

    def __setitem__(self, stage: int, row: Row) -> None:
        added = not self or stage > max(self)
        same = stage in self and self[stage].experiences is row.experiences  # only its confusions went
        if not (added or same):
            self._stacks.clear()
        super().__setitem__(stage, row)

    def stacked(self, name: Literal["experiences", "classes"]) -> Ids:
        """(n, 4): a table of all stages, the stage in front."""
        done, stack = self._stacks.get(name, (0, _stack([])))
        if done < len(self):
            stages = sorted(self)[done:]
            stack = np.concatenate([stack, _stack([(stage, getattr(self[stage], name)) for stage in stages])])
            self._stacks[name] = len(self), stack
        return stack


def packed(rows: dict[int, Row]) -> dict[str, Tensor]:
    """Rows by stage as two tables (n, 4) with the stage in front: thousands of small tensors would be slow to save."""
    stages = sorted(rows)
    return {
        name: torch.from_numpy(_stack([(stage, getattr(rows[stage], name)) for stage in stages]))
        for name in ("experiences", "pairs")
    }


def _stack(tables: list[tuple[int, Ids]]) -> Ids:
    stages = np.repeat([stage for stage, _ in tables], [len(table) for _, table in tables]).astype(np.int64)
    rows = np.concatenate([np.empty((0, 3), dtype=np.int64), *(table for _, table in tables)])
    return np.concatenate([stages[:, None], rows], axis=1)


def unpacked(state: Any, owner: str) -> Rows:
    """What :func:`packed` gave.

    Raises:
        StateError: If it is no such thing.
    """
    experiences, pairs = (_saved_table(state, name, owner) for name in ("experiences", "pairs"))
    stage, j, correct, total = experiences.T
    if ((stage < 0) | (j < 0) | (correct < 0) | (correct > total)).any():
        raise StateError(f"{owner}: the counts of its rows cannot be right; the file is damaged")
    _, target, predicted, count = pairs.T
    if ((target < 0) | (predicted < -1) | (count < 0)).any() or np.setdiff1d(pairs[:, 0], stage).size:
        raise StateError(f"{owner}: the counts of its classes cannot be right; the file is damaged")
    return Rows(
        {
            int(stage): Row(experiences[experiences[:, 0] == stage, 1:], pairs[pairs[:, 0] == stage, 1:])
            for stage in np.unique(stage)
        }
    )


def _summed(keys: Ids, values: Ids) -> Ids:
    """(u, k + v): the sorted distinct rows of ``keys`` (n, k), each with the sum of its rows of ``values`` (n, v)."""
    distinct, at = np.unique(keys, axis=0, return_inverse=True)
    sums = np.zeros((len(distinct), values.shape[1]), dtype=np.int64)
    np.add.at(sums, at.reshape(-1), values)
    return np.concatenate([distinct, sums], axis=1)


def _saved_table(state: Any, name: str, owner: str) -> Ids:
    table = saved_entry(state, name, Tensor, owner)
    if table.layout is not torch.strided or table.dtype != torch.int64 or table.ndim != 2 or table.shape[1] != 4:
        raise StateError(f"{owner}: {name!r} must be an int64 tensor (n, 4); the file is damaged")
    rows: Ids = table.cpu().numpy().copy()
    return rows


class ModulePredictor:
    """The user's module as a predictor: its own logits, whatever features are asked about."""

    name = MODULE

    def __init__(self, observer: BatchObserver) -> None:
        self._observer = observer

    def scores(self, features: Tensor) -> Tensor:
        logits = self._observer.logits
        assert logits is not None
        return logits


@dataclass
class Recorded:
    experiences: Ids
    targets: Ids
    rows: Ids
    predicted: dict[str, Ids]
    scores: dict[str, npt.NDArray[np.float64]]


class Recorder:
    """Collects, batch by batch on the host, what each predictor said in one evaluation."""

    def __init__(self) -> None:
        self.samples: dict[int, int] = {}
        self._experiences: list[Ids] = []
        self._targets: list[Ids] = []
        self._rows: list[Ids] = []
        self._predicted: dict[str, list[Ids]] = {}
        self._scores: dict[str, list[npt.NDArray[np.float64]]] = {}
        self._count = 0

    def add(
        self,
        observer: BatchObserver,
        predictors: list[Predictor],
        experience: int,
        allowed: Allowed,
        rows: Ids | None,
    ) -> None:
        features = observer.features()
        size = len(features)
        targets = np.full(size, -1, dtype=np.int64) if observer.targets is None else observer.targets.cpu().numpy()
        self._experiences.append(np.full(size, experience, dtype=np.int64))
        self._targets.append(allowed.original(targets.astype(np.int64)))
        self._rows.append(np.arange(self._count, self._count + size) if rows is None else rows)
        self.samples[experience] = self.samples.get(experience, 0) + size
        self._count += size
        for predictor in predictors:
            if scores_of(observer, predictor).shape[1] == 0:  # nothing learned: not evaluated, rather than all wrong
                continue
            best, score = allowed.decide(observer, predictor, features)
            self._predicted.setdefault(predictor.name, []).append(allowed.original(best))
            self._scores.setdefault(predictor.name, []).append(score)

    def gathered(self) -> Recorded:
        """Everything, of all processes in rank order."""
        own = (
            _joined(self._experiences),
            _joined(self._targets),
            _joined(self._rows),
            {name: _joined(parts) for name, parts in self._predicted.items()},
            {name: np.concatenate(parts) for name, parts in self._scores.items()},
        )
        shares = gather_objects(own, "what they evaluated")
        if len(shares) == 1:
            return Recorded(*own)
        names = list(shares[0][3])
        return Recorded(
            _joined([share[0] for share in shares]),
            _joined([share[1] for share in shares]),
            _joined([share[2] for share in shares]),
            {name: _joined([share[3][name] for share in shares]) for name in names},
            {name: np.concatenate([share[4][name] for share in shares]) for name in names},
        )


class Allowed:
    """Which classes may be predicted for a batch, and what they are called: the task id at test, and relabelling."""

    def __init__(self, columns: list[int] | None, original_ids: list[int] | None) -> None:
        self._columns = columns
        self._original = None if original_ids is None else np.asarray([*original_ids, -1], dtype=np.int64)

    def decide(
        self, observer: BatchObserver, predictor: Predictor, features: Tensor
    ) -> tuple[Ids, npt.NDArray[np.float64]]:
        scores = scores_of(observer, predictor).cpu()
        if scores.shape[1] == 0:
            return np.full(len(features), -1, dtype=np.int64), np.full(len(features), np.nan)
        if self._columns is not None:
            masked = torch.full_like(scores, -torch.inf)
            columns = [column for column in self._columns if column < scores.shape[1]]
            masked[:, columns] = scores[:, columns]
            scores = masked
        best = scores.max(dim=1)
        known = torch.isfinite(best.values)
        return (
            torch.where(known, best.indices, -1).numpy(),
            torch.where(known, best.values, torch.nan).numpy(),
        )

    def original(self, ids: Ids) -> Ids:
        if self._original is None:
            return ids
        inside = (ids >= 0) & (ids < len(self._original) - 1)
        mapped: Ids = self._original[np.where(inside, ids, -1)]
        return mapped


def allowed_for(trainer: pl.Trainer, experience: int) -> Allowed:
    """The task id at test restricts a prediction to the classes of its experience."""
    datamodule = datamodule_of(trainer)
    original = getattr(datamodule, "original_ids", None)
    if not getattr(datamodule, "gives_task_id", False):
        return Allowed(None, original)
    classes = list(datamodule.experiences[experience].classes)
    return Allowed(classes if original is None else [original.index(label) for label in classes], original)


@dataclass
class Tables:
    correct: Tensor
    total: Tensor
    class_correct: Tensor
    class_total: Tensor
    baseline: Tensor | None


def tables(rows: Rows) -> Tables:
    height = max(rows, default=0)
    by_experience, by_class = rows.stacked("experiences"), rows.stacked("classes")
    columns = np.unique(by_experience[:, 1])
    # one fixed test set (a stream whose test domains are never trained) is a single column; otherwise column = index
    width = 1 if len(columns) == 1 else int(columns.max(initial=-1)) + 1
    correct, total = (np.zeros((height, width), dtype=np.int64) for _ in range(2))
    stage, experience, hits, samples = by_experience[by_experience[:, 0] > 0].T
    at = stage - 1, 0 * experience if width == 1 else experience
    correct[at], total[at] = hits, samples
    classes = np.unique(by_class[:, 1])
    class_correct, class_total = (np.zeros((height, len(classes)), dtype=np.int64) for _ in range(2))
    stage, label, hits, samples = by_class[by_class[:, 0] > 0].T
    at = stage - 1, np.searchsorted(classes, label)
    class_correct[at], class_total[at] = hits, samples
    baseline = None
    if 0 in rows and width > 1:
        baseline = torch.full((width,), torch.nan, dtype=torch.float64)
        experience, hits, samples = torch.from_numpy(rows[0].experiences).T
        baseline[experience] = hits.double() / samples.double()
    return Tables(
        torch.from_numpy(correct),
        torch.from_numpy(total),
        torch.from_numpy(class_correct),
        torch.from_numpy(class_total),
        baseline,
    )


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
