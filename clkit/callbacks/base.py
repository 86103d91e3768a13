"""What all callbacks share: following a stream, and a state that survives a resume at any batch."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from clkit.distributed import share_buffers
from clkit.errors import ConfigurationError, StateError
from clkit.features.observer import BatchObserver
from clkit.schema import check_format, saved_entry
from clkit.stream import resume
from clkit.stream._lightning import callbacks_of, trained_batches
from clkit.stream.boundaries import Boundaries, BoundaryPhase
from clkit.stream.checkpoint_io import protect_checkpoints

__all__ = [
    "MODULE",
    "Predictor",
    "StreamCallback",
    "check_names",
    "reduction_device",
    "scores_of",
]

MODULE = "module"
"""The name under which the user's own classifier is evaluated."""

FORMAT = 1


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
        """Brings the position that an earlier fit left, where each experience is a fit of its own."""
        protect_checkpoints(trainer.strategy)
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
        """Pass the moment on."""
        self._boundaries.on_train_batch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, so that a checkpoint can be checked for a lost one."""
        self._batches += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the moment on, once all processes have the same network to evaluate."""
        share_buffers(trainer.strategy.model)
        self._boundaries.on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the moment on."""
        self._boundaries.on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the moment on."""
        self._boundaries.on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what the end of training owes where Lightning skips training.

        It does so when a run was killed between its last step and its end, and goes on from that step's checkpoint.
        """
        if self._trained:
            return
        device = pl_module.device  # the strategy has let go of the module
        pl_module.to(trainer.strategy.root_device)
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)
        pl_module.to(device)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the module: Lightning calls no ``teardown`` of callbacks when a run fails."""
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
            StateError: If it was written by a newer format, or does not fit this callback.
        """
        check_format(state_dict, FORMAT, self.state_key)
        batches = saved_entry(state_dict, "batches", int, self.state_key)
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
        """Make the saved progress whole and checks that nothing of this callback is missing.

        Raises:
            StateError: If the checkpoint was saved before this callback had learned its last batch, holds a state of
                this class under other names only, or was merged of several and a fit is to go on from it.
        """
        self._refuse_merged(trainer, checkpoint)
        self._check_entry(checkpoint)
        resume.load(trainer, checkpoint)
        self._check_lost_batch(checkpoint)

    def _refuse_merged(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        files = checkpoint.get("clkit_merged")
        if files and trainer.state.fn == "fit":
            raise StateError(
                f"no fit can go on from this checkpoint: it was merged from {', '.join(files)}, whose runs were at "
                "different places; validate, test, predict and export work with it. Resume one of its parts instead"
            )

    def _check_entry(self, checkpoint: dict[str, Any]) -> None:
        entries = checkpoint.get("callbacks", {})
        if self.state_key in entries:
            return
        kin = sorted(str(key) for key in entries if str(key).split("(")[0] == type(self).__qualname__)
        if kin:
            raise StateError(
                f"the checkpoint has no state for {self.state_key}, but for {', '.join(kin)}; "
                "give the callback the `name` under which it was saved"
            )
        rank_zero_warn(f"the checkpoint has no state for {self.state_key}: it starts with nothing learned")

    def _check_lost_batch(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        loops = checkpoint.get("loops")
        if saved is None or not loops:
            return
        trained = loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        batches = saved_entry(saved, "batches", int, self.state_key)
        if batches < trained:
            raise StateError(
                f"{self.state_key} had learned {batches} of {trained} batches when the checkpoint was saved: "
                "a callback before it in the list saved or failed in `on_train_batch_end`; move that callback behind it"
            )


def check_names(trainer: pl.Trainer) -> None:
    """Predictors are told apart by name in logs, files and results.

    Raises:
        ConfigurationError: If two callbacks of a trainer have one name.
    """
    names = [callback.name for callback in callbacks_of(trainer) if isinstance(callback, Predictor)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"two callbacks have the name {name!r}; give one another: name='…'")


def scores_of(observer: BatchObserver, predictor: Predictor) -> Tensor:
    """Scores (B, C), float64, that a predictor gives for the open batch; computed once, whoever asks first."""

    def compute() -> Tensor:
        features = observer.features()
        # in float64, so that two classes that differ by less than float32 can tell are still told apart
        return predictor.scores(features if features.device.type == "mps" else features.double()).double()

    result: Tensor = observer.remember(("scores", predictor.name), compute)
    return result


def reduction_device(trainer: pl.Trainer) -> torch.device:
    """Where counts must lie to be summed over processes."""
    return trainer.strategy.root_device if trainer.world_size > 1 else torch.device("cpu")
