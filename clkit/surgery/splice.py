"""A copy of the user's network with a head in the place of its classifier, compared with the head before it is used."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clkit.errors import ConfigurationError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap, path_of, put_at, width_of
from clkit.methods.heads.base import Head
from clkit.methods.heads.readout import L2Normalize, LinearReadout, layer_values
from clkit.surgery.classifier import copy_into, outputs_of, ungraft
from clkit.surgery.copies import bare_copy

__all__ = ["SplicedCopy"]


class SplicedCopy:
    """A copy of a network on the CPU that takes a head in the place of its classifier; the original is not changed.

    Args:
        module: The user's module.
        head: The head; it has learned something.
        layer: Where its features are read.
        example: Inputs (B, …) on which the copy is compared with the head.

    Attributes:
        network: The copy.
        columns: The number of outputs that the copy gets.
        timm_name: The name by which timm makes the network, ``None`` for one that it did not make.
        title: That name, or the network's class.
        dtype: The data type of the network's parameters.
    """

    def __init__(self, module: pl.LightningModule, head: Head, layer: str, example: Tensor) -> None:
        self.example = example
        self._head = head
        whole = bare_copy(module).cpu()
        ungraft(whole)  # its own classifier comes back as it was, with gradients
        whole.eval().requires_grad_(False)
        with FeatureTap(whole, layer) as tap:
            self.network: nn.Module = getattr(tap.network, "_orig_mod", tap.network)
            self._features = tap.extract(example, partial(forward, whole, tap.network))
            self._point, self._branches, self._classifier = tap.point, tap.branches, tap.classifier
        if self._features.shape[1] != head.in_features:
            raise ConfigurationError(
                f"the network gives features of width {self._features.shape[1]} at {self._point!r}, and the head has "
                f"learned from width {head.in_features}; it belongs to another network or layer"
            )
        self.columns = max(self._outputs, int(head.classes[-1]) + 1)
        config = getattr(self.network, "pretrained_cfg", None)
        names = [config.get("architecture"), config.get("tag")] if isinstance(config, dict) else [None]
        self.timm_name = ".".join(str(name) for name in names if name) if names[0] else None
        self.title = self.timm_name or type(self.network).__name__
        parameters = (p for p in self.network.parameters() if p.is_floating_point())
        self.dtype = next((parameter.dtype for parameter in parameters), torch.float32)

    def fill(self, head: LinearReadout) -> nn.Module:
        """Return the network with a linear head in its classifiers' own tensors, or refuse what has no place for it.

        A network that has no classifier, or one of too few outputs, makes itself one where it can.
        """
        if not self._branches or self._outputs < self.columns:
            self._make_room()
        for branch in self._branches:
            layers = nn.ModuleList(_linear_part(leaf) for leaf in branch)
            values = layer_values(head, dict(layers.named_parameters()))
            if values is None:
                self.refuse(
                    f"its classifier at {self._point!r} is a {type(branch[0]).__name__}, not one linear layer of width "
                    f"{head.in_features} with a bias"
                )
            copy_into(layers, values)
        return self.network

    def put(self, layers: nn.Module) -> nn.Module:
        """Return the network with layers of any kind in the place of its classifier, or behind it.

        Of several classifiers each hands its features on, so that the network's mean is the features. Features that are
        read elsewhere than at a classifier or the output are refused.
        """
        leaves = [leaf for branch in self._branches for leaf in branch]
        if self._classifier is not None and len(leaves) == 1:
            path = path_of(self.network, leaves[0])
            if not path:
                return layers
            put_at(self.network, path, layers)
            return self.network
        if not leaves and self._point != "output":
            self._refuse_place()
        for branch in self._branches:
            widths = [width_of(leaf) or self._head.in_features for leaf in branch]
            for index, leaf in enumerate(branch):
                place = _HandOn(sum(widths[:index]), sum(widths[index + 1 :]), len(branch))
                put_at(self.network, path_of(self.network, leaf), place)
        return nn.Sequential(self.network, layers)

    def compare(self, model: nn.Module, layers: nn.Sequential, rows: int | None = None) -> Tensor:
        """Return a model's logits on some rows of the example, which must be those of the head's layers in float64."""
        features, seen = self._features[:rows].double(), self._head.classes.cpu()
        with torch.no_grad():
            logits: Tensor = model(self.example[:rows])
            wanted, size = _scores(layers, self._features.double())
        wanted = wanted[:rows, seen]
        if tuple(logits.shape) != (len(features), self.columns):
            self.refuse(f"it gives {tuple(logits.shape)} where ({len(features)}, {self.columns}) is wanted")
        tolerance = 100 * torch.finfo(self.dtype).eps * float(size[:, seen].max())
        predicted = torch.searchsorted(seen, self._head.predict(features).cpu())
        behind = wanted.max(dim=1).values - wanted.gather(1, predicted[:, None])[:, 0]
        apart = float((logits.double()[:, seen] - wanted).abs().max())
        if apart > tolerance or float(behind.max()) > tolerance:
            self.refuse(
                f"its outputs differ from the head's scores by {apart:.3g} (the module's own forward may do more than "
                "its network, or the network more with its classifiers than is known)",
                "export a module whose forward calls the network alone",
            )
        return logits

    def refuse(self, reason: str, remedy: str = "export to a .pt2 file, which can hold any head") -> NoReturn:
        """Raise a ConfigurationError that names the network, the reason, and what to do instead."""
        raise ConfigurationError(f"this {self.title} with this head does not fit in such a file: {reason}; {remedy}")

    @property
    def _outputs(self) -> int:
        if not self._branches:
            return 0
        found = outputs_of(self._branches[0][0]) or getattr(self.network, "num_classes", None)
        return found if isinstance(found, int) else 0

    def _refuse_place(self) -> NoReturn:
        remedy = "let the head read what the network's classifier reads"
        if self._point == "output":
            remedy = "give the network a classifier, or export to a .pt2 file"
        self.refuse(f"its features are read at {self._point!r}, which is no classifier's input", remedy)

    def _make_room(self) -> None:
        """Let the network make a classifier of as many outputs as the head needs."""
        reset = getattr(self.network, "reset_classifier", None)
        if not callable(reset):
            if not self._branches:
                self._refuse_place()
            self.refuse(f"its classifier has {self._outputs} outputs, and the head needs {self.columns}")
        if getattr(self.network, "num_features", 0) is None:  # an identity learns its width by its classifier
            self.network.num_features = self._head.in_features  # type: ignore[assignment]  # modules are duck-typed
        reset(self.columns)
        self.network.eval().requires_grad_(False).to(self.dtype)
        with FeatureTap(self.network) as tap:
            self._point, self._branches = tap.point, tap.branches


class _HandOn(nn.Module):
    """In the place of one of several classifiers: returns its input at its place among all features, times n."""

    def __init__(self, before: int, after: int, times: int) -> None:
        super().__init__()
        self.padding, self.times = (before, after), times

    def forward(self, features: Tensor) -> Tensor:
        return pad(features, self.padding) * self.times


def _linear_part(leaf: nn.Module) -> nn.Module:
    """Return the linear layer of a classifier; the norm before it (LeViT's) is made to do nothing."""
    norm, layer = getattr(leaf, "bn", None), getattr(leaf, "linear", None)
    if not isinstance(norm, nn.BatchNorm1d) or not isinstance(layer, nn.Linear):
        return leaf
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    norm.weight.data.fill_((1.0 + norm.eps) ** 0.5)
    norm.bias.data.zero_()
    return layer


def _scores(layers: nn.Sequential, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores (B, C), and the size of the terms that they add up, which says how exact they can be."""
    scores = size = features
    for layer in layers:
        scores = layer(scores)
        if isinstance(layer, nn.Linear):
            size = size.abs() @ layer.weight.abs().T + (0 if layer.bias is None else layer.bias.abs())
        elif isinstance(layer, L2Normalize):
            size = scores
    return scores, size
