r"""Dynamic sparse training: one sparse sub-network per task in weights of fixed size, past ones kept to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods._checks import check_count
from clkit.methods._connections import Growth, Prune, PruneSchedule, unpack
from clkit.methods._densities import Initial, layer_counts, layer_densities
from clkit.methods._sparse_layer import AT_REST, Components, SparseLayer, described
from clkit.methods._sparse_saved import FORMAT, TaskReport, read_topology, stand_ins

__all__ = ["Growth", "Initial", "Prune", "PruneSchedule", "SparseTopology", "TaskReport"]

Reuse = Literal["random", "prefer_free", "none", "all"]
Setting = TypeVar("Setting")
PerTask: TypeAlias = Setting | Callable[[int], Setting]
"""A setting, or a function of the task's index that returns it."""


class SparseTopology:
    r"""Masks over weight tensors whose topology moves while a task trains, and which stay for ever when it ends.

    During task t each weight W holds the active sub-network and exact zeros elsewhere, so that autograd gives the dense
    gradient. Connections of earlier tasks may be *reused*: read, and held to the bit. The *bank* B has the last value
    of each position over all tasks; positions that no task ever trained have their first one. A training loop calls
    :meth:`begin_task`, then for each step :meth:`after_backward`, ``optimizer.step()`` and :meth:`after_step`, and
    :meth:`end_task`. It has no speed to offer on dense hardware: zeros are multiplied like other numbers.

    Args:
        weights: Parameters by name. Their order is that of the layers; the first is the input's.
        density: Share of all connections that are active in a task, in (0, 1]; like most components it may be a
            function of the task's index.
        initial: How it is shared out among layers: a rule of :class:`Initial` or the object.
        prune: Which connections leave: a rule of :class:`Prune` or the object.
        growth: Which connections come: a rule of :class:`Growth` or the object.
        schedule: When, and how many: a rule of :class:`PruneSchedule` or the object.
        reuse: Where a new mask is drawn: ``"random"`` anywhere, ``"prefer_free"`` among unused positions first,
            ``"none"`` among these only (disjoint masks), ``"all"`` among these, and all used ones join.
        grow_from: ``"free"`` grows unused positions, ``"any"`` also used ones, which then have their learned value.
        fresh_init: What positions that no task trained start with: ``"original"`` their first value, ``"zeros"``, or
            ``"rescaled"``, the first value divided by the root of the layer's density.
        on_capacity: With ``reuse="none"`` and too few unused positions: ``"raise"``, ``"reuse"`` used ones, or
            ``"shrink"`` the mask.
        pattern: ``"2:4"`` allows at most two active connections of each four inputs of a linear layer whose width is a
            multiple of four, for GPUs; it needs ``grow_from="any"`` or ``prune=Prune(scope="free")``, and does not
            go with ``reuse="all"``.
        seed: Of all draws, at least 0. They do not depend on the global random state, the device or the process.

    Raises:
        ArgumentError: If a value is not allowed; when a task begins, if its density cannot be reached.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 8))
        >>> topology = SparseTopology({"weight": weight}, density=0.25)
        >>> topology.begin_task(steps=10)
        >>> int(weight.count_nonzero())
        8
        >>> topology.end_task()

    Source: Yildirim et al., arXiv 2308.14831.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        density: PerTask[float] = 0.1,
        *,
        initial: PerTask[Initial | str] = "auto",
        prune: PerTask[Prune | str] = "magnitude",
        growth: PerTask[Growth | str] = "gradient",
        schedule: PerTask[PruneSchedule | str] = "cosine",
        reuse: PerTask[Reuse] = "random",
        grow_from: PerTask[Literal["free", "any"]] = "free",
        fresh_init: Literal["original", "zeros", "rescaled"] = "original",
        on_capacity: Literal["raise", "reuse", "shrink"] = "raise",
        pattern: Literal["2:4"] | None = None,
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        check_arguments(SparseTopology, given)
        if not weights:
            raise ArgumentError("weights must name at least one tensor, got none")
        self._given = {name: given[name] for name in (*Components._fields, "seed")}
        self.seed = check_count("seed", seed, at_least=0)
        self.task = -1  # the one that trains, or trained last
        self.running = False
        self.step = self.steps = 0  # optimizer steps done in the task, and planned
        self._masks: list[dict[str, Tensor]] = []  # of finished tasks, as bits
        self._reports: list[TaskReport] = []
        self._live: dict[str, Tensor] = {}  # the weights, while a block shows those of another task
        self._shown: int | None = None  # the finished task whose sub-network the weights hold, while none trains
        self._layers = {name: SparseLayer.of(name, weight) for name, weight in weights.items()}
        self._chosen = Components.of_task(self._given, 0)  # a wrong value is known now, not after the first task
        self._counts(self._chosen)

    @property
    def tasks(self) -> int:
        """Number of finished tasks."""
        return len(self._masks)

    @property
    def reports(self) -> list[TaskReport]:
        """What each task took, the one that trains included."""
        return [*self._reports, *([self._report()] if self.running else [])]

    @property
    def shown(self) -> int | None:
        """The task whose sub-network the weights hold: the one that trains, or a finished one; ``None`` before all."""
        return self.task if self.running else self._shown

    @property
    def names(self) -> list[str]:
        """The names of the weights, in their order."""
        return list(self._layers)

    @property
    def schedule(self) -> PruneSchedule:
        """That of the task that trains or trained last."""
        return self._chosen.schedule

    def locked(self) -> list[str]:
        """Return the names of weights in which the running task can train nothing."""
        return [name for name, layer in self._layers.items() if bool(layer.blocked.all())]

    @property
    def device(self) -> torch.device:
        """Where masks and values lie."""
        return next(iter(self._layers.values())).bank.device

    def densities(self, task: int) -> dict[str, float]:
        """Return the active share of each layer in a finished task or the one that trains."""
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.mask(task).items()}

    def layer_use(self) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Return the share of each layer that each finished task was the first to take, and that in the last's mask."""
        taken: list[dict[str, float]] = []
        used = {name: torch.zeros_like(layer.mask) for name, layer in self._layers.items()}
        for task in range(self.tasks):
            masks = self.mask(task)
            taken.append({name: int((mask & ~used[name]).sum()) / mask.numel() for name, mask in masks.items()})
            used = {name: used[name] | mask for name, mask in masks.items()}
        return taken, self.densities(self.tasks - 1)

    # ---- a task

    def begin_task(self, steps: int) -> None:
        """Draw the masks of the next task and load its sub-network into the weights.

        Args:
            steps: Optimizer steps that are planned for it, at least 1; the schedule needs them.

        Raises:
            ArgumentError: If the density cannot be reached with what is free; nothing is changed then.
            ConfigurationError: If a task still trains.
        """
        if self.running:
            raise ConfigurationError(f"task {self.task} still trains: call end_task() first")
        check_count("steps", steps)
        task, layers = self.task + 1, list(self._layers.values())
        try:
            chosen = Components.of_task(self._given, task)
            masks = [
                layer.drawn(chosen, count, (self.seed, task, index))
                for index, (layer, count) in enumerate(zip(layers, self._counts(chosen), strict=True))
            ]
        except ArgumentError as error:
            raise ArgumentError(f"task {task} cannot begin: {error}") from error
        self.task, self.running, self.step, self.steps = task, True, 0, steps
        self._chosen, self._shown = chosen, None
        for layer, mask in zip(layers, masks, strict=True):
            layer.begin(chosen, mask, first=task == 0)

    def after_backward(self) -> None:
        """Keep what growth needs of the dense gradients, and leave only those of trained connections.

        Call it once an optimizer step, before gradients are clipped.
        """
        due, kept = self._needs()
        for layer in self._layers.values():
            layer.after_backward(due or kept)

    def after_step(self, *optimizers: torch.optim.Optimizer) -> bool:
        """Undo what a step did to connections that are not trained, and move the topology where that is due.

        Args:
            optimizers: All that train the weights, elementwise ones; their state becomes 0 where nothing is trained.

        Returns:
            Whether an update was due.

        Raises:
            ArgumentError: If weights or gradients that have to be ranked are not finite.
        """
        due, kept = self._needs()
        known = all(AT_REST & {kind.__name__ for kind in type(each).__mro__} for each in optimizers)
        for layer in self._layers.values():
            layer.hold(optimizers, moved=not known)
        self.step += 1
        for index, layer in enumerate(self._layers.values()):
            if kept:
                layer.remember(self._chosen.growth)
            if due:
                fraction = self._chosen.schedule.fraction_at(self.step, self.steps)
                layer.move(self._chosen, fraction, (self.seed, self.task, index, self.step))
                layer.forget(optimizers)
                if self._chosen.growth.rule == "gradient":
                    layer.memory = None
            layer.gradient = None
        return due

    def clean(self, *optimizers: torch.optim.Optimizer) -> None:
        """Put weights that the task does not train, and what optimizers remember of them, to what they have to be."""
        for layer in self._layers.values():
            layer.hold(optimizers)

    def end_task(self) -> None:
        """Keep the task's sub-network for ever; it stays loaded.

        Raises:
            ConfigurationError: If no task trains, something else than the optimizer changed weights of other tasks, or
                weights are not finite.
        """
        self._check_running()
        self.check()
        for name, layer in self._layers.items():
            if not bool(torch.isfinite(layer.weight.detach()).all()):
                raise ConfigurationError(
                    f"task {self.task} diverged: weights of {name!r} are not finite, so it is not kept. Earlier tasks "
                    "are as they were: go on from a checkpoint, with a smaller learning rate or clipped gradients"
                )
        self._reports.append(self._report())
        self._masks.append({name: layer.end() for name, layer in self._layers.items()})
        self.running, self._shown = False, self.task

    def check(self) -> None:
        """Raise a ConfigurationError if a weight that the task does not train is not what it has to be."""
        for name, layer in self._layers.items():
            if not layer.held():
                raise ConfigurationError(
                    f"{name!r}: something else than an optimizer's step changed weights that task {self.task} does not "
                    "train. What earlier tasks have learned is safe in the topology's own copy: show(task) loads it"
                )

    # ---- sub-networks of finished tasks

    def show(self, task: int) -> None:
        """Load the sub-network of a finished task into the weights; none may train.

        Raises:
            ArgumentError: If the task did not finish.
            ConfigurationError: If a task trains.
        """
        bits = self._mask_of(task)
        if self.running:
            raise ConfigurationError(f"task {self.task} trains, and its weights would be lost: use activated({task})")
        for name, layer in self._layers.items():
            layer.load(layer.sub_network(bits[name]))
        self._shown = task

    @contextmanager
    def activated(self, task: int) -> Iterator[None]:
        """Have the sub-network of a task in the weights inside the block, and bitwise what was there afterwards.

        Raises:
            ArgumentError: If the task neither finished nor trains.
        """
        if task == self.shown and not self._live:
            yield
            return
        bits = self._mask_of(task)
        if self._live:
            raise ConfigurationError(f"task {task} cannot be shown inside of a block of another: leave that first")
        live = self._live = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                layer.load(layer.sub_network(bits[name]))
            yield
        finally:
            self._live = {}
            for name, layer in self._layers.items():
                layer.load(live[name])

    def mask(self, task: int) -> dict[str, Tensor]:
        """Return the bool mask of each weight in a finished task or the one that trains."""
        if self.running and task == self.task:
            return {name: layer.mask.clone() for name, layer in self._layers.items()}
        bits = self._mask_of(task)
        return {name: unpack(bits[name], layer.mask) for name, layer in self._layers.items()}

    def export(self, task: int) -> dict[str, Tensor]:
        """Return the dense weights of a finished task, with zeros where there is no connection."""
        bits = self._mask_of(task)
        return {name: layer.sub_network(bits[name]) for name, layer in self._layers.items()}

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the live weights: tensors and plain types, masks as bits."""
        layers = {
            name: {**layer.state(), "masks": [bits[name] for bits in self._masks]}
            for name, layer in self._layers.items()
        }
        return {
            "format": FORMAT,
            "settings": described(self._given),
            "task": self.task,
            "running": self.running,
            "step": self.step,
            "steps": self.steps,
            "shown": self._shown,
            "reports": [list(report) for report in self._reports],
            "layers": layers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; live weights come with the network's own state.

        Raises:
            StateError: If it does not fit these weights and settings, or is damaged; nothing is changed then.
        """
        saved = read_topology(state, self._layers, self._given, type(self).__name__)
        chosen = Components.of_task(self._given, max(0, saved["task"]))
        self.task, self.running, self.step = saved["task"], saved["running"], saved["step"]
        self.steps, self._shown, self._chosen = saved["steps"], saved["shown"], chosen
        self._reports = [TaskReport(*each) for each in saved["reports"]]
        saved_masks = {name: each["masks"] for name, each in saved["layers"].items()}
        self._masks = [{name: bits[at].cpu() for name, bits in saved_masks.items()} for at in range(len(self._reports))]
        for name, layer in self._layers.items():
            layer.restore(saved["layers"][name], running=self.running)

    @classmethod
    def restored(cls, state: Any, **settings: Any) -> SparseTopology:
        """Return one of a saved state, whose weights are to be bound; raises as :meth:`load_state_dict`."""
        weights = stand_ins(state, cls.__name__)
        try:
            made = cls(weights, **settings)
            made.load_state_dict(state)
        except ArgumentError as error:
            raise StateError(f"{cls.__name__}: the saved layers do not fit these settings: {error}") from error
        return made

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Follow the weights to other objects or another device; names and shapes stay.

        Raises:
            ConfigurationError: If names or shapes are others.
        """
        own = {name: tuple(layer.weight.shape) for name, layer in self._layers.items()}
        new = {name: tuple(weight.shape) for name, weight in weights.items()}
        if own != new:
            odd = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))[:5]
            raise ConfigurationError(f"the network's layers are not those that have masks: they differ in {odd}")
        for name, layer in self._layers.items():
            layer.follow(weights[name])

    # ---- how it is done

    def _counts(self, chosen: Components) -> list[int]:
        initial = chosen.initial
        if chosen.pattern:  # of which no layer can have more than half
            initial = replace(initial, max_layer_density=min(0.5, initial.max_layer_density))
        weights = [layer.weight for layer in self._layers.values()]
        shares = layer_densities([tuple(weight.shape) for weight in weights], chosen.density, initial)
        return layer_counts([weight.numel() for weight in weights], shares, chosen.density, initial.min_per_layer)

    def _needs(self) -> tuple[bool, bool]:
        """Return whether the step in work ends with an update, and whether growth keeps something of its gradients."""
        self._check_running()
        schedule, growth, now = self._chosen.schedule, self._chosen.growth, self.step + 1
        following = -(-now // schedule.update_every) * schedule.update_every  # the next that may end with an update
        near = following - now < growth.accumulate and schedule.is_due(following, self.steps)
        return schedule.is_due(now, self.steps), growth.rule == "momentum" or (growth.rule == "gradient" and near)

    def _check_running(self) -> None:
        if not self.running:
            raise ConfigurationError("no task trains: call begin_task(steps) first")

    def _mask_of(self, task: int) -> dict[str, Tensor]:
        if not 0 <= task < self.tasks:
            raise ArgumentError(f"task {task} was not trained to its end; {self.tasks} tasks were, counted from 0")
        return self._masks[task]

    def _report(self) -> TaskReport:
        layers = self._layers.values()
        total = sum(layer.mask.numel() for layer in layers)
        active = sum(layer.count for layer in layers)
        nonzero = sum(int(self._live.get(name, each.weight).count_nonzero()) for name, each in self._layers.items())
        reused = sum(int((layer.mask & layer.used).sum()) for layer in layers)
        free = sum(int((~(layer.used | layer.mask)).sum()) for layer in layers)
        explored = sum(int(layer.fired.sum()) for layer in layers) / total
        return TaskReport(self.task, self._chosen.density, total, active, nonzero, reused, free, explored)
