"""Reading saved states of unknown origin: every entry is looked at before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any

from clkit.errors import StateError

__all__ = ["check_format", "saved_entry", "saved_list"]


def saved_entry(state: Any, name: str, kind: type | UnionType, owner: str) -> Any:
    """An entry of a saved state.

    Args:
        state: What should be a dictionary with the entry.
        name: Of the entry.
        kind: What it must be; ``bool`` is no ``int`` here.
        owner: Whose state it is, for the message.

    Raises:
        StateError: If there is none, or it is of another kind.

    Example:
        >>> saved_entry({"observed": 3}, "observed", int, "NMC(nmc)")
        3
    """
    if not isinstance(state, Mapping):
        raise StateError(f"{owner}: the saved state is a {type(state).__name__}, not a dictionary; the file is damaged")
    if name not in state:
        raise StateError(f"{owner}: the saved state has no {name!r}; the file is damaged, or of another kind")
    value = state[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(True, _without_int(kind))):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind)
        raise StateError(
            f"{owner}: {name!r} in the saved state must be {wanted}, it is a {type(value).__name__}; "
            "the file is damaged, or of another kind"
        )
    return value


def saved_list(state: Any, name: str, kind: type, owner: str) -> list[Any]:
    """An entry that is a list, each element of one kind.

    Raises:
        StateError: If there is none, or it is of another kind.
    """
    values: list[Any] = saved_entry(state, name, list, owner)
    for position, value in enumerate(values):
        saved_entry({f"{name}[{position}]": value}, f"{name}[{position}]", kind, owner)
    return values


def check_format(state: Any, known: int, owner: str) -> None:
    """Refuses a state of another format.

    Raises:
        StateError: Naming both.
    """
    found = saved_entry(state, "format", object, owner)
    if type(found) is not int or found != known:
        raise StateError(
            f"{owner}: the saved state has format {found!r}, this clkit reads format {known}; "
            "use the clkit release that wrote it"
        )


def _without_int(kind: type | UnionType) -> tuple[type, ...]:
    """The types of which a truth value is one on purpose, and not because Python counts it as a number."""
    kinds = (kind,) if isinstance(kind, type) else kind.__args__
    return tuple(each for each in kinds if each is not int)
