"""Evaluating a stream: the accuracy matrix of every predictor, its metrics, table, files and figures."""

from __future__ import annotations

import csv
import os
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from clkit._version import __version__
from clkit.callbacks._recording import (
    ModulePredictor,
    Recorded,
    Recorder,
    Row,
    Rows,
    allowed_for,
    packed,
    tables,
    unpacked,
)
from clkit.callbacks.base import MODULE, Predictor
from clkit.callbacks.features import FeatureCallback, Stage
from clkit.distributed import share_buffers
from clkit.errors import ArgumentError, ConfigurationError
from clkit.features.batch import BatchReader
from clkit.features.kept import KeptFeatures
from clkit.features.observer import evaluating, forward
from clkit.files import atomic_write
from clkit.schema import saved_entry
from clkit.stream._lightning import callbacks_of, datamodule_of, is_fast_dev_run
from clkit.stream.boundaries import Boundaries, BoundaryPhase
from clkit.stream.experience import Experience, experience_state, saved_experience

if TYPE_CHECKING:
    from clkit.report.results import ClassTable

__all__ = ["StreamEvaluation"]

Results = dict[str, dict[str, Any]]


class StreamEvaluation(FeatureCallback):
    """Fills the accuracy matrix of every predictor and shows it: table, files, figures, logs.

    Predictors are the module's own classifier, read at its output in the same pass, and every callback that answers
    ``scores(features)``. After each experience one pass over the validation loader fills one row R[i, :] for all of
    them: Lightning's own validation where one comes, a pass of this callback's own otherwise.

    Logged as ``<predictor>/<metric>``: ``accuracy_seen``, ``average_incremental_accuracy``, ``average_accuracy``,
    ``forgetting``, ``backward_transfer``, ``forward_transfer``, ``amca``; their definitions are those of
    :mod:`clkit.metrics`. Written to the run's folder (``trainer.log_dir``): ``results.json``, ``accuracy.csv``,
    ``per_class.csv``, ``confusion_<predictor>.csv``, the two figures, those of the strategy and of other callbacks that
    have some (a method ``run_figures()`` that gives matplotlib figures by name), and, by ``predict``,
    ``predictions.csv``.

    Args:
        module: Whether the module's own classifier is a predictor; ``"auto"`` leaves it out where a strategy does not
            train it and no head was grafted into it.
        table: Whether to print a table at each boundary.
        files: Whether to write result files.
        figures: Whether to draw figures at the end of a fit, which needs matplotlib (``pip install "clkit[report]"``);
            ``"auto"`` draws them where it is installed, and says so where it is not.
        keep_features: Most MiB of evaluation features that are kept while the network inside the module stays as it is,
            so that T experiences cost T passes through it and not T(T+1)/2; the bits are the same. 0 keeps none.
        layer: Where features are read; the same as for the heads.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Raises:
        ArgumentError: If ``module`` or ``figures`` is none of its choices.
        ConfigurationError: When a fit begins, for ``figures=True`` without matplotlib.

    Example:
        >>> from clkit.callbacks import StreamEvaluation
        >>> StreamEvaluation(table=False).state_key
        'StreamEvaluation'
    """

    boundary_phase = BoundaryPhase.EVALUATE
    stages = frozenset({"validate", "test", "predict"})

    def __init__(
        self,
        *,
        module: Literal["auto"] | bool = "auto",
        table: bool = True,
        files: bool = True,
        figures: Literal["auto"] | bool = "auto",
        keep_features: int = 1024,
        layer: str = "auto",
        batch_reader: BatchReader | None = None,
    ) -> None:
        super().__init__(layer=layer, batch_reader=batch_reader)
        if module not in ("auto", True, False):
            raise ArgumentError(f"module must be 'auto', True or False, got {module!r}")
        if figures not in ("auto", True, False):
            raise ArgumentError(f"figures must be 'auto', True or False, got {figures!r}")
        if keep_features < 0:
            raise ArgumentError(f"keep_features must be a number of MiB of at least 0, got {keep_features}")
        self.module = module
        self.table = table
        self.files = files
        self.figures = figures
        self.config: dict[str, Any] = {}  # what a person set, for results.json; the command line fills it in
        self._rows: dict[str, Rows] = {}  # predictor -> stage (0 = before training) -> row
        self._pending: Experience | None = None
        self._seconds = {"fit": 0.0, "evaluate": 0.0}
        self._active = ExitStack()  # what other callbacks keep up for the experience of the batch in work
        self._kept = KeptFeatures(keep_features * 2**20)
        self._recorder = Recorder()
        self._clock = 0.0
        self._fit_clock = 0.0
        self._written = (0.0, 0.0)  # when files were last written, and how long that took

    # ---- what the user reads afterwards

    @property
    def results(self) -> Results:
        """Metrics of every predictor as in ``results.json``; accuracies in [0, 1], ``None`` where not evaluated."""
        from clkit.metrics.functional import summarize

        summaries = {}
        for name, rows in self._rows.items():
            counts = tables(rows)
            summaries[name] = summarize(
                counts.correct,
                counts.total,
                class_correct=counts.class_correct,
                class_total=counts.class_total,
                baseline=counts.baseline,
            )
        return summaries

    def class_counts(self, predictor: str) -> dict[int, tuple[int, int]]:
        """Correct and total samples of each class after the last stage, for one predictor.

        Raises:
            ArgumentError: If it was not evaluated; the message lists those that were.
        """
        if not self._rows.get(predictor):
            raise ArgumentError(f"predictor={predictor!r} was not evaluated; there are {sorted(self._rows)}")
        rows = self._rows[predictor]
        return {label: (correct, total) for label, correct, total in rows[max(rows)].classes.tolist()}

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tap the user's network, once it is known that figures can be drawn."""
        if stage == "fit" and self.figures and self.files and find_spec("matplotlib") is None:
            missing = 'figures need matplotlib, which is not installed: pip install "clkit[report]"'
            if self.figures != "auto":
                raise ConfigurationError(f"{missing}, or set figures=False")
            rank_zero_info(f"clkit: {missing}")
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        self._active.close()
        self._kept.end()
        self._kept.clear()
        super().teardown(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_fit_start(trainer, pl_module)
        self._fit_clock = time.perf_counter() - self._seconds["fit"]

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Measures what is pending before it is too late, and the untrained state where future is evaluated."""
        self._flush(trainer, pl_module)
        if experience.index == 0 and getattr(datamodule_of(trainer), "evaluate", "seen") == "all":
            self._own_pass(trainer, pl_module, stage=0)

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """From now on a row is pending."""
        self._pending = experience

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the last row if no validation did, and draws the figures."""
        super().on_train_end(trainer, pl_module)
        self._flush(trainer, pl_module)
        self._seconds["fit"] = time.perf_counter() - self._fit_clock
        folder = self._folder(trainer)
        if self._rows:
            results = self.results
            self._write(trainer, results, folder)
            self._draw(trainer, results, folder)
            if self.table and self.files and trainer.is_global_zero and not is_fast_dev_run(trainer):
                _show(trainer, f"results: {folder}")
        self._draw_others(trainer, folder)  # what others do wrong costs no results

    # ---- one evaluation

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Begin recording."""
        self._clock = time.perf_counter()
        self._recorder = Recorder()
        if stage == "validate":
            self._begin_keeping(trainer, module)

    def open_batch(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Open a batch with everything in place that belongs to its experience."""
        super().open_batch(trainer, module, stage, batch, batch_idx, dataloader_idx)
        loaders = _loaders(trainer, stage)
        self._activate(trainer, _experience_of(trainer, loaders, batch_idx, dataloader_idx))
        if stage == "validate":
            self._kept.before_batch(_batch_key(loaders, batch_idx))

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Record what each predictor says."""
        if stage == "validate":
            self._kept.after_batch()
        self._record(trainer, _loaders(trainer, stage), batch_idx, dataloader_idx)
        self._active.close()

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Fill the pending row, show an evaluation that the user asked for, or write ``predictions.csv``."""
        self._kept.end()
        self._seconds["evaluate"] += time.perf_counter() - self._clock
        if stage == "predict":
            self._predicted(trainer)
        elif trainer.state.fn != "fit":
            self._show_evaluation(trainer, module, stage)
        elif self._pending is not None and not trainer.sanity_checking:
            complete = self._complete(trainer.val_dataloaders, trainer.num_val_batches)
            self._fill(trainer, module, self._pending.index + 1, complete)
            self._pending = None

    def on_backbone_changed(self, trainer: pl.Trainer, module: pl.LightningModule, reason: str) -> None:
        """Let go of features that were kept of the network as it was."""
        self._kept.clear()

    def _predicted(self, trainer: pl.Trainer) -> None:
        recorded = self._recorder.gathered()
        folder = self._folder(trainer)
        if trainer.is_global_zero and self.files:
            path = folder / "predictions.csv"
            _write_predictions(path, recorded, _class_names(trainer))
            _show(trainer, f"predictions: {path}")

    def _begin_keeping(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # where a callback changes the network for each experience, its features tell nothing of the next evaluation
        if not any(hasattr(callback, "activated") for callback in callbacks_of(trainer)):
            self._kept.begin(module, self.observer.tap)

    def _activate(self, trainer: pl.Trainer, experience: int) -> None:
        """Have each callback that has ``activated(experience)`` keep it up until the batch was recorded."""
        self._active.close()
        for callback in callbacks_of(trainer):
            if hasattr(callback, "activated"):
                self._active.enter_context(callback.activated(experience))

    def _record(self, trainer: pl.Trainer, loaders: Any, batch_idx: int, dataloader_idx: int) -> None:
        loader = _loader(loaders, dataloader_idx)
        experience = _experience_of(trainer, loaders, batch_idx, dataloader_idx)
        rows = loader.batches[batch_idx][1] if hasattr(loader, "experience_of") else None
        self._recorder.add(self.observer, self._predictors(trainer), experience, allowed_for(trainer, experience), rows)

    def _predictors(self, trainer: pl.Trainer) -> list[Predictor]:
        found: list[Predictor] = [
            callback for callback in callbacks_of(trainer) if callback is not self and isinstance(callback, Predictor)
        ]
        if self._module_predicts(trainer) and self.observer.logits is not None:
            found.insert(0, ModulePredictor(self.observer))
        return found

    def _module_predicts(self, trainer: pl.Trainer) -> bool:
        if self.module != "auto":
            return bool(self.module)
        trained = getattr(trainer.strategy, "trains_module", True)
        if trained:
            return True
        # grafted only at a fit's end it would be a row with one entry, the same as that of the head
        fitting = trainer.state.fn == "fit" and bool(self._rows) and MODULE not in self._rows
        return not fitting and any(getattr(callback, "grafted", False) for callback in callbacks_of(trainer))

    # ---- rows

    def _complete(self, loaders: Any, batches_run: list[int | float]) -> bool:
        """Whether this process saw every sample that the loader was to give (a resumed validation may not)."""
        loader = _loader(loaders, 0)
        if not hasattr(loader, "expected_samples"):
            return True
        return bool(self._recorder.samples == loader.expected_samples(int(batches_run[0])))

    def _flush(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._pending is None:
            return
        if trainer.limit_val_batches != 0 and hasattr(datamodule_of(trainer), "evaluation_loader"):
            self._own_pass(trainer, module, stage=self._pending.index + 1)
        self._pending = None  # with plain loaders the rows come from the user's own validations

    def _own_pass(self, trainer: pl.Trainer, module: pl.LightningModule, *, stage: int) -> None:
        share_buffers(trainer.strategy.model)
        self.observer.refresh()
        self.on_evaluation_start(trainer, module, "validate")
        loader = datamodule_of(trainer).evaluation_loader(max(stage - 1, 0))
        with evaluating(module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch_idx, host_batch in enumerate(loader):
                converted = trainer.precision_plugin.convert_input(host_batch)
                batch = trainer.strategy.batch_to_device(converted)
                self.observer.open(trainer, module, batch, ("own", stage, batch_idx), reader=self.batch_reader)
                self._activate(trainer, _experience_of(trainer, loader, batch_idx, 0))
                self._kept.before_batch(_batch_key(loader, batch_idx))
                forward(module, self.observer.tap.network, self.observer.inputs)
                self._kept.after_batch()
                self._record(trainer, loader, batch_idx, 0)
                self._active.close()
        self._kept.end()
        self.observer.forget()
        self._seconds["evaluate"] += time.perf_counter() - self._clock
        self._fill(trainer, module, stage, complete=True, log_with_module=False)

    def _fill(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: int, complete: bool, log_with_module: bool = True
    ) -> None:
        recorded = self._recorder.gathered()
        if not complete:
            return
        for name, predicted in recorded.predicted.items():
            labelled = recorded.targets >= 0
            row = Row.of(recorded.experiences[labelled], recorded.targets[labelled], predicted[labelled])
            rows = self._rows.setdefault(name, Rows())
            if rows:  # confusions are kept of the last stage only: those of all would grow with the stream's square
                rows[max(rows)] = rows[max(rows)].without_confusions()
            rows[stage] = row
        if stage == 0:
            return
        results = self.results
        self._log(trainer, module, results, log_with_module)
        if self.table:
            self._print_table(trainer, results, stage)
        folder = self._folder(trainer)  # before a decision that each process takes by its own clock
        last, cost = self._written  # files grow with the stream: at most a tenth of the time goes into them
        if time.perf_counter() - last >= 10 * cost:
            self._write(trainer, results, folder)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, results: Results, with_module: bool) -> None:
        values = {}
        for name, summary in results.items():
            for metric in METRICS:
                value = summary[metric]
                if isinstance(value, list):
                    value = value[-1] if value else None
                if value is not None:
                    values[f"{name}/{metric}"] = value
        if with_module:
            module.log_dict(values, rank_zero_only=False)
        else:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    # ---- showing and writing

    def _print_table(self, trainer: pl.Trainer, results: Results, stage: int) -> None:
        if not trainer.is_global_zero:
            return
        from clkit.report.tables import stage_table

        experience = Boundaries.of(trainer).current
        title = f"after experience {stage}" + ("" if experience is None else f": {experience.name}")
        _show(trainer, stage_table(results, title=title))

    def _show_evaluation(self, trainer: pl.Trainer, module: pl.LightningModule, what: str) -> None:
        recorded = self._recorder.gathered()
        labelled = recorded.targets >= 0
        rows = {
            name: Row.of(recorded.experiences[labelled], recorded.targets[labelled], predicted[labelled])
            for name, predicted in recorded.predicted.items()
        }
        current = Boundaries.of(trainer).current
        if current is not None and not hasattr(datamodule_of(trainer), "evaluation_loader"):
            for name, row in rows.items():  # plain loaders: this is how a row of R is measured
                stages = self._rows.setdefault(name, Rows())
                # measured again, the last measurement counts
                stages[current.index + 1] = stages.get(current.index + 1, Row()).joined(row)
        seen = {name: row.accuracy for name, row in rows.items()}
        module.log_dict({f"{name}/accuracy_seen": value for name, value in seen.items() if value is not None})
        if not trainer.is_global_zero:
            return
        from clkit.report.tables import evaluation_table

        accuracies = {name: {j: hits / n for j, hits, n in row.experiences.tolist()} for name, row in rows.items()}
        if self.table:
            _show(trainer, evaluation_table(accuracies, seen, title=what))

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes, so never behind a rank check

    def _write(self, trainer: pl.Trainer, results: Results, folder: Path) -> None:
        if not (self.files and trainer.is_global_zero) or is_fast_dev_run(trainer):
            return
        from clkit.report.results import write_results

        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder, self._document(trainer, results), self._class_tables(), _class_names(trainer))
        self._written = (time.perf_counter(), time.perf_counter() - start)

    def _document(self, trainer: pl.Trainer, results: Results) -> dict[str, Any]:

        datamodule = datamodule_of(trainer)
        experiences = getattr(datamodule, "experiences", None) or []
        return {
            "format": 1,
            "clkit": __version__,
            "seed": getattr(datamodule, "seed", None),
            "config": self.config,
            "evaluated_on": getattr(datamodule, "evaluated_on", None),
            "stream": {
                "scenario": getattr(getattr(datamodule, "scenario", None), "name", None),
                "experiences": [
                    {
                        "name": experience.name,
                        "classes": list(experience.classes),
                        "train_samples": experience.train_samples,
                        "eval_samples": experience.eval_samples,
                    }
                    for experience in experiences
                ],
            },
            "predictors": results,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "peak_memory_bytes": _peak_memory(),
        }

    def _class_tables(self) -> dict[str, ClassTable]:
        """Counts by class and the confusions, after the last stage of each predictor."""
        last = {name: rows[max(rows)] for name, rows in self._rows.items()}
        return {name: (row.classes.tolist(), row.pairs.tolist()) for name, row in last.items()}

    def _draws(self, trainer: pl.Trainer) -> bool:
        wanted = bool(self.figures) and self.files and trainer.is_global_zero and not is_fast_dev_run(trainer)
        return wanted and find_spec("matplotlib") is not None

    def _draw(self, trainer: pl.Trainer, results: Results, folder: Path) -> None:
        if self._draws(trainer):
            from clkit.report.figures import draw_figures

            draw_figures(folder, results)

    def _draw_others(self, trainer: pl.Trainer, folder: Path) -> None:
        """Figures of the strategy and of other callbacks."""
        if self._draws(trainer):
            from clkit.report.figures import save_figures

            save_figures(folder, [trainer.strategy, *callbacks_of(trainer)])

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Rows and clocks: integer tensors and plain types."""
        return {
            "rows": {name: packed(rows) for name, rows in self._rows.items()},
            "pending": experience_state(self._pending),
            "seconds": dict(self._seconds),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Takes rows and clocks back."""
        saved = saved_entry(state, "rows", dict, self.state_key)
        rows = {name: unpacked(table, f"{self.state_key}, rows of {name!r}") for name, table in saved.items()}
        clocks = saved_entry(state, "seconds", dict, self.state_key)
        seconds = {name: float(saved_entry(clocks, name, int | float, self.state_key)) for name in self._seconds}
        self._pending = saved_experience(state, "pending", self.state_key)
        self._rows, self._seconds = rows, seconds


METRICS = (
    "accuracy_seen",
    "average_incremental_accuracy",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "amca",
)


def _loaders(trainer: pl.Trainer, stage: Stage) -> Any:
    return {
        "validate": trainer.val_dataloaders,
        "test": trainer.test_dataloaders,
        "predict": trainer.predict_dataloaders,
    }[stage]


def _experience_of(trainer: pl.Trainer, loaders: Any, batch_idx: int, dataloader_idx: int) -> int:
    """Return the index of the experience that a batch of an evaluation belongs to."""
    loader = _loader(loaders, dataloader_idx)
    if hasattr(loader, "experience_of"):
        return int(loader.experience_of(batch_idx))
    # plain loaders: one for each experience, or one for the current experience alone
    several = isinstance(loaders, list | tuple) and len(loaders) > 1
    current = Boundaries.of(trainer).current
    return dataloader_idx if several or current is None else current.index


def _loader(loaders: Any, index: int) -> Any:
    return loaders[index] if isinstance(loaders, list | tuple) else loaders


def _batch_key(loaders: Any, batch_idx: int) -> tuple[int, ...] | None:
    """What tells an evaluation batch by its samples, or ``None`` where the loader is not a stream's."""
    loader = _loader(loaders, 0)
    if not hasattr(loader, "experience_of"):
        return None
    experience, rows = loader.batches[batch_idx]
    return (experience, len(rows), int(rows[0]), int(rows[-1]))


def _class_names(trainer: pl.Trainer) -> dict[int, str]:
    return getattr(datamodule_of(trainer), "class_names", None) or {}


def _show(trainer: pl.Trainer, what: Any) -> None:
    """Prints above the progress bar where there is a rich one."""
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.console import Console

    bar = trainer.progress_bar_callback
    live = bar.progress if isinstance(bar, RichProgressBar) else None
    (Console() if live is None else live.console).print(what)


def _write_predictions(path: Path, recorded: Recorded, names: dict[int, str]) -> None:
    order = np.argsort(recorded.rows, kind="stable")
    with atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header = ["row", "target", "target_name"]
        for name in recorded.predicted:
            header += [name, f"{name}_name", f"{name}_score"]
        writer.writerow(header)
        for i in order:
            target = int(recorded.targets[i])
            line: list[Any] = [int(recorded.rows[i]), target if target >= 0 else "", names.get(target, "")]
            for name, predicted in recorded.predicted.items():
                label = int(predicted[i])
                score = recorded.scores[name][i]
                line += [label if label >= 0 else "", names.get(label, ""), "" if np.isnan(score) else f"{score:.6g}"]
            writer.writerow(line)


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if os.name != "posix":
        return None  # the standard library tells it on POSIX systems only
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
