"""A pass over the evaluation loaders outside of Lightning's own validation, for rows that no validation measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch

from clkit.distributed import share_buffers
from clkit.features.tap import evaluating
from clkit.stream._lightning import averaged_weights, datamodule_of, evaluated_loaders
from clkit.stream.experience import Experience

__all__ = ["experience_of_batch", "own_pass"]


def experience_of_batch(
    loaders: Sequence[Any], current: Experience | None, batch_idx: int, place: int
) -> tuple[int, Any]:
    """Return the index of the experience that a batch of an evaluation belongs to, and its rows if they are known.

    Args:
        loaders: All loaders of the evaluation.
        current: The experience that the run is in.
        batch_idx: Number of the batch in its loader.
        place: Number of the loader.
    """
    if hasattr(loaders[place], "expected_samples"):  # that of a stream
        experience, rows = loaders[place].batches[batch_idx]
        return int(experience), rows
    # plain loaders: one for each experience, or one for the current experience alone
    return (place if len(loaders) > 1 or current is None else current.index), None


def own_pass(
    trainer: pl.Trainer, module: pl.LightningModule, stage: int, each: Callable[[Any, int, Any, int], None]
) -> bool:
    """Call ``each(loaders, place, batch, batch_idx)`` with every batch, as Lightning's validation would have it.

    Args:
        trainer: The trainer, in a fit.
        module: The user's module; its mode and weights are those of a validation meanwhile.
        stage: Experiences that are done.
        each: What is done with a batch, which is on its device.

    Returns:
        Whether there was a loader.
    """
    if trainer.world_size > 1:
        share_buffers(trainer.strategy.model)
    data, limits = datamodule_of(trainer), None
    if hasattr(data, "evaluation_loader"):
        loaders: Any = [data.evaluation_loader(max(stage - 1, 0))]
    else:  # with plain loaders most rows come from validations that Lightning runs, and this from the same loaders
        loaders, limits = evaluated_loaders(trainer), trainer.num_val_batches
    with evaluating(module), torch.no_grad(), averaged_weights(trainer, module):
        for place, loader in enumerate(loaders):
            limit = None if limits is None or limits[place] == float("inf") else int(limits[place])
            for batch_idx, host_batch in enumerate(islice(loader, limit)):
                with trainer.precision_plugin.val_step_context():
                    converted = trainer.precision_plugin.convert_input(host_batch)
                    batch = trainer.strategy.batch_to_device(converted, dataloader_idx=place)
                    each(loaders, place, batch, batch_idx)
    return bool(loaders)
