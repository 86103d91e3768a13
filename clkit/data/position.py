"""How far learning came in a stream: what a checkpoint keeps of a data module, and what a resume asks of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from clkit.data.loader import Rows, cut_batches
from clkit.errors import DataError, StateError
from clkit.schema import check_format, saved_entry, saved_list

__all__ = ["StreamPosition"]

FORMAT = 1

_OWNER = "the saved stream position"
_SCHEDULE: list[tuple[str, Any]] = [("epochs_per_experience", int), ("warmup_epochs", int)]
_ORDER: list[tuple[str, Any]] = [
    ("batch_size", int),
    ("world_size", int),
    ("seed", int),
    ("shuffle", bool),
    ("train_samples", int | None),
]


@dataclass(frozen=True)
class StreamPosition:
    """An epoch and how many of its batches are learned, with everything that says which batches those are.

    Args:
        epoch: The training epoch in which a resume goes on, from 0.
        batches: How many of its batches each process has learned.
        reached: The index of the last experience that was begun.
        experiences: Name and class ids of each experience.
        schedule: What says which epoch belongs to which experience.
        order: What the batches of the running experience depend on.
    """

    epoch: int
    batches: int
    reached: int
    experiences: list[list[Any]]
    schedule: dict[str, int]
    order: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def saved(cls, state: Any) -> StreamPosition:
        """Return the position that :meth:`state_dict` gave.

        Raises:
            StateError: If it is none.
        """
        check_format(state, FORMAT, _OWNER)
        epoch, batches, reached = (saved_entry(state, name, int, _OWNER) for name in ("epoch", "batches", "reached"))
        if min(epoch, batches) < 0:
            raise StateError(f"{_OWNER} is epoch {epoch}, batch {batches}: it is damaged")
        experiences = saved_list(state, "experiences", list, _OWNER)
        for each in experiences:
            name, classes = each if len(each) == 2 else (None, None)
            saved_entry({"name": name}, "name", str, _OWNER)
            saved_list({"classes": classes}, "classes", int, _OWNER)
        schedule, order = saved_entry(state, "schedule", dict, _OWNER), saved_entry(state, "order", dict, _OWNER)
        schedule = {name: saved_entry(schedule, name, kind, _OWNER) for name, kind in _SCHEDULE}
        order = {name: saved_entry(order, name, kind, _OWNER) for name, kind in _ORDER}
        if min(schedule["epochs_per_experience"], order["world_size"], order["batch_size"]) < 1:
            raise StateError(f"{_OWNER} has the settings {schedule} and {order}: it is damaged")
        return cls(epoch, batches, reached, experiences, schedule, order)

    def is_of(self, stream: StreamPosition) -> bool:
        """Whether it comes from a stream with the same experiences, of which one may be longer."""
        mine, theirs = self.experiences, stream.experiences
        return mine[: len(theirs)] == theirs[: len(mine)]

    def check_fit(self, now: StreamPosition) -> None:
        """Refuse a fit that would go on in another stream, or count its epochs otherwise.

        Args:
            now: The position of the stream in hand.

        Raises:
            StateError: Naming the difference.
        """
        if not self.is_of(now):
            raise StateError(
                f"the checkpoint comes from another stream: its experiences have the names and classes "
                f"{self.experiences}, this one's {now.experiences}; use the source, scenario and seed that it was "
                "trained with"
            )
        for name, value in now.schedule.items():
            if self.schedule[name] != value:
                raise StateError(
                    f"the checkpoint was saved with {name}={self.schedule[name]}, this run has {name}={value}: its "
                    "epochs would belong to other experiences; use the same"
                )

    def learned_of(self, epoch: int, order: dict[str, Any]) -> int:
        """Return how many batches of an epoch are learned already.

        Args:
            epoch: An epoch of the fit that goes on from here.
            order: What its batches depend on.

        Raises:
            StateError: If the batches would be others than those that were learned.
        """
        if self.epoch != epoch or self.batches == 0:
            return 0
        for name, now in order.items():
            if self.order[name] != now:
                raise StateError(
                    f"the checkpoint was saved inside an experience with {name}={self.order[name]}, this run has "
                    f"{name}={now}; use the same, or resume from a checkpoint at the end of an experience"
                )
        return self.batches

    # ---- what was learned once more

    def check_replay(self, now: StreamPosition, rows: Rows, available: int) -> None:
        """Refuse to look up learned batches in another stream, where they would be others, and rows that do not exist.

        Args:
            now: The position of the stream in hand.
            rows: Rows of the training part that are looked for.
            available: How many rows that has.

        Raises:
            DataError: If there is no such row.
            StateError: Naming the difference between the streams.
        """
        reached = self._index_of(self.epoch)
        if not self.is_of(now) or reached > len(now.experiences) - (self.batches > 0):
            self._refuse(f"it had come to experience {reached + 1} of {self.experiences}; here are {now.experiences}")
        for name in ("seed", "shuffle"):
            if self.order[name] != now.order[name]:
                self._refuse(f"it has {name}={self.order[name]}; here it is {now.order[name]}")
        if rows.min() < 0 or rows.max() >= available:
            missing = int(rows.max() if rows.min() >= 0 else rows.min())
            raise DataError(f"there is no sample {missing}: the training part has the rows 0 to {available - 1}")

    def learned_epochs(self, *, last_experience: bool) -> list[tuple[int, int]]:
        """Return each epoch in which batches were learned, with the index of its experience."""
        warmup, length = self.schedule["warmup_epochs"], self.schedule["epochs_per_experience"]
        last = self.epoch if self.batches else self.epoch - 1
        first = warmup + (last - warmup) // length * length if last_experience else warmup
        return [(epoch, self._index_of(epoch)) for epoch in range(max(first, warmup), last + 1)]

    def learned_rows(self, epoch: int, arriving: Rows, wanted: Rows) -> list[Rows]:
        """Return the learned batches of an epoch that hold some of the wanted rows.

        Args:
            epoch: One of :meth:`learned_epochs`.
            arriving: (n,) the rows of its experience in the order of that epoch.
            wanted: Rows of the training part.
        """
        found = []
        for rank in range(self.order["world_size"]):
            batches = cut_batches(arriving, self.order["batch_size"], rank=rank, world_size=self.order["world_size"])
            done = self.batches if epoch == self.epoch else len(batches)
            found += [batch for batch in batches[:done] if np.isin(batch, wanted).any()]
        return found

    def _index_of(self, epoch: int) -> int:
        return (epoch - self.schedule["warmup_epochs"]) // self.schedule["epochs_per_experience"]

    @staticmethod
    def _refuse(difference: str) -> NoReturn:
        raise StateError(f"the checkpoint comes from another stream: {difference}")
