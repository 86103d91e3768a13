"""A learned head in the place of the user's classifier, for as long as a run wants it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clkit.errors import ConfigurationError, StateError
from clkit.features.tap import FeatureTap, put_at, width_of
from clkit.methods.heads.readout import (
    LinearReadout,
    difference_of,
    is_linear,
    layer_values,
    linear_of,
    readout_module,
    readout_tensors,
)
from clkit.schema import FLOATS, Named, Numbers, Table, read_state, saved_entry
from clkit.surgery.change import Change, changes_of

__all__ = ["Graft", "copy_into", "outputs_of", "ungraft"]

_ANY = Numbers((...,), FLOATS, any_value=True)  # a network that diverged may be saved, too
_LINEAR: Table = {"weight": replace(_ANY, shape=("C", "D")), "bias": replace(_ANY, shape=("C",))}


class Graft(Change):
    """A head in the place of the user's classifier; ``saved`` is the state of one, for a run that goes on.

    A head that is a plain linear layer of the classifier's own shape is copied into it, so the optimizer, the saved
    keys and a compiled graph stay valid. Otherwise the classifier is replaced by a ``Sequential`` that ends in an
    ``nn.Linear``; checkpoints then keep the user's own tensors under the user's own keys.

    A classifier of one output, of which the sigmoid is the probability of class 1, gets the difference of the two
    classes' outputs, and takes no head of other classes.

    Attributes:
        one_output: Whether the classifier has a single output; known once it was checked.

    Raises:
        StateError: If ``saved`` is damaged.
    """

    noun = "graft"
    remedy = "call clkit.callbacks.ungraft(module) first"

    def __init__(self, owner: str, saved: Mapping[str, Any] | None = None) -> None:
        super().__init__(owner)
        self.one_output = False
        self._path = ""
        self._original: nn.Module | None = None  # the replaced classifier
        self._own = {} if saved is None else _tensors(saved, "own", owner)  # what an overwritten classifier held
        self._layer = {} if saved is None else _tensors(saved, "layer", owner)  # the last of the layers that replace it
        if self._layer:
            read_state(self._layer, _LINEAR, f"{owner}: 'layer' of the saved graft")

    def check(self, module: nn.Module, layer: str, make_head: Callable[[int], Any] | None = None) -> None:
        """Refuse a classifier that a head for features read at ``layer`` cannot replace, or another change holds."""
        slot = self._slot(module, layer)
        if make_head is not None:
            self._refuse_learned_layers(make_head(1))
        if make_head is not None and isinstance(slot, nn.ModuleList):
            self._refuse_split(slot, make_head(sum(width_of(leaf) or 0 for leaf in slot)))

    def check_classes(self, highest: int) -> None:
        """Refuse a class id for which a classifier of one output has no place, before it is learned."""
        if self.one_output and highest > 1:
            self._refuse(
                f"the classifier at {self._path!r} has one output, which tells class 1 from class 0, and there is a "
                f"class {highest}; give the network as many outputs as there are classes, relabel them to 0 and 1, or "
                'pass graft="never"'
            )

    def check_training(self, module: nn.Module, wrapped: Any, head: Any) -> None:
        """Refuse training behind a graft where DDP would wait for the classifier's gradients, or nothing has any.

        ``wrapped`` is what the strategy runs: the module that was checked, or DDP's wrapper around it.
        """
        classifier = module.get_submodule(self._path) if self._original is None else self._original
        if _is_copied(classifier, head):
            return
        replaces = f"{self.owner} with graft='experience_end' replaces the classifier at {self._path!r}, and"
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise ConfigurationError(
                f"{replaces} DDP would wait for its gradients; use strategy='ddp_find_unused_parameters_true', or "
                "graft='fit_end'"
            )
        own = {id(parameter) for parameter in classifier.parameters()}
        if not any(parameter.requires_grad and id(parameter) not in own for parameter in module.parameters()):
            raise ConfigurationError(
                f"{replaces} nothing else of the module is trained; use strategy='gradient_free', or graft='fit_end'"
            )

    def apply(self, module: nn.Module, layer: str, head: Any) -> None:
        """Graft a head whose features are read at ``layer``, or refresh its graft; raises as :meth:`check`."""
        slot = self._slot(module, layer)
        self._refuse_learned_layers(head)
        self.check_classes(int(head.classes.max()) if head.classes.numel() else 0)
        with torch.inference_mode(False):  # a graft that an evaluation puts back must serve the next training too
            values = None
            if self._original is None and _is_copied(slot, head):
                values = layer_values(_one_output_of(head) if self.one_output else head, dict(slot.named_parameters()))
            if values is not None:
                self._own = self._own or {name: tensor.detach().clone() for name, tensor in slot.named_parameters()}
                copy_into(slot, values)
                self.mark(slot)
            elif isinstance(slot, nn.ModuleList):
                self._refuse_split(slot, head)
                self._refuse(
                    f"class {int(head.classes.max())} is beyond the {outputs_of(slot[0])} outputs of the classifiers "
                    f"at {self._path!r}; give the network more (num_classes=…)"
                )
            else:
                self._replace(module, slot, head)

    def restore(self, module: nn.Module, layer: str, head: Any) -> None:
        """Take up the graft of a checkpoint as it was; the head may have learned more since."""
        slot = self._slot(module, layer)
        if self._own:  # the weights that were loaded with it are those of the graft
            table = {name: replace(_ANY, shape=tuple(tensor.shape)) for name, tensor in slot.named_parameters()}
            read_state(self._own, table, f"{self.owner}: 'own' of the saved graft")
            self.mark(slot)
        elif self._layer:
            with torch.inference_mode(False):
                self._replace(module, slot, head, linear_of(**self._layer))
        else:
            self.apply(module, layer, head)

    def undo(self, module: nn.Module) -> None:
        """Give the classifier back as it was; do nothing where nothing is grafted."""
        if not self.applied:
            return
        slot = module.get_submodule(self._path)
        if self._original is None:
            copy_into(slot, self._own)
        else:
            self._original.train(slot.training)  # the mode may have changed since
            put_at(module, self._path, self._original)
        self.unmark(slot)
        self._original, self._own, self._layer = None, {}, {}

    def release(self, module: nn.Module) -> None:
        """Leave the classifier to the weights that were just loaded into the module."""
        if self.applied and self._original is None:
            self._own = {}
        self.undo(module)

    def state(self) -> dict[str, Any]:
        """Return ``own``, what an overwritten classifier held, or ``layer``, the last of those that replace one."""
        return {"own": dict(self._own), "layer": dict(self._layer)}

    def restore_keys(self, state_dict: dict[str, Any]) -> None:
        """Put the user's own keys back into a state dict that was taken with a replaced classifier."""
        if self._original is None:
            return
        prefix = self._path + "."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        for name, tensor in self._original.state_dict().items():
            state_dict[prefix + name] = tensor

    def _slot(self, module: nn.Module, layer: str) -> nn.Module:
        """Return what stands in the classifier's place, once it is known that a head can stand there."""
        if self.applied:
            return module.get_submodule(self._path)
        with FeatureTap(module, layer) as tap:
            classifier, path, point, branches = tap.classifier, tap.classifier_path, tap.point, tap.branches
            core = type(getattr(tap.network, "_orig_mod", tap.network))
        if len(branches) > 1:
            self._refuse(
                f"the logits are the mean of {len(branches)} distilled classifiers, {point.partition(':')[0]!r}, not "
                "the output of one; predict with the callback's head, or use clkit export"
            )
        if classifier is None or path is None:
            self._refuse(
                f"features are read at {point!r}, where the network has no single classifier to replace; give the "
                "network one (num_classes=…), or predict with the callback's head"
            )
        self.claim(module, path)
        is_crossvit = core.__name__ == "CrossVit" and core.__module__.startswith("timm.")
        if isinstance(classifier, nn.ModuleList) and not is_crossvit:
            self._refuse(
                f"the network reads {len(classifier)} classifiers at {path!r} in a way that is not known (of such "
                "networks only CrossViT, which takes their mean, can be grafted)"
            )
        leaves = _leaves(classifier)
        if not all(isinstance(leaf, nn.Linear | nn.Conv2d) for leaf in leaves):
            self._refuse(
                f"the classifier at {path!r} is a {type(leaves[0]).__name__}, and only linear and 1x1 convolution "
                "classifiers can be replaced"
            )
        self._path, self.one_output = path, all(outputs_of(leaf) == 1 for leaf in leaves)
        return classifier

    def _refuse(self, reason: str) -> NoReturn:
        raise ConfigurationError(f"{self.owner} cannot be grafted: {reason}")

    def _refuse_learned_layers(self, head: Any) -> None:
        if getattr(head, "_learns_layers", False):  # a saved graft keeps the last layer alone
            self._refuse(
                f"more than the last layer of this {type(head).__name__} depends on what it has learned; predict with "
                "the callback's head, or use clkit export to .pt2"
            )

    def _refuse_split(self, slot: nn.ModuleList, head: Any) -> None:
        if not is_linear(head):
            self._refuse(
                f"the network has {len(slot)} classifiers at {self._path!r}, each with its own part of the features, "
                f"and only a head of one linear layer can be split over them, which a {type(head).__name__} with "
                "unit-length or lifted features is not; predict with the callback's head, or use clkit export to .pt2"
            )

    def _replace(self, module: nn.Module, slot: nn.Module, head: Any, last: nn.Linear | None = None) -> None:
        if self._original is None:
            rank_zero_info(
                f"{self.owner}: the classifier at {self._path!r} is replaced by layers of the head's own until "
                "ungraft; checkpoints keep the classifier's own keys"
            )
            copy_into(slot, self._own)  # an overwritten classifier that the head has outgrown
            self._own = {}
            self.unmark(slot)
            self._original = slot
        reference = next(slot.parameters())
        outputs = max(outputs_of(self._original) or 0, int(head.classes.max()) + 1, 2 if self.one_output else 0)
        graft = readout_module(head, outputs, reference.dtype)
        if self.one_output:
            graft[-1] = linear_of(*difference_of(*readout_tensors(head, 2, reference.dtype)))
        if last is not None and last.in_features != graft[-1].in_features:
            raise StateError(
                f"{self.owner}: 'layer' of the saved graft takes {last.in_features} inputs, and the head gives "
                f"{graft[-1].in_features}; the file is damaged"
            )
        if last is not None:
            graft[-1] = last
        graft.to(reference.device, reference.dtype).requires_grad_(False)
        graft.train(slot.training)
        self._layer = {name: parameter.detach() for name, parameter in graft[-1].named_parameters()}
        graft.register_load_state_dict_pre_hook(self._load_own)  # type: ignore[no-untyped-call]  # torch: no types
        put_at(module, self._path, graft)
        self.mark(graft)

    def _load_own(self, graft: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load the user's own keys, which files keep, into the replaced classifier, and leave the graft as it is."""
        assert self._original is not None
        names = list(self._original.state_dict())
        if all(prefix + name in state_dict for name in names):
            self._original.load_state_dict({name: state_dict.pop(prefix + name) for name in names})
            state_dict.update({prefix + name: tensor for name, tensor in graft.state_dict().items()})


def ungraft(module: nn.Module) -> None:
    """Give the user's module its own classifiers back, whichever callback grafted into it.

    Example:
        >>> ungraft(nn.Linear(2, 2))
    """
    for change in changes_of(module):
        if isinstance(change, Graft):
            change.undo(module)


def copy_into(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    with torch.no_grad():
        for name, tensor in values.items():
            module.get_parameter(name).copy_(tensor)


def outputs_of(layer: nn.Module) -> int | None:
    """Return the number of outputs of a linear or convolutional layer, ``None`` of any other."""
    found = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return found if isinstance(found, int) else None


def _one_output_of(head: Any) -> LinearReadout:
    """Return a linear head as one of a single column: what class 1 has above class 0."""
    return LinearReadout(torch.zeros(1, dtype=torch.int64), *difference_of(*readout_tensors(head, 2, torch.float64)))


def _leaves(classifier: nn.Module) -> list[nn.Module]:
    return list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]


def _is_copied(classifier: nn.Module, head: Any) -> bool:
    """Return whether a head of this kind is copied into the classifier, rather than put in its place."""
    return is_linear(head) and all(type(leaf) is nn.Linear and leaf.bias is not None for leaf in _leaves(classifier))


def _tensors(saved: Mapping[str, Any], name: str, owner: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = saved_entry(saved, name, Named(_ANY), owner)
    return tensors
