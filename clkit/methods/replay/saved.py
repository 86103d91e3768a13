"""Reading the saved state of a replay memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clkit.errors import BatchError, StateError
from clkit.methods.replay.rows import EXPERIENCE_LIMIT, NUMBERS, RowCodec, RowTable, described, layout_of
from clkit.schema import Kind, Numbers, OneOf, read_entries, read_state

__all__ = ["FORMAT", "SavedMemory"]

FORMAT = 1
_MOST = 2**53  # rows seen
_OWNER = "ReservoirBuffer"
_SETTING = "build the memory with the saved settings"


class SavedMemory:
    """A saved state, checked as a whole without touching the object that loads it; no layout if no rows were added."""

    def __init__(self, state: dict[str, Any], prefix: str, policy: str, codec: RowCodec) -> None:
        names = [name.removeprefix(prefix) for name in read_entries(state, _OWNER) if name.startswith(prefix)]
        filled = "data" in names or "row" in names
        self.generator = torch.Generator()
        table = {**_settings(policy, codec, self.generator), **(_rows(names) if filled else {})}
        self._saved = saved = read_state(state, table, _OWNER, prefix)
        self._capacity = int(saved["capacity"])
        self.seen: list[int] = saved["seen"].tolist()
        self.class_seen = Counter(dict(zip(saved["classes"].tolist(), saved["class_seen"].tolist(), strict=True)))
        extras = {name.removeprefix("extras."): saved[name] for name in table if name.startswith("extras.")}
        self.layout = layout_of({"data": saved["row"], **extras}) if filled else None
        self._size = len(saved["data"]) if filled else 0
        for what in self._contradictions(policy, codec):
            raise StateError(f"{_OWNER}: {prefix}{what}; the file is damaged")

    def _contradictions(self, policy: str, codec: RowCodec) -> Iterator[str]:
        """Yield what in the entries cannot be true together; each is asked only where those before it are in order."""
        n_seen = sum(self.seen)
        if self.layout is not None:
            data, shape = self._saved["data"], self.layout["data"][0]
            try:
                stored = codec.stored_dtype(*self.layout["data"])
            except BatchError as error:
                yield f"row does not fit: {error}"
            if data.dtype != stored or tuple(data.shape[1:]) != shape:
                yield f"data of {data.dtype} has rows {tuple(data.shape[1:])}, row says {stored} and {shape}"
            label, arrival, origin = (self._saved[name].cpu() for name in ("label", "arrival", "origin"))
            if bool((origin >= len(self.seen)).any()):
                yield f"origin is not below {len(self.seen)}"
            if bool((arrival >= self._saved["seen"].cpu()[origin]).any()):
                yield "arrival has rows that arrived after the last row seen"
            if len(set(zip(origin.tolist(), arrival.tolist(), strict=True))) < self._size:
                yield "arrival has one row twice"
            if not Counter(label.tolist()) <= self.class_seen:
                yield "label has more rows of a class than were seen"
        most = min(self._capacity, n_seen)
        if self._size > most or (policy == "uniform" and self._size < most):
            yield f"data has {self._size} rows with capacity {self._capacity} and {n_seen} rows seen"
        if self.class_seen.total() != n_seen:
            yield f"seen is {n_seen} rows, but class_seen adds up to {self.class_seen.total()}"

    def table(self, capacity: int, device: torch.device) -> RowTable:
        """Return the rows in a table of the capacity with which the memory goes on, if it can."""
        if capacity < self._capacity:
            raise StateError(
                f"the saved memory has a capacity of {self._capacity} rows, this one of {capacity}; load it with "
                f"capacity={self._capacity} and call shrink({capacity})"
            )
        if capacity > self._capacity and self._size < sum(self.seen):
            raise StateError(
                f"the saved memory of {self._capacity} rows has dropped rows and cannot grow to {capacity}; "
                f"load it with capacity={self._capacity}"
            )
        assert self.layout is not None
        try:
            table = RowTable(self.layout, self._saved["data"].dtype, capacity, device)
        except (RuntimeError, MemoryError) as error:
            raise StateError(f"{_OWNER}: no room for {capacity} rows of {described(self.layout)}") from error
        for name, tensor in table.tensors.items():
            tensor[: self._size] = self._saved[name if name == "data" else f"extras.{name}"].to(device)
        for name in NUMBERS:
            table.numbers[name][: self._size] = self._saved[name].cpu().numpy()
        table.size = self._size
        return table


def _settings(policy: str, codec: RowCodec, generator: torch.Generator) -> dict[str, Kind]:
    """Return the kinds of the entries that every memory has; reading them sets the state of ``generator``."""
    own = codec.normalised()
    same = f"the mean and std {own.tolist()} of this memory", lambda saved: torch.equal(saved.cpu(), own)
    is_state = "the state of a generator", lambda state: _is_set(generator, state)
    return {
        "format": Numbers(least=FORMAT, most=FORMAT),
        "policy": OneOf((policy,), _SETTING),
        "storage": OneOf((codec.storage,), _SETTING),
        "normalised": Numbers(tuple(own.shape), torch.float64, rule=same),
        "seen": Numbers(("O",), least=0, most=_MOST, rule=("of one origin at least", lambda seen: len(seen) > 0)),
        "classes": Numbers(("C",), least=0, ids=True),
        "class_seen": Numbers(("C",), least=0, most=_MOST),
        "generator": Numbers((len(generator.get_state()),), torch.uint8, rule=is_state),
        "capacity": Numbers(least=0, most=_MOST),
    }


def _rows(names: list[str]) -> dict[str, Kind]:
    """Return the kinds of the entries that a memory with rows has; of the extras that are among the names."""
    limits = {"experience": EXPERIENCE_LIMIT, "origin": EXPERIENCE_LIMIT}
    reserved = {"extras.data", *(f"extras.{name}" for name in NUMBERS)}
    extras = [name for name in names if name.startswith("extras.") and name not in reserved]
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
