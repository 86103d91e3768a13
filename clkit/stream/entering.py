"""What is looked at before a run begins: whose trainer it is, and whether anything ends it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from clkit._registry import CHANGE_IMPORT
from clkit.errors import ConfigurationError
from clkit.stream._lightning import callbacks_of
from clkit.stream.checkpoint_io import protect_checkpoints

__all__ = ["check_ends", "check_trainer", "enter"]


def enter(trainer: pl.Trainer) -> None:
    """Have a trainer's checkpoints protected, once it is known that a run with it can work.

    Raises:
        ConfigurationError: For a trainer of another package, or a fit that nothing ends.
    """
    check_trainer(trainer)
    protect_checkpoints(trainer.strategy)
    check_ends(trainer)


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer of the package ``pytorch_lightning``, whose classes are others to Python.

    Raises:
        ConfigurationError: If it is one; the message says which import to change.
    """
    if any(kind.__module__.startswith("pytorch_lightning.") for kind in type(trainer).__mro__):
        raise ConfigurationError(
            f"the Trainer is one of pytorch_lightning, and clkit works with that of lightning, {CHANGE_IMPORT}"
        )


def check_ends(trainer: pl.Trainer) -> None:
    """Refuse a fit of which nothing that is known says when it ends; a stream says so in its ``setup``.

    Raises:
        ConfigurationError: For ``max_epochs=-1`` without another end.
    """
    if trainer.state.fn != "fit" or trainer.max_epochs != -1 or trainer.max_steps != -1:
        return
    if not any(isinstance(callback, EarlyStopping | Timer) for callback in callbacks_of(trainer)):
        raise ConfigurationError(
            "max_epochs=-1 is as long as the stream of a StreamDataModule, and this fit has another source of data: it "
            "would never end. Give the number of epochs (max_epochs=1 for one pass), max_steps, max_time or "
            "EarlyStopping; where your own code ends it, a large max_epochs"
        )
