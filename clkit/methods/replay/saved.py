"""Reading the saved state of a replay memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from clkit.errors import BatchError, StateError
from clkit.methods.replay.rows import EXPERIENCE_LIMIT, NUMBERS, RowCodec, RowLayout, RowTable, host_tensor
from clkit.schema import check_keys, check_saved, check_saved_ids

__all__ = ["FORMAT", "SavedMemory"]

FORMAT = 1


class SavedMemory:
    """A saved state, taken apart and checked entry by entry without touching the object that loads it."""

    def __init__(self, state: Mapping[str, Any], prefix: str) -> None:
        settings = [
            "format",
            "policy",
            "storage",
            "normalised",
            "seen",
            "classes",
            "class_seen",
            "generator",
            "capacity",
        ]
        check_keys(state, prefix, [*settings, *NUMBERS, "row", "data"], ["extras"])
        self.prefix = prefix
        self.state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        filled = "data" in self.state
        missing = [prefix + name for name in settings + filled * [*NUMBERS, "row"] if name not in self.state]
        if missing:
            raise StateError(f"the saved state has no {missing}: it is no whole state of a ReservoirBuffer")
        version = self._integer("format")
        if version != FORMAT:
            raise StateError(f"{prefix}format is {version} in the saved state, {FORMAT} here")
        self.capacity = self._integer("capacity")
        self.seen = self._integers("seen").tolist()
        self.class_seen = self._class_seen()
        self.generator = self._generator()
        self.layout = self._layout() if filled else None
        self.size = len(self.state["data"]) if filled else 0

    def stored_dtype(self, layout: RowLayout, codec: RowCodec) -> torch.dtype:
        """The dtype of the stored data."""
        try:
            return codec.stored_dtype(layout)
        except BatchError as error:
            raise StateError(f"{self.prefix}row does not fit: {error}") from error

    def check_settings(self, policy: str, storage: str, codec: RowCodec) -> None:
        """Refuse another kind of memory."""
        normalised = codec.normalised()
        for name, own in (("policy", policy), ("storage", storage)):
            if not isinstance(self.state[name], str) or self.state[name] != own:
                raise StateError(f"{self.prefix}{name} is {self.state[name]!r} in the saved state, {own!r} here")
        saved = self._tensor("normalised", tuple(normalised.shape), torch.float64)
        if not torch.equal(saved.cpu(), normalised):
            raise StateError(
                f"{self.prefix}normalised (mean and std) is {saved.tolist()} in the saved state, "
                f"{normalised.tolist()} here"
            )

    def check_capacity(self, own: int) -> None:
        """Refuse a memory that cannot be continued with the capacity ``own``."""
        if own < self.capacity:
            raise StateError(
                f"the saved memory has a capacity of {self.capacity} rows, this one of {own}; load it with "
                f"capacity={self.capacity} and call shrink({own})"
            )
        if own > self.capacity and self.size < sum(self.seen):
            raise StateError(
                f"the saved memory of {self.capacity} rows has dropped rows and cannot grow to {own}; "
                f"load it with capacity={self.capacity}"
            )

    def check_numbers(self, policy: str) -> None:
        """Refuse numbers that contradict each other."""
        n_seen = sum(self.seen)
        most = min(self.capacity, n_seen)
        if self.size > most or (policy == "uniform" and self.size < most):
            self._damaged(f"{self.size} rows with capacity {self.capacity} and {n_seen} rows seen")
        if sum(self.class_seen.values()) != n_seen:
            self._damaged(f"class_seen adds up to {sum(self.class_seen.values())} rows of {n_seen}")
        if self.layout is None:
            return
        numbers = {name: self._integers(name, self.size) for name in NUMBERS}
        limit = EXPERIENCE_LIMIT
        if bool((numbers["experience"] > limit).any()) or bool((numbers["origin"] >= len(self.seen)).any()):
            self._damaged(f"experience above {limit}, or origin not below {len(self.seen)}")
        if bool((numbers["arrival"] >= host_tensor(self.seen)[numbers["origin"]]).any()):
            self._damaged("rows that arrived after the last row seen")
        if len(set(zip(numbers["origin"].tolist(), numbers["arrival"].tolist(), strict=True))) < self.size:
            self._damaged("one row twice")
        if any(count > self.class_seen[c] for c, count in Counter(numbers["label"].tolist()).items()):
            self._damaged("more rows of a class than were seen")

    def table(self, layout: RowLayout, capacity: int, stored: torch.dtype, device: torch.device) -> RowTable:
        """The rows, in a table of that capacity."""
        table = RowTable(layout, stored, capacity, device)
        dtypes = {**layout.dtypes, "data": stored}
        for name, shape in layout.shapes.items():
            key = name if name == "data" else f"extras.{name}"
            saved = self._tensor(key, (self.size, *shape), dtypes[name], finite=False)
            table.tensors[name][: self.size] = saved.to(device)
        for name in NUMBERS:
            table.numbers[name][: self.size] = self._integers(name, self.size).numpy()
        table.size = self.size
        return table

    def _layout(self) -> RowLayout:
        names = [key.removeprefix("extras.") for key in self.state if key.startswith("extras.")]
        tensors = {"row": self.state["row"], "data": self.state["data"]}
        tensors |= {name: self.state[f"extras.{name}"] for name in names}
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or value.is_nested or value.ndim < 1:
                self._damaged(f"{name}, which is no tensor with rows")
        return RowLayout(tensors["row"], {name: tensors[name] for name in names})

    def _class_seen(self) -> Counter[int]:
        ids = check_saved_ids(self.prefix + "classes", self.state["classes"])
        counts = self._integers("class_seen", ids.size)
        return Counter(dict(zip(ids.tolist(), counts.tolist(), strict=True)))

    def _generator(self) -> torch.Generator:
        generator = torch.Generator()
        state = self._tensor("generator", tuple(generator.get_state().shape), torch.uint8)
        try:
            generator.set_state(state.cpu())
        except RuntimeError as error:
            raise StateError(f"{self.prefix}generator is no state of a generator: {error}") from error
        return generator

    def _integer(self, name: str) -> int:
        return int(self._tensor(name, (), torch.int64))

    def _integers(self, name: str, size: int | None = None) -> Tensor:
        """(size,) int64 numbers from 0, on the host."""
        value = self.state[name]
        if size is None:
            size = value.numel() if isinstance(value, Tensor) and not value.is_nested else 0
        numbers = self._tensor(name, (size,), torch.int64).cpu()
        if bool((numbers < 0).any()):
            self._damaged(f"negative numbers in {name}")
        return numbers

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
        return check_saved(self.prefix + name, self.state[name], shape, dtype, finite=finite)

    def _damaged(self, what: str) -> NoReturn:
        raise StateError(f"the saved memory {self.prefix.rstrip('.')} has {what}: the file is damaged")
