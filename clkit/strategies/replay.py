"""The base of replay strategies: the memory, the single forward of a step, and the losses that a method takes on it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call

from clkit.arguments import check_arguments
from clkit.errors import ConfigurationError
from clkit.features.batch import BatchReader
from clkit.features.tap import evaluating
from clkit.methods._checks import check_count, generator
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.contrast import wide
from clkit.methods.replay.step import Block, StepBatch, StepOutputs, arrange, total_loss
from clkit.methods.replay.stored import MemoryRows
from clkit.schema import Instance, Many, Nested, Table, describe, is_same, read_own
from clkit.strategies._augmentation import Augmentation
from clkit.strategies._forward import Projection, SingleForward, StepWork, checked_batch
from clkit.strategies._memory import Counters, MemorySettings, ReplayMemory
from clkit.strategies.base import LearningStrategy
from clkit.stream._lightning import callbacks_of, is_logged
from clkit.stream.experience import Experience

__all__ = ["ReplayStrategy"]

# so that no two purposes of a step share their draws
SAMPLE, MIX, VIEWS, OFFSET, SECOND = range(5)


class ReplayStrategy(LearningStrategy):
    """Learns a stream in a single pass, with images of a small memory beside each batch; the base of such methods.

    Each step runs the incoming batch and images of the memory through the network, in one forward, and trains it by
    the losses of the method. The user's optimizer, schedule, precision, gradient clipping and accumulation apply;
    their ``training_step`` is not called. Prediction is the module's own classifier.

    **The loader must deliver images that are not augmented**: they are what the memory keeps. The strategy augments
    them itself, by ``transform``. A whole checkpoint contains the memory, that is, training images; a weights-only one
    does not.

    A method says in :meth:`views` which images go through the network, in :meth:`terms` what its losses are, in
    :meth:`retrieve` which rows are replayed, and by ``extra_names`` and :meth:`remember` what is kept beside an image.

    Logged under ``name``: ``er/loss``, each term, ``er/memory`` (rows in this process's memory) and, at the end of
    each experience, ``er/memory/class_3`` (rows of a class); nothing that the ``training_step`` logs. Values of a step
    are those of every ``log_every_n_steps``-th and of the last of an epoch, or of each where a callback or a schedule
    has one of them as its ``monitor``.

    With several processes the memory is that of one process fed with the batches of all, or each has a part of it for
    its own stream (``memory.scope="sharded"``); ``replay_batch`` is shared out. Losses are over each process's own
    rows, and gradients are averaged, unless ``gather="embeddings"``.

    Args:
        capacity: M, images kept; 0 for none.
        replay_batch: Most images retrieved from the memory in a step, over all processes.
        transform: Augments images; ``None`` for :class:`~clkit.methods.RandomViews`, ``torch.nn.Identity()`` for none.
            Another callable is given one image at a time, since most draw one set of parameters a call, unless it has
            an attribute ``per_sample`` that is true. It may draw from the global random states, which are restored.
        memory: How the images are kept.
        batch_norm: ``"segments"``: each group of views is normalised by its own statistics, as separate forward calls
            would; ``"joint"``: all together.
        gather: ``"embeddings"``: with several processes the losses are over the rows of all; ``None``: over their own.
        name: Prefix of what is logged; ``None`` for the strategy's ``state_key``.
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        seed: Of all draws of the strategy, at least 0; the global random states are left alone.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        ddp_options: Keyword arguments of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        ArgumentError: If an argument is not allowed.

    Attributes:
        projection: How the projector is built; ``None`` where no loss needs one.
        extra_names: Names of the tensors that the memory keeps with each image.
        segmented: Whether :meth:`views` may give more than one group.
        settings: What a checkpoint is compared with: options that change the method, as plain types.
        table: What the saved :meth:`stream_state` must look like; a method that adds to the state adds to it.
    """

    skips_unlabelled = True
    projection: Projection | None = None
    extra_names: ClassVar[tuple[str, ...]] = ()
    segmented: bool = True
    table: ClassVar[Table] = {
        "memory": Many(Instance(dict)),
        "counters": Nested(Counters.table),
        "settings": Instance(dict),
    }

    def __init__(
        self,
        capacity: int = 200,
        *,
        replay_batch: int = 64,
        transform: Callable[[Tensor], Any] | None = None,  # Any: the command line takes Tensor for a class to build
        memory: MemorySettings = MemorySettings(),
        batch_norm: Literal["segments", "joint"] = "segments",
        gather: Literal["embeddings"] | None = None,
        name: str | None = None,
        layer: str = "auto",
        seed: int = 0,
        batch_reader: BatchReader | None = None,
        **ddp_options: Any,
    ) -> None:
        check_arguments(ReplayStrategy, locals())
        super().__init__(batch_reader=batch_reader, **ddp_options)
        self.capacity = check_count("capacity", capacity, at_least=0)
        self.replay_batch = check_count("replay_batch", replay_batch)
        self.batch_norm = batch_norm
        self.gather = gather
        self.name = name or self.state_key
        self.layer = layer
        self.seed = check_count("seed", seed, at_least=0)
        self.memory_scope = memory.scope
        self.settings: dict[str, Any] = {}
        self.augmentation = Augmentation(transform)
        self.augments_stream = not self.augmentation.is_identity
        self._memory = ReplayMemory(capacity, memory, self.seed)
        self._ranks = self._memory.ranks
        self._counters = Counters()
        self._forward: SingleForward | None = None  # while a fit runs
        self._work: StepWork | None = None
        self._monitored = False  # whether a callback or a schedule of this fit asks for what is logged
        self._logs = False  # whether the batch in work logs
        self._said: set[str] = set()

    @property
    def memory(self) -> ReservoirBuffer | None:
        """What is kept of the stream, of one's own stream where the memory is sharded; ``None`` for capacity 0."""
        return self._memory.rows

    # ---- the method

    @abstractmethod
    def views(self, batch: StepBatch) -> Sequence[Mapping[str, Block]]:
        """Return the images that go through the network, as named blocks; those of one mapping are normalised together.

        Images are augmented, but for :attr:`Block.plain <clkit.methods.replay.step.Block.plain>`.
        """

    @abstractmethod
    def terms(self, outputs: StepOutputs) -> Mapping[str, tuple[float, Tensor]]:
        """Return each loss by name with its weight, from what the network gave for the blocks of :meth:`views`."""

    def retrieve(self, new: Block, count: int, generator: torch.Generator) -> MemoryRows:
        """Return the ``count`` rows of the memory that are replayed beside the incoming batch: some at random.

        All is drawn from the generator, which is in the same state in all processes that have the same memory.
        """
        assert self.memory is not None
        return self.memory.sample(count, generator)

    def look(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's logits for some images in evaluation mode and without a trace; for :meth:`retrieve`.

        ``weights``, by the names of ``lightning_module.named_parameters()``, are used in place of the module's.
        """
        module = self._module
        with self.precision_plugin.forward_context(), evaluating(module):
            return wide(functional_call(module, dict(weights or {}), (images,)))

    def replay_count(self, classes_seen: int) -> int:
        """Return how many rows a step asks of the memory, over all processes; asked where it has some."""
        return self.replay_batch

    def remember(self, outputs: StepOutputs) -> Mapping[str, Tensor]:
        """Return what the memory keeps with each incoming image, called once a batch on all processes."""
        return {}

    def logged(self) -> Mapping[str, float]:
        """Return what is logged of a step beside its losses."""
        return {}

    # ---- before and after the loops

    @property
    def forwarded(self) -> tuple[Tensor, Tensor] | None:
        """What the step in work runs through the network: all images (N, …), and their labels (N,) on the host."""
        return None if self._work is None else (self._work.views.images, self._work.views.all_labels)

    def make_projector(self, module: pl.LightningModule) -> nn.Module | None:
        """Return the embedding beside the classifier, D to p; ``None`` where no loss needs it."""
        return None if self.projection is None else self.projection.build(module, self.layer, self.seed)

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepare the module for replay; a :class:`ConfigurationError` says why it cannot be trained so."""
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        self._memory.share_out()
        module = self._module
        self._tell_once(
            "step",
            f"clkit: {type(self).__name__} computes the training loss itself; training_step() of "
            f"{type(module).__name__} is not called, and what it logs does not exist",
        )
        self._check_optimizers()
        if len(self.optimizers) != 1:
            raise ConfigurationError(
                f"{type(self).__name__} steps one optimizer, configure_optimizers() of {type(module).__name__} gives "
                f"{len(self.optimizers)}"
            )
        monitors = [getattr(part, "monitor", None) for part in (*callbacks_of(trainer), *self.lr_scheduler_configs)]
        self._monitored = any(str(monitor).startswith(f"{self.name}/") for monitor in monitors)
        segments = self.batch_norm == "segments" and self.segmented
        self._forward = SingleForward(module, self.layer, segments=segments, wrapped=not self.single_device)

    def on_backbone_changed(self, trainer: pl.Trainer, module: pl.LightningModule, reason: str) -> None:
        """Run the network that is there now, where another took the place of the one before."""
        if self._forward is not None:
            self._forward.look_again()

    def teardown(self) -> None:
        """Give the user's module back as it was."""
        if self._forward is not None:
            self._forward.close()
        self._forward = self._work = None
        super().teardown()

    # ---- boundaries

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Begin to count the batches of the experience."""
        counters = self._counters
        counters.experience, counters.epoch, counters.batch_in_experience = experience.index, trainer.current_epoch, 0

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Log how many rows of each class the memory has, and keep the numbers for the figure of the run."""
        if self.memory is not None:
            held = self._counters.held[experience.index] = self._ranks.class_counts(self.memory)
            self._log_now(trainer, {f"memory/class_{c}": float(rows) for c, rows in held.items()})

    def _log_now(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{key}": value for key, value in values.items()}, trainer.global_step)

    def run_figures(self) -> dict[str, Any]:
        """Return the figures of the run by file name: the rows of each class in memory after each experience."""
        if not any(self._counters.held.values()):
            return {}
        from clkit.report.run_figures import plot_memory_balance

        return {"memory_balance": plot_memory_balance(self._counters.held)[0]}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let go of what was prepared for the last batch."""
        trainer, counters = self._module.trainer, self._counters
        super().on_train_batch_start(batch, batch_idx)
        self._work, self._logs = None, self._monitored or is_logged(trainer)
        epoch = trainer.current_epoch
        counters.epoch = epoch if counters.epoch is None else counters.epoch
        if epoch > counters.epoch and self.capacity and "epochs" not in self._said:
            self._said.add("epochs")
            rank_zero_warn(
                f"epoch {epoch} is a further one over experience {counters.experience}: the memory counts its images "
                "again, as if they were new; train each experience for one epoch"
            )

    # ---- one batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of one batch, from one forward call; called again for the same batch, of the same views."""
        if self._work is None:
            self._work = self._prepared(args[0] if args else kwargs["batch"])
        work = self._work
        assert self._forward is not None
        if not len(work.incoming.labels):
            return self._forward.zero()
        with self.precision_plugin.train_step_context():
            own = self._forward(self.model, work.views, work.incoming.own.labels, self.projector)
        # entering autocast costs as much as a loss of few rows, and most runs have none to leave
        kind = own.all_logits.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            outputs = own if self.gather is None else self._ranks.joined(own)
            terms = self.terms(outputs)
            loss = total_loss(terms, outputs)
        if work.extras is None:
            work.extras = {name: self._ranks.offered_rows(rows) for name, rows in self.remember(own).items()}
            self._report(work, terms, loss.detach())
        return loss

    def _prepared(self, batch: Any) -> StepWork:
        """Draw and read all that a step needs before the forward; nothing that is kept changes."""
        assert self._forward is not None
        memory = self._memory.rows
        x, y = checked_batch(*self.read_batch(batch), self._forward.width)
        incoming = self._ranks.incoming(x, y, memory)
        if memory is not None:  # what it would refuse is known before the step
            memory.check(incoming.offered, incoming.offered_labels, self.extra_names)
        self._work = work = StepWork(self._counters.step, incoming, self._counters.seen | set(incoming.labels.tolist()))
        count = self.replay_count(len(work.seen)) if incoming.stored else 0
        rows, replay = self.drawn(incoming.own, count, SAMPLE)
        extras = {name: self._ranks.mine(rows.extras[name]).cpu() for name in self.extra_names}
        step = StepBatch(incoming.own, replay, count, rows, extras)
        augment = None
        if not self.augmentation.is_identity:
            augment = partial(self.augmentation, generator=self._generator(VIEWS))
        views = arrange(self.views(step), augment, x)
        self.stream_rows = views.stream
        if not len(views.images) and len(incoming.labels):
            # other processes wait for this one's part in the step: it runs a row that no loss looks at
            views.images, views.segments = incoming.spare[:1], [1]
        work.views = views
        return work

    def drawn(self, new: Block, count: int, purpose: int) -> tuple[MemoryRows, Block]:
        """Return what this process retrieves of ``count`` rows over all processes, and its share of that."""
        ranks, memory = self._ranks, self._memory.rows
        if count and memory is not None and memory.size:
            rows = self.retrieve(new, ranks.drawn_here(count), self._generator(purpose, ranks.shard))
        else:  # also where the own part of the memory is empty
            none = torch.empty(0, dtype=torch.int64)
            extras = {name: torch.empty(0) for name in self.extra_names}
            rows = MemoryRows(new.images[:0], none, none, none, none, extras)
        return rows, ranks.share(rows.data, rows.label, new.images, count)

    def on_batch_learned(self) -> None:
        """Offer the batch to the memory, whatever the loss."""
        work = self._work
        if work is None or work.extras is None or work.kept:  # a batch without rows, or a second step for one batch
            return
        work.kept = True
        memory, incoming = self._memory.rows, work.incoming
        if memory is not None:
            memory.add(incoming.offered, incoming.offered_labels, self._counters.experience, **work.extras)
        self._counters.seen = work.seen
        self._counters.step += 1
        self._counters.batch_in_experience += 1

    def _report(self, work: StepWork, terms: Mapping[str, tuple[float, Tensor]], loss: Tensor) -> None:
        if not math.isfinite(loss):  # with any of its terms, whatever their weights
            self._tell_not_finite(work.step, terms)
        if not self._logs:
            return
        values: dict[str, Any] = {"loss": loss, **{name: term.detach() for name, (_, term) in terms.items()}}
        values |= self.logged()
        memory = self._memory.rows
        if memory is not None:  # once it has the batch
            values["memory"] = float(min(memory.size + len(work.incoming.offered_labels), memory.capacity or 0))
        logged = {f"{self.name}/{key}": value for key, value in values.items()}
        count = max(1, len(work.incoming.labels))
        self._module.log_dict(logged, on_step=True, on_epoch=False, batch_size=count)

    def _tell_not_finite(self, step: int, terms: Mapping[str, tuple[float, Tensor]]) -> None:
        bad = [name for name, (_, term) in terms.items() if name not in self._said and not math.isfinite(term.detach())]
        if bad:  # once for each term: what follows is not finite either
            self._said.update(bad)
            rank_zero_warn(
                f"batch {step}: the loss term{'s' * (len(bad) > 1)} {', '.join(bad)} of "
                f"{type(self).__name__} {'are' if len(bad) > 1 else 'is'} not finite; a lower learning rate may help"
            )

    def _generator(self, purpose: int, shard: int = 0) -> torch.Generator:
        """Return the draws of one purpose and batch."""
        assert self._work is not None
        return generator(self.seed, purpose, self._work.step, shard)

    def _tell_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            rank_zero_info(message)

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return memories, classes seen and counters, and the settings that gave them."""
        return {
            "memory": self._memory.saved(),
            "counters": self._counters.state_dict(),
            "settings": dict(self.settings),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave."""
        saved = read_own(state, self.table, key := self.state_key)
        self._memory.check(saved["memory"], key)
        self._memory.load(saved["memory"], key)
        self._counters = Counters.from_state(saved["counters"])
        changed = [
            f"{name}={value!r} (was {describe(saved['settings'][name])})"
            for name, value in self.settings.items()
            if not is_same(saved["settings"].get(name, value), value)
        ]
        if changed:
            rank_zero_warn(f"{key}: the checkpoint was saved with other settings: {', '.join(changed)}")
