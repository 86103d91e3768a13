"""The form in which a stream hands out its batches: a tuple, a dictionary, a named tuple, or one of the user's own."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, Literal

from clkit.errors import ArgumentError

__all__ = ["BatchForm", "batch_former"]

BatchForm = Literal["tuple", "dict", "named"] | list[str] | Callable[[tuple[Any, ...]], Any]

NAMES = ("image", "label", "task")


def batch_former(form: BatchForm) -> Callable[[tuple[Any, ...]], Any]:
    """Return the function from ``(inputs, targets)`` or ``(inputs, targets, task)`` to a batch of the form.

    Args:
        form: ``"tuple"``; ``"dict"``, with the keys ``image``, ``label`` and ``task``; ``"named"``, a named tuple with
            those fields; two or three keys of a dictionary; or the function itself.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> batch_former("dict")((0.5, 3))
        {'image': 0.5, 'label': 3}
        >>> batch_former(["pixel_values", "labels"])((0.5, 3, 1))
        {'pixel_values': 0.5, 'labels': 3, 'task': 1}
        >>> batch_former("named")((0.5, 3)).label
        3
    """
    if form == "tuple":
        return tuple  # which a tuple passes as it is
    if form == "named":
        kinds = {number: namedtuple("Batch", NAMES[:number]) for number in (2, 3)}
        return lambda batch: kinds[len(batch)](*batch)
    if callable(form):
        return form
    names = NAMES if form == "dict" else form
    texts = isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names)
    if not texts or len(names) not in (2, 3) or len(set(names)) < len(names):
        raise ArgumentError(
            f"batch_form must be 'tuple', 'dict', 'named', two or three different keys such as ['pixel_values', "
            f"'labels'], or a function from (inputs, targets) to a batch, got {form!r}"
        )
    keys = (*names, *NAMES[len(names) :])
    return lambda batch: dict(zip(keys, batch, strict=False))
