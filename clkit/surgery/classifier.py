"""Handing a learned head over to the user's module, and taking it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clkit.errors import ConfigurationError
from clkit.features.tap import FeatureTap
from clkit.methods.heads.readout import is_linear, layer_values, linear_of, readout_module

__all__ = ["Graft", "ungraft"]


class Graft:
    """A head in the place of the user's classifier.

    A head that is a plain linear layer of the classifier's own shape is copied into it, so the optimizer, the saved
    keys and a compiled graph stay valid. Otherwise the classifier is replaced by a ``Sequential`` that ends in an
    ``nn.Linear``; checkpoints then keep the user's own tensors under the user's own keys.

    Args:
        owner: Who grafts, for messages.
        own_tensors: What the classifier held before it was overwritten, for a run that goes on from a checkpoint.
        layer_tensors: The last layer of what stood in the classifier's place, for the same.
    """

    def __init__(
        self,
        owner: str,
        own_tensors: dict[str, Tensor] | None = None,
        layer_tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.owner = owner
        self.applied = False
        self._path = ""
        self._original: nn.Module | None = None  # the replaced classifier
        self._tensors: dict[str, Tensor] = dict(own_tensors or {})  # what an overwritten classifier held
        self._layer: nn.Module | None = None  # the last of the layers in the classifier's place
        self._restored: dict[str, Tensor] = dict(layer_tensors or {})  # what it is to hold when it is put back

    def check(self, module: nn.Module, layer: str, make_head: Callable[[int], Any] | None = None) -> None:
        """Looks whether the classifier can be replaced, before anything is learned.

        Args:
            module: The user's module.
            layer: Where features are read.
            make_head: Makes a head for features of a width, to be grafted later.

        Raises:
            ConfigurationError: If there is no classifier that the head can replace, or it belongs to another graft.
        """
        if not self.applied:
            self._find(module, layer)
        slot = _get(module, self._path)
        if make_head is not None and isinstance(slot, nn.ModuleList):
            self._refuse_split(slot, make_head(sum(_inputs(slot))))

    def check_training(self, module: nn.Module, wrapped: Any, head: Any) -> None:
        """Looks whether gradients can go on behind a graft: a classifier that is replaced gets none any more.

        Args:
            module: The user's module, for which :meth:`check` was called.
            wrapped: What the strategy runs: the module, or DDP's wrapper around it.
            head: A head of the kind that will be grafted; it need not have learned anything.

        Raises:
            ConfigurationError: If DDP waits for these gradients, or nothing else would be trained.
        """
        classifier = _get(module, self._path) if self._original is None else self._original
        if _is_copied(classifier, head):
            return
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise ConfigurationError(
                f"{self.owner} with graft='experience_end' replaces the classifier at {self._path!r}, and DDP would "
                "wait for its gradients; use strategy='ddp_find_unused_parameters_true', or graft='fit_end'"
            )
        own = {id(parameter) for parameter in classifier.parameters()}
        if not any(parameter.requires_grad and id(parameter) not in own for parameter in module.parameters()):
            raise ConfigurationError(
                f"{self.owner} with graft='experience_end' replaces the classifier at {self._path!r}, and nothing else "
                "of the module is trained; use strategy='gradient_free', or graft='fit_end'"
            )

    def apply(self, module: nn.Module, layer: str, head: Any) -> None:
        """Grafts, or refreshes a graft with what the head has learned since.

        Raises:
            ConfigurationError: If there is no classifier that the head can replace, or it belongs to another graft.
        """
        if not self.applied:
            self._find(module, layer)
        slot = _get(module, self._path)
        with torch.inference_mode(False):  # a graft that an evaluation puts back must serve the next training too
            if self._original is None and _same_form(slot, head):
                self._overwrite(slot, head)
            elif isinstance(slot, nn.ModuleList):
                self._refuse_split(slot, head)
                self._refuse(
                    f"class {int(head.classes.max())} is beyond the {_outputs(slot[0])} outputs of the classifiers at "
                    f"{self._path!r}; give the network more (num_classes=…)"
                )
            else:
                self._replace(module, slot, head)
        self.applied = True

    def restore(self, module: nn.Module, layer: str, head: Any) -> None:
        """Takes up a graft of a checkpoint as it was: since then the head may have learned more.

        Raises:
            ConfigurationError: If there is no classifier that the head can replace, or it belongs to another graft.
        """
        if not self._tensors:
            self.apply(module, layer, head)
            return
        self._find(module, layer)  # the module's own weights, which were loaded with it, are those of the graft
        _get(module, self._path).clkit_graft = self  # type: ignore[assignment]  # a mark that others can see
        self.applied = True

    def undo(self, module: nn.Module) -> None:
        """Gives the classifier back as it was."""
        if not self.applied:
            return
        if self._original is not None:
            self._original.train(_get(module, self._path).training)  # the mode may have changed since
            _set(module, self._path, self._original)
        else:
            self._give_back(_get(module, self._path))
        self.applied = False
        self._original = self._layer = None

    def release(self, module: nn.Module) -> None:
        """Leaves the classifier to the weights that were just loaded into the module."""
        if self.applied and self._original is None:
            vars(_get(module, self._path)).pop("clkit_graft", None)
            self._tensors = {}
        self.undo(module)

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        """The user's tensors that are overwritten; nothing where the classifier is replaced."""
        return dict(self._tensors)

    @property
    def layer_tensors(self) -> dict[str, Tensor]:
        """Weight and bias of the layer that answers where a classifier is replaced; nothing elsewhere."""
        if self._layer is None:
            return dict(self._restored)
        return {name: parameter.detach() for name, parameter in self._layer.named_parameters()}

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
            classifier, path, point, branches = tap.classifier, tap.classifier_path, tap.point, tap.branches
            splits = _is_crossvit(tap.network)
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
        other = getattr(classifier, "clkit_graft", None)
        if isinstance(other, Graft):
            self._refuse(
                f"{path!r} already holds the graft of {other.owner}; call clkit.callbacks.ungraft(module) first"
            )
        if isinstance(classifier, nn.ModuleList) and not splits:
            self._refuse(
                f"the network reads {len(classifier)} classifiers at {path!r} in a way that is not known (of such "
                "networks only CrossViT, which takes their mean, can be grafted)"
            )
        leaves = list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]
        if not all(isinstance(leaf, nn.Linear | nn.Conv2d) for leaf in leaves):
            self._refuse(
                f"the classifier at {path!r} is a {type(leaves[0]).__name__}, and only linear and 1x1 convolution "
                "classifiers can be replaced"
            )
        self._path = path

    def _refuse(self, reason: str) -> NoReturn:
        raise ConfigurationError(f"{self.owner} cannot be grafted: {reason}")

    def _refuse_split(self, slot: nn.ModuleList, head: Any) -> None:
        if not is_linear(head):
            self._refuse(
                f"the network has {len(slot)} classifiers at {self._path!r}, each with its own part of the features, "
                f"and only a head of one linear layer can be split over them, which a {type(head).__name__} with "
                "unit-length or lifted features is not; predict with the callback's head, or use clkit export to .pt2"
            )

    def _overwrite(self, slot: nn.Module, head: Any) -> None:
        if not self._tensors:
            self._tensors = {name: parameter.detach().clone() for name, parameter in slot.named_parameters()}
        slot.clkit_graft = self  # type: ignore[assignment]  # a mark that others can see
        values = layer_values(head, self._tensors)
        assert values is not None
        with torch.no_grad():
            for name, parameter in slot.named_parameters():
                parameter.copy_(values[name])

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
        if self._restored:
            graft[-1] = linear_of(self._restored["weight"], self._restored["bias"])
            self._restored = {}
        self._layer = graft[-1]
        graft.to(reference.device).requires_grad_(False)
        graft.train(slot.training)
        graft.clkit_graft = self  # type: ignore[assignment]  # a mark that others can see
        graft.register_load_state_dict_pre_hook(self._load_own)  # type: ignore[no-untyped-call]  # torch: no types
        _set(module, self._path, graft)

    def _load_own(self, graft: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Files keep the user's own keys, so a module that holds the graft must be able to load them."""
        assert self._original is not None
        names = list(self._original.state_dict())
        if all(prefix + name in state_dict for name in names):
            self._original.load_state_dict({name: state_dict.pop(prefix + name) for name in names})
            state_dict.update({prefix + name: tensor for name, tensor in graft.state_dict().items()})

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


def _is_crossvit(network: nn.Module) -> bool:
    core = getattr(network, "_orig_mod", network)
    return type(core).__name__ == "CrossVit" and type(core).__module__.startswith("timm.")


def _is_copied(classifier: nn.Module, head: Any) -> bool:
    """Whether a head of this kind is copied into the classifier, rather than put in its place."""
    leaves = list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]
    return is_linear(head) and all(type(leaf) is nn.Linear and leaf.bias is not None for leaf in leaves)


def _same_form(classifier: nn.Module, head: Any) -> bool:
    """Whether the head is a linear layer of the classifier's shape, or can be split over several."""
    return _is_copied(classifier, head) and layer_values(head, dict(classifier.named_parameters())) is not None


def _inputs(classifiers: nn.ModuleList) -> list[int]:
    return [int(layer.in_features) for layer in classifiers]  # type: ignore[arg-type]  # linear layers


def _outputs(classifier: nn.Module) -> int:
    # what is no Linear is a Conv2d here, which the annotation of a module does not know
    return int(classifier.out_features if isinstance(classifier, nn.Linear) else classifier.out_channels)  # type: ignore[arg-type]


def _get(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


def _set(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
