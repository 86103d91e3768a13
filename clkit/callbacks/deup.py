"""DEUP: how far each prediction of a run can be trusted, learned from errors on what was not yet learned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.callbacks._deup_parts import Arrived, Records, Settings
from clkit.callbacks._fitting_errors import fit_errors, freeze, record_arriving
from clkit.callbacks._judging import Judging
from clkit.callbacks._watched import Watched
from clkit.callbacks._watching import Watching
from clkit.callbacks.base import FeatureCallback, Stage, StreamCallback
from clkit.errors import ArgumentError
from clkit.features.observer import FeaturesFrom
from clkit.methods.deup import ErrorModelName
from clkit.methods.sample_loss import SampleLoss
from clkit.schema import Instance, OneOf, Table, Whole, read_own
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
        abstain_rate: Share of inputs of known classes to abstain on, each class as frequent as the others where the
            memory could not keep all rows; nothing where there are fewer held-out records than ``1/abstain_rate - 1``.
        risk: Error rate that what is accepted may have, with probability ``1 - delta``; needs ``loss="error"``.
        delta: See there.
        coverage: Probability with which sets of classes hold the true one.
        class_conditional: Whether each class is to be covered so.
        adaptive: Step by which the sets follow a drift of the classes known, as samples of them arrive; 0 for none.
        false_alarm_rate: Share of inputs of known classes that may be called new; adds ``_novelty``, the distance from
            everything learned, and ``_is_new``, where the network is frozen or samples are kept out of its training. It
            costs sums of D² numbers more.
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
        if not predictor:
            raise ArgumentError(f"predictor must be 'auto', a name or several, got {predictor!r}")
        super().__init__(forward=forward)
        self.name = name or ""
        self.prefix = f"{name}_" if name else ""
        settings = Settings(
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
        self.settings = settings
        self._said: set[str] = set()
        self._watching = Watching(predictor, settings, forward, self._say)
        self._judging = Judging(self._watching, self.prefix)
        self._fitted = 0  # index of the experience after which error predictors were fitted last
        self._at_end = False  # whether an experience is over and no batch came since
        self._at = 0  # batches of the experience that are done
        self._first_epoch: int | None = None  # of the experience
        self.predictions: list[dict[str, dict[str, Tensor]]] = []
        """What the last ``predict`` said of each batch, by predictor, where ``predict_step`` returns no dictionary."""

    # ---- what the user reads afterwards

    @property
    def reports(self) -> dict[str, dict[str, float]]:
        """Metrics of each predictor in the last evaluation, by name; as they are logged."""
        return self._judging.reports

    @property
    def is_fitted(self) -> bool:
        """Whether errors of any predictor can be said by now."""
        return any(watched.errors.is_fitted for watched in self._watching.watched.values())

    def course(self, predictor: str) -> tuple[Tensor, Tensor]:
        """Return the mean total (T, K) by stage and class, NaN where not evaluated, and when each class was learned."""
        return self._judging.course(predictor)

    def error_predictor(self, predictor: str) -> Watched:
        """Return the error predictor of a predictor.

        Raises:
            ArgumentError: If it is not watched; the message lists those that are.
        """
        watched = self._watching.watched
        if predictor not in watched:
            raise ArgumentError(f"{predictor!r} is not watched; there are {', '.join(watched) or 'none yet'}")
        return watched[predictor]

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the predictors, and join the readers of each."""
        StreamCallback.setup(self, trainer, pl_module, stage)
        self._watching.join(trainer, pl_module, self)
        self._take_readers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        self._watching.leave(trainer)
        self.observers = {}
        self._judging.end()

    def refresh(self, trainer: pl.Trainer, moment: Hashable = None) -> None:
        """Look for the tapped layers again; a module without a classifier is not watched."""
        self._watching.refresh(trainer, moment)
        self._take_readers()

    def _take_readers(self) -> None:
        self.observers = self._watching.observers
        self.observer = next(iter(self.observers))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tap the user's network, and take up what a resumed run left."""
        self.refresh(trainer)
        self._judging.begin("validate")
        for watched in self._watching.watched.values():
            watched.thaw(self.state_key)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring up to date what heads say, before any of them learns the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._at_end = False
        if not self._reads:
            return
        every, refit, at = self.settings.records.refresh, self.settings.records.refit, self._at
        if at == 0 or (at & (at - 1) == 0 if every == "doubling" else every != "experience" and at % every == 0):
            freeze(self._watching)
        if not isinstance(refit, str) and at and at % refit == 0:
            fit_errors(self._watching, self._judging, trainer, pl_module, self._experience, inside=True)

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
        for observer, part in self.observers.items():
            if observer.has_rows(wanted := getattr(part, "forward", self.forward)):
                self._checked(observer.features(wanted), observer.known_targets)
        record_arriving(self._watching, self._judging, trainer, module, batch_idx, self._experience)
        self._at += bool((self.observer.known_targets >= 0).any())

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Count anew."""
        if experience.index == 0 and self._watching.layers.classes:
            self._say(
                "it has learned before and adds this stream to that, whatever the heads beside it know of it; use a "
                "new callback to start anew"
            )
        self._at, self._first_epoch = 0, None
        for watched in self._watching.watched.values():
            watched.arrived = Arrived()

    @property
    def _experience(self) -> int:
        return 0 if self._boundaries.current is None else self._boundaries.current.index

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Fit the error predictors, once all heads have learned the experience."""
        self._fitted, self._at_end = experience.index, True
        fit_errors(self._watching, self._judging, trainer, pl_module, experience.index)

    on_experience_cut = on_experience_end

    def on_backbone_changed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """Say that what was learned of the features from before may no longer fit."""
        if self.is_fitted:
            self._say(f"the backbone changed: {reason}; errors were recorded with the features of before")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{self.state_key}: {message}")

    # ---- evaluations

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Begin to judge."""
        self._watching.settle(trainer)
        self._judging.begin(stage)

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Log the metrics of each predictor."""
        if stage != "predict":
            for name, report in self._conclude(trainer).items():
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
        self._conclude(trainer)

    def _conclude(self, trainer: pl.Trainer) -> dict[str, dict[str, float]]:
        over = self._at_end and trainer.state.fn == "fit" and not trainer.sanity_checking
        return self._judging.conclude(after=self._fitted if over else None)

    def run_figures(self) -> dict[str, Any]:
        """Return figures of the last evaluation, by the name of their file."""
        return self._judging.figures()

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return everything: tensors and plain types; what was learned is put together over processes."""
        return {
            **self._watching.state_dict({"at": self._at}),
            "fitted": self._fitted,
            "at_end": self._at_end,
            "first_epoch": self._first_epoch,
            "report": self._judging.state_dict(),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            StateError: If it is damaged, or of other settings; nothing is changed then.
        """
        saved = read_own(state, _TABLE, self.state_key)
        judging = Judging(self._watching, self.prefix)
        judging.load_state_dict(saved["report"], self.state_key)
        self._at = self._watching.load_state_dict(state, self.state_key)["at"]
        self._judging = judging
        self._first_epoch, self._fitted, self._at_end = saved["first_epoch"], saved["fitted"], saved["at_end"]


_TABLE: Table = {
    "fitted": Whole(),
    "at_end": OneOf((False, True)),
    "first_epoch": Whole(optional=True),
    "report": Instance(dict),
}
