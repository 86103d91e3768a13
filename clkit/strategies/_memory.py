"""The memory of a replay strategy: whole, or this process's part of it, and how it is saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from clkit.errors import ArgumentError, StateError
from clkit.methods._checks import check_choice, derived_seed
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.shares import even
from clkit.schema import saved_entry, saved_list
from clkit.strategies._ranks import ReplayRanks, ShardedRanks

__all__ = ["MemorySettings", "ReplayMemory"]

_SHARDS = 5  # a purpose of draws that no step has


@dataclass(frozen=True)
class MemorySettings:
    """How a replay strategy keeps its images.

    Args:
        policy: ``"uniform"`` or ``"class_balanced"``, see :class:`~clkit.methods.ReservoirBuffer`.
        storage: ``"same"``, ``"uint8"`` or ``"float16"``.
        mean: With ``"uint8"``: the mean by which the images were normalised, one number or one per channel.
        std: With ``"uint8"``: the standard deviation by which they were normalised.
        device: Where the images are kept.
        scope: With several processes: ``"replicated"``: each has the whole memory, and images go from each to all in
            every step; ``"sharded"``: each has an even part of it, for its own stream, and images go only to the first
            process for a checkpoint, and one to a process that has none. Then images are equally likely to be kept
            where all processes have seen equally many, and mixed pairs come from one process's part.

    Raises:
        ArgumentError: If the scope is none of the two; what else is not allowed, the memory says.

    Example:
        >>> from clkit.strategies import ERStrategy
        >>> ERStrategy(memory=MemorySettings(storage="uint8")).memory.storage
        'uint8'
    """

    policy: Literal["uniform", "class_balanced"] = "uniform"
    storage: Literal["same", "uint8", "float16"] = "same"
    mean: float | list[float] | None = None
    std: float | list[float] | None = None
    device: str = "cpu"
    scope: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("replicated", "sharded"))


class ReplayMemory:
    """Holds ``rows``, the memory of this process: all that is kept, or an even part of it.

    Args:
        capacity: Rows in all processes; 0 for no memory.
        settings: How they are kept.
        seed: Of the draws.
    """

    def __init__(self, capacity: int, settings: MemorySettings, seed: int) -> None:
        self.capacity = capacity
        self.ranks: ReplayRanks = ShardedRanks() if settings.scope == "sharded" else ReplayRanks()
        self._seed = seed
        self._options = {name: getattr(settings, name) for name in ("policy", "storage", "mean", "std", "device")}
        self.rows = ReservoirBuffer(capacity, seed=seed, **self._options) if capacity else None
        self._parts = 1  # of which `rows` is one

    def share_out(self) -> None:
        """Make of the memory the part that this process keeps, once it is known how many processes there are.

        Raises:
            ArgumentError: If there are more processes than rows to keep.
        """
        self.ranks.join()
        parts = self.ranks.shards
        if self.rows is None or self._parts == parts:
            return
        if self.capacity < parts:
            raise ArgumentError(
                f"memory.scope='sharded' needs at least one image for each of the {parts} processes, got "
                f"capacity={self.capacity}"
            )
        part = self._empty(parts)
        if self.rows.n_seen:
            part.take_share([self.rows], self.ranks.shard, even(self.capacity, parts), seed=self._seed)
        self.rows, self._parts = part, parts

    def saved(self) -> list[dict[str, Any]] | None:
        """Return the states of all parts in rank order, in the first process; ``None`` without a memory."""
        return None if self.rows is None else self.ranks.saved(self.rows)

    def check(self, state: dict[str, Any], owner: str) -> None:
        """Check what :meth:`saved` gave as far as :meth:`load` will not.

        Raises:
            StateError: If it does not fit.
        """
        memories = saved_entry(state, "memory", list | None, owner)
        if (memories is None) != (self.rows is None):
            raise StateError(
                f"{owner}: the saved run has {'no memory' if memories is None else 'a memory'}, this strategy has "
                f"capacity={self.capacity}; use the capacity of the saved run"
            )
        if memories is None:
            return
        if not saved_list(state, "memory", dict, owner):
            raise StateError(f"{owner}: the list of saved memories is empty; the file is damaged")
        for memory in memories:
            images = memory.get("data")
            if isinstance(images, Tensor) and images.is_floating_point() and not bool(images.isfinite().all()):
                raise StateError(f"{owner}: images in the saved memory are not finite; the file is damaged")

    def load(self, memories: list[dict[str, Any]] | None, owner: str) -> None:
        """Take the part of this process, or a share of all parts where there were more or fewer.

        Raises:
            StateError: If they do not fit; nothing is changed then.
        """
        self.share_out()
        if self.rows is None or memories is None:
            return
        if len(memories) == self._parts:
            self.rows.load_state_dict(memories[self.ranks.shard])
            return
        saved = [self._whole(state, f"{owner}: memory {position}") for position, state in enumerate(memories)]
        total = sum(memory.capacity or 0 for memory in saved)
        if total != self.capacity:
            raise StateError(
                f"{owner}: the {len(saved)} saved memories have a capacity of {total} rows together, this strategy of "
                f"{self.capacity}; with another number of processes use the capacity of the saved run"
            )
        rows = self._empty(self._parts)
        try:
            rows.take_share(saved, self.ranks.shard, even(self.capacity, self._parts), seed=self._seed)
        except ArgumentError as error:
            raise StateError(f"{owner}: the saved memories do not fit together: {error}") from error
        self.rows = rows

    def _empty(self, parts: int) -> ReservoirBuffer:
        """Return this process's memory of so many."""
        seed = self._seed if parts == 1 else derived_seed(self._seed, _SHARDS, self.ranks.shard)
        return ReservoirBuffer(even(self.capacity, parts)[self.ranks.shard], seed=seed, **self._options)

    def _whole(self, state: dict[str, Any], owner: str) -> ReservoirBuffer:
        capacity = saved_entry(state, "capacity", Tensor, owner)
        if capacity.numel() != 1 or capacity.is_floating_point() or capacity.is_complex() or int(capacity) < 1:
            raise StateError(f"{owner} has the capacity {capacity.tolist()}; the file is damaged")
        memory = ReservoirBuffer(int(capacity), **self._options)
        memory.load_state_dict(state)
        return memory
