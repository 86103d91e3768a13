"""Reading saved states of unknown origin: every entry is looked at before anything is changed by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.errors import StateError

__all__ = [
    "EXPORTED",
    "MERGED",
    "STRATEGY",
    "STREAM",
    "check_format",
    "check_keys",
    "check_saved",
    "check_saved_ids",
    "saved_entry",
    "saved_list",
]


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


def check_keys(state: Mapping[str, Any], prefix: str, known: Iterable[str], parts: Iterable[str] = ()) -> None:
    """Refuses entries that nobody would read, which torch would only name after everything was loaded.

    Args:
        state: The saved state.
        prefix: Only entries whose name starts so are looked at.
        known: The names that are read.
        parts: Names of parts, whose entries they check themselves.

    Raises:
        StateError: Naming the entries.
    """
    for key in state:
        if not isinstance(key, str):
            raise StateError(f"the saved state has an entry {key!r}; its names must be strings")
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    ours, parts = set(known), tuple(f"{part}." for part in parts)
    surplus = [prefix + name for name in own if name not in ours and not name.startswith(parts)]
    if surplus:
        raise StateError(f"the saved state has {surplus}, which nothing here reads: it is of another kind")


def check_saved(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
    """A tensor of a saved state, with finite values unless ``finite=False``.

    Raises:
        StateError: If it is of another form, or has values that are not finite.
    """
    if not isinstance(value, Tensor):
        raise StateError(f"{name} must be a tensor, the saved state has a {type(value).__name__}")
    plain = value.layout is torch.strided and not value.is_nested and not value.is_meta
    if not plain or tuple(value.shape) != shape or value.dtype != dtype:
        seen = f"shape {tuple(value.shape)} and {value.dtype}" if plain else "a tensor without plain values"
        raise StateError(f"{name} must have shape {shape} and {dtype}, the saved state has {seen}")
    if finite and value.is_floating_point() and not bool(value.isfinite().all()):
        raise StateError(f"{name} has values that are not finite: the file is damaged")
    return value.detach()


def check_saved_ids(name: str, value: Any) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Class ids of a saved state, on the host.

    Raises:
        StateError: If they are not sorted, distinct int64 numbers from 0.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested or value.is_meta:
        raise StateError(f"{name} must be a plain tensor, the saved state has a {type(value).__name__}")
    if value.dtype != torch.int64 or value.ndim != 1 or bool((value < 0).any()) or bool((value.diff() <= 0).any()):
        raise StateError(f"{name} must be sorted, distinct int64 ids from 0, the saved state has {value}")
    ids: np.ndarray[tuple[int], np.dtype[np.int64]] = value.detach().cpu().numpy().copy()
    return ids


EXPORTED = "clkit_export"
"""Marks an exported file; the value is its format."""


MERGED = "clkit_merged"
"""Marks a checkpoint made of several, which no fit can go on from; the value lists their names."""


STREAM = "clkit_stream"
"""The key of a checkpoint under which a run keeps its place in the stream."""

STRATEGY = "clkit_strategy"
"""The entry of a whole checkpoint that holds what the strategy has learned."""
