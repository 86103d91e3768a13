"""Low-rank changes of weights (LoRA): trained beside frozen weights, then added to them, and nothing else is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from clkit.errors import ConfigurationError
from clkit.methods._checks import generator
from clkit.surgery.change import Change

__all__ = ["LowRank", "low_rank_layers"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def low_rank_layers(module: nn.Module, rank: int, without: Collection[nn.Module] = ()) -> list[str]:
    """Return the dotted paths of the layers whose weights a low-rank change can train.

    They are linear and convolutional layers, whose weight as a matrix (out, in · kernel) has more numbers than a pair
    of the rank. Left out are weights that are frozen, computed from others (pruning, another parametrization) or shared
    by several layers.

    Args:
        module: The network, or a module that holds it.
        rank: Of the change, at least 1.
        without: Layers that are left out.

    Raises:
        ConfigurationError: If a layer is lazy, and has no weight before the first batch.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 2))
        >>> low_rank_layers(network, rank=4)
        ['0']
    """
    uses = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    left_out = {id(layer) for layer in without}
    found = []
    for path, layer in module.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, _KINDS) else None
        if weight is None or id(layer) in left_out or not weight.requires_grad or uses[id(weight)] > 1:
            continue
        if is_lazy(weight):
            raise ConfigurationError(
                f"the layer {path!r} is a {type(layer).__name__}, whose weight is made with the first batch; run a "
                "batch through the network before the fit, or give the layer its number of inputs"
            )
        rows, columns = len(weight), weight[0].numel()
        if rank * (rows + columns) < weight.numel():
            found.append(path)
    return found


class LowRank(Change):
    r"""Low-rank changes of the weights of some layers, which torch's parametrizations put in the weights' places.

    While they stand, ``layer.weight`` is :math:`W + B A`, for whoever reads it: with W the layer's own weight as a
    matrix (out, in · kernel), frozen by whoever applies the change, and A (rank, in · kernel) and B (out, rank)
    parameters of the module. B begins at 0; A is drawn uniformly from :math:`\pm 1/\sqrt{in \cdot kernel}`, by a
    generator of its own whose seed is the layer's path. :meth:`merge` writes W + B A, the bits that the forward had,
    into the layer's own parameter and takes the rest off: the same classes, parameters, names and order as before.

    Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1 (here with
    :math:`\alpha = r`).

    Args:
        owner: Who changes the network, for messages.
        rank: Of each change, at least 1.

    Example:
        >>> layer = nn.Sequential(nn.Linear(6, 4))
        >>> change = LowRank("the example", rank=1)
        >>> change.apply(layer, ["0"])
        >>> [tuple(each.shape) for each in change.parameters(layer)]
        [(1, 6), (4, 1)]
        >>> change.merge(layer)
        >>> [name for name, _ in layer.named_parameters()], type(layer[0]).__name__
        (['0.weight', '0.bias'], 'Linear')
    """

    noun = "low-rank change"
    remedy = "it stands until the first experience is learned; change the layer afterwards, or leave one of the two out"

    def __init__(self, owner: str, rank: int) -> None:
        super().__init__(owner)
        self.rank = rank
        self._orders: dict[str, list[str]] = {}  # names of each layer's own parameters, by its path
        self._names: list[str] = []  # of the module's state

    def apply(self, module: nn.Module, paths: Iterable[str]) -> None:
        """Put a new pair into each layer, or raise a ConfigurationError where another change holds one."""
        layers = {path: self.claim(module, path) for path in paths}
        self._names = list(module.state_dict())
        for path, layer in layers.items():
            self._orders[path] = list(layer._parameters)
            pair = _Pair(path, layer.get_parameter("weight"), self.rank)
            parametrize.register_parametrization(layer, "weight", pair)
            self.mark(layer)

    def restore(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Put pairs into the layers that :meth:`values` named, and give them and the layers' own weights its values."""
        self.apply(module, dict.fromkeys(name.rpartition(".")[0] for name in values))
        with torch.no_grad():
            for name, tensor in self._tensors(module).items():
                tensor.copy_(values[name])

    def undo(self, module: nn.Module) -> None:
        """Give the layers their own weights back, and take all else off."""
        for path, order in self._orders.items():
            layer = module.get_submodule(path)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for name in order:  # torch puts the weight behind the bias
                layer._parameters[name] = layer._parameters.pop(name)
            self.unmark(layer)
        self._orders = {}

    def merge(self, module: nn.Module) -> None:
        """Make the changed weights the layers' own, in place, and take all else off."""
        with torch.no_grad():
            merged = self._merged(module)
            self.undo(module)
            for name, weight in merged.items():
                module.get_parameter(name).copy_(weight)

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return what the change trains: A and B of each layer."""
        return [tensor for name, tensor in self._tensors(module).items() if not name.endswith(".weight")]

    def state(self) -> dict[str, Any]:
        """Return the rank and the paths of the layers; :meth:`restore` takes what :meth:`values` returns instead."""
        return {"rank": self.rank, "layers": list(self._orders)}

    def values(self, module: nn.Module) -> dict[str, Tensor]:
        """Return copies of the layers' own weights (``"PATH.weight"``), A (``"PATH.down"``) and B (``"PATH.up"``)."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors(module).items()}

    def plain_state(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's state dict as it will be once the change is merged, with the names that it has then."""
        places = tuple(f"{path}.parametrizations.weight." for path in self._orders)
        plain = {name: value for name, value in state.items() if not name.startswith(places)}
        plain |= self._merged(module)
        return {name: plain[name] for name in self._names if name in plain} | plain

    def _merged(self, module: nn.Module) -> dict[str, Tensor]:
        layers: dict[str, Any] = {path: module.get_submodule(path) for path in self._orders}
        return {f"{path}.weight": layer.weight.detach() for path, layer in layers.items()}

    def _tensors(self, module: nn.Module) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for path in self._orders:
            place: Any = module.get_submodule(path).parametrizations
            original, pair = place["weight"].original, place["weight"][0]
            found |= {f"{path}.weight": original, f"{path}.down": pair.down, f"{path}.up": pair.up}
        return found


class _Pair(nn.Module):
    """A and B of one layer."""

    def __init__(self, path: str, weight: Tensor, rank: int) -> None:
        super().__init__()
        columns = weight[0].numel()
        first = torch.rand(rank, columns, generator=generator(crc32(path.encode())))
        self.down = nn.Parameter(((2 * first - 1) / math.sqrt(columns)).to(weight))
        self.up = nn.Parameter(torch.zeros(len(weight), rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        # in the weight's own precision also where autocast would round, so that what is merged is what was trained
        with torch.autocast(weight.device.type, enabled=False):
            change: Tensor = self.up @ self.down
            return weight + change.view_as(weight)
