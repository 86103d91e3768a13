"""What every change of the user's network follows: it is applied, seen by the others, taken back and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from clkit.errors import ConfigurationError

__all__ = ["Change", "changes_of"]

_MARK = "clkit_change"  # a plain attribute of a changed layer: in no state dict, copied with it; the tap looks for it


class Change(ABC):
    """A change of layers of the user's network that can be taken back: a graft, a mask, an edit.

    While it stands, each changed layer carries a mark that others find with :func:`changes_of`. A layer takes one
    change at a time, and with it all layers inside it. A subclass calls :meth:`claim` before it changes a layer,
    :meth:`mark` when it has, and :meth:`unmark` when it has taken the change back. A change keeps no reference to the
    module around its layers, so that a copy of a changed layer drags nothing else along and is taken back by its own
    mark.

    Attributes:
        owner: Who changes the network, for messages.
        applied: Whether the change stands.
        noun: What messages call it.
        remedy: What messages advise whoever finds this change in the way.
    """

    noun = "change"
    remedy = "undo that first"

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.applied = False

    @abstractmethod
    def apply(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Change the module, or raise a ConfigurationError where another change holds the layer."""

    @abstractmethod
    def restore(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Take up a saved change; one that lies in the weights is in the loaded ones already."""

    @abstractmethod
    def undo(self, module: nn.Module) -> None:
        """Give the layers back as they were; do nothing where the change does not stand."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which an equal change can be made, to be restored later."""

    def claim(self, module: nn.Module, path: str) -> nn.Module:
        """Return the layer at ``path``, unless another change holds it, a layer around it, or a layer inside it."""
        for other in changes_of(module, path):
            if other is not self:
                raise ConfigurationError(
                    f"the {self.noun} of {self.owner} would change {path!r}, which already holds the {other.noun} of "
                    f"{other.owner}; {other.remedy}"
                )
        return module.get_submodule(path)

    def mark(self, layer: nn.Module) -> None:
        """Show the others that this change stands in a layer."""
        setattr(layer, _MARK, self)
        self.applied = True

    def unmark(self, layer: nn.Module) -> None:
        """Show the others that the layer is free again."""
        vars(layer).pop(_MARK, None)
        self.applied = False


def changes_of(module: nn.Module, path: str = "") -> list[Change]:
    """Return the changes that stand in the layer at a dotted path, around it or inside it, each once."""
    steps = path.split(".")
    around = [module.get_submodule(".".join(steps[:length])) for length in range(len(steps))]
    marks = [getattr(layer, _MARK, None) for layer in (*around, *module.get_submodule(path).modules())]
    return list(dict.fromkeys(mark for mark in marks if isinstance(mark, Change)))
