"""Which layers of a network an editor can edit, which it takes by itself, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from clkit.errors import ArgumentError, ConfigurationError, TapError, did_you_mean
from clkit.features.tap import FeatureTap, path_of
from clkit.methods.simplex import SimplexHead

__all__ = ["Survey", "chosen_layers"]

KEYWORDS = ("auto", "mlp", "attention", "head")
_LAST = 3  # blocks, or layers where there are none
_MLP = re.compile(r"Mlp$|^SwiGLU")
_ATTENTION = re.compile(r"[Aa]tte?n|[Ee]xcit|^Squeeze|^SE|^Eca|^Cbam|GlobalContext")
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


@dataclass
class _Visit:
    """What a forward showed of a layer."""

    name: str
    layer: nn.Module
    calls: int = 0
    positions: float = 0  # rows an image


class Survey:
    """The linear and convolutional layers that one forward of a network runs through, in that order.

    Args:
        model: The network, in evaluation mode.
        run: Runs it once on some inputs, and returns its output.
        rows: How many images these are.
        classifier: Dotted path of the classifier, ``"auto"`` for the one that the tap finds.

    Attributes:
        output: What the network returned.
        ends_in_head: Whether that is what a layer of the classifier gave.
        layers: Editable layers by name, in the order of execution.
        excluded: Why not, by the name of each other linear or convolutional layer.
        heads: Names of the layers that are the classifier.

    Raises:
        ConfigurationError: If there is no classifier.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any], rows: int, classifier: str = "auto") -> None:
        self._model = model
        self.heads = _classifiers(model, classifier)
        self._visits = {
            name: _Visit(name, layer)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        order: dict[str, None] = {}
        with ExitStack() as hooks:
            for visit in self._visits.values():
                hooks.callback(visit.layer.register_forward_hook(partial(_hear, visit, order, rows)).remove)
            given: list[Any] = []
            for name in self.heads:
                hook = model.get_submodule(name).register_forward_hook(
                    lambda layer, inputs, output: given.append(output)
                )
                hooks.callback(hook.remove)
            self.output = run()
        self.ends_in_head = any(_same(each, self.output) for each in given)
        tied = _tied(model)
        self.excluded: dict[str, str] = {}
        self.layers: dict[str, nn.Module] = {}
        for name in (*order, *(name for name in self._visits if name not in order)):
            visit = self._visits[name]
            reason = _why_not(visit, tied)
            if reason:
                self.excluded[name] = reason
            else:
                self.layers[name] = visit.layer

    def named(self, keyword: str) -> list[str]:
        """Return the layers that a keyword means, in the order of execution; none where the network has no such."""
        if keyword == "head":
            return [name for name in self.heads if name in self.layers]
        if keyword == "mlp":
            return self._of_blocks(_MLP, lambda name: name.rpartition(".")[2].startswith("fc"))
        if keyword == "attention":
            return self._of_blocks(_ATTENTION, lambda name: name.rpartition(".")[2] in ("proj", "out_proj"))
        if found := self.named("mlp"):
            return found
        # what a simplex head has before its vertices is the same in all models, too
        fixed = tuple(f"{path}." for path, part in self._model.named_modules() if isinstance(part, SimplexHead))
        others = [name for name in self.layers if name not in self.heads and not name.startswith(fixed)]
        plain = [name for name in others if not self._is_in_attention(name)]
        wide = [name for name in plain if self._visits[name].positions > 1]
        return (wide or plain)[-_LAST:]

    def why_not(self, name: str) -> str:
        """Return why a layer of this name cannot be edited."""
        if name in self.excluded:
            return self.excluded[name]
        known = dict(self._model.named_modules())
        if name not in known:
            return f"the network has no such layer{did_you_mean(name, known)}"
        return f"it is a {type(known[name]).__name__}, and linear layers and 2-D convolutions alone can be edited"

    def _of_blocks(self, kind: re.Pattern[str], is_wanted: Callable[[str], bool]) -> list[str]:
        """Return wanted layers right inside the last few modules whose class is of a kind."""
        blocks: dict[str, list[str]] = {}
        for name in self.layers:
            around = name.rpartition(".")[0]
            if is_wanted(name) and kind.search(type(self._model.get_submodule(around)).__name__):
                blocks.setdefault(around, []).append(name)
        return [name for block in list(blocks.values())[-_LAST:] for name in block]

    def _is_in_attention(self, name: str) -> bool:
        steps = name.split(".")
        around = (self._model.get_submodule(".".join(steps[:length])) for length in range(1, len(steps)))
        return any(_ATTENTION.search(type(each).__name__) for each in around)


def chosen_layers(survey: Survey, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that were asked for, by name in the order of execution.

    Args:
        survey: Of the network.
        layers: ``"auto"``, ``"mlp"``, ``"attention"``, ``"head"``, a dotted path, or several of these.

    Raises:
        ArgumentError: If a layer cannot be edited, or a word means none; it says why.
    """
    wanted: set[str] = set()
    for each in [layers] if isinstance(layers, str) else layers:
        if each not in KEYWORDS:
            if each not in survey.layers:
                raise ArgumentError(f"layers names {each!r}, which cannot be edited: {survey.why_not(each)}")
            wanted.add(each)
            continue
        found = survey.named(each)
        if not found:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(survey.excluded.items())[-_LAST:])
            raise ArgumentError(
                f"layers={each!r} finds nothing to edit in this network; name linear or convolutional layers by their "
                f"dotted paths{f' (not these: {reasons})' if reasons else ''}"
            )
        wanted.update(found)
    if not wanted:
        raise ArgumentError("layers must name at least one layer, got none")
    return {name: layer for name, layer in survey.layers.items() if name in wanted}


def _classifiers(model: nn.Module, classifier: str) -> list[str]:
    try:
        with FeatureTap(model, classifier) as tap:
            found = [path_of(model, layer) for branch in tap.branches for layer in branch]
    except TapError as error:
        raise ConfigurationError(f"the editor finds no classifier to edit the answers of: {error}") from error
    if not found:
        raise ConfigurationError(
            "the network has no classifier, so that its outputs are no answers that could be edited; give it one "
            "(num_classes=…), or name the layer that gives the logits (classifier=…)"
        )
    return found


def _hear(visit: _Visit, order: dict[str, None], rows: int, layer: nn.Module, args: Any, output: Any) -> None:
    order.setdefault(visit.name)
    visit.calls += 1
    if isinstance(output, Tensor):
        weight = layer._parameters.get("weight")
        visit.positions = output.numel() / rows / (1 if weight is None else len(weight))


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of parameters that the network has under several names."""
    seen: set[int] = set()
    found: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def _why_not(visit: _Visit, tied: Iterable[int]) -> str:
    """Return why a layer cannot be edited, if it cannot."""
    layer: Any = visit.layer
    own = "forward" in vars(layer) or type(layer).forward not in _FORWARDS
    if own or getattr(type(layer), "_conv_forward", nn.Conv2d._conv_forward) is not nn.Conv2d._conv_forward:
        return f"a {type(layer).__name__} computes something else than a linear layer or a convolution of torch"
    weight = layer._parameters.get("weight")
    if weight is None or is_parametrized(layer):
        return "it computes its weight from other tensors (pruning, a parametrization); make that permanent first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, no floating-point numbers"
    if id(weight) in tied:
        return "its weight is shared with another layer"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return f"it is a convolution of {layer.groups} groups"
        if layer.padding_mode != "zeros":
            return f"it pads with {layer.padding_mode!r} instead of zeros"
    if visit.calls != 1:
        return f"a forward calls it {visit.calls} times, and an edit needs a single call"
    return ""


def _same(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    )
