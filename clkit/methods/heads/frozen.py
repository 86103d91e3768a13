"""What a head said at one moment, kept while the head goes on learning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clkit.methods._state import exact
from clkit.methods.heads.readout import Readout
from clkit.schema import Kind, Numbers, read_entries, read_state

if TYPE_CHECKING:
    from clkit.methods.heads.base import Head

__all__ = ["LARGEST", "FrozenHead"]

LARGEST = 1e280  # of weights and the like, which may be as large as a solve makes them


class FrozenHead:
    """The read-out of a head at one moment; :meth:`Head.frozen` makes it.

    It scores features (B, D) as the head did, with the columns of the classes that the head had seen. The sums stay
    the head's own: a frozen head costs its weights, and what else it scores by, such as a Cholesky factor.
    """

    def __init__(self, head: Head, readout: Readout, parts: dict[str, Tensor]) -> None:
        self._head = copy.copy(head)  # for its options
        self._readout = readout
        self._parts = parts
        self._place()

    @property
    def classes(self) -> Tensor:
        """(k,) int64, ids of the classes that were seen, sorted."""
        return self._readout.classes

    def __call__(self, features: Tensor) -> Tensor:
        """Return scores (B, C), as :meth:`Head.forward` gives them."""
        self._place()
        return self._head._in_columns(self._head._score(features, self._readout), self._readout, features)

    @property
    def leverage(self) -> Callable[[Tensor], Tensor] | None:
        """How far features (B, D) were from what was learned, (B,); ``None`` where that was not asked for."""
        own = getattr(self._head, "_leverage_under", None)
        if own is None or "factor" not in self._parts:
            return None
        self._place()
        return partial(own, self._parts["factor"])

    def state_dict(self) -> dict[str, Any]:
        """Return its tensors."""
        own = self._readout
        saved = {"classes": own.classes, "weight": own.weight, "bias": own.bias}
        return {**saved, **({} if own.offset is None else {"offset": own.offset}), **self._parts}

    @classmethod
    def load(cls, head: Head, state: Any, owner: str) -> FrozenHead:
        """Return the frozen head of a saved state, with the options of ``head``.

        Raises:
            StateError: If the state does not fit.
        """
        wide = head.feature_map.out_features
        table: dict[str, Kind] = {
            "classes": Numbers(("k",), least=0, most=head.max_classes, ids=True),
            "weight": Numbers(("k", wide), torch.float64, most=LARGEST),
            "bias": Numbers(("k",), torch.float64, most=LARGEST),
        }
        given = read_entries(state, owner)
        if "offset" in given:
            table["offset"] = Numbers((wide,), torch.float64, most=LARGEST)
        side = wide + int(getattr(head, "bias", False))
        parts: dict[str, Kind] = {"factor": Numbers((side, side), torch.float64, most=LARGEST), **head._frozen_table}
        parts = {name: kind for name, kind in parts.items() if name in given}
        table |= parts
        saved = read_state(given, table, owner)
        with exact():
            readout = Readout.of(saved["classes"], saved["weight"], saved["bias"], saved.get("offset"))
        return cls(head, readout, {name: saved[name] for name in parts})

    def _place(self) -> None:
        """Follow the head to its device, and have it score by what was frozen."""
        device, own = self._head.statistics.device, self._readout
        if own.weight.device != device:
            tensors = {name: getattr(own, name) for name in ("classes", "weight", "bias", "offset", "duplicates")}
            moved: Any = {name: None if each is None else each.to(device) for name, each in tensors.items()}
            self._readout = replace(own, **moved)
            self._parts = {name: each.to(device) for name, each in self._parts.items()}
        if self._parts:
            self._head._freeze(self._parts)
