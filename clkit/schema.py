"""What a saved state must look like, said as a table of kinds and checked before anything is changed by it.

States come out of files of unknown origin: nothing of a value is used, not even for an error message, before it is
known to be of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import EllipsisType, UnionType
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from clkit.errors import StateError

__all__ = [
    "EXPORTED",
    "FLOATS",
    "LEARNED",
    "MERGED",
    "STRATEGY",
    "STREAM",
    "Instance",
    "Kind",
    "Many",
    "Named",
    "Nested",
    "Numbers",
    "OneOf",
    "Real",
    "Row",
    "Settings",
    "Table",
    "Whole",
    "check_format",
    "describe",
    "is_same",
    "read_entries",
    "read_own",
    "read_state",
    "saved_entry",
]

EXPORTED = "clkit_export"  # marks an exported file; the value is its format
LEARNED = "clkit_learned"  # marks a file that says what its head holds, of images that were learned without a run
MERGED = "clkit_merged"  # marks a checkpoint made of several, which no fit can go on from; the value lists their names
STREAM = "clkit_stream"  # the key of a checkpoint under which a run keeps its place in the stream
STRATEGY = "clkit_strategy"  # the entry of a whole checkpoint that holds what the strategy has learned

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ORDERED = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
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
    """Return the entries of a saved state, which must be exactly those of a table, without their prefix.

    Args:
        state: What should be a dictionary.
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
    entries = read_entries(state, owner)
    own = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    sizes: dict[str, int] = {}
    read: dict[str, Any] = {}
    for name, kind in table.items():  # a newer format, or other settings, explain everything else that is odd
        if (name.endswith("format") or isinstance(kind, Settings)) and name in own:
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
    """Return the entries of what should be a dictionary whose names are strings, as a plain one."""
    if not isinstance(state, dict):
        _refuse(f"{owner}: the saved state", "a dictionary", describe(state))
    entries = dict(dict.items(state))  # an OrderedDict out of a file may have other methods
    for name in entries:
        if type(name) is not str:
            _refuse(f"{owner}: each name in the saved state", "a string", describe(name))
    return entries


def _refuse(name: str, wanted: str, seen: str, advice: str = _DAMAGED) -> NoReturn:
    if name.endswith("format"):
        advice = "use the clkit release that wrote it"
    raise StateError(f"{name} must be {wanted}, the saved state has {seen}; {advice}")


def describe(value: Any) -> str:
    """Return a few words about a value of unknown origin, whose whole content may be endless."""
    kind = type(value)
    if value is None or kind in (bool, float) or (kind is int and value.bit_length() < 128):
        return repr(value)
    if kind is str:
        return repr(value[:60]) + " and more" * (len(value) > 60)
    return f"a number of {value.bit_length()} bits" if kind is int else f"a {kind.__name__}"


def is_same(value: Any, own: Any) -> bool:
    """Return whether a value of unknown origin is a plain one of one's own, to the types within.

    Example:
        >>> is_same([1, "a"], [1, "a"]), is_same(True, 1), is_same(torch.zeros(2), None)
        (True, False, False)
    """
    pairs = [(value, own)]
    while pairs:
        one, other = pairs.pop()
        if type(one) is not type(other):
            return False
        if isinstance(other, list | tuple):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(one[key], other[key]) for key in other]
        elif one != other:
            return False
    return True


@dataclass(frozen=True)
class Numbers(Kind):
    """A tensor that stores each of its values; it is detached when it is read.

    Attributes:
        shape: Sizes as numbers, as letters that mean one size everywhere in a table, or at last ``...`` for any.
        dtype: The dtype, ``FLOATS`` for any in floating point, ``None`` for any.
        least: Smallest value; by default ``-most``.
        most: Largest value.
        any_value: Whether values are not looked at.
        ids: Whether they are class ids, distinct and in ascending order.
        rule: What else the tensor is, in words, and the function that says whether it is.
        optional: Whether ``None`` will do.
    """

    shape: tuple[int | str | EllipsisType, ...] = ()
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = torch.int64
    least: float | None = None
    most: float = FINITE
    any_value: bool = False
    ids: bool = False
    rule: tuple[str, Callable[[Tensor], bool]] | None = None
    optional: bool = False

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Tensor | None:
        if value is None and self.optional:
            return None
        if type(value) not in (Tensor, nn.Parameter):
            _refuse(name, self._wanted(sizes), describe(value))
        plain = not vars(value) and value.layout is torch.strided and not (value.is_nested or value.is_quantized)
        plain = plain and not (value.is_meta or value.is_neg() or value.is_conj())
        if plain and value.numel():
            stored = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
            plain = value.numel() * value.element_size() <= stored
            plain &= not any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True))
        elif plain:
            plain = math.prod(value.shape[1:]) * value.element_size() <= _ROW_BYTES
        if not plain:
            _refuse(name, self._wanted(sizes), "a tensor that does not store each of its values")

        fits = self.dtype in (None, value.dtype) or (self.dtype == FLOATS and value.dtype in FLOATS)
        fits &= self.any_value or value.dtype in _ORDERED
        fits &= len(self.shape) == value.ndim or (... in self.shape and len(self.shape) - 1 <= value.ndim)
        for wanted, size in zip(self.shape, value.shape if fits else (), strict=False):
            fits &= wanted is ... or size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        tensor: Tensor = value.detach()
        if fits and tensor.numel() and not self.any_value:
            low, high = (each.item() for each in torch.aminmax(tensor))
            # NaN is in no bounds
            if not ((-self.most if self.least is None else self.least) <= low and high <= self.most):
                seen = f"its values go from {low} to {high}: {_DAMAGED}"
                _refuse(name, self._wanted(sizes), _tensor_in_words(tensor), seen)
        fits = fits and not (self.ids and bool((tensor.diff() <= 0).any()))
        if not fits or (self.rule is not None and not self.rule[1](tensor)):
            _refuse(name, self._wanted(sizes), _tensor_in_words(tensor))
        return tensor

    def _wanted(self, sizes: dict[str, int]) -> str:
        words = "a floating-point tensor" if isinstance(self.dtype, tuple) else _dtype_in_words(self.dtype)
        shape = ["..." if size is ... else str(sizes.get(str(size), size)) for size in self.shape]
        words += f" of shape ({', '.join(shape)}{',' * (len(shape) == 1)})"
        if self.least == self.most:
            words += f" equal to {self.least}"
        elif not self.any_value:
            words += " with sorted, distinct ids" if self.ids else " with finite values"
            words += f" up to {self.most} in magnitude" if self.least is None else f" from {self.least} to {self.most}"
        return words if self.rule is None else f"{words} that is {self.rule[0]}"


def _dtype_in_words(dtype: torch.dtype | None) -> str:
    name = str(dtype).removeprefix("torch.") + " " if dtype else ""
    return f"an {name}tensor" if name.startswith("int") else f"a {name}tensor"


def _tensor_in_words(tensor: Tensor) -> str:
    few = tensor.numel() <= 8 and tensor.dtype in (torch.float64, torch.int64)
    return _dtype_in_words(tensor.dtype) + (f" {tensor.tolist()}" if few else f" of shape {tuple(tensor.shape)}")


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
            wanted = f"an integer from {self.least} to {self.most}" + " or None" * self.optional
            _refuse(name, wanted, describe(value))
        return value


@dataclass(frozen=True)
class Real(Kind):
    """A finite number from ``least`` to ``most``, read as a float, or ``None`` if it is ``optional``."""

    least: float = -FINITE
    most: float = FINITE
    optional: bool = False

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> float | None:
        if value is None and self.optional:
            return None
        if type(value) not in (int, float) or not self.least <= value <= self.most:  # NaN is in no bounds
            wanted = f"a finite number from {self.least} to {self.most}" + " or None" * self.optional
            _refuse(name, wanted, describe(value))
        return float(value)


@dataclass(frozen=True)
class OneOf(Kind):
    """One of some strings, numbers, truth values or ``None``, and what the reader of the error can do."""

    values: tuple[str | int | float | None, ...]
    advice: str = _DAMAGED

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Any:
        for allowed in self.values:
            if type(value) is type(allowed) and value == allowed:
                return value
        _refuse(name, " or ".join(map(describe, self.values)), describe(value), self.advice)


@dataclass(frozen=True)
class Settings(Kind):
    """A dictionary of plain ``values``, which must be the loading object's own, but for those that are ``free``.

    Files of older releases may lack those that were ``added``; it says what they stand for.
    """

    values: Mapping[str, Any]
    free: tuple[str, ...] = ()
    advice: str = _DAMAGED
    added: Mapping[str, Any] = field(default_factory=dict)

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        added = {key: own for key, own in self.added.items() if key in self.values}
        entries = {**added, **read_entries(value, name)}
        fixed = {key: own for key, own in self.values.items() if key not in self.free}
        seen = {key: entries.get(key, own) for key, own in fixed.items()}
        if not is_same(seen, fixed):
            key = next(key for key in fixed if not is_same(seen[key], fixed[key]))
            _refuse(f"{name}: {key}", describe(fixed[key]), describe(seen[key]), self.advice)
        if odd := entries.keys() ^ self.values.keys():
            differs = ", ".join(map(describe, sorted(odd)[:10]))
            wanted = ", ".join(self.values)
            raise StateError(f"{name} must have the entries {wanted}, but differs in {differs}; {self.advice}")
        return entries


@dataclass(frozen=True)
class Instance(Kind):
    """Any value of a type, or of one of several; ``True`` is no ``int``."""

    type: type | UnionType

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> Any:
        kinds = get_args(self.type) or (self.type,)
        if not isinstance(value, self.type) or (isinstance(value, bool) and not {bool, object} & set(kinds)):
            _refuse(name, " or ".join(kind.__name__ for kind in kinds), describe(value))
        return value


@dataclass(frozen=True)
class Many(Kind):
    """A list whose elements are all of one kind."""

    kind: Kind

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> list[Any]:
        if type(value) is not list:
            _refuse(name, "a list", describe(value))
        return [self.kind._read(each, f"{name}[{place}]", sizes) for place, each in enumerate(value)]


@dataclass(frozen=True)
class Row(Kind):
    """A list with the entries of a table, in its order and without their names."""

    table: Table

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> list[Any]:
        if type(value) is not list or len(value) != len(self.table):
            seen = f"a list of {len(value)}" if type(value) is list else describe(value)
            _refuse(name, f"a list of {len(self.table)}, {', '.join(self.table)}", seen)
        return list(read_state(dict(zip(self.table, value, strict=True)), self.table, name).values())


@dataclass(frozen=True)
class Nested(Kind):
    """A dictionary with a table of its own."""

    table: Table

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        return read_state(value, self.table, name)


@dataclass(frozen=True)
class Named(Kind):
    """A dictionary of any names with values of one kind."""

    kind: Kind
    optional: bool = False

    def _read(self, value: Any, name: str, sizes: dict[str, int]) -> dict[str, Any] | None:
        if value is None and self.optional:
            return None
        return read_state(value, dict.fromkeys(read_entries(value, name), self.kind), name)


def read_own(state: Any, table: Table, owner: str) -> dict[str, Any]:
    """Return the entries of a saved state that a table names, checked as by :func:`read_state`; it may have others."""
    own = {name: value for name, value in read_entries(state, owner).items() if name in table}
    return read_state(own, table, owner)


def saved_entry(state: Any, name: str, kind: type | UnionType | Kind, owner: str) -> Any:
    """Return one entry, of a type or a kind, of a saved state that has others too; else raise a StateError.

    Example:
        >>> saved_entry({"batches": 3}, "batches", int, "NMC(nmc)")
        3
    """
    entries = read_entries(state, owner)
    if name not in entries:
        raise StateError(f"{owner}: the saved state has no {name!r}; {_DAMAGED}")
    kind = kind if isinstance(kind, Kind) else Instance(kind)
    return kind._read(entries[name], f"{owner}: {name!r}", {})


def check_format(state: Any, known: int, owner: str) -> dict[str, Any]:
    """Return the entries of a state, which must be of a known format; else raise a StateError."""
    entries = read_entries(state, owner)
    OneOf((known,))._read(entries.get("format"), f"{owner}: format", {})
    return entries
