"""One module, a network for each task: masks on its weights, and all else as the task ended with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clkit.arguments import in_short
from clkit.errors import ArgumentError, ConfigurationError, StateError, TapError
from clkit.features.tap import FeatureTap, path_of
from clkit.methods import SparseTopology, TaskReport
from clkit.methods._sparse_saved import saved_sub_network
from clkit.methods._state import exact
from clkit.schema import Instance, Many, Named, Nested, OneOf, Table, Whole, read_state, saved_entry
from clkit.surgery.masks import Masks, SideState, maskable_weights, refuse_lazy

__all__ = ["SavedTask", "TaskNetworks", "find_heads", "task_of_state"]

_TIMM: Table = {
    "model_name": Instance(str),
    "kwargs": Named(Instance(object)),
    "objects": Many(Instance(str)),  # names of further arguments, which no file can hold
    "num_classes": Whole(),
    "small_images": OneOf((False, True)),
}
_ABOUT: Table = {
    "network": Instance(str),
    "timm": Instance(dict | None),
    "classes": Many(Whole()),
    "class_ids": Many(Whole()),
    "class_names": Many(Instance(str)),
    "preprocessing": Instance(object),
}


class TaskNetworks:
    """The networks of all tasks in one module, of which one is shown at a time.

    Args:
        owner: Whose they are, for messages.
        settings: Those of the :class:`~clkit.methods.SparseTopology`.
    """

    def __init__(self, owner: str, settings: dict[str, Any]) -> None:
        self.owner = owner
        self.topology: SparseTopology | None = None
        self._block: tuple[int, ExitStack] | None = None  # the task that is shown for a while, and how to end that
        self._users = 0  # of it: evaluations end in any order
        self._settings = settings
        self._side = SideState([])
        self._keys: dict[str, str] = {}  # of the module's state dict, with the name under which a tensor is kept here
        self.about: list[dict[str, Any]] = []  # what somebody who gets the weights of each task has to know
        self._module: nn.Module | None = None
        self._taken_up = False  # whether the heads come from a saved state, and no module was asked for them yet
        self._apart: nn.Module | None = None  # a part of the module that is no part of its networks
        self._marks = Masks(owner)

    @property
    def known(self) -> SparseTopology:
        """The topology, or else a ConfigurationError."""
        if self.topology is None:
            raise ConfigurationError(f"{self.owner} has no masks yet; fit first, or load a checkpoint")
        return self.topology

    @property
    def tasks(self) -> int:
        """Number of finished tasks."""
        return 0 if self.topology is None else self.topology.tasks

    @property
    def reports(self) -> list[TaskReport]:
        """What each task took, the one that trains included."""
        return [] if self.topology is None else self.topology.reports

    @property
    def heads(self) -> list[str]:
        """Dotted paths of the layers that each task begins anew."""
        return self._side.heads

    @property
    def module(self) -> nn.Module | None:
        """The module that has the masks, once there is one."""
        return self._module

    @property
    def is_away(self) -> bool:
        """Whether the module has the network of another task than its own for a while."""
        return self._block is not None

    # ---- the module

    def attach(
        self, module: nn.Module, apart: nn.Module | None, head: str | Sequence[str], exclude: Sequence[str]
    ) -> None:
        """Choose the layers that have masks, or find them again in a module, and mark them.

        Args:
            module: The user's module.
            apart: A part of it that belongs to somebody else, if there is one.
            head: See :class:`~clkit.callbacks.DST`.
            exclude: Likewise.
        """
        self._apart = apart
        with torch.inference_mode(False):  # what an evaluation makes must serve the next training too
            if self.topology is None:
                refuse_lazy(module, self.owner)
                heads = find_heads(module, head)
                weights = maskable_weights(module, [*heads, *([path_of(module, apart)] if apart else [])], exclude)
                for path in heads:
                    part = module.get_submodule(path)
                    if next(part.parameters(), None) is None:
                        raise ConfigurationError(
                            f"{self.owner} was given the head {path!r}, a {type(part).__name__} that has no weights; "
                            "name the layer that gives the logits"
                        )
                if not weights:
                    raise ConfigurationError(
                        f"{self.owner} finds no linear or convolutional layer to mask beside the head {heads}; name "
                        "another head (head=…), or exclude less"
                    )
                self.topology, self._side = SparseTopology(weights, **self._settings), SideState(heads)
            elif self._taken_up:
                self._require_saved_heads(find_heads(module, head))
            self._bind(module)
            self._taken_up = False
        self._marks.undo(module)
        self._marks.apply(module, self.known.names)

    def _require_saved_heads(self, heads: list[str]) -> None:
        """Refuse heads that a saved run had not: they would be ignored."""
        if sorted(heads) != sorted(self.heads):
            raise StateError(
                f"{self.owner}: settings: head must be {heads}, the saved state has {self.heads}; use the settings of "
                "the saved run"
            )

    def detach(self, module: nn.Module) -> None:
        """Take the marks off the layers."""
        self._marks.undo(module)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the masked weights of a module, or raise a ConfigurationError where one is missing."""
        own = dict(module.named_parameters(remove_duplicate=False))
        missing = [name for name in self.known.names if name not in own]
        if missing:
            raise ConfigurationError(
                f"the module has no {missing[:5]}, which {self.owner} has masks of; use the network of the first fit"
            )
        return {name: own[name] for name in self.known.names}

    def others(self, module: nn.Module, *, heads: bool = True) -> dict[str, Tensor]:
        """Return all parameters and buffers of a module that have no mask, by name, with or without its heads."""
        masked = {id(weight) for weight in self.weights(module).values()}
        if self._apart is not None:
            masked |= {id(tensor) for tensor in (*self._apart.parameters(), *self._apart.buffers())}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {
            name: tensor
            for name, tensor in tensors.items()
            if id(tensor) not in masked and (heads or not self._side.is_head(name))
        }

    def _bind(self, module: nn.Module) -> None:
        own = self.weights(module)
        if module is not self._module or any(weight.device != self.known.device for weight in own.values()):
            self.known.bind(own)
            self._module = module

    # ---- tasks

    def begin(self, module: nn.Module, steps: int, optimizers: Iterable[Optimizer]) -> None:
        """Draw the masks of the next task, load its sub-network, and give its heads a beginning."""
        self.known.begin_task(steps)
        heads = self._side.begin(self.others(module))
        self.known.clean(*optimizers)
        for optimizer in optimizers:  # what is remembered of a head belongs to that of the last task
            for tensor in heads:
                for value in optimizer.state.get(tensor, {}).values():
                    if isinstance(value, Tensor) and value.ndim and value.shape == tensor.shape:
                        value.zero_()

    def end(self, module: nn.Module, about: dict[str, Any]) -> None:
        """Keep the task's network for ever, and what is ``about`` it, in plain values."""
        self.known.end_task()
        self.about.append(about)
        others = self.others(module)
        self._side.end(others)
        known = {id(tensor): name for name, tensor in {**self.weights(module), **others}.items()}
        saved = module.state_dict(keep_vars=True).items()  # not all buffers are in it, and shared weights are twice
        self._keys = {key: known[id(tensor)] for key, tensor in saved if id(tensor) in known}

    @contextmanager
    def shown(self, task: int, module: nn.Module | None = None) -> Iterator[None]:
        """Have the network of a task in the module inside the block, and bitwise what was there afterwards.

        Raises:
            ArgumentError: If the task was not trained.
        """
        _check_index(task)
        module = module or self._module
        if self.topology is None:
            raise self._none_such(task)
        if module is None:
            raise ArgumentError(
                f"{self.owner} was loaded and no run has had its module yet; give the module whose networks they are: "
                f"activate({task}, module)"
            )
        self._bind(module)
        if self._block is None and task == self.topology.shown:
            yield
            return
        if self._block is None:
            with ExitStack() as entering:
                entering.enter_context(self.topology.activated(task))
                entering.enter_context(self._side.activated(self.others(module), task))
                self._block = task, entering.pop_all()
        elif self._block[0] != task:
            raise ConfigurationError(
                f"{self.owner} shows task {self._block[0]} now; leave that block before task {task}"
            )
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                (_, ending), self._block = self._block, None
                ending.close()

    @contextmanager
    def shown_if_trained(self, task: int) -> Iterator[None]:
        """Have the network of a task in the module inside the block, the present one if it was not trained."""
        topology = self.topology
        if topology is None or not (task < self.tasks or task == topology.shown):
            yield
            return
        with self.shown(task):
            yield

    def alone(self, task: int) -> dict[str, Tensor]:
        """Return the connections of a finished task that no other has: what may change and leave the others be."""
        topology = self.known
        own = topology.mask(task)
        for other in range(topology.tasks):
            if other != task:
                own = {name: own[name] & ~mask for name, mask in topology.mask(other).items()}
        return own

    def take(self, task: int) -> None:
        """Keep the weights as they are now for those of a finished task, where it is :meth:`alone`."""
        with exact():
            for name, own in self.alone(task).items():
                layer = self.known._layers[name]  # whose values nobody else changes once a task is over
                layer.bank.copy_(torch.where(own, layer.weight.detach(), layer.bank))

    def export(self, task: int) -> dict[str, Tensor]:
        """Return the state dict of a finished task's network, dense, on the CPU, or raise an ArgumentError."""
        _check_index(task)
        if self.topology is None:
            raise self._none_such(task)
        values = {**self.topology.export(task), **self._side.of(task)}
        return {key: values[name].detach().cpu() for key, name in self._keys.items()}

    def _none_such(self, task: int) -> ArgumentError:
        return ArgumentError(f"task {task} was not trained to its end; 0 tasks were, counted from 0")

    # ---- state

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values; the module's own weights are saved with the module."""
        topology = None if self.topology is None else self.topology.state_dict()
        side = self._side
        plain = {"heads": list(side.heads), "keys": dict(self._keys), "about": [dict(each) for each in self.about]}
        return {"topology": topology, "side": side.state(), **plain}

    def load(self, state: Any) -> None:
        """Take up a saved state, or raise a StateError; nothing is changed then."""
        saved = saved_entry(state, "topology", dict | None, self.owner)
        heads = saved_entry(state, "heads", Many(Instance(str)), self.owner)
        keys = saved_entry(state, "keys", Named(Instance(str)), self.owner)
        about = _read_about(state, self.owner)
        side = SideState.loaded(saved_entry(state, "side", dict, self.owner), heads, f"{self.owner}: 'side'")
        topology = None if saved is None else SparseTopology.restored(saved, **self._settings)
        finished = 0 if topology is None else topology.tasks
        if not len(side) == len(about) == finished:
            raise StateError(
                f"{self.owner}: the saved state has side states of {len(side)} tasks, words about {len(about)} and "
                f"masks of {finished}; the file is damaged"
            )
        kept = {*(topology.names if topology else ()), *(side.of(-1) if finished else ())}
        if not kept.issuperset(keys.values()):
            raise StateError(f"{self.owner}: the saved state names tensors that it does not hold; the file is damaged")
        self.topology, self._side, self._module, self._keys, self.about = topology, side, None, keys, about
        self._taken_up = topology is not None


def _check_index(task: Any) -> None:
    if not isinstance(task, int) or isinstance(task, bool):
        raise ArgumentError(f"task must be the index of a task, an integer from 0, got {in_short(task)}")


def find_heads(module: nn.Module, head: str | Sequence[str]) -> list[str]:
    """Return the dotted paths of the heads; with ``"auto"`` those of the classifier that the tap finds, if any."""
    if head != "auto":
        return [head] if isinstance(head, str) else list(head)
    try:
        with FeatureTap(module) as tap:
            if tap.classifier is not None:
                return [path_of(module, tap.classifier)]
            return [path_of(module, layer) for branch in tap.branches for layer in branch]
    except TapError:
        return []


class SavedTask(NamedTuple):
    """The network of a task out of a saved state."""

    weights: dict[str, Tensor]  # its state dict
    density: float  # share of the connections of masked layers that it has
    nonzero: float  # share that is not 0: a connection comes with 0, and may have had no gradient since
    about: dict[str, Any]  # what somebody who gets the weights has to know


def task_of_state(state: Any, task: int, owner: str) -> SavedTask:
    """Return the network of a task out of a saved state, whatever the settings were.

    Raises:
        ArgumentError: If the task did not finish.
        StateError: If the state is damaged.
    """
    saved = saved_entry(state, "topology", dict | None, owner)
    if saved is None:
        raise TaskNetworks(owner, {})._none_such(task)
    weights, density = saved_sub_network(saved, task, owner)
    nonzero = sum(int(each.count_nonzero()) for each in weights.values()) / sum(
        each.numel() for each in weights.values()
    )
    side = SideState.loaded(saved_entry(state, "side", dict, owner), [], f"{owner}: 'side'")
    keys, about = saved_entry(state, "keys", Named(Instance(str)), owner), _read_about(state, owner)
    values = {**weights, **(side.of(task) if task < len(side) else {})}
    missing = sorted(set(keys.values()) - values.keys())
    if missing or task >= len(about):
        what = missing[:5] or "words"
        raise StateError(f"{owner}: the saved state does not hold {what} of task {task}; the file is damaged")
    return SavedTask({key: values[name].clone() for key, name in keys.items()}, density, nonzero, about[task])


def _read_about(state: Any, owner: str) -> list[dict[str, Any]]:
    about: list[dict[str, Any]] = saved_entry(state, "about", Many(Nested(_ABOUT)), owner)
    for each in about:
        if each["timm"] is not None:
            read_state(each["timm"], _TIMM, f"{owner}: 'timm' of 'about'")
    return about
