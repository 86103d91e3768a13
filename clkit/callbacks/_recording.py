"""One evaluation, counted: what each predictor said, row by row of the accuracy matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clkit._lightning import datamodule_of
from clkit.callbacks.base import MODULE, Predictor, scores_of
from clkit.observer import BatchObserver

__all__ = ["Allowed", "ModulePredictor", "Recorded", "Recorder", "Row", "allowed_for", "diagonal", "share", "tables"]

Ids = npt.NDArray[np.int64]


@dataclass
class Row:
    """What one predictor got right on one evaluation: counts by experience and by class, and the confusions."""

    correct: dict[int, int] = field(default_factory=dict)
    total: dict[int, int] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)  # (class, predicted class) -> samples

    @classmethod
    def of(cls, experiences: Ids, targets: Ids, predicted: Ids) -> Row:
        row = cls()
        for experience in np.unique(experiences):
            own = experiences == experience
            row.total[int(experience)] = int(own.sum())
            row.correct[int(experience)] = int((targets[own] == predicted[own]).sum())
        pairs, counts = np.unique(np.stack([targets, predicted]), axis=1, return_counts=True)
        row.pairs = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs.T, counts, strict=True)}
        return row

    def by_class(self) -> tuple[dict[int, int], dict[int, int]]:
        correct: dict[int, int] = {}
        total: dict[int, int] = {}
        for (target, predicted), count in self.pairs.items():
            total[target] = total.get(target, 0) + count
            correct[target] = correct.get(target, 0) + count * (target == predicted)
        return correct, total

    def to_tensors(self) -> dict[str, Tensor]:
        rows = [[j, self.correct[j], n] for j, n in sorted(self.total.items())]
        pairs = [[t, p, n] for (t, p), n in sorted(self.pairs.items())]
        return {
            "experiences": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3),
        }

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> Row:
        row = cls()
        for j, correct, total in state["experiences"].tolist():
            row.correct[j], row.total[j] = correct, total
        row.pairs = {(t, p): n for t, p, n in state["pairs"].tolist()}
        return row


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
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return Recorded(*own)
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, own)
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


def tables(rows: dict[int, Row]) -> Tables:
    stages = [stage for stage in sorted(rows) if stage > 0]
    columns = sorted({j for row in rows.values() for j in row.total})
    # one fixed test set (a stream whose test domains are never trained) is a single column; otherwise column = index
    width = 1 if len(columns) == 1 else max(columns, default=-1) + 1
    height = max(stages, default=0)
    classes = sorted({target for row in rows.values() for target, _ in row.pairs})
    position = {label: k for k, label in enumerate(classes)}
    tables = [torch.zeros(height, width, dtype=torch.int64) for _ in range(2)]
    class_tables = [torch.zeros(height, len(classes), dtype=torch.int64) for _ in range(2)]
    for stage in stages:
        row = rows[stage]
        for j, n in row.total.items():
            column = 0 if width == 1 else j
            tables[0][stage - 1, column], tables[1][stage - 1, column] = row.correct[j], n
        for values, table in zip(row.by_class(), class_tables, strict=True):
            for label, n in values.items():
                table[stage - 1, position[label]] = n
    baseline = None
    if 0 in rows and width > 1:
        baseline = torch.tensor(
            [rows[0].correct.get(j, 0) / rows[0].total[j] if j in rows[0].total else torch.nan for j in range(width)],
            dtype=torch.float64,
        )
    return Tables(tables[0], tables[1], class_tables[0], class_tables[1], baseline)


def diagonal(pairs: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Keeps hits and misses of each class and forgets with what it was confused (-1)."""
    kept: dict[tuple[int, int], int] = {}
    for (target, predicted), count in pairs.items():
        key = (target, target if predicted == target else -1)
        kept[key] = kept.get(key, 0) + count
    return kept


def _joined(parts: list[Ids]) -> Ids:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def share(correct: dict[int, int], total: dict[int, int]) -> float | None:
    return sum(correct.values()) / sum(total.values()) if total else None
