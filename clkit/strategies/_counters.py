"""What a replay strategy counts while it learns a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clkit.errors import StateError
from clkit.schema import saved_entry, saved_list

__all__ = ["Counters"]


@dataclass
class Counters:
    """Where a replay strategy stands, as plain values.

    Args:
        seen: Classes of all batches learned.
        step: Batches learned.
        batch_in_experience: Batches learned of the present experience.
        experience: Number of the present experience, from 0.
        epoch: In which it began.
        held: For each experience that ended, how many rows of each class the memory had then.
    """

    seen: set[int] = field(default_factory=set)
    step: int = 0
    batch_in_experience: int = 0
    experience: int = 0
    epoch: int | None = None
    held: dict[int, dict[int, int]] = field(default_factory=dict)

    def begin(self, experience: int, epoch: int) -> None:
        """Count the batches of an experience."""
        self.experience, self.epoch, self.batch_in_experience = experience, epoch, 0

    def learned(self, seen: set[int]) -> None:
        """Count a batch, after which these classes were seen."""
        self.seen = seen
        self.step += 1
        self.batch_in_experience += 1

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all of it, for a checkpoint."""
        held = [[experience, c, n] for experience, rows in self.held.items() for c, n in rows.items()]
        return {**vars(self), "seen": sorted(self.seen), "held": held}

    @classmethod
    def from_state(cls, state: Any, owner: str) -> Counters:
        """Return what :meth:`state_dict` gave.

        Raises:
            StateError: If it is damaged.
        """
        numbers = {name: saved_entry(state, name, int, owner) for name in ("step", "batch_in_experience", "experience")}
        negative = [name for name, number in numbers.items() if number < 0]
        if negative:
            raise StateError(
                f"{owner}: {', '.join(negative)} in the saved state must be at least 0; the file is damaged"
            )
        held: dict[int, dict[int, int]] = {}
        for row in saved_list(state, "held", list, owner):
            if len(row) != 3:
                raise StateError(
                    f"{owner}: 'held' in the saved state must be rows of three numbers; the file is damaged"
                )
            experience, label, rows = saved_list({"held": row}, "held", int, owner)
            held.setdefault(experience, {})[label] = rows
        return cls(
            seen=set(saved_list(state, "seen", int, owner)),
            epoch=saved_entry(state, "epoch", int | None, owner),
            held=held,
            **numbers,
        )
