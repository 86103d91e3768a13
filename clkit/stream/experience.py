"""What a stream is made of: one :class:`Experience` after the other.

A leaf like :mod:`clkit.errors`: data modules make experiences, callbacks and strategies read them, and neither needs
to import the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Experience"]


@dataclass(frozen=True)
class Experience:
    """One part of a stream (a "task"): what is learned between two boundaries.

    Attributes:
        index: Position in the stream, from 0.
        name: What a person reads in tables and progress bars, e.g. ``"classes 0-1"``.
        phase: ``"learn"``, or ``"warmup"`` while a strategy still trains the backbone by gradient on the first
            experience; heads ignore batches of a warm-up.
        classes: Sorted class ids, as the user numbers them, of the training part. Empty where nobody can know them
            beforehand (plain loaders).
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
