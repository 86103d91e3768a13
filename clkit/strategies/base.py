"""The base of clkit's strategies: plain Lightning on one device, DDP on several."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clkit._lightning import keep_samplers
from clkit.batch import BatchReader
from clkit.boundaries import Boundaries
from clkit.checkpoint_io import protect_checkpoints
from clkit.errors import ArgumentError, ConfigurationError
from clkit.processes import together

__all__ = ["LearningStrategy"]


class LearningStrategy(DDPStrategy):
    """A strategy that says in one method how a batch becomes a loss, on one device or many.

    With one device it runs in the process itself, bit for bit as ``strategy="auto"``: no launcher, no process group,
    no wrapper. With several devices or nodes it is Lightning's DDP. Subclasses override :meth:`training_step` and
    follow the stream by ``on_experience_start``, ``on_experience_phase`` and ``on_experience_end``.

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
    """

    warmup_epochs: int = 0
    trains_module: bool = True
    stream_rows: slice | None = None

    def __init__(self, *, batch_reader: BatchReader | None = None, **ddp_options: Any) -> None:
        if ddp_options.get("find_unused_parameters"):
            raise ConfigurationError(
                "find_unused_parameters=True cannot be combined with a clkit strategy: parts of a step run outside the "
                "wrapped module; leave it out"
            )
        known = [*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters]
        for name in ddp_options:
            if name not in known:
                near = get_close_matches(name, [*signature(type(self)).parameters, *known], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(f"{type(self).__name__} has no argument {name!r}{hint}")
        super().__init__(**ddp_options)
        self.batch_reader = batch_reader

    # ---- one device: the process itself

    @property
    def single_device(self) -> bool:
        """Whether the run has one process in all."""
        return self.num_nodes * self.num_processes <= 1

    def _configure_launcher(self) -> None:
        if not self.single_device:
            super()._configure_launcher()

    def connect(self, model: pl.LightningModule) -> None:
        """Takes the user's module; checkpoints are written and read whole from now on."""
        super().connect(model)
        protect_checkpoints(self)

    def setup_distributed(self) -> None:
        """Starts the process group; on one device only the ranks are set."""
        if self.single_device:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def _setup_model(self, model: nn.Module) -> Any:
        return model if self.single_device else super()._setup_model(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepares the module; on one device as the simplest of Lightning's strategies does."""
        if self.single_device:
            keep_samplers(trainer)
            Strategy.setup(self, trainer)
        else:
            super().setup(trainer)

    # ---- several devices: a process that is lost is said in words, not in those of the backend

    def barrier(self, *args: Any, **options: Any) -> None:
        """Waits for all processes.

        Raises:
            ProcessLostError: If one of them died.
        """
        with together("that they are there"):
            super().barrier(*args, **options)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Gives all processes what one of them has.

        Raises:
            ProcessLostError: If one of them died.
        """
        with together("what one of them has"):
            return super().broadcast(obj, src)

    def reduce(self, *args: Any, **options: Any) -> Any:
        """Sums or averages over all processes.

        Raises:
            ProcessLostError: If one of them died.
        """
        with together("a value"):
            return super().reduce(*args, **options)

    # ---- following the stream: a strategy is one of the parts that notice boundaries

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def on_train_start(self) -> None:
        """Lets the trainer's boundaries look at a resumed run."""
        assert self.lightning_module is not None
        Boundaries.of(self._trainer).on_train_start(self._trainer, self.lightning_module)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Notices the start of an experience where no callback follows the stream."""
        assert self.lightning_module is not None
        Boundaries.of(self._trainer).on_train_batch_start(self._trainer, self.lightning_module)

    def on_validation_start(self) -> None:
        """Notices the end of an experience where no callback follows the stream."""
        assert self.lightning_module is not None
        Boundaries.of(self._trainer).on_validation_start(self._trainer, self.lightning_module)

    def on_train_end(self) -> None:
        """Notices the end of an experience where no callback follows the stream."""
        assert self.lightning_module is not None
        Boundaries.of(self._trainer).on_train_end(self._trainer, self.lightning_module)
