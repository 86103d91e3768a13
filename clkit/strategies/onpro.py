"""Replay learning: OnPro, and by its switches ER, ER-ACE, DER++, SCR and plain fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.features.batch import BatchReader, read_batch
from clkit.features.tap import FeatureTap, Tapped
from clkit.methods._checks import check_choice, check_count
from clkit.methods.onpro import MixedBatch, OnlinePrototypes
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.history import MemoryHistory, PrototypeHistory
from clkit.methods.replay.projector import Projector
from clkit.methods.replay.rule import ReplayRule, StepBatch, StepLosses, StepOutputs, StepViews
from clkit.methods.replay.segments import BatchNormSegments
from clkit.methods.replay.views import Rotation
from clkit.schema import saved_entry, saved_list
from clkit.strategies._augmentation import Augmentation
from clkit.strategies._memory import ReplayMemory
from clkit.strategies._ranks import Incoming
from clkit.strategies.base import LearningStrategy
from clkit.stream._lightning import datamodule_of
from clkit.stream.experience import Experience

__all__ = ["OnProStrategy"]

# so that no two purposes of a step share their draws
_SAMPLE, _MIX, _VIEWS, _OFFSET, _SECOND = range(5)
_UNLABELLED = -1


class OnProStrategy(LearningStrategy):
    """Learns a stream in a single pass, from a small memory of its images (OnPro; by switches ER, ER-ACE, DER++, SCR).

    Choose it when the whole network must go on learning and some images may be kept. Each step runs the incoming batch
    and a sample of the memory through the network, in one forward, and trains it by cross-entropy and contrast;
    see :class:`~clkit.methods.ReplayRule` for the losses. The user's optimizer, schedule, precision, gradient clipping
    and accumulation apply; their ``training_step`` is not called, and the run says so. Prediction is the module's own
    classifier.

    **The loader must deliver images that are not augmented**: they are what the memory keeps. The strategy augments
    them itself, by ``transform``. A whole checkpoint contains the memory, that is, training images; a weights-only one
    does not.

    Other published methods are other settings of it, collected in :data:`~clkit.strategies.REPLAY_METHODS` and in the
    recipes ``configs/<name>.yaml``: experience replay (``er``), ``er_ace``, ``der_pp``, ``scr``, and fine-tuning, which
    is ``er`` with ``capacity=0``.

    Logged under ``name``: ``onpro/loss``, each loss term, ``onpro/memory`` (rows in this process's memory),
    ``onpro/mixed_share`` (of the replay batch) and ``onpro/pair_entropy`` (of the distribution over pairs of classes,
    in nats). Monitors of values that the ``training_step`` logs do not exist.

    With several processes the memory is the same in all of them, that of one process fed with the batches of all, or,
    by ``memory_scope="sharded"``, each has a part of it for its own stream; ``replay_batch`` is shared out. Losses are
    over each process's own rows, and gradients are averaged, unless ``gather="embeddings"``.

    Args:
        capacity: M, images kept; 0 for none.
        transform: Augments a batch of images; ``None`` for :class:`~clkit.methods.RandomViews`. Another callable is
            given one image at a time, since most draw one set of parameters a call, unless it has an attribute
            ``per_sample`` that is true. It may draw from the global random states, which are restored.
        rotation: ``"rot16"``, ``"rot4"`` or ``"none"``: rotated variants in the instance contrast.
        projection_dim: p, width of the embedding; ``None`` for min(128, D).
        projection: ``"linear"``, or ``"mlp"`` with one hidden layer of width D.
        replay_batch: Most images sampled from the memory in a step, over all processes.
        replay_per_class: After the first experience, images sampled for each class seen so far; ``None`` for no such
            limit.
        first_experience: ``"paper"``: the first experience replays nothing in cross-entropy and instance contrast;
            ``"replay"``: the later rule holds from the second batch, for streams whose boundaries are unknown.
        ce_new_weight: See :class:`~clkit.methods.ReplayRule`, as for all weights and temperatures.
        ce_mem_weight: Likewise.
        ce_new_mask: Likewise.
        ce_mean: Likewise.
        instance_new: Likewise.
        instance_mem: Likewise.
        ope_new: Likewise.
        ope_seen: Likewise.
        contrast: Likewise.
        logit_weight: Likewise.
        logit_ce_weight: Likewise.
        prototype_temperature: Likewise.
        instance_temperature: Likewise.
        similarity_scale: Likewise.
        apf: Whether images of the replay batch are mixed (adaptive prototypical feedback).
        base_rate: See :class:`~clkit.methods.OnlinePrototypes`, as for all settings of the mixing.
        mix_probability: Likewise.
        mix_max: Likewise.
        mix_alpha: Likewise.
        pair_rule: Likewise.
        pure_class: Likewise.
        mix_probability_rule: Likewise.
        batch_norm: ``"segments"``: each group of views is normalised by its own statistics, as separate forward calls
            would; ``"joint"``: all together.
        gather: ``"embeddings"``: with several processes the losses are over the rows of all; ``None``: over their own.
        memory_policy: ``"uniform"`` or ``"class_balanced"``, see :class:`~clkit.methods.ReservoirBuffer`.
        memory_storage: ``"same"``, ``"uint8"`` or ``"float16"``.
        memory_mean: With ``"uint8"``: the mean by which the images were normalised, one number or one per channel.
        memory_std: Likewise the standard deviation.
        memory_device: Where the memory is kept.
        memory_scope: With several processes: ``"replicated"``: each has the whole memory, and images go from each to
            all in every step; ``"sharded"``: each has an even part of it, for its own stream, and images go only to
            the first process for a checkpoint, and one to a process that has none. Then images are equally likely to
            be kept where all processes have seen equally many, and mixed pairs come from one process's part.
        name: Prefix of what is logged.
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        seed: Of all draws of the strategy, at least 0; the global random states are left alone.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        ddp_options: Keyword arguments of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> from clkit.strategies import REPLAY_METHODS
        >>> OnProStrategy(capacity=500, rotation="rot4").rule.images(new=10, replayed=64)
        784
        >>> OnProStrategy(capacity=500, **REPLAY_METHODS["er"]).rule.images(new=10, replayed=64)
        74

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, "Online Prototype Learning for Online Continual Learning", ICCV
    2023, arXiv 2308.00301.
    """

    part_name = "onpro_projector"
    skips_unlabelled = True

    def __init__(
        self,
        capacity: int = 200,
        *,
        transform: Callable[[Tensor], Any] | None = None,  # Any: the command line takes Tensor for a class to build
        rotation: Rotation = "rot16",
        projection_dim: int | None = None,
        projection: Literal["linear", "mlp"] = "linear",
        replay_batch: int = 64,
        replay_per_class: int | None = 7,
        first_experience: Literal["paper", "replay"] = "paper",
        ce_new_weight: float = 0.0,
        ce_mem_weight: float = 1.0,
        ce_new_mask: Literal["none", "batch"] = "none",
        ce_mean: Literal["separate", "joint"] = "separate",
        instance_new: float = 1.0,
        instance_mem: float = 1.0,
        ope_new: float = 1.0,
        ope_seen: float = 1.0,
        contrast: float = 0.0,
        logit_weight: float = 0.0,
        logit_ce_weight: float = 0.0,
        prototype_temperature: float = 0.5,
        instance_temperature: float = 0.07,
        similarity_scale: float = 1.0,
        apf: bool = True,
        base_rate: float = 0.75,
        mix_probability: float = 0.6,
        mix_max: float = 0.6,
        mix_alpha: float = 0.4,
        pair_rule: Literal["round", "multinomial"] = "round",
        pure_class: Literal["first", "either"] = "first",
        mix_probability_rule: Literal["squared", "once"] = "squared",
        batch_norm: Literal["segments", "joint"] = "segments",
        gather: Literal["embeddings"] | None = None,
        memory_policy: Literal["uniform", "class_balanced"] = "uniform",
        memory_storage: Literal["same", "uint8", "float16"] = "same",
        memory_mean: float | list[float] | None = None,
        memory_std: float | list[float] | None = None,
        memory_device: str = "cpu",
        memory_scope: Literal["replicated", "sharded"] = "replicated",
        name: str = "onpro",
        layer: str = "auto",
        seed: int = 0,
        batch_reader: BatchReader | None = None,
        **ddp_options: Any,
    ) -> None:
        super().__init__(batch_reader=batch_reader, **ddp_options)
        check_count("capacity", capacity, at_least=0)
        check_choice("projection", projection, ("linear", "mlp"))
        check_choice("first_experience", first_experience, ("paper", "replay"))
        check_choice("batch_norm", batch_norm, ("segments", "joint"))
        check_choice("gather", gather or "none", ("none", "embeddings"))
        check_choice("memory_scope", memory_scope, ("replicated", "sharded"))
        self.capacity = capacity
        self.rule = ReplayRule(
            rotation=rotation,
            ce_new_weight=ce_new_weight,
            ce_mem_weight=ce_mem_weight,
            ce_new_mask=ce_new_mask,
            ce_mean=ce_mean,
            instance_new=instance_new,
            instance_mem=instance_mem,
            ope_new=ope_new,
            ope_seen=ope_seen,
            contrast=contrast,
            logit_weight=logit_weight,
            logit_ce_weight=logit_ce_weight,
            prototype_temperature=prototype_temperature,
            instance_temperature=instance_temperature,
            similarity_scale=similarity_scale,
        )
        if apf and self.rule.replays and not ope_seen:
            raise ArgumentError(
                "apf=True mixes images by the prototypes of the memory, which ope_seen=0 does without; pass apf=False, "
                "or an ope_seen above 0"
            )
        self.projection_dim = None if projection_dim is None else check_count("projection_dim", projection_dim)
        self.projection = projection
        self.replay_batch = check_count("replay_batch", replay_batch)
        self.replay_per_class = None if replay_per_class is None else check_count("replay_per_class", replay_per_class)
        self.first_experience = first_experience
        self.apf = apf
        self.batch_norm = batch_norm
        self.gather = gather
        self.name = name
        self.layer = layer
        self.seed = check_count("seed", seed, at_least=0)
        self.augmentation = Augmentation(transform)
        self.augments_stream = not self._shows_stream
        self.prototypes = OnlinePrototypes(
            base_rate=base_rate,
            mix_probability=mix_probability,
            mix_max=mix_max,
            mix_alpha=mix_alpha,
            pair_rule=pair_rule,
            pure_class=pure_class,
            mix_probability_rule=mix_probability_rule,
        )
        self.memory_scope = memory_scope
        options = {
            "policy": memory_policy,
            "storage": memory_storage,
            "mean": memory_mean,
            "std": memory_std,
            "device": memory_device,
        }
        self._memory = ReplayMemory(capacity, memory_scope, seed, options)
        self._ranks = self._memory.ranks
        self._balance = MemoryHistory()
        self._counted: tuple[int, dict[int, int]] | None = None  # rows by class when the last experience ended
        self._snapshots = PrototypeHistory()
        self._seen: set[int] = set()
        self._step = 0  # batches learned
        self._batch_in_experience = 0
        self._experience = 0
        self._epoch: int | None = None  # in which the experience began
        self._tap: FeatureTap | None = None
        self._segments: BatchNormSegments | None = None
        self._automatic: bool | None = None
        self._work: _Work | None = None
        self._said: set[str] = set()

    @property
    def state_key(self) -> str:
        """``"onpro"``, whichever method the switches make of it."""
        return "onpro"

    @property
    def memory(self) -> ReservoirBuffer | None:
        """What is kept of the stream, of one's own stream where the memory is sharded; ``None`` for capacity 0."""
        return self._memory.rows

    @property
    def projector(self) -> nn.Module | None:
        """The embedding beside the classifier, D to p; ``None`` before the first fit and where no loss needs it."""
        return self.part

    @property
    def _shows_stream(self) -> bool:
        """Whether the incoming batch also goes through the network as it is."""
        rule = self.rule
        plain = rule.instance_new or rule.ope_new or rule.contrast
        return bool(plain or (self.augmentation.is_identity and rule.ce_new_weight))

    def _stream_rows(self, views: StepViews, new: int) -> slice | None:
        plain = ["new1", "contrast1", *["ce_new"] * self.augmentation.is_identity]
        block = next((views.rows[name] for name in plain if name in views.rows), None)
        return slice(block.start, block.start + new) if isinstance(block, slice) else None

    # ---- before and after the loops

    def make_part(self, trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module | None:
        """The projector, with weights that depend on the seed alone.

        Raises:
            ConfigurationError: If the width of the features is not known before the first forward.
            ArgumentError: If ``projection_dim`` is larger than it.
        """
        if not self.rule.embeds:
            return None
        with FeatureTap(module, self.layer) as tap:
            width = tap.width
        if width is None:
            raise ConfigurationError(
                "OnProStrategy cannot tell the width of the features that go into the classifier before the first "
                "forward; pass layer=, the dotted path of the network's last linear layer"
            )
        dim = min(128, width) if self.projection_dim is None else self.projection_dim
        if dim > width:
            raise ArgumentError(
                f"projection_dim={dim} is larger than the {width} features of {type(module).__name__}; an embedding is "
                "at most as wide"
            )
        return Projector(width, dim, self.projection, seed=self.seed)

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepares the module for replay.

        Raises:
            ConfigurationError: If the module cannot be trained so; the message names the reason.
        """
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        self._memory.share_out()
        module = self.lightning_module
        assert module is not None
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
        own_forward = type(module).forward is not pl.LightningModule.forward
        if not own_forward and not self.single_device:
            raise ConfigurationError(
                f"{type(module).__name__} has no forward(), through which DDP must run the network; define it to "
                "return the logits"
            )
        self._tap = FeatureTap(module, self.layer)
        if self.batch_norm == "segments" and self.rule.segmented:
            self._segments = BatchNormSegments(module)
        self._automatic, module.automatic_optimization = module.automatic_optimization, True

    def on_train_start(self) -> None:
        """Says what does not fit the stream."""
        super().on_train_start()
        if not self.capacity or self.first_experience != "paper" or self._boundaries.current is not None:
            return
        data, epochs = datamodule_of(self._trainer), self._trainer.max_epochs
        advice = "use first_experience='replay' where there are no boundaries"
        if not hasattr(data, "experience_at"):
            self._tell_once(
                "fits",
                "clkit: without a StreamDataModule each fit is one experience, and the first one replays nothing in "
                f"the cross-entropy; {advice}",
            )
        elif epochs and epochs > 0 and getattr(data.experience_at(epochs - 1), "index", 1) == 0:
            rank_zero_warn(
                f"the stream has a single experience, in which {type(self).__name__}(first_experience='paper') replays "
                f"nothing in the cross-entropy; {advice}"
            )

    def teardown(self) -> None:
        """Gives the user's module back as it was."""
        if self._segments is not None:
            self._segments.close()
        if self._tap is not None:
            self._tap.close()
        if self.lightning_module is not None and self._automatic is not None:
            self.lightning_module.automatic_optimization = self._automatic
        self._segments = self._tap = self._automatic = self._work = None
        super().teardown()

    # ---- boundaries

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """The first batch of an experience is replayed as it is."""
        self._batch_in_experience = 0
        self._experience = experience.index
        self._epoch = trainer.current_epoch

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """What figures show of this moment."""
        self._balance.boundary(self._step)
        if self.memory is not None:
            self._counted = self._step, self._ranks.class_counts(self.memory)
        if len(self.prototypes):
            self._snapshots.note(experience.index + 1, self.prototypes.ids, self.prototypes.means)

    def run_figures(self) -> Mapping[str, Any]:
        """Figures of the run by file name, for :class:`~clkit.callbacks.StreamEvaluation`; matplotlib is needed.

        How many rows of each class the memory held over time, and how similar the prototypes were at each boundary.
        """
        if self.memory is None or not self.memory.size:
            return {}
        now = (self._step, self.memory.class_counts()) if not self._memory.is_part else self._counted or (None, None)
        from clkit.report.replay_figures import plot_memory_balance, plot_prototype_history

        steps, counts = self._balance.points(*now)
        figures = {"memory_balance": plot_memory_balance(steps, counts, boundaries=self._balance.boundaries)[0]}
        if self._snapshots.snapshots:
            figures["prototype_similarity"] = plot_prototype_history(self._snapshots.snapshots)[0]
        return figures

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A new batch: what was prepared for the last one is let go."""
        super().on_train_batch_start(batch, batch_idx)
        self._work = None
        epoch = self._trainer.current_epoch
        if self._epoch is not None and epoch > self._epoch and self.capacity and "epochs" not in self._said:
            self._said.add("epochs")
            rank_zero_warn(
                f"epoch {epoch} is a further one over experience {self._experience}: the memory counts its images "
                "again, as if they were new; train each experience for one epoch"
            )
        self._epoch = epoch if self._epoch is None else self._epoch

    # ---- one batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch, from one forward call.

        Called again for the same batch (by an optimizer with a closure) it computes the loss of the same views anew,
        and the memory is not offered the batch again.
        """
        assert self._tap is not None
        assert self.model is not None
        if self._work is None:
            self._work = self._prepared(args[0] if args else kwargs["batch"])
        work = self._work
        if not len(work.incoming.labels):
            return self._nothing()
        with self.precision_plugin.train_step_context():
            outputs = self._forward(work.views)
        joined = (work.views, outputs) if self.gather is None else self._ranks.joined(work.views, outputs)
        losses = self.rule.losses(*joined, self._generator(_OFFSET, work.step))
        if work.learned is None:
            work.learned = self._learned_of(work, outputs, losses)
            self._report(work, losses)
        return losses.total

    def _prepared(self, batch: Any) -> _Work:
        """Everything that a step draws and reads before the forward; nothing that is kept changes."""
        x, y = self._checked(*read_batch(batch, self.batch_reader))
        incoming = self._ranks.incoming(x, y, self.memory)
        if self.memory is not None:  # what it would refuse is known before the step
            extras = ["logits"] if self.rule.logit_weight else []
            self.memory.check(incoming.offered, incoming.offered_labels, extras)
        seen = self._seen | set(incoming.labels.tolist())
        stored = incoming.stored
        first = stored == 0 or (self.first_experience == "paper" and self._experience == 0)
        wanted = self.replay_batch
        if not first and self.replay_per_class is not None:
            wanted = min(wanted, self.replay_per_class * len(seen))
        sampled = replayed = second = logits = None
        if self.memory is not None and stored and (not first or self._batch_in_experience):
            rows = self._ranks.sample(self.memory, wanted, self._memory_generator(_SAMPLE), x)
            images, labels = rows.data, rows.label.cpu()
            mixed = MixedBatch.pure(images, labels) if self.rule.replays else None
            if mixed is not None and not first and self.apf and self._batch_in_experience:
                size = self._ranks.drawn_here(wanted)
                mixed = self.prototypes.mix(images, labels, self.memory, self._memory_generator(_MIX), size=size)
            sampled = self._ranks.share(images, labels, x, wanted)
            if self.rule.logit_weight:  # rows without them are refused above
                logits = self._ranks.mine(rows.extras["logits"]) if len(images) else torch.empty(0)
            if not first and mixed is not None:
                replayed = self._ranks.share_mixed(mixed, x, wanted)
            if self.rule.logit_ce_weight:
                again = self._ranks.sample(self.memory, wanted, self._memory_generator(_SECOND), x)
                second = self._ranks.share(again.data, again.label.cpu(), x, wanted)
        own, at = replayed if replayed is not None else (None, None)
        step = StepBatch(incoming.part, first, sampled, own, at, second, logits)
        views = self.rule.views(step, self._augmented, self._num_classes(incoming.labels))
        self.stream_rows = self._stream_rows(views, len(x))
        if not len(views.images) and len(incoming.labels):
            # other processes wait for this one's part in the step: it runs a row that no loss looks at
            views = replace(views, images=incoming.spare, segments=[1])
        mixed_share = float(own.mixed.float().mean()) if own is not None and len(own.images) else 0.0
        work = _Work(self._step, views, incoming, seen, mixed_share)
        self._tell_cost(len(x), 0 if sampled is None else len(sampled.images), views, first)
        return work

    def _forward(self, views: StepViews) -> StepOutputs:
        heard: list[Tapped] = []
        assert self._tap is not None
        listener = self._tap.listen(heard.append)
        try:
            if self._segments is None:
                output = self._run(views.images)
            else:
                with self._segments.step(views.segments):
                    output = self._run(views.images)
        finally:
            listener.remove()
        if not heard:
            raise ConfigurationError(
                f"no features passed the tap at {self._tap.point!r}: forward() does not run the classifier; pass "
                "layer=, the dotted path of the classifier that it does run"
            )
        features, logits = heard[0]
        logits = output if logits is None else logits
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(views.images):
            raise ConfigurationError(
                f"forward() must give logits of shape (B, C) for {type(self).__name__}, got "
                f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}"
            )
        if self._width() is None:  # not known before
            self._check_label(views.labels["new"], logits.shape[1])
        if self.part is None:
            return StepOutputs(logits, features, None)
        return StepOutputs(logits, features, self.part(features))

    def _run(self, images: Tensor) -> Any:
        assert self._tap is not None
        module = self.lightning_module
        assert module is not None
        if type(module).forward is pl.LightningModule.forward:
            return self._tap.network(images)
        assert self.model is not None
        return self.model(images)

    def _learned_of(self, work: _Work, outputs: StepOutputs, losses: StepLosses) -> _Learned:
        """What is taken up once the step is done; a call on all processes."""
        extras = {}
        if self.memory is not None and self.rule.logit_weight:
            rows = work.views.rows["ce_new"]
            extras["logits"] = self._ranks.offered_rows(outputs.logits[rows].detach().float())
        prototypes = losses.prototypes
        if prototypes is not None and self.gather is None:  # of all processes, as those of one checkpoint must be
            assert outputs.embeddings is not None
            prototypes = self._ranks.prototypes(work.views, outputs.embeddings, prototypes)
        if prototypes is None or not bool(prototypes.means.isfinite().all()):
            return _Learned(extras, None)
        return _Learned(extras, (prototypes.ids, prototypes.means.detach()))

    def on_batch_learned(self) -> None:
        """The memory gets the batch, whatever the loss."""
        work = self._work
        if work is None or work.learned is None or work.kept:  # a batch without rows, or a second step for one batch
            return
        work.kept = True
        if self.memory is not None:
            offered = work.incoming.offered, work.incoming.offered_labels
            self.memory.add(*offered, self._experience, **work.learned.extras)
        self._seen = work.seen
        self._step += 1
        self._batch_in_experience += 1
        if self.memory is not None and self._balance.due(self._step):
            self._balance.note(self._step, self._ranks.class_counts(self.memory))
        if work.learned.prototypes is not None:
            self.prototypes.keep(*work.learned.prototypes)

    def _report(self, work: _Work, losses: StepLosses) -> None:
        bad = [name for name, term in losses.terms.items() if name not in self._said and not bool(term.isfinite())]
        if bad:  # once for each term: what follows is not finite either
            self._said.update(bad)
            rank_zero_warn(
                f"batch {work.step}: the loss term{'s' * (len(bad) > 1)} {', '.join(bad)} of "
                f"{type(self).__name__} {'are' if len(bad) > 1 else 'is'} not finite; a lower learning rate may help"
            )
        module = self.lightning_module
        assert module is not None
        values: dict[str, Tensor | float] = {"loss": losses.total.detach(), **losses.terms}
        if self.memory is not None:
            rows, limit = self.memory.size + len(work.incoming.offered_labels), self.memory.capacity
            values["memory"] = float(rows if limit is None else min(rows, limit))  # once it has the batch
        if self.apf and self.rule.replays:
            values["mixed_share"] = work.mixed_share
            if self.prototypes.pair_entropy is not None:
                values["pair_entropy"] = self.prototypes.pair_entropy
        logged = {f"{self.name}/{key}": value for key, value in values.items()}
        module.log_dict(logged, on_step=True, on_epoch=False, batch_size=max(1, len(work.incoming.labels)))

    def _nothing(self) -> Tensor:
        """No rows: a zero with a graph."""
        assert self.lightning_module is not None
        parameters = [p for p in self.lightning_module.parameters() if p.requires_grad]
        return torch.stack([parameter.flatten()[:0].float().sum() for parameter in parameters]).sum()

    # ---- small things

    def _checked(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and labels on the host, of the labelled rows of a batch.

        Raises:
            BatchError: If they cannot be learned.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise BatchError(f"{type(self).__name__} needs images as one floating-point tensor (B, …), got {seen}")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != (len(x),):
            raise BatchError(
                f"targets must be {len(x)} integer class ids, one per image, got {y.dtype} of shape {tuple(y.shape)}"
            )
        labels = y.cpu().long()
        known = labels != _UNLABELLED
        if not bool(known.all()):
            x, labels = x[known.to(x.device)], labels[known]
        if not bool(x.isfinite().all()):
            raise BatchError("images of the batch are not finite; it was refused, nothing was changed")
        self._check_label(labels, self._width())
        return x, labels

    @staticmethod
    def _check_label(labels: Tensor, width: int | None) -> None:
        if not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (width is not None and high >= width):
            raise BatchError(
                f"a batch has the label {low if low < 0 else high}, and the classifier {width} outputs (0 to "
                f"{'?' if width is None else width - 1}); build it with as many outputs as there will be classes"
            )

    def _width(self) -> int | None:
        """Outputs of the classifier, where it tells."""
        assert self._tap is not None
        classifier = self._tap.classifier
        if classifier is None:
            return None
        widths = [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in classifier.modules()]
        return next((int(width) for width in reversed(widths) if width is not None), None)

    def _num_classes(self, labels: Tensor) -> int:
        """A number above all labels; only that it is the same in all processes matters."""
        known = self._width()
        return known if known is not None else 1 + max([*self._seen, *labels.tolist()], default=0)

    def _augmented(self, images: Tensor, positions: Tensor, total: int) -> Tensor:
        return self.augmentation(images, positions, total, self._generator(_VIEWS))

    def _generator(self, purpose: int, step: int | None = None, shard: int = 0) -> torch.Generator:
        """The draws of one purpose and step, the same in all processes that have the same memory."""
        number = self._step if step is None else step
        words = np.random.SeedSequence((self.seed, purpose, number, shard)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def _memory_generator(self, purpose: int) -> torch.Generator:
        """The draws from this process's memory."""
        return self._generator(purpose, shard=self._ranks.shard)

    def _tell_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            rank_zero_info(message)

    def _tell_cost(self, new: int, replayed: int, views: StepViews, first: bool) -> None:
        rule = self.rule
        if rule.variants < 2 or "cost" in self._said or not new:
            return
        replayed = self.replay_batch if first else replayed
        cheap = ReplayRule(**{**rule.settings(), "rotation": "rot4" if rule.rotation == "rot16" else "none"})
        now, then = rule.images(new, replayed), cheap.images(new, replayed)
        self._tell_once(
            "cost",
            f"clkit: once the memory is full each step runs {now} images through the network for {new} new ones "
            f"(rotation={rule.rotation!r}); rotation={cheap.rotation!r} would run {then} ({100 * then // now} %)",
        )

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Memories, prototypes, classes seen and counters, and the settings that gave them."""
        return {
            "memory": self._memory.saved(),
            "prototypes": self.prototypes.state_dict(),
            "balance": self._balance.state_dict(),
            "snapshots": self._snapshots.state_dict(),
            "seen": sorted(self._seen),
            "step": self._step,
            "batch_in_experience": self._batch_in_experience,
            "experience": self._experience,
            "epoch": self._epoch,
            "settings": self.rule.settings(),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`stream_state` gave.

        Raises:
            StateError: If it does not fit these settings; nothing is changed then.
        """
        key = self.state_key
        self._memory.check(state, key)
        seen = set(saved_list(state, "seen", int, key))
        numbers = {name: saved_entry(state, name, int, key) for name in ("step", "batch_in_experience", "experience")}
        negative = [name for name, number in numbers.items() if number < 0]
        if negative:
            raise StateError(f"{key}: {', '.join(negative)} in the saved state must be at least 0; the file is damaged")
        epoch = saved_entry(state, "epoch", int | None, key)
        settings = saved_entry(state, "settings", dict, key)
        prototypes = OnlinePrototypes()
        prototypes.load_state_dict(saved_entry(state, "prototypes", dict, key))
        balance, snapshots = MemoryHistory(), PrototypeHistory()
        balance.load_state_dict(saved_entry(state, "balance", dict, key))
        snapshots.load_state_dict(saved_entry(state, "snapshots", dict, key))
        self._memory.take_up(state["memory"], key)
        self.prototypes.load_state_dict(prototypes.state_dict())
        self._balance, self._snapshots = balance, snapshots
        self._seen, self._epoch = seen, epoch
        self._step, self._batch_in_experience, self._experience = numbers.values()
        self._counted = None
        changed = [
            f"{name}={value!r} (was {settings[name]!r})"
            for name, value in self.rule.settings().items()
            if name in settings and settings[name] != value
        ]
        if changed:
            rank_zero_warn(f"{key}: the checkpoint was saved with other settings: {', '.join(changed)}")


class _Learned(NamedTuple):
    """What a batch taught that is no weight."""

    extras: dict[str, Tensor]  # beside the images, for the memory
    prototypes: tuple[Tensor, Tensor] | None  # ids and means


class _Work:
    """What a batch needs until it is learned."""

    def __init__(self, step: int, views: StepViews, incoming: Incoming, seen: set[int], mixed_share: float) -> None:
        self.step = step
        self.views = views
        self.incoming = incoming
        self.seen = seen
        self.mixed_share = mixed_share
        self.learned: _Learned | None = None
        self.kept = False  # whether it was taken up
