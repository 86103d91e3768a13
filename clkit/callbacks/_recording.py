"""One evaluation, batch by batch: what each predictor said of each sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from clkit.callbacks.base import MODULE, Predictor
from clkit.distributed import gather_objects
from clkit.errors import BatchError, ConfigurationError
from clkit.features.batch import Readings, sample_size
from clkit.features.observer import BatchObserver
from clkit.report.results import Recorded

__all__ = ["Recorder", "layers_of", "module_predicts"]


class Recorder:
    """Collects on the host what each predictor says in one evaluation, and the columns that callbacks offer.

    A callback that gives columns and has ``on_columns_end(trainer)`` is told when the evaluation is over, also one that
    is no validation of Lightning's.

    Ids are those of the user where the stream relabels classes; task ids restrict a prediction to the classes of the
    experience.

    Args:
        trainer: The trainer with its callbacks.
        datamodule: Its data module, if any.
        owner: The callback that evaluates, whose reader finds the targets.
        predictors: Each with what shows the features that it reads, by name.
        module: What shows the user's own classifier, where that is a predictor.
        callbacks: All of the trainer, some of which may give columns.
        learned: Index of the last experience that it has learned, -1 for none.

    Attributes:
        samples: Number of samples of each experience that this process saw.
        left_out: Why the user's module is no predictor after all, once that was seen.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        datamodule: Any,
        owner: Any,
        predictors: Mapping[str, tuple[Predictor, BatchObserver]],
        module: BatchObserver | None,
        callbacks: Sequence[Any],
        learned: int,
    ) -> None:
        self.samples: dict[int, int] = {}
        self.left_out = ""
        self._batches: list[Recorded] = []
        self._owner, self._own = owner, getattr(owner, "observer", None)
        self._trainer, self._learned = trainer, learned
        self._offering = [callback for callback in callbacks if hasattr(callback, "sample_columns")]
        self._predictors: dict[str, tuple[Predictor | None, BatchObserver]] = {**predictors}  # None: the module itself
        if module is not None:
            self._predictors = {MODULE: (None, module), **predictors}
        self._reader = Readings.of(trainer).given(owner) if self._own is None else self._own.reader
        self._others = {name for name, (_, observer) in predictors.items() if observer.reader is not self._reader}
        self._classes = getattr(datamodule, "num_classes", None)
        original = getattr(datamodule, "original_ids", None)
        self._original = None if original is None else torch.tensor([*original, -1])
        self._tasks = datamodule.experiences if getattr(datamodule, "gives_task_id", False) else None

    def add(self, batch: Any, experience: int | Tensor, rows: Any = None, place: int = 0) -> None:
        """Record the batch that the observer has open, its rows of the data set if known, and its loader's number.

        Its experience is an index, or (B,) int64 where each row has its own, -1 for a row that belongs to none.

        Raises:
            BatchError: If a column of a callback is not a (B,) tensor of numbers.
            ConfigurationError: If the name of a column is taken.
        """
        if self._own is None:
            inputs, targets = Readings.of(self._trainer).read(self._owner, batch, needs_targets=False)
        else:
            inputs, targets = self._own.inputs, self._own.targets
        size, seen = sample_size(inputs)[0] if targets is None else len(targets), sum(self.samples.values())
        recorded = Recorded(
            experiences=torch.full((size,), experience) if isinstance(experience, int) else experience,
            targets=torch.full((size,), -1) if targets is None else targets.long().cpu(),
            rows=torch.arange(seen, seen + size) if rows is None else torch.as_tensor(rows),
            places=torch.full((size,), place),
        )
        learned = (recorded.experiences >= 0) & (recorded.experiences <= self._learned)
        for name, (predictor, observer) in self._predictors.items():
            if predictor is None:
                self.left_out = self.left_out or why_no_class_scores(
                    observer, self._classes, recorded.targets[learned], insists=self._owner.module is True
                )
                if self.left_out:
                    continue
            if name in self._others and observer.targets is not None:
                recorded.own_targets[name] = observer.targets.long().cpu()
            scores = observer.logits if predictor is None else observer.scores(predictor)
            if scores is None or scores.shape[1] == 0:  # it has learned nothing: not evaluated, rather than all wrong
                continue
            scores = scores.double().cpu()
            if self._tasks is not None:
                classes = torch.tensor(list(self._tasks[int(experience)].classes))
                allowed = torch.isin(self._own_ids(torch.arange(scores.shape[1])), classes)
                scores = torch.where(allowed, scores, -torch.inf)
            best = scores.max(dim=1)
            known = best.values.isfinite()
            recorded.predicted[name] = torch.where(known, best.indices, -1)
            recorded.scores[name] = torch.where(known, best.values, torch.nan)
        for callback in self._offering:
            self._add_columns(recorded.columns, callback, batch, size)
        self._batches.append(recorded)
        found, counts = torch.unique(recorded.experiences, return_counts=True)
        for index, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.samples[index] = self.samples.get(index, 0) + count

    def is_complete(self, loaders: Sequence[Any]) -> bool:
        """Return whether this process saw every sample that the loader was to give (a resumed validation may not)."""
        if not loaders or not hasattr(loaders[0], "expected_samples"):
            return True
        return bool(self.samples == loaders[0].expected_samples(int(self._trainer.num_val_batches[0])))

    def gathered(self) -> Recorded:
        """Return everything, of all processes in the order of their ranks."""
        nothing = torch.empty(0, dtype=torch.int64)
        recorded = Recorded.join(self._batches or [Recorded(nothing, nothing, nothing)])
        parts, reasons = zip(*gather_objects((recorded, self.left_out), "what they evaluated"), strict=True)
        for callback in self._offering:
            if hasattr(callback, "on_columns_end"):
                callback.on_columns_end(self._trainer)
        if len(parts) > 1:
            recorded = Recorded.join(parts)
        self.left_out = next(filter(None, reasons), "")
        if self.left_out:
            recorded.predicted.pop(MODULE, None)
            recorded.scores.pop(MODULE, None)
        if recorded.own_targets:
            self._say_other_targets(recorded)
        if self._original is None:
            return recorded
        predicted = {name: self._own_ids(ids) for name, ids in recorded.predicted.items()}
        others = {name: self._own_ids(ids) for name, ids in recorded.own_targets.items()}
        return replace(recorded, targets=self._own_ids(recorded.targets), own_targets=others, predicted=predicted)

    def _own_ids(self, ids: Tensor) -> Tensor:
        """Return the user's ids for those of a relabelled stream; -1 for what is none."""
        if self._original is None:
            return ids
        inside = (ids >= 0) & (ids < len(self._original) - 1)
        return self._original[torch.where(inside, ids, -1)]

    def _say_other_targets(self, recorded: Recorded) -> None:
        if MODULE in recorded.predicted and self._reader is None:
            others = [name for name, ids in recorded.own_targets.items() if not torch.equal(ids, recorded.targets)]
            if others:
                self._predictors[MODULE][1].say_once(
                    f"{' and '.join(others)} are evaluated on the targets of their own batch_reader, and the module on "
                    f"others, which a batch has in the usual form; pass batch_reader= to {self._owner.state_key} if "
                    "that is not what the module learns",
                    rank_zero_warn,
                )

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


def module_predicts(asked: bool | str, trainer: pl.Trainer, measured: Collection[str], *, grafted: bool) -> bool:
    """Whether the module's own classifier is a predictor, where ``"auto"`` may be asked for; see ``StreamEvaluation``.

    ``measured`` are the predictors so far, and ``grafted`` says that a head stands in the classifier's place.
    """
    if asked != "auto" or getattr(trainer.strategy, "trains_module", True):
        return bool(asked)
    # grafted only at a fit's end it would be a row with one entry, the same as that of the head
    fitting = trainer.state.fn == "fit" and bool(measured) and MODULE not in measured
    return grafted and not fitting


def why_no_class_scores(observer: BatchObserver, classes: int | None, learned: Tensor, *, insists: bool) -> str:
    """Return why the output of the user's classifier cannot be scores of classes for the open batch, if it cannot.

    ``classes`` is how many the data have, if they say so, and ``learned`` are the targets in the batch that the network
    has learned; who ``insists`` gets the accuracy of any two columns.
    """
    logits, shape = observer.logits, observer.output_shape
    where = f"{observer.point!r}, taken for the input of its classifier"
    if logits is None:
        advice = "name the layer that gives the logits: StreamEvaluation(layer='…')"
        return f"its layer at {observer.point!r} has no logits (B, C) behind it; {advice}"
    if logits.shape[1] == 1:
        return f"the layer at {where}, gives one number a sample, which is no score for each class"
    if insists:
        return ""
    if shape is not None and len(shape) > 2:
        return f"it returns {shape}, which are no scores (B, C); its layer was read at {where}"
    highest = int(learned.max()) if len(learned) else -1
    if highest >= logits.shape[1]:
        return (
            f"the layer at {where}, gives {logits.shape[1]} numbers a sample, which cannot be scores of what it has "
            f"learned: there are samples of class {highest}. module=True evaluates it all the same"
        )
    width = sample_size(observer.inputs)[1]
    if logits.shape[1] == width and width != classes:
        return (
            f"the layer at {where}, gives {width} numbers a sample, as many as the input has: it reconstructs and does "
            "not classify. module=True evaluates it all the same"
        )
    return ""


def layers_of(
    predictors: Mapping[str, tuple[Predictor, BatchObserver]], module: BatchObserver | None
) -> dict[str, Any]:
    """Return where each predictor, and the user's module, is read, for ``results.json``."""
    taps = {name: observer.tap for name, (_, observer) in predictors.items()}
    if module is not None:
        taps[MODULE] = module.tap
    # where an output is read only a forward tells how wide it is, or what was learned
    learned = {
        name: getattr(getattr(each, "_head", None), "in_features", None) for name, (each, _) in predictors.items()
    }
    widths = {tap.point: learned.get(name) if (width := tap.width) is None else width for name, tap in taps.items()}
    known = {taps[name].point: width for name, width in learned.items() if width is not None}
    return {
        name: {"layer": tap.point, "features": widths[tap.point] or known.get(tap.point)} for name, tap in taps.items()
    }
