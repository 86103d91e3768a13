"""What a stream asks of its trainer: the right package, and a fit that is as long as the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from clkit.errors import ConfigurationError
from clkit.stream._lightning import (
    callbacks_of,
    cap_max_epochs,
    is_fast_dev_run,
    longest_validation_interval,
    reload_loaders_every_epoch,
)
from clkit.stream.entering import check_trainer
from clkit.stream.experience import Experience

__all__ = ["LightningData", "prepare_fit"]


class LightningData(pl.LightningDataModule):
    """A data module that only a trainer of its own package takes; another fails later, and not in words."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainer":
            check_trainer(value)
        super().__setattr__(name, value)


def prepare_fit(
    trainer: pl.Trainer, experiences: Sequence[Experience], epochs: int, batches_of: Callable[[Experience], int]
) -> None:
    """Let the trainer walk through a stream and end with it; ``batches_of`` counts an experience's training batches.

    Raises:
        ConfigurationError: If a setting of the trainer would end the stream early, or never validate.
    """
    reload_loaders_every_epoch(trainer)
    if is_fast_dev_run(trainer):
        return
    if len(experiences) > 1 and any(isinstance(callback, EarlyStopping) for callback in callbacks_of(trainer)):
        raise ConfigurationError(
            "EarlyStopping would end the whole stream, not the experience, and what it monitors gets worse whenever "
            "something new arrives; leave it out and set epochs_per_experience"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:  # batches, counted in each epoch
        for experience in experiences:
            longest = longest_validation_interval(trainer, batches_of(experience))
            if interval > longest:
                raise ConfigurationError(
                    f"val_check_interval={interval} is longer than experience {experience.name!r}, which has {longest} "
                    f"training batches; use at most {longest}, or a share of an epoch such as 0.5"
                )
    given = trainer.max_epochs
    if given is None or given == -1 or given > epochs:
        cap_max_epochs(trainer, epochs)
        if given not in (None, -1, 1000):  # 1000 is what Lightning fills in
            rank_zero_info(f"clkit: the stream has {epochs} epochs; max_epochs={given} is cut to that")
    elif given < epochs:
        raise ConfigurationError(
            f"max_epochs={given} ends before the stream does: it has {len(experiences)} experiences and needs "
            f"max_epochs={epochs}; leave max_epochs out, or set StreamDataModule(stop_after=…) for a shorter stream"
        )
