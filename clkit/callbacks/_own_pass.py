"""A pass over the evaluation loaders outside of Lightning's own validation, for rows that no validation measures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch

from clkit.distributed import share_buffers
from clkit.features.tap import evaluating
from clkit.stream._lightning import averaged_weights, datamodule_of, evaluated_loaders

__all__ = ["own_pass"]


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
