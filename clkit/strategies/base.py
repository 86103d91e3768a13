"""The base of clkit's strategies: plain Lightning on one device, DDP on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clkit.distributed import report_lost_process
from clkit.errors import ArgumentError, ConfigurationError, StateError, did_you_mean
from clkit.features.batch import BatchReader
from clkit.models.layout import refuse_unsafe_layout
from clkit.schema import STRATEGY, check_format, saved_entry
from clkit.stream import resume
from clkit.stream._lightning import in_step, keep_samplers, trained_batches
from clkit.stream.boundaries import Boundaries
from clkit.stream.checkpoint_io import protect_checkpoints

__all__ = ["LearningStrategy"]

FORMAT = 1


class LearningStrategy(DDPStrategy):
    """A strategy that says in one method how a batch becomes a loss, on one device or many.

    With one device it runs in the process itself, bit for bit as ``strategy="auto"``: no launcher, no process group,
    no wrapper. With several devices or nodes it is Lightning's DDP. Subclasses override :meth:`training_step` and
    follow the stream by ``on_experience_start``, ``on_experience_phase`` and ``on_experience_end``.

    A strategy may train a module of its own beside the user's (a projector): it says in :meth:`make_part` how to build
    it. The part is one object for the strategy's life, a child of the user's module while a fit runs, trained by the
    user's optimizer, and never among the keys of the user's own state. What else a strategy has learned it gives in
    :meth:`stream_state`; a whole checkpoint holds both, a weights-only one neither.

    What it learns of a batch beside the weights it takes up in :meth:`on_batch_learned`, and not before: a checkpoint
    that is written when a step fails or is interrupted then has nothing of the batch, which a resume is given again.

    Args:
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        ddp_options: Keyword arguments of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        ArgumentError: For an argument that neither the strategy nor DDP has.
        ConfigurationError: For ``find_unused_parameters=True``, which fails with several processes.

    Attributes:
        warmup_epochs: Epochs of the first experience that train the network before the strategy's own way begins.
        trains_module: Whether the strategy trains the user's network by gradient.
        stream_rows: Which rows of a forward are the batch's own, where a strategy runs more rows than that.
        augments_stream: Whether a strategy changes the batch's images before they go through the network.
        skips_unlabelled: Whether rows of the label -1 do not go through the network.
        part: The strategy's own module, once there is one.
        part_name: The name of the user's module under which it trains.
    """

    warmup_epochs: int = 0
    trains_module: bool = True
    stream_rows: slice | None = None
    augments_stream: bool = False
    skips_unlabelled: bool = False
    part: nn.Module | None = None
    part_name: str = ""

    def __init__(self, *, batch_reader: BatchReader | None = None, **ddp_options: Any) -> None:
        if ddp_options.get("find_unused_parameters"):
            raise ConfigurationError(
                "find_unused_parameters=True cannot be combined with a clkit strategy: parts of a step run outside the "
                "wrapped module; leave it out"
            )
        known = [*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters]
        for name in ddp_options:
            if name not in known:
                hint = did_you_mean(name, [*signature(type(self)).parameters, *known])
                raise ArgumentError(f"{type(self).__name__} has no argument {name!r}{hint}")
        super().__init__(**ddp_options)
        self.batch_reader = batch_reader
        self._boundaries = Boundaries()  # replaced by the trainer's own in `setup`
        self._begun = -1  # batches that were done when the forward of the one in work began
        self._updated = -1  # the same when its update began
        self._learned = -1  # the same when the strategy learned it
        self._stepping = False

    @property
    def state_key(self) -> str:
        """Whose state a checkpoint holds; a strategy of another key does not take it up."""
        return type(self).__qualname__

    # ---- one device: the process itself

    @property
    def single_device(self) -> bool:
        """Whether the run has one process in all."""
        return self.num_nodes * self.num_processes <= 1

    def _configure_launcher(self) -> None:
        if not self.single_device:
            super()._configure_launcher()

    def connect(self, model: pl.LightningModule) -> None:
        """Take the user's module; checkpoints are written and read whole from now on."""
        super().connect(model)
        protect_checkpoints(self)

    def setup_distributed(self) -> None:
        """Start the process group; on one device only the ranks are set."""
        if self.single_device:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def _setup_model(self, model: nn.Module) -> Any:
        return model if self.single_device else super()._setup_model(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepare the module; on one device as the simplest of Lightning's strategies does."""
        if trainer.state.fn == "fit":
            self._boundaries = Boundaries.join(trainer, self._boundaries)
            self._attach_part(trainer)
            self._begun = self._updated = self._learned = -1
            if self.root_device.type == "cpu":
                assert self.lightning_module is not None
                refuse_unsafe_layout(self.lightning_module)
        if self.single_device:
            keep_samplers(trainer)
            Strategy.setup(self, trainer)
        else:
            super().setup(trainer)

    def teardown(self) -> None:
        """Lets go of the user's module."""
        super().teardown()
        self._detach_part()

    # ---- a part of its own

    def make_part(self, trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module | None:
        """Return the strategy's own trainable module, asked for once; ``None`` where it needs none."""
        return None

    def _attach_part(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if self.part is None:
            self.part = self.make_part(trainer, module)
        if self.part is None:
            return
        if getattr(module, self.part_name, self.part) is not self.part:
            raise ConfigurationError(
                f"{type(module).__name__} has an attribute {self.part_name!r}, the name under which "
                f"{type(self).__name__} trains a part of its own; rename it"
            )
        module.add_module(self.part_name, self.part)

    def _detach_part(self) -> None:
        module = self.lightning_module
        if module is not None and self.part is not None and self.part_name in module._modules:
            delattr(module, self.part_name)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the user's optimizers; parameters of the strategy's own part that they leave out join the first group.

        Raises:
            ConfigurationError: If there is a part to train and no optimizer.
        """
        super().setup_optimizers(trainer)
        if self.part is None:
            return
        known = self._check_optimizers()
        missing = [parameter for parameter in self.part.parameters() if id(parameter) not in known]
        if missing:
            # not a group of its own: schedulers exist by now, and know how many groups there are
            self.optimizers[0].param_groups[0]["params"].extend(missing)
            rank_zero_info(
                f"clkit: configure_optimizers() leaves out {type(self).__name__}'s {self.part_name} "
                f"({len(missing)} tensors); the first parameter group of its optimizer trains them too"
            )

    def _check_optimizers(self) -> set[int]:
        """Return the objects that the user's optimizers train, by their ids.

        Raises:
            ConfigurationError: If nothing of the module is among them. Where ``configure_optimizers`` gives none,
                Lightning makes an optimizer of a tensor of its own.
        """
        module = self.lightning_module
        assert module is not None
        known = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in known for parameter in module.parameters()):
            raise ConfigurationError(
                f"{type(self).__name__} trains by gradient, and configure_optimizers() of {type(module).__name__} "
                "gives no optimizer of its parameters"
            )
        return known

    # ---- one batch

    def on_batch_learned(self) -> None:
        """Learn what a batch leaves beside its gradient; called once a batch.

        Where the user's ``optimizer_step`` runs the closure itself, or steps by hand, this comes after the first
        backward pass. The trainer counts the batch as done a little later, when the user's code has returned.
        """

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass; outside of a step of the optimizer it is the last thing that a batch needs."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if not self._stepping:
            self._learn()
        return loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the step, forward and backward pass within it."""

        def watched() -> Any:
            result = closure()
            self._updated = trained_batches(self._trainer)
            return result

        self._stepping = True
        try:
            output = super().optimizer_step(optimizer, watched, model, **kwargs)
        finally:
            self._stepping = False
        self._learn()
        return output

    def _learn(self) -> None:
        batches = trained_batches(self._trainer)
        if self._learned == batches:  # a second backward pass or step for the batch
            return
        self._learned = self._updated = batches  # first: an interrupt while the strategy learns leaves a part of it
        self.on_batch_learned()

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return what is learned beside the weights, as tensors and plain types; a call on all processes."""
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave.

        Raises:
            StateError: If it does not fit; nothing may be changed then.
        """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the user's own state, without the strategy's part."""
        state = super().lightning_module_state_dict()
        prefix = f"{self.part_name}."
        return {key: value for key, value in state.items() if not (self.part_name and key.startswith(prefix))}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what the strategy has learned to a whole checkpoint; a weights-only one stays the user's own."""
        if "optimizer_states" in checkpoint:
            assert self.lightning_module is not None
            resume.save(self._trainer, checkpoint)
            batches = trained_batches(self._trainer)
            cut = self._trainer.state.fn == "fit" and in_step(self._trainer) and self._begun == batches
            checkpoint[STRATEGY] = {
                "format": FORMAT,
                "strategy": self.state_key,
                "part": None if self.part is None else dict(self.part.state_dict()),
                "cut": cut,  # the forward of a batch has begun that comes again
                "cut_in_update": cut and self._updated == batches,
                **self.stream_state(),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; a fit goes on from it without losing or repeating a batch."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        if self._trainer.state.fn == "fit":
            resume.load(self._trainer, checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the user's module and, where a fit goes on, what the strategy had learned.

        Raises:
            StateError: If the saved state does not fit.
        """
        assert self.lightning_module is not None
        # Lightning casts the module (64-true, bf16-true) after loading: double weights would be rounded on the way
        self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._trainer.state.fn == "fit":
            self._load_state(checkpoint)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the user's optimizers.

        Raises:
            StateError: If the saved ones train another number of tensors, as those of a run without this strategy's
                part do.
        """
        if self.part is not None:
            own = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self.optimizers]
            saved = [
                [len(group["params"]) for group in state["param_groups"]] for state in checkpoint["optimizer_states"]
            ]
            if own != saved:
                raise StateError(
                    f"the optimizer of the checkpoint trains {saved} tensors (of each parameter group), that of this "
                    f"run {own}, with the {self.part_name} of {type(self).__name__}; to begin with the weights alone "
                    "load them into the module and leave ckpt_path out"
                )
        super().load_optimizer_state_dict(checkpoint)

    def _load_state(self, checkpoint: Mapping[str, Any]) -> None:
        trainer, module = self._trainer, self.lightning_module
        assert module is not None
        state = checkpoint.get(STRATEGY)
        owner = None if state is None else saved_entry(state, "strategy", str, STRATEGY)
        if state is None or owner != self.state_key:
            if type(self).stream_state is not LearningStrategy.stream_state:
                rank_zero_warn(
                    f"the checkpoint has no state for the strategy {self.state_key!r}"
                    f"{f', but for {owner!r}' if owner else ''}: it starts with nothing learned"
                )
            return
        check_format(state, FORMAT, self.state_key)
        saved = saved_entry(state, "part", dict | None, self.state_key)
        cut, in_update = (saved_entry(state, name, bool, self.state_key) for name in ("cut", "cut_in_update"))
        if self.part is None:
            self.part = self.make_part(trainer, module)
        if self.part is not None:
            self.part = self.precision_plugin.convert_module(self.part)
        if (saved is None) != (self.part is None):
            raise StateError(
                f"{self.state_key}: the saved state has {'no' if saved is None else 'a'} {self.part_name or 'part'}, "
                f"this strategy has {'none' if self.part is None else 'one'}; use the settings of the saved run"
            )
        self._check_part(saved)
        self.load_stream_state(state)
        if self.part is not None:
            self.part.load_state_dict(saved)
        if cut:
            twice = ", and counts twice as far as the optimizer and the strategy had learned it" if in_update else ""
            rank_zero_warn(
                f"the checkpoint was saved in the middle of a step: its batch comes again{twice}. What its forward "
                "changed in buffers of the network (running statistics) and drew at random is not taken back"
            )

    def _check_part(self, saved: Mapping[str, Any] | None) -> None:
        if self.part is None or saved is None:
            return
        own = {name: tuple(value.shape) for name, value in self.part.state_dict().items()}
        found = {str(name): tuple(getattr(value, "shape", ())) for name, value in saved.items()}
        if own != found:
            raise StateError(
                f"{self.state_key}: the saved {self.part_name} has tensors of shapes {found}, here they are {own}; use "
                "the network and the settings of the saved run"
            )
        spoiled = [name for name, value in saved.items() if not bool(value.isfinite().all())]
        if spoiled:
            raise StateError(
                f"{self.state_key}: the saved {self.part_name} has numbers that are not finite in {spoiled}; go on "
                "from an earlier checkpoint"
            )

    # ---- several devices: a process that is lost is said in words, not in those of the backend

    def barrier(self, *args: Any, **options: Any) -> None:
        """Wait for all processes.

        Raises:
            ProcessLostError: If one of them died.
        """
        with report_lost_process("that they are there"):
            super().barrier(*args, **options)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give all processes what one of them has.

        Raises:
            ProcessLostError: If one of them died.
        """
        with report_lost_process("what one of them has"):
            return super().broadcast(obj, src)

    def reduce(self, *args: Any, **options: Any) -> Any:
        """Sum or averages over all processes.

        Raises:
            ProcessLostError: If one of them died.
        """
        with report_lost_process("a value"):
            return super().reduce(*args, **options)

    # ---- following the stream: a strategy is one of the parts that notice boundaries

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def on_train_start(self) -> None:
        """Take up what a resumed run left."""
        module = self.lightning_module
        assert module is not None
        resume.begin(module.trainer, module)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notice the start of an experience where no callback follows the stream."""
        module = self.lightning_module
        assert module is not None
        self._boundaries.on_train_batch_start(module.trainer, module)
        self._begun = trained_batches(module.trainer) if self.trains_module and module.training else -1

    def on_validation_start(self) -> None:
        """Notice the end of an experience where no callback follows the stream."""
        module = self.lightning_module
        assert module is not None
        Boundaries.of(module.trainer).on_validation_start(module.trainer, module)

    def on_train_end(self) -> None:
        """Notice the end of an experience where no callback follows the stream."""
        module = self.lightning_module
        assert module is not None
        self._boundaries.on_train_end(module.trainer, module)
