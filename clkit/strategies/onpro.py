"""Online prototype learning (OnPro)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError
from clkit.methods._checks import check_count
from clkit.methods.onpro import OnlinePrototypes, OnProLosses
from clkit.methods.replay.contrast import PrototypeContrast
from clkit.methods.replay.mixing import MixedBatch, Mixing, of_two_classes
from clkit.methods.replay.step import Block, StepBatch, StepOutputs
from clkit.schema import Nested, Table
from clkit.strategies._forward import Projection
from clkit.strategies.replay import MIX, OFFSET, ReplayStrategy
from clkit.stream._lightning import datamodule_of
from clkit.stream.experience import Experience

__all__ = ["OnProStrategy"]


class OnProStrategy(ReplayStrategy):
    """Learns by contrast of online class means and of turned images, beside the cross-entropy of mixed replay (OnPro).

    Logged beside what :class:`ReplayStrategy` logs: ``onpro/mixed_share`` (of the replay batch), ``onpro/pair_entropy``
    (of the distribution over pairs of classes, in nats) and, at the end of each experience,
    ``onpro/prototypes/similarity`` and ``onpro/prototypes/nearest`` (mean and largest cosine of two class means).

    Args:
        capacity: M, images kept; 0 for none.
        losses: Weights, temperatures and rotation, see :class:`~clkit.methods.OnProLosses`.
        mixing: How images of the replay batch are mixed (adaptive prototypical feedback); ``None`` to mix none.
        projection: The embedding beside the classifier.
        replay_per_class: After the first experience, images sampled for each class seen so far; ``None`` for no such
            limit.
        first_experience: ``"paper"``: the first experience replays nothing in cross-entropy and instance contrast;
            ``"replay"``: the later rule holds from the second batch, for streams whose boundaries are unknown.
        options: Further arguments of :class:`ReplayStrategy`.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> OnProStrategy(capacity=500, losses=OnProLosses(rotation="rot4")).losses.images(new=10, replayed=64)
        784

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, "Online Prototype Learning for Online Continual Learning", ICCV
    2023, arXiv 2308.00301.
    """

    state_key = "onpro"
    table: ClassVar[Table] = {**ReplayStrategy.table, "prototypes": Nested(OnlinePrototypes.table)}

    def __init__(
        self,
        capacity: int = 200,
        *,
        losses: OnProLosses = OnProLosses(),
        mixing: Mixing | None = Mixing(),
        projection: Projection = Projection(),
        replay_per_class: int | None = 7,
        first_experience: Literal["paper", "replay"] = "paper",
        **options: Any,
    ) -> None:
        check_arguments(OnProStrategy, locals())
        super().__init__(capacity, **options)
        if mixing is not None and losses.replays and not losses.ope_seen:
            raise ArgumentError(
                "images are mixed by the prototypes of the memory, which ope_seen=0 does without; pass mixing=None, or "
                "an ope_seen above 0"
            )
        self.losses = losses
        self.settings = losses.settings()
        self.segmented = losses.segmented
        self.projection = projection if losses.embeds else None
        self.replay_per_class = None if replay_per_class is None else check_count("replay_per_class", replay_per_class)
        self.first_experience = first_experience
        self.mixes = mixing is not None and losses.replays
        self.prototypes = OnlinePrototypes() if mixing is None else OnlinePrototypes(mixing)
        shows_stream = losses.instance_new or losses.ope_new or (self.augmentation.is_identity and losses.ce_new)
        self.augments_stream = not shows_stream
        self._mixed_share = 0.0
        self._contrast: PrototypeContrast | None = None  # of the batch in work
        self._means: tuple[Tensor, Tensor] | None = None  # ids and means, to be kept once the batch is learned

    # ---- one batch

    @property
    def _first(self) -> bool:
        """Whether the rule of the first experience holds."""
        assert self._work is not None
        early = self.first_experience == "paper" and self._counters.experience == 0
        return early or not self._work.incoming.stored

    def replay_count(self, classes_seen: int) -> int:
        """Return how many rows are sampled: none in the first batch of the first experience, some for each class."""
        if self._first:
            return self.replay_batch if self._counters.batch_in_experience else 0
        per_class = self.replay_per_class
        return self.replay_batch if per_class is None else min(self.replay_batch, per_class * classes_seen)

    def views(self, batch: StepBatch) -> list[dict[str, Block]]:
        """Return the turned images, those for the classifier and those for the prototypes, a group each."""
        assert self._work is not None
        assert self._forward is not None
        classes = self._forward.width or 1 + max(self._work.seen, default=0)
        seen = batch.replay if batch.wanted else None
        self._tell_cost(len(batch.new.images), self.replay_batch if self._first else len(batch.replay.images))
        return self.losses.views(batch.new, seen, self._mixed(batch), classes, first=self._first)

    def _mixed(self, batch: StepBatch) -> Block | None:
        """Return this process's share of the replay batch, if there is one."""
        self._mixed_share = 0.0
        if not batch.wanted or self._first or not self.losses.replays:
            return None
        images, labels = batch.rows.data, batch.rows.label.cpu()
        if self.mixes and self._counters.batch_in_experience:
            assert self.memory is not None
            generator, size = self._generator(MIX, self._ranks.shard), self._ranks.drawn_here(batch.wanted)
            mixed = self.prototypes.mix(images, labels, self.memory, generator, size=size)
        else:  # the first batch of an experience is replayed as it is
            mixed = MixedBatch.pure(images, labels)
        block = self._ranks.share(mixed.images, mixed.labels, batch.new.images, batch.wanted)
        if len(block.images):
            self._mixed_share = float(of_two_classes(*block.labels.unbind(1)).float().mean())
        return block

    def terms(self, outputs: StepOutputs) -> dict[str, tuple[float, Tensor]]:
        """Return the losses of :class:`~clkit.methods.OnProLosses`."""
        terms, self._contrast = self.losses.losses(outputs, self._generator(OFFSET), first=self._first)
        return terms

    def remember(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Note the class means of the memory's sample, which mix the next replay batch."""
        contrast, self._means = self._contrast, None
        if contrast is not None and self.gather is None:  # of all processes, as those of one checkpoint must be
            contrast = self._ranks.class_means(outputs, contrast)
        if contrast is not None and bool(contrast.means.isfinite().all()):
            self._means = contrast.ids, contrast.means.detach()
        return {}

    def logged(self) -> dict[str, float]:
        """Return the share of mixed images and the entropy of the distribution over pairs."""
        if not self.mixes:
            return {}
        entropy = self.prototypes.pair_entropy
        return {"mixed_share": self._mixed_share, **({} if entropy is None else {"pair_entropy": entropy})}

    def on_batch_learned(self) -> None:
        """Offer the batch to the memory, and keep the class means."""
        step = self._counters.step
        super().on_batch_learned()
        if self._counters.step > step and self._means is not None:
            self.prototypes.keep(*self._means)

    # ---- boundaries and messages

    def on_train_start(self) -> None:
        """Say what does not fit the stream."""
        super().on_train_start()
        if not self.capacity or self.first_experience != "paper" or self._boundaries.current is not None:
            return
        data, epochs = datamodule_of(self._module.trainer), self._module.trainer.max_epochs
        advice = "replays nothing in the cross-entropy; use first_experience='replay' where there are no boundaries"
        if not hasattr(data, "experience_at"):
            self._tell_once(
                "fits", f"clkit: without a StreamDataModule each fit is one experience, and the first one {advice}"
            )
        elif epochs and epochs > 0 and getattr(data.experience_at(epochs - 1), "index", 1) == 0:
            rank_zero_warn(f"the stream has a single experience, in which {type(self).__name__} {advice}")

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Log what the memory holds and how similar the class means are."""
        super().on_experience_end(trainer, module, experience)
        if len(self.prototypes) > 1:
            units = F.normalize(self.prototypes.means.double(), dim=1)
            cosines = (units @ units.T)[tuple(torch.triu_indices(len(units), len(units), 1))]
            values = {"prototypes/similarity": float(cosines.mean()), "prototypes/nearest": float(cosines.max())}
            self._log_now(trainer, values)

    def run_figures(self) -> dict[str, Any]:
        """Return the figures of the memory, and one of how similar the class means are now."""
        figures = super().run_figures()
        if not figures or not len(self.prototypes):
            return figures
        from clkit.report.run_figures import plot_prototype_similarity

        figure = plot_prototype_similarity(self.prototypes.ids, self.prototypes.means)[0]
        return {**figures, "prototype_similarity": figure}

    def _tell_cost(self, new: int, replayed: int) -> None:
        losses = self.losses
        if losses.variants > 1 and new:
            cheap = replace(losses, rotation="rot4" if losses.rotation == "rot16" else "none")
            now, then = losses.images(new, replayed), cheap.images(new, replayed)
            self._tell_once(
                "cost",
                f"clkit: once the memory is full each step runs {now} images through the network for {new} new ones "
                f"(rotation={losses.rotation!r}); rotation={cheap.rotation!r} would run {then} ({100 * then // now} %)",
            )

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return what all replay methods save, and the class means."""
        return {**super().stream_state(), "prototypes": self.prototypes.state_dict()}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave."""
        super().load_stream_state(state)  # which checks all of it
        self.prototypes.load_state_dict(state["prototypes"])
