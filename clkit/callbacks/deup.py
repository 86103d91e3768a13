"""DEUP: how far each prediction of a run can be trusted, learned from errors on what was not yet learned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from clkit.arguments import check_arguments
from clkit.callbacks._deup_choices import check
from clkit.callbacks._deup_parts import Arrived, Records, Settings
from clkit.callbacks._fitting_errors import fit_errors, network_trains, record_arriving, rows_come_once
from clkit.callbacks._judging import Judging
from clkit.callbacks._learned_layers import LearnedLayers
from clkit.callbacks._recording import module_predicts
from clkit.callbacks._watched import Watched
from clkit.callbacks.base import MODULE, FeatureCallback, Predictor, Stage, StreamCallback
from clkit.errors import ArgumentError, ConfigurationError, TapError
from clkit.features.observer import BatchObserver, FeaturesFrom
from clkit.methods.deup import ErrorModelName
from clkit.methods.sample_loss import SampleLoss
from clkit.schema import Instance, Named, Table, Whole, read_own
from clkit.stream._lightning import callbacks_of, datamodule_of
from clkit.stream.boundaries import BoundaryPhase
from clkit.stream.experience import Experience

__all__ = ["DEUP", "Records"]

Source = Literal["prequential", "loo", "gaussian", "novel", "calibration"]


class DEUP(FeatureCallback):
    r"""Says of each prediction how far it can be trusted: the error to expect, and how much of it data would remove.

    For every predictor of the run a second model learns its errors on samples that it had not learned, from numbers
    that keep their meaning while classes arrive: how far the features are from what was learned, and how sure the
    predictor is. With e the predicted error and a the part that is noise:

    .. math:: u(x) = \max(0, \; e(\phi(x)) - a(x))

    Heads on a frozen network (:class:`~clkit.callbacks.AEFOCL`, :class:`~clkit.callbacks.NMC`,
    :class:`~clkit.callbacks.LDA`) need no held-out data: what each would say of a sample that it had not learned is
    known in closed form. A network that trains needs samples kept out of training
    (``StreamDataModule(val_fraction=0.1)``), or its errors on arriving batches are all there is, which in a stream of
    new classes are larger than those on test data.

    Each sample of an evaluation gets columns, in ``predictions.csv`` and by their means in ``results.json``:
    ``<predictor>_total``, ``_aleatoric``, ``_epistemic``, in the unit of the loss, and as asked for ``_abstain``,
    ``_set_size`` and ``_novelty``. ``predict`` adds them to ``outputs["uncertainty"]`` where ``predict_step`` returns a
    dictionary, and collects them in :attr:`predictions` otherwise. Logged are
    ``deup/<predictor>/prequential_error`` while batches arrive, and metrics of :mod:`clkit.metrics.uncertainty` after
    each evaluation.

    Args:
        predictor: Names of the predictors to watch, ``"module"`` for the module's own classifier; ``"auto"`` for all.
        loss: The error: ``"error"``, wrong or not, so that the total is the probability to be wrong; ``"brier"`` or
            ``"nll"`` (at most 10) of the softmax.
        sources: Where records of errors come from; see the page of the method. ``"auto"``: left-out rows (``"loo"``)
            for heads on a frozen network, else ``"calibration"`` where samples are kept out of training, else
            ``"prequential"``, arriving batches; and ``"novel"``, rows whose class is left out.
        features: Names out of :data:`clkit.methods.FEATURE_SIGNS`; ``"auto"``: distances and scores, for a network that
            trains scores alone.
        model: The error predictor, see :class:`~clkit.methods.ErrorPredictor`.
        aleatoric: The part that is noise: a number in the unit of the loss, ``"none"``, ``"neighbours"`` for the
            disagreement of the labels nearby, or a function of a batch's inputs that returns (B,).
        records: The :class:`Records` that are kept.
        abstain_rate: Share of inputs to abstain on.
        risk: Error rate that what is accepted may have, with probability ``1 - delta``; needs ``loss="error"``.
        delta: See there.
        coverage: Probability with which sets of classes hold the true one.
        class_conditional: Whether each class is to be covered so.
        adaptive: Step by which the sets follow drift, 0 for none.
        false_alarm_rate: Share of inputs of known classes that may be called new; adds ``_novelty``, the distance from
            everything learned, and ``_is_new``. It costs sums of D² numbers more.
        forward: Which pass the module's errors on training batches come from, see :class:`FeatureCallback`; heads have
            their own.
        name: Of this callback, where a run has several; comes before its columns.

    Raises:
        ArgumentError: If an argument is out of its range.
        ConfigurationError: At the start, for a predictor that there is not, or none at all.

    Example:
        >>> from clkit.callbacks import DEUP
        >>> DEUP(abstain_rate=0.05).state_key
        'DEUP'

    Reference:
        S. Lahlou et al., "DEUP: Direct Epistemic Uncertainty Prediction", TMLR 2023, arXiv 2102.08501. Left-out rows,
        imagined novelties and everything about streams are this library's.
    """

    boundary_phase = BoundaryPhase.ERROR
    stages = frozenset({"train", "validate", "test", "predict"})

    def __init__(
        self,
        predictor: Literal["auto"] | str | Sequence[str] = "auto",
        *,
        loss: SampleLoss = "error",
        sources: Literal["auto"] | Sequence[Source] = "auto",
        features: Literal["auto"] | Sequence[str] = "auto",
        model: ErrorModelName = "forest",
        aleatoric: float | Literal["none", "neighbours"] | Callable[[Any], Tensor] = "none",
        records: Records = Records(),
        abstain_rate: float | None = None,
        risk: float | None = None,
        delta: float = 0.05,
        coverage: float | None = None,
        class_conditional: bool = False,
        adaptive: float = 0.0,
        false_alarm_rate: float | None = None,
        forward: FeaturesFrom = "shared",
        name: str | None = None,
    ) -> None:
        check_arguments(DEUP, locals())
        super().__init__(forward=forward)
        self.name = name or ""
        self.prefix = f"{name}_" if name else ""
        self.predictor = predictor
        self.kept = records
        self.aleatoric = aleatoric
        self.false_alarm_rate = false_alarm_rate
        self._settings = Settings(
            loss=loss,
            features=features,
            sources=sources,
            model=model,
            aleatoric=aleatoric,
            records=records,
            abstain_rate=abstain_rate,
            risk=risk,
            delta=delta,
            coverage=coverage,
            class_conditional=class_conditional,
            adaptive=adaptive,
            false_alarm_rate=false_alarm_rate,
        )
        self._watched: dict[str, Watched] = {}
        self._observer_of: dict[str, BatchObserver] = {}
        self._layers = LearnedLayers(records, novelty=false_alarm_rate is not None)
        self.fitted = 0  # index of the experience after which error predictors were fitted last
        self._at = 0  # batches of the experience that are done
        self._first_epoch: int | None = None  # of the experience
        self._said: set[str] = set()
        self._judging = Judging(self)
        self.predictions: list[dict[str, dict[str, Tensor]]] = []
        """What the last ``predict`` said of each batch, by predictor, where ``predict_step`` returns no dictionary."""

    # ---- what the user reads afterwards

    @property
    def reports(self) -> dict[str, dict[str, float]]:
        """Metrics of each predictor in the last evaluation, by name; as they are logged."""
        return self._judging.reports

    def course(self, predictor: str) -> tuple[Tensor, Tensor]:
        """Return the mean total (T, K) by stage and class, NaN where not evaluated, and when each class was learned."""
        return self._judging.course(predictor)

    def error_predictor(self, predictor: str) -> Watched:
        """Return the error predictor of a predictor.

        Raises:
            ArgumentError: If it is not watched; the message lists those that are.
        """
        if predictor not in self._watched:
            raise ArgumentError(f"{predictor!r} is not watched; there are {', '.join(self._watched) or 'none yet'}")
        return self._watched[predictor]

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the predictors, and join the readers of each."""
        StreamCallback.setup(self, trainer, pl_module, stage)
        found: dict[str, Predictor | None] = {
            each.name: each for each in callbacks_of(trainer) if isinstance(each, Predictor)
        }
        if self.predictor == "auto":
            wanted = [*([MODULE] if module_predicts("auto", trainer, (), grafted=False) else []), *found]
        else:
            wanted = [self.predictor] if isinstance(self.predictor, str) else list(self.predictor)
        if odd := [name for name in wanted if name not in found and name != MODULE]:
            raise ConfigurationError(
                f"{self.state_key}: there is no predictor {odd[0]!r}; this run has {', '.join([MODULE, *found])}"
            )
        if not wanted:
            raise ConfigurationError(
                f"{self.state_key} watches predictors, and {type(trainer.strategy).__name__} trains no classifier: add "
                "one to the callbacks, AEFOCL() or NMC() say"
            )
        for name in wanted:
            if name not in self._watched:
                self._watched[name] = Watched(name, found.get(name), self._settings, self._say)
            self._watched[name].predictor = found.get(name)
        self._watched = {name: self._watched[name] for name in wanted}
        self._observer_of = {name: BatchObserver.attach(trainer, pl_module, found.get(name) or self) for name in wanted}
        self.observers = {observer: found.get(name) or self for name, observer in self._observer_of.items()}
        if MODULE in wanted and self.forward == "eval":
            self.observers[self._observer_of[MODULE]] = self
        self.observer = self._observer_of[wanted[0]]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        for name, observer in self._observer_of.items():
            observer.detach(trainer)
            self._watched[name].predictor = self._watched[name].classifier = None
        self._observer_of, self.observers = {}, {}
        self._judging.end()

    def refresh(self, trainer: pl.Trainer, moment: Hashable = None) -> None:
        """Look for the tapped layers again; a module without a classifier is not watched."""
        for name, observer in tuple(self._observer_of.items()):
            try:
                observer.refresh(moment)
            except TapError as error:
                if name != MODULE or self.predictor != "auto" or len(self._watched) == 1:
                    raise
                self._say(f"the module is not watched: it has no classifier ({error})")
                del self._watched[name], self._observer_of[name]
                if observer not in self._observer_of.values():
                    del self.observers[observer]
                    self.observer = next(iter(self.observers))
                observer.detach(trainer)
        self._settle(trainer)

    def _settle(self, trainer: pl.Trainer) -> None:
        """Settle what is to be recorded of each predictor, now that the network is there."""
        calibrates = getattr(datamodule_of(trainer), "evaluated_on", "") == "validation"
        for name, watched in self._watched.items():
            observer = self._observer_of[name]
            if trainer.state.fn == "fit" or not watched.names:  # an evaluation judges by what was learned
                watched.again = not rows_come_once(trainer)
                watched.choose(trains=network_trains(trainer, observer), calibrates=calibrates)
                if trainer.state.fn == "fit":
                    check(watched, calibrates=calibrates)
            classifier = observer.tap.classifier
            watched.classifier = classifier if isinstance(classifier, nn.Linear) else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tap the user's network, and take up what a resumed run left."""
        self.refresh(trainer)
        for watched in self._watched.values():
            watched.thaw(self.state_key)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring up to date what heads say, before any of them learns the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._reads:
            return
        every, at = self.kept.refresh, self._at
        if at == 0 or (at & (at - 1) == 0 if every == "doubling" else every != "experience" and at % every == 0):
            for name, watched in self._watched.items():
                ahead = watched.looks_ahead and watched.needs_rows
                own = ahead and watched.leverage is not None  # the leverage that it predicts with
                watched.frozen = None if watched.head is None else watched.head.frozen(leverage=own)
                if ahead:
                    self._layers.keep(self._observer_of[name].point)
        if not isinstance(self.kept.refit, str) and at and at % self.kept.refit == 0:
            fit_errors(self, trainer, pl_module, inside=True)

    def learns(self, trainer: pl.Trainer) -> bool:
        """Whether the batch in work is looked at: none of a warm-up, and none in a later epoch of an experience."""
        if not super().learns(trainer):
            return False
        if self._first_epoch is None:
            self._first_epoch = trainer.current_epoch
        return trainer.current_epoch == self._first_epoch

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Record the errors on a batch that is about to be learned, or judge one of an evaluation."""
        if stage != "train":
            self._judging.on_batch()
            return
        record_arriving(self, trainer, module, batch_idx)
        self._at += bool((self.observer.known_targets >= 0).any())

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Count anew."""
        self._at, self._first_epoch = 0, None
        for watched in self._watched.values():
            watched.arrived = Arrived()

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Fit the error predictors, once all heads have learned the experience."""
        self.fitted = experience.index
        fit_errors(self, trainer, pl_module)

    on_experience_cut = on_experience_end

    def on_backbone_changed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """Say that what was learned of the features from before may no longer fit."""
        if any(watched.errors.is_fitted for watched in self._watched.values()):
            self._say(f"the backbone changed: {reason}; errors were recorded with the features of before")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{self.state_key}: {message}")

    # ---- evaluations

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Begin to judge."""
        self._settle(trainer)
        self._judging.begin(stage)

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Log the metrics of each predictor."""
        if stage != "predict":
            for name, report in self._judging.conclude(trainer).items():
                logged = {f"deup/{self.prefix}{name}/{key}": value for key, value in report.items()}
                module.log_dict(logged, rank_zero_only=False)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand out what is said of the batch."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        said = self._judging.predictions()
        if isinstance(outputs, dict):
            outputs.setdefault("uncertainty", {}).update({f"{self.prefix}{each}": of for each, of in said.items()})
        else:
            self.predictions.append(said)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect anew."""
        self.predictions = []
        super().on_predict_start(trainer, pl_module)

    def sample_columns(self, batch: Any) -> dict[str, Tensor]:
        """Return what is said of each sample of the batch in work, (B,) by name."""
        return self._judging.columns()

    def on_columns_end(self, trainer: pl.Trainer) -> None:
        """Conclude an evaluation, where no validation of Lightning's does."""
        self._judging.conclude(trainer)

    def run_figures(self) -> dict[str, Any]:
        """Return figures of the last evaluation, by the name of their file."""
        return self._judging.figures()

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return everything: tensors and plain types."""
        return {
            "watched": {name: watched.state_dict() for name, watched in self._watched.items()},
            "layers": self._layers.state_dict(),
            "at": self._at,
            "fitted": self.fitted,
            "first_epoch": self._first_epoch,
            "report": self._judging.state_dict(),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            StateError: If it is damaged, or of other settings; nothing is changed then.
        """
        saved = read_own(state, _TABLE, self.state_key)
        layers = LearnedLayers(self.kept, novelty=self.false_alarm_rate is not None)
        layers.load_state_dict(saved["layers"], self.state_key)
        watched = {}
        for name, own in saved["watched"].items():
            if self._observer_of and name not in self._observer_of:  # this run has no such predictor
                continue
            present = self._watched[name].predictor if name in self._watched else None
            watched[name] = Watched(name, present, self._settings, self._say)
            watched[name].load_state_dict(own, self.state_key)
        self._judging.load_state_dict(saved["report"], self.state_key)
        self._layers, self._watched = layers, {**self._watched, **watched}
        self._at, self._first_epoch, self.fitted = saved["at"], saved["first_epoch"], saved["fitted"]


_TABLE: Table = {
    "watched": Named(Instance(dict)),
    "layers": Instance(dict),
    "at": Whole(),
    "fitted": Whole(),
    "first_epoch": Whole(optional=True),
    "report": Instance(dict),
}
