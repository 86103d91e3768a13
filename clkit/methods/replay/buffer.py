"""A memory of a stream: a fixed number of its rows, drawn without bias, to learn from again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, NotFittedError
from clkit.methods._checks import check_count, check_device, generator
from clkit.methods._state import exact
from clkit.methods.replay import selection
from clkit.methods.replay.rows import (
    NUMBERS,
    Layout,
    RowCodec,
    RowTable,
    check_layout,
    checked_experience,
    checked_rows,
    described,
    layout_of,
    taken,
)
from clkit.methods.replay.saved import FORMAT, SavedMemory
from clkit.methods.replay.stored import MemoryRows, StoredRows

__all__ = ["MemoryRows", "ReservoirBuffer"]

_NUMBER_BYTES = 24  # of the four numbers of a row
_MERGE, _SHRINK, _SHARE = 1, 2, 3  # so that no two purposes share their draws


class ReservoirBuffer(StoredRows):
    r"""A memory of M rows of a stream that is exactly uniform over everything seen, or balanced over classes.

    With ``policy="uniform"`` each of the n rows seen so far is in the memory with probability :math:`\min(1, M/n)`, and
    each set of M rows is equally likely. With ``"class_balanced"`` classes get equal shares as far as they have that
    many rows, and each class is a uniform sample of its own rows.

    Rows are copied. What is kept depends on the seed and on the order of the rows, not on the batches they come in.
    Reading never changes what will be kept, and the global random state is left alone by ``add``, :meth:`merge` and
    :meth:`shrink`. Casts of the module leave the rows alone. Labels are kept on the host: from another device they cost
    a small copy per batch. The saved state holds the rows themselves, which may be images that must not be passed on.

    Args:
        capacity: M, the largest number of rows.
        capacity_bytes: The size in bytes instead; M is then known after the first ``add``. A row takes the bytes of
            its tensors as stored and 24 for its numbers.
        policy: ``"uniform"`` or ``"class_balanced"``.
        storage: How ``data`` is kept: ``"same"`` as it comes; ``"uint8"`` for images, refused where that would lose
            anything; ``"float16"`` at half the memory and 3 digits. Rows come back in the dtype that they came in.
        mean: With ``storage="uint8"``: the mean by which images in [0, 1] were normalised, one number, or one per
            channel (first dimension of a row); 0 if not given.
        std: The standard deviation that goes with it; 1 if not given.
        device: Where the rows are kept.
        seed: Of the draws that decide what is kept, at least 0; different ones for memories that will be merged.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> memory = ReservoirBuffer(5)
        >>> for start in range(0, 30, 10):
        ...     rows = torch.arange(start, start + 10)
        ...     memory.add(rows[:, None].float(), rows % 3, experience=start // 10)
        >>> memory.n_seen, memory.size, memory.arrival.tolist()
        (30, 5, [0, 6, 22, 17, 20])
        >>> replay = memory.sample(2, torch.Generator().manual_seed(0))
        >>> replay.data.flatten().tolist(), replay.label.tolist()
        ([20.0, 0.0], [2, 0])

    Source: J. S. Vitter, "Random sampling with a reservoir", 1985; A. Chrysakis, M.-F. Moens, "Online continual
    learning from imbalanced data", 2020 (class-balanced).
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        capacity_bytes: int | None = None,
        policy: Literal["uniform", "class_balanced"] = "uniform",
        storage: Literal["same", "uint8", "float16"] = "same",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        check_arguments(ReservoirBuffer, locals())
        super().__init__()
        if (capacity is None) == (capacity_bytes is None):
            raise ArgumentError(
                f"give exactly one of capacity (rows) and capacity_bytes, got capacity={capacity!r} and "
                f"capacity_bytes={capacity_bytes!r}"
            )
        self._capacity = None if capacity is None else check_count("capacity", capacity)
        self._capacity_bytes = None if capacity_bytes is None else check_count("capacity_bytes", capacity_bytes)
        self.policy = policy
        self._balanced = policy == "class_balanced"
        self.storage = storage
        self._codec = RowCodec(self.storage, mean, std)
        self._device = check_device(device)
        self._generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
        self._table = None
        self._seen = [0]  # arrivals by origin
        self._class_seen: Counter[int] = Counter()

    def add(self, data: Tensor, label: Tensor, experience: int | Tensor = 0, **extras: Tensor) -> None:
        """Offer a batch of rows, each to be kept or not.

        Args:
            data: (B, …) of any dtype and device; shape and dtype of a row are fixed by the first batch.
            label: (B,) class ids from 0, of any integer dtype.
            experience: Number of the experience, or (B,) numbers.
            extras: Further tensors (B, …) to keep with each row, such as ``logits``; the same names in each call.

        Raises:
            BatchError: If the batch is malformed or the storage would lose something; nothing is changed then.
            ArgumentError: If ``capacity_bytes`` is less than one row.
        """
        with exact():
            labels, tensors = checked_rows(data, label, extras)
            experiences = checked_experience(experience, labels.size)
            layout = layout_of(tensors)
            if self._table is not None:
                check_layout(layout, self._table.layout)
            stored = self._codec.stored_dtype(*layout["data"])
            if labels.size == 0:
                return
            # Elsewhere than on a CPU the check of the values would wait for the device, so it is made once.
            encoded = self._table is None or data.device.type == "cpu"
            if encoded:
                tensors["data"] = self._codec.encode(tensors["data"], check=True)
            if self._table is None:
                self._capacity = self._capacity_for(layout)
                self._table = RowTable(layout, stored, self._capacity, self._device)
            # One number a row, also while filling: the position of the generator then follows from the rows offered.
            drawn = torch.rand(labels.size, dtype=torch.float64, generator=self._generator, device="cpu").numpy()
            if self._balanced:
                slots, rows = selection.balanced_slots(self._table, drawn, labels, self._class_seen)
            else:
                slots, rows = selection.uniform_slots(self._table, drawn, self.n_seen)
            arrivals = self._seen[0] + rows
            self._seen[0] += labels.size
            self._class_seen.update(labels.tolist())
            if slots.size:
                kept = {name: taken(tensor, rows) for name, tensor in tensors.items()}
                if not encoded:
                    kept["data"] = self._codec.encode(kept["data"], check=False)
                of_each = experiences if isinstance(experiences, int) else experiences[rows]
                # 0: a merge may have left another origin in the slot
                numbers = {"label": labels[rows], "arrival": arrivals, "experience": of_each, "origin": 0}
                self._table.put(slots, kept, numbers)

    def check(self, data: Tensor, label: Tensor, extras: Sequence[str] = ()) -> None:
        """Raise the :class:`BatchError` with which :meth:`add` would refuse a batch, and change nothing.

        ``extras`` are the names of further tensors, which need not exist yet.

        Example:
            >>> memory = ReservoirBuffer(5, storage="uint8")
            >>> memory.check(torch.tensor([[0.5]]), torch.tensor([0]))  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            clkit.errors.BatchError: storage='uint8' would lose up to ...
        """
        with exact():
            layout, table = layout_of(checked_rows(data, label, {})[1]), self._table
            if table is not None:
                if table.layout.keys() != {"data", *extras}:
                    raise BatchError(
                        f"the rows in memory consist of {', '.join(sorted(table.layout))}, those to be added of "
                        f"{', '.join(sorted({'data', *extras}))}; begin with an empty memory, or with the settings "
                        "with which it was filled"
                    )
                check_layout(layout, {"data": table.layout["data"]})
            self._codec.stored_dtype(*layout["data"])
            if len(data) and (table is None or data.device.type == "cpu"):
                self._codec.encode(data, check=True)

    def merge(self, other: ReservoirBuffer, *, seed: int = 0) -> None:
        """Become the memory of both streams together, as if one had seen all rows of both.

        How many rows come from each is drawn from the hypergeometric distribution of the numbers seen, class by class
        in a class-balanced memory. Rows of ``other`` get origins of their own, counted on from those here.

        Args:
            other: A memory of the same policy, storage and kind of rows; not modified. Its capacity must not be
                smaller than this one's, unless it still holds everything it saw.
            seed: Of the draws, at least 0.

        Raises:
            ArgumentError: If the two do not fit together; nothing is changed then.
        """
        check_count("seed", seed, at_least=0)
        self._check_alike(other)
        mine, theirs = self._table, other._table
        if mine is not None and theirs is not None and mine.layout != theirs.layout:
            raise ArgumentError(
                f"cannot merge a memory of rows of {described(theirs.layout)} into one of {described(mine.layout)}"
            )
        if theirs is not None:
            with exact():
                capacity = self._capacity_for(theirs.layout)
                if mine is None:
                    mine = RowTable(theirs.layout, theirs.stored, 0, self._device)
                if capacity > theirs.capacity and other.n_seen > theirs.size:
                    raise ArgumentError(
                        f"a memory of capacity {theirs.capacity} that has seen {other.n_seen} rows cannot be merged "
                        f"into one of capacity {capacity}; call shrink({theirs.capacity}) on the larger one first"
                    )
                generator = np.random.default_rng([seed, _MERGE, self.n_seen, other.n_seen])
                ours_kept, theirs_kept = selection.merged_rows(
                    (mine.now("label"), self._class_seen),
                    (theirs.now("label"), other._class_seen),
                    capacity,
                    generator,
                    balanced=self._balanced,
                )
                merged = mine.resized(capacity, ours_kept)
                merged.append(theirs, theirs_kept, len(self._seen))
                self._capacity, self._table = capacity, merged
        self._seen = [*self._seen, *other._seen]
        self._class_seen.update(other._class_seen)

    def shrink(self, capacity: int, *, seed: int = 0) -> None:
        """Reduce the capacity; a uniform memory drops any rows at random, a class-balanced one of its largest classes.

        Args:
            capacity: The new capacity, at most the present one.
            seed: Of the draws, at least 0.

        Raises:
            ArgumentError: If the capacity is larger than now: rows that were dropped do not come back.
            NotFittedError: If the capacity in rows is not known yet.
        """
        check_count("capacity", capacity)
        check_count("seed", seed, at_least=0)
        if self._capacity is None:
            raise NotFittedError("the capacity in rows is known after the first add; build it with capacity=… instead")
        if capacity > self._capacity:
            raise ArgumentError(f"capacity can only shrink, from {self._capacity} rows, got {capacity}")
        if self._table is not None:
            with exact():
                generator = np.random.default_rng([seed, _SHRINK, self.n_seen, capacity])
                kept = selection.remaining_rows(self._table.now("label"), capacity, generator, balanced=self._balanced)
                self._table = self._table.resized(capacity, kept)
        self._capacity = capacity

    def take_share(
        self, shards: Sequence[ReservoirBuffer], part: int, capacities: Sequence[int], *, seed: int = 0
    ) -> None:
        """Become one of some memories that together hold all rows of ``shards``; what was here is replaced.

        For memories of which each keeps a part of the stream, as processes do, when there are more or fewer of them
        from now on. Each new memory calls this with the same ``shards``, ``capacities`` and ``seed``, and gets about as
        many rows as the others, at random. The arrivals are shared out too, so that it goes on as if it had seen its
        part of the stream, which is right where all shards have seen equally many rows. Dropped rows are counted no
        more where no new memory is full. Rows get new arrival numbers, in the order of their age.

        Args:
            shards: Memories of the same policy, storage and kind of rows; not modified.
            part: Which of the new memories this is, from 0.
            capacities: Of all new memories in order; this one's own among them.
            seed: Of the draws, at least 0.

        Raises:
            ArgumentError: If they do not fit together, or the rows do not fit in here; nothing is changed then.

        Example:
            >>> old, new = ReservoirBuffer(8), ReservoirBuffer(4)
            >>> old.add(torch.randn(20, 3), torch.arange(20) % 4)
            >>> new.take_share([old], 0, [4, 4])
            >>> new.size, new.n_seen
            (4, 10)
        """
        if not 0 <= part < len(capacities) or capacities[part] != self._capacity:
            raise ArgumentError(
                f"capacities must have this memory's own, {self._capacity}, at position part={part}, got "
                f"{list(capacities)}"
            )
        check_count("seed", seed, at_least=0)
        if not shards:
            raise ArgumentError("shards must have at least one memory, got none")
        for shard in shards:
            self._check_alike(shard)
        filled = [(shard._table, shard._seen) for shard in shards if shard._table is not None]
        kinds = [table.layout for table, _ in filled]
        if any(kind != kinds[0] for kind in kinds):
            raise ArgumentError(f"shards must all have rows of one kind, got {'; '.join(map(described, kinds))}")
        labels = np.concatenate([np.empty(0, np.int64), *[table.now("label") for table, _ in filled]])
        for room, capacity in zip(selection.even(labels.size, len(capacities)), capacities, strict=True):
            if room > capacity:
                raise ArgumentError(
                    f"the {labels.size} rows of the shards do not fit into memories of {list(capacities)} rows, each "
                    f"about as many; call shrink() on the shards first"
                )
        seen: Counter[int] = sum((shard._class_seen for shard in shards), Counter())
        draws = [seed, _SHARE, seen.total(), len(capacities)]
        shares = selection.dealt(labels, seen, capacities, np.random.default_rng(draws), balanced=self._balanced)
        rows, class_seen = shares[part]
        n_seen, table = class_seen.total(), None
        with exact():
            if filled:
                table = selection.shared_table(filled, rows, n_seen, capacities[part], self._device)
        self._table, self._seen, self._class_seen = table, [n_seen], class_seen
        self._generator = generator(*draws, part)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(memory)``."""
        limit = f"capacity={self._capacity}" if self._capacity else f"capacity_bytes={self._capacity_bytes}"
        return f"{limit}, policy={self.policy!r}, storage={self.storage!r}, size={self.size}, n_seen={self.n_seen}"

    def _capacity_for(self, layout: Layout) -> int:
        if self._capacity is not None:
            return self._capacity
        assert self._capacity_bytes is not None
        shape, dtype = layout["data"]
        stored = {**layout, "data": (shape, self._codec.stored_dtype(shape, dtype))}
        row = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in stored.values()) + _NUMBER_BYTES
        if row > self._capacity_bytes:
            raise ArgumentError(f"capacity_bytes={self._capacity_bytes} is less than one row, which takes {row} bytes")
        return self._capacity_bytes // row

    def _check_alike(self, other: ReservoirBuffer) -> None:
        if not isinstance(other, ReservoirBuffer):
            raise ArgumentError(f"only another ReservoirBuffer can be taken over, got {type(other).__name__}")
        if other is self:
            raise ArgumentError("a memory cannot take over its own rows: they would be there twice")
        for name in ("policy", "storage"):
            if getattr(other, name) != getattr(self, name):
                raise ArgumentError(
                    f"cannot take over a memory with {name}={getattr(other, name)!r} into one with "
                    f"{name}={getattr(self, name)!r}"
                )
        if (other._codec.mean, other._codec.std) != (self._codec.mean, self._codec.std):
            raise ArgumentError("cannot take over a memory of images that were normalised by another mean and std")

    def _move(self, device: torch.device) -> None:
        if self._table is not None:
            self._table.tensors = {name: tensor.to(device) for name, tensor in self._table.tensors.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        classes, table = self.class_seen, self._table
        whole = {"seen": self._seen, "classes": list(classes), "class_seen": list(classes.values())}
        values: dict[str, Any] = {
            "policy": self.policy,
            "storage": self.storage,
            "normalised": self._codec.normalised(),
            "generator": self._generator.get_state(),
        }
        for name, numbers in {**whole, "format": FORMAT, "capacity": self._capacity or 0}.items():
            values[name] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        if table is not None:
            values |= {name: torch.from_numpy(table.now(name).astype(np.int64)) for name in NUMBERS}
            with exact():
                # A tensor without rows tells shape and dtype of what was added.
                shape, dtype = table.layout["data"]
                values["row"] = torch.empty((0, *shape), dtype=dtype, device="cpu")
                for name, tensor in table.tensors.items():
                    values[name if name == "data" else f"extras.{name}"] = tensor[: table.size].clone()
        destination.update({prefix + name: value for name, value in values.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with exact():
            saved = SavedMemory(state_dict, prefix, self.policy, self._codec)
            table, capacity = None, self._capacity
            if saved.layout is not None:
                capacity = self._capacity_for(saved.layout)
                table = saved.table(capacity, self._device)
        self._table, self._capacity = table, capacity
        self._seen, self._class_seen, self._generator = saved.seen, saved.class_seen, saved.generator
