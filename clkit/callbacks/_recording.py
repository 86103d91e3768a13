"""One evaluation, batch by batch: what each predictor said of each sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks.base import MODULE, Predictor
from clkit.distributed import gather_objects
from clkit.errors import BatchError, ConfigurationError
from clkit.features.observer import BatchObserver
from clkit.report.results import Recorded
from clkit.stream._lightning import callbacks_of, datamodule_of

__all__ = ["Recorder"]


class Recorder:
    """Collects on the host what each predictor says in one evaluation, and the columns that callbacks offer.

    Ids are those of the user where the stream relabels classes; task ids restrict a prediction to the classes of the
    experience.

    Args:
        trainer: The trainer with its callbacks.
        observer: What shows the batches.
        module: Whether the user's own classifier is a predictor.

    Attributes:
        samples: Number of samples of each experience that this process saw.
    """

    def __init__(self, trainer: pl.Trainer, observer: BatchObserver, module: bool) -> None:
        self.samples: dict[int, int] = {}
        self._batches: list[Recorded] = []
        self._observer = observer
        callbacks, datamodule = list(callbacks_of(trainer)), datamodule_of(trainer)
        self._predictors: dict[str, Predictor | None] = {MODULE: None} if module else {}  # None: the module itself
        self._predictors |= {callback.name: callback for callback in callbacks if isinstance(callback, Predictor)}
        self._offering = [callback for callback in callbacks if hasattr(callback, "sample_columns")]
        original = getattr(datamodule, "original_ids", None)
        self._original = None if original is None else torch.tensor([*original, -1])
        self._tasks = datamodule.experiences if getattr(datamodule, "gives_task_id", False) else None

    def add(self, batch: Any, experience: int, rows: Any = None) -> None:
        """Record the batch that the observer has open, its experience's index, and its rows of the data set if known.

        Raises:
            BatchError: If a column of a callback is not a (B,) tensor of numbers.
            ConfigurationError: If the name of a column is taken.
        """
        observer = self._observer
        size, seen = len(observer.features()), sum(self.samples.values())
        recorded = Recorded(
            experiences=torch.full((size,), experience),
            targets=torch.full((size,), -1) if observer.targets is None else observer.targets.long().cpu(),
            rows=torch.arange(seen, seen + size) if rows is None else torch.as_tensor(rows),
        )
        for name, predictor in self._predictors.items():
            scores = observer.logits if predictor is None else observer.scores(predictor)
            if scores is None or scores.shape[1] == 0:  # it has learned nothing: not evaluated, rather than all wrong
                continue
            scores = scores.double().cpu()
            if self._tasks is not None:
                classes = torch.tensor(list(self._tasks[experience].classes))
                allowed = torch.isin(self._own_ids(torch.arange(scores.shape[1])), classes)
                scores = torch.where(allowed, scores, -torch.inf)
            best = scores.max(dim=1)
            known = best.values.isfinite()
            recorded.predicted[name] = torch.where(known, best.indices, -1)
            recorded.scores[name] = torch.where(known, best.values, torch.nan)
        for callback in self._offering:
            self._add_columns(recorded.columns, callback, batch, size)
        self._batches.append(recorded)
        self.samples[experience] = self.samples.get(experience, 0) + size

    def gathered(self) -> Recorded:
        """Return everything, of all processes in the order of their ranks."""
        nothing = torch.empty(0, dtype=torch.int64)
        own = Recorded.join(self._batches or [Recorded(nothing, nothing, nothing)])
        recorded = Recorded.join(gather_objects(own, "what they evaluated"))
        if self._original is None:
            return recorded
        predicted = {name: self._own_ids(ids) for name, ids in recorded.predicted.items()}
        return replace(recorded, targets=self._own_ids(recorded.targets), predicted=predicted)

    def _own_ids(self, ids: Tensor) -> Tensor:
        """Return the user's ids for those of a relabelled stream; -1 for what is none."""
        if self._original is None:
            return ids
        inside = (ids >= 0) & (ids < len(self._original) - 1)
        return self._original[torch.where(inside, ids, -1)]

    def _add_columns(self, columns: dict[str, Tensor], callback: Any, batch: Any, size: int) -> None:
        owner = f"sample_columns of {type(callback).__name__}"
        taken = {"row", "target", "target_name", *columns}
        for name in self._predictors:
            taken |= {name, f"{name}_name", f"{name}_score"}
        for name, values in callback.sample_columns(batch).items():
            if name in taken:
                raise ConfigurationError(f"{owner} has {name!r}, which another column is called; give it another name")
            if not isinstance(values, Tensor) or values.shape != (size,) or values.is_complex():
                seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise BatchError(f"{owner} gives {seen} for {name!r}: it must be a tensor of {size} real numbers")
            wide = torch.float64 if values.is_floating_point() else torch.int64
            columns[name] = values.detach().cpu().to(torch.bool if values.dtype == torch.bool else wide)
