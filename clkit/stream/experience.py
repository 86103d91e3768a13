"""What a stream is made of: one :class:`Experience` after the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from clkit.schema import Instance, Many, OneOf, Table, Whole, read_state, saved_entry

__all__ = ["Experience", "experience_state", "saved_experience"]


@dataclass(frozen=True)
class Experience:
    """One part of a stream (a "task"): what is learned between two boundaries.

    Attributes:
        index: Position in the stream, from 0.
        name: What a person reads in tables and progress bars, e.g. ``"classes 0-1"``.
        phase: ``"learn"``, or ``"warmup"`` while a strategy still trains the backbone by gradient on the first
            experience; heads ignore batches of a warm-up.
        classes: Sorted class ids, as the user numbers them, of the training part; empty for plain loaders.
        train_samples: Number of training samples, or ``None`` where it is not known beforehand.
        eval_samples: Number of evaluation samples, or ``None`` where it is not known beforehand.

    Example:
        >>> Experience(index=0, name="classes 3, 5", classes=(3, 5), train_samples=40, eval_samples=10).phase
        'learn'
    """

    index: int
    name: str
    phase: Literal["warmup", "learn"] = "learn"
    classes: tuple[int, ...] = ()
    train_samples: int | None = None
    eval_samples: int | None = None


_TABLE: Table = {
    "index": Whole(most=2**31 - 1),
    "name": Instance(str),
    "phase": OneOf(("warmup", "learn")),
    "classes": Many(Whole()),
    "train_samples": Whole(optional=True),
    "eval_samples": Whole(optional=True),
}


def experience_state(experience: Experience | None) -> dict[str, Any] | None:
    """Return an experience as plain types, for a saved state."""
    return None if experience is None else {**asdict(experience), "classes": list(experience.classes)}


def saved_experience(state: Any, name: str, owner: str) -> Experience | None:
    """Return the experience in the entry ``name`` of a saved state of ``owner``, as :func:`experience_state` gave it.

    Raises:
        StateError: If it is none.
    """
    entry = saved_entry(state, name, object, owner)
    saved = None if entry is None else read_state(entry, _TABLE, f"{owner}: {name}")
    return None if saved is None else Experience(**{**saved, "classes": tuple(saved["classes"])})
