"""All processes must have the same number of training batches: with fewer, one would wait for the others for ever."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from clkit.distributed import gather_objects
from clkit.errors import ConfigurationError
from clkit.stream._lightning import datamodule_of

__all__ = ["check_last_batch", "check_number_of_batches"]

_ADVICE = (
    "give all of them the same number, for example by a torch.utils.data.DistributedSampler, or limit it by "
    "limit_train_batches"
)


def check_number_of_batches(trainer: pl.Trainer) -> bool:
    """Compare how many batches the processes have in an epoch, before its first; a call on all of them.

    Returns:
        Whether each batch has to be checked by :func:`check_last_batch`, because loaders do not say how many they have.

    Raises:
        ConfigurationError: If the numbers differ; on all processes.
    """
    if trainer.world_size == 1 or hasattr(
        datamodule_of(trainer), "evaluation_loader"
    ):  # a stream deals them out evenly
        return False
    numbers = gather_objects(float(trainer.num_training_batches), "how many batches they have")
    if len(set(numbers)) > 1:
        shown = ", ".join("unknown" if math.isinf(number) else f"{number:.0f}" for number in numbers)
        raise ConfigurationError(
            f"the {len(numbers)} processes have different numbers of training batches ({shown} in the order of their "
            f"ranks), and one that has fewer would wait for the others for ever: {_ADVICE}"
        )
    return math.isinf(numbers[0])


def check_last_batch(trainer: pl.Trainer, batches: int) -> None:
    """Compare whether the batch in work, of which so many are done, is the last one; a call on all processes.

    Raises:
        ConfigurationError: If it is for some of them only; on all processes.
    """
    last = gather_objects(trainer.is_last_batch, "whether they have had their last batch")
    if any(last) and not all(last):
        ranks = ", ".join(str(rank) for rank, is_last in enumerate(last) if is_last)
        raise ConfigurationError(
            f"of the {len(last)} processes some (rank {ranks}) have their last training batch after {batches} "
            f"others, and others go on; they would wait for each other for ever: {_ADVICE}"
        )
