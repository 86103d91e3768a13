"""Rows that a sampler gives twice so that all processes get the same number: each is to be counted once.

With several processes Lightning gives plain loaders a :class:`torch.utils.data.DistributedSampler`. Where the rows do
not divide, the last sample of some processes is one that another has, too.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

__all__ = ["mark_repeats", "repeated_rows"]

_said: WeakKeyDictionary[pl.Trainer, set[str]] = WeakKeyDictionary()


def mark_repeats(trainer: pl.Trainer, loader: Any, batch_idx: int, targets: Tensor) -> Tensor:
    """Return the targets (B,) of a batch of a loader, -1 (no label) for rows that another process has, too."""
    if trainer.world_size == 1 or targets.ndim != 1 or targets.is_floating_point():
        return targets
    repeated = repeated_rows(trainer, loader, batch_idx, len(targets))
    if not repeated:
        return targets
    marked = targets.clone()
    marked[len(targets) - repeated :] = -1
    return marked


def repeated_rows(trainer: pl.Trainer, loader: Any, batch_idx: int, size: int) -> int:
    """Return how many rows at the end of a batch of so many another process has, too; 0 where that is not known.

    What is not known is said once, with the numbers.
    """
    if trainer.world_size == 1 or not isinstance(loader, DataLoader):  # loaders of a stream give each row once
        return 0
    number, reason = _repeats(loader, trainer.world_size, batch_idx, size)
    said = _said.setdefault(trainer, set())
    if reason and reason not in said:
        said.add(reason)
        rank_zero_warn(f"clkit: {reason}")
    return number


def _repeats(loader: DataLoader[Any], processes: int, batch_idx: int, size: int) -> tuple[int, str]:
    """Return how many rows at the end of a batch are given twice, and why that is not known if it is not."""
    advice = "give the loader a torch.utils.data.DistributedSampler, or leave use_distributed_sampler on"
    if isinstance(loader.dataset, IterableDataset):
        return 0, (
            f"rows of an iterable data set, {type(loader.dataset).__name__}, cannot be told apart: each of the "
            f"{processes} processes reads it, and rows that it gives to several are counted several times"
        )
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, RandomSampler | SequentialSampler):
        rows, times = len(sampler), f"each of the {processes} processes is given all"
        return 0, f"{times} {rows} rows, which count as {processes * rows}; {advice}"
    known = isinstance(sampler, DistributedSampler) and type(sampler).__module__.split(".")[0] in ("torch", "lightning")
    if not known:
        return 0, (
            f"how {type(sampler).__name__} deals the rows to {processes} processes is not known, and those that it "
            f"gives to several are counted several times; {advice}"
        )
    rows, last = len(sampler.dataset), sampler.num_samples - 1  # the last is the only one that may come again
    if sampler.rank + last * sampler.num_replicas < rows:
        return 0, ""
    dealt = f"{rows} rows are dealt to {processes} processes as {sampler.num_replicas * sampler.num_samples}"
    if loader.batch_sampler is None:  # a sample of the data set is a batch by itself
        return (size if batch_idx == last else 0), ""
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        own = type(loader.batch_sampler).__name__
        return 0, f"{dealt}, and in which batch {own} puts those that come twice is not known, so all of them count"
    if batch_idx != last // loader.batch_size:
        return 0, ""
    samples = last % loader.batch_size + 1
    if size != samples:
        return 0, f"{dealt}, and the last batch has {size} rows for {samples} samples, so all of them count"
    return 1, ""
