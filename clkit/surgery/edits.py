"""Edits of the user's layers: the mark that others see, and how a network or its copy gets its own weights back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clkit.methods._edit_log import EditLog
from clkit.surgery.change import Change

__all__ = ["Edits"]


class Edits(Change):
    """The mark of edited layers, and their log, which holds the original weights.

    Args:
        owner: Who edits, for messages.
        log: Of the edits, as :attr:`clkit.methods.GradientEditor.edit_log` gives it.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> edits = Edits("MEND", EditLog())
        >>> edits.apply(network, {"0": "0"})
        >>> edits.applied
        True
    """

    noun = "edit"
    remedy = "take its edits back first (revert_all), or edit other layers"

    def __init__(self, owner: str, log: EditLog) -> None:
        super().__init__(owner)
        self._log = log
        self._paths: dict[str, str] = {}

    def apply(self, module: nn.Module, paths: Mapping[str, str]) -> None:
        """Mark layers that are edited, or raise a ConfigurationError where another change holds one.

        Args:
            module: The user's module.
            paths: Dotted paths in it, by the names of the layers in the log.
        """
        layers = [self.claim(module, path) for path in paths.values()]
        for layer in layers:
            self.mark(layer)
        self._paths = dict(paths)

    restore = apply

    def release(self, module: nn.Module) -> None:
        """Take the marks off, and leave the edits."""
        for path in self._paths.values():
            self.unmark(module.get_submodule(path))
        self._paths = {}

    def undo(self, module: nn.Module) -> None:
        """Take all edits back that were not committed, and the marks off.

        Raises:
            EditConflictError: If something else changed a weight since; nothing is changed then.
        """
        if not self.applied:
            return
        weights = {name: module.get_parameter(f"{path}.weight") for name, path in self._paths.items()}
        self._log.revert(weights, [record.id for record in self._log.records if not record.committed])
        self.release(module)

    def state(self) -> dict[str, Any]:
        """Return the state of the log."""
        return self._log.state_dict()
