"""How far learning came in a stream: what a checkpoint keeps of a data module, and what a resume asks of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clkit.data.loader import Rows, cut_batches
from clkit.errors import DataError, StateError
from clkit.schema import Instance, Many, Nested, OneOf, Row, Table, Whole, read_state

__all__ = ["StreamPosition"]

FORMAT = 1

_OWNER = "the saved stream position"
_SCHEDULE: Table = {"epochs_per_experience": Whole(1), "warmup_epochs": Whole()}
_ORDER: Table = {
    "batch_size": Whole(1),
    "world_size": Whole(1),
    "seed": Whole(),
    "shuffle": Instance(bool),
    "train_samples": Whole(optional=True),
}
_TABLE: Table = {
    "format": OneOf((FORMAT,)),
    "epoch": Whole(most=2**24),
    "batches": Whole(),
    "reached": Whole(),
    "experiences": Many(Row({"name": Instance(str), "classes": Many(Whole())})),
    "schedule": Nested(_SCHEDULE),
    "order": Nested(_ORDER),
}


@dataclass(frozen=True)
class StreamPosition:
    """An epoch and how many of its batches are learned, with everything that says which batches those are."""

    epoch: int  # the training epoch in which a resume goes on, from 0
    batches: int  # how many of its batches each process has learned
    reached: int  # index of the last experience that was begun
    experiences: list[list[Any]]  # name and class ids of each
    schedule: dict[str, int]  # what says which epoch belongs to which experience
    order: dict[str, Any]  # what the batches of the running experience depend on

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain types."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def saved(cls, state: Any) -> StreamPosition:
        """Return the position that :meth:`state_dict` gave.

        Raises:
            StateError: If it is none.
        """
        saved = read_state(state, _TABLE, _OWNER)
        del saved["format"]
        return cls(**saved)

    def is_of(self, stream: StreamPosition) -> bool:
        """Whether it comes from a stream with the same experiences, of which one may be longer."""
        mine, theirs = self.experiences, stream.experiences
        return mine[: len(theirs)] == theirs[: len(mine)]

    def _difference(self, now: StreamPosition) -> str:
        """Say in which experience two streams first differ, and by what."""
        pairs = list(zip(self.experiences, now.experiences, strict=False))
        differing = [index for index, (mine, theirs) in enumerate(pairs) if mine != theirs]
        index = differing[0]
        (name, classes), (here, classes_here) = pairs[index]
        numbers = f"{len(self.experiences)} experiences, here are {len(now.experiences)}; {len(differing)} of "
        text = f"it has {numbers}{len(pairs)} differ, the first is experience {index}, which is {name!r}"
        if name != here:
            return f"{text}, here {here!r}"
        gone, new = (sorted(set(a) - set(b)) for a, b in ((classes, classes_here), (classes_here, classes)))
        parts = [f"{what} {_some(ids)}" for what, ids in (("lacks the classes", gone), ("has the classes", new)) if ids]
        return f"{text}: here it {' and '.join(parts) or 'has its classes in another order'}"

    def check_fit(self, now: StreamPosition) -> None:
        """Refuse a fit that would go on in another stream than the one in hand, or count its epochs otherwise.

        Raises:
            StateError: Naming the difference.
        """
        if not self.is_of(now):
            raise StateError(
                f"the checkpoint comes from another stream: {self._difference(now)}; use the source, scenario and seed "
                "that it was trained with"
            )
        for name, value in now.schedule.items():
            if self.schedule[name] != value:
                raise StateError(
                    f"the checkpoint was saved with {name}={self.schedule[name]}, this run has {name}={value}: its "
                    "epochs would belong to other experiences; use the same"
                )

    def learned_of(self, epoch: int, order: dict[str, Any]) -> int:
        """Return how many batches of an epoch are learned already, where its batches depend on ``order`` now.

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

        Raises:
            DataError: If there is no such row.
            StateError: Naming the difference between the streams.
        """
        reached = self._index_of(self.epoch)
        if not self.is_of(now):
            raise StateError(f"the checkpoint comes from another stream: {self._difference(now)}")
        if reached > len(now.experiences) - (self.batches > 0):
            raise StateError(
                f"the checkpoint comes from another stream: it had come to experience {reached} (of "
                f"{len(self.experiences)}, counted from 0); here are only {len(now.experiences)}"
            )
        for name in ("seed", "shuffle"):
            if self.order[name] != now.order[name]:
                raise StateError(
                    f"the checkpoint comes from another stream: it has {name}={self.order[name]}; here it is "
                    f"{now.order[name]}"
                )
        if rows.min() < 0 or rows.max() >= available:
            missing = int(rows.max() if rows.min() >= 0 else rows.min())
            raise DataError(f"there is no sample {missing}: the training part has the rows 0 to {available - 1}")

    def learned_epochs(self, *, last_experience: bool, last_epochs: bool) -> list[tuple[int, int]]:
        """Return each epoch in which batches were learned, with the index of its experience.

        With ``last_epochs`` only the last one of each experience.
        """
        warmup, length = self.schedule["warmup_epochs"], self.schedule["epochs_per_experience"]
        last = self.epoch if self.batches else self.epoch - 1
        first = warmup + (last - warmup) // length * length if last_experience else warmup
        epochs = range(max(first, warmup), last + 1)
        if last_epochs:
            epochs = range(warmup + self._index_of(epochs.start) * length + length - 1, last + 1, length)
        return [(epoch, self._index_of(epoch)) for epoch in epochs]

    def learned_rows(self, epoch: int, arriving: Rows, wanted: Rows) -> list[Rows]:
        """Return the learned batches of an epoch, whose rows arrive in this order, that hold some of the wanted."""
        found = []
        for rank in range(self.order["world_size"]):
            batches = cut_batches(arriving, self.order["batch_size"], rank=rank, world_size=self.order["world_size"])
            done = self.batches if epoch == self.epoch else len(batches)
            found += [batch for batch in batches[:done] if np.isin(batch, wanted).any()]
        return found

    def _index_of(self, epoch: int) -> int:
        return (epoch - self.schedule["warmup_epochs"]) // self.schedule["epochs_per_experience"]


def _some(ids: list[int], most: int = 10) -> str:
    return ", ".join(map(str, ids[:most])) + (f", … ({len(ids)})" if len(ids) > most else "")
