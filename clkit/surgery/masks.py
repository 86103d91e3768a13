"""Masks on the user's layers: which have one, the mark that others see, and all else of the network by task."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clkit.errors import ConfigurationError, StateError, did_you_mean
from clkit.schema import Many, Named, Numbers, Table, read_state
from clkit.surgery.change import Change

__all__ = ["Masks", "SideState", "maskable_weights", "refuse_lazy"]

MASKED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ANY = Numbers((...,), None, any_value=True)  # buffers of any kind, and a network that diverged may be saved, too
_TABLE: Table = {"heads": Named(_ANY), "tasks": Many(Named(_ANY))}


def maskable_weights(module: nn.Module, heads: Collection[str], exclude: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the weights of linear and convolutional layers by name, each shared one once.

    Chosen by type: norms, biases, embeddings and tables have no mask. Nor has a layer that the user froze, which is to
    stay as it is.

    Args:
        module: The user's module.
        heads: Dotted paths of layers that are left out with all inside them.
        exclude: Patterns of paths that are left out, as a shell matches file names: ``"network.stem*"``.

    Raises:
        ConfigurationError: If a path or pattern is that of no layer, or a layer computes its weight from others.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(maskable_weights(network, heads=["3"]))
        ['0.weight']
    """
    layers = dict(module.named_modules())
    for path in heads:
        if path not in layers:
            raise ConfigurationError(f"the module has no layer {path!r} to be a head{did_you_mean(path, layers)}")
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path in layers):
            raise ConfigurationError(
                f"exclude={pattern!r} matches no layer of the module{did_you_mean(pattern, layers)}"
            )
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, layer in layers.items():
        inside = any(path == head or path.startswith(f"{head}.") for head in heads)
        if not isinstance(layer, MASKED) or inside or any(fnmatchcase(path, pattern) for pattern in exclude):
            continue
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ConfigurationError(
                f"the layer {path!r} computes its weight from other tensors (pruning, a parametrization), so no mask "
                "can move in it; make that permanent first (torch.nn.utils.prune.remove), or leave the layer out "
                f"(exclude=[{path!r}])"
            )
        if weight.requires_grad and weight.data_ptr() not in storages:
            storages.add(weight.data_ptr())
            found[f"{path}.weight" if path else "weight"] = weight
    return found


def refuse_lazy(module: nn.Module, owner: str) -> None:
    """Refuse a module some of whose layers have no weights yet, since nothing has run through them.

    Raises:
        ConfigurationError: Naming them and what to do.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise ConfigurationError(
            f"{owner} cannot mask {', '.join(lazy[:5])}{' and more' * (len(lazy) > 5)}: the sizes of lazy layers are "
            "known once a batch has run through the network, so run one before the fit, or give the layers their sizes"
        )


class Masks(Change):
    """The mark of masks on layers, for as long as a run moves them; the masks are a topology's.

    It holds no tensor, so a copy of a layer drags nothing along. Undone, layers keep the weights that they have: the
    sub-network that is shown.
    """

    noun = "mask"
    remedy = "leave one of the two out, or exclude the layer from the masks"

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self._paths: list[str] = []

    def apply(self, module: nn.Module, weights: Iterable[str]) -> None:
        """Mark the layers of these weights, or raise a ConfigurationError where another change holds one."""
        paths = [name.removesuffix("weight").removesuffix(".") for name in weights]
        layers = [self.claim(module, path) for path in paths]
        for layer in layers:
            self.mark(layer)
        self._paths = paths

    restore = apply

    def undo(self, module: nn.Module) -> None:
        """Take every mark off."""
        for path in self._paths:
            self.unmark(module.get_submodule(path))
        self._paths = []

    def state(self) -> dict[str, Any]:
        """Return nothing: what is masked, and how, is saved by the topology."""
        return {}


class SideState:
    """Everything of a module but its masked weights, as each task ended with it: norms, biases, tables, heads.

    Without it the output of an earlier task would move though none of its masked weights did. Tensors that a task did
    not change are kept once.

    Args:
        heads: Dotted paths of layers that each task begins with as they were before the first.
    """

    def __init__(self, heads: Iterable[str]) -> None:
        self.heads = list(heads)
        self._first: dict[str, Tensor] = {}  # values of the heads before the first task
        self._tasks: list[dict[str, Tensor]] = []

    def begin(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the heads their first values for a new task, and return their tensors."""
        own = {name: each for name, each in tensors.items() if self.is_head(name)}
        if not self._tasks and not self._first:
            self._first = {name: each.detach().clone() for name, each in own.items()}
        self._write(own, self._first)
        return list(own.values())

    def end(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a task ended with."""
        earlier = self._tasks[-1] if self._tasks else {}
        self._tasks.append({name: _shared(each, earlier.get(name)) for name, each in tensors.items()})

    @contextmanager
    def activated(self, tensors: Mapping[str, Tensor], task: int) -> Iterator[None]:
        """Have what a finished task ended with in these tensors inside the block, and what was there afterwards."""
        wanted = self._tasks[task]
        live = {name: each.detach().clone() for name, each in tensors.items() if name in wanted}
        self._write(tensors, wanted)
        try:
            yield
        finally:
            self._write(tensors, live)

    def is_head(self, name: str) -> bool:
        """Whether a tensor belongs to a head."""
        return any(name.startswith(f"{head}.") for head in self.heads)

    def of(self, task: int) -> dict[str, Tensor]:
        """Return what a finished task ended with."""
        return dict(self._tasks[task])

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {"heads": dict(self._first), "tasks": [dict(each) for each in self._tasks]}

    @classmethod
    def loaded(cls, state: Any, heads: Iterable[str], owner: str) -> SideState:
        """Return one that goes on from a saved state, or raise a StateError."""
        saved = read_state(state, _TABLE, owner)
        made = cls(heads)
        made._first, made._tasks = saved["heads"], saved["tasks"]
        if any(each.keys() != made._tasks[0].keys() for each in made._tasks):
            raise StateError(f"{owner}: tasks of the saved state hold other tensors; the file is damaged")
        return made

    def __len__(self) -> int:
        return len(self._tasks)

    @staticmethod
    @torch.no_grad()
    def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        odd = [name for name, value in values.items() if name not in tensors or tensors[name].shape != value.shape]
        if odd:
            raise ConfigurationError(
                f"the network's tensors are not those that earlier tasks ended with: they differ in {sorted(odd)[:5]}"
            )
        for name, value in values.items():
            tensors[name].copy_(value)


def _shared(tensor: Tensor, earlier: Tensor | None) -> Tensor:
    """Return a copy of a tensor, or the earlier one of the same bits."""
    value = tensor.detach()
    if earlier is not None and earlier.shape == value.shape and torch.equal(earlier.to(value.device), value):
        return earlier
    return value.clone()
