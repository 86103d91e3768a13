"""Reading the saved state of a replay memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clkit.errors import BatchError, StateError
from clkit.methods.replay.rows import EXPERIENCE_LIMIT, NUMBERS, RowCodec, RowLayout, RowTable, host_tensor
from clkit.schema import Kind, Numbers, OneOf, read_entries, read_state

__all__ = ["FORMAT", "SavedMemory"]

FORMAT = 1
_MOST = 2**53  # rows seen
_OWNER = "ReservoirBuffer"
_SETTING = "build the memory with the saved settings"


class SavedMemory:
    """A saved state, checked as a whole without touching the object that loads it.

    Attributes:
        layout: Shape and dtype of a row, ``None`` if no rows were added.
        size: Rows in memory.
        seen: Rows seen by origin.
        class_seen: Rows seen by class.
        generator: The generator of the memory.
    """

    def __init__(self, state: dict[str, Any], prefix: str, policy: str, codec: RowCodec) -> None:
        names = [name.removeprefix(prefix) for name in read_entries(state, _OWNER) if name.startswith(prefix)]
        filled = "data" in names or "row" in names
        self.generator = torch.Generator()
        table = {**_settings(policy, codec, self.generator), **(_rows(names) if filled else {})}
        self._saved = read_state(state, table, _OWNER, prefix)
        self._capacity = int(self._saved["capacity"])
        self.seen: list[int] = self._saved["seen"].tolist()
        ids, counts = (self._saved[name].tolist() for name in ("classes", "class_seen"))
        self.class_seen = Counter(dict(zip(ids, counts, strict=True)))
        extras = {name.removeprefix("extras."): self._saved[name] for name in table if name.startswith("extras.")}
        self.layout = RowLayout(self._saved["row"], extras) if filled else None
        self.size = len(self._saved["data"]) if filled else 0
        for what in self._contradictions(policy, codec):
            raise StateError(f"{_OWNER}: {prefix}{what}; the file is damaged")

    def _contradictions(self, policy: str, codec: RowCodec) -> Iterator[str]:
        """Yield what in the entries cannot be true together; each is asked only where those before it are in order."""
        n_seen = sum(self.seen)
        if self.layout is not None:
            data, shape = self._saved["data"], self.layout.shapes["data"]
            try:
                stored = codec.stored_dtype(self.layout)
            except BatchError as error:
                yield f"row does not fit: {error}"
            if data.dtype != stored or tuple(data.shape[1:]) != shape:
                yield f"data of {data.dtype} has rows {tuple(data.shape[1:])}, row says {stored} and {shape}"
            label, arrival, origin = (self._saved[name].cpu() for name in ("label", "arrival", "origin"))
            if bool((origin >= len(self.seen)).any()):
                yield f"origin is not below {len(self.seen)}"
            if bool((arrival >= host_tensor(self.seen)[origin]).any()):
                yield "arrival has rows that arrived after the last row seen"
            if len(set(zip(origin.tolist(), arrival.tolist(), strict=True))) < self.size:
                yield "arrival has one row twice"
            if any(count > self.class_seen[c] for c, count in Counter(label.tolist()).items()):
                yield "label has more rows of a class than were seen"
        most = min(self._capacity, n_seen)
        if self.size > most or (policy == "uniform" and self.size < most):
            yield f"data has {self.size} rows with capacity {self._capacity} and {n_seen} rows seen"
        if self.class_seen.total() != n_seen:
            yield f"seen is {n_seen} rows, but class_seen adds up to {self.class_seen.total()}"

    def table(self, capacity: int, device: torch.device) -> RowTable:
        """Return the rows in a table of the capacity with which the memory goes on.

        Raises:
            StateError: If the memory cannot go on with that capacity, or such a table finds no room.
        """
        if capacity < self._capacity:
            raise StateError(
                f"the saved memory has a capacity of {self._capacity} rows, this one of {capacity}; load it with "
                f"capacity={self._capacity} and call shrink({capacity})"
            )
        if capacity > self._capacity and self.size < sum(self.seen):
            raise StateError(
                f"the saved memory of {self._capacity} rows has dropped rows and cannot grow to {capacity}; "
                f"load it with capacity={self._capacity}"
            )
        assert self.layout is not None
        try:
            table = RowTable(self.layout, self._saved["data"].dtype, capacity, device)
        except (RuntimeError, MemoryError) as error:
            raise StateError(f"{_OWNER}: no room for {capacity} rows of {self.layout}") from error
        for name, tensor in table.tensors.items():
            tensor[: self.size] = self._saved[name if name == "data" else f"extras.{name}"].to(device)
        for name in NUMBERS:
            table.numbers[name][: self.size] = self._saved[name].cpu().numpy()
        table.size = self.size
        return table


def _settings(policy: str, codec: RowCodec, generator: torch.Generator) -> dict[str, Kind]:
    """Return the kinds of the entries that every memory has; reading them sets the state of ``generator``."""
    normalised = codec.normalised()
    same = (
        f"the mean and std {normalised.tolist()} of this memory",
        lambda saved: torch.equal(saved.cpu(), normalised),
    )
    size = len(generator.get_state())
    return {
        "format": Numbers(least=FORMAT, most=FORMAT),
        "policy": OneOf((policy,), _SETTING),
        "storage": OneOf((codec.storage,), _SETTING),
        "normalised": Numbers(tuple(normalised.shape), torch.float64, rule=same),
        "seen": Numbers(("O",), least=0, most=_MOST, rule=("of one origin at least", lambda seen: len(seen) > 0)),
        "classes": Numbers(("C",), least=0, ids=True),
        "class_seen": Numbers(("C",), least=0, most=_MOST),
        "generator": Numbers(
            (size,), torch.uint8, rule=("the state of a generator", lambda state: _is_set(generator, state))
        ),
        "capacity": Numbers(least=0, most=_MOST),
    }


def _rows(names: list[str]) -> dict[str, Kind]:
    """Return the kinds of the entries that a memory with rows has; of the extras that are among the names."""
    limits = {"experience": EXPERIENCE_LIMIT, "origin": EXPERIENCE_LIMIT}
    reserved = {"data", *NUMBERS}
    extras = [name for name in names if name.startswith("extras.") and name.removeprefix("extras.") not in reserved]
    return {
        "data": Numbers(("N", ...), None, any_value=True),
        "row": Numbers((0, ...), None, any_value=True),
        **{name: Numbers(("N",), least=0, most=limits.get(name, _MOST)) for name in NUMBERS},
        **{name: Numbers(("N", ...), None, any_value=True) for name in extras},
    }


def _is_set(generator: torch.Generator, state: Tensor) -> bool:
    try:
        generator.set_state(state.cpu().contiguous())
    except RuntimeError:
        return False
    return True
