"""One evaluation, batch by batch: what each predictor said of each sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks.base import MODULE, Predictor, scores_of
from clkit.distributed import gather_objects
from clkit.errors import BatchError, ConfigurationError
from clkit.features.observer import BatchObserver
from clkit.report.results import Recorded
from clkit.stream._lightning import callbacks_of, datamodule_of
from clkit.stream.boundaries import Boundaries

__all__ = ["ModulePredictor", "Recorder", "batch_key", "loader_of", "place_of"]


class ModulePredictor:
    """The user's module as a predictor: its own logits, whatever features are asked about."""

    name = MODULE

    def __init__(self, observer: BatchObserver) -> None:
        self._observer = observer

    def scores(self, features: Tensor) -> Tensor:
        logits = self._observer.logits
        assert logits is not None
        return logits


class Recorder:
    """Collects on the host what each predictor says in one evaluation, and the columns that callbacks offer.

    The stream may relabel classes, whose own ids are recorded, and give task ids, which restrict a prediction to the
    classes of the experience.

    Args:
        trainer: The trainer, among whose callbacks are predictors and those that have ``sample_columns(batch)``.
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
        self._predictors: list[Predictor] = [callback for callback in callbacks if isinstance(callback, Predictor)]
        if module:
            self._predictors.insert(0, ModulePredictor(observer))
        self._offering = [callback for callback in callbacks if hasattr(callback, "sample_columns")]
        original = getattr(datamodule, "original_ids", None)
        self._original = None if original is None else torch.tensor([*original, -1])
        self._tasks = datamodule.experiences if getattr(datamodule, "gives_task_id", False) else None

    def add(self, batch: Any, experience: int, rows: Any = None) -> None:
        """Record the batch that the observer has open.

        Args:
            batch: The batch, as Lightning gives it to callbacks.
            experience: Index of the experience that it belongs to.
            rows: Which rows of the data set they are, or ``None`` for the next ones.

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
        for predictor in self._predictors:
            if predictor.name == MODULE and observer.logits is None:
                continue
            scores = scores_of(observer, predictor).cpu()
            if scores.shape[1] == 0:  # it has learned nothing: not evaluated, rather than all wrong
                continue
            if self._tasks is not None:
                classes = torch.tensor(list(self._tasks[experience].classes))
                allowed = torch.isin(self._own_ids(torch.arange(scores.shape[1])), classes)
                scores = torch.where(allowed, scores, -torch.inf)
            best = scores.max(dim=1)
            known = best.values.isfinite()
            recorded.predicted[predictor.name] = torch.where(known, best.indices, -1)
            recorded.scores[predictor.name] = torch.where(known, best.values, torch.nan)
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
        for predictor in self._predictors:
            taken |= {predictor.name, f"{predictor.name}_name", f"{predictor.name}_score"}
        for name, values in callback.sample_columns(batch).items():
            if name in taken:
                raise ConfigurationError(f"{owner} has {name!r}, which another column is called; give it another name")
            if not isinstance(values, Tensor) or values.shape != (size,) or values.is_complex():
                seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise BatchError(f"{owner} gives {seen} for {name!r}: it must be a tensor of {size} real numbers")
            wide = torch.float64 if values.is_floating_point() else torch.int64
            columns[name] = values.detach().cpu().to(torch.bool if values.dtype == torch.bool else wide)


def loader_of(loaders: Any, index: int) -> Any:
    """Return one of the loaders that Lightning runs, of which it gives a single one without a list."""
    return loaders[index] if isinstance(loaders, list | tuple) else loaders


def place_of(trainer: pl.Trainer, loaders: Any, batch_idx: int, dataloader_idx: int) -> tuple[int, Any]:
    """Return the experience that a batch belongs to, and its rows of the data set where the loader tells them."""
    loader = loader_of(loaders, dataloader_idx)
    if hasattr(loader, "experience_of"):
        experience, rows = loader.batches[batch_idx]
        return experience, rows
    # plain loaders: one for each experience, or one for the current experience alone
    several = isinstance(loaders, list | tuple) and len(loaders) > 1
    current = Boundaries.of(trainer).current
    return dataloader_idx if several or current is None else current.index, None


def batch_key(experience: int, rows: Any) -> tuple[int, ...] | None:
    """Return what tells an evaluation batch by its samples, or ``None`` where the loader does not tell its rows."""
    return None if rows is None else (experience, len(rows), int(rows[0]), int(rows[-1]))
