"""Handing a learned head over to the user's module, and taking it back."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from clkit.errors import ConfigurationError
from clkit.methods.readout import readout_module, readout_tensors
from clkit.tap import FeatureTap

__all__ = ["Graft", "ungraft"]


class Graft:
    """A head in the place of the user's classifier.

    A head that is a plain linear layer of the classifier's own shape is copied into it, so the optimizer, the saved
    keys and a compiled graph stay valid. Otherwise the classifier is replaced by a ``Sequential`` that ends in an
    ``nn.Linear``; checkpoints then keep the user's own tensors under the user's own keys.

    Args:
        owner: Who grafts, for messages.
        own_tensors: What the classifier held before it was overwritten, for a run that goes on from a checkpoint.
    """

    def __init__(self, owner: str, own_tensors: dict[str, Tensor] | None = None) -> None:
        self.owner = owner
        self.applied = False
        self._path = ""
        self._original: nn.Module | None = None  # the replaced classifier
        self._tensors: dict[str, Tensor] = dict(own_tensors or {})  # what an overwritten classifier held

    def check(self, module: nn.Module, layer: str) -> None:
        """Looks whether the classifier can be replaced, before anything is learned.

        Raises:
            ConfigurationError: If there is no single classifier, or it belongs to another graft.
        """
        if not self.applied:
            self._find(module, layer)

    def apply(self, module: nn.Module, layer: str, head: Any) -> None:
        """Grafts, or refreshes a graft with what the head has learned since.

        Raises:
            ConfigurationError: If there is no single classifier, or it belongs to another graft.
        """
        if not self.applied:
            self._find(module, layer)
        slot = _get(module, self._path)
        if self._original is None and _same_form(slot, head):
            self._overwrite(slot, head)
        else:
            self._replace(module, slot, head)
        self.applied = True

    def undo(self, module: nn.Module) -> None:
        """Gives the classifier back as it was."""
        if not self.applied:
            return
        if self._original is not None:
            _set(module, self._path, self._original)
        else:
            self._give_back(_get(module, self._path))
        self.applied = False
        self._original = None

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        """The user's tensors that are overwritten; nothing where the classifier is replaced."""
        return dict(self._tensors)

    def restore_keys(self, state_dict: dict[str, Any]) -> None:
        """Puts the user's own keys back into a state dict that was taken with a replaced classifier."""
        if not self.applied or self._original is None:
            return
        prefix = self._path + "."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        for name, tensor in self._original.state_dict().items():
            state_dict[prefix + name] = tensor

    # ----

    def _find(self, module: nn.Module, layer: str) -> None:
        with FeatureTap(module, layer) as tap:
            classifier, path, point = tap.classifier, tap.classifier_path, tap.point
        if classifier is None or path is None:
            raise ConfigurationError(
                f"{self.owner} cannot be grafted: features are read at {point!r}, where the network has no single "
                "classifier to replace; give the network one (num_classes=…), or predict with the callback's head"
            )
        other = getattr(classifier, "clkit_graft", None)
        if isinstance(other, Graft):
            raise ConfigurationError(
                f"{self.owner} cannot be grafted: {path!r} already holds the graft of {other.owner}; call "
                "clkit.callbacks.ungraft(module) first"
            )
        if not isinstance(classifier, nn.Linear | nn.Conv2d):
            raise ConfigurationError(
                f"{self.owner} cannot be grafted: the classifier at {path!r} is a {type(classifier).__name__}, and "
                "only linear and 1x1 convolution classifiers can be replaced"
            )
        self._path = path

    def _overwrite(self, slot: nn.Module, head: Any) -> None:
        if not self._tensors:
            self._tensors = {name: parameter.detach().clone() for name, parameter in slot.named_parameters()}
        slot.clkit_graft = self  # type: ignore[assignment]  # a mark that others can see
        weight, bias = readout_tensors(head, _outputs(slot), self._tensors["weight"].dtype)
        with torch.no_grad():
            for name, value in (("weight", weight), ("bias", bias)):
                getattr(slot, name).copy_(value)

    def _replace(self, module: nn.Module, slot: nn.Module, head: Any) -> None:
        if self._original is None:
            rank_zero_info(
                f"{self.owner}: the classifier at {self._path!r} is replaced by layers of the head's own until "
                "ungraft; checkpoints keep the classifier's own keys"
            )
            self._give_back(slot)  # an overwritten classifier that the head has outgrown
            self._original = slot
        reference = next(slot.parameters())
        graft = readout_module(head, max(_outputs(self._original), int(head.classes.max()) + 1), reference.dtype)
        graft.to(reference.device).requires_grad_(False)
        graft.train(slot.training)
        graft.clkit_graft = self  # type: ignore[assignment]  # the same mark
        _set(module, self._path, graft)

    def _give_back(self, slot: nn.Module) -> None:
        if not self._tensors:
            return
        with torch.no_grad():
            for name, parameter in slot.named_parameters():
                parameter.copy_(self._tensors[name])
        self._tensors = {}
        vars(slot).pop("clkit_graft", None)


def ungraft(module: nn.Module) -> None:
    """Gives a module its own classifiers back, whichever callback grafted into it.

    Args:
        module: The user's module; nothing happens where nothing was grafted.

    Example:
        >>> ungraft(nn.Linear(2, 2))
    """
    for part in list(module.modules()):
        graft = getattr(part, "clkit_graft", None)
        if isinstance(graft, Graft):
            graft.undo(module)


def _same_form(classifier: nn.Module, head: Any) -> bool:
    """Whether the head is a linear layer of the classifier's shape."""
    return (
        type(classifier) is nn.Linear
        and classifier.bias is not None
        and not head.normalizes
        and head.feature_map.is_identity
        and int(head.classes.max()) < classifier.out_features
    )


def _outputs(classifier: nn.Module) -> int:
    return int(classifier.out_features if isinstance(classifier, nn.Linear) else classifier.out_channels)  # type: ignore[arg-type]  # Conv2d


def _get(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


def _set(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
