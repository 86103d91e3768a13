"""The base of clkit's strategies: plain Lightning on one device, DDP on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clkit.arguments import check_arguments
from clkit.errors import ConfigurationError, StateError, refuse_unknown_arguments
from clkit.features.batch import BatchReader, Readings
from clkit.features.repeats import mark_repeats
from clkit.models.memory_layout import refuse_unsafe_layout
from clkit.schema import FLOATS, STRATEGY, Instance, Numbers, OneOf, Table, read_own, read_state, saved_entry
from clkit.strategies._collectives import SpokenDDP
from clkit.strategies._company import IN_CLKIT, Misfits, refuse_misfits, refuse_other_optimizers
from clkit.stream import resume
from clkit.stream._lightning import callbacks_of, in_step, keep_samplers, trained_batches
from clkit.stream.boundaries import Boundaries
from clkit.stream.checkpoint_io import protect_checkpoints
from clkit.stream.entering import check_ends

__all__ = ["LearningStrategy"]

FORMAT = 1
_TABLE: Table = {
    "format": OneOf((FORMAT,)),
    "strategy": Instance(str),
    "projector": Instance(dict | None),
    "cut": OneOf((False, True)),
}
_PROJECTOR = "replay_projector"  # its name in the user's module


class LearningStrategy(SpokenDDP):
    """A strategy that says in one method how a batch becomes a loss, on one device or many.

    With one device it runs in the process itself, bit for bit as ``strategy="auto"``; with several devices or nodes it
    is Lightning's DDP. Subclasses override :meth:`training_step` and follow the stream by ``on_experience_start``,
    ``on_experience_phase`` and ``on_experience_end``.

    A strategy may train a projector beside the user's network: :meth:`make_projector` builds it. While a fit runs that
    is a child of the user's module, trained by the user's optimizer, and never among the keys of the user's own state.
    What else a strategy has learned it gives in :meth:`stream_state`; a whole checkpoint holds both, a weights-only one
    neither. It learns in :meth:`on_batch_learned` and not before: a checkpoint that is written when a step fails then
    has nothing of the batch, which a resume is given again.

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
        projector: The strategy's own module; ``None`` before the first fit and where it needs none.
    """

    warmup_epochs: int = 0
    trains_module: bool = True
    stream_rows: slice | None = None
    augments_stream: bool = False
    skips_unlabelled: bool = False
    projector: nn.Module | None = None
    _module: pl.LightningModule

    def __init__(self, *, batch_reader: BatchReader | None = None, **ddp_options: Any) -> None:
        check_arguments(LearningStrategy, locals())
        if ddp_options.get("find_unused_parameters"):
            raise ConfigurationError(
                "find_unused_parameters=True cannot be combined with a clkit strategy: parts of a step run outside the "
                "wrapped module; leave it out"
            )
        of_ddp = [*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters]
        refuse_unknown_arguments(type(self), ddp_options, of_ddp)
        super().__init__(**ddp_options)
        self._given = self._last = self._accelerator, self._precision_plugin  # `_last` is of the last run's trainer
        self.batch_reader = batch_reader
        self._boundaries = Boundaries()  # replaced by the trainer's own in `setup`
        self._begun = self._learned = -1  # batches that were done when the one in work began, and was learned
        self._stepping = False

    @property
    def state_key(self) -> str:
        """Whose state a checkpoint holds; a strategy of another key does not take it up."""
        return type(self).__qualname__

    # ---- one trainer after another: Lightning takes what a strategy holds for what the user has set, and refuses it

    @property
    def accelerator(self) -> Any:
        """That of the trainer, also between its runs."""
        return self._accelerator or self._last[0]

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    @property
    def precision_plugin(self) -> Any:
        """That of the trainer, also between its runs."""
        return self._precision_plugin or self._last[1] or Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Any) -> None:
        self._precision_plugin = precision_plugin

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
        self._module = model
        protect_checkpoints(self)

    @property
    def misfits(self) -> Misfits:
        """Callbacks of Lightning that are refused beside the strategy, each with the reason."""
        return IN_CLKIT

    def setup_environment(self) -> None:
        """Refuse what cannot work, before Lightning's own callbacks begin to."""
        trainer = self._module.trainer
        refuse_misfits(self, callbacks_of(trainer), self.misfits if trainer.state.fn == "fit" else IN_CLKIT)
        super().setup_environment()

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
        check_ends(trainer)
        if trainer.state.fn == "fit":
            self._boundaries = Boundaries.join(trainer, self._boundaries)
            self._attach_projector()
            self._begun = self._learned = -1
            if self.root_device.type == "cpu":
                refuse_unsafe_layout(self._module)
        if self.single_device:
            keep_samplers(trainer)
            Strategy.setup(self, trainer)
        else:
            super().setup(trainer)

    def teardown(self) -> None:
        """Let go of the user's module, and be free for another trainer."""
        super().teardown()
        self._last = self.accelerator, self.precision_plugin
        self._accelerator, self._precision_plugin = self._given
        module = self.lightning_module
        if module is not None and self.projector is not None and _PROJECTOR in module._modules:
            delattr(module, _PROJECTOR)

    # ---- a projector of its own

    def make_projector(self, module: pl.LightningModule) -> nn.Module | None:
        """Return the strategy's own trainable module, asked for once; ``None`` where it needs none."""
        return None

    def _attach_projector(self) -> None:
        module, self.projector = self._module, self.projector or self.make_projector(self._module)
        if self.projector is None:
            return
        if getattr(module, _PROJECTOR, self.projector) is not self.projector:
            raise ConfigurationError(
                f"{type(module).__name__} has an attribute {_PROJECTOR!r}, the name under which "
                f"{type(self).__name__} trains a projector of its own; rename it"
            )
        module.add_module(_PROJECTOR, self.projector)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the user's optimizers; parameters of the projector that they leave out join the first group."""
        super().setup_optimizers(trainer)
        if self.projector is None:
            return
        known = self._check_optimizers()
        missing = [parameter for parameter in self.projector.parameters() if id(parameter) not in known]
        if missing:
            # not a group of its own: schedulers exist by now, and know how many groups there are
            self.optimizers[0].param_groups[0]["params"].extend(missing)
            rank_zero_info(
                f"clkit: configure_optimizers() leaves out {type(self).__name__}'s {_PROJECTOR} ({len(missing)} "
                "tensors); the first parameter group of its optimizer trains them too"
            )

    def _check_optimizers(self) -> set[int]:
        """Return the ids of what the user's optimizers train, something of the module among them.

        Where ``configure_optimizers`` gives no optimizer, Lightning makes one of a tensor of its own.
        """
        module = self._module
        known = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in known for parameter in module.parameters()):
            raise ConfigurationError(
                f"{type(self).__name__} trains by gradient, and configure_optimizers() of {type(module).__name__} "
                "gives no optimizer of its parameters"
            )
        return known

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizers train, by name: the module's parameters."""
        return dict(self._module.named_parameters())

    # ---- one batch

    def read_batch(self, batch: Any) -> tuple[Any, Tensor]:
        """Return inputs and targets (B,) of a training batch, as the strategy's or the run's ``batch_reader`` has them.

        Raises:
            BatchError: If it has another form; the message says what was seen.
        """
        trainer = self._module.trainer
        inputs, targets = Readings.of(trainer).read(self, batch)
        assert targets is not None
        if trainer.world_size > 1:
            targets = mark_repeats(trainer, trainer.train_dataloader, trainer.fit_loop.batch_idx, targets)
        return inputs, targets

    def on_batch_learned(self) -> None:
        """Learn what a batch leaves beside its gradient; called once a batch.

        Where the user's ``optimizer_step`` runs the closure itself, or steps by hand, it is called after the first
        backward pass.
        """

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass; outside of a step of the optimizer it is the last thing that a batch needs."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if not self._stepping:
            self._learn()
        return loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the step, forward and backward pass within it."""
        self._stepping = True
        try:
            output = super().optimizer_step(optimizer, closure, *args, **kwargs)
        finally:
            self._stepping = False
        self._learn()
        return output

    def _learn(self) -> None:
        batches = trained_batches(self._module.trainer)
        if self._learned == batches:  # a second backward pass or step for the batch
            return
        self._learned = batches  # first: an interrupt while the strategy learns leaves a part of it
        self.on_batch_learned()

    # ---- state

    @property
    def has_state(self) -> bool:
        """Whether checkpoints hold what the strategy learns; where one that is loaded does not, it is said."""
        return type(self).stream_state is not LearningStrategy.stream_state

    def stream_state(self) -> dict[str, Any]:
        """Return what is learned beside the weights, as tensors and plain types; a call on all processes."""
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave.

        Raises:
            StateError: If it does not fit; nothing may be changed then.
        """

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the user's own state, without the projector."""
        state = super().lightning_module_state_dict()
        if self.projector is None:
            return state
        return {key: value for key, value in state.items() if not key.startswith(f"{_PROJECTOR}.")}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add what the strategy has learned to a whole checkpoint; a weights-only one stays the user's own."""
        if "optimizer_states" in checkpoint:
            trainer = self._module.trainer
            resume.save(trainer, checkpoint)
            cut = trainer.state.fn == "fit" and in_step(trainer) and self._begun == trained_batches(trainer)
            checkpoint[STRATEGY] = {
                "format": FORMAT,
                "strategy": self.state_key,
                "projector": None if self.projector is None else dict(self.projector.state_dict()),
                "cut": cut,  # the forward of a batch has begun that comes again
                **self.stream_state(),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; a fit goes on from it without losing or repeating a batch."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        if self._module.trainer.state.fn == "fit":
            resume.load(self._module.trainer, checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the user's module and, where a fit goes on, what the strategy had learned."""
        # Lightning casts the module (64-true, bf16-true) after loading: double weights would be rounded on the way
        self.precision_plugin.convert_module(self._module)
        weights = checkpoint["state_dict"]
        if self.projector is not None and _PROJECTOR in self._module._modules:  # a tuner restores in mid-fit
            weights = {**weights, **self.projector.state_dict(prefix=f"{_PROJECTOR}.")}
        super().load_model_state_dict({**checkpoint, "state_dict": weights}, strict=strict)
        if self._module.trainer.state.fn == "fit":
            self._load_state(checkpoint.get(STRATEGY))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the user's optimizers; those that train something else are a :class:`StateError`."""
        extra = "" if self.projector is None else f", with its {_PROJECTOR}"
        refuse_other_optimizers(f"{self.state_key!r}", self.optimizers, checkpoint, extra)
        super().load_optimizer_state_dict(checkpoint)

    def _load_state(self, state: Any) -> None:
        owner = None if state is None else saved_entry(state, "strategy", str, STRATEGY)
        if owner != self.state_key:
            if self.has_state:
                rank_zero_warn(
                    f"the checkpoint has no state for the strategy {self.state_key!r}"
                    f"{f', but for {owner!r}' if owner else ''}: it starts with nothing learned"
                )
            return
        saved = read_own(state, _TABLE, self.state_key)
        self.projector = self.projector or self.make_projector(self._module)
        if self.projector is not None:
            self.projector = self.precision_plugin.convert_module(self.projector)
        self._check_projector(saved["projector"])
        self.load_stream_state(state)
        if self.projector is not None:
            self.projector.load_state_dict(saved["projector"])
        if saved["cut"]:
            rank_zero_warn(
                "the checkpoint was saved in the middle of a step: its batch comes again, and counts twice as far as "
                "the optimizer and the strategy had learned it. What its forward changed in buffers of the network "
                "(running statistics) and drew at random is not taken back"
            )

    def _check_projector(self, saved: dict[str, Any] | None) -> None:
        if (saved is None) != (self.projector is None):
            raise StateError(
                f"{self.state_key}: the saved state has {'no' if saved is None else 'a'} {_PROJECTOR}, this strategy "
                f"has {'none' if self.projector is None else 'one'}; use the settings of the saved run"
            )
        if self.projector is not None:
            table = {name: Numbers(tuple(own.shape), FLOATS) for name, own in self.projector.state_dict().items()}
            try:
                read_state(saved, table, f"{self.state_key}: {_PROJECTOR}")
            except StateError as error:
                raise StateError(f"{error}; use the network and the settings of the saved run") from error

    # ---- following the stream, also where no callback does

    def on_train_start(self) -> None:
        """Take up what a resumed run left."""
        resume.begin(self._module.trainer, self._module)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notice the start of an experience."""
        module = self._module
        self._boundaries.on_train_batch_start(module.trainer, module)
        self._begun = trained_batches(module.trainer) if self.trains_module and module.training else -1

    def on_validation_start(self) -> None:
        """Notice the end of an experience."""
        Boundaries.of(self._module.trainer).on_validation_start(self._module.trainer, self._module)

    def on_train_end(self) -> None:
        """Notice the end of an experience."""
        module = self._module
        self._boundaries.on_train_end(module.trainer, module)
