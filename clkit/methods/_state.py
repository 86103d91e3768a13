"""What every object with learned sums needs: tensors that neither casts nor DDP may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from clkit.schema import Table, read_state

__all__ = ["LOADED", "PlainState", "exact"]

LOADED = object()
"""Stands in a saved state under the bare prefix of a module whose parent has loaded its entries already."""


class PlainState(nn.Module):
    """A module whose tensors are plain attributes: they follow device moves and keep their dtype.

    Buffers would not do: ``DistributedDataParallel`` broadcasts them from rank 0 at each forward, which replaces a
    rank's running sums by another's, and ``.half()``, ``.to(dtype)`` or ``precision="bf16-true"`` cast them down.
    Subclasses move their tensors in :meth:`_move`, write them in ``_save_to_state_dict``, and say in
    :meth:`_saved_table` what a saved state must look like and in :meth:`_take` how they take one up.
    """

    _device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self._device

    def _move(self, device: torch.device) -> None:
        """Move all tensors to ``device``."""
        raise NotImplementedError

    def _saved_table(self) -> Table:
        """Return what a saved state must look like to fit this object."""
        raise NotImplementedError

    def _take(self, saved: dict[str, Any]) -> None:
        """Take up a copy of the entries of a saved state, which fits the table."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if state_dict.get(prefix) is LOADED:
            return
        saved = read_state(state_dict, self._saved_table(), type(self).__name__, prefix)
        with exact():
            self._take(saved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        # An integer probe goes where the module goes and is left alone by casts.
        target = fn(torch.empty(0, dtype=torch.int64, device=self._device)).device
        if target.type in ("mps", "meta"):  # no float64 there, no values here
            target = torch.device("cpu")
        if target != self._device:
            with exact():
                self._move(target)
            self._device = target
        return self


def exact() -> AbstractContextManager[None]:
    """Run a block so that its tensors can be kept: no graph, no inference tensors (which refuse later updates)."""
    return _outside_inference() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextmanager
def _outside_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
