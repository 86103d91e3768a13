"""The few places where clkit touches what Lightning does not promise to keep.

A release of Lightning that lacks one of these attributes is named in a :class:`~clkit.errors.ConfigurationError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging

from clkit.errors import ConfigurationError

__all__ = [
    "accumulates",
    "averaged_weights",
    "callbacks_of",
    "cap_max_epochs",
    "datamodule_of",
    "evaluated_loaders",
    "go_on",
    "in_step",
    "is_fast_dev_run",
    "is_logged",
    "keep_samplers",
    "loaded_checkpoint",
    "loader_of",
    "longest_validation_interval",
    "reload_loaders_every_epoch",
    "started_epochs",
    "stream_position",
    "trained_batches",
]


def _seen(owner: object, path: str) -> Any:
    """Follow a dotted path of attributes, with an error that names the missing one."""
    try:
        return _getter(path)(owner)
    except AttributeError as error:
        raise ConfigurationError(
            f"this Lightning ({version('lightning')}) has no `{type(owner).__name__}.{path}` (missing: "
            f"`{error.name}`), which clkit relies on; install a Lightning release from the tested range, see "
            "pyproject.toml"
        ) from error


_getter = cache(attrgetter)  # asked several times a batch


# Public attributes of a trainer that type checkers do not see: Lightning's connectors set them.


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the trainer's data module, or ``None``."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's callbacks, in Lightning's order."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning's connectors set it


def is_fast_dev_run(trainer: pl.Trainer) -> bool:
    """Whether the trainer only tries whether the code runs."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning's connectors set it


@contextmanager
def averaged_weights(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Have the module the weights with which Lightning validates it, where a callback keeps an average of them."""
    averaging = [callback for callback in callbacks_of(trainer) if isinstance(callback, WeightAveraging)]
    for callback in averaging:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in averaging:
            callback.on_validation_epoch_end(trainer, module)


# What Lightning does not promise to keep.


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether what the training batch in work logs goes on to a logger, or stays as the last value of its epoch."""
    # written without the functions beside it: a strategy asks in every step
    stepped = _seen(trainer, "fit_loop.epoch_loop._batches_that_stepped")
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's connectors set it
    if trainer.is_last_batch or trainer.should_stop or is_fast_dev_run(trainer):
        return True
    return (every > 0 and (stepped + 1) % every == 0) or trainer.global_step + 1 == trainer.max_steps


def go_on(trainer: pl.Trainer) -> None:
    """Have Lightning take the epoch that a resume goes on with for any other, once its loop has found its place.

    At the end of an epoch that it takes for a resumed one it passes over what is done once an epoch: a schedule of the
    learning rate that waits for a plateau would miss a step.
    """
    _seen(trainer, "fit_loop._restarting")
    trainer.fit_loop._restarting = False


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the gradients of the batches that are done wait for further ones before the optimizer steps."""
    progress = _seen(trainer, "fit_loop.epoch_loop.batch_progress")
    waits = bool(progress.current.processed % trainer.accumulate_grad_batches)
    return waits and (in_step(trainer) or not progress.is_last_batch)


def in_step(trainer: pl.Trainer) -> bool:
    """Whether a training batch was handed out and is not done: a resume is given it again."""
    progress = _seen(trainer, "fit_loop.epoch_loop.batch_progress.current")
    return bool(progress.processed < progress.ready)


def started_epochs(trainer: pl.Trainer) -> int:
    """How many training epochs were begun."""
    return int(_seen(trainer, "fit_loop.epoch_progress.current.ready"))


def evaluated_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the loaders of the evaluation that runs, or that a fit has, in the order of their numbers.

    ``trainer.val_dataloaders`` are those of the last fit also while ``validate`` runs with others.
    """
    loops = {"fit": "fit_loop.epoch_loop.val_loop", "validate": "validate_loop", "test": "test_loop"}
    combined = _seen(trainer, f"{loops.get(trainer.state.fn or 'fit', 'predict_loop')}._combined_loader")
    loaders = None if combined is None else combined.iterables
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]


def loader_of(trainer: pl.Trainer, place: Any) -> Any:
    """Return the plain loader of that number in the evaluation that runs; ``None`` in one process and for a stream."""
    if trainer.world_size == 1 or hasattr(datamodule_of(trainer), "evaluation_loader"):
        return None
    return evaluated_loaders(trainer)[place]


def stream_position(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the training epoch in which a resume goes on, and how many of its batches are done."""
    epochs = _seen(trainer, "fit_loop.epoch_progress.current")
    batches = _seen(trainer, "fit_loop.epoch_loop.batch_progress")
    if trainer.current_epoch < epochs.ready:  # the count of batches stays that of the last epoch until the next begins
        return trainer.current_epoch, batches.current.processed if epochs.started == epochs.ready else 0
    if batches.current.ready == 0 or batches.is_last_batch:
        return epochs.ready, 0
    return epochs.ready - 1, batches.current.processed  # also where `max_steps` cut the epoch


def trained_batches(trainer: pl.Trainer) -> int:
    """How many training batches are done in all, over all epochs of the trainer."""
    return int(_seen(trainer, "fit_loop.epoch_loop.batch_progress.total.processed"))


def reload_loaders_every_epoch(trainer: pl.Trainer) -> None:
    """Have Lightning ask for new loaders in every epoch, so that the experience can follow the epoch."""
    _seen(trainer, "reload_dataloaders_every_n_epochs")
    setattr(trainer, "reload_dataloaders_every_n_epochs", 1)  # noqa: B010  the attribute is not declared


def cap_max_epochs(trainer: pl.Trainer, epochs: int) -> None:
    """End the fit after ``epochs`` epochs."""
    _seen(trainer, "fit_loop.max_epochs")
    trainer.fit_loop.max_epochs = epochs


def loaded_checkpoint(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Return the checkpoint that the trainer is restoring from at this moment."""
    return _seen(trainer, "_checkpoint_connector._loaded_checkpoint") or None


def longest_validation_interval(trainer: pl.Trainer, batches: int) -> int:
    """Return the largest integer ``val_check_interval`` that Lightning takes for an epoch of so many batches."""
    limit = _seen(trainer, "limit_train_batches")
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def keep_samplers(trainer: pl.Trainer) -> None:
    """Have Lightning leave the samplers of the user's loaders alone, which it replaces for every DDP strategy."""
    _seen(trainer, "_accelerator_connector.use_distributed_sampler")
    trainer._accelerator_connector.use_distributed_sampler = False
