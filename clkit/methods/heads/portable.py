"""How a head travels and comes together again: as bytes, as a state in a file, and merged as a tree."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import nn

from clkit.errors import ArgumentError, StateError
from clkit.files import read_bytes
from clkit.schema import Instance, Numbers, Table, Whole, check_format, describe, read_entries, read_state

__all__ = ["FORMAT", "FREE_OPTIONS", "MergeTree", "PortableHead", "check_alike", "head_of_state", "kinds_of"]

FORMAT = 1
FREE_OPTIONS = ("num_classes", "max_classes")  # may differ between heads that learn the same
_SENT: Table = {"format": Whole(1, 1), "head": Instance(dict)}

Kind = TypeVar("Kind", bound="PortableHead")


class PortableHead(nn.Module):
    """What lets a head go from one process to another, whatever carries it."""

    def to_bytes(self) -> bytes:
        """Return all that was learned, with the options: tensors and plain values, in torch's own file format.

        For any engine that moves bytes (a queue, an object store, a table). What the head learns later is not in them.

        Raises:
            BatchError: If a batch was left out because it was not finite (see :meth:`Head.update`).

        Example:
            >>> from clkit.methods import NearestMeanHead
            >>> head = NearestMeanHead(2)
            >>> head.update(torch.eye(2), torch.tensor([3, 5]))
            >>> NearestMeanHead.from_bytes(head.to_bytes()).counts
            tensor([1, 1])
        """
        buffer = io.BytesIO()
        torch.save({"format": 1, "head": dict(self.state_dict())}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the head of :meth:`to_bytes`, on the CPU. Nothing in the bytes is executed.

        Args:
            data: Bytes of a head of this class, or of one that derives from it; :class:`Head` takes any.

        Raises:
            StateError: If they are damaged, cut off, of a newer format or of a head of another kind.
        """
        saved = read_state(read_bytes(data, f"the bytes of a {cls.__name__}"), _SENT, f"the bytes of a {cls.__name__}")
        return head_of_state(saved["head"], "the head in the bytes", kinds_of(cls))

    @classmethod
    def merge_all(cls, heads: Iterable[Self]) -> Self:
        """Return a new head that has learned what all given ones have, as if their batches had come to one.

        Heads are added in pairs, pairs of pairs and so on, as they come: of n, at most log2(n) + 2 are held at a time
        where the iterable makes them one by one, and the rounding of float64 grows with log2(n), so that their order
        changes no more than the last digits.

        Args:
            heads: Any number of at least one; none of them is modified.

        Raises:
            ArgumentError: If there is none, or one is of another kind or differs in an option from the first; the
                message gives its number, from 0.
            ConfigurationError: If one reads statistics that it shares with others.

        Example:
            >>> from clkit.methods import NearestMeanHead
            >>> parts = [NearestMeanHead(2) for _ in range(3)]
            >>> for label, part in enumerate(parts):
            ...     part.update(torch.eye(2), torch.full((2,), label))
            >>> NearestMeanHead.merge_all(parts).counts
            tensor([2, 2, 2])

        Source: N. J. Higham, "The accuracy of floating point summation", SIAM J. Sci. Comput. 14, 1993 (pairwise).
        """
        tree = MergeTree()
        for number, head in enumerate(heads):
            if not isinstance(head, cls):
                raise ArgumentError(f"head {number} is a {type(head).__name__}, not a {cls.__name__}")
            try:
                tree.add(head)
            except ArgumentError as error:
                raise ArgumentError(f"head {number}: {error}") from error
        total: Self = tree.total()
        return total


class MergeTree:
    """Heads that come one by one, merged in pairs of equal weight; about log2 of their number are held."""

    def __init__(self) -> None:
        self._first: Any = None
        self._levels: list[tuple[Any, bool] | None] = []  # at level k the sum of 2**k heads; whether it may be changed

    def add(self, head: Any, *, owned: bool = False) -> None:
        """Add a head, which must be like the first; one that is ``owned`` may be used up.

        Raises:
            ArgumentError: If it is not like the first; nothing is changed.
            ConfigurationError: If its statistics are shared.
        """
        head._check_allowed("merge")
        if self._first is None:
            self._first = head
        check_alike(self._first, head)
        added = (head, owned)
        for level, left in enumerate(self._levels):
            if left is None:
                self._levels[level] = added
                return
            added, self._levels[level] = _joined(left, added), None
        self._levels.append(added)

    def total(self) -> Any:
        """Return the sum of all heads, which is nobody else's; to be asked once.

        Raises:
            ArgumentError: If there was no head.
        """
        rest = [each for each in self._levels if each is not None]  # the latest first
        if not rest:
            raise ArgumentError("there is no head to merge; give one at least")
        total = rest[0]
        for left in rest[1:]:
            total = _joined(left, total)
        return total[0] if total[1] else copy.deepcopy(total[0])


def _joined(left: tuple[Any, bool], right: tuple[Any, bool]) -> tuple[Any, bool]:
    whole = left[0] if left[1] else copy.deepcopy(left[0])
    whole.merge(right[0])
    return whole, True


def check_alike(head: Any, other: Any) -> None:
    """Refuse to merge heads that do not learn the same.

    Raises:
        ArgumentError: If the other is of another kind or differs in an option.
    """
    if type(other) is not type(head):
        raise ArgumentError(f"a {type(head).__name__} cannot merge a {type(other).__name__}")
    for (name, mine), theirs in zip(head.options.items(), other.options.values(), strict=True):
        if mine != theirs and name not in FREE_OPTIONS:
            raise ArgumentError(f"cannot merge heads with different {name}: {mine!r} here, {theirs!r} there")


def kinds_of(base: type[Kind]) -> dict[str, type[Kind]]:
    """Return a class of heads and all that derive from it, by name; of two with one name that of clkit."""
    importlib.import_module("clkit.methods")  # where clkit's own are defined
    found: dict[str, type[Kind]] = {}
    waiting = [base]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__name__ not in found or kind is base or kind.__module__.startswith("clkit."):
            found[kind.__name__] = kind
    return found


def head_of_state(state: Any, what: str, kinds: Mapping[str, type[Kind]]) -> Kind:
    """Return a head made of what its ``state_dict`` gave; ``what`` says whose it is, for the message of an error.

    Raises:
        StateError: If it is of no known kind, of another format, or damaged.
    """
    entries = read_entries(state, what)
    options = check_format(entries.get("_extra_state"), FORMAT, f"{what}: _extra_state")
    name = options.get("head")
    if type(name) is not str or name not in kinds:
        raise StateError(f"{what} is a {describe(name)}, this clkit knows {sorted(kinds)}")
    del options["format"], options["head"]
    try:
        # before a head is made that has room for them, make sure that matrices as large as its options say are there
        width, lift = options.get("in_features"), options.get("expansion_dim")
        if type(width) is int and type(lift) in (int, type(None)):  # else the head says it better
            sizes = {} if lift is None else _matrices_of_a_lift(name, width, lift, options)
            if options.get("solver") == "recursive":
                side = (lift or width) + (options.get("bias") is True)
                sizes["recursion.inverse"] = (side, side)
            for matrix, shape in sizes.items():
                Numbers(shape, torch.float64, any_value=True)._read(entries.get(matrix), matrix, {})
        make: Any = kinds[name]
        head: Kind = make(**options)
        head.load_state_dict(entries)
    except StateError as error:
        raise StateError(f"{what}: {error}") from error
    except (TypeError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
        reason = describe(str(error))
        raise StateError(f"{what}: no {name} can be made with the saved options: {reason}") from error
    return head


def _matrices_of_a_lift(name: str, width: int, lift: int, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of entries that must be there before a head of such a width may be made."""
    if name == "KLDA":
        several = options.get("bandwidth")
        number = f"_{len(several)}" if type(several) is list and len(several) > 1 else ""
        return {"feature_map.checksum": (width,), f"statistics{number}.scatter": (lift, lift)}
    if name == "AnaCP":
        number = describe(options.get("maps"))
        return {f"map_{number}.checksum": (width,), f"lifted_{number}.gram": (lift, lift)}
    return {"feature_map.projection": (lift, width)}
