"""What an evaluation shows: logs, tables in the terminal, files and figures in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from clkit.metrics.functional import METRICS
from clkit.report.results import Recorded, Results, RunResults, results_document, write_predictions, write_results
from clkit.stream._lightning import callbacks_of, is_fast_dev_run
from clkit.stream.boundaries import Boundaries

__all__ = ["RunFolder", "has_matplotlib", "measure_stage", "show", "show_evaluation", "show_stage"]


class RunFolder:
    """The files of a run; only the first process writes them, and none in a ``fast_dev_run``.

    Args:
        trainer: The trainer; all processes must come here, because they agree on the folder.
        datamodule: Its data module, if any.
        files: Whether to write at all.
    """

    def __init__(self, trainer: pl.Trainer, datamodule: Any, files: bool) -> None:
        self.path = Path(trainer.log_dir or trainer.default_root_dir)
        self._trainer = trainer
        self._data = datamodule
        self._files = files and trainer.is_global_zero
        self.writes = self._files and not is_fast_dev_run(trainer)

    def write(self, measured: RunResults, config: Mapping[str, Any], seconds: Mapping[str, float]) -> float:
        """Write the tables and ``results.json``, and return how many seconds that took."""
        start = time.perf_counter()
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            names = getattr(self._data, "class_names", None) or {}
            document = results_document(measured, self._data, config, seconds)
            write_results(self.path, document, measured.class_tables(), names)
        return time.perf_counter() - start

    def write_predictions(self, recorded: Recorded) -> None:
        """Write ``predictions.csv``, also in a ``fast_dev_run``."""
        if self._files:
            path = self.path / "predictions.csv"
            write_predictions(path, recorded, getattr(self._data, "class_names", None) or {})
            show(self._trainer, f"predictions: {path}")

    def draw(self, results: Results | None) -> None:
        """Draw the two figures of the results; for ``None`` those of the strategy and of other callbacks."""
        if not self.writes or not has_matplotlib():
            return
        from clkit.report.run_figures import draw_figures, save_figures

        if results is None:
            save_figures(self.path, [self._trainer.strategy, *callbacks_of(self._trainer)])
        else:
            draw_figures(self.path, results)


def has_matplotlib() -> bool:
    """Return whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def log_metrics(trainer: pl.Trainer, module: pl.LightningModule | None, results: Results) -> None:
    """Log every metric by its full name: through the module, or where it cannot log, straight to the loggers."""
    values = {}
    for name, summary in results.items():
        for metric in METRICS:
            value = summary[metric]
            if isinstance(value, list):
                value = value[-1] if value else None
            if value is not None:
                values[f"{name}/{metric}"] = value
    if module is not None:
        module.log_dict(values, rank_zero_only=False)
    else:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def show(trainer: pl.Trainer, what: Any) -> None:
    """Print above the progress bar where there is a rich one; only on the first process."""
    if not trainer.is_global_zero:
        return
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.console import Console

    bar = trainer.progress_bar_callback
    live = bar.progress if isinstance(bar, RichProgressBar) else None
    (Console() if live is None else live.console).print(what)


def measure_stage(
    datamodule: Any,
    measured: RunResults,
    stage: int,
    recorded: Recorded,
    notes: Mapping[str, str],
    *,
    cut: bool = False,
    fills: bool = False,
) -> Results:
    """Take the evaluation of a stage up, and say once what must be known of it: notes by kind, and why one is null.

    One that only ``fills`` counts where the stage was not measured yet: other samples beside those that measured the
    stages before would be taken for a change of the accuracy. Returns the metrics of all predictors.
    """
    if fills:
        recorded = measured.unmeasured(stage, recorded)
        if not bool((recorded.experiences >= 0).any()):
            return measured.summaries()
    experiences = getattr(datamodule, "experiences", None) or ()
    measured.measure(stage, recorded, cut=cut, experiences=experiences, said=notes)
    new, results = measured.new_notes(), measured.summaries()
    for note in new:
        rank_zero_info(f"clkit: {note}")
    return results


def show_stage(
    trainer: pl.Trainer, module: pl.LightningModule | None, results: Results, stage: int, *, table: bool
) -> None:
    """Log the metrics after a stage, through the module if there is one, and print the table."""
    log_metrics(trainer, module, results)
    if table:
        from clkit.report.tables import stage_table

        boundaries = Boundaries.of(trainer)
        name = "" if boundaries.current is None else f": {boundaries.current.name}"
        title = f"after experience {stage}{name}{', cut short' * boundaries.cut}"
        show(trainer, stage_table(results, title=title))


def show_evaluation(
    trainer: pl.Trainer, module: pl.LightningModule, recorded: Recorded, what: str, *, table: bool
) -> None:
    """Log the accuracies of one evaluation that the user asked for, and print them."""
    shown = RunResults()
    shown.measure(1, recorded)
    accuracies = {name: counts.accuracies() for name, counts in shown.counts.items()}
    module.log_dict({f"{name}/accuracy_seen": seen for name, (_, seen) in accuracies.items() if seen is not None})
    if table:
        from clkit.report.tables import evaluation_table

        show(trainer, evaluation_table(accuracies, title=what))
