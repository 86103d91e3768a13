"""What a replay strategy keeps of a stream: its memory, or this process's part of it, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, StateError
from clkit.methods._checks import derived_seed
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.selection import even
from clkit.schema import Many, Numbers, Table, Whole, read_own, saved_entry
from clkit.strategies._ranks import ReplayRanks, ShardedRanks

__all__ = ["Counters", "MemorySettings", "ReplayMemory"]

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
        ArgumentError: If scope, policy or storage is none of its choices; what else is not allowed, the memory says.

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
        check_arguments(type(self), vars(self))


class ReplayMemory:
    """Holds ``rows``, the memory of this process: all of ``capacity`` (0 for none), or an even part of it."""

    def __init__(self, capacity: int, settings: MemorySettings, seed: int) -> None:
        self.capacity = capacity
        self.ranks: ReplayRanks = ShardedRanks() if settings.scope == "sharded" else ReplayRanks()
        self._seed = seed
        self._options = {name: getattr(settings, name) for name in ("policy", "storage", "mean", "std", "device")}
        rows = ReservoirBuffer(max(capacity, 1), seed=seed, **self._options)  # settings are checked without rows, too
        self.rows = rows if capacity else None
        self._parts = 1  # of which `rows` is one

    def share_out(self) -> None:
        """Make of the memory the part that this process keeps, once it is known how many processes there are."""
        self.ranks.join()
        parts = self.ranks.shards
        if self.rows is None or self._parts == parts:
            return
        if self.capacity < parts:
            raise ArgumentError(
                f"memory.scope='sharded' needs at least one image for each of the {parts} processes, got "
                f"capacity={self.capacity}"
            )
        rows = self._empty(parts)
        if self.rows.n_seen:
            rows.take_share([self.rows], self.ranks.shard, even(self.capacity, parts), seed=self._seed)
        self.rows, self._parts = rows, parts

    def saved(self) -> list[dict[str, Any]]:
        """Return the states of all parts in rank order, in the first process; none without a memory."""
        return [] if self.rows is None else self.ranks.saved(self.rows)

    def check(self, memories: list[dict[str, Any]], owner: str) -> None:
        """Check what :meth:`saved` gave as far as :meth:`load` will not."""
        if bool(memories) != (self.rows is not None):
            raise StateError(
                f"{owner}: the saved run has {'a' if memories else 'no'} memory, this strategy has "
                f"capacity={self.capacity}; use the capacity of the saved run"
            )
        for memory in memories:
            if "data" in memory:  # images have to be finite, which the memory does not ask of its rows
                saved_entry(memory, "data", Numbers(("N", ...), None), f"{owner}: the saved memory")

    def load(self, memories: list[dict[str, Any]], owner: str) -> None:
        """Take the part of this process, or a share of all parts where there were more or fewer; all or nothing."""
        self.share_out()
        if self.rows is None:
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
        capacity = read_own(state, {"capacity": Numbers(least=1)}, owner)["capacity"]
        memory = ReservoirBuffer(int(capacity), **self._options)
        memory.load_state_dict(state)
        return memory


@dataclass
class Counters:
    """What a replay strategy counts while it learns a stream."""

    table: ClassVar[Table] = {
        "seen": Many(Whole()),
        "step": Whole(),
        "batch_in_experience": Whole(),
        "experience": Whole(),
        "epoch": Whole(optional=True),
        "held": Numbers(("N", 3), least=0),
    }

    seen: set[int] = field(default_factory=set)  # classes of all batches learned
    step: int = 0  # batches learned
    batch_in_experience: int = 0  # of them
    experience: int = 0  # the present one
    epoch: int | None = None  # in which it began
    held: dict[int, dict[int, int]] = field(default_factory=dict)  # rows by class at the end of each experience

    def state_dict(self) -> dict[str, Any]:
        held = [[experience, c, n] for experience, rows in self.held.items() for c, n in rows.items()]
        numbers = torch.tensor(held, dtype=torch.int64, device="cpu").reshape(-1, 3)
        return {**vars(self), "seen": sorted(self.seen), "held": numbers}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Counters:
        """Return what ``state_dict`` gave, once it is known to fit the table."""
        held: dict[int, dict[int, int]] = {}
        for experience, c, n in state["held"].tolist():
            held.setdefault(experience, {})[c] = n
        return cls(**{**state, "seen": set(state["seen"]), "held": held})
