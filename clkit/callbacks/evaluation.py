"""Evaluating a stream: the accuracy matrix of every predictor, its metrics, table, files and figures."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from clkit.arguments import check_arguments
from clkit.callbacks._brought import BroughtClasses, experience_of_batch
from clkit.callbacks._own_pass import own_pass
from clkit.callbacks._recording import Recorder, layers_of, module_predicts
from clkit.callbacks._showing import RunFolder, has_matplotlib, measure_stage, show, show_evaluation, show_stage
from clkit.callbacks.base import MODULE, FeatureCallback, Predictor, Stage
from clkit.errors import ArgumentError, ConfigurationError, TapError, first_line
from clkit.features.batch import BatchReader
from clkit.features.kept import KeptFeatures
from clkit.features.observer import BatchObserver, forward
from clkit.report.results import Recorded, Results, RunResults
from clkit.schema import Real, saved_entry
from clkit.stream._lightning import callbacks_of, datamodule_of, evaluated_loaders
from clkit.stream.boundaries import BoundaryPhase
from clkit.stream.experience import Experience, experience_state, saved_experience

__all__ = ["StreamEvaluation"]


class StreamEvaluation(FeatureCallback):
    """Fills the accuracy matrix of every predictor and shows it: table, files, figures, logs.

    Predictors are the module's own classifier and every callback that answers ``scores(features)``. After each
    experience one pass over the validation loader fills one row R[i, :] for all of them: Lightning's own validation
    where one comes, a pass of this callback's own otherwise. With plain loaders the class of a row says whose it is,
    and ``test`` leaves what a validation has measured: its samples are others.

    Logged as ``<predictor>/<metric>``, as :mod:`clkit.metrics` defines them: ``accuracy_seen``,
    ``average_incremental_accuracy``, ``average_accuracy``, ``forgetting``, ``backward_transfer``, ``forward_transfer``,
    ``amca``. Written to the run's folder (``trainer.log_dir``): ``results.json``, ``accuracy.csv``, ``per_class.csv``,
    ``confusion_<predictor>.csv``, two figures and those that ``run_figures()`` of the strategy or of a callback gives
    by name, and, by ``predict``, ``predictions.csv``. What ``sample_columns(batch)`` of a callback gives, (B,) tensors
    by name, are columns of ``predictions.csv``, and their means by experience are in ``results.json``. Batches of an
    experience are evaluated inside ``activated(index)`` of each callback that has such a context manager.

    Args:
        module: Whether the module's own classifier is a predictor; ``"auto"`` leaves it out where a strategy does not
            train it and no head was grafted into it.
        table: Whether to print a table at each boundary.
        files: Whether to write result files.
        figures: Whether to draw figures at the end of a fit, which needs matplotlib (``pip install "clkit[report]"``);
            ``"auto"`` draws them where it is installed, and says so where it is not.
        keep_features: Most MiB of evaluation features that are kept while the network inside the module stays as it is,
            or that of an experience, so that T experiences cost about T passes through it and not T(T+1)/2; the bits
            are the same. 8 rows of each experience or more are run again and compared; :doc:`announce
            </guide/boundaries>` what may change only few of the others. 0 keeps none.
        layer: Where the module's own classifier is, if it is not the one that :class:`~clkit.FeatureTap` finds. Each
            callback is evaluated on the features of its own ``layer``.
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
        check_arguments(StreamEvaluation, locals())
        super().__init__(layer=layer, batch_reader=batch_reader)
        if keep_features < 0:
            raise ArgumentError(f"keep_features must be a number of MiB of at least 0, got {keep_features}")
        self.module = module
        self.table = table
        self.files = files
        self.figures = figures
        self.config: dict[str, Any] = {}  # what a person set, for results.json; the command line fills it in
        self._measured = RunResults()
        self._pending: Experience | None = None
        self._seconds = {"fit": 0.0, "evaluate": 0.0}
        self._callbacks: list[Any] = []  # of the trainer
        self._switching: list[Any] = []  # those that change the network for each experience
        self._active = ExitStack()  # what they keep up for the experience of the batch in work
        self._kept = KeptFeatures(keep_features * 2**20)
        self._recorder: Recorder | None = None
        self._loaders: Sequence[Any] = ()  # of the evaluation in work
        self._watched: dict[str, tuple[Predictor, BatchObserver]] = {}  # by name, with what shows what each reads
        self._left_out = ""  # why the module is no predictor though it might be
        self._said_left_out = False
        self._brought = BroughtClasses()
        self._data, self._has_stream = None, False  # a stream says which rows belong to which experience
        self._folder: RunFolder | None = None
        self._measured_at = 0  # training batches that were done when a row was measured last
        self._batch: tuple[Any, Any, Any, int] = (None, 0, None, 0)  # the one in work, its experience, rows and loader
        self._clock = self._fit_clock = 0.0
        self._written = (0.0, 0.0)  # when files were last written, and how long that took

    # ---- what the user reads afterwards

    @property
    def results(self) -> Results:
        """Metrics of every predictor as in ``results.json``; accuracies in [0, 1], ``None`` where not evaluated."""
        return self._measured.summaries()

    def class_counts(self, predictor: str) -> dict[int, tuple[int, int]]:
        """Return correct and total samples of each class after the last stage, for one predictor.

        Raises:
            ArgumentError: If it was not evaluated; the message lists those that were.
        """
        return self._measured.class_counts(predictor)

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the readers of each predictor, once it is known that figures can be drawn."""
        if stage == "fit" and self.figures and self.files and not has_matplotlib():
            missing = 'figures need matplotlib, which is not installed: pip install "clkit[report]"'
            if self.figures != "auto":
                raise ConfigurationError(f"{missing}, or set figures=False")
            rank_zero_info(f"clkit: {missing}")
        self._callbacks, self._data = callbacks_of(trainer), datamodule_of(trainer)
        self._has_stream = hasattr(self._data, "evaluation_loader")
        self._switching = [callback for callback in self._callbacks if hasattr(callback, "activated")]
        predictors = [callback for callback in self._callbacks if isinstance(callback, Predictor)]
        self._watched = {each.name: (each, BatchObserver.attach(trainer, pl_module, each)) for each in predictors}
        super().setup(trainer, pl_module, stage)
        self.observers |= {observer: predictor for predictor, observer in self._watched.values()}

    def refresh(self, trainer: pl.Trainer, moment: Hashable = None) -> None:
        """Look for the tapped layers again; without a classifier the module is no predictor."""
        for observer in tuple(self.observers):
            try:
                observer.refresh(moment)
            except TapError as error:
                optional = self.layer == "auto" and self.module is not True and self._watched
                if not optional or self.observers[observer] is not self:
                    raise
                self._left_out = f"it has no classifier ({error})"
                del self.observers[observer]
                observer.detach(trainer)
                del self.observer

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        self._active.close()
        self._kept.end()
        self._kept.clear()
        for _, observer in self._watched.values():
            observer.detach(trainer)
        self._callbacks, self._switching, self._watched = [], [], {}
        super().teardown(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_fit_start(trainer, pl_module)
        self._fit_clock = time.perf_counter() - self._seconds["fit"]

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Measure what is pending before it is too late, and the untrained state where future is evaluated."""
        self._flush(trainer, pl_module)
        if experience.index == 0 and getattr(self._data, "evaluate", "seen") == "all":
            self._own_pass(trainer, pl_module, stage=0)

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Note that a row is pending from now on."""
        self._pending = experience

    def on_experience_cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Note that the state reached is to be measured, though the fit ends within the experience."""
        self._pending = experience

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note which classes the batch brings, where no stream says so."""
        if not self._has_stream:
            self._brought.see(trainer, self, batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the last row if no validation did, however the fit came to its end, and draw the figures."""
        super().on_train_end(trainer, pl_module)
        self._flush(trainer, pl_module)
        self._conclude(trainer, RunFolder(trainer, self._data, self.files))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Measure and write what a fit had reached when it failed, then take every hook off the network.

        With several processes, or where the user pressed a key to end it, what was measured before is written only.
        """
        current, self._batch = self._boundaries.current, (None, 0, None, 0)
        if trainer.state.fn == "fit" and current is not None and not trainer.sanity_checking:
            self._active.close()
            self._kept.end()
            unmeasured = self._boundaries.running and self._batches > self._measured_at
            if trainer.world_size == 1 and isinstance(exception, Exception) and (unmeasured or self._pending):
                self._pending, self._boundaries.cut = current, self._boundaries.running
                try:
                    self._flush(trainer, pl_module)
                except Exception as error:  # the user's own exception is what must be seen
                    rank_zero_warn(f"clkit: the state reached could not be measured: {first_line(error)}")
            if trainer.world_size == 1 or self._folder is not None:  # a new one would wait for the other processes
                self._conclude(trainer, self._folder or RunFolder(trainer, self._data, self.files))
        super().on_exception(trainer, pl_module, exception)

    def _conclude(self, trainer: pl.Trainer, folder: RunFolder) -> None:
        self._seconds["fit"] = time.perf_counter() - self._fit_clock
        if self._measured.counts:
            self._measured.layers = layers_of(self._watched, getattr(self, "observer", None))
            folder.write(self._measured, self.config, self._seconds)
            if self.figures:
                folder.draw(self.results)
            if self.table and folder.writes:
                show(trainer, f"results: {folder.path}")
        if self.figures:
            folder.draw(None)  # what others do wrong costs no results

    # ---- one evaluation

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Begin recording."""
        self._clock = time.perf_counter()
        self._recorder, self._loaders = None, []  # made at the first batch, when everyone else is ready
        if not self._has_stream:
            self._brought.begin(trainer)
        # who changes the network and does not say when it is the same leaves nothing to keep
        if stage == "validate" and self.observers and all(hasattr(each, "network_of") for each in self._switching):
            taps = [observer.tap for observer in self.observers]
            self._kept.begin(module, *taps, by_experience=bool(self._switching))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open a batch with everything in place that belongs to its experience."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._loaders = self._loaders or evaluated_loaders(trainer)
        self._opened(trainer, batch, batch_idx, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Record what each predictor says."""
        if self._kept.active:
            self._kept.after_batch(all(observer.is_own for observer in self.observers))
        self._recorder = self._recorder or self._new_recorder(trainer)
        self._recorder.add(*self._batch)
        self._batch = (None, 0, None, 0)
        self._active.close()

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Fill the pending row, show an evaluation that the user asked for, or write ``predictions.csv``."""
        if self._kept.active:
            self._kept.end()
        self._seconds["evaluate"] += time.perf_counter() - self._clock
        if stage == "predict":
            RunFolder(trainer, self._data, self.files).write_predictions(self._recorded(trainer))
        elif trainer.state.fn != "fit":
            self._show_evaluation(trainer, module, stage)
        elif self._pending is not None and not trainer.sanity_checking:
            self._recorder = self._recorder or self._new_recorder(trainer)
            self._fill(trainer, module, self._pending.index + 1, self._recorder.is_complete(self._loaders))
            self._pending = None

    def on_backbone_changed(self, trainer: pl.Trainer, module: pl.LightningModule, reason: str) -> None:
        """Let go of features that were kept of the network as it was."""
        if not self._switching:  # else those who show networks hear of it, and say which are still the same
            self._kept.clear()

    def _opened(self, trainer: pl.Trainer, batch: Any, batch_idx: int, place: int) -> None:
        """Have everything in place that belongs to the batch: its kept features, and who changes by its experience."""
        experience, rows = experience_of_batch(self._loaders, self._boundaries.current, batch_idx, place)
        self._batch = batch, experience, rows, place
        if rows is None:  # with plain loaders the classes say more
            found = self._brought.of_batch(trainer, self, batch, self._loaders, batch_idx, place)
            self._batch, experience = (batch, found, None, place), self._brought.one_of(found, self._switching)
        self._active.close()
        for callback in self._switching:
            self._active.enter_context(callback.activated(experience))
        if self._kept.active:
            networks = tuple(callback.network_of(experience) for callback in self._switching)
            self._kept.before_batch(experience, rows, networks)

    def _recorded(self, trainer: pl.Trainer) -> Recorded:
        """Return what all processes recorded in this evaluation; a call on all of them."""
        self._recorder = self._recorder or self._new_recorder(trainer)
        recorded = self._recorder.gathered()
        if not self._has_stream:
            recorded = self._brought.settled(trainer, recorded, several=len(self._loaders) > 1)
            self._measured.brought = self._brought.classes()
        if self._recorder.left_out:
            self._left_out = self._recorder.left_out
            self._measured.forget(MODULE)
            rank_zero_warn(f"{self.state_key} leaves the module out: {self._left_out}")
        return recorded

    def _new_recorder(self, trainer: pl.Trainer) -> Recorder:
        observer = getattr(self, "observer", None)
        grafted = any(getattr(callback, "grafted", False) for callback in self._callbacks)
        wanted = module_predicts(self.module, trainer, self._measured.counts, grafted=grafted)
        if wanted and observer is None and not self._said_left_out:
            self._said_left_out = True
            rank_zero_warn(f"{self.state_key} leaves the module out: {self._left_out}")
        module = observer if wanted and not self._left_out else None
        current, learned = self._boundaries.current, -1
        if current is not None and not grafted:
            learned = current.index - int(trainer.state.fn == "fit" and self._pending is None)
        return Recorder(trainer, self._data, self, self._watched, module, self._callbacks, learned)

    # ---- rows

    def _flush(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and trainer.limit_val_batches != 0:
            self._own_pass(trainer, module, stage=pending.index + 1)

    def _own_pass(self, trainer: pl.Trainer, module: pl.LightningModule, *, stage: int) -> None:
        def measure(loaders: Any, place: int, batch: Any, batch_idx: int) -> None:
            self.open(trainer, module, batch, ("own", stage, place, batch_idx))
            self._loaders = loaders
            self._opened(trainer, batch, batch_idx, place)
            for observer in {(id(each.inputs), each.tap.network): each for each in self.observers}.values():
                if not observer.is_own:
                    forward(module, observer.tap.network, observer.inputs)
            self.on_batch(trainer, module, "validate", batch_idx, place)

        self.refresh(trainer)
        self._stage = "validate"
        self.on_evaluation_start(trainer, module, "validate")
        measured = own_pass(trainer, module, stage, measure)
        self._kept.end()
        for observer in self.observers:
            observer.forget()
        self._seconds["evaluate"] += time.perf_counter() - self._clock
        if measured:
            self._fill(trainer, module, stage, complete=True, log_with_module=False)

    def _fill(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: int, complete: bool, log_with_module: bool = True
    ) -> None:
        recorded = self._recorded(trainer)
        if not complete:
            return
        said = self._brought.notes
        results = measure_stage(self._data, self._measured, stage, recorded, said, cut=self._boundaries.cut)
        self._measured_at = self._batches
        if stage == 0 or not self._measured.counts:
            return
        show_stage(trainer, module if log_with_module else None, results, stage, table=self.table)
        # before a decision that each process takes by its own clock
        folder = self._folder = RunFolder(trainer, self._data, self.files)
        last, cost = self._written  # files grow with the stream: at most a tenth of the time goes into them
        if time.perf_counter() - last >= 10 * cost:
            self._measured.layers = layers_of(self._watched, getattr(self, "observer", None))
            cost = folder.write(self._measured, self.config, self._seconds)
            self._written = time.perf_counter(), cost

    def _show_evaluation(self, trainer: pl.Trainer, module: pl.LightningModule, what: str) -> None:
        recorded, current = self._recorded(trainer), self._boundaries.current
        if current is not None and not self._has_stream:  # plain loaders: this is how a row of R is measured
            stage, said = current.index + 1, self._brought.notes
            measure_stage(self._data, self._measured, stage, recorded, said, fills=what == "test")
        show_evaluation(trainer, module, recorded, what, table=self.table)

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return what was measured, and clocks: tensors and plain types."""
        own = {"pending": experience_state(self._pending), "seconds": dict(self._seconds)}
        return {**self._measured.state_dict(), **own, "brought": self._brought.state_dict()}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        measured = RunResults()
        measured.load_state_dict(state, self.state_key)
        clocks = saved_entry(state, "seconds", dict, self.state_key)
        seconds = {name: saved_entry(clocks, name, Real(least=0), self.state_key) for name in self._seconds}
        pending = saved_experience(state, "pending", self.state_key)
        self._brought.load_state_dict(saved_entry(state, "brought", dict, self.state_key), self.state_key)
        self._pending, self._measured, self._seconds = pending, measured, seconds
