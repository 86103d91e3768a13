"""The stream's loaders: which rows make which batch, and handing them out.

They are no :class:`torch.utils.data.DataLoader` subclasses, because Lightning would give such a loader a sampler of
its own that repeats rows to pad. The order is a function of (seed, epoch), the randomness of a sample's transform one
of (seed, epoch, row): the same batches come out for any number of workers, on any rank, and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clkit.data.sources.base import SourcePart
from clkit.errors import DataError

__all__ = ["BatchLoader", "EvaluationLoader", "Fetcher", "TrainLoader", "Workers", "cut_batches", "epoch_order"]

Rows = npt.NDArray[np.int64]


def epoch_order(rows: Rows, *, seed: int, epoch: int, shuffle: bool) -> Rows:
    """Return the rows of an experience in the order in which they arrive in an epoch."""
    if not shuffle:
        return rows
    return rows[np.random.default_rng((seed, epoch)).permutation(len(rows))]


def cut_batches(rows: Rows, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[Rows]:
    """Cut ordered rows (N,) into the batches of rank ``rank`` of W: no row lost, none repeated, none empty.

    All ranks get the same *number* of batches, ``n = min(⌈N/(W·B)⌉, ⌊N/W⌋)``, because Lightning talks between processes
    at every training batch; their sizes are as even as possible, at most ``batch_size`` (one row more at
    most where ``batch_size`` is 1 and W does not divide N).

    Raises:
        DataError: If there are fewer rows than processes.

    Example:
        >>> [len(batch) for batch in cut_batches(np.arange(17), 3, rank=0, world_size=2)]
        [3, 3, 3]
        >>> [len(batch) for batch in cut_batches(np.arange(17), 3, rank=1, world_size=2)]
        [3, 3, 2]
    """
    total = len(rows)
    if total < world_size:
        raise DataError(
            f"{total} rows cannot be shared by {world_size} processes, since each needs one; use fewer processes or "
            "larger experiences"
        )
    batches = min(-(-total // (world_size * batch_size)), total // world_size)
    return np.array_split(rows[rank::world_size], batches) if batches else []


class Fetcher(Dataset[tuple[Any, ...]]):
    """The data set that turns row numbers of a source's part into batches: read, augment, preprocess, add targets.

    ``augment`` transforms one stored image at random, ``preprocess`` a stack or list of them always alike; ``tasks``,
    the experience of each row, become a third element of the batch.
    """

    def __init__(
        self,
        part: SourcePart,
        targets: Rows,
        preprocess: Callable[[Any], Tensor],
        augment: Callable[[Any], Any] | None = None,
        tasks: Rows | None = None,
        seed: int = 0,
    ) -> None:
        self.part = part
        self.targets = torch.from_numpy(np.ascontiguousarray(targets))
        self.preprocess = preprocess
        self.augment = augment
        self.tasks = None if tasks is None else torch.from_numpy(np.ascontiguousarray(tasks))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: tuple[int, Rows]) -> tuple[Any, ...]:
        """Return the batch of an epoch's rows: ``(inputs, targets)``, or ``(inputs, targets, tasks)``."""
        epoch, rows = key
        inputs: Any = self.part.get_many(rows)
        if self.augment is not None:
            inputs = self._augmented(self.augment, list(inputs), rows, epoch)
        index = torch.from_numpy(rows)
        batch = (self.preprocess(inputs), self.targets[index])
        return batch if self.tasks is None else (*batch, self.tasks[index])

    def _augmented(self, augment: Callable[[Any], Any], images: list[Any], rows: Rows, epoch: int) -> Any:
        # not `torch.manual_seed`, which would also seed every accelerator
        generator = torch.default_generator
        states = generator.get_state(), random.getstate()
        out = []
        try:
            for image, row in zip(images, rows, strict=True):
                seed = int(np.random.SeedSequence((self.seed, epoch, int(row))).generate_state(1)[0])
                generator.manual_seed(seed)
                random.seed(seed)
                out.append(augment(image))
        finally:
            generator.set_state(states[0])
            random.setstate(states[1])
        same = len({(image.dtype, *image.shape) for image in out}) == 1
        return torch.stack(out) if same else out


class Workers:
    """Worker processes that live until they are closed: each loader only sends them its keys; 0 fetch in this one.

    ``form`` gives a batch its form, in this process, so that it need not be known to the others.
    """

    def __init__(self, fetcher: Fetcher, num_workers: int, form: Callable[[tuple[Any, ...]], Any] = tuple) -> None:
        self.fetcher = fetcher
        self.num_workers = num_workers
        self.form = form
        self._keys: list[tuple[int, Rows]] = []  # the sampler of the persistent loader: whatever is asked for now
        self._loader: DataLoader[Any] | None = None

    def batches(self, keys: list[tuple[int, Rows]]) -> Iterator[Any]:
        """Yield the batches of some keys, in order."""
        if self.num_workers == 0:
            yield from (self.form(self.fetcher[key]) for key in keys)
            return
        if self._loader is None:
            self._loader = DataLoader(
                self.fetcher,
                batch_size=None,
                sampler=self._keys,
                num_workers=self.num_workers,
                persistent_workers=True,
                generator=torch.Generator(),  # otherwise each iterator draws from the global generator
            )
        self._keys[:] = keys
        yield from map(self.form, self._loader)

    def close(self) -> None:
        """End the processes; they start anew if batches are asked for again."""
        self._loader = None


class BatchLoader:
    """Batches given by epoch and rows, once an iteration; the epoch is what their augmentation depends on."""

    def __init__(self, workers: Workers, keys: list[tuple[int, Rows]]) -> None:
        self._workers = workers
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def in_process(self) -> Iterator[Any]:
        """Yield all batches without the workers, which may be at work for another pass."""
        workers = self._workers
        yield from (workers.form(workers.fetcher[key]) for key in self._keys)

    # a generator, because Lightning calls `iter` twice an epoch and only one of the two is used
    def __iter__(self) -> Iterator[Any]:
        yield from self._workers.batches(self._keys[self._first() :])

    def _first(self) -> int:
        return 0


class TrainLoader(BatchLoader):
    """The training batches of one epoch, from where the run stands.

    ``start`` answers how many batches of the epoch are already learned; it is asked when iteration begins.
    """

    def __init__(self, workers: Workers, batches: list[Rows], epoch: int, start: Callable[[int], int]) -> None:
        super().__init__(workers, [(epoch, rows) for rows in batches])
        self.epoch = epoch
        self._start = start

    def rows(self, batch_idx: int) -> Rows:
        """Return which rows of the source's training part make a batch."""
        return self._keys[batch_idx][1]

    def _first(self) -> int:
        return self._start(self.epoch)

    # with these two Lightning knows that the loader resumes in mid-epoch; the position itself is the data module's
    def state_dict(self) -> dict[str, Any]:
        """Return the epoch; order and position belong to the data module."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: order and position belong to the data module."""


class EvaluationLoader(BatchLoader):
    """The test rows of several experiences; a batch never straddles two.

    Batches go round robin over the experiences, so that ``limit_val_batches`` cuts them evenly.

    Attributes:
        batches: Experience and rows of each batch, in order.
    """

    def __init__(self, workers: Workers, batches: dict[int, list[Rows]]) -> None:
        longest = max((len(rows) for rows in batches.values()), default=0)
        self.batches: list[tuple[int, Rows]] = [
            (experience, rows[turn])
            for turn in range(longest)
            for experience, rows in batches.items()
            if turn < len(rows)
        ]
        super().__init__(workers, [(0, rows) for _, rows in self.batches])

    def expected_samples(self, limit: int | None = None) -> dict[int, int]:
        """Count the rows of each experience in the first ``limit`` batches (all of them by default)."""
        counts: dict[int, int] = {}
        for experience, rows in self.batches[:limit]:
            counts[experience] = counts.get(experience, 0) + len(rows)
        return counts
