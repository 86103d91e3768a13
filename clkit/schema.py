"""What a saved state must look like, said as a table and checked in one place, before anything is changed by it.

A table maps the name of each entry to its kind::

    {"format": OneOf((1,)), "classes": Numbers(("C",), least=0, ids=True), "sums": Numbers(("C", 512), torch.float64)}

:func:`read_state` compares a whole state with it. States come out of files of unknown origin: nothing of a value is
used, not even for an error message, before it is known to be of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType, UnionType
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from clkit.errors import StateError

__all__ = [
    "EXPORTED",
    "FLOATS",
    "MERGED",
    "STRATEGY",
    "STREAM",
    "Instance",
    "Kind",
    "Many",
    "Nested",
    "Numbers",
    "OneOf",
    "Settings",
    "Table",
    "Whole",
    "check_format",
    "describe",
    "is_plain",
    "read_entries",
    "read_state",
    "saved_entry",
    "saved_list",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FINITE = 1e120  # squares of larger numbers, summed and multiplied, leave float64
_ROW_BYTES = 2**40  # one row of a tensor, which says its shape even where no rows are stored
_DAMAGED = "the file is damaged, or of another kind"


class Kind:
    """What an entry must be; the classes below are the kinds that there are."""

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Any:
        """Return the value, or refuse it under this name; new symbolic sizes are added to ``sizes``."""
        raise NotImplementedError


Table = Mapping[str, Kind]


def read_state(state: Any, table: Table, owner: str, prefix: str = "") -> dict[str, Any]:
    """Compare a saved state with a table and return its entries, without the prefix.

    Args:
        state: What should be a dictionary with exactly the entries of the table.
        table: The kind of each entry. A symbolic size is bound by the first entry that has it, in the table's order.
        owner: Whose state it is, for the message.
        prefix: Only entries whose names start with it are read.

    Raises:
        StateError: Naming the entry, what was seen and what is wanted.

    Example:
        >>> table = {"ids": Numbers(("C",), least=0, ids=True), "name": OneOf(("ema", "mean"))}
        >>> read_state({"ids": torch.tensor([0, 3]), "name": "ema"}, table, "Averages")
        {'ids': tensor([0, 3]), 'name': 'ema'}
        >>> read_state({"ids": torch.tensor([3, 0]), "name": "ema"}, table, "Averages")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        clkit.errors.StateError: Averages: ids must be an int64 tensor of shape (2,) with sorted, distinct ids from 0...
    """
    own: dict[str, Any] = {}
    for name, value in read_entries(state, owner).items():
        if name.startswith(prefix):
            own[name[len(prefix) :]] = value
    sizes: dict[str, int] = {}
    read: dict[str, Any] = {}
    for name, kind in table.items():  # a newer format explains everything else that is odd
        if name.endswith("format") and name in own:
            read[name] = kind._read(own[name], f"{owner}: {prefix}{name}", sizes)
    for odd, what in ((table.keys() - own.keys(), "has no"), (own.keys() - table.keys(), "has the unknown")):
        if odd:
            names = ", ".join(describe(prefix + name) for name in sorted(odd)[:10])
            raise StateError(f"{owner}: the saved state {what} {names}; {_DAMAGED}")
    for name, kind in table.items():
        if name not in read:
            read[name] = kind._read(own[name], f"{owner}: {prefix}{name}", sizes)
    return read


def read_entries(state: Any, owner: str) -> dict[str, Any]:
    """Return the entries of a dictionary as a plain one.

    Raises:
        StateError: If it is no dictionary, or has names that are no strings.
    """
    if not isinstance(state, dict):
        _refuse(f"{owner}: the saved state", "a dictionary", state)
    entries = dict(dict.items(state))  # an OrderedDict out of a file may have other methods
    for name in entries:
        if type(name) is not str:
            _refuse(f"{owner}: each name in the saved state", "a string", name)
    return entries


def _refuse(name: str, wanted: str, seen: Any, advice: str = _DAMAGED) -> NoReturn:
    if name.endswith("format"):
        advice = "use the clkit release that wrote it"
    raise StateError(f"{name} must be {wanted}, the saved state has {describe(seen)}; {advice}")


def describe(value: Any) -> str:
    """Return a few words about a value of unknown origin, whose whole content may be endless."""
    kind = type(value)
    if value is None or kind in (bool, float) or (kind is int and value.bit_length() < 128):
        return repr(value)
    if kind is str:
        return repr(value[:60]) + " and more" * (len(value) > 60)
    if not isinstance(value, Tensor):
        return f"a number of {value.bit_length()} bits" if kind is int else f"a {kind.__name__}"
    if not is_plain(value):
        return "a tensor that does not store each of its values"
    if value.numel() <= 8 and value.dtype in (torch.float64, torch.int64):
        return f"{_dtype_name(value.dtype)} {value.tolist()}"
    return f"{_dtype_name(value.dtype)} of shape {tuple(value.shape)}"


def _dtype_name(dtype: torch.dtype | None) -> str:
    name = str(dtype).removeprefix("torch.") + " " if dtype else ""
    return f"an {name}tensor" if name.startswith("int") else f"a {name}tensor"


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that stores each of its values, once, and about which nothing is odd."""
    if type(value) not in (Tensor, nn.Parameter) or vars(value) or value.layout is not torch.strided:
        return False
    if value.is_nested or value.is_quantized or value.is_meta or value.is_neg() or value.is_conj():
        return False
    stored = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
    row = math.prod(value.shape[1:]) * value.element_size()
    if value.numel() == 0:
        return bool(row <= _ROW_BYTES)
    for size, step in zip(value.shape, value.stride(), strict=True):
        if size > 1 and step == 0:
            return False
    return bool(value.numel() * value.element_size() <= stored)


@dataclass(frozen=True)
class Numbers(Kind):
    """A tensor that stores its values; it is detached when it is read.

    Attributes:
        shape: Sizes as numbers, as letters that mean one size everywhere in a table, or at last ``...`` for any.
        dtype: The dtype, ``FLOATS`` for any in floating point, ``None`` for any.
        least: Smallest value; by default ``-most``.
        most: Largest value.
        any_value: Whether values are not looked at.
        ids: Whether they are class ids, distinct and in ascending order.
        rule: What else the tensor is, in words, and the function that says whether it is.
    """

    shape: tuple[int | str | EllipsisType, ...] = ()
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = torch.int64
    least: float | None = None
    most: float = FINITE
    any_value: bool = False
    ids: bool = False
    rule: tuple[str, Callable[[Tensor], bool]] | None = None

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Tensor:
        if not is_plain(value) or self.dtype not in (None, value.dtype, FLOATS if value.dtype in FLOATS else None):
            _refuse(name, self._wanted(sizes), value)
        fits = len(self.shape) - (... in self.shape) <= value.ndim <= (99 if ... in self.shape else len(self.shape))
        for wanted, size in zip(self.shape, value.shape, strict=False):
            fits &= wanted is ... or size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        if not fits:
            _refuse(name, self._wanted(sizes), value)
        tensor: Tensor = value.detach()
        if tensor.numel() and not self.any_value:
            low, high = torch.aminmax(tensor)
            if not (
                float(low) >= (-self.most if self.least is None else self.least) and float(high) <= self.most
            ):  # NaN is in no bounds
                seen = f"its values go from {low.item()} to {high.item()}: {_DAMAGED}"
                _refuse(name, self._wanted(sizes), value, seen)
        if (self.ids and bool((tensor.diff() <= 0).any())) or (self.rule is not None and not self.rule[1](tensor)):
            _refuse(name, self._wanted(sizes), value)
        return tensor

    def _wanted(self, sizes: dict[str, int]) -> str:
        words = "a floating-point tensor" if isinstance(self.dtype, tuple) else _dtype_name(self.dtype)
        shape = ["..." if size is ... else str(sizes.get(str(size), size)) for size in self.shape]
        words += f" of shape ({', '.join(shape)}{',' * (len(shape) == 1)})"
        if self.least == self.most:
            words += f" equal to {self.least}"
        elif not self.any_value:
            words += " with sorted, distinct ids" if self.ids else " with finite values"
            words += f" up to {self.most} in magnitude" if self.least is None else f" from {self.least} to {self.most}"
        return words if self.rule is None else f"{words} that is {self.rule[0]}"


@dataclass(frozen=True)
class Whole(Kind):
    """An integer from ``least`` to ``most``, or ``None`` if it is ``optional``; ``True`` is none."""

    least: int = 0
    most: int = 2**63 - 1
    optional: bool = False

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> int | None:
        if value is None and self.optional:
            return None
        if type(value) is not int or not self.least <= value <= self.most:
            _refuse(name, f"an integer from {self.least} to {self.most}" + " or None" * self.optional, value)
        return value


@dataclass(frozen=True)
class OneOf(Kind):
    """One of some strings, numbers, truth values or ``None``, and what the reader of the error can do."""

    values: tuple[str | int | float | None, ...]
    advice: str = _DAMAGED

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Any:
        for allowed in self.values:
            if type(value) is type(allowed) and value == allowed:
                return value
        _refuse(name, " or ".join(map(describe, self.values)), value, self.advice)


@dataclass(frozen=True)
class Settings(Kind):
    """A dictionary of plain values, which must be those of the object that loads them.

    Attributes:
        values: The object's own.
        free: Names of those that may differ.
        advice: What the reader of the error can do.
    """

    values: Mapping[str, Any]
    free: tuple[str, ...] = ()
    advice: str = _DAMAGED

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        entries = read_entries(value, name)
        for key, own in self.values.items():
            if key in entries and key not in self.free and (type(entries[key]) is not type(own) or entries[key] != own):
                _refuse(f"{name}: {key}", describe(own), entries[key], self.advice)
        if entries.keys() != self.values.keys():
            odd = ", ".join(map(describe, sorted(entries.keys() ^ self.values.keys())[:10]))
            raise StateError(
                f"{name} must have the entries {', '.join(self.values)}, but differs in {odd}; {self.advice}"
            )
        return entries


@dataclass(frozen=True)
class Instance(Kind):
    """Any value of a type, or of one of several; ``True`` is no ``int``."""

    type: type | UnionType

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Any:
        kinds = self.type.__args__ if isinstance(self.type, UnionType) else (self.type,)
        if not isinstance(value, self.type) or (isinstance(value, bool) and not {bool, object} & set(kinds)):
            _refuse(name, " or ".join(kind.__name__ for kind in kinds), value)
        return value


@dataclass(frozen=True)
class Many(Kind):
    """A list whose elements are all of one kind."""

    kind: Kind

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> list[Any]:
        if type(value) is not list:
            _refuse(name, "a list", value)
        return [self.kind._read(each, f"{name}[{place}]", sizes) for place, each in enumerate(value)]


@dataclass(frozen=True)
class Nested(Kind):
    """A dictionary with a table of its own, or ``None`` if it is ``optional``."""

    table: Table
    optional: bool = False

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> dict[str, Any] | None:
        return None if value is None and self.optional else read_state(value, self.table, name)


def saved_entry(state: Any, name: str, kind: type | UnionType, owner: str) -> Any:
    """Return one entry of a saved state that has others too.

    Args:
        state: What should be a dictionary with the entry.
        name: The name of the entry.
        kind: Its type; ``True`` is no ``int``.
        owner: Whose state it is, for the message.

    Raises:
        StateError: If there is none, or it is of another type.

    Example:
        >>> saved_entry({"observed": 3}, "observed", int, "NMC(nmc)")
        3
    """
    entries = read_entries(state, owner)
    if name not in entries:
        raise StateError(f"{owner}: the saved state has no {name!r}; {_DAMAGED}")
    return Instance(kind)._read(entries[name], f"{owner}: {name!r}", {})


def saved_list(state: Any, name: str, kind: type, owner: str) -> list[Any]:
    """Return one entry of a saved state that is a list, each element of one type.

    Raises:
        StateError: If there is none, or it is of another type.
    """
    return Many(Instance(kind))._read(saved_entry(state, name, list, owner), f"{owner}: {name!r}", {})


def check_format(state: Any, known: int, owner: str) -> dict[str, Any]:
    """Return the entries of a state, which must be of a known format.

    Raises:
        StateError: Naming both.
    """
    entries = read_entries(state, owner)
    found = entries.get("format")
    if type(found) is not int or found != known:
        _refuse(f"{owner}: format", str(known), found)
    return entries


EXPORTED = "clkit_export"
"""Marks an exported file; the value is its format."""


MERGED = "clkit_merged"
"""Marks a checkpoint made of several, which no fit can go on from; the value lists their names."""


STREAM = "clkit_stream"
"""The key of a checkpoint under which a run keeps its place in the stream."""

STRATEGY = "clkit_strategy"
"""The entry of a whole checkpoint that holds what the strategy has learned."""
