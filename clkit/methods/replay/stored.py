"""What is read from a memory of a stream, and how."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, NotFittedError
from clkit.methods._checks import Ids, check_count
from clkit.methods._state import PlainState, exact
from clkit.methods.replay.rows import NUMBERS, RowCodec, RowTable, taken

__all__ = ["MemoryRows", "StoredRows"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MemoryRows(NamedTuple):
    """Rows read from a :class:`ReservoirBuffer`, copies on its device.

    Attributes:
        data: (k, …) as they were given to ``add``, in the same dtype.
        label: (k,) int64.
        experience: (k,) int64.
        arrival: (k,) int64, 0-based number of the row in its stream.
        origin: (k,) int64, the stream it came by: 0 for rows added here, others for rows of merged memories.
        extras: Further tensors by name, each (k, …).
    """

    data: Tensor
    label: Tensor
    experience: Tensor
    arrival: Tensor
    origin: Tensor
    extras: dict[str, Tensor]

    def take(self, at: Tensor) -> MemoryRows:
        """Return some of the rows, by their positions (m,) on the host."""
        extras = {name: each[at.to(each.device)] for name, each in self.extras.items()}
        data, label, experience, arrival, origin = (each[at.to(each.device)] for each in self[:5])
        return MemoryRows(data, label, experience, arrival, origin, extras)


class StoredRows(PlainState):
    """The rows of a memory, to be read; what is kept decides :class:`~clkit.methods.ReservoirBuffer`."""

    _codec: RowCodec
    _table: RowTable | None
    _capacity: int | None
    _seen: list[int]
    _class_seen: Counter[int]

    def sample(self, k: int, generator: torch.Generator | None = None) -> MemoryRows:
        """Return ``k`` distinct rows at random; all rows in stored order if there are not more than ``k``.

        Args:
            k: Rows wanted, at least 0.
            generator: A CPU generator to draw with, torch's global one if ``None``.

        Raises:
            NotFittedError: If nothing was ever added, as in the methods below.
        """
        check_count("k", k, at_least=0)
        table = self._filled()
        if k >= table.size:
            return self._rows_at(table, np.arange(table.size))
        return self._rows_at(table, torch.randperm(table.size, generator=generator, device="cpu")[:k].numpy())

    def sample_class(
        self, class_id: int, k: int, *, replace: bool = False, generator: torch.Generator | None = None
    ) -> MemoryRows:
        """Return rows of one class at random.

        Args:
            class_id: A class that has rows in memory, one of :meth:`classes`.
            k: Rows wanted, at least 0; without replacement at most as many as there are.
            replace: Draw each of the ``k`` from all rows of the class.
            generator: As for :meth:`sample`.

        Raises:
            ArgumentError: If the class has no row in memory.
        """
        check_count("k", k, at_least=0)
        table = self._filled()
        at = np.flatnonzero(table.now("label") == class_id)
        if at.size == 0:
            raise ArgumentError(f"class_id must have rows in memory, {self.classes()}, got {class_id!r}")
        if replace:
            drawn = torch.randint(at.size, (k,), generator=generator, device="cpu")
        else:
            drawn = torch.randperm(at.size, generator=generator, device="cpu")[:k]
        return self._rows_at(table, at[drawn.numpy()])

    def sample_classes(self, class_ids: Tensor, generator: torch.Generator | None = None) -> MemoryRows:
        """Return one random row of each class that is named, in their order; faster than :meth:`sample_class` for each.

        Args:
            class_ids: (k,) integers, each one of :meth:`classes`; a class may be named any number of times.
            generator: As for :meth:`sample`.

        Raises:
            ArgumentError: If they are no such integers, or a class has no row in memory.

        Example:
            >>> from clkit.methods import ReservoirBuffer
            >>> memory = ReservoirBuffer(4)
            >>> memory.add(torch.tensor([[0.0], [0.5], [7.0]]), torch.tensor([0, 0, 7]))
            >>> rows = memory.sample_classes(torch.tensor([7, 0, 7]))
            >>> rows.label.tolist(), rows.arrival[::2].tolist()
            ([7, 0, 7], [2, 2])
        """
        table = self._filled()
        if not isinstance(class_ids, Tensor) or class_ids.ndim != 1 or class_ids.dtype not in _INTEGERS:
            told = (
                f"{class_ids.dtype} of shape {tuple(class_ids.shape)}" if isinstance(class_ids, Tensor) else class_ids
            )
            raise ArgumentError(f"class_ids must be a tensor (k,) of integer class ids, got {told}")
        named = class_ids.detach().to("cpu", torch.int64).numpy()
        labels = table.now("label")
        order = labels.argsort(kind="stable")
        first, behind = (labels.searchsorted(named, side, order) for side in ("left", "right"))
        absent = named[first == behind]
        if absent.size:
            raise ArgumentError(f"class_ids must have rows in memory, {self.classes()}, got {absent[0]}")
        drawn = torch.rand(named.size, dtype=torch.float64, generator=generator, device="cpu").numpy()
        return self._rows_at(table, order[first + (drawn * (behind - first)).astype(np.int64)])

    def classes(self) -> list[int]:
        """Return the class ids that have rows in memory, sorted."""
        return list(self.class_counts())

    def class_counts(self) -> dict[int, int]:
        """Return the rows in memory of each class, by class id in order."""
        return {} if self._table is None else self._table.class_counts()

    @property
    def class_seen(self) -> dict[int, int]:
        """Rows seen of each class, by class id in order."""
        return dict(sorted(self._class_seen.items()))

    @property
    def n_seen(self) -> int:
        """Rows seen, those of merged memories included."""
        return sum(self._seen)

    @property
    def size(self) -> int:
        """Rows in memory."""
        return 0 if self._table is None else self._table.size

    @property
    def capacity(self) -> int | None:
        """M; ``None`` where it was given in bytes and nothing was added yet."""
        return self._capacity

    @property
    def data(self) -> Tensor:
        """(size, …) as stored, in the dtype of the storage; a copy, as the others. (0,) before the first ``add``."""
        table = self._table
        return torch.empty(0, device=self._device) if table is None else table.tensors["data"][: table.size].clone()

    @property
    def label(self) -> Tensor:
        """(size,) int64, as the three below."""
        return self._number("label")

    @property
    def experience(self) -> Tensor:
        """Number of the experience of each row."""
        return self._number("experience")

    @property
    def arrival(self) -> Tensor:
        """0-based number of each row in its stream."""
        return self._number("arrival")

    @property
    def origin(self) -> Tensor:
        """The stream of each row: 0 for rows added here, others for rows of merged memories."""
        return self._number("origin")

    def _filled(self) -> RowTable:
        if self._table is None:
            raise NotFittedError("the memory is empty: nothing was added yet")
        return self._table

    def _number(self, name: str) -> Tensor:
        numbers = np.empty(0) if self._table is None else self._table.now(name)
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)

    def _rows_at(self, table: RowTable, at: Ids) -> MemoryRows:
        with exact():
            drawn = np.empty((len(NUMBERS), at.size), dtype=np.int64)
            for row, name in enumerate(NUMBERS):
                drawn[row] = table.numbers[name][at]
            numbers = torch.from_numpy(drawn).to(self._device)
            tensors = {name: taken(tensor, at) for name, tensor in table.tensors.items()}
            data = self._codec.decode(tensors.pop("data"), table.layout["data"][1])
            return MemoryRows(data, **dict(zip(NUMBERS, numbers.unbind(), strict=True)), extras=tensors)
