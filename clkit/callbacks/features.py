"""Reading the features of each batch: what a callback needs beside its own mathematics."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks.base import StreamCallback
from clkit.errors import BatchError
from clkit.features.batch import BatchReader
from clkit.features.observer import BatchObserver, FeaturesFrom
from clkit.methods._checks import check_batch

__all__ = ["FeatureCallback", "Stage"]

Stage = Literal["train", "validate", "test", "predict"]


class FeatureCallback(StreamCallback):
    """A callback that reads the features of each batch; the start of a method of your own.

    A subclass that learns says in :meth:`learn` what it does with a training batch, and keeps what it learned by
    :meth:`~clkit.callbacks.StreamCallback.stream_state` and :meth:`~clkit.callbacks.StreamCallback.load_stream_state`.
    Here is the rest: which pass the features come from, the check of the batch, rows without a label, batches of a
    warm-up (which are not learned), and taking every hook off at the end. For a head in the form of
    :mod:`clkit.methods` use :class:`~clkit.callbacks.HeadCallback`.

    A subclass that also looks at batches of an evaluation names the stages in ``stages`` and overrides
    :meth:`on_batch`, and :meth:`on_evaluation_start` and :meth:`on_evaluation_epoch_end` where it needs them. The
    batch in work is ``self.observer``: its features, logits and targets.

    Args:
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"``, ``"shared"`` or ``"eval"``: which pass the features of training batches come from.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Attributes:
        max_classes: Ids at or above are refused.
        stages: The stages whose batches are read.
        needs_graph: Whether training features are asked for with their graph, for a loss that is added in
            ``on_before_backward``: ``self.observer.features(graph=True)``.

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

    def __init__(
        self, *, layer: str = "auto", forward: FeaturesFrom = "auto", batch_reader: BatchReader | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.forward = forward
        self.batch_reader = batch_reader
        self._observer: BatchObserver | None = None
        self._reads = False  # whether the training batch in work is read

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

    @property
    def observer(self) -> BatchObserver:
        """What the batch in work shows; there is one while a run goes on."""
        assert self._observer is not None
        return self._observer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tap the user's network before it may be compiled or wrapped."""
        super().setup(trainer, pl_module, stage)
        self._observer = BatchObserver.attach(trainer, pl_module, self.layer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        if self._observer is not None:
            self._observer.detach(trainer)
            self._observer = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the classifier again: it may have been replaced since."""
        self.observer.refresh()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._reads = "train" in self.stages and self.learns(trainer)
        if self._reads:
            key = ("train", trainer.current_epoch, batch_idx)
            reading: dict[str, Any] = {"source": self.forward, "reader": self.batch_reader, "graph": self.needs_graph}
            self.observer.open(trainer, pl_module, batch, key, **reading)

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

    def open_batch(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Open a batch of an evaluation before its step."""
        key = (trainer.state.stage, trainer.global_step, trainer.current_epoch, dataloader_idx, batch_idx)
        self.observer.open(trainer, module, batch, key, reader=self.batch_reader, needs_targets=stage != "predict")

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        self.observer.refresh((stage, trainer.state.stage, trainer.global_step))
        self.on_evaluation_start(trainer, module, stage)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation, once the end of an experience was noticed."""
        super().on_validation_start(trainer, pl_module)
        self._start(trainer, pl_module, "validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a test."""
        self._start(trainer, pl_module, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a prediction."""
        self._start(trainer, pl_module, "predict")

    def _before(self, stage: Stage, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any) -> None:
        if stage in self.stages:
            self.open_batch(trainer, module, stage, *batch)

    def on_validation_batch_start(self, *args: Any) -> None:
        """Open the batch."""
        self._before("validate", *args)

    def on_test_batch_start(self, *args: Any) -> None:
        """Open the batch."""
        self._before("test", *args)

    def on_predict_batch_start(self, *args: Any) -> None:
        """Open the batch."""
        self._before("predict", *args)

    def _after(
        self,
        stage: Stage,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if stage in self.stages:
            self.on_batch(trainer, module, stage, batch_idx, dataloader_idx)

    def on_validation_batch_end(self, *args: Any) -> None:
        """Handle the batch."""
        self._after("validate", *args)

    def on_test_batch_end(self, *args: Any) -> None:
        """Handle the batch."""
        self._after("test", *args)

    def on_predict_batch_end(self, *args: Any) -> None:
        """Handle the batch."""
        self._after("predict", *args)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a validation."""
        self.on_evaluation_epoch_end(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a test."""
        self.on_evaluation_epoch_end(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a prediction."""
        self.on_evaluation_epoch_end(trainer, pl_module, "predict")

    # ----

    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        limits: dict[str, Any] = {"below": self.max_classes, "limit_name": "max_classes"}
        checked = check_batch(features, targets, features.shape[1], device=features.device, **limits)
        if checked.finite is not None and not bool(checked.finite):
            raise BatchError("features of the batch are not finite; it was refused, nothing was changed")
        return checked.features, torch.from_numpy(checked.ids).to(features.device)[checked.inverse]
