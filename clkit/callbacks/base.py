"""The two bases of callbacks: one follows a stream and survives a resume, one also reads the features of each batch."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.distributed import share_buffers
from clkit.errors import BatchError, StateError, refuse_unknown_arguments
from clkit.features.batch import BatchReader
from clkit.features.observer import BatchObserver, FeaturesFrom
from clkit.methods._checks import check_batch
from clkit.schema import MERGED, Whole, check_format, saved_entry
from clkit.stream import resume
from clkit.stream._lightning import loader_of, trained_batches
from clkit.stream.boundaries import Boundaries, BoundaryPhase
from clkit.stream.entering import enter

__all__ = ["MODULE", "FeatureCallback", "Predictor", "Stage", "StreamCallback"]

MODULE = "module"
"""The name under which the user's own classifier is evaluated."""

FORMAT = 1

Stage = Literal["train", "validate", "test", "predict"]

_STAGES: dict[Any, Stage] = {
    RunningStage.SANITY_CHECKING: "validate",
    RunningStage.VALIDATING: "validate",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}


@runtime_checkable
class Predictor(Protocol):
    """What other callbacks may ask of one that has learned to predict; found by this form, never by type."""

    name: str

    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, C), column = class id, ``-inf`` for classes never seen, for features (B, D)."""


class StreamCallback(pl.Callback):
    """A callback that follows a stream: hears of experiences, and survives a resume at any batch.

    A subclass may have ``on_experience_start``, ``on_experience_phase`` and ``on_experience_end``, each called with
    ``(trainer, pl_module, experience)``, and says by ``boundary_phase`` when among the others. It adds its own state in
    :meth:`stream_state` and takes it back in :meth:`load_stream_state`. When it overrides one of Lightning's hooks that
    are defined here it calls ``super()`` first.
    """

    boundary_phase: BoundaryPhase = BoundaryPhase.LEARN
    name: str = ""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuse an argument that no constructor has, by the class and what is near."""
        refuse_unknown_arguments(cls, options)
        return super().__new__(cls)

    def __init__(self) -> None:
        self._boundaries = Boundaries()  # replaced by the trainer's own in `setup`
        self._trained = False  # whether this fit came to `on_train_start`
        self._batches = 0  # training batches that passed `on_train_batch_end`, as the trainer counts them

    @cached_property  # Lightning asks for it around each hook
    def state_key(self) -> str:
        """Class and name: what tells two callbacks of one class apart in a checkpoint."""
        return f"{type(self).__qualname__}({self.name})" if self.name else type(self).__qualname__

    # ---- following

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the position that an earlier fit left, where each experience is a fit of its own."""
        enter(trainer)
        self._trained = False
        self._boundaries = Boundaries.join(trainer, self._boundaries)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up what a resumed run left."""
        self._trained = True
        self._batches = trained_batches(trainer)
        resume.begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notice the start of an experience."""
        self._boundaries.on_train_batch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, so that a checkpoint can be checked for a lost one."""
        self._batches += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice the end of an experience, once all processes have the same network to evaluate."""
        if trainer.world_size > 1:
            share_buffers(trainer.strategy.model)
        self._boundaries.on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice the end of an experience."""
        self._boundaries.on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notice the end of an experience."""
        self._boundaries.on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the hooks of training that Lightning skips where a resumed run has no step left."""
        if self._trained:
            return
        device = pl_module.device  # the strategy has let go of the module
        pl_module.to(trainer.strategy.root_device)
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)
        pl_module.to(device)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module: Lightning calls no ``teardown`` of callbacks when a run fails."""
        self.teardown(trainer, pl_module, str(trainer.state.fn))

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return what the subclass has learned: tensors and plain types only."""
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave; the position in the stream is restored afterwards.

        Raises:
            StateError: If it does not fit; nothing may be changed then.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's whole state, loadable with ``weights_only=True``."""
        return {"format": FORMAT, "batches": self._batches, **self.stream_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            StateError: If it is of another format, or does not fit this callback.
        """
        check_format(state_dict, FORMAT, self.state_key)
        batches = saved_entry(state_dict, "batches", Whole(), self.state_key)
        self.load_stream_state(state_dict)
        self._batches = batches

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add where the run stands in its stream."""
        resume.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the saved progress whole and check that nothing of this callback is missing.

        Raises:
            StateError: If the checkpoint was saved before this callback had learned its last batch, holds a state of
                this class under other names only, or was merged of several and a fit is to go on from it.
        """
        files = checkpoint.get(MERGED)
        if files and trainer.state.fn == "fit":
            raise StateError(
                f"no fit can go on from this checkpoint: it was merged from {', '.join(files)}, whose runs were at "
                "different places; validate, test, predict and export work with it. Resume one of its parts instead"
            )
        entries = checkpoint.get("callbacks", {})
        kin = sorted(str(key) for key in entries if str(key).split("(")[0] == type(self).__qualname__)
        if self.state_key not in entries and kin:
            raise StateError(
                f"the checkpoint has no state for {self.state_key}, but for {', '.join(kin)}; "
                "give the callback the `name` under which it was saved"
            )
        resume.load(trainer, checkpoint)
        if self.state_key not in entries:
            rank_zero_warn(f"the checkpoint has no state for {self.state_key}: it starts with nothing learned")
        elif loops := checkpoint.get("loops"):
            trained = loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
            batches = saved_entry(entries[self.state_key], "batches", Whole(), self.state_key)
            if batches < trained:
                raise StateError(
                    f"{self.state_key} had learned {batches} of {trained} batches when the checkpoint was saved: a "
                    "callback before it in the list saved or failed in `on_train_batch_end`; move that callback "
                    "behind it"
                )


class FeatureCallback(StreamCallback):
    """A callback that reads the features of each batch; the start of a method of your own.

    A subclass that learns says in :meth:`learn` what it does with a training batch, and keeps what it learned by
    :meth:`~clkit.callbacks.StreamCallback.stream_state` and :meth:`~clkit.callbacks.StreamCallback.load_stream_state`.
    Here is the rest: which pass the features come from, the check of the batch, rows without a label, a warm-up. For a
    head in the form of :mod:`clkit.methods` use :class:`~clkit.callbacks.HeadCallback`.

    One that also looks at batches of an evaluation names the stages in ``stages`` and overrides :meth:`on_batch`,
    and :meth:`on_evaluation_start` and :meth:`on_evaluation_epoch_end` where it needs them.

    Args:
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"``, ``"shared"`` or ``"eval"``: which pass the features of training batches come from.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Attributes:
        max_classes: Ids at or above are refused.
        stages: The stages whose batches are read.
        needs_graph: Whether training features are asked for with their graph, for a loss that is added in
            ``on_before_backward``: ``self.observer.features(graph=True)``.
        observer: What the batch in work shows, features, logits and targets; from ``on_fit_start`` or an evaluation on.
        observers: That one and further ones of a subclass, each with the callback by whose reader and pass it goes.

    Example:
        >>> class Count(FeatureCallback):
        ...     seen = 0
        ...     def learn(self, features, targets):
        ...         self.seen += len(features)
        >>> Count().state_key
        'Count'
    """

    max_classes: int = 65_536
    stages: ClassVar[frozenset[Stage]] = frozenset({"train"})
    needs_graph: ClassVar[bool] = False
    observer: BatchObserver
    observers: dict[BatchObserver, Any]

    def __init__(
        self, *, layer: str = "auto", forward: FeaturesFrom = "auto", batch_reader: BatchReader | None = None
    ) -> None:
        check_arguments(FeatureCallback, locals())
        super().__init__()
        self.layer = layer
        self.forward = forward
        self.batch_reader = batch_reader
        self.observers = {}
        self._reads = False  # whether the training batch in work is read
        self._said_layer: tuple[str, int | None] | None = None
        self._stage: Stage = "validate"  # of the last evaluation

    # ---- what a subclass says

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Learn a batch.

        Args:
            features: (n, D) float64, finite, detached; n is at least 1.
            targets: (n,) int64 ids in [0, ``max_classes``), on the features' device.
        """
        # Lightning's callbacks are no abstract classes, so a subclass without it is found out here
        raise NotImplementedError(f"{type(self).__name__} has no learn(features, targets)")

    def learns(self, trainer: pl.Trainer) -> bool:
        """Whether the training batch in work is learned; those of a warm-up are not."""
        current = self._boundaries.current
        return current is None or current.phase == "learn"

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Handle a batch that was read, after its step; by default a training batch is checked and learned.

        Raises:
            BatchError: If the batch is malformed; nothing is learned of it.
        """
        if stage == "train":
            rows, ids = self._checked(self.observer.features(self.forward), self.observer.known_targets)
            if len(rows):
                self.learn(rows, ids)

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Prepare an evaluation; ``stage`` is ``"validate"``, ``"test"`` or ``"predict"``."""

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Conclude an evaluation; values may be logged by ``module.log`` except for ``"predict"``."""

    # ---- one run

    def refresh(self, trainer: pl.Trainer, moment: Hashable = None) -> None:
        """Look for the tapped layers again; of several calls with one ``moment`` the first looks."""
        for observer in self.observers:
            observer.refresh(moment)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask for what reads the user's network, which ``setup`` and ``configure_model`` of the module may build."""
        super().setup(trainer, pl_module, stage)
        self.observer = BatchObserver.attach(trainer, pl_module, self)
        self.observers = {self.observer: self}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        if hasattr(self, "observer"):
            self.observer.detach(trainer)
            del self.observer
        self.observers = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tap the user's network, which is built by now and has not run, and say which layer is read."""
        self.refresh(trainer)
        if "train" in self.stages:
            point, width = self.observer.point, self.observer.tap.width
            if (point, width) != self._said_layer:
                self._said_layer = point, width
                rank_zero_info(f"clkit: {self.state_key} reads {point!r}{f', {width} features' if width else ''}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._reads = "train" in self.stages and self.learns(trainer)
        if self._reads:
            how: dict[str, Any] = {"graph": self.needs_graph, "loader": trainer.train_dataloader}
            for observer, part in self.observers.items():
                how |= {"part": part, "source": getattr(part, "forward", self.forward)}
                observer.open(trainer, pl_module, batch, ("train", trainer.current_epoch, batch_idx), **how)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Read the batch once more where the step ran something else, before its network moves."""
        if self._reads:
            for observer, part in self.observers.items():
                observer.settle(getattr(part, "forward", self.forward))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Handle the batch."""
        if self._reads:
            self.on_batch(trainer, pl_module, "train", batch_idx, 0)
            if self.needs_graph:
                self.observer.release_graph()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # ---- evaluations: Lightning's hooks of three stages, which all do the same

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an evaluation, once the end of an experience was noticed."""
        super().on_validation_start(trainer, pl_module)
        self.refresh(trainer, (trainer.state.stage, trainer.global_step))
        self._stage = _STAGES[trainer.state.stage]
        self.on_evaluation_start(trainer, pl_module, self._stage)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open a batch before its step."""
        if self._stage in self.stages:
            key = (trainer.state.stage, trainer.global_step, trainer.current_epoch, dataloader_idx, batch_idx)
            self.open(trainer, pl_module, batch, key)

    def open(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, key: tuple[Hashable, ...]) -> None:
        """Begin a batch of an evaluation, which ``key`` tells from others; it ends with loader and number."""
        loader, labelled = loader_of(trainer, key[-2]) if trainer.world_size > 1 else None, self._stage != "predict"
        for observer, part in self.observers.items():
            observer.open(trainer, module, batch, key, part=part, loader=loader, needs_targets=labelled)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Handle a batch after its step."""
        if self._stage in self.stages:
            self.on_batch(trainer, pl_module, self._stage, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Conclude an evaluation."""
        self.on_evaluation_epoch_end(trainer, pl_module, self._stage)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        limits: dict[str, Any] = {"below": self.max_classes, "limit_name": "max_classes"}
        checked = check_batch(features, targets, features.shape[1], device=features.device, **limits)
        if checked.finite is not None and not bool(checked.finite):
            raise BatchError("features of the batch are not finite; it was refused, nothing was changed")
        return checked.features, torch.from_numpy(checked.ids).to(features.device)[checked.inverse]
