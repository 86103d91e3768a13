"""DST: each task trains its own sparse sub-network of one network, and every earlier one stays as it is to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clkit.arguments import check_arguments
from clkit.callbacks._brought import BroughtClasses
from clkit.callbacks._masking_rules import check_neighbours, optimizer_of
from clkit.callbacks._shown_tasks import ShowsTasks
from clkit.callbacks._sparse_tasks import (
    about_task,
    hold_norms,
    planned_steps,
    require_agreement,
    require_known_steps,
    say_given_tasks,
    say_shared_head,
    say_task_goes_on,
    say_task_is_another,
    say_what_begins,
    set_classes,
    show_tasks,
)
from clkit.distributed import share_buffers
from clkit.errors import ConfigurationError
from clkit.methods import Growth, Initial, Prune, PruneSchedule, SparseTopology, TaskReport
from clkit.methods._checks import check_count
from clkit.methods.sparse import Reuse
from clkit.schema import Settings, saved_entry
from clkit.stream.boundaries import BoundaryPhase
from clkit.stream.experience import Experience
from clkit.surgery.mask_forms import MaskForm, in_form, refuse_other_tensors
from clkit.surgery.task_networks import TaskNetworks

__all__ = ["DST"]

_SHARED = ("density", "initial", "prune", "growth", "schedule", "reuse", "grow_from", "fresh_init", "on_capacity")


class DST(ShowsTasks):
    r"""Trains a sparse sub-network of the user's network for each task, and keeps every earlier one to the bit.

    Choose it where the task of a sample is known when it is predicted, nothing may be forgotten at all, and no sample
    may be kept. A mask chooses connections of all linear and convolutional layers but the head; while a task trains,
    weak ones leave and others come. When it ends, its weights are frozen for ever; later tasks may read them, and train
    only what no task has. Norms, biases and the head are kept for each task. A fit without a stream is one task, and
    with that plain RigL or SET. Zeros are multiplied like other numbers, so a step is not faster than a dense one.

    A checkpoint holds all tasks; the module's own weights in it are those of one sub-network. Evaluations of a
    :class:`~clkit.data.StreamDataModule` show each sample the sub-network of its own task, so use a scenario that
    gives the task, such as :class:`~clkit.data.TaskIncremental`.

    Args:
        density: Share of the connections that a task uses, in (0, 1]. This and what follows up to ``grow_from`` may
            also be a function of the task's index.
        initial: How the density is shared out: ``"erk"``, ``"uniform"``, ``"auto"`` (ERK from 0.2 on), or an
            :class:`~clkit.methods.Initial`, which also caps layers.
        prune: What leaves: ``"magnitude"``, ``"set"``, ``"taylor"``, ``"mest"``, or a :class:`~clkit.methods.Prune`.
        growth: What comes: ``"gradient"`` (RigL), ``"random"`` (SET), ``"momentum"`` (SNFS), ``"unfired"`` (ITOP), or
            a :class:`~clkit.methods.Growth`.
        schedule: When and how much: ``"cosine"``, ``"rigl"``, ``"constant"``, ``"linear"``, ``"power"``, or a
            :class:`~clkit.methods.PruneSchedule`, which also says how many steps there are between updates.
        reuse: Where a new mask is drawn; see :class:`~clkit.methods.SparseTopology`, also for the next four.
        grow_from: ``"free"`` grows unused connections, ``"any"`` also used ones, with their learned value.
        fresh_init: What connections that no task trained begin with.
        on_capacity: What happens with ``reuse="none"`` where too few connections are unused.
        pattern: ``"2:4"`` for GPUs that compute with two of four; with ``grow_from="any"``, or an own ``prune``, and
            not with ``reuse="all"``.
        side_state: What of all else a task may train: ``"per_task"`` all of it; ``"freeze_after_first"`` nothing but
            the head once the first task is over, and norms keep its statistics.
        head: Dotted paths of the layers that each task begins anew and keeps to itself; ``"auto"`` is the classifier
            that :class:`~clkit.FeatureTap` finds. With an empty list no layer is: the classifier gets a mask like all
            others, as in plain RigL, and all tasks share it.
        exclude: Patterns of layers that get no mask, as a shell matches file names; they are kept for each task.
        steps_per_task: Optimizer steps that a task is planned to have; by default as the trainer and the data say.
        table: Whether to print a line for each task at its end.
        seed: Of all draws, at least 0.

    Raises:
        ArgumentError: If a value is not allowed; when a task begins, if its density cannot be reached.
        ConfigurationError: When a fit begins: for an optimizer that is not elementwise, or fused with
            ``"16-mixed"``; a strategy that splits or does not train the network; another callback that masks or
            averages weights; or if the number of steps is not known. Nothing that was learned is lost by it.

    Example:
        >>> from clkit.callbacks import DST
        >>> DST(density=lambda task: 0.2 if task == 0 else 0.1, growth="random").state_key
        'DST'

    Reference:
        M. O. Yildirim et al., "Continual Learning with Dynamic Sparse Training: Exploring Algorithms for Effective
        Model Updates", CPAL 2024, arXiv 2308.14831. Single-task rules: U. Evci et al., "Rigging the Lottery", ICML
        2020, arXiv 1911.11134 (RigL); D. C. Mocanu et al., Nature Communications 9, 2018, arXiv 1707.04780 (SET).
    """

    boundary_phase = BoundaryPhase.MASK

    def __init__(
        self,
        density: float | Callable[[int], float] = 0.1,
        *,
        initial: str | Initial | Callable[[int], Any] = "auto",
        prune: str | Prune | Callable[[int], Any] = "magnitude",
        growth: str | Growth | Callable[[int], Any] = "gradient",
        schedule: str | PruneSchedule | Callable[[int], Any] = "cosine",
        reuse: Reuse | Callable[[int], Any] = "random",
        grow_from: Literal["free", "any"] | Callable[[int], Any] = "free",
        fresh_init: Literal["original", "zeros", "rescaled"] = "original",
        on_capacity: Literal["raise", "reuse", "shrink"] = "raise",
        pattern: Literal["2:4"] | None = None,
        side_state: Literal["per_task", "freeze_after_first"] = "per_task",
        head: str | Sequence[str] = "auto",
        exclude: Sequence[str] = (),
        steps_per_task: int | None = None,
        table: bool = True,
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        check_arguments(DST, given)
        settings: dict[str, Any] = {name: given[name] for name in (*_SHARED, "pattern", "seed")}
        # a wrong value is known now, not after the first task
        SparseTopology({"weight": torch.empty(2**20, 2**20, device="meta")}, **settings)
        super().__init__(TaskNetworks(self.state_key, settings))
        self.side_state = side_state
        self.head = head
        self.exclude = exclude
        self.steps_per_task = None if steps_per_task is None else check_count("steps_per_task", steps_per_task)
        self.table = table
        self._optimizer: Optimizer | None = None  # the one that trains masked weights, in a fit
        self._hook: Any = None
        self._held: list[nn.Module] = []  # norms that were put into evaluation mode

    # ---- what the user reads and asks for

    @property
    def topology(self) -> SparseTopology:
        """The masks and weights of all tasks.

        Raises:
            ConfigurationError: Before a fit began or a checkpoint was loaded.
        """
        return self._networks.known

    @property
    def tasks(self) -> int:
        """Number of finished tasks."""
        return self._networks.tasks

    @property
    def reports(self) -> list[TaskReport]:
        """What each task took of the weights, the one that trains included."""
        return self._networks.reports

    def export(self, task: int) -> dict[str, Tensor]:
        """Return the state dict of a finished task's network: dense, with zeros where there is no connection.

        The module's own class loads it, without this library.

        Raises:
            ArgumentError: If the task did not finish.
        """
        return self._networks.export(task)

    def load_into(self, module: nn.Module, task: int, form: MaskForm = "dense") -> dict[str, str]:
        """Load a finished task's network into another module of the same class, in a form of torch's own.

        Args:
            module: The module, which then works without this library; not the one that is trained.
            task: Index of the task.
            form: ``"dense"``: zeros among the weights. ``"prune"``: as ``torch.nn.utils.prune`` leaves layers, and
                ``"fake_sparsity"``: as ``torch.ao.pruning`` has them, each with its mask. ``"semi_structured"``: linear
                layers with at most two of four weights as ``torch.sparse`` has them for GPUs of compute capability 8.0
                or newer, for inference; whether that is faster has to be measured. It allows float32 one of two, so
                load what ``pattern="2:4"`` has trained into ``module.half()``.

        Returns:
            Why, by the name of a layer that could not take ``"semi_structured"`` and is dense, it could not.

        Raises:
            ArgumentError: If the task did not finish.
            ConfigurationError: If the module is the one that has the masks, or has other tensors; it is then as it was.
        """
        if module is self._networks.module:
            raise ConfigurationError("load_into() needs another module of the same class; for this one use activate()")
        weights = self.export(task)
        refuse_other_tensors(module, weights, self.state_key)
        module.load_state_dict(weights)
        return in_form(module, self.topology.mask(task), form)

    # ---- what others may change

    def editable(self, task: int) -> dict[str, Tensor]:
        """Return where weights of a finished task may change, bool by name: its connections that no other task has.

        Raises:
            ArgumentError: If the task did not finish.
            ConfigurationError: If a task trains, or there are none yet.
        """
        if self.topology.running:
            raise ConfigurationError(
                f"task {self.topology.task} of {self.state_key} trains, and nothing else may change weights meanwhile; "
                "wait for the end of its experience"
            )
        return self._networks.alone(task)

    def take(self, task: int) -> None:
        """Keep the weights as they are now for those of a finished task, where :meth:`editable` says so."""
        self._networks.take(task)

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what masks cannot stand beside."""
        check_neighbours(self.state_key, trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the layers that get a mask, or find them again, and listen to the optimizer that trains them."""
        if self._chosen:
            raise ConfigurationError(f"{self.state_key}: no fit can begin inside of activate(); leave its block first")
        self._attach(trainer, pl_module)
        if self.steps_per_task is None:
            require_known_steps(self.state_key, trainer)
        self._optimizer = optimizer_of(self.state_key, trainer, self._networks.weights(pl_module))
        self._hook = self._optimizer.register_step_post_hook(self._after_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with a task that a resumed run left: its optimizer has what it remembers by now."""
        super().on_train_start(trainer, pl_module)
        if self.topology.running:
            self.topology.check()
            self.topology.clean(*trainer.optimizers)
            say_task_goes_on(self.state_key, trainer, self.topology)
        self._hold_side(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notice the start of an experience, and keep norms as they are where the user wants that."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._hold_side(pl_module)

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Draw the masks of a task and load its sub-network."""
        topology = self.topology
        if topology.running and experience.index == topology.task:  # an earlier fit was interrupted in it
            return
        if topology.running or experience.index != topology.tasks:
            raise ConfigurationError(
                f"experience {experience.index + 1} begins, and {self.state_key} has learned {topology.tasks} tasks"
                f"{' and is in the middle of one' * topology.running}: each experience is one task, in their order. "
                "Use a new callback for a new stream, and the checkpoint of this one to go on with it"
            )
        steps = self.steps_per_task or planned_steps(self.state_key, trainer)
        say_task_is_another(self.state_key, trainer, topology)
        self._networks.begin(pl_module, steps, trainer.optimizers)
        set_classes(trainer, pl_module, experience.classes)
        say_what_begins(self.state_key, topology, self._said)
        say_shared_head(self.state_key, trainer, self._networks, self._said)
        if topology.task == 1:
            say_given_tasks(self.state_key, trainer, self._said)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Leave only gradients of what the task trains, before they are clipped."""
        if optimizer is self._optimizer:
            self.topology.after_backward()
        if self._side_is_frozen():
            for tensor in self._networks.others(pl_module, heads=False).values():
                tensor.grad = None  # no step is taken, no decay, and DDP has had what it waits for

    def _after_step(self, optimizer: Optimizer, *args: Any) -> None:
        """Undo what a step did to weights that are not trained; a step that a scaler left out does not come here."""
        self.topology.after_step(optimizer)

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Keep the task's network for ever."""
        topology = self.topology
        if not topology.running:
            return
        if trainer.world_size > 1:
            share_buffers(trainer.strategy.model)
            require_agreement(self.state_key, topology)
        self._brought.share()
        known = self._networks.about[-1] if self.tasks else {}
        self._networks.end(pl_module, about_task(trainer, pl_module, experience, self._brought.classes(), known))
        show_tasks(trainer, self.reports, table=self.table)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers again where no fit has."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != "fit" and self._networks.topology is not None:
            self._attach(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hook off the optimizer and the marks off the layers."""
        super().teardown(trainer, pl_module, stage)
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._optimizer = None
        while self._held:
            self._held.pop().training = True

    # ---- how it is done

    def _attach(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        projector = getattr(trainer.strategy, "projector", None)  # a strategy's own part is not the user's
        self._networks.attach(module, projector, self.head, self.exclude)

    def _own_settings(self) -> dict[str, Any]:
        """Return what a saved run must share beside what its topology and its heads say."""
        return {"exclude": ", ".join(sorted({*self.exclude})), "side_state": self.side_state}

    def _side_is_frozen(self) -> bool:
        return self.side_state == "freeze_after_first" and self.tasks > 0

    def _hold_side(self, module: nn.Module) -> None:
        """Keep norms at the statistics of the first task, where the user wants that."""
        if self._side_is_frozen():
            self._held += hold_norms(module)

    def run_figures(self) -> dict[str, Any]:
        """Return the figure of what each task took of each layer, by name; it needs matplotlib."""
        if not self.tasks:
            return {}
        from clkit.report.run_figures import plot_layer_use

        figure, _ = plot_layer_use(*self.topology.layer_use())
        return {"layer_use": figure}

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return the masks, values and side states of all tasks, and which classes they trained."""
        return {**self._networks.state(), "brought": self._brought.state_dict(), "settings": self._own_settings()}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back; weights of the network come with the network's own state."""
        own = self._own_settings()
        kind = Settings(own, advice="use the settings of the saved run")
        saved_entry({"settings": own, **state}, "settings", kind, self.state_key)  # older files have none
        brought = BroughtClasses()
        brought.load_state_dict(saved_entry(state, "brought", dict, self.state_key), self.state_key)
        self._networks.load(state)
        self._brought = brought
        self._changes += 1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add where the run stands in its stream.

        Raises:
            ConfigurationError: If the module has the network of another task for the moment.
        """
        if self._networks.is_away:
            raise ConfigurationError(
                f"a checkpoint was to be saved while {self.state_key} shows the network of another task, whose weights "
                "would be in it; save it when the batch of the evaluation, or the block of activate(), is over"
            )
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
