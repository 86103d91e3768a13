"""A memory of a stream: a fixed number of its rows, drawn without bias, to learn from again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, NotFittedError
from clkit.methods._checks import check_choice, check_count
from clkit.methods._state import PlainState, exact
from clkit.methods.replay.rows import EXPERIENCE_LIMIT, NUMBERS, Ids, RowCodec, RowLayout, RowTable, host_tensor, taken
from clkit.methods.replay.saved import FORMAT, SavedMemory
from clkit.methods.replay.shares import dealt, even, numbered

__all__ = ["MemoryRows", "ReservoirBuffer"]

_POLICIES = ("uniform", "class_balanced")
_STORAGES = ("same", "uint8", "float16")
_NUMBER_BYTES = 24  # of the four numbers of a row
_MERGE, _SHRINK, _SHARE = 1, 2, 3  # so that no two purposes share their draws
_MERGE_LIMIT = 10**9  # of NumPy's hypergeometric distribution


class MemoryRows(NamedTuple):
    """Rows read from a :class:`ReservoirBuffer`, copies on its device; ``rows.data, rows.label`` is the usual use.

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
        data, label, experience, arrival, origin = (each[at.to(each.device)] for each in self[:5])
        extras = {name: each[at.to(each.device)] for name, each in self.extras.items()}
        return MemoryRows(data, label, experience, arrival, origin, extras)


class ReservoirBuffer(PlainState):
    r"""A memory of M rows of a stream that is exactly uniform over everything seen, or balanced over classes.

    Use it to replay images or features. With ``policy="uniform"`` each of the n rows seen so far is in the memory with
    probability :math:`\min(1, M/n)`, and each set of M rows is equally likely. With ``"class_balanced"`` classes get
    equal shares as far as they have that many rows, and each class is a uniform sample of its own rows.

    Rows are copied. What is kept depends on the seed and on the order of the rows, not on the batches they come in:
    the same arrivals leave the same bits. Reading never changes what will be kept, and the global random state is left
    alone by ``add``, :meth:`merge` and :meth:`shrink`.

    The tensors are no buffers: casts leave them alone, device moves do not, and ``DistributedDataParallel`` does not
    overwrite them. Labels and counts are kept on the host, so hand labels over on the CPU where you have them there:
    from another device they cost a small copy per batch. The saved state holds the rows themselves, which may be
    images that must not be passed on.

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
        seed: Of the draws that decide what is kept, at least 0. Give memories that will be merged different seeds;
            with equal ones each row is still kept with the right probability, but not independently of the others.

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
        policy: str = "uniform",
        storage: str = "same",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (capacity is None) == (capacity_bytes is None):
            raise ArgumentError(
                f"give exactly one of capacity (rows) and capacity_bytes, got capacity={capacity!r} and "
                f"capacity_bytes={capacity_bytes!r}"
            )
        self._capacity = None if capacity is None else check_count("capacity", capacity)
        self._capacity_bytes = None if capacity_bytes is None else check_count("capacity_bytes", capacity_bytes)
        self.policy = check_choice("policy", policy, _POLICIES)
        self.storage = check_choice("storage", storage, _STORAGES)
        self._codec = RowCodec(self.storage, mean, std)
        self._device = torch.empty(0, device=device).device
        self._generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
        self._table: RowTable | None = None
        self._seen = [0]  # arrivals by origin
        self._class_seen: Counter[int] = Counter()

    # Learning ---------------------------------------------------------------------------------------------------

    def add(self, data: Tensor, label: Tensor, experience: int | Tensor = 0, **extras: Tensor) -> None:
        """Offer a batch of rows, each to be kept or not.

        Args:
            data: (B, …) of any dtype and device; the shape of a row and the dtype are fixed by the first batch.
            label: (B,) class ids from 0, of any integer dtype.
            experience: Number of the experience, or (B,) numbers.
            extras: Further tensors (B, …) to keep with each row, such as ``logits``; the same names in each call.

        Raises:
            BatchError: If the batch is malformed or the storage would lose something; nothing is changed then.
            ArgumentError: If ``capacity_bytes`` is less than one row.
        """
        with exact():
            labels, tensors = _checked_rows(data, label, extras)
            numbers = {"label": labels, "experience": _checked_experience(experience, labels.size)}
            layout = RowLayout(data, extras)
            if self._table is not None:
                layout.check_equal(self._table.layout)
            stored = self._codec.stored_dtype(layout)
            if labels.size == 0:
                return
            # Elsewhere than on a CPU the check of the values would wait for the device, so it is made once.
            encoded = self._table is None or data.device.type == "cpu"
            if encoded:
                tensors["data"] = self._codec.encode(tensors["data"], check=True)
            if self._table is None:
                self._capacity = self._capacity_for(layout)
                self._table = RowTable(layout, stored, self._capacity, self._device)
            slots, rows = self._decide(self._table, labels)
            numbers["arrival"] = self._seen[0] + np.arange(labels.size)
            numbers["origin"] = np.zeros_like(labels)  # a merge may have left another one in the slot
            self._seen[0] += labels.size
            self._class_seen.update(labels.tolist())
            if slots.size:
                kept = {name: taken(tensor, rows) for name, tensor in tensors.items()}
                if not encoded:
                    kept["data"] = self._codec.encode(kept["data"], check=False)
                self._table.put(slots, kept, {name: values[rows] for name, values in numbers.items()})

    def check(self, data: Tensor, label: Tensor, extras: Sequence[str] = ()) -> None:
        """Refuse a batch that :meth:`add` would refuse, and change nothing; for who has to know before a step.

        Args:
            data: (B, …) as for :meth:`add`, like ``label``.
            label: (B,) class ids.
            extras: Names of the further tensors.

        Raises:
            BatchError: If such a batch cannot be added.

        Example:
            >>> memory = ReservoirBuffer(5, storage="uint8")
            >>> memory.check(torch.tensor([[0.5]]), torch.tensor([0]))  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            clkit.errors.BatchError: storage='uint8' would lose up to ...
        """
        with exact():
            _checked_rows(data, label, {})
            layout = RowLayout(data, {})
            if self._table is not None:
                fixed = self._table.layout
                if fixed.names != {"data", *extras}:
                    raise BatchError(
                        f"the rows in memory consist of {', '.join(sorted(fixed.names))}, those to be added of "
                        f"{', '.join(sorted({'data', *extras}))}; begin with an empty memory, or with the settings "
                        "with which it was filled"
                    )
                row = torch.empty((0, *fixed.shapes["data"]), dtype=fixed.dtypes["data"], device="cpu")
                layout.check_equal(RowLayout(row, {}))
            self._codec.stored_dtype(layout)
            if len(data) and (self._table is None or data.device.type == "cpu"):
                self._codec.encode(data, check=True)

    def merge(self, other: ReservoirBuffer, *, seed: int = 0) -> None:
        """Become the memory of both streams together, as if one had seen all rows of both.

        A uniform memory stays exactly uniform over the union: how many rows come from each is drawn from the
        hypergeometric distribution of the numbers seen. Class-balanced memories are merged class by class in the same
        way. Rows of ``other`` get origins of their own, counted on from those here.

        Args:
            other: A memory of the same policy, storage and kind of rows; not modified. Its capacity must not be
                smaller than this one's, unless it still holds everything it saw.
            seed: Of the draws, at least 0.

        Raises:
            ArgumentError: If the two do not fit together; nothing is changed then.
        """
        check_count("seed", seed, at_least=0)
        self._check_mergeable(other)
        theirs = other._table
        if theirs is not None:
            with exact():
                mine = self._table
                capacity = self._capacity_for(theirs.layout)
                if mine is None:
                    mine = RowTable(theirs.layout, theirs.stored, 0, self._device)
                if capacity > theirs.capacity and other.n_seen > theirs.size:
                    raise ArgumentError(
                        f"a memory of capacity {theirs.capacity} that has seen {other.n_seen} rows cannot be merged "
                        f"into one of capacity {capacity}; call shrink({theirs.capacity}) on the larger one first"
                    )
                generator = np.random.default_rng([seed, _MERGE, self.n_seen, other.n_seen])
                ours_kept, theirs_kept = self._merged_rows(mine, other, theirs, capacity, generator)
                merged = mine.resized(capacity, ours_kept)
                merged.append(theirs, theirs_kept, len(self._seen))
                self._capacity, self._table = capacity, merged
        self._seen = [*self._seen, *other._seen]
        self._class_seen.update(other._class_seen)

    def shrink(self, capacity: int, *, seed: int = 0) -> None:
        """Reduce the capacity; rows that no longer fit are dropped at random, and the memory stays what it was.

        A uniform memory drops any rows, a class-balanced one rows of its largest classes.

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
                self._table = self._table.resized(capacity, self._remaining(self._table, capacity, generator))
        self._capacity = capacity

    def take_share(
        self, shards: Sequence[ReservoirBuffer], part: int, capacities: Sequence[int], *, seed: int = 0
    ) -> None:
        """Become one of some memories that together hold all rows of ``shards``; what was here is replaced.

        For memories of which each keeps a part of the stream, as processes do, when there are more or fewer of them
        from now on. Each new memory calls this with the same ``shards``, ``capacities`` and ``seed``, and gets about as
        many rows as the others, at random. The arrivals are shared out too, so that it goes on as if it had seen its
        part of the stream. That is right where all shards have seen equally many rows. Where no new memory is full
        although rows were dropped before, the dropped ones are not counted any more. Rows get new arrival numbers, in
        the order of their age.

        Args:
            shards: Memories of the same policy, storage and kind of rows; not modified.
            part: Which of the new memories this is, from 0.
            capacities: Of all new memories in order; this one's own among them.
            seed: Of the draws, at least 0.

        Raises:
            ArgumentError: If they do not fit together, or the rows do not fit in here; nothing is changed then.

        Example:
            >>> old = ReservoirBuffer(8)
            >>> old.add(torch.randn(20, 3), torch.arange(20) % 4)
            >>> new = [ReservoirBuffer(4, seed=part) for part in range(2)]
            >>> for part, memory in enumerate(new):
            ...     memory.take_share([old], part, [4, 4])
            >>> [(memory.size, memory.n_seen) for memory in new]
            [(4, 10), (4, 10)]
            >>> torch.equal(torch.cat([memory.data for memory in new]).sort(0)[0], old.data.sort(0)[0])
            True
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
        filled = [shard for shard in shards if shard._table is not None]
        tables = [shard._filled() for shard in filled]
        if any(table.layout != tables[0].layout for table in tables):
            kinds = "; ".join(str(table.layout) for table in tables)
            raise ArgumentError(f"shards must all have rows of one kind, got {kinds}")
        labels = np.concatenate([np.empty(0, np.int64), *[table.now("label") for table in tables]])
        for room, capacity in zip(even(labels.size, len(capacities)), capacities, strict=True):
            if room > capacity:
                raise ArgumentError(
                    f"the {labels.size} rows of the shards do not fit into memories of {list(capacities)} rows, each "
                    f"about as many; call shrink() on the shards first"
                )
        seen: Counter[int] = sum((shard._class_seen for shard in shards), Counter())
        draws = [seed, _SHARE, seen.total(), len(capacities)]
        generator = np.random.default_rng(draws)
        share = dealt(labels, seen, capacities, generator, balanced=self.policy == "class_balanced")[part]
        table = None
        if tables:
            with exact():
                table = RowTable(tables[0].layout, tables[0].stored, capacities[part], self._device)
                starts = np.cumsum([0, *[old.size for old in tables]])
                ages = []
                for shard, old, start in zip(filled, tables, starts, strict=False):
                    rows = share.rows[(share.rows >= start) & (share.rows < start + old.size)] - start
                    table.append(old, rows)
                    ages.append((old.now("arrival") / np.array(shard._seen)[old.now("origin")])[rows])
                table.numbers["origin"][:] = 0
                table.numbers["arrival"][: table.size] = numbered(np.concatenate(ages), share.class_seen.total())
        words = np.random.SeedSequence([*draws, part]).generate_state(1, np.uint64)
        self._generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        self._table, self._seen, self._class_seen = table, [share.class_seen.total()], share.class_seen

    # Reading ----------------------------------------------------------------------------------------------------

    def sample(self, k: int, generator: torch.Generator | None = None) -> MemoryRows:
        """``k`` distinct rows at random; all rows in stored order if there are not more than ``k``.

        Args:
            k: Rows wanted, at least 0.
            generator: A CPU generator to draw with, torch's global one if ``None``.

        Raises:
            NotFittedError: If nothing was ever added.
        """
        check_count("k", k, at_least=0)
        table = self._filled()
        if k >= table.size:
            return self._rows_at(table, np.arange(table.size))
        return self._rows_at(table, torch.randperm(table.size, generator=generator, device="cpu")[:k].numpy())

    def sample_class(
        self, class_id: int, k: int, *, replace: bool = False, generator: torch.Generator | None = None
    ) -> MemoryRows:
        """Rows of one class at random.

        Args:
            class_id: A class that has rows in memory, one of :meth:`classes`.
            k: Rows wanted, at least 0; without replacement at most as many as there are.
            replace: Draw each of the ``k`` from all rows of the class.
            generator: A CPU generator to draw with, torch's global one if ``None``.

        Raises:
            ArgumentError: If the class has no row in memory.
            NotFittedError: If nothing was ever added.
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
        """One random row of each class that is named, drawn with replacement.

        Use it instead of many calls of :meth:`sample_class`: the labels are sorted once, and the rows read at once.

        Args:
            class_ids: (k,) integers, each one of :meth:`classes`; a class may be named any number of times.
            generator: A CPU generator to draw with, torch's global one if ``None``.

        Returns:
            k rows in the order of ``class_ids``.

        Raises:
            ArgumentError: If they are no such integers, or a class has no row in memory.
            NotFittedError: If nothing was ever added.

        Example:
            >>> memory = ReservoirBuffer(4)
            >>> memory.add(torch.tensor([[0.0], [0.5], [7.0]]), torch.tensor([0, 0, 7]))
            >>> rows = memory.sample_classes(torch.tensor([7, 0, 7]))
            >>> rows.label.tolist(), rows.arrival[::2].tolist()
            ([7, 0, 7], [2, 2])
        """
        table = self._filled()
        named = _checked_class_ids(class_ids)
        labels = table.now("label")
        order = labels.argsort(kind="stable")
        first, behind = (labels.searchsorted(named, side, order) for side in ("left", "right"))
        absent = named[first == behind]
        if absent.size:
            raise ArgumentError(f"class_ids must have rows in memory, {self.classes()}, got {absent[0]}")
        drawn = torch.rand(named.size, dtype=torch.float64, generator=generator, device="cpu").numpy()
        return self._rows_at(table, order[first + (drawn * (behind - first)).astype(np.int64)])

    def classes(self) -> list[int]:
        """Class ids that have rows in memory, sorted."""
        return list(self.class_counts())

    def class_counts(self) -> dict[int, int]:
        """Rows in memory of each class, by class id in order."""
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
        """(size,) int64."""
        return self._number("label")

    @property
    def experience(self) -> Tensor:
        """(size,) int64."""
        return self._number("experience")

    @property
    def arrival(self) -> Tensor:
        """(size,) int64, 0-based number of each row in its stream."""
        return self._number("arrival")

    @property
    def origin(self) -> Tensor:
        """(size,) int64, the stream of each row: 0 for rows added here, others for rows of merged memories."""
        return self._number("origin")

    def extra_repr(self) -> str:
        """Sizes, for ``print(memory)``."""
        limit = f"capacity={self._capacity}" if self._capacity else f"capacity_bytes={self._capacity_bytes}"
        return f"{limit}, policy={self.policy!r}, storage={self.storage!r}, size={self.size}, n_seen={self.n_seen}"

    # Which rows -------------------------------------------------------------------------------------------------

    def _decide(self, table: RowTable, labels: Ids) -> tuple[Ids, Ids]:
        """Sorted distinct slots to be written, and the row of the batch for each; sets the size of the table."""
        # One number per row, also while filling: the position of the generator then follows from the rows offered.
        drawn = torch.rand(labels.size, dtype=torch.float64, generator=self._generator, device="cpu").numpy()
        if self.policy == "class_balanced":
            return self._decide_balanced(table, labels, drawn)
        seen = self.n_seen
        ordinal = np.arange(seen + 1, seen + 1 + labels.size)
        slots = (drawn * ordinal).astype(np.int64)
        if seen < table.capacity:
            slots = np.where(ordinal <= table.capacity, ordinal - 1, slots)
            table.size = min(table.capacity, seen + labels.size)
        rows = np.flatnonzero(slots < table.capacity)
        slots = slots[rows]
        if slots.size < 2:
            return slots, rows
        order = slots.argsort(kind="stable")
        slots, rows = slots[order], rows[order]
        last = np.ones(slots.size, dtype=bool)  # of the rows that hit the same slot
        np.not_equal(slots[1:], slots[:-1], out=last[:-1])
        return slots[last], rows[last]

    def _decide_balanced(
        self, table: RowTable, labels: Ids, drawn: np.ndarray[Any, np.dtype[np.float64]]
    ) -> tuple[Ids, Ids]:
        if table.counts is None:
            table.counts = table.class_counts()
        stored, of_slot = table.counts, table.numbers["label"]
        seen = Counter({int(c): self._class_seen[int(c)] for c in np.unique(labels)})
        written: dict[int, int] = {}
        for row, (c, number) in enumerate(zip(labels.tolist(), drawn.tolist(), strict=True)):
            incomplete = stored.get(c, 0) < seen[c]
            seen[c] += 1
            if table.size < table.capacity and not incomplete:
                slot = table.size
                table.size += 1
            else:
                largest = max(stored.values(), default=0)
                # A class is full once it was the largest. The largest count never grows, so that a class that was
                # the largest either still is, or has lost a row.
                if incomplete or stored.get(c, 0) == largest:
                    victim, position = c, int(number * seen[c])
                    if position >= stored.get(c, 0):
                        continue
                else:
                    victim = min(other for other, count in stored.items() if count == largest)
                    position = int(number * largest)
                slot = int(np.flatnonzero(of_slot[: table.size] == victim)[position])
                stored[victim] -= 1
            stored[c] = stored.get(c, 0) + 1
            of_slot[slot] = c
            written[slot] = row
        slots = sorted(written)
        return np.array(slots, dtype=np.int64), np.array([written[slot] for slot in slots], dtype=np.int64)

    def _remaining(self, table: RowTable, capacity: int, generator: np.random.Generator) -> Ids:
        """Rows that stay when there is room for ``capacity``."""
        if self.policy == "uniform":
            return _drawn(np.arange(table.size), min(capacity, table.size), generator)
        counts = table.class_counts()
        shares = _levelled(list(counts.values()), capacity)
        labels = table.now("label")
        kept = [_drawn(np.flatnonzero(labels == c), share, generator) for c, share in zip(counts, shares, strict=True)]
        return np.sort(np.concatenate(kept))

    def _merged_rows(
        self, mine: RowTable, other: ReservoirBuffer, theirs: RowTable, capacity: int, generator: np.random.Generator
    ) -> tuple[Ids, Ids]:
        """Rows to keep of this memory and of the other."""
        if self.policy == "uniform":
            total = min(capacity, self.n_seen + other.n_seen)
            return _shared_out(
                (np.arange(mine.size), self.n_seen), (np.arange(theirs.size), other.n_seen), total, generator
            )
        parts = []
        for c in sorted(self._class_seen.keys() | other._class_seen.keys()):
            ours = np.flatnonzero(mine.now("label") == c), self._class_seen[c]
            parts.append((ours, (np.flatnonzero(theirs.now("label") == c), other._class_seen[c])))
        most = [
            min(seen + others_seen, _exact_limit(at, seen), _exact_limit(others_at, others_seen))
            for (at, seen), (others_at, others_seen) in parts
        ]
        shares = _levelled(most, capacity)
        kept = [_shared_out(*part, share, generator) for part, share in zip(parts, shares, strict=True)]
        first, second = zip(*kept, strict=True)
        return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))

    # Parts ------------------------------------------------------------------------------------------------------

    def _filled(self) -> RowTable:
        if self._table is None:
            raise NotFittedError("the memory is empty: nothing was added yet")
        return self._table

    def _number(self, name: str) -> Tensor:
        numbers = np.empty(0) if self._table is None else self._table.now(name)
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)

    def _rows_at(self, table: RowTable, at: Ids) -> MemoryRows:
        with exact():
            numbers = torch.from_numpy(np.stack([table.numbers[name][at] for name in NUMBERS])).to(self._device)
            tensors = {name: taken(tensor, at) for name, tensor in table.tensors.items()}
            data = self._codec.decode(tensors.pop("data"), table.layout.dtypes["data"])
            return MemoryRows(data, **dict(zip(NUMBERS, numbers.unbind(), strict=True)), extras=tensors)

    def _capacity_for(self, layout: RowLayout) -> int:
        if self._capacity is not None:
            return self._capacity
        assert self._capacity_bytes is not None
        row = layout.row_bytes(self._codec.stored_dtype(layout)) + _NUMBER_BYTES
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

    def _check_mergeable(self, other: ReservoirBuffer) -> None:
        self._check_alike(other)
        if self._table is not None and other._table is not None and self._table.layout != other._table.layout:
            raise ArgumentError(
                f"cannot merge a memory of rows of {other._table.layout} into one of {self._table.layout}"
            )
        if self.n_seen + other.n_seen >= _MERGE_LIMIT:
            raise ArgumentError(
                f"memories can be merged up to {_MERGE_LIMIT} rows seen together, "
                f"these have seen {self.n_seen} and {other.n_seen}"
            )

    # State ------------------------------------------------------------------------------------------------------

    def _move(self, device: torch.device) -> None:
        if self._table is not None:
            self._table.tensors = {name: tensor.to(device) for name, tensor in self._table.tensors.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        classes = self.class_seen
        values: dict[str, Any] = {
            "format": host_tensor(FORMAT),
            "policy": self.policy,
            "storage": self.storage,
            "normalised": self._codec.normalised(),
            "seen": host_tensor(self._seen),
            "classes": host_tensor(list(classes)),
            "class_seen": host_tensor(list(classes.values())),
            "generator": self._generator.get_state(),
            "capacity": host_tensor(self._capacity or 0),
        }
        if self._table is not None:
            table = self._table
            values |= {name: torch.from_numpy(table.now(name).astype(np.int64)) for name in NUMBERS}
            with exact():
                # A tensor without rows tells shape and dtype of what was added.
                shape, dtype = table.layout.shapes["data"], table.layout.dtypes["data"]
                values["row"] = torch.empty((0, *shape), dtype=dtype, device="cpu")
                for name, tensor in table.tensors.items():
                    key = name if name == "data" else f"extras.{name}"
                    values[key] = tensor[: table.size].clone()
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


def _checked_rows(data: Tensor, label: Tensor, extras: Mapping[str, Tensor]) -> tuple[Ids, dict[str, Tensor]]:
    tensors = {"data": data, **extras}
    for name, tensor in tensors.items():
        if name in NUMBERS:
            raise BatchError(f"{name} is the name of a number that the memory keeps itself; call the tensor otherwise")
        if not isinstance(tensor, Tensor):
            raise BatchError(f"{name} must be a tensor with one row per sample, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise BatchError(f"{name} must be a plain dense tensor; call to_dense() on a sparse one")
        if tensor.ndim == 0 or len(tensor) != len(data):
            raise BatchError(f"{name} must have one row per sample of data, got shape {tuple(tensor.shape)}")
    labels = _host_integers("label", label, len(data))
    return labels, tensors


def _checked_experience(experience: int | Tensor, rows: int) -> Ids:
    if isinstance(experience, Tensor):
        numbers = _host_integers("experience", experience, rows)
        largest = numbers.max(initial=0)
    else:
        largest = check_count("experience", experience, at_least=0)
        numbers = np.full(rows, min(largest, EXPERIENCE_LIMIT))
    if largest > EXPERIENCE_LIMIT:
        raise BatchError(f"experience must be at most {EXPERIENCE_LIMIT}, got {largest}")
    return numbers


def _checked_class_ids(class_ids: Tensor) -> Ids:
    told = type(class_ids).__name__
    if isinstance(class_ids, Tensor):
        told = f"{class_ids.dtype} of shape {tuple(class_ids.shape)}"
        floating = class_ids.dtype.is_floating_point or class_ids.dtype.is_complex
        if class_ids.ndim == 1 and not floating and class_ids.dtype != torch.bool:
            ids: Ids = class_ids.detach().to("cpu", torch.int64).numpy()
            return ids
    raise ArgumentError(f"class_ids must be a tensor (k,) of integer class ids, got {told}")


def _host_integers(name: str, values: Tensor, rows: int) -> Ids:
    if not isinstance(values, Tensor):
        raise BatchError(f"{name} must be a tensor of {rows} integers, got {type(values).__name__}")
    if values.dtype == torch.bool or values.dtype.is_floating_point or values.dtype.is_complex:
        raise BatchError(f"{name} must be integers, got {values.dtype}; call .long() if they are whole numbers")
    if values.shape != (rows,):
        raise BatchError(f"{name} must have shape ({rows},), one per row of data, got {tuple(values.shape)}")
    numbers: Ids = values.detach().to("cpu", torch.int64).numpy()
    if numbers.size and numbers.min() < 0:
        raise BatchError(
            f"{name} must not be negative, got {numbers.min()} in row {numbers.argmin()}; leave unlabelled rows out"
        )
    return numbers


def _drawn(rows: Ids, k: int, generator: np.random.Generator) -> Ids:
    """``k`` of the rows, in order."""
    return np.sort(generator.choice(rows, k, replace=False))


def _levelled(counts: list[int], capacity: int) -> list[int]:
    """Counts with the largest reduced until they add up to ``capacity`` at most."""
    left = np.array(counts, dtype=np.int64)
    for _ in range(int(left.sum()) - capacity):
        left[left.argmax()] -= 1
    return [int(count) for count in left]


def _exact_limit(rows: Ids, seen: int) -> int:
    """How large a uniform sample of this stream and another can be when these rows of ``seen`` are left."""
    return _MERGE_LIMIT if rows.size == seen else rows.size


def _shared_out(
    one: tuple[Ids, int], other: tuple[Ids, int], total: int, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """Rows of two samples, each with the number it was drawn from, that are a uniform sample of the union."""
    (ours, seen), (theirs, others_seen) = one, other
    k = int(generator.hypergeometric(seen, others_seen, total))
    return _drawn(ours, k, generator), _drawn(theirs, total - k, generator)
