"""Learning from the features of each training batch: what a new method needs beside its own mathematics."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.callbacks.base import StreamCallback
from clkit.errors import BatchError
from clkit.features.batch import BatchReader
from clkit.features.observer import BatchObserver, FeaturesFrom
from clkit.methods._checks import check_batch
from clkit.stream.boundaries import Boundaries

__all__ = ["FeatureCallback"]


class FeatureCallback(StreamCallback):
    """A callback that learns from the features of each training batch; the start of a method of your own.

    A subclass says in :meth:`learn` what it does with a batch, and keeps what it learned by
    :meth:`~clkit.callbacks.StreamCallback.stream_state` and :meth:`~clkit.callbacks.StreamCallback.load_stream_state`.
    Here is the rest: which pass the features come from, the check of the batch, rows without a label, batches of a
    warm-up (which are not learned), and taking every hook off at the end. For a head in the form of
    :mod:`clkit.methods` use :class:`~clkit.callbacks.HeadCallback`.

    Args:
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"``, ``"shared"`` or ``"eval"``: which pass the features come from.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Attributes:
        max_classes: Ids at or above are refused.

    Example:
        >>> class Count(FeatureCallback):
        ...     seen = 0
        ...     def learn(self, features, targets):
        ...         self.seen += len(features)
        >>> Count().state_key
        'Count'
    """

    max_classes: int = 65_536

    def __init__(
        self, *, layer: str = "auto", forward: FeaturesFrom = "auto", batch_reader: BatchReader | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.forward = forward
        self.batch_reader = batch_reader
        self._observer: BatchObserver | None = None

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Learns a batch.

        Args:
            features: (n, D) float64, finite, detached; n is at least 1.
            targets: (n,) int64 ids in [0, ``max_classes``), on the features' device.
        """
        # Lightning's callbacks are no abstract classes, so a subclass without it is found out here
        raise NotImplementedError(f"{type(self).__name__} has no learn(features, targets)")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Taps the user's network, before it may be compiled or wrapped."""
        super().setup(trainer, pl_module, stage)
        self._observer = BatchObserver.attach(trainer, pl_module, self.layer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes every hook off the user's network again."""
        if self._observer is not None:
            self._observer.detach(trainer)
            self._observer = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks for the classifier again: it may have been replaced since."""
        assert self._observer is not None
        self._observer.refresh()
        self._observer.forget()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the observation of the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._observer is not None
        key = ("train", trainer.current_epoch, batch_idx)
        if _learns(trainer):
            self._observer.open(trainer, pl_module, batch, key, source=self.forward, reader=self.batch_reader)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the batch and learns it.

        Raises:
            BatchError: If it is malformed; nothing is learned of it.
        """
        if _learns(trainer):
            assert self._observer is not None
            assert self._observer.targets is not None
            rows, ids = self._checked(self._observer.features(self.forward), self._observer.targets)
            if len(rows):
                self.learn(rows, ids)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        limits: dict[str, Any] = {"below": self.max_classes, "limit_name": "max_classes"}
        checked = check_batch(features, targets, features.shape[1], device=features.device, **limits)
        if checked.finite is not None and not bool(checked.finite):
            raise BatchError("features of the batch are not finite; it was refused, nothing was changed")
        return checked.features, torch.from_numpy(checked.ids).to(features.device)[checked.inverse]


def _learns(trainer: pl.Trainer) -> bool:
    current = Boundaries.of(trainer).current
    return current is None or current.phase == "learn"
